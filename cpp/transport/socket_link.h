// SocketLink: a link over stream sockets - one control channel and some channels a lane.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transport/channel.h"
#include "transport/handshake.h"
#include "transport/rdma_path.h"
#include "transport/transport.h"

namespace dualkv {

// Reads another process's memory. Returns bytes read, 0 on failure.
inline std::uint64_t pull(pid_t pid, std::span<const iovec> local, std::span<const iovec> remote) {
  const ssize_t got = process_vm_readv(pid, local.data(), local.size(), remote.data(), remote.size(), 0);
  return got > 0 ? static_cast<std::uint64_t>(got) : 0;
}

// tcp sends Layer Blocks inline; rdma writes them, and sends inline what it can't; shm sends references, and the
// receiver pulls the bytes. Progress thread only.
class SocketLink : public Link,
                   public ChannelOwner,
                   public RdmaPath::Host,
                   public std::enable_shared_from_this<SocketLink> {
 public:
  SocketLink(Progress& progress, GrantTable& grants, LinkEvents& events, Scheme scheme, const TransportOptions& options,
             std::string peer)
      : progress_(progress),
        grants_(grants),
        events_(events),
        scheme_(scheme),
        options_(options),
        peer_(std::move(peer)),
        last_received_(Clock::now()) {
    if (scheme_ == Scheme::kRdma) {
      path_ = std::make_unique<RdmaPath>(progress_, grants_, *options_.rdma, options_, peer_, *this);
    }
  }

  // Adds a proven channel; true once the link is complete.
  bool attach(const std::shared_ptr<Channel>& channel, ChannelRole role, pid_t pid) {
    channel->set_owner(*this);
    channel->set_proven();
    channel->set_reading(false);
    pid_ = pid;
    if (role == ChannelRole::kControl) {
      control_ = channel;
    } else {
      lanes_[static_cast<int>(role)].push_back(channel);
    }
    return control_ && lanes_[0].size() == options_.channels_per_lane && lanes_[1].size() == options_.channels_per_lane;
  }

  // `connector`: this side connected.
  void start(bool connector) {
    open_ = true;
    last_received_ = Clock::now();
    tell_regions();
    events_.on_open(shared_from_this());
    for_each_channel([](Channel& channel) { channel.set_reading(true); });
    if (path_ && open_) path_->start(connector);  // whoever heard of it may have closed it
  }

  // shm: what the peer may map, now.
  void tell_regions() {
    if (open_ && scheme_ == Scheme::kShm) control_->send(FrameType::kRegions, encode_regions(options_.regions->list()));
  }

  const std::string& peer() const override { return peer_; }
  bool open() const override { return open_; }
  Clock::time_point last_received() const override { return last_received_; }
  std::uint64_t lane_bytes(Lane lane) const override { return lane_bytes_[static_cast<int>(lane)]; }

  void send(std::span<const std::byte> message) override {
    if (!open_) return;
    control_->send(FrameType::kMessage, message);
    if (control_->queued_bytes() > kMaxQueuedMessageBytes) close({Code::kPeerLost, 0, "the peer reads no messages"});
  }

  bool can_write(Lane lane, std::uint64_t bytes) const override {
    return open_ && (lane_bytes(lane) == 0 || lane_bytes(lane) + bytes <= options_.window_bytes);
  }

  bool nic_writes(Lane lane) const override { return path_ && path_->up(lane); }

  void write(LayerWrite write) override {
    const std::uint64_t bytes = write.blocks.size() * grants_.geometry().layer_bytes(write.layer);
    lane_bytes_[static_cast<int>(write.lane)] += bytes;
    stats_.bytes_sent[static_cast<int>(write.lane)] += bytes;
    const std::uint64_t id = write.id;
    const Pending& pending = pending_.emplace(id, Pending{std::move(write), bytes, nullptr}).first->second;
    if (!path_ || !path_->write(pending.write)) send_inline(id);
  }

  void write_again(LayerWrite write) override {
    const auto found = pending_.find(write.id);
    if (found == pending_.end()) return;
    found->second.write = std::move(write);
    found->second.returned = false;
    lane_bytes_[static_cast<int>(found->second.write.lane)] += found->second.bytes;
    send_inline(found->first);
  }

  void withdraw(std::uint64_t owner) override {
    for (auto item = pending_.begin(); item != pending_.end();) {
      const Pending& pending = item->second;
      if (pending.write.owner != owner) {
        ++item;
        continue;
      }
      if (pending.channel) pending.channel->withdraw(pending.write.id);
      if (path_) path_->withdraw(pending.write.id);
      free_window(pending);
      item = pending_.erase(item);
    }
  }

  void close(Status why) override {
    if (closed_) return;
    closed_ = true;
    const bool was_open = std::exchange(open_, false);
    for_each_channel([&](Channel& channel) { channel.close(why); });
    if (path_) path_->close();
    if (!was_open) return;
    // Posted, so that whoever closes a link is not called back in the middle of its own work.
    progress_.post([self = shared_from_this(), why] {
      self->pending_.clear();
      self->events_.on_closed(*self, why);
    });
  }

  LinkStats stats() const override {
    LinkStats stats = stats_;
    stats.peer = peer_;
    stats.transport = to_string(scheme_);
    stats.connected = open_;
    if (path_) stats.rdma = path_->stats();
    return stats;
  }

  bool on_frame(Channel& channel, FrameType type, std::span<const std::byte> body) override {
    last_received_ = Clock::now();
    const bool control = type == FrameType::kMessage || type == FrameType::kRegions || type == FrameType::kRdmaSetup;
    if (control != (&channel == control_.get())) return false;
    switch (type) {
      case FrameType::kMessage: events_.on_message(*this, body); return true;
      case FrameType::kRegions: return on_regions(body);
      case FrameType::kWrite:
      case FrameType::kWriteRef: return on_write(channel, type, body);
      case FrameType::kWriteDone: return on_done(body);
      case FrameType::kRdmaSetup: return path_ && path_->on_setup(body);
      case FrameType::kWriteAsk: return path_ && path_->on_ask(lane_of(channel), body);
      case FrameType::kWriteClear: return path_ && path_->on_clear(body);
      case FrameType::kWriteDrop: return path_ && path_->on_drop(body);
      default: return false;
    }
  }

  void on_channel_closed(Channel&, const Status& why, bool hostile) override {
    if (hostile) events_.on_hostile();
    close(why);
  }

  void on_payload(Channel& channel, InboundWrite& write) override {
    last_received_ = Clock::now();
    stats_.bytes_received += payload_bytes(write);
    answer(channel, write, write.finish());
  }

 private:
  std::uint64_t payload_bytes(const InboundWrite& write) const {
    return write.header().entries.size() * grants_.geometry().layer_bytes(write.header().layer);
  }

  void answer(Channel& channel, const InboundWrite& write, Outcome outcome) {
    stats_.writes_rejected += outcome.code == Code::kRefused;
    stats_.writes_corrupt += outcome.code == Code::kCorrupt;
    channel.send(FrameType::kWriteDone, encode_write_done({write.header().id, outcome.code}));
  }

  struct Pending {
    LayerWrite write;
    std::uint64_t bytes;
    std::shared_ptr<Channel> channel;  // that its frame went to; null: by RDMA
    bool returned = false;             // and not written again yet
  };

  void free_window(const Pending& pending) {
    if (!pending.returned) lane_bytes_[static_cast<int>(pending.write.lane)] -= pending.bytes;
  }

  void send_frame(Pending& pending) {
    auto& channels = lanes_[static_cast<int>(pending.write.lane)];
    pending.channel = *std::min_element(channels.begin(), channels.end(), [](const auto& a, const auto& b) {
      return a->queued_bytes() < b->queued_bytes();
    });
    pending.channel->send(frame_of(pending.write));
  }

  // Told later: the path, or whoever writes, is in the middle of its work.
  void give_back(Pending& pending) {
    free_window(pending);
    pending.returned = true;
    pending.write.blocks.clear();
    progress_.post([weak = weak_from_this(), id = pending.write.id] {
      const auto self = weak.lock();
      if (self && self->open_ && self->pending_.contains(id)) self->events_.on_write_returned(*self, id);
    });
  }

  Lane lane_of(const Channel& channel) const {
    const auto& high = lanes_[static_cast<int>(Lane::kHigh)];
    const bool found = std::any_of(high.begin(), high.end(), [&](const auto& each) { return each.get() == &channel; });
    return found ? Lane::kHigh : Lane::kLow;
  }

  // RdmaPath::Host. One channel a lane, so that what is said of a write arrives in order.
  void tell(FrameType type, std::span<const std::byte> body) override { tell(*control_, type, body); }
  void tell(Lane lane, FrameType type, std::span<const std::byte> body) override {
    tell(*lanes_[static_cast<int>(lane)].front(), type, body);
  }
  void finish(std::uint64_t id, Outcome outcome) override {
    auto node = pending_.extract(id);
    if (node.empty()) return;
    node.mapped().write.blocks.clear();  // whoever hears of it may want their memory for the next
    free_window(node.mapped());
    events_.on_write_done(*this, id, outcome);
  }
  void send_inline(std::uint64_t id) override {
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    if (found->second.write.nic_only) return give_back(found->second);
    if (path_) events_.on_fallback("rdma_inline");
    send_frame(found->second);
  }
  void written(Lane lane, const InboundWrite& write, Outcome outcome) override {
    last_received_ = Clock::now();
    if (outcome.code != Code::kRefused) stats_.bytes_received += payload_bytes(write);
    answer(*lanes_[static_cast<int>(lane)].front(), write, outcome);
  }
  void tell(Channel& channel, FrameType type, std::span<const std::byte> body) {
    channel.send(type, body);
    if (channel.queued_bytes() <= kMaxQueuedMessageBytes + options_.window_bytes) return;
    // Posted: the path is in the middle of its work.
    progress_.post([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->close({Code::kPeerLost, 0, "the peer reads no messages"});
    });
  }
  void hostile() override {
    events_.on_hostile();
    close({Code::kRefused, 0, "the peer announced a write that it was not cleared for"});
  }

  template <typename Visit>
  void for_each_channel(Visit visit) {
    if (control_) visit(*control_);
    for (int lane = 0; lane < kLaneCount; ++lane) {
      for (const auto& channel : lanes_[lane]) visit(*channel);
    }
  }

  OutFrame frame_of(const LayerWrite& write) {
    const bool inline_bytes = over_tcp(scheme_);
    WriteHeader header{write.id, write.grant, write.layer, inline_bytes ? 0 : write.blocks[0].extents, 0, {}};
    if (!inline_bytes) header.region = region_of(write);
    OutFrame frame;
    frame.write_id = write.id;
    for (const WriteBlock& block : write.blocks) {
      header.entries.push_back({block.block, block.checksum, block.source});
      if (!inline_bytes) continue;
      for (std::uint32_t i = 0; i < block.extents; ++i) add_piece(frame, block.source[i]);
    }
    frame.head = encode_frame(inline_bytes ? FrameType::kWrite : FrameType::kWriteRef, encode_write(header));
    return frame;
  }

  // The shared region that holds all of the write's memory; 0 if none does.
  std::uint32_t region_of(const LayerWrite& write) const {
    std::uint32_t region = 0;
    for (const WriteBlock& block : write.blocks) {
      for (std::uint32_t i = 0; i < block.extents; ++i) {
        const std::uint32_t found = options_.regions->find(block.source[i].data, block.source[i].bytes);
        if (found == 0 || (region != 0 && found != region)) return 0;
        region = found;
      }
    }
    return region;
  }

  bool on_regions(std::span<const std::byte> body) {
    const auto regions = decode_regions(body);
    if (!regions || scheme_ != Scheme::kShm) return false;
    if (!memory_.update(pid_, *regions)) events_.on_fallback("shm_not_mapped");
    return true;
  }

  // Adjacent blocks coalesce.
  static void add_piece(OutFrame& frame, const Extent& extent) {
    if (!frame.payload.empty()) {
      iovec& last = frame.payload.back();
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == extent.data) {
        last.iov_len += extent.bytes;
        return;
      }
    }
    frame.payload.push_back({extent.data, extent.bytes});
  }

