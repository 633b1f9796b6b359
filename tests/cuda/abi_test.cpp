// Compiles if, and only if, shim/cuda.h is what NVIDIA's headers say. Needs cuda.h; run by tests/python/test_gpu.py.
#include <cuda.h>
#include <cudaTypedefs.h>

#include "shim/cuda.h"

namespace dualkv::cuda {

// The same number of parameters, each as large and as aligned, pointers for pointers.
template <typename A, typename B>
constexpr bool kLike =
    sizeof(A) == sizeof(B) && alignof(A) == alignof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <typename A, typename B>
constexpr bool kSame = false;
template <typename RA, typename... A, typename RB, typename... B>
  requires(sizeof...(A) == sizeof...(B))
constexpr bool kSame<RA (*)(A...), RB (*)(B...)> = kLike<RA, RB> && (kLike<A, B> && ...);

#define SAME(entry, type) static_assert(kSame<decltype(Driver::entry), type>, #type)
SAME(init, PFN_cuInit_v2000);
SAME(driver_get_version, PFN_cuDriverGetVersion_v2020);
SAME(get_error_string, PFN_cuGetErrorString_v6000);
SAME(device_get_count, PFN_cuDeviceGetCount_v2000);
SAME(device_get, PFN_cuDeviceGet_v2000);
SAME(device_get_name, PFN_cuDeviceGetName_v2000);
SAME(device_get_attribute, PFN_cuDeviceGetAttribute_v2000);
SAME(device_primary_ctx_retain, PFN_cuDevicePrimaryCtxRetain_v7000);
SAME(device_can_access_peer, PFN_cuDeviceCanAccessPeer_v4000);
SAME(ctx_push_current, PFN_cuCtxPushCurrent_v4000);
SAME(ctx_pop_current, PFN_cuCtxPopCurrent_v4000);
SAME(ctx_enable_peer_access, PFN_cuCtxEnablePeerAccess_v4000);
SAME(ctx_get_stream_priority_range, PFN_cuCtxGetStreamPriorityRange_v5050);
SAME(stream_create_with_priority, PFN_cuStreamCreateWithPriority_v5050);
SAME(stream_destroy, PFN_cuStreamDestroy_v4000);
SAME(stream_synchronize, PFN_cuStreamSynchronize_v2000);
SAME(stream_query, PFN_cuStreamQuery_v2000);
SAME(stream_wait_value32, PFN_cuStreamWaitValue32_v11070);
SAME(stream_is_capturing, PFN_cuStreamIsCapturing_v10000);
SAME(thread_exchange_stream_capture_mode, PFN_cuThreadExchangeStreamCaptureMode_v10010);
SAME(launch_host_func, PFN_cuLaunchHostFunc_v10000);
SAME(mem_host_register, PFN_cuMemHostRegister_v6050);
SAME(mem_host_unregister, PFN_cuMemHostUnregister_v4000);
SAME(mem_host_get_device_pointer, PFN_cuMemHostGetDevicePointer_v3020);
SAME(mem_alloc, PFN_cuMemAlloc_v3020);
SAME(mem_free, PFN_cuMemFree_v3020);
SAME(memcpy_async, PFN_cuMemcpyAsync_v4000);
SAME(memcpy_peer_async, PFN_cuMemcpyPeerAsync_v4000);
SAME(flush_gpu_direct_rdma_writes, PFN_cuFlushGPUDirectRDMAWrites_v11030);
SAME(mem_get_handle_for_address_range, PFN_cuMemGetHandleForAddressRange_v11070);
SAME(pointer_get_attribute, PFN_cuPointerGetAttribute_v4000);
SAME(module_load_data, PFN_cuModuleLoadData_v2000);
SAME(module_get_function, PFN_cuModuleGetFunction_v2000);
SAME(launch_kernel, PFN_cuLaunchKernel_v4000);
SAME(memcpy_batch_async, PFN_cuMemcpyBatchAsync_v12080);

#define EQUAL(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), #theirs)
EQUAL(kSuccess, CUDA_SUCCESS);
EQUAL(kNotReady, CUDA_ERROR_NOT_READY);
EQUAL(kPeerAccessHad, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
EQUAL(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
EQUAL(kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
EQUAL(kWaitGeq, CU_STREAM_WAIT_VALUE_GEQ);
EQUAL(kNotCapturing, CU_STREAM_CAPTURE_STATUS_NONE);
EQUAL(kCaptureRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
EQUAL(kCaptureErrors, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
EQUAL(kCaptureErrorsEnd, CUDA_ERROR_TIMEOUT + 1);
EQUAL(kPointerMemoryType, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
EQUAL(kPointerDeviceOrdinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
EQUAL(kMemoryTypeDevice, CU_MEMORYTYPE_DEVICE);
EQUAL(kAttributePciBus, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
EQUAL(kAttributePciDevice, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID);
EQUAL(kAttributePciDomain, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID);
EQUAL(kAttributeSameHostPointer, CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
EQUAL(kAttributeNicsReach, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED);
EQUAL(kAttributeDmaBuf, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED);
EQUAL(kAttributeNicFlushes, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS);
EQUAL(kAttributeNicOrder, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
EQUAL(kNicFlushByHost, CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST);
EQUAL(kNicOrderOwner, CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER);
EQUAL(kFlushCurrentContext, CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX);
EQUAL(kFlushToOwner, CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER);
EQUAL(kHandleDmaBuf, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
EQUAL(kAccessInStreamOrder, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
EQUAL(sizeof(MemcpyAttributes), sizeof(CUmemcpyAttributes));
EQUAL(offsetof(MemcpyAttributes, source_access_order), offsetof(CUmemcpyAttributes, srcAccessOrder));
EQUAL(offsetof(MemcpyAttributes, source_hint), offsetof(CUmemcpyAttributes, srcLocHint));
EQUAL(offsetof(MemcpyAttributes, target_hint), offsetof(CUmemcpyAttributes, dstLocHint));
EQUAL(offsetof(MemcpyAttributes, flags), offsetof(CUmemcpyAttributes, flags));

}  // namespace dualkv::cuda
