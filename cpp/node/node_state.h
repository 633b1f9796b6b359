// NodeState: what stands behind a Node - links, views, and the tasks in progress. Wires the layers below together.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/fallbacks.h"
#include "base/progress.h"
#include "dualkv/node.h"
#include "memory/pinned.h"
#include "node/device_port.h"
#include "node/layer_sender.h"
#include "node/messages.h"
#include "node/pulse.h"
#include "rdma/nic_copier.h"
#include "storage/store_state.h"
#include "transport/grants.h"
#include "transport/transport.h"

namespace dualkv {

Clock::duration seconds(double value);
// Time until `when`, for messages; 0 if it has passed.
std::uint64_t microseconds_until(Clock::time_point when);

// Work that must hear of links that end and of nodes whose storage stands still. Progress thread only.
class NodeTask {
 public:
  virtual ~NodeTask() = default;
  virtual void on_link_closed(Link& link, const Status& why) = 0;
  virtual void on_stalled(const std::string& /*node*/) {}
  // The node is closing: fail, and touch nothing any more.
  virtual void abort(const Status& why) = 0;
};

class LoadTask;
class ServeTask;
class IncomingTask;

// The progress thread owns everything below `core`; `views_` and counters are shared under a mutex.
class NodeState : public LinkEvents, public std::enable_shared_from_this<NodeState> {
 public:
  NodeState(const KvGeometry& geometry, NodeOptions options);
  ~NodeState() override;
  void start();  // once, after construction: listens and begins to report
  void close();

  const std::string& name() const { return options_.name; }
  const KvGeometry& geometry() const { return geometry_; }
  const NodeOptions& options() const { return options_; }
  Progress& progress() { return *progress_; }
  Store& store() { return *store_; }
  StoreState& storage() { return store_->state(); }
  StagingPool& pool() { return pool_; }
  GrantTable& grants() { return grants_; }
  // Lets peers on this host map the memory behind a memfd.
  std::uint32_t share(std::span<const std::byte> memory, int fd);
  void unshare(std::uint32_t id);
  // Transfers will touch it: a NIC may be told of it, for as long as it lives. Progress thread.
  void know(const std::shared_ptr<const PagedKv>& cache);
  SendQueue& sends() { return sends_; }
  // Null: the CPU copies, or a GPU. The same from start() to the end.
  NicCopier* copier() { return copier_.get(); }
  // Before transfers of this cache: see Node::prepare. Any thread but the progress thread.
  void prepare(const PagedKv& cache);
  // Of both, and for copies from one to the other.
  void prepare(const PagedKv& from, const PagedKv& to);
  // Of a cache that was prepared; null for host memory. Progress thread.
  DevicePort* port(const PagedKv& cache) { return cache.on_host() ? nullptr : ports_.at(cache.device()).get(); }
  // No task may begin any more. Progress thread.
  bool closing() const { return closing_; }
  const std::shared_ptr<Progress>& shared_progress() const { return progress_; }
  // Counts fallbacks.
  std::function<void(const std::string&)> counter() {
    return [this](const std::string& what) { on_fallback(what); };
  }
  const std::vector<std::string>& addresses() const { return addresses_; }

  // Any thread.
  std::string connect(const std::string& address, double timeout_s);
  bool closed() const;
  bool knows(const std::string& peer) const;
  bool connected(const std::string& peer) const;
  NodeView view() const;
  NodeView view_of(const std::string& peer) const;
  NodeStats stats() const;

  // Progress thread.
  std::shared_ptr<Link> find_link(const std::string& peer) const;
  void send(Link& link, const Message& message) { link.send(encode_message(message)); }
  void add_task(const std::shared_ptr<NodeTask>& task);
  void add_load(std::uint64_t id, const std::shared_ptr<LoadTask>& task) { loads_[id] = task; }
  bool has_load(std::uint64_t id) const { return loads_.contains(id); }
  void remove_load(std::uint64_t id, bool failed, std::uint32_t failovers);
  std::uint32_t active_loads() const { return static_cast<std::uint32_t>(loads_.size()); }
  std::shared_ptr<IncomingTask> incoming(std::uint64_t load, Clock::time_point deadline);
  void remove_incoming(std::uint64_t load) { incomings_.erase(load); }
  void remove_serve(const std::string& peer, std::uint64_t load) { serves_.erase({peer, load}); }
  // Bytes this node asked `peer` to read and has not got: its queue, seen from here, before its next report.
  void add_asked(const std::string& peer, std::int64_t bytes);

