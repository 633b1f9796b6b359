// BlockReads: the storage reads of one load at one node, in groups of layers as credit allows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "node/messages.h"
#include "storage/store_state.h"

namespace dualkv {

// The smallest group of at least `layers` layers whose boundaries all lie between pages, so that reads of neighbours
// touch no byte of each other; all layers if there is none.
std::uint32_t page_aligned_group(const KvGeometry& geometry, std::uint32_t layers);

// The first group of layers of all blocks is read before the second of any, so the first layers are complete after
// their share of the bytes. A transit slot is taken only for layers that have credit, so a slot never waits for
// anything but I/O: two loads that share pools can't deadlock, and a hit may be larger than the pool. Progress thread
// only.
class BlockReads {
 public:
  // `done` gets the block, the layers and the result; it may destroy or cancel this object.
  using Done = std::function<void(std::uint32_t block, LayerRange layers, ReadResult result)>;

  // `gpu`: where the layers go, if not null.
  BlockReads(StoreState& store, std::uint32_t layers_per_read, std::uint32_t credit_layers, Done done,
             GpuStaging* gpu = nullptr);
  ~BlockReads() { store_.reads().cancel(owner_); }
  BlockReads(const BlockReads&) = delete;
  BlockReads& operator=(const BlockReads&) = delete;

  // `slot` is where the block goes; null = any transit slot. Nothing happens before pump().
  void add(std::uint32_t block, const Key& key, Slot slot = nullptr);
  void credit(std::uint32_t layers);
  // After a batch of add().
  void pump();
  // Once more, to the staging, what went wrong on its way to the GPU: the group of layers with this one. False if that
  // has been asked for before.
  bool read_again(std::uint32_t block, std::uint32_t layer);
  std::uint32_t groups() const { return static_cast<std::uint32_t>(times_.size()); }
  // Everything asked for so far has ended.
  bool idle() const { return running_ == 0; }
  // When each group of layers was read, in seconds since `origin`.
  std::vector<ReadTimes> times(Clock::time_point origin) const;

 private:
  struct Block {
    std::uint32_t block;
    Key key;
    Slot slot;
    std::shared_ptr<BlockTrailer> trailer;
  };
  struct Times {
    Clock::time_point begin{}, end{};
    Clock::duration verify{};
    std::uint64_t bytes = 0;
  };

  LayerRange layers_of(std::uint32_t group) const;
  // Groups that have credit so far.
  std::uint32_t allowed() const;
  void submit(const Block& block, std::uint32_t group, GpuStaging* gpu);
  void on_done(std::uint32_t block, std::uint32_t group, Clock::time_point asked, ReadResult result);

  StoreState& store_;
  const std::uint64_t owner_ = next_owner();
  const std::uint32_t per_read_;
  std::uint32_t credit_;
  const Done done_;
  GpuStaging* const gpu_;
  std::set<std::pair<std::uint32_t, std::uint32_t>> again_;  // block, group
  std::vector<Block> blocks_;
  std::size_t submitted_ = 0;  // blocks whose allowed groups have been submitted
  std::uint64_t running_ = 0;
  std::vector<Times> times_;  // one a group
};

}  // namespace dualkv
