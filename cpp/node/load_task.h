// LoadTask: the prefill node's side of one load (docs/architecture.md, "Life of a load").
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "dualkv/node.h"
#include "node/block_reads.h"
#include "node/layer_gates.h"
#include "node/layer_sender.h"
#include "node/node_state.h"
#include "transport/grants.h"

namespace dualkv {

// Lives on the progress thread; users see milestones() and result(), which lock for themselves.
class LoadTask : public NodeTask, public BlockSource, public std::enable_shared_from_this<LoadTask> {
 public:
  // Throws Error, with nothing reserved, if the request can't be served. Progress thread.
  static std::shared_ptr<LoadTask> begin(NodeState& node, LoadRequest request);
  ~LoadTask() override;

  std::uint64_t id() const { return id_; }
  const std::shared_ptr<Milestones>& milestones() const { return milestones_; }
  std::shared_ptr<NodeState> node() const { return node_.shared_from_this(); }
  std::uint32_t layers() const { return layers_; }
  bool publishes() const { return !request_.plan.decode.empty(); }
  LoadResult result() const;
  std::int64_t failed_block() const;

  void add_blocks(std::span<const std::uint32_t> more);
  // Blocks of the prompt without a place. Any thread.
  std::uint32_t blocks_missing() const { return blocks_missing_; }
  // Of the layer that the engine published then.
  void publish(std::uint32_t layer, Clock::time_point when);
  // Any thread. See Load.
  void wait_on_stream(std::uint32_t layer, void* stream) const;
  void publish_on_stream(std::uint32_t layer, void* stream);
  void open_gates(const std::shared_ptr<GateState>& gates, void* stream);
  // A stream has come to the publish of this layer.
  void stream_reached(std::uint32_t layer, Clock::time_point when);
  // Graphs that are replayed from now on wait for this load.
  void attach(const std::shared_ptr<GateState>& gates);
  void release(std::uint32_t layer);
  void fail(Status status);
  // Any thread: somebody waited for the layer. Only the first wait of a layer counts.
  void note_wait(std::uint32_t layer, Clock::time_point begin, Clock::time_point end);

  void on_opened(Link& link, const LoadOpened& message);
  void on_blocks_failed(Link& link, const BlocksFailed& message);
  void on_peer_closed(Link& link, const CloseLoad& message);
  void on_read_report(Link& link, const ReadReport& message);
  // Of what is published: Layer Blocks of this engine's cache.
  bool describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>& keep, WriteBlock& out) override;
  void on_link_closed(Link& link, const Status& why) override;
  void on_stalled(const std::string& node) override;
  void abort(const Status& why) override { fail(why); }

 private:
  // A node that reads for this load. Also the sink of what it writes here.
  struct Source : GrantSink {
    LoadTask* load = nullptr;
    std::size_t index = 0;
    std::string name;
    Path path = Path::kPrefill;
    std::shared_ptr<Link> link;  // null: this node
    std::uint64_t grant = 0;
    bool lost = false;
    std::uint64_t asked_bytes = 0;  // see NodeState::add_asked
    PathResult result;

    Target target(std::uint32_t layer, std::uint32_t block, Writer writer, std::span<Extent> out) override;
    void arrived(const std::string& peer, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
                 Check check) override;
    void arrived_wrong(std::uint32_t layer, std::uint32_t block);
  };
  struct Block {
    std::uint16_t source = 0;
    std::uint32_t tried = 0;  // bit a source
    std::uint32_t layers_left = 0;
    bool corrupt_in_storage = false;  // a side's storage read found it so, not a transfer
  };

