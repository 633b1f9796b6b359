// BlockReads: the storage reads of one load at one node, in groups of layers as credit allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "storage/store_state.h"

namespace dualkv {

// A transit slot is taken only for layers that have credit, so a slot never waits for anything but I/O: two loads
// that share pools can't deadlock, and a hit may be larger than the pool. Progress thread only.
class BlockReads {
 public:
  // `done` gets the block, the layers and the result; it may destroy or cancel this object.
  using Done = std::function<void(std::uint32_t block, LayerRange layers, ReadResult result)>;

  BlockReads(StoreState& store, std::uint32_t layers_per_read, std::uint32_t credit_layers, Done done)
      : store_(store), per_read_(layers_per_read), credit_(credit_layers), done_(std::move(done)) {}
  ~BlockReads() { store_.reads().cancel(owner_); }

  // `slot` is where the block goes; null = any transit slot.
  void add(std::uint32_t block, const Key& key, Slot slot = nullptr) {
    blocks_.push_back({block, key, std::move(slot)});
    for (std::uint32_t first = 0; allowed(first); first += per_read_) submit(blocks_.back(), first);
  }

  void credit(std::uint32_t layers) {
    const std::uint32_t before = std::exchange(credit_, std::max(credit_, layers));
    for (std::uint32_t first = 0; first < layers_total(); first += per_read_) {
      if (end_of(first) <= before || !allowed(first)) continue;
      for (const Block& block : blocks_) submit(block, first);
    }
    pump();
  }

  // After a batch of add().
  void pump() { store_.reads().pump(); }

 private:
  struct Block {
    std::uint32_t block;
    Key key;
    Slot slot;
  };

  std::uint32_t layers_total() const { return store_.geometry().layers(); }
  std::uint32_t end_of(std::uint32_t first) const { return std::min(first + per_read_, layers_total()); }
  bool allowed(std::uint32_t first) const { return first < layers_total() && end_of(first) <= credit_; }

  void submit(const Block& block, std::uint32_t first) {
    const LayerRange layers{first, end_of(first) - first};
    store_.reads().submit({owner_, block.key, layers, block.slot, [this, index = block.block, layers](ReadResult r) {
                             const Done done = done_;  // outlives this object, which the callback may end
                             done(index, layers, std::move(r));
                           }});
  }

  StoreState& store_;
  const std::uint64_t owner_ = next_owner();
  const std::uint32_t per_read_;
  std::uint32_t credit_;
  const Done done_;
  std::vector<Block> blocks_;
};

}  // namespace dualkv
