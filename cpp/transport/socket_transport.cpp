// tcp, rdma and shm: listening, connecting, and the handshake that makes channels into links.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <unordered_map>

#include "base/clock.h"
#include "base/text.h"
#include "transport/socket_link.h"

namespace dualkv {

namespace {

constexpr std::size_t kMaxUnproven = 256;  // connections in handshake

std::string own_text(std::span<const std::byte> body) {
  return {reinterpret_cast<const char*>(body.data()), body.size()};
}

}  // namespace

namespace {

class SocketTransport : public Transport {
 public:
  SocketTransport(Scheme scheme, Progress& progress, GrantTable& grants, LinkEvents& events,
                  const TransportOptions& options)
      : scheme_(scheme),
        progress_(progress),
        grants_(grants),
        events_(events),
        options_(options),
        probe_(random_u64()) {
    if (scheme == Scheme::kShm) options_.channels_per_lane = 1;  // the channel carries references only
  }

  ~SocketTransport() override { close(); }

  std::string listen(const Address& address) override;
  void connect(const Address& address, Connected done) override;
  void close() override;
  void on_regions_changed() override {
    for (const auto& weak : links_) {
      if (const auto link = weak.lock()) link->tell_regions();
    }
  }

 private:
  // One side's view of a connection that has not proved itself.
  struct Handshake : ChannelOwner, std::enable_shared_from_this<Handshake> {
    SocketTransport* transport = nullptr;
    std::shared_ptr<Channel> channel;
    bool connector = false;
    Hello mine, theirs;
    bool heard = false;  // theirs is filled in
    pid_t pid = 0;
    Progress::TimerId timer = 0;
    std::shared_ptr<struct Dial> dial;  // connector only

    bool on_frame(Channel&, FrameType type, std::span<const std::byte> body) override {
      return transport->on_handshake(shared_from_this(), type, body);
    }
    void on_payload(Channel&, InboundWrite&) override {}
    void on_channel_closed(Channel&, const Status& why, bool hostile) override {
      if (hostile) transport->events_.on_hostile();
      transport->end(shared_from_this(), why);
    }
  };

  Hello hello(std::uint64_t session, ChannelRole role, std::uint8_t index) const;
  void begin(Fd fd, const Hello& mine, std::shared_ptr<Dial> dial);
  void dial_channel(const std::shared_ptr<Dial>& dial, ChannelRole role, std::uint8_t index);
  void accept_all(int fd);
  bool on_handshake(const std::shared_ptr<Handshake>& shake, FrameType type, std::span<const std::byte> body);
  bool on_hello(Handshake& shake, std::span<const std::byte> body);
  bool on_challenge(const std::shared_ptr<Handshake>& shake, std::span<const std::byte> body);
  bool on_proof(const std::shared_ptr<Handshake>& shake, std::span<const std::byte> body);
  void refuse(const std::shared_ptr<Handshake>& shake, const std::string& why);
  // Empty if the two can work together; else why not.
  std::string disagreement(const Handshake& shake) const;
  std::string probe(Handshake& shake) const;
  void proven(const std::shared_ptr<Handshake>& shake);
  void expire_partial(const std::pair<std::string, std::uint64_t>& key);
  void forget(const std::shared_ptr<Handshake>& shake);
  void end(const std::shared_ptr<Handshake>& shake, const Status& why);
  void mark_lane(int fd, ChannelRole role);

  const Scheme scheme_;
  Progress& progress_;
  GrantTable& grants_;
  LinkEvents& events_;
  TransportOptions options_;
  const std::uint64_t probe_;
  std::map<int, Fd> listeners_;
  std::vector<std::string> socket_paths_;
  std::vector<std::shared_ptr<Handshake>> shakes_;
  std::map<std::pair<std::string, std::uint64_t>, std::shared_ptr<SocketLink>> partial_;
  std::vector<std::weak_ptr<SocketLink>> links_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

// A connection attempt: all channels of one link.
struct Dial {
  Address address;
  Transport::Connected done;
  std::uint64_t session = 0;
  std::shared_ptr<SocketLink> link;
  bool ended = false;

