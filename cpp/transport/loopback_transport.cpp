// loopback: links inside one process, without sockets. The oracle of the transport conformance suite.
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#include "base/progress.h"
#include "base/text.h"
#include "transport/grants.h"
#include "transport/handshake.h"
#include "transport/transport.h"

namespace dualkv {

namespace {
class LoopbackTransport;
}

// Names of listening transports. Thread-safe.
class LoopbackHub {
 public:
  void add(const std::string& name, LoopbackTransport* transport, std::shared_ptr<Progress> progress) {
    const std::lock_guard lock(mutex_);
    if (!listeners_.try_emplace(name, Listener{transport, std::move(progress)}).second) {
      throw Error(Code::kInvalidArgument, text("address 'loopback://", name, "' is taken"));
    }
  }
  void remove(LoopbackTransport* transport) {
    const std::lock_guard lock(mutex_);
    std::erase_if(listeners_, [&](const auto& item) { return item.second.transport == transport; });
  }
  // Runs `task` with the listener on its progress thread; false if there is none.
  bool reach(const std::string& name, std::function<void(LoopbackTransport*)> task) {
    const std::lock_guard lock(mutex_);
    const auto found = listeners_.find(name);
    if (found == listeners_.end()) return false;
    // The transport ends on its own progress thread, after it was removed here: a task that runs finds it alive or
    // finds no entry.
    return found->second.progress->post([this, name, task = std::move(task)] {
      LoopbackTransport* transport = nullptr;
      {
        const std::lock_guard again(mutex_);
        if (const auto entry = listeners_.find(name); entry != listeners_.end()) transport = entry->second.transport;
      }
      task(transport);
    });
  }

 private:
  struct Listener {
    LoopbackTransport* transport;
    std::shared_ptr<Progress> progress;
  };
  std::mutex mutex_;
  std::map<std::string, Listener> listeners_;
};

std::shared_ptr<LoopbackHub> make_loopback_hub() { return std::make_shared<LoopbackHub>(); }

namespace {

// A write in flight. The receiver copies under the lock, so a withdrawal waits for a copy and forbids a later one.
struct Flight {
  std::mutex mutex;
  bool withdrawn = false;
  LayerWrite write;
  std::uint64_t bytes = 0;
};

class LoopbackLink : public Link, public std::enable_shared_from_this<LoopbackLink> {
 public:
  LoopbackLink(std::shared_ptr<Progress> progress, GrantTable& grants, LinkEvents& events, std::uint64_t window,
               std::string peer)
      : progress_(std::move(progress)), grants_(grants), events_(events), window_(window), peer_(std::move(peer)) {}

  void join(const std::shared_ptr<LoopbackLink>& other) {
    other_ = other;
    open_ = true;
    events_.on_open(shared_from_this());
  }

  // The same from the other side's thread.
  void join_there(const std::shared_ptr<LoopbackLink>& other) {
    progress_->post([self = shared_from_this(), other] { self->join(other); });
  }

  const std::string& peer() const override { return peer_; }
  bool open() const override { return open_; }
  Clock::time_point last_received() const override { return Clock::now(); }  // memory does not fall silent
  std::uint64_t lane_bytes(Lane lane) const override { return lane_bytes_[static_cast<int>(lane)]; }

  void send(std::span<const std::byte> message) override {
    tell([message = std::vector(message.begin(), message.end())](LoopbackLink& there) {
      there.events_.on_message(there, message);
    });
  }

  bool can_write(Lane lane, std::uint64_t bytes) const override {
    return open_ && (lane_bytes(lane) == 0 || lane_bytes(lane) + bytes <= window_);
  }

  void write(LayerWrite write) override {
    const std::uint64_t bytes = write.blocks.size() * grants_.geometry().layer_bytes(write.layer);
    lane_bytes_[static_cast<int>(write.lane)] += bytes;
    stats_.bytes_sent[static_cast<int>(write.lane)] += bytes;
    const auto flight = std::make_shared<Flight>();
    flight->write = std::move(write);
    flight->bytes = bytes;
    flights_.emplace(flight->write.id, flight);
    tell([flight](LoopbackLink& there) { there.receive(*flight); });
  }

