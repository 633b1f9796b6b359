// Region: page-aligned anonymous memory, in huge pages and locked where the machine allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/fd.h"
#include "dualkv/staging.h"

namespace dualkv {

enum class Pages : std::uint8_t { kSmall, kTransparentHuge, kHuge };

struct RegionOptions {
  bool lock_memory = true;
  bool huge_pages = true;
  // Memory that other processes of this host may map through its fd: a sealed memfd, which can't shrink under them.
  // Transparent huge pages of such memory need transparent_hugepage/shmem_enabled, which is off on most machines.
  bool shared = false;
};

// Owns one mapping. Pinned in place.
class Region {
 public:
  // Throws Error(kNoSpace) when the mapping is refused. Huge pages and locking degrade; see pages() and locked().
  Region(std::uint64_t bytes, const RegionOptions& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::span<std::byte> memory() const { return {data_, bytes_}; }
  Pages pages() const { return pages_; }
  bool locked() const { return locked_; }
  int shared_fd() const { return fd_.get(); }  // -1 if it is not shared

 private:
  bool map(bool huge, bool shared);

  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;   // asked for
  std::uint64_t mapped_ = 0;  // rounded up to what munmap needs
  Pages pages_ = Pages::kSmall;
  bool locked_ = false;
  Fd fd_;
};

}  // namespace dualkv