  void end(Status status, const std::string& peer) {
    if (std::exchange(ended, true)) return;
    if (!status.ok() && link) link->close(status);
    done(std::move(status), peer);
  }
};

Fd make_socket(const Address& address) {
  Fd fd(socket(address.socket.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) throw Error(Code::kIo, text("address '", address.text, "': socket"), errno);
  return fd;
}

// A process that was killed leaves its socket file behind; nobody answers there any more.
void remove_dead_socket(const Address& address) {
  const Fd probe = make_socket(address);
  const SocketName name(address);
  if (::connect(probe.get(), name.get(), name.bytes()) != 0 && errno == ECONNREFUSED) unlink(address.path.c_str());
}

std::string SocketTransport::listen(const Address& address) {
  Fd fd = make_socket(address);
  const SocketName name(address);
  const int one = 1;
  if (over_tcp(scheme_)) setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (scheme_ == Scheme::kShm) remove_dead_socket(address);
  if (bind(fd.get(), name.get(), name.bytes()) != 0 || ::listen(fd.get(), 128) != 0) {
    throw Error(Code::kIo, text("cannot listen on '", address.text, "'; is it taken, or the socket's folder missing?"),
                errno);
  }
  std::string reachable = address.text;
  if (over_tcp(scheme_)) {
    sockaddr_storage bound{};
    socklen_t bytes = sizeof(bound);
    getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &bytes);
    const int port = ntohs(reinterpret_cast<const sockaddr_in&>(bound).sin_port);  // same place for IPv6
    reachable = address.text.substr(0, address.text.rfind(':') + 1) + std::to_string(port);
  } else {
    socket_paths_.push_back(address.path);
  }
  const int raw = fd.get();
  progress_.watch(raw, EPOLLIN, [this, raw](std::uint32_t) { accept_all(raw); });
  listeners_.emplace(raw, std::move(fd));
  return reachable;
}

void SocketTransport::close() {
  for (const auto& [fd, owner] : listeners_) progress_.unwatch(fd);
  listeners_.clear();
  for (const std::string& path : std::exchange(socket_paths_, {})) unlink(path.c_str());
  const Status why{Code::kCancelled, 0, "this node is closing"};
  for (const auto& shake : std::vector(shakes_)) shake->channel->close(why);
  for (const auto& [key, link] : std::exchange(partial_, {})) link->close(why);
  for (const auto& weak : std::exchange(links_, {})) {
    if (const auto link = weak.lock()) link->close(why);
  }
}

Hello SocketTransport::hello(std::uint64_t session, ChannelRole role, std::uint8_t index) const {
  Hello mine;
  mine.name = options_.name;
  mine.fingerprint = grants_.geometry().fingerprint();
  mine.geometry = grants_.geometry().describe();
  mine.session = session;
  mine.role = role;
  mine.index = index;
  mine.channels_per_lane = static_cast<std::uint8_t>(options_.channels_per_lane);
  fill_random(mine.nonce);
  if (scheme_ == Scheme::kShm) {
    mine.probe_address = reinterpret_cast<std::uint64_t>(&probe_);
    mine.probe_value = probe_;
  }
  return mine;
}

// Low-latency, and marked for the lane on the wire and in this host's queues.
void SocketTransport::mark_lane(int fd, ChannelRole role) {
  if (!over_tcp(scheme_)) return;
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  const LaneOptions& lane = options_.lanes[role == ChannelRole::kLow ? 0 : 1];
  const int tos = lane.dscp << 2;
  int family = AF_INET;
  socklen_t bytes = sizeof(family);
  getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &bytes);
  const bool six = family == AF_INET6;
  // The priority comes second: setting the TOS changes it.
  const bool marked =
      setsockopt(fd, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_TCLASS : IP_TOS, &tos, sizeof(tos)) == 0 &&
      setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &lane.so_priority, sizeof(lane.so_priority)) == 0;
  if (!marked) events_.on_fallback("lane_not_marked");
}

void SocketTransport::begin(Fd fd, const Hello& mine, std::shared_ptr<Dial> dial) {
  const auto shake = std::make_shared<Handshake>();
  shake->transport = this;
  shake->connector = dial != nullptr;
  shake->mine = mine;
  shake->dial = std::move(dial);
  shake->channel = std::make_shared<Channel>(progress_, std::move(fd), *shake);
  shakes_.push_back(shake);
  const auto limit = to_duration(options_.handshake_s);
  shake->timer = progress_.at(Clock::now() + limit, [this, weak = std::weak_ptr(shake)] {
    const auto alive = weak.lock();
    if (!alive) return;
    alive->timer = 0;
    events_.on_refused();
    alive->channel->close({Code::kTimeout, 0, "no handshake in time: is a dualkv node listening there?"});
  });
  shake->channel->start();
  if (shake->connector) shake->channel->send(FrameType::kHello, encode_hello(mine));
}

void SocketTransport::connect(const Address& address, Connected done) {
  const auto dial = std::make_shared<Dial>();
  dial->address = address;
  dial->done = std::move(done);
  dial->session = random_u64();
  dial_channel(dial, ChannelRole::kControl, 0);
}

void SocketTransport::dial_channel(const std::shared_ptr<Dial>& dial, ChannelRole role, std::uint8_t index) {
  const auto fail = [&](int error) {
    dial->end({Code::kPeerLost, error, text("cannot connect to '", dial->address.text, "'; is the node running?")}, "");
  };
  Fd fd(socket(dial->address.socket.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return fail(errno);
  mark_lane(fd.get(), role);
  const SocketName name(dial->address);
  if (::connect(fd.get(), name.get(), name.bytes()) != 0 && errno != EINPROGRESS) return fail(errno);
  begin(std::move(fd), hello(dial->session, role, index), dial);
}

void SocketTransport::accept_all(int listener) {
  for (;;) {
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd.valid()) return;
    if (shakes_.size() >= kMaxUnproven) {
      events_.on_refused();
      continue;
    }
    begin(std::move(fd), hello(0, ChannelRole::kControl, 0), nullptr);
  }
}

bool SocketTransport::on_handshake(const std::shared_ptr<Handshake>& shake, FrameType type,
                                   std::span<const std::byte> body) {
  switch (type) {
    case FrameType::kHello: return !shake->connector && !shake->heard && on_hello(*shake, body);
    case FrameType::kChallenge: return shake->connector && !shake->heard && on_challenge(shake, body);
    case FrameType::kProof: return !shake->connector && shake->heard && on_proof(shake, body);
    case FrameType::kWelcome:
      if (!shake->connector || !shake->heard) return false;
      proven(shake);
      return true;
    case FrameType::kRefuse:
      if (!shake->connector) return false;
      shake->channel->close({Code::kRefused, 0, text("'", shake->dial->address.text, "' refused: ", own_text(body))});
      return true;
    default: return false;
  }
}

bool SocketTransport::on_hello(Handshake& shake, std::span<const std::byte> body) {
  const auto theirs = decode_hello(body);
  if (!theirs) return false;
  shake.theirs = *theirs;
  shake.heard = true;
  shake.mine.session = theirs->session;
  shake.mine.role = theirs->role;
  shake.mine.index = theirs->index;
  const Digest proof = make_proof(options_.secret, kAcceptorLabel, shake.theirs, shake.mine);
  std::vector<std::byte> challenge(proof.begin(), proof.end());
  const auto mine = encode_hello(shake.mine);
  challenge.insert(challenge.end(), mine.begin(), mine.end());
  shake.channel->send(FrameType::kChallenge, challenge);
  return true;
}

std::string SocketTransport::disagreement(const Handshake& shake) const {
  if (shake.theirs.fingerprint != grants_.geometry().fingerprint()) {
    return text("another geometry. '", shake.mine.name, "': ", shake.mine.geometry, "; '", shake.theirs.name,
                "': ", shake.theirs.geometry);
  }
  if (shake.theirs.channels_per_lane != shake.mine.channels_per_lane) {
    return text("another connections_per_lane: '", shake.mine.name, "' has ", int{shake.mine.channels_per_lane}, ", '",
                shake.theirs.name, "' has ", int{shake.theirs.channels_per_lane});
  }
  if (shake.theirs.name == shake.mine.name) return text("two nodes are called '", shake.mine.name, "'");
  return {};
}

// shm only: may this process read the peer's memory?
std::string SocketTransport::probe(Handshake& shake) const {
  if (scheme_ != Scheme::kShm) return {};
  ucred credentials{};
  socklen_t bytes = sizeof(credentials);
  getsockopt(shake.channel->fd(), SOL_SOCKET, SO_PEERCRED, &credentials, &bytes);
  shake.pid = credentials.pid;
  std::uint64_t value = 0;
  const iovec local{&value, sizeof(value)};
  const iovec remote{reinterpret_cast<void*>(shake.theirs.probe_address), sizeof(value)};
  if (pull(shake.pid, {&local, 1}, {&remote, 1}) == sizeof(value) && value == shake.theirs.probe_value) return {};
  return text("process ", shake.pid, " does not let this one read its memory (", std::strerror(errno),
              "); run both as one user with kernel.yama.ptrace_scope=0 or CAP_SYS_PTRACE in one pid namespace, or "
              "use tcp");
}

bool SocketTransport::on_challenge(const std::shared_ptr<Handshake>& shake, std::span<const std::byte> body) {
  Digest proof;
  if (body.size() < proof.size()) return false;
  std::copy_n(body.begin(), proof.size(), proof.begin());
  const auto theirs = decode_hello(body.subspan(proof.size()));
  if (!theirs) return false;
  shake->theirs = *theirs;
  shake->heard = true;
  const std::string& address = shake->dial->address.text;
  if (!equal(proof, make_proof(options_.secret, kAcceptorLabel, shake->mine, shake->theirs))) {
    shake->channel->close({Code::kRefused, 0, text("'", address, "' does not know this node's secret")});
    return true;
  }
  std::string why = disagreement(*shake);
  if (why.empty()) why = probe(*shake);
  if (!why.empty()) {
    shake->channel->close({Code::kRefused, 0, text("'", address, "': ", why)});
    return true;
  }
  shake->channel->send(FrameType::kProof, make_proof(options_.secret, kConnectorLabel, shake->mine, shake->theirs));
  return true;
}

bool SocketTransport::on_proof(const std::shared_ptr<Handshake>& shake, std::span<const std::byte> body) {
  Digest proof;
  if (body.size() != proof.size()) return false;
  std::copy_n(body.begin(), proof.size(), proof.begin());
  if (!equal(proof, make_proof(options_.secret, kConnectorLabel, shake->theirs, shake->mine))) {
    refuse(shake, "the secrets differ");
    return true;
  }
  std::string why = disagreement(*shake);
  if (why.empty()) why = probe(*shake);
  if (!why.empty()) {
    refuse(shake, why);
    return true;
  }
  mark_lane(shake->channel->fd(), shake->theirs.role);
  shake->channel->send(FrameType::kWelcome, {});
  proven(shake);
  return true;
}

// Says why, then closes.
void SocketTransport::refuse(const std::shared_ptr<Handshake>& shake, const std::string& why) {
  events_.on_refused();
  progress_.cancel(std::exchange(shake->timer, 0));
  shake->channel->send(FrameType::kRefuse,
                       std::as_bytes(std::span(why).first(std::min<std::size_t>(why.size(), 1000))));
  shake->channel->close_after_sending();
}

void SocketTransport::forget(const std::shared_ptr<Handshake>& shake) {
  progress_.cancel(std::exchange(shake->timer, 0));
  std::erase(shakes_, shake);
}

// A link whose other channels never come is given up.
void SocketTransport::expire_partial(const std::pair<std::string, std::uint64_t>& key) {
  const auto limit = to_duration(options_.handshake_s);
  progress_.at(Clock::now() + 2 * limit, [this, key, alive = std::weak_ptr(alive_)] {
    if (alive.expired()) return;
    const auto node = partial_.extract(key);
    if (!node.empty()) node.mapped()->close({Code::kTimeout, 0, "the peer opened only a part of its channels"});
  });
}

void SocketTransport::proven(const std::shared_ptr<Handshake>& shake) {
  forget(shake);
  const auto key = std::pair(shake->theirs.name, shake->mine.session);
  std::shared_ptr<SocketLink>& link = shake->connector ? shake->dial->link : partial_[key];
  if (!link) {
    link = std::make_shared<SocketLink>(progress_, grants_, events_, scheme_, options_, shake->theirs.name);
    std::erase_if(links_, [](const auto& weak) { return weak.expired(); });
    links_.push_back(link);
    if (!shake->connector) expire_partial(key);
  }
  const std::shared_ptr<SocketLink> joined = link;
  const bool complete = joined->attach(shake->channel, shake->mine.role, shake->pid);
  if (complete && !shake->connector) partial_.erase(key);
  const auto dial = shake->dial;
  if (dial && shake->mine.role == ChannelRole::kControl) {
    for (std::uint8_t i = 0; i < options_.channels_per_lane; ++i) {
      dial_channel(dial, ChannelRole::kLow, i);
      dial_channel(dial, ChannelRole::kHigh, i);
    }
  }
  if (!complete) return;
  joined->start(shake->connector);
  if (dial) dial->end({}, joined->peer());
}

void SocketTransport::end(const std::shared_ptr<Handshake>& shake, const Status& why) {
  forget(shake);
  if (!shake->dial) return;
  Status status = why;
  if (status.code == Code::kPeerLost) {
    status.message =
        text("cannot connect to '", shake->dial->address.text, "': ", why.message, "; is the node running?");
  }
  shake->dial->end(std::move(status), "");
}

}  // namespace

std::unique_ptr<Transport> make_socket_transport(Scheme scheme, Progress& progress, GrantTable& grants,
                                                 LinkEvents& events, const TransportOptions& options) {
  return std::make_unique<SocketTransport>(scheme, progress, grants, events, options);
}

}  // namespace dualkv
