// Wiring of a node: links and messages in, tasks and views out.
#include "node/node_state.h"

#include <algorithm>

#include "base/clock.h"
#include "base/text.h"
#include "node/load_task.h"
#include "node/serve_task.h"

namespace dualkv {

namespace {

constexpr std::uint32_t kMaxPromptBlocks = 1u << 24;  // as many as a staging pool can have slots
constexpr auto kTick = std::chrono::milliseconds(20);
constexpr double kFirstRedialPause = 0.1;
constexpr std::uint64_t kPinBytes = std::uint64_t{256} << 20;  // of the staging, at once

void check_options(const NodeOptions& options) {
  const auto require = [](bool fine, const std::string& message) {
    if (!fine) throw Error(Code::kInvalidArgument, message);
  };
  require(!options.name.empty() && options.name.size() <= 128,
          text("node: name '", options.name, "' must have 1 to 128 bytes"));
  require(options.connections_per_lane >= 1 && options.connections_per_lane <= 16,
          text("node: connections_per_lane = ", options.connections_per_lane, ": must be 1 to 16"));
  for (const LaneOptions& lane : options.lanes) {
    require(lane.dscp >= 0 && lane.dscp <= 63, text("node: dscp = ", lane.dscp, ": must be 0 to 63"));
    require(lane.so_priority >= 0 && lane.so_priority <= 15,
            text("node: so_priority = ", lane.so_priority, ": must be 0 to 15"));
    require(lane.service_level >= 0 && lane.service_level <= 15,
            text("node: service_level = ", lane.service_level, ": must be 0 to 15"));
  }
  const RdmaOptions& rdma = options.rdma;
  require(rdma.timeout >= 1 && rdma.timeout <= 31, text("node: rdma.timeout = ", rdma.timeout, ": must be 1 to 31"));
  require(rdma.retries >= 0 && rdma.retries <= 7 && rdma.rnr_retries >= 0 && rdma.rnr_retries <= 7,
          "node: rdma.retries and rdma.rnr_retries must be 0 to 7");
  require(rdma.gpu >= -1, text("node: rdma.gpu = ", rdma.gpu, ": must be a device, or -1 for none"));
  require(rdma.gpu < 0 || rdma.devices.empty(), "node: rdma.gpu chooses the devices that rdma.devices names: give one");
  require(rdma.stall_s > 0, text("node: rdma.stall_s = ", rdma.stall_s, ": must be positive"));
  require(rdma.mtu == 0 || (rdma.mtu >= 256 && rdma.mtu <= 4096),
          text("node: rdma.mtu = ", rdma.mtu, ": must be 256 to 4096, or 0 for the port's"));
  require(rdma.send_depth >= 1 && rdma.send_depth <= 32768 && rdma.receive_depth >= 2 && rdma.receive_depth <= 32768,
          "node: rdma.send_depth must be 1 to 32768, rdma.receive_depth 2 to 32768");
  require(options.write_frame_bytes >= 1 && options.write_window_bytes >= options.write_frame_bytes,
          "node: write_window_bytes must be at least write_frame_bytes");
  require(options.spin_us <= 1000, text("node: spin_us = ", options.spin_us, ": must be at most 1000"));
  require(options.heartbeat_s > 0 && options.peer_silence_s > 2 * options.heartbeat_s,
          "node: peer_silence_s must be more than two heartbeats");
  require(options.reconnect_max_s >= kFirstRedialPause,
          text("node: reconnect_max_s = ", options.reconnect_max_s, ": must be at least ", kFirstRedialPause));
  require(options.handshake_s > 0 && options.stall_s > 0, "node: handshake_s and stall_s must be positive");
}

TransportOptions transport_options(const NodeOptions& options, std::shared_ptr<SharedRegions> regions) {
  return {options.name,
          options.secret,
          options.connections_per_lane,
          {options.lanes[0], options.lanes[1]},
          options.write_window_bytes,
          options.handshake_s,
          std::move(regions),
          nullptr};
}

// Peers that come by shm:// map the staging.
NodeOptions completed(NodeOptions options) {
  options.staging.shared |= std::any_of(options.listen.begin(), options.listen.end(),
                                        [](const std::string& address) { return address.starts_with("shm://"); });
  return options;
}

const Status kClosing{Code::kCancelled, 0, "the node is closed"};

}  // namespace

Clock::duration seconds(double value) {
  // A day is the longest any call may take (docs/settings.md); more, or not a number, must not overflow the clock.
  constexpr double kLongestSeconds = 86400;
  if (!(value < kLongestSeconds)) value = kLongestSeconds;
  return to_duration(value);
}

std::uint64_t microseconds_until(Clock::time_point when) {
  const auto left = std::chrono::duration_cast<std::chrono::microseconds>(when - Clock::now()).count();
  return left > 0 ? static_cast<std::uint64_t>(left) : 0;
}

NodeState::NodeState(const KvGeometry& geometry, NodeOptions options)
    : geometry_((check_options(options), geometry)),
      options_(completed(std::move(options))),
      transport_options_(transport_options(options_, regions_)),
      progress_(std::make_shared<Progress>("dualkv-" + options_.name, std::chrono::microseconds(options_.spin_us))),
      fallbacks_(options_.store.fail_on_fallback),
      pool_(geometry_, options_.staging),
      store_(std::make_unique<Store>(std::make_shared<StoreState>(geometry_, options_.store, pool_, progress_,
                                                                  /*reads_to_gpus=*/options_.gpu.gds_bytes > 0))),
      grants_(geometry_),
      sends_(*progress_, geometry_, options_.write_frame_bytes) {
  if (pool_.shared_fd() >= 0) regions_->add(pool_.memory(), pool_.shared_fd());
  memory_->add(pool_.memory(), std::shared_ptr<const void>(alive_));
  const StagingStats staging = pool_.stats();
  if (options_.staging.lock_memory && !staging.locked)
    fallbacks_.count("staging_not_locked", "raise the memlock limit");
  if (options_.staging.huge_pages && staging.pages != "huge") {
    fallbacks_.count("no_huge_pages", "reserve some with sysctl vm.nr_hugepages");
  }
  if (options_.staging.numa_node >= 0 && !staging.numa_bound) {
    fallbacks_.count("staging_not_bound", text("mbind to NUMA node ", options_.staging.numa_node, " was refused"));
  }
}

NodeState::~NodeState() { close(); }

void NodeState::start() {
  std::vector<Address> addresses;
  for (const std::string& text : options_.listen) {
    addresses.push_back(resolve(text, /*for_listening=*/true));
    if (!addresses.back().this_host && options_.secret.empty()) {
      throw Error(Code::kInvalidArgument, dualkv::text("node: '", text,
                                                       "' can be reached from other hosts, and no "
                                                       "secret is set; give secret or secret_file"));
    }
  }
  Status failure;
  progress_->run([&] {
    try {
      if (options_.copy == CopyEngine::kNic) {
        const LaneOptions& low = options_.lanes[static_cast<int>(Lane::kLow)];
        copier_ = std::make_unique<NicCopier>(
            *progress_, *rdma(),
            LaneMark{static_cast<std::uint8_t>(low.service_level), static_cast<std::uint8_t>(low.dscp << 2)},
            counter());
      }
      for (const Address& address : addresses) addresses_.push_back(transport(address.scheme).listen(address));
      tick();
    } catch (const Error& error) {
      failure = error.status();
    }
  });
  if (failure.ok()) return;
  close();
  throw Error(failure);
}

void NodeState::close() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(closed_, true)) return;
  }
  const auto abort_all = [this] { for_each_task([](NodeTask& task) { task.abort(kClosing); }); };
  progress_->run(abort_all);  // a GPU that is being made ready may wait for one of them
  const std::lock_guard prepared(preparing_);
  progress_->run([this, &abort_all] {
    closing_ = true;
    progress_->cancel(tick_);
    abort_all();
    for (auto& [scheme, transport] : transports_) transport->close();
  });
  progress_->run([] {});  // what closing has posted
  // These end last: to give memory back, the driver may wait for a GPU, and that for a stream which waits for the
  // progress thread.
  std::shared_ptr<RdmaDomain> rdma;
  decltype(ports_) ports;
  progress_->run([&] {
    loads_.clear();
    serves_.clear();
    incomings_.clear();
    for (auto& [name, peer] : peers_) peer.links.clear();
    transports_.clear();
    copier_.reset();
    ports.swap(ports_);
    transport_options_.rdma.reset();
    rdma.swap(rdma_);
  });
  storage().close();
  progress_->stop();
}

