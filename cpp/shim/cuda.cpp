// Opening libcuda.
#include "shim/cuda.h"

#include <dlfcn.h>

#include <optional>
#include <type_traits>

namespace dualkv::cuda {

namespace {

struct Loaded {
  std::optional<Driver> driver;
  std::string why;
};

constexpr int kBatchVersion =
    12080;  // the first with cuMemcpyBatchAsync, which later versions have with less parameters

Loaded load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return {{},
            std::string("no CUDA driver: ") + dlerror() +
                "; install NVIDIA's driver, and in a container pass the GPUs on (docker: `--gpus all`)"};
  }
  Driver d{};
  std::string missing;
  const auto find = [&](auto& entry, const char* name) {
    entry = reinterpret_cast<std::remove_reference_t<decltype(entry)>>(dlsym(library, name));
    if (entry == nullptr && missing.empty()) missing = name;
  };
  find(d.init, "cuInit");
  find(d.driver_get_version, "cuDriverGetVersion");
  find(d.get_error_string, "cuGetErrorString");
  find(d.device_get_count, "cuDeviceGetCount");
  find(d.device_get, "cuDeviceGet");
  find(d.device_get_name, "cuDeviceGetName");
  find(d.device_get_attribute, "cuDeviceGetAttribute");
  find(d.device_primary_ctx_retain, "cuDevicePrimaryCtxRetain");
  find(d.ctx_push_current, "cuCtxPushCurrent_v2");
  find(d.ctx_pop_current, "cuCtxPopCurrent_v2");
  find(d.ctx_get_stream_priority_range, "cuCtxGetStreamPriorityRange");
  find(d.stream_create_with_priority, "cuStreamCreateWithPriority");
  find(d.stream_destroy, "cuStreamDestroy_v2");
  find(d.stream_synchronize, "cuStreamSynchronize");
  find(d.stream_query, "cuStreamQuery");
  find(d.stream_wait_value32, "cuStreamWaitValue32_v2");
  find(d.stream_is_capturing, "cuStreamIsCapturing");
  find(d.thread_exchange_stream_capture_mode, "cuThreadExchangeStreamCaptureMode");
  find(d.launch_host_func, "cuLaunchHostFunc");
  find(d.mem_host_register, "cuMemHostRegister_v2");
  find(d.mem_host_unregister, "cuMemHostUnregister");
  find(d.mem_host_get_device_pointer, "cuMemHostGetDevicePointer_v2");
  find(d.mem_alloc, "cuMemAlloc_v2");
  find(d.mem_free, "cuMemFree_v2");
  find(d.memcpy_async, "cuMemcpyAsync");
  find(d.flush_gpu_direct_rdma_writes, "cuFlushGPUDirectRDMAWrites");
  find(d.mem_get_handle_for_address_range, "cuMemGetHandleForAddressRange");
  find(d.pointer_get_attribute, "cuPointerGetAttribute");
  find(d.module_load_data, "cuModuleLoadData");
  find(d.module_get_function, "cuModuleGetFunction");
  find(d.launch_kernel, "cuLaunchKernel");
  Result (*get_proc_address)(const char* name, void** call, int version, std::uint64_t flags, int* found) = nullptr;
  find(get_proc_address, "cuGetProcAddress_v2");
  if (!missing.empty()) return {{}, "libcuda.so.1 has no " + missing + "; a driver of CUDA 12.0 or later is needed"};
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
  static Loaded loaded = load();
  if (why != nullptr) *why = loaded.why;
  return loaded.driver ? &*loaded.driver : nullptr;
}

}  // namespace dualkv::cuda
