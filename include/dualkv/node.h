// A Node: one engine's store, staging, links to peers and the loads that run over them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dualkv/geometry.h"
#include "dualkv/gpu.h"
#include "dualkv/lane.h"
#include "dualkv/operation.h"
#include "dualkv/paged_kv.h"
#include "dualkv/policy.h"
#include "dualkv/rdma.h"
#include "dualkv/staging.h"
#include "dualkv/store.h"

namespace dualkv {

class LoopbackHub;
// Joins nodes of one process that listen on loopback:// addresses.
std::shared_ptr<LoopbackHub> make_loopback_hub();

struct LaneOptions {
  int dscp = 0;           // IP header, 0 to 63; of RDMA over Ethernet too
  int so_priority = 0;    // queueing discipline class of this host
  int service_level = 0;  // of RDMA queue pairs, 0 to 15: picks the virtual lane on InfiniBand
};

// What copies Layer Blocks within a node.
enum class CopyEngine : std::uint8_t {
  kCpu,  // the progress thread
  // The NIC, by a write to itself on the LOW lane, so that copies delay the model's traffic no more than KV does. To
  // and from a GPU's memory by slots there: with GpuOptions::rdma_bytes.
  kNic,
};

struct CopyStats {
  CopyEngine engine = CopyEngine::kCpu;
  std::string rail;  // of kNic: "mlx5_0:1"
  std::uint64_t bytes_by_nic = 0;
  std::uint64_t bytes_by_cpu = 0;
  std::uint64_t doorbells = 0;
};

struct NodeOptions {
  std::string name;  // unique among peers, 1 to 128 bytes
  StoreOptions store;
  StagingOptions staging;
  std::vector<std::string>
      listen;          // "tcp://host:port" (0 = any), "rdma://host:port", "shm:///path.sock", "loopback://name"
  std::string secret;  // shared by all peers; required to listen on or connect to another host
  std::uint32_t connections_per_lane = 2;  // tcp; rdma: and queue pairs
  RdmaOptions rdma;
  CopyEngine copy = CopyEngine::kCpu;  // staging to cache, and copy(); kNic needs an RDMA device
  GpuOptions gpu;
  LaneOptions lanes[kLaneCount] = {{8, 1, 2}, {46, 6, 0}};     // LOW: CS1; HIGH: EF
  std::uint64_t write_frame_bytes = std::uint64_t{1} << 20;    // most bytes one write frame carries
  std::uint64_t write_window_bytes = std::uint64_t{16} << 20;  // unacknowledged bytes per link and lane
  double heartbeat_s = 0.1;                                    // a view is sent at least this often
  double peer_silence_s = 2.0;                                 // a link that received nothing for this long is lost
  double handshake_s = 2.0;         // a connection that has not proved itself by then is closed
  double reconnect_max_s = 2.0;     // longest pause between attempts to reach a lost peer
  std::uint32_t spin_us = 50;       // the progress thread looks this long for more work before it sleeps; 0 = never
  double stall_s = 2.0;             // a node with reads waiting that finished none for this long has failed
  std::uint32_t max_loads = 16384;  // loads in progress, and loads served for peers
  std::uint32_t max_peers = 1024;
  std::shared_ptr<LoopbackHub> loopback;
};

// When a side's storage read a group of layers of its blocks. Seconds since the load began; of another node, since it
// heard of the load, which is a message's way later.
struct ReadTimes {
  LayerRange layers;
  double begin_s = 0;   // the first block of the group was asked for
  double end_s = 0;     // the last one was read and verified
  double verify_s = 0;  // of that, spent on checksums
  std::uint64_t bytes = 0;
};

// How much went which way, and when (seconds since the load began).
struct PathResult {
  std::string node;
  Path path = Path::kPrefill;
  std::uint32_t blocks = 0;  // delivered by this side, also those taken over from another
  std::uint64_t bytes = 0;
  double first_s = 0;
  double last_s = 0;
  std::vector<double> layer_first_s;  // when this side's first and last byte of each layer arrived; 0 = nothing came
  std::vector<double> layer_done_s;
  std::vector<ReadTimes> reads;  // known when the load has ended; of other nodes, if they got to report them
};

struct LoadResult {
  std::string reason;    // the plan's
  double started_s = 0;  // when the load began, on CLOCK_MONOTONIC
  std::vector<PathResult> paths;
  std::vector<double> layer_ready_s;
  std::vector<double> layer_wait_begin_s;  // first wait(layer), and its end; 0 = nobody waited
  std::vector<double> layer_wait_end_s;
  std::vector<double> layer_published_s;     // when publish(layer) was called; 0 = never
  std::vector<double> layer_publish_done_s;  // when the decode node had verified the layer; 0 = never
  std::uint64_t bytes_published = 0;
  std::uint32_t failovers = 0;  // blocks that a second side had to read
  double seconds = 0;
};

struct LoadRequest {
  Plan plan;
  // Where the prompt's blocks go: block_ids[i] receives block i. The first plan.keys.size() are loaded, the rest
  // is room for what prefill computes. The memory is borrowed until the load has ended, or cancel() has returned.
  std::shared_ptr<const PagedKv> into;
  std::vector<std::uint32_t> block_ids;
  double deadline_s = 30;
  std::uint32_t window_layers = 0;  // layers the cache can hold at once; 0 = all. release(layer) returns credit
  // Layers that storage reads at once; 0 = whole blocks, or half a window. Fewer: the first layers are ready after
  // their share of the bytes, at the price of more and smaller reads.
  std::uint32_t layers_per_read = 0;
  // Blocks of the prompt, where not all have a place yet: engines that prefill in chunks allocate as they go, and bring
  // the rest with add_blocks(). 0 = block_ids.size().
  std::uint32_t prompt_blocks = 0;
  // What the decode node passes to incoming(), if whoever routes the request has told both sides; 0 = a random one.
  std::uint64_t load_id = 0;
};

class LoadTask;
class GateState;

// For CUDA graphs, which are captured once and replayed for one load after the other: a gate a layer, of fixed
// addresses, in the place of Load::wait_on_stream() and publish(). Must outlive the graphs. A handle; thread-safe.
class LayerGates {
 public:
  explicit LayerGates(std::shared_ptr<GateState> state) : state_(std::move(state)) {}