Transport& NodeState::transport(Scheme scheme) {
  if (const auto found = transports_.find(scheme); found != transports_.end()) return *found->second;
  std::unique_ptr<Transport> transport;
  if (scheme == Scheme::kLoopback) {
    if (!options_.loopback) throw Error(Code::kInvalidArgument, "node: loopback:// needs options.loopback");
    transport = make_loopback_transport(options_.loopback, progress_, grants_, *this, transport_options_);
  } else {
    if (scheme == Scheme::kRdma) transport_options_.rdma = rdma();
    transport = make_socket_transport(scheme, *progress_, grants_, *this, transport_options_);
  }
  return *transports_.emplace(scheme, std::move(transport)).first->second;
}

const std::shared_ptr<RdmaDomain>& NodeState::rdma() {
  if (!rdma_) {
    const DevicePlace near =
        options_.rdma.gpu >= 0 ? place_of_gpu(options_.rdma.gpu) : DevicePlace{"", options_.staging.numa_node};
    rdma_ = std::make_shared<RdmaDomain>(options_.rdma, near, *progress_, *memory_, counter());
  }
  return rdma_;
}

std::uint32_t NodeState::share(std::span<const std::byte> memory, int fd) {
  const std::uint32_t id = regions_->add(memory, fd);
  for (const auto& [scheme, transport] : transports_) transport->on_regions_changed();
  return id;
}