  void withdraw(std::uint64_t owner) override {
    std::erase_if(flights_, [&](const auto& item) {
      Flight& flight = *item.second;
      if (flight.write.owner != owner) return false;
      const std::lock_guard lock(flight.mutex);
      flight.withdrawn = true;
      lane_bytes_[static_cast<int>(flight.write.lane)] -= flight.bytes;
      return true;
    });
  }

  void close(Status why) override {
    if (!std::exchange(open_, false)) return;
    if (const auto there = other_.lock()) {
      there->progress_->post([there] { there->close({Code::kPeerLost, 0, "the peer closed the connection"}); });
    }
    progress_->post([self = shared_from_this(), why] {
      for (auto& [id, flight] : self->flights_) {
        const std::lock_guard lock(flight->mutex);
        flight->withdrawn = true;
      }
      self->flights_.clear();
      self->events_.on_closed(*self, why);
    });
  }

  LinkStats stats() const override {
    LinkStats stats = stats_;
    stats.peer = peer_;
    stats.transport = to_string(Scheme::kLoopback);
    stats.connected = open_;
    return stats;
  }

 private:
  // Runs `task` on the other side, if both sides still stand.
  template <typename Task>
  void tell(Task task) {
    const auto there = other_.lock();
    if (!open_ || !there) return;
    there->progress_->post([there, task = std::move(task)] {
      if (there->open_) task(*there);
    });
  }

  void receive(Flight& flight) {
    Outcome outcome;
    {
      const std::lock_guard lock(flight.mutex);
      if (flight.withdrawn) return;
      outcome = copy_in(flight.write);
    }
    stats_.bytes_received += flight.bytes;
    stats_.writes_rejected += outcome.code == Code::kRefused;
    stats_.writes_corrupt += outcome.code == Code::kCorrupt;
    tell([id = flight.write.id, outcome](LoopbackLink& there) { there.written(id, outcome); });
  }

  Outcome copy_in(const LayerWrite& write) {
    WriteHeader header{write.id, write.grant, write.layer, 0, 0, {}};
    std::vector<std::byte> source;  // the oracle favours the plain way over the fast one
    for (const WriteBlock& block : write.blocks) {
      header.entries.push_back({block.block, block.checksum, {}});
      for (std::uint32_t i = 0; i < block.extents; ++i) {
        source.insert(source.end(), block.source[i].data, block.source[i].data + block.source[i].bytes);
      }
    }
    InboundWrite inbound(grants_, peer_, std::move(header));
    std::array<iovec, InboundWrite::kMaxPieces> pieces;
    while (inbound.bytes_left() > 0) {
      const std::size_t count = inbound.next(pieces);
      for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(pieces[i].iov_base, source.data() + source.size() - inbound.bytes_left(), pieces[i].iov_len);
        inbound.advance(pieces[i].iov_len);
      }
    }
    return inbound.finish();
  }

  void written(std::uint64_t id, Outcome outcome) {
    const auto node = flights_.extract(id);
    if (node.empty()) return;  // withdrawn
    lane_bytes_[static_cast<int>(node.mapped()->write.lane)] -= node.mapped()->bytes;
    events_.on_write_done(*this, id, outcome);
  }