  std::uint32_t layers() const;
  // Puts on `stream`, which may be being captured: a wait until the load that has the gates (Load::open_gates) has the
  // layer in place, or has failed. Gates that no load has been given are open. Throws Error: kInvalidArgument, kIo.
  void wait(std::uint32_t layer, void* stream) const;
  // Puts on `stream`: Load::publish(layer) of that load. Throws as wait().
  void publish(std::uint32_t layer, void* stream) const;

 private:
  friend class Load;
  std::shared_ptr<GateState> state_;
};

// A load in progress. A handle; dropping the last one cancels the load. Thread-safe.
class Load {
 public:
  explicit Load(std::shared_ptr<LoadTask> task) : task_(std::move(task)) {}

  std::uint64_t id() const;  // what the decode node passes to incoming()
  std::uint32_t layers() const;
  // Milestones 0..layers-1: the layer is in place. Milestone `layers`: finished.
  const std::shared_ptr<Milestones>& milestones() const;
  // Blocks until every byte of `layer` is in place. Status as in Milestones::wait. The first wait of a layer is in the
  // result, for timelines.
  Status wait(std::uint32_t layer, Clock::time_point until = Clock::time_point::max()) const;
  // Makes the GPU wait, not the CPU: what is put on `stream` (a CUstream or cudaStream_t of the cache's GPU) from now
  // on begins when the layer is in place, or the load has failed. So whether it failed is to be asked (finish(), or
  // milestones()) before results are used. Returns at once. Throws Error: kInvalidArgument (the cache is in host
  // memory, or the stream is being captured: see LayerGates), the load's own if it has failed, kIo.
  void wait_on_stream(std::uint32_t layer, void* stream) const;
  // For those who wait in another way, through milestones(): the wait that began then has ended now.
  void note_wait(std::uint32_t layer, Clock::time_point begin) const;
  // Where the prompt's next blocks are (LoadRequest::prompt_blocks). All before the first publish(). Throws
  // Error(kInvalidArgument) with none added.
  void add_blocks(std::span<const std::uint32_t> block_ids);
  // The layer's new KV is in the cache: send it, and what the decode node did not read itself, on the LOW lane.
  void publish(std::uint32_t layer);
  // The same, when what is on `stream` by now is done; returns at once. The layer must have been loaded by then, as it
  // is after a wait_on_stream() on it.
  void publish(std::uint32_t layer, void* stream);
  // What is put on `stream` from now on and waits at these gates, waits for this load. Once what is on it by now is
  // done: nothing else may wait at them then. Throws Error: kInvalidArgument (the cache is in host memory, the gates
  // are of another model, the stream is being captured), the load's own if it has failed, kIo. One load may have
  // several gates.
  void open_gates(const LayerGates& gates, void* stream);
  // The engine no longer needs this layer's window slot (window_layers > 0): one more layer of credit.
  void release(std::uint32_t layer);
  // No more bytes will move when this returns; the caller's memory is free.
  void cancel();
  // Blocks until all layers are in place and all published KV has arrived at the decode node.
  Status finish(Clock::time_point until = Clock::time_point::max());
  LoadResult result() const;
  // Index of the block that no side could deliver; -1 if that is not why the load failed.
  std::int64_t failed_block() const;

