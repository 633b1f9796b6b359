// Opening libcuda.
#include "shim/cuda.h"

#include "shim/library.h"

namespace dualkv::cuda {

namespace {

constexpr int kBatchVersion =
    12080;  // the first with cuMemcpyBatchAsync, which later versions have with less parameters

Loaded<Driver> load() {
  SharedLibrary shared("libcuda.so.1");
  if (!shared.error().empty()) {
    return {{},
            "no CUDA driver: " + shared.error() +
                "; install NVIDIA's driver, and in a container pass the GPUs on (docker: `--gpus all`)"};
  }
  Driver d{};
  shared.find(d.init, "cuInit");
  shared.find(d.driver_get_version, "cuDriverGetVersion");
  shared.find(d.get_error_string, "cuGetErrorString");
  shared.find(d.device_get_count, "cuDeviceGetCount");
  shared.find(d.device_get, "cuDeviceGet");
  shared.find(d.device_get_name, "cuDeviceGetName");
  shared.find(d.device_get_attribute, "cuDeviceGetAttribute");
  shared.find(d.device_primary_ctx_retain, "cuDevicePrimaryCtxRetain");
  shared.find(d.device_can_access_peer, "cuDeviceCanAccessPeer");
  shared.find(d.ctx_push_current, "cuCtxPushCurrent_v2");
  shared.find(d.ctx_pop_current, "cuCtxPopCurrent_v2");
  shared.find(d.ctx_enable_peer_access, "cuCtxEnablePeerAccess");
  shared.find(d.ctx_get_stream_priority_range, "cuCtxGetStreamPriorityRange");
  shared.find(d.stream_create_with_priority, "cuStreamCreateWithPriority");
  shared.find(d.stream_destroy, "cuStreamDestroy_v2");
  shared.find(d.stream_synchronize, "cuStreamSynchronize");
  shared.find(d.stream_query, "cuStreamQuery");
  shared.find(d.stream_wait_value32, "cuStreamWaitValue32_v2");
  shared.find(d.stream_is_capturing, "cuStreamIsCapturing");
  shared.find(d.thread_exchange_stream_capture_mode, "cuThreadExchangeStreamCaptureMode");
  shared.find(d.launch_host_func, "cuLaunchHostFunc");
  shared.find(d.mem_host_register, "cuMemHostRegister_v2");
  shared.find(d.mem_host_unregister, "cuMemHostUnregister");
  shared.find(d.mem_host_get_device_pointer, "cuMemHostGetDevicePointer_v2");
  shared.find(d.mem_alloc, "cuMemAlloc_v2");
  shared.find(d.mem_free, "cuMemFree_v2");
  shared.find(d.memcpy_async, "cuMemcpyAsync");
  shared.find(d.memcpy_peer_async, "cuMemcpyPeerAsync");
  shared.find(d.flush_gpu_direct_rdma_writes, "cuFlushGPUDirectRDMAWrites");
  shared.find(d.mem_get_handle_for_address_range, "cuMemGetHandleForAddressRange");
  shared.find(d.pointer_get_attribute, "cuPointerGetAttribute");
  shared.find(d.module_load_data, "cuModuleLoadData");
  shared.find(d.module_get_function, "cuModuleGetFunction");
  shared.find(d.launch_kernel, "cuLaunchKernel");
  Result (*get_proc_address)(const char* name, void** call, int version, std::uint64_t flags, int* found) = nullptr;
  shared.find(get_proc_address, "cuGetProcAddress_v2");
  if (!shared.missing().empty()) {
    return {{}, "libcuda.so.1 has no " + shared.missing() + "; a driver of CUDA 12.0 or later is needed"};
  }
  if (const Result result = d.init(0); result != kSuccess) {
    const char* text = nullptr;
    d.get_error_string(result, &text);
    return {{},
            std::string("cuInit: ") + (text != nullptr ? text : "unknown error") + " (" + std::to_string(result) +
                "); see `nvidia-smi`: the driver's library and its kernel module must be of one version"};
  }
  int found = 0;
  void* batch = nullptr;
  if (get_proc_address("cuMemcpyBatchAsync", &batch, kBatchVersion, 0, &found) == kSuccess) {
    d.memcpy_batch_async = reinterpret_cast<decltype(d.memcpy_batch_async)>(batch);
  }
  return {d, {}};
}

}  // namespace

Driver* driver(std::string* why) {
  static Loaded<Driver> loaded = load();
  return loaded.get(why);
}

}  // namespace dualkv::cuda