  LoadTask(NodeState& node, LoadRequest request);
  void check_request() const;
  void check_places(std::vector<std::uint32_t> ids) const;
  void add_source(const std::string& name, Path path, bool required);
  void open_sources();
  void open_source(Source& source, const std::vector<std::uint32_t>& blocks);
  void read_here(std::uint32_t block);
  void ask(Source& source, const std::vector<std::uint32_t>& blocks);
  void on_read(std::uint32_t block, LayerRange layers, ReadResult result);
  // A Layer Block that storage has put into a slot of the GPU's memory.
  void check_in_gpu(const FreePieces::Piece& slot, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum);
  void read_again(std::uint32_t block, std::uint32_t layer);
  // What is right goes to its place in the cache, from the host or, `on_gpu`, from its GPU's memory; then delivered,
  // whoever has the block by then.
  void copy_in(Source& from, std::byte* bytes, bool on_gpu, const std::shared_ptr<void>& keep, std::uint32_t layer,
               std::uint32_t block, std::uint64_t checksum);
  bool all_found(std::uint32_t block) const;
  // What copies from the staging to the cache; null: the CPU.
  Copier* copier() const;
  void land(Source& source, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum);
  void raise_flag(std::uint32_t layer);
  void deliver(Source& source, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum);
  void layer_ready(std::uint32_t layer);
  // The source can't deliver these: another takes over, or the load fails with the reason.
  void take_over(std::size_t source, const std::vector<std::uint32_t>& blocks, const Status& why);
  void source_lost(std::size_t source, const Status& why);
  bool wanted(std::size_t source, std::uint32_t layer, std::uint32_t block) const;
  std::size_t slot_of(std::uint32_t layer, std::uint32_t block) const { return std::size_t{layer} * hit_ + block; }
  void publish_now(std::uint32_t layer);
  void on_published(const std::vector<std::uint32_t>& blocks, std::uint32_t layer, Outcome outcome);
  void handover_failed(Status why);
  void maybe_finish();
  void end(bool failed, const Status& why);
  double since_start_s(Clock::time_point when) const;
  double now_s() const { return since_start_s(Clock::now()); }

  NodeState& node_;
  const LoadRequest request_;
  const std::uint64_t id_;
  const std::uint64_t owner_ = next_owner();  // of copies by the NIC
  std::vector<std::uint32_t> block_ids_;
  const std::uint32_t prompt_blocks_;
  std::atomic<std::uint32_t> blocks_missing_;
  const std::uint32_t layers_;
  const std::uint32_t hit_;
  const Clock::time_point started_;
  const Clock::time_point deadline_;
  const std::shared_ptr<Milestones> milestones_;
  Progress::TimerId timer_ = 0;
  std::vector<std::unique_ptr<Source>> sources_;  // 0 is this node
  std::vector<Block> blocks_;
  std::vector<bool> found_;                // [layer][block]: right, and delivered or on the way to its place
  std::vector<bool> from_decode_;          // delivered by the decode node, which so has it
  std::vector<std::uint64_t> checksums_;   // of delivered Layer Blocks
  std::vector<std::uint32_t> layer_left_;  // blocks not yet in place
  std::uint32_t layers_ready_ = 0;
  std::uint32_t credit_ = 0;
  std::uint32_t released_ = 0;
  std::uint32_t per_read_ = 0;
  std::unique_ptr<BlockReads> reads_;
  std::size_t decode_source_ = 0;  // 0: none
  std::uint64_t decode_grant_ = 0;
  std::unique_ptr<BlockSender> publisher_;
  DevicePort* port_ = nullptr;                     // of a cache in a GPU's memory; progress thread
  std::shared_ptr<CudaDevice> device_;             // with it; any thread
  std::optional<Landing> landing_;                 // with it
  BouncePool::Piece flags_;                        // a word a layer, that GPUs wait for
  std::uint32_t flag_ = 0;                         // what it is when the layer is in place
  std::vector<std::shared_ptr<GateState>> gates_;  // of graphs that are replayed for this load
  std::vector<std::uint32_t> publish_queue_;       // layers published before the decode node was ready
  std::vector<bool> published_;
  std::uint32_t layers_published_ = 0;
  std::uint64_t publish_pending_ = 0;                 // Layer Blocks not acknowledged
  std::vector<std::uint32_t> layer_publish_pending_;  // of each layer
  Status handover_failure_;
  bool ended_ = false;
  mutable std::mutex mutex_;  // guards what follows
  LoadResult result_;
  std::int64_t failed_block_ = -1;
};

}  // namespace dualkv
