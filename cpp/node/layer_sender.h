// LayerSender: what one task sends to one grant, lowest layer first; SendQueue: fair turns on the links.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/rate_meter.h"
#include "dualkv/geometry.h"
#include "transport/transport.h"
#include "transport/wire.h"

namespace dualkv {

class LayerSender;

// One frame per sender and turn, so that no load waits behind another's whole backlog. Progress thread only.
class SendQueue {
 public:
  SendQueue(const KvGeometry& geometry, std::uint64_t frame_bytes) : geometry_(geometry), frame_bytes_(frame_bytes) {}

  void enqueue(LayerSender& sender);
  void remove(LayerSender& sender);
  void pump(Link& link);
  // Routes a completion to its sender and lets waiting ones go on.
  void on_write_done(Link& link, std::uint64_t id, Outcome outcome);
  void on_closed(Link& link);
  // Bytes/s acknowledged on the link while it was the bottleneck, moving average; 0 = it never was.
  std::uint64_t bandwidth(const Link& link) const;

  const KvGeometry& geometry() const { return geometry_; }
  std::uint64_t frame_bytes() const { return frame_bytes_; }

 private:
  struct InFlight {
    const Link* link;
    LayerSender* sender;  // null once it ended
    std::uint32_t layer;
    std::vector<std::uint32_t> blocks;
  };
  bool send_one(LayerSender& sender, Link& link);

  const KvGeometry geometry_;
  const std::uint64_t frame_bytes_;
  std::uint64_t last_write_ = 0;
  std::unordered_map<const Link*, std::deque<LayerSender*>> turns_;
  std::unordered_map<std::uint64_t, InFlight> in_flight_;
  std::unordered_map<const Link*, RateMeter> meters_;  // busy while a window is full
};

// Withdraws what it has not delivered when it ends. Progress thread only.
class LayerSender {
 public:
  using Sent = std::function<void(std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome)>;

  // `sent` is called for each acknowledged write; it may destroy the sender.
  LayerSender(SendQueue& queue, std::shared_ptr<Link> link, std::uint64_t grant, Lane lane, Sent sent);
  ~LayerSender();

  void add(std::uint32_t layer, WriteBlock block);
  // After a batch of add().
  void pump() { queue_.pump(*link_); }
  bool has_queued() const { return !queued_.empty(); }
  Link& link() const { return *link_; }

 private:
  friend class SendQueue;
  LayerWrite next(std::uint64_t id);
  void put_back(LayerWrite write);

  SendQueue& queue_;
  const std::shared_ptr<Link> link_;
  const std::uint64_t owner_;
  const std::uint64_t grant_;
  const Lane lane_;
  const Sent sent_;
  std::map<std::uint32_t, std::deque<WriteBlock>> queued_;
};

}  // namespace dualkv
