// ServeTask: taking part in a peer's load, as its decode node or as a helper. IncomingTask: the prompt it receives.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "dualkv/node.h"
#include "node/block_reads.h"
#include "node/layer_sender.h"
#include "node/node_state.h"
#include "transport/grants.h"

namespace dualkv {

class ServeTask;

// A prompt in staging. Created by whoever comes first: the engine that waits for it, or the peer that opens it.
class IncomingTask : public NodeTask, public std::enable_shared_from_this<IncomingTask> {
 public:
  IncomingTask(NodeState& node, std::uint64_t load) : node_(node), load_(load) {}

  std::uint64_t load() const { return load_; }
  const std::shared_ptr<Milestones>& milestones() const { return milestones_; }
  std::shared_ptr<NodeState> node() const { return node_.shared_from_this(); }
  // Any thread. Empty until complete. The slots stay valid as long as the copies live.
  std::vector<Slot> slots() const;

  // Progress thread from here.
  void set_deadline(Clock::time_point when);
  // False if somebody has it already.
  bool claim() { return !std::exchange(claimed_, true); }
  bool attached() const { return attached_; }
  void attach(const std::shared_ptr<ServeTask>& serve);
  // The whole prompt is in `slots`.
  void complete(std::vector<Slot> slots);
  void fail(const Status& why);
  // The prefill node cancelled: of use only to an engine that has it already.
  void abandoned(const Status& why) {
    if (!complete_ || !claimed_) fail(why);
  }
  // The engine is done with it.
  void close();
  void on_link_closed(Link&, const Status&) override {}
  void abort(const Status& why) override { fail(why); }

 private:
  void release();

  NodeState& node_;
  const std::uint64_t load_;
  const std::shared_ptr<Milestones> milestones_ = std::make_shared<Milestones>(1);
  std::weak_ptr<ServeTask> serve_;
  bool attached_ = false;
  bool claimed_ = false;
  bool complete_ = false;
  Progress::TimerId timer_ = 0;
  mutable std::mutex mutex_;  // guards slots_
  std::vector<Slot> slots_;
};

// Progress thread only.
class ServeTask : public NodeTask,
                  public GrantSink,
                  public BlockSource,
                  public std::enable_shared_from_this<ServeTask> {
 public:
  static std::shared_ptr<ServeTask> begin(NodeState& node, std::shared_ptr<Link> link, const OpenLoad& open);
  ~ServeTask() override;

  void read(const ReadBlocks& message);
  void credit(std::uint32_t layers);
  bool ended() const { return ended_; }
  // The prefill node is done, or has given up.
  void on_peer_closed(const CloseLoad& message);
  // The engine here is done before the prompt was complete.
  void cancel();
  void on_link_closed(Link& link, const Status& why) override;
  void abort(const Status& why) override { end(why, /*tell=*/false); }

  Target target(std::uint32_t layer, std::uint32_t block, Writer writer, std::span<Extent> out) override;
  void arrived(const std::string& peer, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
               Check check) override;
  // Of what is sent: `keep` is the slot the Layer Block lies in.
  bool describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>& keep, WriteBlock& out) override;

 private:
  ServeTask(NodeState& node, std::shared_ptr<Link> link, const OpenLoad& open);
  void reserve_prompt();
  void on_reserved(std::vector<Slot> slots);
  void start_read(const BlockToRead& block);
  void on_read(std::uint32_t block, LayerRange layers, ReadResult result);
  void note_checksums(std::uint32_t block, LayerRange layers, const Slot& slot);
  void on_own_read(std::uint32_t block, LayerRange layers, const Slot& slot);
  void copy_within(const Slot& source, std::uint32_t block, std::uint64_t offset, std::uint64_t bytes);
  bool take_fresh_slot(std::uint32_t block);
  void send_layers(std::uint32_t block, LayerRange layers, const Slot& slot);
  void mark(std::uint32_t layer, std::uint32_t block);
  std::size_t at(std::uint32_t layer, std::uint32_t block) const {
    return std::size_t{layer} * open_.prompt_blocks + block;
  }
  void end(const Status& why, bool tell);

  NodeState& node_;
  const std::shared_ptr<Link> link_;
  const OpenLoad open_;
  const std::uint32_t layers_;
  std::uint32_t credit_;
  std::unique_ptr<BlockReads> reads_;
  std::unique_ptr<LayerSender> sender_;
  Progress::TimerId timer_ = 0;
  bool ended_ = false;
  bool reserved_ = false;
  const Clock::time_point opened_ = Clock::now();
  std::vector<bool> asked_;  // blocks this side was asked to read: once each
  // Decode only.
  std::shared_ptr<IncomingTask> incoming_;
  std::uint64_t grant_ = 0;
  std::uint64_t ticket_ = 0;
  std::vector<Slot> slots_;             // of the prompt
  std::vector<BlockToRead> waiting_;    // for the prompt's staging
  std::vector<std::uint32_t> reading_;  // own reads of the block not finished: the kernel may write to its slot
  std::vector<bool> own_;               // [layer][block]: read here
  // [layer][block]: of what was read here. Not looked up when a block's turn to be sent comes: the engine may be saving
  // it by then, which rewrites the trailer.
  std::vector<std::uint64_t> checksums_;
  std::vector<bool> arrived_;  // [layer][block]
  std::uint64_t left_ = 0;     // Layer Blocks not here
};

}  // namespace dualkv