  bool on_write(Channel& channel, FrameType type, std::span<const std::byte> body) {
    if (type != (over_tcp(scheme_) ? FrameType::kWrite : FrameType::kWriteRef)) return false;
    auto header = decode_write(body, type, grants_.geometry());
    if (!header) return false;
    auto write = std::make_unique<InboundWrite>(grants_, peer_, std::move(*header));
    if (type == FrameType::kWrite) {
      if (path_) path_->before_inline(write->header());
      channel.receive(std::move(write));
    } else if (memory_.has(write->header().region)) {
      stats_.bytes_received += payload_bytes(*write);
      answer(channel, *write, write->copy_from(memory_));
    } else {
      pull_all(*write);
      on_payload(channel, *write);
    }
    return true;
  }

  void pull_all(InboundWrite& write) {
    const std::uint64_t layer_bytes = grants_.geometry().layer_bytes(write.header().layer);
    const std::uint64_t total = layer_bytes * write.header().entries.size();
    while (write.bytes_left() > 0) {
      std::array<iovec, InboundWrite::kMaxPieces> local, remote;
      const std::size_t locals = write.next(local);
      std::uint64_t wanted = 0;
      for (std::size_t i = 0; i < locals; ++i) wanted += local[i].iov_len;
      const std::size_t remotes = sources(write.header(), total - write.bytes_left(), wanted, layer_bytes, remote);
      const std::uint64_t got =
          pull(pid_, std::span<const iovec>(local).first(locals), std::span<const iovec>(remote).first(remotes));
      if (got == 0) return write.give_up();
      write.advance(got);
    }
  }

