// Opening a GPU, its copy engines and its checksum kernel.
#include "memory/cuda_device.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "base/clock.h"
#include "base/hash.h"
#include "base/text.h"
#include "dualkv/keys.h"
#include "dualkv/status.h"
#include "memory/copier.h"

namespace dualkv {

namespace {

constexpr unsigned kCopyBlocks = 4, kCopyThreads = 512;  // enough bytes in flight for a PCIe 5 link, on four SMs
constexpr unsigned kSumThreads = 256, kSumMostBlocks = 264;
constexpr std::size_t kBatchRuns = 4096;   // of one cuMemcpyBatchAsync
constexpr std::size_t kSumsAtOnce = 4096;  // Layer Blocks of one kernel of a blocking call
constexpr std::uint64_t kCalibrationBytes = 16 << 20;
constexpr std::size_t kCalibrationRuns = 512;

#ifdef DUALKV_CUDA_KERNELS
// The fat binary that nvcc made, as it is.
asm(".pushsection .rodata\n"
    ".balign 64\n"
    "dualkv_cuda_kernels_begin:\n"
    ".incbin \"" DUALKV_CUDA_KERNELS
    "\"\n"
    ".popsection\n");
extern "C" const unsigned char dualkv_cuda_kernels_begin[] __attribute__((visibility("hidden")));
const void* kernels() { return dualkv_cuda_kernels_begin; }
#else
const void* kernels() { return nullptr; }
#endif

std::string error_text(cuda::Result result) {
  const char* text = nullptr;
  if (cuda::Driver* driver = cuda::driver()) driver->get_error_string(result, &text);
  return dualkv::text(text != nullptr ? text : "unknown error", " (CUDA error ", result, ")");
}

cuda::Driver& driver_or_throw() {
  std::string why;
  cuda::Driver* driver = cuda::driver(&why);
  if (driver == nullptr) throw Error(Code::kUnsupported, "GPU memory: " + why);
  return *driver;
}

int device_count(const cuda::Driver& driver) {
  int count = 0;
  cuda_check(driver.device_get_count(&count), "counting GPUs (cuDeviceGetCount)");
  return count;
}

// Of the side that is the host's.
bool all_pinned(std::span<const CopyRun> runs, HostSide host) {
  if (host == HostSide::kNone) return true;
  PinnedRanges pinned;
  return std::all_of(runs.begin(), runs.end(), [&](const CopyRun& run) {
    return pinned.contain(host == HostSide::kFrom ? run.from : run.to, run.bytes);
  });
}

DevicePlace place_of_device(const cuda::Driver& driver, int device) {
  int domain = 0, bus = 0, slot = 0;
  driver.device_get_attribute(&domain, cuda::kAttributePciDomain, device);
  driver.device_get_attribute(&bus, cuda::kAttributePciBus, device);
  driver.device_get_attribute(&slot, cuda::kAttributePciDevice, device);
  char path[80];
  std::snprintf(path, sizeof(path), "/sys/bus/pci/devices/%04x:%02x:%02x.0", domain, bus, slot);
  return place_of(path);
}

void check_ordinal(int ordinal, int count) {
  if (ordinal >= 0 && ordinal < count) return;
  throw Error(Code::kUnsupported, text("GPU memory: there is no GPU ", ordinal, ", the driver shows ", count,
                                       " (CUDA_VISIBLE_DEVICES, or the container's `--gpus`, chooses which)"));
}

}  // namespace

void cuda_check(cuda::Result result, const char* what) {
  if (result != cuda::kSuccess) throw Error(Code::kIo, text(what, ": ", error_text(result)));
}

std::shared_ptr<CudaDevice> CudaDevice::open(int ordinal) {
  static std::mutex mutex;
  // Never closed: by the end of the process the driver may have gone before any destructor of ours.
  static auto* opened = new std::map<int, std::shared_ptr<CudaDevice>>;
  const std::lock_guard lock(mutex);
  if (const auto found = opened->find(ordinal); found != opened->end()) return found->second;
  cuda::Driver& driver = driver_or_throw();
  check_ordinal(ordinal, device_count(driver));
  std::shared_ptr<CudaDevice> device(new CudaDevice(driver, ordinal));
  device->load_kernels();
  opened->emplace(ordinal, device);
  return device;
}

CudaDevice::CudaDevice(cuda::Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {
  const auto need = [&](cuda::Result result, const char* call) {
    if (result == cuda::kSuccess) return;
    throw Error(Code::kUnsupported, text("GPU ", ordinal, ": ", call, ": ", error_text(result)));
  };
  need(driver.device_get(&device_, ordinal), "cuDeviceGet");
  char name[128] = {};
  need(driver.device_get_name(name, sizeof(name) - 1, device_), "cuDeviceGetName");
  name_ = name;
  numa_node_ = place_of_device(driver, device_).numa_node;
  const auto attribute = [&](int which) {
    int value = 0;
    driver.device_get_attribute(&value, which, device_);
    return value;
  };
  nics_reach_ = attribute(cuda::kAttributeNicsReach) != 0 || attribute(cuda::kAttributeDmaBuf) != 0;
  nic_writes_need_flush_ = attribute(cuda::kAttributeNicOrder) < cuda::kNicOrderOwner;
  nic_writes_settle_ = !nic_writes_need_flush_ || (attribute(cuda::kAttributeNicFlushes) & cuda::kNicFlushByHost) != 0;
  need(driver.device_primary_ctx_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

void CudaDevice::load_kernels() {
  const Current current(*this);
  int same_address = 0;
  driver_.device_get_attribute(&same_address, cuda::kAttributeSameHostPointer, device_);
  if (kernels() == nullptr) {
    kernels_missing_ = "this build of dualkv has no kernels; build it where nvcc is found";
  } else if (same_address == 0) {
    kernels_missing_ = "this device sees host memory at other addresses than the CPU";
  } else {
    cuda::Module module = nullptr;
    cuda::Result result = driver_.module_load_data(&module, kernels());
    if (result == cuda::kSuccess) result = driver_.module_get_function(&copy_, module, "dualkv_copy");
    if (result == cuda::kSuccess) result = driver_.module_get_function(&checksum_, module, "dualkv_checksum");
    if (result != cuda::kSuccess) {
      kernels_missing_ = text("the driver does not load dualkv's kernels: ", error_text(result));
    }
  }
  if (!kernels_missing_.empty()) return;
  const auto constants = checksum_constants();
  secret_.emplace(shared_from_this(), sizeof(constants));
  std::copy_n(reinterpret_cast<const std::byte*>(constants.data()), sizeof(constants), secret_->data());
}

std::string CudaDevice::missing_for_nics() const {
  if (!nics_reach_) return "the driver lets no NIC write to this device's memory (GPUDirect RDMA)";
  if (!nic_writes_settle_) return "the driver can't say when NICs' writes to this device are seen by it";
  return "";
}

void CudaDevice::settle_nic_writes() const {
  if (!nic_writes_need_flush_) return;
  const Current current(*this);
  cuda_check(driver_.flush_gpu_direct_rdma_writes(cuda::kFlushCurrentContext, cuda::kFlushToOwner),
             "making NICs' writes visible to a GPU (cuFlushGPUDirectRDMAWrites)");
}

CudaDevice::Current::Current(const CudaDevice& device) : device_(device) {
  cuda_check(device_.driver_.ctx_push_current(device_.context_), "using a GPU (cuCtxPushCurrent)");
  device_.driver_.thread_exchange_stream_capture_mode(&capture_mode_);
}

CudaDevice::Current::~Current() {
  device_.driver_.thread_exchange_stream_capture_mode(&capture_mode_);
  cuda::Context context = nullptr;
  device_.driver_.ctx_pop_current(&context);
}

std::string CudaDevice::missing(GpuCopy engine) const {
  if (engine == GpuCopy::kKernel) return kernels_missing_;
  if (engine == GpuCopy::kBatch && driver_.memcpy_batch_async == nullptr) {
    return "the driver has no cuMemcpyBatchAsync; it came with CUDA 12.8";
  }
  return {};
}

GpuCopy CudaDevice::choose(std::uint64_t run_bytes) const {
  std::size_t nearest = 0;  // the largest size that the runs reach
  while (nearest + 1 < kSizes.size() && run_bytes >= kSizes[nearest + 1]) ++nearest;
  if (const GpuCopy best = best_[nearest]; best != GpuCopy::kAuto) return best;
  if (missing(GpuCopy::kKernel).empty()) return GpuCopy::kKernel;
  return missing(GpuCopy::kBatch).empty() ? GpuCopy::kBatch : GpuCopy::kMemcpy;
}

void CudaDevice::calibrate() {
  const std::lock_guard lock(mutex_);
  if (calibrated_) return;
  const Current current(*this);
  const cuda::Stream stream = blocking_stream();
  const PinnedMemory host(shared_from_this(), kCalibrationBytes);
  const PinnedMemory list(shared_from_this(), kCalibrationRuns * sizeof(CopyRun));
  const std::span runs(reinterpret_cast<CopyRun*>(list.data()), kCalibrationRuns);
  cuda::DevicePtr memory = 0;
  if (driver_.mem_alloc(&memory, kCalibrationBytes) != cuda::kSuccess) return;
  const auto give_back = [this, stream](const cuda::DevicePtr* device_memory) {
    driver_.stream_synchronize(stream);  // copies of what is left half-way
    driver_.mem_free(*device_memory);
  };
  const std::unique_ptr<const cuda::DevicePtr, decltype(give_back)> guard(&memory, give_back);
  for (std::size_t size = 0; size < kSizes.size(); ++size) {
    const std::size_t count = std::min<std::size_t>(kCalibrationRuns, kCalibrationBytes / kSizes[size]);
    for (std::size_t i = 0; i < count; ++i) {
      // Apart from each other on the device, so that no engine makes one copy of two.
      const std::uint64_t at = i * 7 % count * kSizes[size];
      runs[i] = {reinterpret_cast<std::uint64_t>(host.data()) + i * kSizes[size], memory + at, kSizes[size]};
    }
    double least = 1e9;
    for (const GpuCopy engine : {GpuCopy::kKernel, GpuCopy::kBatch, GpuCopy::kMemcpy}) {
      if (!missing(engine).empty()) continue;
      time_copies(stream, runs.first(count), engine);  // the first of its kind pays for what is kept
      const double seconds = time_copies(stream, runs.first(count), engine);
      if (seconds >= least) continue;
      least = seconds;
      best_[size] = engine;
    }
  }
  calibrated_ = true;
}

double CudaDevice::time_copies(cuda::Stream stream, std::span<const CopyRun> runs, GpuCopy engine) const {
  const auto begin = Clock::now();
  enqueue(stream, runs, HostSide::kFrom, engine);
  cuda_check(driver_.stream_synchronize(stream), "timing the copy engines of a GPU");
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void CudaDevice::check_memory(std::span<const Extent> memory) const {
  for (const Extent& extent : memory) {
    const int ordinal = gpu_of(extent.data);
    if (ordinal == ordinal_) continue;
    throw Error(Code::kInvalidArgument, text("KV cache: the memory at ", static_cast<const void*>(extent.data),
                                             " is of GPU ", ordinal, ", not of GPU ", ordinal_));
  }
}

GpuCopy CudaDevice::enqueue(cuda::Stream stream, std::span<const CopyRun> runs, HostSide host, GpuCopy engine) const {
  if (runs.empty()) return engine;
  std::uint64_t bytes = 0;
  for (const CopyRun& run : runs) bytes += run.bytes;
  if (engine == GpuCopy::kAuto) engine = choose(bytes / runs.size());
  if (engine == GpuCopy::kKernel) {
    // A kernel may touch no host memory but what is pinned.
    const bool listed = PinnedRanges().contain(reinterpret_cast<std::uint64_t>(runs.data()), runs.size_bytes());
    if (!kernels_missing_.empty() || !listed || !all_pinned(runs, host)) engine = GpuCopy::kBatch;
  }
  if (engine == GpuCopy::kBatch && driver_.memcpy_batch_async == nullptr) engine = GpuCopy::kMemcpy;
  switch (engine) {
    case GpuCopy::kKernel: copy_by_kernel(stream, runs); break;
    case GpuCopy::kBatch: copy_by_batch(stream, runs); break;
    default:
      for (const CopyRun& run : runs) {
        cuda_check(driver_.memcpy_async(run.to, run.from, run.bytes, stream), "a copy by a GPU (cuMemcpyAsync)");
      }
  }
  return engine;
}

bool CudaDevice::reach(const CudaDevice& other) const {
  int can = 0;
  cuda_check(driver_.device_can_access_peer(&can, device_, other.device_), "asking about a GPU's peer");
  if (can == 0) return false;
  const Current current(*this);
  const cuda::Result result = driver_.ctx_enable_peer_access(other.context_, 0);
  return result == cuda::kSuccess || result == cuda::kPeerAccessHad;
}

void CudaDevice::enqueue_from(const CudaDevice& other, cuda::Stream stream, std::span<const CopyRun> runs) const {
  for (const CopyRun& run : runs) {
    cuda_check(driver_.memcpy_peer_async(run.to, context_, run.from, other.context_, run.bytes, stream),
               "a copy between GPUs (cuMemcpyPeerAsync)");
  }
}

void CudaDevice::copy_by_kernel(cuda::Stream stream, std::span<const CopyRun> runs) const {
  std::uint64_t longest = 0;
  for (const CopyRun& run : runs) longest = std::max(longest, run.bytes);
  const CopyRun* list = runs.data();
  auto count = static_cast<std::uint32_t>(runs.size());
  auto pieces = static_cast<std::uint32_t>((longest + kCopyPiece - 1) / kCopyPiece);
  void* parameters[] = {&list, &count, &pieces};
  cuda_check(driver_.launch_kernel(copy_, kCopyBlocks, 1, 1, kCopyThreads, 1, 1, 0, stream, parameters, nullptr),
             "a copy by a GPU's kernel (cuLaunchKernel)");
}

void CudaDevice::copy_by_batch(cuda::Stream stream, std::span<const CopyRun> runs) const {
  thread_local std::array<cuda::DevicePtr, kBatchRuns> to, from;
  thread_local std::array<std::size_t, kBatchRuns> bytes;
  for (std::size_t first = 0; first < runs.size(); first += kBatchRuns) {
    const std::size_t count = std::min(kBatchRuns, runs.size() - first);
    for (std::size_t i = 0; i < count; ++i) {
      to[i] = runs[first + i].to;
      from[i] = runs[first + i].from;
      bytes[i] = runs[first + i].bytes;
    }
    cuda::MemcpyAttributes attributes{cuda::kAccessInStreamOrder, {}, {}, 0};
    std::size_t first_of = 0, failed = 0;
    cuda_check(driver_.memcpy_batch_async(to.data(), from.data(), bytes.data(), count, &attributes, &first_of, 1,
                                          &failed, stream),
               "copies by a GPU (cuMemcpyBatchAsync)");
  }
}

void CudaDevice::check_not_captured(cuda::Stream stream, const char* what) const {
  int status = cuda::kNotCapturing;
  cuda_check(driver_.stream_is_capturing(stream, &status), "asking about a stream (cuStreamIsCapturing)");
  if (status == cuda::kNotCapturing) return;
  throw Error(Code::kInvalidArgument,
              text(what,
                   ": the stream is being captured into a graph, which would be for this load only; put "
                   "LayerGates into the graph, and open_gates() before each replay"));
}

cuda::Stream CudaDevice::new_stream(bool low_priority) const {
  const Current current(*this);
  int least = 0, greatest = 0;
  driver_.ctx_get_stream_priority_range(&least, &greatest);
  cuda::Stream stream = nullptr;
  cuda_check(driver_.stream_create_with_priority(&stream, cuda::kStreamNonBlocking, low_priority ? least : greatest),
             "a stream of a GPU (cuStreamCreateWithPriority)");
  return stream;
}

cuda::Result CudaDevice::query(cuda::Stream stream) const noexcept {
  try {
    const Current current(*this);
    const cuda::Result result = driver_.stream_query(stream);
    const bool of_a_capture = result >= cuda::kCaptureErrors && result < cuda::kCaptureErrorsEnd;
    return of_a_capture ? cuda::kNotReady : result;
  } catch (const Error&) {
    return cuda::kNotReady;
  }
}

void CudaDevice::end_stream(cuda::Stream stream) const noexcept {
  try {
    const Current current(*this);
    driver_.stream_destroy(stream);
  } catch (const Error&) {
    // The driver has gone, and its streams with it.
  }
}

cuda::Stream CudaDevice::blocking_stream() {
  if (blocking_ == nullptr) blocking_ = new_stream(true);
  return blocking_;
}

void CudaDevice::copy_now(std::span<const CopyRun> runs, HostSide host) {
  const std::lock_guard lock(mutex_);
  const Current current(*this);
  const cuda::Stream stream = blocking_stream();
  // Only of pinned memory are all engines fast, and the kernel possible.
  const bool pinned = all_pinned(runs, host);
  if (pinned && !list_) list_.emplace(shared_from_this(), kBatchRuns * sizeof(CopyRun), numa_node_);
  while (!runs.empty()) {
    auto part = runs.first(std::min(kBatchRuns, runs.size()));
    runs = runs.subspan(part.size());
    if (pinned) {
      auto* list = reinterpret_cast<CopyRun*>(list_->data());
      std::copy(part.begin(), part.end(), list);
      part = {list, part.size()};
    }
    try {
      enqueue(stream, part, host, pinned ? GpuCopy::kAuto : GpuCopy::kMemcpy);
    } catch (...) {
      driver_.stream_synchronize(stream);  // those before it
      throw;
    }
    cuda_check(driver_.stream_synchronize(stream), "copies by a GPU");
  }
}

bool CudaDevice::can_sum(const ChecksumRuns& block) const {
  std::uint64_t total = 0;
  for (std::uint32_t i = 0; i < block.count; ++i) {
    if (block.bytes[i] % kChecksumStripe != 0 || block.data[i] % sizeof(std::uint64_t) != 0) return false;
    total += block.bytes[i];
  }
  return kernels_missing_.empty() && total >= kChecksumShortest;
}

void CudaDevice::enqueue_checksums(cuda::Stream stream, std::span<const ChecksumRuns> blocks,
                                   std::uint64_t* lanes) const {
  const ChecksumRuns* list = blocks.data();
  auto count = static_cast<std::uint32_t>(blocks.size());
  const void* secret = secret_->data();
  void* parameters[] = {&list, &count, &secret, &lanes};
  const auto grid = std::min((count * kChecksumLanes + kSumThreads - 1) / kSumThreads, kSumMostBlocks);
  cuda_check(driver_.launch_kernel(checksum_, grid, 1, 1, kSumThreads, 1, 1, 0, stream, parameters, nullptr),
             "checksums by a GPU (cuLaunchKernel)");
}

std::vector<std::uint64_t> CudaDevice::checksums(std::span<const ChecksumRuns> blocks) {
  std::vector<std::uint64_t> sums(blocks.size());
  const auto total = [](const ChecksumRuns& block) {
    std::uint64_t bytes = 0;
    for (std::uint32_t i = 0; i < block.count; ++i) bytes += block.bytes[i];
    return bytes;
  };
  if (!std::all_of(blocks.begin(), blocks.end(), [this](const auto& block) { return can_sum(block); })) {
    std::vector<std::byte> copy;
    for (std::size_t n = 0; n < blocks.size(); ++n) {
      copy.resize(total(blocks[n]));
      std::vector<CopyRun> runs;
      auto at = reinterpret_cast<std::uint64_t>(copy.data());
      for (std::uint32_t i = 0; i < blocks[n].count; at += blocks[n].bytes[i++]) {
        runs.push_back({blocks[n].data[i], at, blocks[n].bytes[i]});
      }
      copy_now(runs, HostSide::kTo);
      sums[n] = checksum(std::span<const std::byte>(copy));
    }
    return sums;
  }
  const std::size_t most = std::min(kSumsAtOnce, blocks.size());
  const PinnedMemory list(shared_from_this(), most * sizeof(ChecksumRuns));
  const PinnedMemory lanes(shared_from_this(), most * kChecksumLanes * sizeof(std::uint64_t));
  const std::span listed(reinterpret_cast<ChecksumRuns*>(list.data()), most);
  auto* words = reinterpret_cast<std::uint64_t*>(lanes.data());
  const std::lock_guard lock(mutex_);
  const Current current(*this);
  const cuda::Stream stream = blocking_stream();
  for (std::size_t first = 0; first < blocks.size(); first += most) {
    const auto part = blocks.subspan(first, std::min(most, blocks.size() - first));
    std::copy(part.begin(), part.end(), listed.begin());
    enqueue_checksums(stream, listed.first(part.size()), words);
    cuda_check(driver_.stream_synchronize(stream), "checksums by a GPU");
    for (std::size_t i = 0; i < part.size(); ++i) {
      sums[first + i] = checksum_of_lanes(
          std::span<const std::uint64_t, kChecksumLanes>(words + i * kChecksumLanes, kChecksumLanes), total(part[i]));
    }
  }
  return sums;
}

void append_runs(std::span<const Extent> from, std::span<const Extent> to, std::vector<CopyRun>& out) {
  for_each_run(
      from, to,
      [&](const Extent& source, std::uint64_t read, const Extent& target, std::uint64_t written, std::uint64_t run) {
        out.push_back({reinterpret_cast<std::uint64_t>(source.data) + read,
                       reinterpret_cast<std::uint64_t>(target.data) + written, run});
      });
}

std::vector<std::uint64_t> cuda_checksums(const PagedKv& cache, std::span<const std::uint32_t> block_ids,
                                          std::uint32_t first_layer, std::uint32_t layer_count) {
  std::vector<ChecksumRuns> blocks;
  blocks.reserve(std::size_t{layer_count} * block_ids.size());
  for (std::uint32_t layer = first_layer; layer < first_layer + layer_count; ++layer) {
    for (std::uint32_t id : block_ids) {
      std::array<Extent, PagedKv::kMaxPlanes> extents;
      blocks.push_back(checksum_runs(std::span(extents).first(cache.extents(layer, id, extents))));
    }
  }
  return CudaDevice::open(cache.device())->checksums(blocks);
}

const char* to_string(GpuCopy engine) {
  switch (engine) {
    case GpuCopy::kAuto: return "auto";
    case GpuCopy::kMemcpy: return "memcpy";
    case GpuCopy::kBatch: return "batch";
    case GpuCopy::kKernel: return "kernel";
  }
  return "?";
}

int gpu_of(const void* pointer) {
  cuda::Driver& driver = driver_or_throw();
  const auto address = reinterpret_cast<std::uint64_t>(pointer);
  unsigned type = 0;
  int ordinal = -1;
  const bool known = driver.pointer_get_attribute(&type, cuda::kPointerMemoryType, address) == cuda::kSuccess &&
                     driver.pointer_get_attribute(&ordinal, cuda::kPointerDeviceOrdinal, address) == cuda::kSuccess;
  if (known && type == cuda::kMemoryTypeDevice) return ordinal;
  throw Error(Code::kInvalidArgument,
              text("the memory at ", pointer, " is ", known ? "host memory" : "not known to CUDA", ", not of a GPU"));
}

DevicePlace place_of_gpu(int ordinal) {
  cuda::Driver& driver = driver_or_throw();
  check_ordinal(ordinal, device_count(driver));
  int device = 0;
  cuda_check(driver.device_get(&device, ordinal), "finding a GPU (cuDeviceGet)");
  return place_of_device(driver, device);
}

std::vector<GpuInfo> gpus() {
  cuda::Driver& driver = driver_or_throw();
  int version = 0;
  driver.driver_get_version(&version);
  std::vector<GpuInfo> out;
  for (int i = 0, count = device_count(driver); i < count; ++i) {
    const auto device = CudaDevice::open(i);
    out.push_back({i, device->name(), version, device->missing(GpuCopy::kBatch), device->missing(GpuCopy::kKernel)});
  }
  return out;
}

}  // namespace dualkv