void NodeState::prepare(const PagedKv& cache) {
  if (cache.on_host()) return;
  const auto device = CudaDevice::open(cache.device());
  device->check_memory(cache.memory());
  const std::lock_guard lock(preparing_);
  if (closed()) throw Error(kClosing);
  if (options_.gpu.verify) check_verifiable(cache, *device);
  bool known = false;
  progress_->run([&] { known = ports_.contains(cache.device()); });
  if (known) return;
  if (options_.gpu.copy == GpuCopy::kAuto) device->calibrate();
  if (const std::string why = device->missing(options_.gpu.copy); !why.empty()) {
    throw Error(Code::kUnsupported, text("gpu_copy='", to_string(options_.gpu.copy), "' on GPU ", device->ordinal(),
                                         " (", device->name(), "): ", why));
  }
  if (!std::exchange(pinned_, true)) pin_staging(device);
  auto port = std::make_unique<DevicePort>(*this, device, make_gds(device), make_nic_slots(device));
  if (copier_ && port->nic() == nullptr) {
    fallbacks_.count("copy_by_gpu", text("copy='nic' to GPU ", device->ordinal(), " needs gpu_rdma"));
  }
  progress_->run([&] {
    for (const BouncePool* pool : {&port->landing(), &port->departing()}) {
      memory_->add(pool->memory(), pool->owner());
      if (rdma_) rdma_->registrations().find(pool->memory().data(), pool->memory().size());  // ahead: it takes a while
    }
    if (const NicSlots* nic = port->nic()) {
      for (const NicSlots::Side* side : {&nic->landing, &nic->departing}) {
        const auto memory = side->slots.memory()->memory();
        memory_->add(memory, side->slots.owner());
        nic->domain->registrations().add(memory, side->registration);
      }
    }
    ports_[cache.device()] = std::move(port);
  });
}

void NodeState::prepare(const PagedKv& from, const PagedKv& to) {
  prepare(from);
  prepare(to);
  if (from.on_host() || to.on_host() || from.device() == to.device()) return;
  const std::lock_guard lock(preparing_);
  if (closed()) throw Error(kClosing);
  bool known = false;
  progress_->run([&] { known = port(to)->from_other(from.device()) != nullptr; });
  if (known) return;
  const auto device = CudaDevice::open(to.device()), other = CudaDevice::open(from.device());
  if (!device->reach(*other)) {
    fallbacks_.count("gpu_copy_staged",
                     text("GPU ", device->ordinal(), " does not see the memory of GPU ", other->ordinal()));
  }
  auto copier = std::make_unique<CudaCopier>(progress_, device, HostSide::kNone, options_.gpu.copy, counter(), other);
  progress_->run([&] { port(to)->add_from_other(from.device(), std::move(copier)); });
}

