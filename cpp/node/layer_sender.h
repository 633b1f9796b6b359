// BlockSender: what one task sends to one grant, lowest layer first; LayerSender: from memory that links can read;
// SendQueue: fair turns on the links.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/progress.h"
#include "base/rate_meter.h"
#include "dualkv/geometry.h"
#include "transport/transport.h"
#include "transport/wire.h"

namespace dualkv {

class LayerSender;

// Says where a Layer Block is, when its turn to be sent comes: whole prompts are queued as a few numbers.
class BlockSource {
 public:
  virtual ~BlockSource() = default;
  // Fills `out`; false if it does not know the checksum, which is then made: just before the send, for which that
  // leaves the bytes in the CPU's cache. `index` and `keep` are what LayerSender::add was given.
  virtual bool describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>& keep,
                        WriteBlock& out) = 0;
  // A write of what was added as nic_only, which no NIC made: to be written again from elsewhere.
  virtual void on_returned(std::uint64_t /*write*/, std::uint32_t /*layer*/,
                           const std::vector<std::uint32_t>& /*blocks*/) {}
};

// One frame per sender and turn, so that no load waits behind another's whole backlog. Lanes don't wait for each
// other. Progress thread only.
class SendQueue {
 public:
  SendQueue(Progress& progress, const KvGeometry& geometry, std::uint64_t frame_bytes)
      : progress_(progress), geometry_(geometry), frame_bytes_(frame_bytes) {}

  void enqueue(LayerSender& sender);
  void remove(LayerSender& sender);
  void pump(Link& link);
  // What was withdrawn has made room in the window, and nobody will say so.
  void pump_later(const std::shared_ptr<Link>& link);
  // Routes a completion to its sender and lets waiting ones go on.
  void on_write_done(Link& link, std::uint64_t id, Outcome outcome);
  void on_write_returned(Link& link, std::uint64_t id);
  void on_closed(Link& link);
  // Bytes/s acknowledged on the link while it was the bottleneck, moving average; 0 = it never was.
  std::uint64_t bandwidth(const Link& link) const;

  const KvGeometry& geometry() const { return geometry_; }
  std::uint64_t frame_bytes() const { return frame_bytes_; }

 private:
  struct InFlight {
    const Link* link;
    LayerSender* sender;
    std::uint32_t layer;
    std::vector<std::uint32_t> blocks;
  };
  using Turns = std::deque<LayerSender*>;
  // False if the lane's window is full.
  bool pump_lane(Link& link, Turns& turns);
  void send_one(LayerSender& sender, Link& link);

  Progress& progress_;
  const KvGeometry geometry_;
  const std::uint64_t frame_bytes_;
  std::uint64_t last_write_ = 0;
  std::unordered_map<const Link*, std::array<Turns, kLaneCount>> turns_;
  std::unordered_map<std::uint64_t, InFlight> in_flight_;
  std::unordered_map<const Link*, RateMeter> meters_;  // busy while a window is full
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

// Withdraws what it has not delivered when it ends. Progress thread only.
class BlockSender {
 public:
  // Of each acknowledged write, with the WriteBlock::block numbers; it may destroy the sender.
  using Sent = std::function<void(std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome)>;

  virtual ~BlockSender() = default;
  // Queues Layer Blocks [first, first + count) of its source.
  virtual void add(std::uint32_t layer, std::uint32_t first, std::uint32_t count) = 0;
  // After a batch of add().
  virtual void pump() = 0;
  virtual Link& link() const = 0;
};

class LayerSender : public BlockSender {
 public:
  // `source` must outlive the sender. `most_blocks`: of a write.
  LayerSender(SendQueue& queue, std::shared_ptr<Link> link, std::uint64_t grant, Lane lane, BlockSource& source,
              Sent sent, std::uint32_t most_blocks = kMaxWriteBlocks);
  ~LayerSender() override;

  void add(std::uint32_t layer, std::uint32_t first, std::uint32_t count) override {
    add(layer, first, count, nullptr);
  }
  // `keep` is held until they are described. `nic_only`: see LayerWrite; never in one write with others.
  void add(std::uint32_t layer, std::uint32_t first, std::uint32_t count, std::shared_ptr<void> keep,
           bool nic_only = false);
  // See Link::write_again. `indices`: of the write's blocks, in its order.
  void write_again(std::uint64_t write, std::uint32_t layer, std::span<const std::uint32_t> indices);
  void pump() override { queue_.pump(*link_); }
  Link& link() const override { return *link_; }
  Lane lane() const { return lane_; }

 private:
  friend class SendQueue;
  struct Run {
    std::uint32_t next;
    std::uint32_t end;
    std::shared_ptr<void> keep;
    bool nic_only;
  };
  bool has_queued() const { return !queued_.empty(); }
  // Blocks of the lowest layer that a frame takes at most, at least one.
  std::uint32_t frame_blocks() const;
  // Of the next frame, at most.
  std::uint64_t next_bytes() const;
  LayerWrite next(std::uint64_t id);
  void describe(std::uint32_t index, const std::shared_ptr<void>& keep, LayerWrite& write);

  SendQueue& queue_;
  const std::shared_ptr<Link> link_;
  const std::uint64_t owner_;
  const std::uint64_t grant_;
  const Lane lane_;
  BlockSource& source_;
  const Sent sent_;
  const std::uint32_t most_blocks_;
  bool in_turn_ = false;  // stands in a queue of turns
  std::map<std::uint32_t, std::deque<Run>> queued_;
};

}  // namespace dualkv
