// Reads by groups of layers: order, credit, and when they happened.
#include "node/block_reads.h"

#include <algorithm>

namespace dualkv {

std::uint32_t page_aligned_group(const KvGeometry& geometry, std::uint32_t layers) {
  const auto aligned = [&](std::uint32_t group) {
    for (std::uint32_t first = group; first < geometry.layers(); first += group) {
      if (geometry.layer_offset(first) % KvGeometry::kPageBytes != 0) return false;
    }
    return true;
  };
  while (layers < geometry.layers() && !aligned(layers)) ++layers;
  return layers;
}

BlockReads::BlockReads(StoreState& store, std::uint32_t layers_per_read, std::uint32_t credit_layers, Done done,
                       GpuStaging* gpu)
    : store_(store),
      per_read_(layers_per_read),
      credit_(credit_layers),
      done_(std::move(done)),
      gpu_(gpu),
      times_((store.geometry().layers() + layers_per_read - 1) / layers_per_read) {}

LayerRange BlockReads::layers_of(std::uint32_t group) const {
  const std::uint32_t first = group * per_read_;
  return {first, std::min(per_read_, store_.geometry().layers() - first)};
}

std::uint32_t BlockReads::allowed() const {
  return credit_ >= store_.geometry().layers() ? groups() : credit_ / per_read_;
}

void BlockReads::add(std::uint32_t block, const Key& key, Slot slot) {
  // A block that is read in one piece brings its trailer along.
  blocks_.push_back({block, key, std::move(slot), groups() > 1 ? std::make_shared<BlockTrailer>() : nullptr});
}

void BlockReads::credit(std::uint32_t layers) {
  const std::uint32_t before = allowed();
  credit_ = std::max(credit_, layers);
  for (std::uint32_t group = before; group < allowed(); ++group) {
    for (std::size_t i = 0; i < submitted_; ++i) submit(blocks_[i], group, gpu_);
  }
  pump();
}

void BlockReads::pump() {
  for (std::uint32_t group = 0; group < allowed(); ++group) {
    for (std::size_t i = submitted_; i < blocks_.size(); ++i) submit(blocks_[i], group, gpu_);
  }
  submitted_ = blocks_.size();
  store_.reads().pump();
}

bool BlockReads::read_again(std::uint32_t block, std::uint32_t layer) {
  const std::uint32_t group = layer / per_read_;
  if (!again_.emplace(block, group).second) return false;
  submit(*std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) { return b.block == block; }), group,
         nullptr);
  store_.reads().pump();
  return true;
}

void BlockReads::submit(const Block& block, std::uint32_t group, GpuStaging* gpu) {
  ++running_;
  store_.reads().submit({owner_, block.key, layers_of(group), block.slot, block.trailer,
                         [this, index = block.block, group, asked = Clock::now()](ReadResult result) {
                           on_done(index, group, asked, std::move(result));
                         },
                         gpu});
}

void BlockReads::on_done(std::uint32_t block, std::uint32_t group, Clock::time_point asked, ReadResult result) {
  --running_;
  const LayerRange layers = layers_of(group);
  Times& times = times_[group];
  if (times.bytes == 0) times.begin = asked;
  times.end = Clock::now();
  times.verify += result.verify_time;
  times.bytes +=
      store_.geometry().layer_offset(layers.first + layers.count) - store_.geometry().layer_offset(layers.first);
  const Done done = done_;  // outlives this object, which the callback may end
  done(block, layers, std::move(result));
}

std::vector<ReadTimes> BlockReads::times(Clock::time_point origin) const {
  const auto since = [&](Clock::time_point when) { return std::chrono::duration<double>(when - origin).count(); };
  std::vector<ReadTimes> out;
  for (std::uint32_t group = 0; group < groups(); ++group) {
    const Times& times = times_[group];
    if (times.bytes == 0) continue;
    out.push_back({layers_of(group), since(times.begin), since(times.end),
                   std::chrono::duration<double>(times.verify).count(), times.bytes});
  }
  return out;
}

}  // namespace dualkv