void NodeState::check_verifiable(const PagedKv& cache, const CudaDevice& device) {
  for (std::uint32_t layer = 0; layer < cache.layers(); ++layer) {
    std::array<Extent, PagedKv::kMaxPlanes> planes;
    const std::size_t count = cache.extents(layer, 0, planes);
    if (device.can_sum(checksum_runs(std::span<const Extent>(planes).first(count)))) continue;
    const std::string why = device.missing(GpuCopy::kKernel);
    return fallbacks_.count("gpu_not_verified",
                            why.empty() ? text("layer ", layer, " is not of planes of whole 64 bytes") : why);
  }
}

// In parts, so that no part is refused for its size; none ends within a slot, as no copy may cross from one to the
// next.
void NodeState::pin_staging(const std::shared_ptr<CudaDevice>& device) {
  const auto memory = pool_.memory();
  const std::uint64_t part = std::max(kPinBytes / pool_.slot_bytes(), std::uint64_t{1}) * pool_.slot_bytes();
  try {
    for (std::uint64_t at = 0; at < memory.size(); at += part) {
      pins_.emplace_back(device, memory.subspan(at, std::min<std::uint64_t>(part, memory.size() - at)));
    }
  } catch (const Error& error) {
    fallbacks_.count("staging_not_pinned", error.status().message);
  }
}

std::unique_ptr<GpuStaging> NodeState::make_gds(const std::shared_ptr<CudaDevice>& device) {
  if (options_.gpu.gds_bytes == 0) return nullptr;
  std::unique_ptr<GpuStaging> gds;
  try {
    gds = std::make_unique<GpuStaging>(device, geometry_, options_.gpu.gds_bytes);
  } catch (const Error& error) {
    if (error.code() == Code::kInvalidArgument) throw;
    fallbacks_.count("no_gds", error.status().message);
    return nullptr;
  }
  if (gds->compatibility()) {
    fallbacks_.count("gds_compatibility", "nvidia-fs is not loaded: cuFile goes by the host's memory");
  }
  return gds;
}

std::unique_ptr<NicSlots> NodeState::make_nic_slots(const std::shared_ptr<CudaDevice>& device) {
  const std::uint64_t bytes = options_.gpu.rdma_bytes;
  if (bytes == 0) return nullptr;
  std::shared_ptr<RdmaDomain> domain;
  Status status;
  progress_->run([&] {
    try {
      domain = rdma();
    } catch (const Error& error) {
      status = error.status();
    }
  });
  try {
    if (!domain) throw Error(status);
    if (const std::string why = device->missing_for_nics(); !why.empty()) {
      throw Error(Code::kUnsupported, text("gpu_rdma: GPU ", device->ordinal(), ": ", why));
    }
    const auto side = [&] {
      GpuSlots slots(device, geometry_, GpuSlots::Holds::kLayerBlock, bytes / 2, "half of gpu_rdma");
      auto registration = std::make_shared<RdmaRegistration>(domain->rails(), slots.memory(), domain->options());
      return NicSlots::Side{std::move(slots), std::move(registration)};
    };
    return std::make_unique<NicSlots>(domain, side(), side());
  } catch (const Error& error) {
    if (error.code() == Code::kInvalidArgument) throw;
    fallbacks_.count("no_gpu_rdma", error.status().message);
    return nullptr;
  }
}

void NodeState::know(const std::shared_ptr<const PagedKv>& cache) {
  if (!rdma_ || !cache->on_host()) return;
  for (const Extent& run : cache->memory()) memory_->add({run.data, run.bytes}, cache);
}

void NodeState::unshare(std::uint32_t id) {
  regions_->remove(id);
  for (const auto& [scheme, transport] : transports_) transport->on_regions_changed();
}

// --- peers

std::string NodeState::connect(const std::string& text, double timeout_s) {
  const auto dial_to = std::make_shared<Dial>();
  dial_to->address = resolve(text, /*for_listening=*/false);
  if (!dial_to->address.this_host && options_.secret.empty()) {
    throw Error(
        Code::kInvalidArgument,
        dualkv::text("node: '", text, "' is on another host, and no secret is set; give secret or secret_file"));
  }
  struct Answer {
    Milestones milestones{1};
    std::string peer;
  };
  const auto answer = std::make_shared<Answer>();
  const bool posted = progress_->post([self = shared_from_this(), dial_to, answer] {
    self->dial(dial_to, [self, dial_to, answer](Status status, std::string peer) {
      if (!status.ok()) return answer->milestones.fail(std::move(status));
      dial_to->peer = peer;
      if (!self->closing_) self->dials_.push_back(dial_to);
      answer->peer = std::move(peer);
      answer->milestones.reach(0);
    });
  });
  if (!posted) throw Error(kClosing);
  const Status status = answer->milestones.wait(0, Clock::now() + seconds(timeout_s));
  if (status.code == Code::kTimeout)
    throw Error(Code::kTimeout,
                dualkv::text("node: no connection to '", text, "' after ", timeout_s, " s: ", status.message));
  if (!status.ok()) throw Error(status);
  return answer->peer;
}