 private:
  std::shared_ptr<LoadTask> task_;
};

class IncomingTask;

// A prompt arriving in this node's staging, to decode from. Dropping the last handle frees the staging. Thread-safe.
class Incoming {
 public:
  explicit Incoming(std::shared_ptr<IncomingTask> task) : task_(std::move(task)) {}

  std::uint64_t id() const;
  std::uint32_t block_count() const;  // 0 until the prefill node opened the load
  // Milestone 0: the whole prompt is in staging.
  const std::shared_ptr<Milestones>& milestones() const;
  Status wait(Clock::time_point until = Clock::time_point::max()) const;
  // Copies block blocks[i] of the prompt, or block i if `blocks` is left out, to block_ids[i]. Throws
  // Error(kInvalidArgument) before it is ready, or for ids out of range. Blocking; call without locks.
  void copy_to(const PagedKv& target, std::span<const std::uint32_t> block_ids,
               std::optional<std::span<const std::uint32_t>> blocks = {}) const;
  // Saves blocks [first_block, first_block + keys.size()) from staging, without a copy.
  Operation save(std::span<const Key> keys, std::uint32_t first_block, const Key& parent) const;
  // Frees the staging; cancels the hand-over if it was not complete.
  void close();

 private:
  std::shared_ptr<IncomingTask> task_;
};

class GrantTask;

// The right of one peer to write into this node's memory, for a time. Dropping the last handle revokes it: when that
// returns, nothing writes there any more. Thread-safe.
class Grant {
 public:
  explicit Grant(std::shared_ptr<GrantTask> task) : task_(std::move(task)) {}

  std::uint64_t id() const;  // what the sender passes to send_layers
  // Milestone per layer: every block of it arrived and its checksum was right.
  const std::shared_ptr<Milestones>& milestones() const;
  Status wait(std::uint32_t layer, Clock::time_point until = Clock::time_point::max()) const;
  void revoke();

 private:
  std::shared_ptr<GrantTask> task_;
};

// Layer Blocks to send: blocks block_ids[i] of `source`, as block first_block + i of the grant.
struct SendRequest {
  std::uint64_t grant = 0;
  std::shared_ptr<const PagedKv> source;
  std::vector<std::uint32_t> block_ids;
  std::uint32_t first_block = 0;
  LayerRange layers;
  Lane lane = Lane::kLow;
  double deadline_s = 30;
  // checksums[i * block_ids.size() + j] is that of layer layers.first + i of block j, as made when the KV was (see
  // checksums()): the peer verifies what it made. Empty: made when each block is sent.
  std::vector<std::uint64_t> checksums;
};

// Layer Blocks to copy within a node: blocks from_ids[i] of `from` become blocks to_ids[i] of `to`.
struct CopyRequest {
  std::shared_ptr<const PagedKv> from;
  std::vector<std::uint32_t> from_ids;
  std::shared_ptr<const PagedKv> to;
  std::vector<std::uint32_t> to_ids;
  LayerRange layers;
};

class NodeState;

// A connected node. A handle; copies are the same peer. Thread-safe.
class Peer {
 public:
  Peer(std::shared_ptr<NodeState> node, std::string name) : node_(std::move(node)), name_(std::move(name)) {}

