// The CUDA driver, opened at run time: without it everything else works. NVIDIA's header can't be shipped along, so the
// part of the driver's stable ABI in use is declared here; cuda_abi_test.cu checks it against the header where there is
// nvcc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dualkv::cuda {

using Result = int;  // CUresult; 0 is success
using DevicePtr = std::uint64_t;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using HostFunction = void (*)(void*);

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;
inline constexpr Result kPeerAccessHad = 704;  // from an earlier call, of whoever's

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr unsigned kWaitGeq = 0;
inline constexpr int kNotCapturing = 0;
inline constexpr int kCaptureRelaxed = 2;
inline constexpr Result kCaptureErrors = 900, kCaptureErrorsEnd = 910;  // of calls that a capture does not allow
inline constexpr int kPointerMemoryType = 2;
inline constexpr int kPointerDeviceOrdinal = 9;
inline constexpr unsigned kMemoryTypeDevice = 2;
inline constexpr int kAttributePciBus = 33;
inline constexpr int kAttributePciDevice = 34;
inline constexpr int kAttributePciDomain = 50;
inline constexpr int kAttributeSameHostPointer = 91;  // of registered host memory
inline constexpr int kAttributeNicsReach = 116;       // by nvidia-peermem; by dma-buf:
inline constexpr int kAttributeDmaBuf = 124;
inline constexpr int kAttributeNicFlushes = 117;  // kNicFlushByHost | ...
inline constexpr int kAttributeNicOrder = 118;    // of NICs' writes, for the GPU; kNicOrderOwner: needs no flush
inline constexpr int kNicFlushByHost = 1;
inline constexpr int kNicOrderOwner = 100;
inline constexpr int kFlushCurrentContext = 0;
inline constexpr int kFlushToOwner = 100;
inline constexpr int kHandleDmaBuf = 1;

struct MemLocation {
  int type;
  int id;
};

// CUmemcpyAttributes.
struct MemcpyAttributes {
  int source_access_order;
  MemLocation source_hint;
  MemLocation target_hint;
  unsigned flags;
};
inline constexpr int kAccessInStreamOrder = 1;

// The calls in use, by the names of the header. Tests replace entries to inject faults.
struct Driver {
  Result (*init)(unsigned flags);
  Result (*driver_get_version)(int* version);
  Result (*get_error_string)(Result, const char** text);
  Result (*device_get_count)(int* count);
  Result (*device_get)(int* device, int ordinal);
  Result (*device_get_name)(char* name, int bytes, int device);
  Result (*device_get_attribute)(int* value, int attribute, int device);
  Result (*device_primary_ctx_retain)(Context*, int device);
  Result (*device_can_access_peer)(int* can, int device, int peer);
  Result (*ctx_push_current)(Context);
  Result (*ctx_pop_current)(Context*);
  Result (*ctx_enable_peer_access)(Context peer, unsigned flags);
  Result (*ctx_get_stream_priority_range)(int* least, int* greatest);
  Result (*stream_create_with_priority)(Stream*, unsigned flags, int priority);
  Result (*stream_destroy)(Stream);
  Result (*stream_synchronize)(Stream);
  Result (*stream_query)(Stream);
  Result (*stream_wait_value32)(Stream, DevicePtr address, std::uint32_t value, unsigned flags);
  Result (*stream_is_capturing)(Stream, int* status);
  Result (*thread_exchange_stream_capture_mode)(int* mode);
  Result (*launch_host_func)(Stream, HostFunction, void* data);
  Result (*mem_host_register)(void*, std::size_t bytes, unsigned flags);
  Result (*mem_host_unregister)(void*);
  Result (*mem_host_get_device_pointer)(DevicePtr*, void*, unsigned flags);
  Result (*mem_alloc)(DevicePtr*, std::size_t bytes);
  Result (*mem_free)(DevicePtr);
  Result (*memcpy_async)(DevicePtr to, DevicePtr from, std::size_t bytes, Stream);
  Result (*memcpy_peer_async)(DevicePtr to, Context of_to, DevicePtr from, Context of_from, std::size_t bytes, Stream);
  Result (*pointer_get_attribute)(void* value, int attribute, DevicePtr);
  Result (*module_load_data)(Module*, const void* image);
  Result (*module_get_function)(Function*, Module, const char* name);
  Result (*launch_kernel)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream, void** parameters,
                          void** extra);
  Result (*flush_gpu_direct_rdma_writes)(int target, int scope);
  Result (*mem_get_handle_for_address_range)(void* handle, DevicePtr, std::size_t bytes, int type,
                                             unsigned long long flags);
  // May be null: needs a driver of CUDA 12.8.
  Result (*memcpy_batch_async)(DevicePtr* to, DevicePtr* from, std::size_t* bytes, std::size_t count, MemcpyAttributes*,
                               std::size_t* first_of_attributes, std::size_t attributes, std::size_t* failed, Stream);
};

// Null where there is no driver, or one that is too old, or cuInit fails; `why` then says so, with the likely cure.
// Opened on the first call, not before. Any thread.
Driver* driver(std::string* why = nullptr);

}  // namespace dualkv::cuda
