// A stand-in for libcuda.so.1, for tests on machines without a GPU: as many of the driver's calls as dualkv makes, with
// the driver's rules. Device memory is a mapping that the CPU may not touch, with a second one that only copies and
// kernels use; streams are threads; kernels are cuda_kernels.cu as a host compiler sees it. What a GPU is, it is not:
// nothing here says how fast anything is, nor that the SASS is right.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <thread>
#include <utility>
#include <vector>

#include "memory/cuda_kernels.h"
#include "shim/cuda.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define CALL extern "C" __attribute__((visibility("default")))

// The part of CUDA C++ that the kernels use.
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct Dimensions {
  unsigned x;
};
static thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;
static uint4 __ldcs(const uint4* from) { return *from; }
static void __stcs(uint4* to, const uint4& value) { *to = value; }
#include "memory/cuda_kernels.cu"

using namespace dualkv::cuda;

namespace {

constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidDevice = 101, kInvalidImage = 200,
                 kInvalidContext = 201, kNotFound = 500, kIllegalAddress = 700, kAlreadyRegistered = 712,
                 kNotRegistered = 713, kNotPermitted = 800;

int device_count() {
  const char* count = std::getenv("DUALKV_STAND_IN_GPUS");
  return count != nullptr ? std::atoi(count) : 3;
}

struct Allocation {
  std::size_t bytes;
  std::byte* shadow;  // the same memory, readable
  int fd;             // of it: what a dma-buf is to a real driver
  int device;
};

struct Memory {
  std::shared_mutex mutex;
  std::map<DevicePtr, Allocation> device;
  std::map<DevicePtr, std::size_t> pinned;