  void on_open(const std::shared_ptr<Link>& link) override;
  void on_closed(Link& link, const Status& why) override;
  void on_message(Link& link, std::span<const std::byte> message) override;
  void on_write_done(Link& link, std::uint64_t id, Outcome outcome) override;
  void on_write_returned(Link& link, std::uint64_t id) override { sends_.on_write_returned(link, id); }
  void on_refused() override;
  void on_hostile() override;
  void on_fallback(const std::string& what) override;

 private:
  struct Peer {
    std::vector<std::shared_ptr<Link>> links;  // progress thread; the newest open one is used
    NodeView view;
    bool connected = false;
    std::int64_t asked_bytes = 0;
    LinkStats last_stats;
  };
  // An address this node connected to, and keeps connected.
  struct Dial {
    Address address;
    std::string peer;
    double pause_s = 0;
    bool running = false;
  };

  Transport& transport(Scheme scheme);
  // Counts the fallback, or throws, if not every Layer Block there can be summed up on the GPU.
  void check_verifiable(const PagedKv& cache, const CudaDevice& device);
  void pin_staging(const std::shared_ptr<CudaDevice>& device);
  std::unique_ptr<GpuStaging> make_gds(const std::shared_ptr<CudaDevice>& device);
  // Null, and counted, where NICs can't reach the device's memory.
  std::unique_ptr<NicSlots> make_nic_slots(const std::shared_ptr<CudaDevice>& device);
  const std::shared_ptr<RdmaDomain>& rdma();
  void dial(const std::shared_ptr<Dial>& dial, Transport::Connected done);
  void redial(const std::shared_ptr<Dial>& dial);
  void tick();
  void report_view();
  void check_silence();
  void check_pulse(const NodeView& view);
  template <typename Visit>
  void for_each_task(Visit visit);

  void handle(Link& link, const ViewMessage& message);
  void handle(Link& link, const OpenLoad& message);
  void handle(Link& link, const LoadOpened& message);
  void handle(Link& link, const ReadBlocks& message);
  void handle(Link& link, const Credit& message);
  void handle(Link& link, const BlocksFailed& message);
  void handle(Link& link, const CloseLoad& message);
  void handle(Link& link, const ReadReport& message);

  const KvGeometry geometry_;
  const NodeOptions options_;
  const std::shared_ptr<SharedRegions> regions_ = std::make_shared<SharedRegions>();
  const std::shared_ptr<KnownMemory> memory_ = std::make_shared<KnownMemory>();
  TransportOptions transport_options_;
  std::shared_ptr<Progress> progress_;
  Fallbacks fallbacks_;
  StagingPool pool_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // owns the pool's memory, to those who ask
  std::unique_ptr<Store> store_;
  GrantTable grants_;
  SendQueue sends_;
  std::shared_ptr<RdmaDomain> rdma_;  // once something needs it
  std::unique_ptr<NicCopier> copier_;
  std::mutex preparing_;          // guards pins_ and the making of ports; never taken on the progress thread
  std::deque<PinnedRange> pins_;  // of the staging, once a cache is in a GPU's memory
  bool pinned_ = false;
  std::map<int, std::unique_ptr<DevicePort>> ports_;  // by device
  std::map<Scheme, std::unique_ptr<Transport>> transports_;
  std::vector<std::string> addresses_;
  std::vector<std::shared_ptr<Dial>> dials_;
  std::vector<std::weak_ptr<NodeTask>> tasks_;
  std::unordered_map<std::uint64_t, std::shared_ptr<LoadTask>> loads_;
  std::map<std::pair<std::string, std::uint64_t>, std::shared_ptr<ServeTask>> serves_;
  std::unordered_map<std::uint64_t, std::shared_ptr<IncomingTask>> incomings_;
  std::map<std::string, Pulse> pulses_;
  Progress::TimerId tick_ = 0;
  bool resting_ = false;  // nothing is going on: ticks come with the heartbeat only
  Clock::time_point reported_at_{};
  NodeView reported_;
  bool closing_ = false;

  mutable std::mutex mutex_;  // guards what follows
  std::map<std::string, Peer> peers_;
  NodeStats counters_;
  bool closed_ = false;
};

}  // namespace dualkv
