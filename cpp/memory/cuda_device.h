// CudaDevice: one GPU of this process. Copies in batches, by the engine that suits them, and checksums.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/device_place.h"
#include "dualkv/gpu.h"
#include "dualkv/paged_kv.h"
#include "memory/cuda_kernels.h"
#include "memory/pinned.h"
#include "shim/cuda.h"

namespace dualkv {

// Throws Error(kIo) that says what failed and what the driver calls it, unless `result` is success.
void cuda_check(cuda::Result result, const char* what);

// Which side of copies is host memory; the other is the device's.
enum class HostSide : std::uint8_t { kNone, kFrom, kTo };

// Uses the device's primary context, as every runtime library does, and never waits for work that isn't its own: no
// call here but calibrate() synchronizes the device. Thread-safe.
class CudaDevice : public std::enable_shared_from_this<CudaDevice> {
 public:
  // Opened on first use and then kept until the process ends. Throws Error(kUnsupported) where there is no driver, no
  // such device, or its context can't be had.
  static std::shared_ptr<CudaDevice> open(int ordinal);
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // Makes the device's context current on this thread, for the object's lifetime. Calls meanwhile neither break, nor
  // are refused for, a capture of an engine's graph on any thread.
  class Current {
   public:
    explicit Current(const CudaDevice& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const CudaDevice& device_;
    int capture_mode_ = cuda::kCaptureRelaxed;  // the thread's own, meanwhile
  };

  cuda::Driver& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
  const std::string& name() const { return name_; }
  int numa_node() const { return numa_node_; }  // the device's; -1 if it says none
  // Why the engine can't be had here; empty if it can.
  std::string missing(GpuCopy engine) const;
  // What kAuto stands for, for runs of so many bytes: what calibrate() found, else the first of kernel, batch, memcpy.
  GpuCopy choose(std::uint64_t run_bytes) const;
  // Times the engines on runs of 4 KiB, 64 KiB and 1 MiB into 16 MiB of the device's memory, once; takes some 20 ms.
  // Does nothing where so much memory is not free. May synchronize the device when it frees it. Throws Error(kIo).
  void calibrate();

  // Why NICs can't write to its memory, as far as its driver can say; empty if they can.
  std::string missing_for_nics() const;
  // What NICs have announced by now is what all that is queued from now on finds. Throws Error(kIo).
  void settle_nic_writes() const;

  // Throws Error(kInvalidArgument) unless the memory is of this device. An address of no device is not of this one.
  void check_memory(std::span<const Extent> memory) const;

  // Queues copies on `stream`. `runs` must stay as they are until the copies are done: the kernel reads them itself, if
  // they are pinned. Returns the engine that does it: kKernel needs the list and the host side pinned, and one that
  // can't be had is replaced. Throws Error(kIo), with some of the copies under way perhaps. The context must be
  // current.
  GpuCopy enqueue(cuda::Stream stream, std::span<const CopyRun> runs, HostSide host, GpuCopy engine) const;
  // Lets copies here read the other's memory with nothing between the two. False if the driver takes them by the host's
  // memory. Throws Error(kIo).
  bool reach(const CudaDevice& other) const;
  // Queues copies from the other's memory on a stream of this device: each a cuMemcpyPeerAsync, which alone is right
  // for all kinds of memory, whether or not one device sees the other's. Throws as enqueue(). The context must be
  // current.
  void enqueue_from(const CudaDevice& other, cuda::Stream stream, std::span<const CopyRun> runs) const;
  // Blocks until the runs, of any host memory, are copied. Throws Error(kIo).
  void copy_now(std::span<const CopyRun> runs, HostSide host);
  // Queues the sums of Layer Blocks, of which can_sum() says yes: eight lanes each to `lanes`; both pinned.
  void enqueue_checksums(cuda::Stream stream, std::span<const ChecksumRuns> blocks, std::uint64_t* lanes) const;
  // XXH3-64 of each, by the kernel where it can, else by copies to the host and the CPU; blocks. Throws Error(kIo).
  std::vector<std::uint64_t> checksums(std::span<const ChecksumRuns> blocks);
  // True if the kernel sums such Layer Blocks: whole stripes, not too short.
  bool can_sum(const ChecksumRuns& block) const;

  // Throws Error(kInvalidArgument) if the stream is being captured into a graph. The context must be current.
  void check_not_captured(cuda::Stream stream, const char* what) const;
  // Own streams, which the null stream does not wait for. Throws Error(kIo).
  cuda::Stream new_stream(bool low_priority) const;
  void end_stream(cuda::Stream stream) const noexcept;
  // kSuccess: all work of it is done; kNotReady: not yet, or it can't be told now; else the device or its driver have
  // failed, and nothing of it goes on.
  cuda::Result query(cuda::Stream stream) const noexcept;

 private:
  static constexpr std::array<std::uint64_t, 3> kSizes = {4 << 10, 64 << 10, 1 << 20};  // that calibrate() tries

  CudaDevice(cuda::Driver& driver, int ordinal);
  void load_kernels();
  void copy_by_kernel(cuda::Stream stream, std::span<const CopyRun> runs) const;
  void copy_by_batch(cuda::Stream stream, std::span<const CopyRun> runs) const;
  // Locked by the caller.
  cuda::Stream blocking_stream();
  double time_copies(cuda::Stream stream, std::span<const CopyRun> runs, GpuCopy engine) const;

  cuda::Driver& driver_;
  const int ordinal_;
  int device_ = 0;
  cuda::Context context_ = nullptr;
  std::string name_;
  int numa_node_ = -1;
  bool nics_reach_ = false, nic_writes_settle_ = false, nic_writes_need_flush_ = false;
  std::string kernels_missing_;  // why
  cuda::Function copy_ = nullptr;
  cuda::Function checksum_ = nullptr;
  std::optional<PinnedMemory> secret_;                      // of the checksum kernel
  std::array<std::atomic<GpuCopy>, kSizes.size()> best_{};  // of each size; kAuto: not measured
  std::mutex mutex_;                                        // of blocking calls, which share one stream
  cuda::Stream blocking_ = nullptr;
  std::optional<PinnedMemory> list_;  // of theirs
  bool calibrated_ = false;
};

// One Layer Block as the kernels take it.
inline ChecksumRuns checksum_runs(std::span<const Extent> extents) {
  ChecksumRuns out{};
  for (const Extent& extent : extents) {
    out.data[out.count] = reinterpret_cast<std::uint64_t>(extent.data);
    out.bytes[out.count++] = extent.bytes;
  }
  return out;
}

// Appends the copies that bring one to the other; both have as many bytes.
void append_runs(std::span<const Extent> from, std::span<const Extent> to, std::vector<CopyRun>& out);

// checksums() of a GPU's cache.
std::vector<std::uint64_t> cuda_checksums(const PagedKv& cache, std::span<const std::uint32_t> block_ids,
                                          std::uint32_t first_layer, std::uint32_t layer_count);

// Where the GPU is, without making it ready. Throws Error(kUnsupported) without it, or a driver.
DevicePlace place_of_gpu(int ordinal);

}  // namespace dualkv
