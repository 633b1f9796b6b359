// Region: page-aligned memory, in huge pages, of one NUMA node and locked where the machine allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/fd.h"
#include "dualkv/staging.h"

namespace dualkv {

enum class Pages : std::uint8_t { kSmall, kTransparentHuge, kHuge };

struct RegionOptions {
  bool huge_pages = true;
  int numa_node = -1;  // the node its pages come from; -1 = as the kernel likes
  // Memory that other processes of this host may map through its fd: a sealed memfd, which can't shrink under them.
  // Transparent huge pages of such memory need transparent_hugepage/shmem_enabled, which is off on most machines.
  bool shared = false;
};

// Owns one mapping. Pinned in place.
class Region {
 public:
  static constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

  // Throws Error(kNoSpace) when the mapping is refused. Huge pages degrade; see pages(). Nothing is touched yet.
  Region(std::uint64_t bytes, const RegionOptions& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::span<std::byte> memory() const { return {data_, bytes_}; }
  Pages pages() const { return pages_; }
  bool bound() const { return bound_; }  // to numa_node, if one was asked for
  // Of the mapping: memory() rounded up to whole huge pages.
  std::uint64_t mapped_bytes() const { return mapped_; }
  // Touches and locks a part of the mapping; false if the machine refuses. Any thread. A lock that began or ended
  // within a huge page would split the mapping there, and the ring describes memory of mixed page sizes to the device
  // page by page: so `first` and `bytes` are multiples of kHugePageBytes.
  bool lock(std::uint64_t first, std::uint64_t bytes);
  int shared_fd() const { return fd_.get(); }  // -1 if it is not shared

 private:
  bool map(bool huge, bool shared);

  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;   // asked for
  std::uint64_t mapped_ = 0;  // rounded up to what munmap needs
  Pages pages_ = Pages::kSmall;
  bool bound_ = false;
  Fd fd_;
};

}  // namespace dualkv
