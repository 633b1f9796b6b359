// RdmaPath: the queue pairs of one link, and the rendezvous that lets a peer write on them (docs/decisions/0006).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "dualkv/rdma.h"
#include "rdma/domain.h"
#include "rdma/queue_pair.h"
#include "rdma/write_chain.h"
#include "transport/grants.h"
#include "transport/transport.h"
#include "transport/wire.h"

namespace dualkv {

// A write is asked for, cleared to addresses by the receiver, written, announced by immediate data and verified in
// place. Whatever can't go this way the link sends inline, over TCP; so does what was under way on a queue pair that
// ended. A queue pair ends when it fails, and as a fence: when memory is taken back that it may still read or write. It
// is then built anew, by the side that connected. Progress thread only.
class RdmaPath : public QueuePair::Events, public DirectWrites {
 public:
  // The link. Called from within the path's own calls.
  class Host {
   public:
    virtual ~Host() = default;
    virtual void tell(FrameType type, std::span<const std::byte> body) = 0;  // on the control channel
    virtual void tell(Lane lane, FrameType type, std::span<const std::byte> body) = 0;
    virtual void send_inline(std::uint64_t id) = 0;  // or, if it is nic_only, give it back
    // The peer has answered, and the write's memory is not read any more.
    virtual void finish(std::uint64_t id, Outcome outcome) = 0;
    // The bytes of a write are here, or it was refused.
    virtual void written(Lane lane, const InboundWrite& write, Outcome outcome) = 0;
    virtual void hostile() = 0;
  };

  // All must outlive the path.
  RdmaPath(Progress& progress, GrantTable& grants, RdmaDomain& domain, const TransportOptions& options,
           std::string peer, Host& host);
  ~RdmaPath() override;

  // `leads`: this side offers queue pairs; one of the two must. Once.
  void start(bool leads);
  void close();

  // A queue pair of the lane is up.
  bool up(Lane lane) const;
  // False if it must go inline. `write` must stay until the peer has answered, the path sent it inline, or withdraw().
  bool write(const LayerWrite& write);
  // Its memory is not read any more when this returns. False if the path does not have it.
  bool withdraw(std::uint64_t id);
  bool has(std::uint64_t id) const { return outgoing_.contains(id); }
  // The peer has verified or refused one that the path has. False if it can't have done so yet.
  bool on_done(std::uint64_t id, Outcome outcome);
  // Bytes of these blocks are about to come inline.
  void before_inline(const WriteHeader& header);
  // False for what no peer would send.
  bool on_setup(std::span<const std::byte> body);
  bool on_ask(Lane lane, std::span<const std::byte> body);
  bool on_clear(std::span<const std::byte> body);
  bool on_drop(std::span<const std::byte> body);

  RdmaStats stats() const;

  void on_room(QueuePair& pair) override;
  void on_immediate(QueuePair& pair, std::uint32_t data) override;
  void on_failed(QueuePair& pair, const std::string& why) override;
  void fence(std::uint64_t grant, std::span<const std::uint32_t> blocks) override;

 private:
  using Held = std::vector<std::shared_ptr<const RdmaRegistration>>;
  enum class State : std::uint8_t { kDown, kOffered, kConnecting, kProbing, kUp };
  // A write of the peer that was cleared and has not come.
  struct Open {
    std::uint64_t grant;
    std::vector<std::uint32_t> blocks;
    std::unique_ptr<InboundWrite> inbound;
    Held held;
  };
  // The place of a queue pair, and of those that follow it.
  struct Place {
    std::shared_ptr<QueuePair> pair;
    State state = State::kDown;
    std::uint32_t epoch = 0;
    Progress::TimerId timer = 0;
    double pause_s = 0;  // before the next attempt
    Clock::time_point up_since{};
    bool was_up = false;
    std::uint64_t asked_bytes = 0;
    Clock::time_point progress_at{};  // last sign of life while writes are under way
    std::deque<std::uint64_t> ready;  // cleared, not wholly posted
    std::unordered_map<std::uint32_t, Open> open;
    std::uint32_t last_immediate = 0;
  };
  // A write to the peer.
  struct Outgoing {
    const LayerWrite* write = nullptr;
    std::size_t place = 0;
    std::uint64_t bytes = 0;
    WriteChain chain;
    std::size_t posted = 0;
    Held held;
    std::uint64_t wanted = 0;  // bytes that were cleared
    std::uint64_t last = 0;    // wholly posted: the NIC has read it when so many requests have left the queue pair
    std::optional<Outcome> answer;
  };

  Lane lane_of(std::size_t place) const { return static_cast<Lane>(place / options_.channels_per_lane); }
  std::size_t rail_of(std::size_t place) const { return place % domain_.rails().size(); }
  std::size_t place_of(const QueuePair& pair) const;
  // Ends in kProbing, or down.
  void connect(std::size_t place, const RdmaSetup& remote);
  void tell_step(std::size_t place, RdmaSetup::Step step);
  void offer(std::size_t place);
  void offer_later(std::size_t place);
  void set_up(std::size_t place);
  void end_pair(Place& place);
  void failed(std::size_t place, const std::string& why);
  // Ends the queue pair. What was under way to the peer goes inline; what was cleared for it will come so.
  void take_down(std::size_t place, bool tell_peer);
  void not_by_nic(std::uint64_t id);
  // The registration of these bytes, kept in `held`; null if there is none.
  const RdmaRegistration* hold(const Extent& extent, Held& held);
  bool build_chain(Outgoing& out, const WriteClear& clear);
  void pump(std::size_t place);
  bool posted_all(const Outgoing& out) const { return out.last > 0; }
  bool has_left(const Outgoing& out) const;
  void finish(std::uint64_t id);
  // Leaves queue pairs whose writes get nowhere.
  void watch();
  void refuse_to_clear(Lane lane, std::uint64_t id);
  bool is_open(std::uint64_t grant, std::uint32_t layer, std::uint32_t block) const;
  template <typename Match>
  void fence_where(Match match);

  Progress& progress_;
  GrantTable& grants_;
  RdmaDomain& domain_;
  const TransportOptions& options_;
  const std::string peer_;
  Host& host_;
  bool leads_ = false;
  bool closed_ = false;
  Progress::TimerId watch_ = 0;  // while writes are under way
  std::vector<Place> places_;
  std::unordered_map<std::uint64_t, Outgoing> outgoing_;
  std::vector<std::uint64_t> answered_;  // of queue pairs that were taken down, to be told
  std::vector<RdmaWrite> batch_;         // scratch of pump()
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  RdmaStats stats_;
};

}  // namespace dualkv