void NodeState::dial(const std::shared_ptr<Dial>& dial, Transport::Connected done) {
  if (closing_) return done(kClosing, "");
  try {
    transport(dial->address.scheme).connect(dial->address, done);
  } catch (const Error& error) {
    done(error.status(), "");
  }
}

// Tries again and again, with growing pauses: a peer that failed once is not lost for ever.
void NodeState::redial(const std::shared_ptr<Dial>& lost) {
  if (closing_ || lost->running) return;
  lost->running = true;
  lost->pause_s = std::clamp(lost->pause_s * 2, kFirstRedialPause, options_.reconnect_max_s);
  progress_->at(Clock::now() + seconds(lost->pause_s), [this, lost] {
    if (closing_) return;
    dial(lost, [this, lost](const Status& status, const std::string&) {
      lost->running = false;
      if (!status.ok()) return redial(lost);
      lost->pause_s = 0;
    });
  });
}

bool NodeState::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

bool NodeState::knows(const std::string& peer) const {
  const std::lock_guard lock(mutex_);
  return peers_.contains(peer);
}

bool NodeState::connected(const std::string& peer) const {
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(peer);
  return found != peers_.end() && found->second.connected;
}

std::shared_ptr<Link> NodeState::find_link(const std::string& peer) const {
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return nullptr;
  for (auto link = found->second.links.rbegin(); link != found->second.links.rend(); ++link) {
    if ((*link)->open()) return *link;
  }
  return nullptr;
}

void NodeState::on_open(const std::shared_ptr<Link>& link) {
  bool full = false;
  {
    const std::lock_guard lock(mutex_);
    const auto open = std::count_if(peers_.begin(), peers_.end(), [](const auto& p) { return p.second.connected; });
    full = open >= static_cast<std::ptrdiff_t>(options_.max_peers) && !peers_[link->peer()].connected;
    Peer& peer = peers_[link->peer()];
    peer.links.push_back(link);
    peer.connected = true;
    if (peer.view.name.empty()) {
      peer.view.name = link->peer();
      peer.view.block_bytes = geometry_.block_bytes();
      peer.view.tokens_per_block = geometry_.tokens_per_block();
    }
  }
  if (full)
    return link->close({Code::kNoSpace, 0, text("more than ", options_.max_peers, " peers; raise `max_peers`")});
  send(*link, ViewMessage{view()});
}

void NodeState::on_closed(Link& link, const Status& why) {
  std::shared_ptr<Link> keep;
  bool connected = false;
  {
    const std::lock_guard lock(mutex_);
    Peer& peer = peers_[link.peer()];
    peer.last_stats = link.stats();
    std::erase_if(peer.links, [&](const auto& mine) {
      if (mine.get() != &link) return false;
      keep = mine;
      return true;
    });
    connected = peer.connected = std::any_of(peer.links.begin(), peer.links.end(), [](auto& l) { return l->open(); });
  }
  for_each_task([&](NodeTask& task) { task.on_link_closed(link, why); });
  sends_.on_closed(link);
  if (connected) return;
  for (const auto& dial : dials_) {
    if (dial->peer == link.peer()) redial(dial);
  }
}

void NodeState::on_write_done(Link& link, std::uint64_t id, Outcome outcome) {
  sends_.on_write_done(link, id, outcome);
}

void NodeState::on_refused() {
  const std::lock_guard lock(mutex_);
  ++counters_.connections_refused;
}

void NodeState::on_hostile() {
  const std::lock_guard lock(mutex_);
  ++counters_.frames_hostile;
}

void NodeState::on_fallback(const std::string& what) { fallbacks_.note(what); }

