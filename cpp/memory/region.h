// Region: page-aligned anonymous memory, in huge pages and locked where the machine allows it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "dualkv/staging.h"

namespace dualkv {

enum class Pages : std::uint8_t { kSmall, kTransparentHuge, kHuge };

// Owns one mapping. Pinned in place.
class Region {
 public:
  // Throws Error(kNoSpace) when the mapping is refused. Huge pages and locking degrade; see pages() and locked().
  Region(std::uint64_t bytes, const StagingOptions& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::span<std::byte> memory() const { return {data_, bytes_}; }
  Pages pages() const { return pages_; }
  bool locked() const { return locked_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;   // asked for
  std::uint64_t mapped_ = 0;  // rounded up to what munmap needs
  Pages pages_ = Pages::kSmall;
  bool locked_ = false;
};

}  // namespace dualkv
