// Where an engine keeps its KV cache: per layer a few strided planes, addressed by block id.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "dualkv/geometry.h"

namespace dualkv {

// One plane of a layer: block `id` of it lies at base + id * block_stride and is `bytes` long.
struct Plane {
  std::byte* base = nullptr;
  std::uint64_t block_stride = 0;
  std::uint64_t bytes = 0;
};

// A run of memory.
struct Extent {
  std::byte* data = nullptr;
  std::uint64_t bytes = 0;
};

// PagedKv::device() of host memory; else the ordinal of a GPU.
inline constexpr int kHostMemory = -1;

// A value that borrows the engine's memory. A Layer Block is the concatenation of its planes: K then V where they
// are apart (as vLLM keeps them), one plane for MLA.
class PagedKv {
 public:
  static constexpr std::size_t kMaxPlanes = 4;

  // layers[i]: planes of layer i. Throws Error(kInvalidArgument) unless every layer's planes add up to
  // geometry.layer_bytes(i), none overlaps the next block, and block_count >= 1. `device`: the GPU in whose memory all
  // planes lie; they must lie in its primary context, as those of every runtime library do.
  PagedKv(const KvGeometry& geometry, std::vector<std::vector<Plane>> layers, std::uint32_t block_count,
          int device = kHostMemory);

  std::uint32_t block_count() const { return block_count_; }
  int device() const { return device_; }
  bool on_host() const { return device_ == kHostMemory; }
  std::uint32_t layers() const { return static_cast<std::uint32_t>(layers_.size()); }
  // Extents of one Layer Block, in order. Returns how many were written; out must hold kMaxPlanes.
  std::size_t extents(std::uint32_t layer, std::uint32_t block_id, std::span<Extent> out) const;
  // All of its memory, as few runs as possible, in the order of their addresses.
  std::vector<Extent> memory() const;

 private:
  std::vector<std::vector<Plane>> layers_;
  std::uint32_t block_count_;
  int device_;
};

// XXH3-64 of layers [first, first + count) of the blocks, layer by layer: what a store keeps with them. Throws
// Error(kInvalidArgument) for blocks or layers that `cache` has not; of a GPU's memory also kUnsupported and kIo.
// Blocking: reads all of it; of a GPU's memory the GPU does, after nothing but its own earlier work for dualkv.
std::vector<std::uint64_t> checksums(const PagedKv& cache, std::span<const std::uint32_t> block_ids,
                                     std::uint32_t first_layer, std::uint32_t layer_count);

}  // namespace dualkv