  template <typename Map>
  static typename Map::iterator holding(Map& map, DevicePtr address) {
    auto after = map.upper_bound(address);
    return after == map.begin() ? map.end() : --after;
  }
  // Where the CPU finds it; null where the device's work must not go.
  std::byte* find(DevicePtr address, std::size_t bytes, int device_of_work, bool may_be_pageable) {
    const std::shared_lock lock(mutex);
    if (const auto it = holding(device, address); it != device.end() && address - it->first < it->second.bytes) {
      const bool inside = it->second.bytes - (address - it->first) >= bytes && it->second.device == device_of_work;
      return inside ? it->second.shadow + (address - it->first) : nullptr;
    }
    if (const auto it = holding(pinned, address); it != pinned.end() && address - it->first < it->second) {
      return it->second - (address - it->first) >= bytes ? reinterpret_cast<std::byte*>(address) : nullptr;
    }
    return may_be_pageable ? reinterpret_cast<std::byte*>(address) : nullptr;
  }
};

Memory& memory() {
  static auto* all = new Memory;
  return *all;
}

// While a graph is captured in the mode of torch.cuda.graph, some calls are refused on every thread that has not said
// it knows what it does.
std::atomic<int> captures{0};
thread_local int capture_mode = 0;
bool refused_for_a_capture() { return captures > 0 && capture_mode != kCaptureRelaxed; }

// What a stream's thread runs; false: the device has failed.
using Work = std::function<bool()>;

struct Device;

struct Queue {
  Device* device;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> work;
  std::vector<Work> captured;
  bool running = false, ended = false, capturing = false;
};

thread_local bool in_host_function = false;

struct Device {
  int ordinal = 0;
  std::atomic<Result> failed{kSuccess};
  std::shared_ptr<Queue> null_stream;
};

std::vector<Device>& devices() {
  static auto* all = [] {
    auto* made = new std::vector<Device>(device_count());
    for (std::size_t i = 0; i < made->size(); ++i) (*made)[i].ordinal = static_cast<int>(i);
    return made;
  }();
  return *all;
}

std::mutex streams_mutex;
std::map<Stream, std::shared_ptr<Queue>> streams;
thread_local std::vector<Device*> contexts;

Device* current() { return contexts.empty() ? nullptr : contexts.back(); }

void run_stream(const std::shared_ptr<Queue>& queue) {
  std::unique_lock lock(queue->mutex);
  while (true) {
    queue->changed.wait(lock, [&] { return queue->ended || !queue->work.empty(); });
    if (queue->work.empty()) return;
    const Work work = std::move(queue->work.front());
    queue->work.pop_front();
    queue->running = true;
    lock.unlock();
    if (queue->device->failed == kSuccess && !work()) queue->device->failed = kIllegalAddress;
    lock.lock();
    queue->running = false;
    queue->changed.notify_all();
  }
}

std::shared_ptr<Queue> new_queue(Device& device) {
  auto queue = std::make_shared<Queue>();
  queue->device = &device;
  std::thread([queue] { run_stream(queue); }).detach();
  return queue;
}

std::shared_ptr<Queue> queue_of(Stream stream) {
  const std::lock_guard lock(streams_mutex);
  if (stream != nullptr) {
    const auto found = streams.find(stream);
    return found == streams.end() ? nullptr : found->second;
  }
  Device* device = current();
  if (device == nullptr) return nullptr;
  if (!device->null_stream) device->null_stream = new_queue(*device);
  return device->null_stream;
}

// Of every call that queues work: the driver's own checks come first.
Result put(Stream stream, const std::function<Work(Device&)>& make) {
  if (in_host_function) return kNotPermitted;
  if (current() == nullptr) return kInvalidContext;
  const auto queue = queue_of(stream);
  if (!queue) return kInvalidValue;
  if (queue->device != current()) return kInvalidContext;
  if (queue->device->failed != kSuccess) return queue->device->failed;
  Work work = make(*queue->device);
  if (!work) return kInvalidValue;
  const std::lock_guard lock(queue->mutex);
  if (queue->capturing) {
    queue->captured.push_back(std::move(work));
    return kSuccess;
  }
  queue->work.push_back(std::move(work));
  queue->changed.notify_all();
  return kSuccess;
}

template <typename Kernel>
void run_threads(unsigned grid, unsigned block, const Kernel& kernel) {
  gridDim = {grid};
  blockDim = {block};
  for (blockIdx = {0}; blockIdx.x < grid; ++blockIdx.x) {
    for (threadIdx = {0}; threadIdx.x < block; ++threadIdx.x) kernel();
  }
}

// Kernels see addresses as the CPU does, if the device may go there.
bool translate(DevicePtr& address, std::uint64_t bytes, int device) {
  std::byte* place = memory().find(address, bytes, device, false);
  address = reinterpret_cast<DevicePtr>(place);
  return place != nullptr;
}

Work copy_kernel(Device& device, void** parameters, unsigned grid, unsigned block) {
  const auto* runs = *static_cast<const dualkv::CopyRun**>(parameters[0]);
  const auto count = *static_cast<std::uint32_t*>(parameters[1]), pieces = *static_cast<std::uint32_t*>(parameters[2]);
  return [=, ordinal = device.ordinal] {
    auto list = reinterpret_cast<DevicePtr>(runs);
    if (!translate(list, count * sizeof(*runs), ordinal)) return false;
    std::vector<dualkv::CopyRun> places(runs, runs + count);
    for (auto& run : places) {
      if (!translate(run.from, run.bytes, ordinal) || !translate(run.to, run.bytes, ordinal)) return false;
    }
    run_threads(grid, block, [&] { dualkv_copy(places.data(), count, pieces); });
    return true;
  };
}

Work checksum_kernel(Device& device, void** parameters, unsigned grid, unsigned block) {
  const auto* blocks = *static_cast<const dualkv::ChecksumRuns**>(parameters[0]);
  const auto count = *static_cast<std::uint32_t*>(parameters[1]);
  const auto* secret = *static_cast<const std::uint64_t**>(parameters[2]);
  auto* lanes = *static_cast<std::uint64_t**>(parameters[3]);
  return [=, ordinal = device.ordinal] {
    std::vector<dualkv::ChecksumRuns> places(blocks, blocks + count);
    for (auto& place : places) {
      for (std::uint32_t i = 0; i < place.count; ++i) {
        if (!translate(place.data[i], place.bytes[i], ordinal)) return false;
      }
    }
    run_threads(grid, block, [&] { dualkv_checksum(places.data(), count, secret, lanes); });
    return true;
  };
}

Work one_copy(DevicePtr to, DevicePtr from, std::size_t bytes, Device& device) {
  std::byte* target = memory().find(to, bytes, device.ordinal, true);
  const std::byte* source = memory().find(from, bytes, device.ordinal, true);
  if (target == nullptr || source == nullptr) return nullptr;
  return [=] {
    std::memcpy(target, source, bytes);
    return true;
  };
}

Result copy_batch(DevicePtr* to, DevicePtr* from, std::size_t* bytes, std::size_t count, MemcpyAttributes* attributes,
                  std::size_t* first_of_attributes, std::size_t attribute_count, std::size_t* failed, Stream stream) {
  if (count == 0 || attribute_count == 0 || first_of_attributes[0] != 0 || stream == nullptr) return kInvalidValue;
  if (attributes[0].source_access_order != kAccessInStreamOrder) return kInvalidValue;
  for (std::size_t i = 0; i < count; ++i) {
    *failed = i;
    const Result result = put(stream, [&](Device& device) { return one_copy(to[i], from[i], bytes[i], device); });
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

int copy_function, checksum_function, module_;

}  // namespace

// For tests: from now on the device fails whatever it is asked, as after an uncorrectable error.
CALL void stand_in_fail(int ordinal) { devices().at(ordinal).failed = kIllegalAddress; }

// For tests: kernels wait until they are let go.
static std::atomic<bool> held{false};
CALL void stand_in_hold(bool hold) { held = hold; }

// For the stand-in of cuFile: what its DMA would do, if `from` is not null. False if it is not all of one allocation.
CALL bool stand_in_write(DevicePtr to, const void* from, std::size_t bytes) {
  const std::shared_lock lock(memory().mutex);
  const auto it = Memory::holding(memory().device, to);
  if (it == memory().device.end() || to - it->first > it->second.bytes) return false;
  if (it->second.bytes - (to - it->first) < bytes) return false;
  if (from != nullptr) std::memcpy(it->second.shadow + (to - it->first), from, bytes);
  return true;
}

CALL Result cuInit(unsigned) { return device_count() > 0 ? kSuccess : kNoDevice; }
CALL Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
CALL Result cuGetErrorString(Result result, const char** text) {
  *text = result == kIllegalAddress ? "an illegal memory access was encountered"
          : result == kNoDevice     ? "no CUDA-capable device is detected"
                                    : "an error of the stand-in driver";
  return kSuccess;
}
CALL Result cuDeviceGetCount(int* count) { return *count = device_count(), kSuccess; }
CALL Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < device_count() ? kSuccess : kInvalidDevice;
}
CALL Result cuDeviceGetName(char* name, int bytes, int device) {
  std::snprintf(name, static_cast<std::size_t>(bytes), "stand-in %d", device);
  return kSuccess;
}
CALL Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  // NICs' writes to the second must be flushed before it sees them.
  switch (attribute) {
    case kAttributeSameHostPointer:
    case kAttributeNicsReach:
    case kAttributeDmaBuf:
    case kAttributeNicFlushes: *value = 1; break;
    case kAttributeNicOrder: *value = device == 0 ? kNicOrderOwner : 0; break;
    default: *value = 0;
  }
  return kSuccess;
}
CALL Result cuDevicePrimaryCtxRetain(Context* context, int device) {
  *context = reinterpret_cast<Context>(&devices().at(device));
  return kSuccess;
}
CALL Result cuDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return kSuccess;
}
CALL Result cuCtxPushCurrent_v2(Context context) {
  if (in_host_function) return kNotPermitted;
  contexts.push_back(reinterpret_cast<Device*>(context));
  return kSuccess;
}
CALL Result cuCtxPopCurrent_v2(Context* context) {
  if (contexts.empty()) return kInvalidContext;
  if (context != nullptr) *context = reinterpret_cast<Context>(contexts.back());
  contexts.pop_back();
  return kSuccess;
}
CALL Result cuCtxEnablePeerAccess(Context peer, unsigned flags) {
  if (current() == nullptr) return kInvalidContext;
  if (flags != 0 || reinterpret_cast<Device*>(peer) == current()) return kInvalidValue;
  static std::mutex mutex;
  static auto* enabled = new std::set<std::pair<Device*, Context>>;
  const std::lock_guard lock(mutex);
  return enabled->insert({current(), peer}).second ? kSuccess : kPeerAccessHad;
}
CALL Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return current() != nullptr ? kSuccess : kInvalidContext;
}

