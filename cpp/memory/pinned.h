// PinnedRange: host memory that GPUs reach by themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <span>

#include "memory/region.h"

namespace dualkv {

class CudaDevice;

// Registers memory with the CUDA driver, for all devices of the process, as long as it lives. The memory must outlive
// it. A copy must not cross from one range to the next, though they may touch: the driver refuses those.
class PinnedRange {
 public:
  // Throws Error(kUnsupported | kIo). Blocking: takes about 0.1 s a GiB of memory that is locked already.
  PinnedRange(std::shared_ptr<CudaDevice> device, std::span<std::byte> memory);
  ~PinnedRange();
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;

  std::span<std::byte> memory() const { return memory_; }

 private:
  const std::shared_ptr<CudaDevice> device_;  // the call needs one; it is pinned for all
  const std::span<std::byte> memory_;
};

// Asks about many addresses at once: no range is added or removed while it lives. Any thread.
class PinnedRanges {
 public:
  PinnedRanges();
  // True if all of it lies in one PinnedRange.
  bool contain(std::uint64_t address, std::uint64_t bytes);

 private:
  std::shared_lock<std::shared_mutex> lock_;
  std::uint64_t begin_ = 0, size_ = 0;  // of the one that was found last
};

// Zeroed memory of its own, pinned.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<CudaDevice> device, std::uint64_t bytes, int numa_node = -1)
      : region_(bytes, RegionOptions{false, numa_node, false}), range_(std::move(device), region_.memory()) {}
  std::byte* data() const { return region_.memory().data(); }
  std::span<std::byte> memory() const { return region_.memory(); }

 private:
  Region region_;
  const PinnedRange range_;
};

}  // namespace dualkv
