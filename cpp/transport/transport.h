// Transport and Link: control messages, and one-sided writes of Layer Blocks with a notification per block.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/outcome.h"
#include "dualkv/lane.h"
#include "dualkv/node.h"
#include "dualkv/paged_kv.h"
#include "memory/shared_regions.h"
#include "transport/address.h"

namespace dualkv {

// One Layer Block on its way. `keep` holds the source's memory until the write is done.
struct WriteBlock {
  std::uint32_t block = 0;  // index in the grant
  std::uint64_t checksum = 0;
  std::array<Extent, PagedKv::kMaxPlanes> source{};
  std::uint32_t extents = 0;
  std::shared_ptr<void> keep;
};

// Blocks of one layer to one grant, at most kMaxWriteBlocks.
struct LayerWrite {
  std::uint64_t id = 0;     // unique on the link
  std::uint64_t owner = 0;  // for withdraw()
  std::uint64_t grant = 0;
  std::uint32_t layer = 0;
  Lane lane = Lane::kLow;
  std::vector<WriteBlock> blocks;
  bool nic_only = false;  // the CPU can't read it: in a GPU's memory
};

class Link {
 public:
  virtual ~Link() = default;
  virtual const std::string& peer() const = 0;
  virtual bool open() const = 0;
  // Queues a control message; the queue is bounded by closing a link whose peer does not read.
  virtual void send(std::span<const std::byte> message) = 0;
  // False if the lane's window has no room for so many bytes (ask again after an on_write_done) or the link is closed.
  // An idle lane takes a write of any size, or a block larger than the window could never be sent.
  virtual bool can_write(Lane lane, std::uint64_t bytes) const = 0;
  // True if a NIC would make writes of the lane now.
  virtual bool nic_writes(Lane) const { return false; }
  // Only after can_write() said yes. What is nic_only comes back by on_write_returned if no NIC makes it.
  virtual void write(LayerWrite write) = 0;
  // One that came back, from memory that the CPU reads: not by a NIC, as the peer may yet clear what it was asked for
  // before. Nothing if the peer has answered meanwhile, which has been told then. Whether or not the window has room.
  virtual void write_again(LayerWrite) {}
  // Gives the source memory of the owner's writes back at once: what has not left is dropped, no on_write_done
  // follows.
  virtual void withdraw(std::uint64_t owner) = 0;
  virtual void close(Status why) = 0;
  virtual LinkStats stats() const = 0;
  virtual Clock::time_point last_received() const = 0;
  virtual std::uint64_t lane_bytes(Lane lane) const = 0;
};

// Implemented by the owner of transports. Called on the progress thread.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  virtual void on_open(const std::shared_ptr<Link>& link) = 0;
  // Once per opened link; writes in flight are not reported one by one.
  virtual void on_closed(Link& link, const Status& why) = 0;
  virtual void on_message(Link& link, std::span<const std::byte> message) = 0;
  // The peer has verified (or refused) a write; its window space is free again.
  virtual void on_write_done(Link& link, std::uint64_t id, Outcome outcome) = 0;
  // A nic_only write that no NIC makes, or whose NIC failed: nothing reads its memory any more, and its window space is
  // free. The peer may have got none, some or all of it, and may answer yet: to be written again, or withdrawn.
  virtual void on_write_returned(Link& link, std::uint64_t id) = 0;
  virtual void on_refused() = 0;  // a connection that did not prove itself
  virtual void on_hostile() = 0;  // a frame no peer would send; its connection is closed
  virtual void on_fallback(const std::string& what) = 0;
};

class RdmaDomain;

// What a transport needs to know of its node.
struct TransportOptions {
  std::string name;
  std::string secret;
  std::uint32_t channels_per_lane = 1;
  LaneOptions lanes[kLaneCount];
  std::uint64_t window_bytes = 0;
  double handshake_s = 0;
  std::shared_ptr<SharedRegions> regions;  // of this node, for peers on this host
  std::shared_ptr<RdmaDomain> rdma;        // for rdma links
};

class Progress;
class GrantTable;

// Used on the progress thread only.
class Transport {
 public:
  virtual ~Transport() = default;
  // Returns the address peers can reach. Throws Error.
  virtual std::string listen(const Address& address) = 0;
  // `done` gets the peer's name, or why it failed; by the handshake's deadline. Throws Error for a bad address.
  using Connected = std::function<void(Status, std::string peer)>;
  virtual void connect(const Address& address, Connected done) = 0;
  virtual void close() = 0;
  // TransportOptions::regions has changed.
  virtual void on_regions_changed() {}
};

// References must outlive the transport.
std::unique_ptr<Transport> make_socket_transport(Scheme scheme, Progress& progress, GrantTable& grants,
                                                 LinkEvents& events, const TransportOptions& options);
std::unique_ptr<Transport> make_loopback_transport(std::shared_ptr<LoopbackHub> hub, std::shared_ptr<Progress> progress,
                                                   GrantTable& grants, LinkEvents& events,
                                                   const TransportOptions& options);

}  // namespace dualkv