CALL Result cuStreamCreateWithPriority(Stream* stream, unsigned, int) {
  if (current() == nullptr) return kInvalidContext;
  auto queue = new_queue(*current());
  *stream = reinterpret_cast<Stream>(queue.get());
  const std::lock_guard lock(streams_mutex);
  streams.emplace(*stream, std::move(queue));
  return kSuccess;
}
CALL Result cuStreamDestroy_v2(Stream stream) {
  const auto queue = queue_of(stream);
  if (!queue || stream == nullptr) return kInvalidValue;
  {
    const std::lock_guard lock(streams_mutex);
    streams.erase(stream);
  }
  const std::lock_guard lock(queue->mutex);
  queue->ended = true;
  queue->changed.notify_all();
  return kSuccess;
}
CALL Result cuStreamSynchronize(Stream stream) {
  if (in_host_function) return kNotPermitted;
  const auto queue = queue_of(stream);
  if (!queue) return kInvalidValue;
  std::unique_lock lock(queue->mutex);
  queue->changed.wait(lock, [&] { return queue->work.empty() && !queue->running; });
  return queue->device->failed;
}
CALL Result cuThreadExchangeStreamCaptureMode(int* mode) {
  if (in_host_function) return kNotPermitted;
  std::swap(capture_mode, *mode);
  return kSuccess;
}
CALL Result cuStreamQuery(Stream stream) {
  if (in_host_function) return kNotPermitted;
  if (current() == nullptr) return kInvalidContext;
  if (refused_for_a_capture()) return kCaptureErrors;
  const auto queue = queue_of(stream);
  if (!queue) return kInvalidValue;
  if (queue->device->failed != kSuccess) return queue->device->failed;
  const std::lock_guard lock(queue->mutex);
  return queue->work.empty() && !queue->running ? kSuccess : kNotReady;
}
CALL Result cuStreamWaitValue32_v2(Stream stream, DevicePtr address, std::uint32_t value, unsigned flags) {
  if (flags != kWaitGeq || address % sizeof(value) != 0) return kInvalidValue;
  return put(stream, [=](Device& device) -> Work {
    std::byte* place = memory().find(address, sizeof(value), device.ordinal, false);
    if (place == nullptr) return nullptr;
    return [place, value, &device] {
      const auto word = std::atomic_ref(*reinterpret_cast<std::uint32_t*>(place));
      // As the driver has it: cyclically greater or equal.
      while (static_cast<std::int32_t>(word.load(std::memory_order_acquire) - value) < 0) {
        if (device.failed != kSuccess) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      return true;
    };
  });
}
// Graphs: a stream that stand_in_capture() was called with keeps what is put on it, to be replayed.
CALL Result cuStreamIsCapturing(Stream stream, int* status) {
  const auto queue = queue_of(stream);
  if (!queue) return kInvalidValue;
  const std::lock_guard lock(queue->mutex);
  *status = queue->capturing ? 1 : 0;
  return kSuccess;
}
CALL void stand_in_capture(Stream stream) {
  const auto queue = queue_of(stream);
  const std::lock_guard lock(queue->mutex);
  queue->capturing = true;
  ++captures;
}
// Ends the capture, or puts what was captured on the stream once more.
CALL void stand_in_replay(Stream stream) {
  const auto queue = queue_of(stream);
  const std::lock_guard lock(queue->mutex);
  if (std::exchange(queue->capturing, false)) {
    --captures;
  } else {
    queue->work.insert(queue->work.end(), queue->captured.begin(), queue->captured.end());
    queue->changed.notify_all();
  }
}

CALL Result cuLaunchHostFunc(Stream stream, HostFunction function, void* data) {
  return put(stream, [=](Device&) -> Work {
    return [=] {
      in_host_function = true;
      function(data);
      in_host_function = false;
      return true;
    };
  });
}

CALL Result cuMemHostRegister_v2(void* begin, std::size_t bytes, unsigned) {
  if (in_host_function) return kNotPermitted;
  if (current() == nullptr) return kInvalidContext;
  if (refused_for_a_capture()) return kCaptureErrors;
  const auto address = reinterpret_cast<DevicePtr>(begin);
  const std::unique_lock lock(memory().mutex);
  for (const auto& [at, size] : memory().pinned) {
    if (at < address + bytes && address < at + size) return kAlreadyRegistered;
  }
  memory().pinned.emplace(address, bytes);
  return kSuccess;
}
CALL Result cuMemHostUnregister(void* begin) {
  if (in_host_function) return kNotPermitted;
  if (current() == nullptr) return kInvalidContext;
  const std::unique_lock lock(memory().mutex);
  return memory().pinned.erase(reinterpret_cast<DevicePtr>(begin)) == 1 ? kSuccess : kNotRegistered;
}
CALL Result cuMemHostGetDevicePointer_v2(DevicePtr* pointer, void* host, unsigned) {
  *pointer = reinterpret_cast<DevicePtr>(host);
  return memory().find(*pointer, 1, -1, false) != nullptr ? kSuccess : kInvalidValue;
}
CALL Result cuMemAlloc_v2(DevicePtr* pointer, std::size_t bytes) {
  if (current() == nullptr) return kInvalidContext;
  if (refused_for_a_capture()) return kCaptureErrors;
  const int fd = memfd_create("stand-in device memory", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  void* mine = mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, fd, 0);
  void* shadow = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mine == MAP_FAILED || shadow == MAP_FAILED) return kOutOfMemory;
  *pointer = reinterpret_cast<DevicePtr>(mine);
  const std::unique_lock lock(memory().mutex);
  memory().device[*pointer] = {bytes, static_cast<std::byte*>(shadow), fd, current()->ordinal};
  return kSuccess;
}
CALL Result cuMemFree_v2(DevicePtr pointer) {
  const std::unique_lock lock(memory().mutex);
  const auto found = memory().device.find(pointer);
  if (found == memory().device.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(pointer), found->second.bytes);
  munmap(found->second.shadow, found->second.bytes);
  close(found->second.fd);
  memory().device.erase(found);
  return kSuccess;
}
CALL Result cuMemcpyAsync(DevicePtr to, DevicePtr from, std::size_t bytes, Stream stream) {
  return put(stream, [&](Device& device) { return one_copy(to, from, bytes, device); });
}
CALL Result cuMemcpyPeerAsync(DevicePtr to, Context of_to, DevicePtr from, Context of_from, std::size_t bytes,
                              Stream stream) {
  return put(stream, [&](Device&) -> Work {
    std::byte* target = memory().find(to, bytes, reinterpret_cast<Device*>(of_to)->ordinal, false);
    const std::byte* source = memory().find(from, bytes, reinterpret_cast<Device*>(of_from)->ordinal, false);
    if (target == nullptr || source == nullptr) return nullptr;
    return [=] {
      std::memcpy(target, source, bytes);
      return true;
    };
  });
}
CALL Result cuMemGetHandleForAddressRange(void* handle, DevicePtr begin, std::size_t bytes, int type,
                                          unsigned long long) {
  const std::shared_lock lock(memory().mutex);
  const auto found = memory().device.find(begin);
  if (type != kHandleDmaBuf || found == memory().device.end() || found->second.bytes != bytes) return kInvalidValue;
  *static_cast<int*>(handle) = fcntl(found->second.fd, F_DUPFD_CLOEXEC, 0);
  return kSuccess;
}
static std::atomic<int> flushes{0};
CALL int stand_in_flushes() { return flushes; }
CALL Result cuFlushGPUDirectRDMAWrites(int target, int scope) {
  if (current() == nullptr) return kInvalidContext;
  if (target != kFlushCurrentContext || scope != kFlushToOwner) return kInvalidValue;
  ++flushes;
  return kSuccess;
}
CALL Result cuPointerGetAttribute(void* value, int attribute, DevicePtr address) {
  const std::shared_lock lock(memory().mutex);
  auto& device = memory().device;
  if (const auto it = Memory::holding(device, address); it != device.end() && address - it->first < it->second.bytes) {
    *static_cast<int*>(value) =
        attribute == kPointerMemoryType ? static_cast<int>(kMemoryTypeDevice) : it->second.device;
    return kSuccess;
  }
  auto& pinned = memory().pinned;
  if (const auto it = Memory::holding(pinned, address); it != pinned.end() && address - it->first < it->second) {
    *static_cast<int*>(value) = attribute == kPointerMemoryType ? 1 : 0;
    return kSuccess;
  }
  return kInvalidValue;
}