template <typename Visit>
void NodeState::for_each_task(Visit visit) {
  const auto tasks = tasks_;
  for (const auto& weak : tasks) {
    if (const auto task = weak.lock()) visit(*task);
  }
}

// --- views and health

NodeView NodeState::view() const {
  const StoreStats store = store_->stats();
  const StagingStats staging = pool_.stats();
  NodeView view;
  view.name = options_.name;
  view.block_bytes = geometry_.block_bytes();
  view.tokens_per_block = geometry_.tokens_per_block();
  view.read_queue_bytes = store.read_queue_bytes;
  view.read_bandwidth = store.read_bandwidth;
  view.free_slots = staging.free_slots;
  view.prompt_slots = staging.prompt_limit;
  view.reads_done = store.blocks_read;
  return view;
}

NodeView NodeState::view_of(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(name);
  if (found == peers_.end() || !found->second.connected) {
    throw Error(Code::kPeerLost, text("node '", name, "' is not connected"));
  }
  NodeView view = found->second.view;
  // Its report is a little old; what this node asked for since then is known here.
  view.read_queue_bytes = std::max<std::uint64_t>(view.read_queue_bytes, found->second.asked_bytes);
  return view;
}

void NodeState::add_asked(const std::string& peer, std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  peers_[peer].asked_bytes += bytes;
}

void NodeState::add_task(const std::shared_ptr<NodeTask>& task) {
  tasks_.push_back(task);
  if (!std::exchange(resting_, false)) return;
  progress_->cancel(tick_);
  tick_ = progress_->at(Clock::now() + kTick, [this] { tick(); });
}

void NodeState::tick() {
  std::erase_if(tasks_, [](const auto& weak) { return weak.expired(); });
  resting_ = tasks_.empty() && storage().reads().counters().queue_bytes == 0;
  report_view();
  check_silence();
  check_pulse(view());
  // Last, so that the next view is due when it comes.
  const auto pause = resting_ ? std::max<Clock::duration>(kTick, seconds(options_.heartbeat_s)) : kTick;
  tick_ = progress_->at(Clock::now() + pause, [this] { tick(); });
}

void NodeState::report_view() {
  NodeView mine = view();
  const bool changed = mine.read_queue_bytes != reported_.read_queue_bytes || mine.free_slots != reported_.free_slots ||
                       mine.reads_done != reported_.reads_done;
  const auto now = Clock::now();
  if (!changed && now - reported_at_ < seconds(options_.heartbeat_s)) return;
  reported_ = mine;
  reported_at_ = now;
  std::vector<std::shared_ptr<Link>> links;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, peer] : peers_) links.insert(links.end(), peer.links.begin(), peer.links.end());
  }
  for (const auto& link : links) {
    mine.link_bandwidth = sends_.bandwidth(*link);
    mine.lane_bytes[0] = link->lane_bytes(Lane::kLow);
    mine.lane_bytes[1] = link->lane_bytes(Lane::kHigh);
    send(*link, ViewMessage{mine});
  }
}

void NodeState::check_silence() {
  const auto oldest = Clock::now() - seconds(options_.peer_silence_s);
  std::vector<std::shared_ptr<Link>> silent;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, peer] : peers_) {
      for (const auto& link : peer.links) {
        if (link->open() && link->last_received() < oldest) silent.push_back(link);
      }
    }
  }
  for (const auto& link : silent) {
    link->close({Code::kPeerLost, 0, text("nothing was heard from it for ", options_.peer_silence_s, " s")});
  }
}

void NodeState::check_pulse(const NodeView& view) {
  if (!pulses_[view.name].stalled(view, Clock::now(), seconds(options_.heartbeat_s), seconds(options_.stall_s))) return;
  for_each_task([&](NodeTask& task) { task.on_stalled(view.name); });
}

NodeStats NodeState::stats() const {
  NodeStats stats;
  {
    const std::lock_guard lock(mutex_);
    stats = counters_;
  }
  stats.store = store_->stats();
  stats.staging = pool_.stats();
  stats.fallbacks = fallbacks_.counts();
  for (const auto& [what, count] : stats.store.fallbacks) stats.fallbacks[what] += count;
  progress_->run([&] {
    if (copier_) stats.copies = copier_->stats();
    for (const auto& [device, port] : ports_) stats.gpus.push_back(port->stats());
    stats.loads_active = static_cast<std::uint32_t>(loads_.size());
    stats.loads_served = static_cast<std::uint32_t>(serves_.size());
    const std::lock_guard lock(mutex_);
    for (const auto& [name, peer] : peers_) {
      for (const auto& link : peer.links) stats.links.push_back(link->stats());
      if (peer.links.empty()) stats.links.push_back(peer.last_stats);
    }
  });
  return stats;
}