  // The sender's extents of bytes [at, at + wanted) of a write.
  static std::size_t sources(const WriteHeader& header, std::uint64_t at, std::uint64_t wanted,
                             std::uint64_t layer_bytes, std::span<iovec> out) {
    std::size_t count = 0;
    while (wanted > 0 && count < out.size() && at / layer_bytes < header.entries.size()) {
      const WriteEntry& entry = header.entries[at / layer_bytes];
      std::uint64_t skip = at % layer_bytes;
      for (std::uint32_t i = 0; i < header.extents && wanted > 0 && count < out.size(); ++i) {
        const Extent& extent = entry.source[i];
        const std::uint64_t passed = std::min(skip, extent.bytes);
        skip -= passed;
        const std::uint64_t bytes = std::min(extent.bytes - passed, wanted);
        if (bytes == 0) continue;
        out[count++] = {extent.data + passed, bytes};
        at += bytes;
        wanted -= bytes;
      }
    }
    return count;
  }

  bool on_done(std::span<const std::byte> body) {
    const auto done = decode_write_done(body);
    if (!done) return false;
    const auto found = pending_.find(done->id);
    if (found == pending_.end()) return true;  // withdrawn
    // A frame that is still queued, as its answer came to another way it went: it must not be sent any more.
    if (found->second.channel) found->second.channel->withdraw(done->id);
    if (path_ && path_->has(done->id)) return path_->on_done(done->id, {done->code, 0});
    finish(done->id, {done->code, 0});
    return true;
  }

  static constexpr std::uint64_t kMaxQueuedMessageBytes = 16u << 20;  // a peer that reads nothing is lost

  Progress& progress_;
  GrantTable& grants_;
  LinkEvents& events_;
  const Scheme scheme_;
  const TransportOptions options_;
  const std::string peer_;
  std::shared_ptr<Channel> control_;
  std::vector<std::shared_ptr<Channel>> lanes_[kLaneCount];
  pid_t pid_ = 0;
  PeerMemory memory_;
  std::unique_ptr<RdmaPath> path_;  // of rdma links
  bool open_ = false;
  bool closed_ = false;
  Clock::time_point last_received_;
  std::unordered_map<std::uint64_t, Pending> pending_;
  std::uint64_t lane_bytes_[kLaneCount] = {0, 0};
  LinkStats stats_;
};

}  // namespace dualkv
