// Copies between a contiguous Layer Block and the planes of a paged cache (host memory).
#pragma once

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

}  // namespace dualkv
