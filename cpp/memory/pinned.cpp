// Pinning, and the process's list of what is pinned.
#include "memory/pinned.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

#include "memory/cuda_device.h"

namespace dualkv {

namespace {

struct Ranges {
  std::shared_mutex mutex;
  std::map<std::uint64_t, std::uint64_t> bytes;  // by address

  static Ranges& all() {
    static auto* ranges = new Ranges;  // outlives every static object with a pin
    return *ranges;
  }
};

}  // namespace

PinnedRange::PinnedRange(std::shared_ptr<CudaDevice> device, std::span<std::byte> memory)
    : device_(std::move(device)), memory_(memory) {
  const CudaDevice::Current current(*device_);
  cuda_check(device_->driver().mem_host_register(memory.data(), memory.size(), cuda::kHostRegisterPortable),
             "pinning host memory (cuMemHostRegister); raise the memlock limit");
  Ranges& ranges = Ranges::all();
  const std::unique_lock lock(ranges.mutex);
  ranges.bytes[reinterpret_cast<std::uint64_t>(memory.data())] = memory.size();
}

PinnedRange::~PinnedRange() {
  {
    Ranges& ranges = Ranges::all();
    const std::unique_lock lock(ranges.mutex);
    ranges.bytes.erase(reinterpret_cast<std::uint64_t>(memory_.data()));
  }
  try {
    const CudaDevice::Current current(*device_);
    device_->driver().mem_host_unregister(memory_.data());
  } catch (const Error&) {
    // The driver has gone, and its pins with it.
  }
}

PinnedRanges::PinnedRanges() : lock_(Ranges::all().mutex) {}

bool PinnedRanges::contain(std::uint64_t address, std::uint64_t bytes) {
  if (address - begin_ >= size_) {
    const auto& ranges = Ranges::all().bytes;
    auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return false;
    std::tie(begin_, size_) = *--after;
  }
  return address - begin_ <= size_ && bytes <= size_ - (address - begin_);
}

}  // namespace dualkv