CALL Result cuModuleLoadData(Module* module, const void* image) {
  constexpr std::uint32_t kFatBinary = 0xBA55ED50;
  if (current() == nullptr) return kInvalidContext;
  if (image == nullptr || *static_cast<const std::uint32_t*>(image) != kFatBinary) return kInvalidImage;
  *module = reinterpret_cast<Module>(&module_);
  return kSuccess;
}
CALL Result cuModuleGetFunction(Function* function, Module, const char* name) {
  if (std::strcmp(name, "dualkv_copy") == 0) return *function = reinterpret_cast<Function>(&copy_function), kSuccess;
  if (std::strcmp(name, "dualkv_checksum") != 0) return kNotFound;
  *function = reinterpret_cast<Function>(&checksum_function);
  return kSuccess;
}
CALL Result cuLaunchKernel(Function function, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                           unsigned, Stream stream, void** parameters, void**) {
  return put(stream, [&](Device& device) {
    const bool copies = function == reinterpret_cast<Function>(&copy_function);
    Work kernel = (copies ? copy_kernel : checksum_kernel)(device, parameters, grid, block);
    if (!kernel) return kernel;
    return Work([kernel = std::move(kernel)] {
      while (held) std::this_thread::sleep_for(std::chrono::microseconds(50));
      return kernel();
    });
  });
}
CALL Result cuGetProcAddress_v2(const char* name, void** call, int version, std::uint64_t, int*) {
  const bool had = std::strcmp(name, "cuMemcpyBatchAsync") == 0 && version == 12080 &&
                   std::getenv("DUALKV_STAND_IN_NO_BATCH") == nullptr;
  *call = had ? reinterpret_cast<void*>(copy_batch) : nullptr;
  return had ? kSuccess : kNotFound;
}
