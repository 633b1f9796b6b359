// Grants and sends without a load around them.
#include "node/transfer_tasks.h"

#include "base/hash.h"
#include "base/text.h"

namespace dualkv {

namespace {

void check_ids(const PagedKv& cache, const std::vector<std::uint32_t>& ids, std::uint32_t layers, const char* call) {
  if (cache.layers() != layers)
    throw Error(Code::kInvalidArgument, text(call, ": the cache has another number of layers"));
  if (ids.empty()) throw Error(Code::kInvalidArgument, text(call, ": no block ids"));
  for (std::uint32_t id : ids) {
    if (id >= cache.block_count()) {
      throw Error(Code::kInvalidArgument, text(call, ": block id ", id, " of ", cache.block_count(), " blocks"));
    }
  }
}

}  // namespace

GrantTask::GrantTask(NodeState& node, std::string peer, std::shared_ptr<const PagedKv> into,
                     std::vector<std::uint32_t> block_ids)
    : node_(node),
      peer_(std::move(peer)),
      into_(std::move(into)),
      block_ids_(std::move(block_ids)),
      milestones_(std::make_shared<Milestones>(node.geometry().layers())),
      arrived_(node.geometry().layers() * block_ids_.size()),
      layer_left_(node.geometry().layers(), static_cast<std::uint32_t>(block_ids_.size())),
      layers_left_(node.geometry().layers()) {}

std::shared_ptr<GrantTask> GrantTask::begin(NodeState& node, const std::string& peer,
                                            std::shared_ptr<const PagedKv> into, std::vector<std::uint32_t> block_ids,
                                            double deadline_s) {
  check_ids(*into, block_ids, node.geometry().layers(), "grant");
  if (!node.find_link(peer)) throw Error(Code::kPeerLost, text("grant: node '", peer, "' is not connected"));
  std::shared_ptr<GrantTask> task(new GrantTask(node, peer, std::move(into), std::move(block_ids)));
  node.know(task->into_);
  task->id_ = node.grants().add(*task, peer);
  node.add_task(task);
  task->timer_ = node.progress().at(Clock::now() + seconds(deadline_s), [weak = std::weak_ptr(task)] {
    if (const auto self = weak.lock()) self->end({Code::kTimeout, 0, "grant: not everything arrived by its deadline"});
  });
  return task;
}

void GrantTask::end(const Status& why) {
  if (std::exchange(ended_, true)) return;
  node_.progress().cancel(timer_);
  node_.grants().remove(id_);
  milestones_->fail(why);
}

std::size_t GrantTask::target(std::uint32_t layer, std::uint32_t block, std::span<Extent> out) {
  if (ended_ || block >= block_ids_.size() || arrived_[layer * block_ids_.size() + block]) return 0;
  return into_->extents(layer, block_ids_[block], out);
}

void GrantTask::arrived(const std::string&, std::uint32_t layer, std::uint32_t block, std::uint64_t, bool right) {
  const auto keep = shared_from_this();
  if (!right)
    return end(
        {Code::kCorrupt, 0, text("grant: layer ", layer, " of block ", block, " arrived with a wrong checksum")});
  arrived_[layer * block_ids_.size() + block] = true;
  if (--layer_left_[layer] > 0) return;
  milestones_->reach(layer);
  if (--layers_left_ == 0) end({});
}

void GrantTask::on_link_closed(Link& link, const Status& why) {
  if (link.peer() == peer_ && !node_.find_link(peer_))
    end({Code::kPeerLost, why.os_errno, text("node '", peer_, "': ", why.message)});
}

SendTask::SendTask(NodeState& node, SendRequest request)
    : node_(node), request_(std::move(request)), left_(request_.block_ids.size() * request_.layers.count) {}

std::shared_ptr<SendTask> SendTask::begin(NodeState& node, const std::string& peer, SendRequest request) {
  const std::uint32_t layers = node.geometry().layers();
  check_ids(*request.source, request.block_ids, layers, "send_layers");
  const LayerRange range = request.layers;
  if (range.count == 0 || std::uint64_t{range.first} + range.count > layers) {
    throw Error(Code::kInvalidArgument, text("send_layers: layers ", range.first, " + ", range.count, " of ", layers));
  }
  const std::size_t total = std::size_t{range.count} * request.block_ids.size();
  if (!request.checksums.empty() && request.checksums.size() != total) {
    throw Error(Code::kInvalidArgument,
                text("send_layers: ", request.checksums.size(), " checksums for ", total, " Layer Blocks"));
  }
  const auto link = node.find_link(peer);
  if (!link) throw Error(Code::kPeerLost, text("send_layers: node '", peer, "' is not connected"));
  node.know(request.source);
  std::shared_ptr<SendTask> task(new SendTask(node, std::move(request)));
  task->sender_ =
      std::make_unique<LayerSender>(node.sends(), link, task->request_.grant, task->request_.lane, *task,
                                    [raw = task.get()](std::uint32_t, const std::vector<std::uint32_t>& blocks,
                                                       Outcome outcome) { raw->on_sent(blocks.size(), outcome); });
  node.add_task(task);
  task->timer_ = node.progress().at(Clock::now() + seconds(task->request_.deadline_s), [weak = std::weak_ptr(task)] {
    if (const auto self = weak.lock()) self->end({Code::kTimeout, 0, "send_layers: not complete by its deadline"});
  });
  const auto blocks = static_cast<std::uint32_t>(task->request_.block_ids.size());
  for (std::uint32_t i = 0; i < range.count; ++i) task->sender_->add(range.first + i, 0, blocks);
  // Checksums and sockets come after the caller is back at work.
  node.progress().post([weak = std::weak_ptr(task)] {
    const auto self = weak.lock();
    if (self && self->sender_) self->sender_->pump();
  });
  return task;
}

void SendTask::describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>&, WriteBlock& out) {
  out.block = request_.first_block + index;
  out.extents = static_cast<std::uint32_t>(request_.source->extents(layer, request_.block_ids[index], out.source));
  const std::size_t at = (layer - request_.layers.first) * request_.block_ids.size() + index;
  out.checksum = request_.checksums.empty() ? checksum(std::span<const Extent>(out.source).first(out.extents))
                                            : request_.checksums[at];
}

void SendTask::on_sent(std::size_t blocks, Outcome outcome) {
  left_ -= blocks;
  if (!outcome.ok()) return end({outcome.code, 0, "send_layers: the peer refused a write; is the grant still valid?"});
  if (left_ == 0) end({});
}

void SendTask::on_link_closed(Link& link, const Status& why) {
  if (sender_ && &sender_->link() == &link)
    end({Code::kPeerLost, why.os_errno, text("node '", link.peer(), "': ", why.message)});
}

void SendTask::end(const Status& why) {
  if (std::exchange(ended_, true)) return;
  const auto keep = shared_from_this();
  node_.progress().cancel(timer_);
  sender_.reset();
  if (why.ok()) {
    operation_.milestones()->reach(0);
  } else {
    operation_.milestones()->fail(why);
  }
}

}  // namespace dualkv