  const std::string& name() const { return name_; }
  bool connected() const;
  // The peer's last report. Throws Error(kPeerLost) when it is not connected.
  NodeView view() const;
  // Sends layer by layer, in order; done when the peer has verified the last byte, or has it in slots of its GPU
  // (GpuOptions::rdma_bytes): what that GPU then finds wrong ends the peer's grant, and is no error here. The source is
  // borrowed until the Operation has ended; dropping its last copy withdraws what was not sent.
  Operation send_layers(SendRequest request) const;

 private:
  std::shared_ptr<NodeState> node_;
  std::string name_;
};

struct LinkStats {
  std::string peer;
  std::string transport;
  bool connected = false;
  std::uint64_t bytes_sent[kLaneCount] = {0, 0};
  std::uint64_t bytes_received = 0;
  std::uint64_t writes_rejected = 0;  // outside a grant
  std::uint64_t writes_corrupt = 0;   // found so by the CPU
  RdmaStats rdma;                     // of rdma links
};

struct NodeStats {
  StoreStats store;
  StagingStats staging;
  CopyStats copies;
  std::vector<GpuStats> gpus;  // whose memory this node has been given
  std::vector<LinkStats> links;
  std::uint32_t loads_active = 0;
  std::uint32_t loads_served = 0;  // active, on behalf of peers
  std::uint64_t loads_done = 0;
  std::uint64_t loads_failed = 0;
  std::uint64_t failovers = 0;
  std::uint64_t connections_refused = 0;
  std::uint64_t frames_hostile = 0;
  std::map<std::string, std::uint64_t> fallbacks;
};

// Owns a progress thread that drives all of the node's I/O. Thread-safe. close() (and the destructor) fails what is
// in progress with kCancelled and joins the thread.
class Node {
 public:
  Node(const KvGeometry& geometry, NodeOptions options);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  const std::string& name() const;
  const KvGeometry& geometry() const;
  // Real addresses, with the port the kernel chose.
  std::vector<std::string> addresses() const;
  Store& store();
  StagingPool& staging();

  // Blocks until the peer is connected. Throws Error: kRefused (secret, geometry), kTimeout, kPeerLost.
  // A lost link is re-established in the background as long as the node lives.
  Peer connect(const std::string& address, double timeout_s = 5);
  // A peer by name, whoever connected. Throws Error(kNotFound).
  Peer peer(const std::string& name);
  NodeView view() const;
  // Starts a load; returns at once. Throws Error(kInvalidArgument | kNotFound | kNoSpace) with nothing reserved.
  Load load(LoadRequest request);
  // The hand-over `load_id`, also before the prefill node has opened it. Unclaimed hand-overs end by their deadline.
  Incoming incoming(std::uint64_t load_id, double deadline_s = 30);
  // Lets `peer` write blocks 0..block_ids.size()-1 of every layer into `into`.
  Grant grant(const std::string& peer, std::shared_ptr<const PagedKv> into, std::vector<std::uint32_t> block_ids,
              double deadline_s);
  // Copies layer by layer, by the engine the options chose. Both caches are borrowed until the Operation has ended;
  // dropping its last copy ends it, with any part copied. Blocks must not overlap. Throws Error(kInvalidArgument).
  Operation copy(CopyRequest request);
  // Zeroed memory, locked and in huge pages as the staging options say, that peers on this host read without the
  // kernel's help (shm): a place for the caches of engines on CPUs. Freed with the last copy. At most 63 at a time.
  // Throws Error(kNoSpace).
  std::shared_ptr<std::byte> allocate(std::uint64_t bytes);
  // Makes what copies to and from this cache's GPU need: streams, the staging pinned, the engines timed. Otherwise the
  // first call with such a cache does; pinning takes about 0.1 s a GiB of staging. Nothing for host memory. Throws
  // Error(kUnsupported) where the GPU can't be used, kInvalidArgument if the memory is not of that GPU.
  void prepare(const PagedKv& cache);
  // New gates for graphs on this GPU. Throws Error(kUnsupported) where it can't be used, kIo.
  LayerGates layer_gates(int gpu = 0);
  NodeStats stats() const;
  void close();

 private:
  std::shared_ptr<NodeState> state_;
};

}  // namespace dualkv
