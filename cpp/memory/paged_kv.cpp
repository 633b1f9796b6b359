// PagedKv: validation and addressing of strided planes.
#include "dualkv/paged_kv.h"

#include <algorithm>
#include <array>

#include "base/hash.h"
#include "base/text.h"
#include "dualkv/status.h"
#include "memory/cuda_device.h"

namespace dualkv {

namespace {

void check_layer(const KvGeometry& geometry, std::uint32_t layer, const std::vector<Plane>& planes,
                 std::uint32_t block_count) {
  const auto refuse = [&](const std::string& why) {
    throw Error(Code::kInvalidArgument, text("KV cache, layer ", layer, ": ", why));
  };
  if (planes.empty() || planes.size() > PagedKv::kMaxPlanes) {
    refuse(text(planes.size(), " planes: must be 1 to ", PagedKv::kMaxPlanes));
  }
  std::uint64_t total = 0;
  for (const Plane& plane : planes) {
    if (plane.base == nullptr) refuse("a plane has a null pointer");
    if (plane.bytes == 0) refuse("a plane has 0 bytes a block");
    if (plane.bytes > geometry.layer_bytes(layer)) {
      refuse(text("a plane has ", plane.bytes, " bytes a block, the geometry says ", geometry.layer_bytes(layer)));
    }
    if (block_count > 1 && plane.block_stride < plane.bytes) {
      refuse(text("block stride ", plane.block_stride, " is less than the ", plane.bytes, " bytes of a block"));
    }
    total += plane.bytes;
  }
  if (total != geometry.layer_bytes(layer)) {
    refuse(text("planes add up to ", total, " bytes a block, the geometry says ", geometry.layer_bytes(layer)));
  }
}

}  // namespace

PagedKv::PagedKv(const KvGeometry& geometry, std::vector<std::vector<Plane>> layers, std::uint32_t block_count,
                 int device)
    : layers_(std::move(layers)), block_count_(block_count), device_(device) {
  if (device_ < kHostMemory) throw Error(Code::kInvalidArgument, text("KV cache: there is no device ", device_));
  if (block_count_ == 0) throw Error(Code::kInvalidArgument, "KV cache has 0 blocks");
  if (layers_.size() != geometry.layers()) {
    throw Error(Code::kInvalidArgument,
                text("KV cache has ", layers_.size(), " layers, the geometry says ", geometry.layers()));
  }
  for (std::uint32_t i = 0; i < layers_.size(); ++i) check_layer(geometry, i, layers_[i], block_count_);
}

std::size_t PagedKv::extents(std::uint32_t layer, std::uint32_t block_id, std::span<Extent> out) const {
  const std::vector<Plane>& planes = layers_[layer];
  for (std::size_t i = 0; i < planes.size(); ++i) {
    out[i] = {planes[i].base + block_id * planes[i].block_stride, planes[i].bytes};
  }
  return planes.size();
}

std::vector<Extent> PagedKv::memory() const {
  std::vector<Extent> planes;
  for (const std::vector<Plane>& layer : layers_) {
    for (const Plane& plane : layer)
      planes.push_back({plane.base, (block_count_ - 1) * plane.block_stride + plane.bytes});
  }
  std::sort(planes.begin(), planes.end(), [](const Extent& a, const Extent& b) { return a.data < b.data; });
  std::vector<Extent> runs;
  for (const Extent& plane : planes) {
    if (runs.empty() || runs.back().data + runs.back().bytes < plane.data) {
      runs.push_back(plane);
    } else {
      runs.back().bytes = std::max<std::uint64_t>(runs.back().bytes, plane.data + plane.bytes - runs.back().data);
    }
  }
  return runs;
}

std::vector<std::uint64_t> checksums(const PagedKv& cache, std::span<const std::uint32_t> block_ids,
                                     std::uint32_t first_layer, std::uint32_t layer_count) {
  if (std::uint64_t{first_layer} + layer_count > cache.layers()) {
    throw Error(Code::kInvalidArgument,
                text("checksums: layers ", first_layer, " + ", layer_count, " of ", cache.layers()));
  }
  for (std::uint32_t id : block_ids) {
    if (id < cache.block_count()) continue;
    throw Error(Code::kInvalidArgument, text("checksums: block id ", id, " of ", cache.block_count(), " blocks"));
  }
  if (!cache.on_host()) return cuda_checksums(cache, block_ids, first_layer, layer_count);
  std::vector<std::uint64_t> out;
  out.reserve(layer_count * block_ids.size());
  for (std::uint32_t layer = first_layer; layer < first_layer + layer_count; ++layer) {
    for (std::uint32_t id : block_ids) {
      std::array<Extent, PagedKv::kMaxPlanes> extents;
      out.push_back(checksum(std::span<const Extent>(extents).first(cache.extents(layer, id, extents))));
    }
  }
  return out;
}

}  // namespace dualkv