  const std::shared_ptr<Progress> progress_;
  GrantTable& grants_;
  LinkEvents& events_;
  const std::uint64_t window_;
  const std::string peer_;
  std::weak_ptr<LoopbackLink> other_;
  bool open_ = false;
  std::unordered_map<std::uint64_t, std::shared_ptr<Flight>> flights_;
  std::uint64_t lane_bytes_[kLaneCount] = {0, 0};
  LinkStats stats_;
};

class LoopbackTransport : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<LoopbackHub> hub, std::shared_ptr<Progress> progress, GrantTable& grants,
                    LinkEvents& events, const TransportOptions& options)
      : hub_(std::move(hub)), progress_(std::move(progress)), grants_(grants), events_(events), options_(options) {}

  ~LoopbackTransport() override { close(); }

  std::string listen(const Address& address) override {
    hub_->add(address.name, this, progress_);
    return address.text;
  }

  void connect(const Address& address, Connected done) override {
    const auto result = std::make_shared<Connected>(std::move(done));
    const Caller caller{this, alive_, progress_, result, address.text};
    const bool reached = hub_->reach(
        address.name, [caller, hello = hello()](LoopbackTransport* there) { answer(there, hello, caller); });
    if (!reached) (*result)({Code::kPeerLost, 0, text("no node listens on '", address.text, "'")}, "");
  }

  void close() override {
    hub_->remove(this);
    for (const auto& weak : std::exchange(links_, {})) {
      if (const auto link = weak.lock()) link->close({Code::kCancelled, 0, "this node is closing"});
    }
  }

 private:
  struct Introduction {
    std::string name, secret, geometry;
    std::uint64_t fingerprint;
  };

  // Who asked, and how to answer.
  struct Caller {
    LoopbackTransport* transport;
    std::weak_ptr<bool> alive;  // expires with the transport
    std::shared_ptr<Progress> progress;
    std::shared_ptr<Connected> result;
    std::string address;
  };

  Introduction hello() const {
    return {options_.name, options_.secret, grants_.geometry().describe(), grants_.geometry().fingerprint()};
  }

  std::shared_ptr<LoopbackLink> make_link(const std::string& peer) {
    const auto link = std::make_shared<LoopbackLink>(progress_, grants_, events_, options_.window_bytes, peer);
    links_.push_back(link);
    return link;
  }

  // On the acceptor's thread; `there` is the acceptor, null if it is gone.
  static void answer(LoopbackTransport* there, const Introduction& hello, const Caller& caller) {
    Status status{Code::kPeerLost, 0, text("no node listens on '", caller.address, "'")};
    std::shared_ptr<LoopbackLink> theirs;
    std::string name;
    if (there != nullptr) {
      const std::string why = there->disagreement(hello);
      status = why.empty() ? Status{} : Status{Code::kRefused, 0, text("'", caller.address, "' refused: ", why)};
      name = there->options_.name;
      if (why.empty()) {
        theirs = there->make_link(hello.name);
      } else {
        there->events_.on_refused();
      }
    }
    caller.progress->post([caller, status, theirs, name] {
      if (caller.alive.expired()) return;
      if (!status.ok()) return (*caller.result)(status, "");
      const auto mine = caller.transport->make_link(name);
      theirs->join_there(mine);
      mine->join(theirs);
      (*caller.result)({}, name);
    });
  }

  std::string disagreement(const Introduction& hello) const {
    if (hello.secret != options_.secret) return "the secrets differ";
    if (hello.fingerprint != grants_.geometry().fingerprint()) {
      return text("another geometry. '", options_.name, "': ", grants_.geometry().describe(), "; '", hello.name,
                  "': ", hello.geometry);
    }
    if (hello.name == options_.name) return text("two nodes are called '", hello.name, "'");
    return {};
  }

  const std::shared_ptr<LoopbackHub> hub_;
  const std::shared_ptr<Progress> progress_;
  GrantTable& grants_;
  LinkEvents& events_;
  const TransportOptions options_;
  std::vector<std::weak_ptr<LoopbackLink>> links_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace

std::unique_ptr<Transport> make_loopback_transport(std::shared_ptr<LoopbackHub> hub, std::shared_ptr<Progress> progress,
                                                   GrantTable& grants, LinkEvents& events,
                                                   const TransportOptions& options) {
  return std::make_unique<LoopbackTransport>(std::move(hub), std::move(progress), grants, events, options);
}

}  // namespace dualkv
