// FaultedMemory: zeroed memory that is already there when a limit loop's clock starts.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <span>

#include "base/text.h"
#include "dualkv/limits.h"
#include "dualkv/status.h"

namespace dualkv::limits {

// Owns one mapping, aligned to a huge page. Pinned in place.
class FaultedMemory {
 public:
  FaultedMemory(std::uint64_t bytes, bool huge_pages) : bytes_(bytes) {
    if (bytes == 0 || bytes > kMaxBytes) {
      throw Error(Code::kInvalidArgument, text("limits: memory of ", bytes, " bytes: must be 1 to 2**46"));
    }
    // Older kernels don't align mappings, so one huge page more leaves room to do it here.
    mapped_ = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes + kHugePageBytes;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
      throw Error(Code::kNoSpace, text("limits: mmap of ", mapped_, " bytes refused; ask for less memory"), errno);
    }
    const auto address = reinterpret_cast<std::uintptr_t>(mapping_);
    const std::uintptr_t aligned = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    data_ = static_cast<std::byte*>(mapping_) + (aligned - address);
    // Said either way: some machines give huge pages to whoever does not refuse them.
    madvise(mapping_, mapped_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(data_, 0, bytes_);
  }
  ~FaultedMemory() { munmap(mapping_, mapped_); }
  FaultedMemory(const FaultedMemory&) = delete;
  FaultedMemory& operator=(const FaultedMemory&) = delete;

  std::span<std::byte> bytes() const { return {data_, bytes_}; }

 private:
  static constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;
  static constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 46;  // less than any address space: sums can't wrap

  void* mapping_ = nullptr;
  std::uint64_t mapped_ = 0;
  std::byte* data_ = nullptr;
  std::uint64_t bytes_;
};

}  // namespace dualkv::limits
