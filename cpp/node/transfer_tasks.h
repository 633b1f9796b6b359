// GrantTask, SendTask and CopyTask: layer-wise transfers on their own, for engines that orchestrate by themselves.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "dualkv/node.h"
#include "node/layer_sender.h"
#include "node/node_state.h"
#include "transport/grants.h"

namespace dualkv {

// The receiving side. Progress thread; milestones() lock for themselves.
class GrantTask : public NodeTask, public GrantSink, public std::enable_shared_from_this<GrantTask> {
 public:
  // Throws Error. Progress thread.
  static std::shared_ptr<GrantTask> begin(NodeState& node, const std::string& peer, std::shared_ptr<const PagedKv> into,
                                          std::vector<std::uint32_t> block_ids, double deadline_s);

  std::uint64_t id() const { return id_; }
  const std::shared_ptr<Milestones>& milestones() const { return milestones_; }
  std::shared_ptr<NodeState> node() const { return node_.shared_from_this(); }
  void end(const Status& why);

  Target target(std::uint32_t layer, std::uint32_t block, Writer writer, std::span<Extent> out) override;
  void arrived(const std::string& peer, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
               Check check) override;
  void on_link_closed(Link& link, const Status& why) override;
  void abort(const Status& why) override { end(why); }

 private:
  GrantTask(NodeState& node, std::string peer, std::shared_ptr<const PagedKv> into,
            std::vector<std::uint32_t> block_ids);
  std::size_t at(std::uint32_t layer, std::uint32_t block) const { return layer * block_ids_.size() + block; }
  void arrived_wrong(std::uint32_t layer, std::uint32_t block);
  void copy_in(const FreePieces::Piece& piece, bool on_gpu, std::uint32_t layer, std::uint32_t block,
               std::uint64_t checksum);
  void deliver(std::uint32_t layer, std::uint32_t block);

  NodeState& node_;
  const std::string peer_;
  const std::shared_ptr<const PagedKv> into_;
  const std::vector<std::uint32_t> block_ids_;
  const std::shared_ptr<Milestones> milestones_;
  std::uint64_t id_ = 0;
  const std::uint64_t owner_ = next_owner();  // of copies to a GPU
  DevicePort* port_ = nullptr;                // of a cache in a GPU's memory
  std::optional<Landing> landing_;            // with it
  std::vector<bool> arrived_;                 // [layer][block]
  std::vector<std::uint32_t> layer_left_;
  std::uint32_t layers_left_;
  Progress::TimerId timer_ = 0;
  bool ended_ = false;
};

// The sending side.
class SendTask : public NodeTask, public BlockSource, public std::enable_shared_from_this<SendTask> {
 public:
  // Throws Error. Progress thread.
  static std::shared_ptr<SendTask> begin(NodeState& node, const std::string& peer, SendRequest request);

  const Operation& operation() const { return operation_; }
  std::shared_ptr<NodeState> node() const { return node_.shared_from_this(); }
  void end(const Status& why);
  void on_link_closed(Link& link, const Status& why) override;
  void abort(const Status& why) override { end(why); }
  bool describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>& keep, WriteBlock& out) override;

 private:
  SendTask(NodeState& node, SendRequest request);
  void on_sent(std::size_t blocks, Outcome outcome);

  NodeState& node_;
  const SendRequest request_;
  Operation operation_;
  std::unique_ptr<BlockSender> sender_;
  std::uint64_t left_ = 0;
  Progress::TimerId timer_ = 0;
  bool ended_ = false;
};

// Copies within the node, a part at a time, so that the progress thread serves others in between.
class CopyTask : public NodeTask, public std::enable_shared_from_this<CopyTask> {
 public:
  // Throws Error. Progress thread.
  static std::shared_ptr<CopyTask> begin(NodeState& node, CopyRequest request);

  const Operation& operation() const { return operation_; }
  std::shared_ptr<NodeState> node() const { return node_.shared_from_this(); }
  void end(const Status& why);
  void on_link_closed(Link&, const Status&) override {}
  void abort(const Status& why) override { end(why); }

 private:
  CopyTask(NodeState& node, CopyRequest request);
  // Null: the CPU.
  Copier* choose_copier() const;
  void step_later();
  void step();
  void copied(std::uint64_t bytes);

  NodeState& node_;
  const CopyRequest request_;
  const std::uint64_t owner_;
  Copier* const copier_;
  Operation operation_;
  std::uint64_t next_ = 0;       // Layer Blocks begun
  std::uint64_t left_;           // not copied
  std::uint64_t under_way_ = 0;  // bytes
  bool stepping_ = false;
  bool ended_ = false;
};

}  // namespace dualkv
