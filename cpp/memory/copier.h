// Copies by the CPU between Layer Blocks: contiguous ones and the planes of paged caches (host memory).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "dualkv/paged_kv.h"

namespace dualkv {

// The extents' total is the contiguous side's size.
inline void scatter(const std::byte* source, std::span<const Extent> target) {
  for (const Extent& extent : target) {
    std::memcpy(extent.data, source, extent.bytes);
    source += extent.bytes;
  }
}

inline void gather(std::span<const Extent> source, std::byte* target) {
  for (const Extent& extent : source) {
    std::memcpy(target, extent.data, extent.bytes);
    target += extent.bytes;
  }
}

// Any runs to any others; both have as many bytes.
inline void copy(std::span<const Extent> from, std::span<const Extent> to) {
  std::uint64_t read = 0, written = 0;  // of the first of each
  while (!from.empty() && !to.empty()) {
    const std::uint64_t run = std::min(from[0].bytes - read, to[0].bytes - written);
    std::memcpy(to[0].data + written, from[0].data + read, run);
    read += run;
    written += run;
    if (read == from[0].bytes) {
      from = from.subspan(1);
      read = 0;
    }
    if (written == to[0].bytes) {
      to = to.subspan(1);
      written = 0;
    }
  }
}

}  // namespace dualkv