// --- loads

void NodeState::remove_load(std::uint64_t id, bool failed, std::uint32_t failovers) {
  loads_.erase(id);
  const std::lock_guard lock(mutex_);
  ++(failed ? counters_.loads_failed : counters_.loads_done);
  counters_.failovers += failovers;
}

std::shared_ptr<IncomingTask> NodeState::incoming(std::uint64_t load, Clock::time_point deadline) {
  auto& task = incomings_[load];
  if (!task) {
    task = std::make_shared<IncomingTask>(*this, load);
    add_task(task);
  }
  task->set_deadline(deadline);
  return task;
}

void NodeState::on_message(Link& link, std::span<const std::byte> bytes) {
  if (closing_) return;
  const auto message = decode_message(bytes);
  if (!message) {
    on_hostile();
    return link.close({Code::kRefused, 0, "the peer sent a malformed message"});
  }
  std::visit([&](const auto& m) { handle(link, m); }, *message);
}

void NodeState::handle(Link& link, const ViewMessage& message) {
  NodeView view = message.view;
  view.name = link.peer();
  {
    const std::lock_guard lock(mutex_);
    peers_[link.peer()].view = view;
  }
  check_pulse(view);
}

void NodeState::handle(Link& link, const OpenLoad& message) {
  const auto key = std::pair(link.peer(), message.load);
  const auto waiting = incomings_.find(message.load);
  const bool taken = serves_.contains(key) || (waiting != incomings_.end() && waiting->second->attached());
  const bool valid = message.layers_per_read >= 1 && message.layers_per_read <= geometry_.layers() &&
                     message.credit_layers <= geometry_.layers() && message.time_left_us <= 86'400'000'000 &&
                     message.prompt_blocks <= kMaxPromptBlocks;
  if (taken || !valid || serves_.size() >= options_.max_loads) {
    const Code code = taken || !valid ? Code::kInvalidArgument : Code::kNoSpace;
    return send(link, CloseLoad{message.load, code,
                                taken   ? "this load is known already"
                                : valid ? "too many loads are served here; raise `max_loads`"
                                        : "malformed load"});
  }
  const auto shared = [&]() -> std::shared_ptr<Link> {
    const std::lock_guard lock(mutex_);
    for (const auto& mine : peers_[link.peer()].links) {
      if (mine.get() == &link) return mine;
    }
    return nullptr;
  }();
  if (!shared) return;
  const auto task = ServeTask::begin(*this, shared, message);
  if (!task->ended()) serves_[key] = task;
}

void NodeState::handle(Link& link, const LoadOpened& message) {
  if (const auto load = loads_.find(message.load); load != loads_.end()) {
    const auto task = load->second;
    task->on_opened(link, message);
  }
}

void NodeState::handle(Link& link, const ReadBlocks& message) {
  const auto serve = serves_.find({link.peer(), message.load});
  if (serve == serves_.end()) return;
  const auto task = serve->second;
  task->read(message);
}

void NodeState::handle(Link& link, const Credit& message) {
  const auto serve = serves_.find({link.peer(), message.load});
  if (serve == serves_.end()) return;
  const auto task = serve->second;
  task->credit(message.layers);
}

void NodeState::handle(Link& link, const BlocksFailed& message) {
  if (const auto load = loads_.find(message.load); load != loads_.end()) {
    const auto task = load->second;
    task->on_blocks_failed(link, message);
  }
}

void NodeState::handle(Link& link, const ReadReport& message) {
  if (const auto load = loads_.find(message.load); load != loads_.end()) load->second->on_read_report(link, message);
}

void NodeState::handle(Link& link, const CloseLoad& message) {
  if (const auto load = loads_.find(message.load); load != loads_.end()) {
    const auto task = load->second;
    return task->on_peer_closed(link, message);
  }
  const auto serve = serves_.find({link.peer(), message.load});
  if (serve == serves_.end()) return;
  const auto task = serve->second;
  task->on_peer_closed(message);
}

}  // namespace dualkv
