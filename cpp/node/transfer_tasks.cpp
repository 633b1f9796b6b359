// Grants, sends and copies without a load around them.
#include "node/transfer_tasks.h"

#include "base/text.h"
#include "memory/copier.h"
#include "storage/store_state.h"

namespace dualkv {

namespace {

constexpr std::uint64_t kCopyStepBytes = std::uint64_t{4} << 20;     // then others get their turn
constexpr std::uint64_t kCopyWindowBytes = std::uint64_t{16} << 20;  // under way in the NIC

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
  task->port_ = node.port(*task->into_);
  if (task->port_ != nullptr) task->landing_.emplace(*task->port_, task->owner_);
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
  if (port_ != nullptr) port_->withdraw(owner_);
  landing_.reset();  // nobody writes there any more
  milestones_->fail(why);
}

GrantSink::Target GrantTask::target(std::uint32_t layer, std::uint32_t block, Writer writer, std::span<Extent> out) {
  if (ended_ || block >= block_ids_.size() || arrived_[at(layer, block)]) return {};
  if (!landing_) return {into_->extents(layer, block_ids_[block], out)};
  bool full = false;
  const Target target = landing_->target(at(layer, block), node_.geometry().layer_bytes(layer), writer, out, full);
  if (full) {
    node_.progress().post([weak = weak_from_this()] {
      if (const auto self = weak.lock()) {
        self->end(
            {Code::kNoSpace, 0, "grant: no pinned memory is left for what peers send to a GPU; raise `gpu_bounce`"});
      }
    });
  }
  return target;
}

void GrantTask::arrived(const std::string&, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
                        Check check) {
  const auto keep = shared_from_this();
  if (ended_) return;
  if (check == Check::kWrong) return arrived_wrong(layer, block);
  if (!landing_) return deliver(layer, block);
  landing_->land(
      at(layer, block), node_.geometry().layer_bytes(layer), checksum,
      [weak = weak_from_this(), layer, block, checksum](const FreePieces::Piece& piece, bool on_gpu) {
        if (const auto self = weak.lock()) self->copy_in(piece, on_gpu, layer, block, checksum);
      },
      [weak = weak_from_this(), layer, block](const Status& why) {
        const auto self = weak.lock();
        if (!self) return;
        if (why.code == Code::kCorrupt) return self->arrived_wrong(layer, block);
        self->end(why);
      });
}

void GrantTask::copy_in(const FreePieces::Piece& piece, bool on_gpu, std::uint32_t layer, std::uint32_t block,
                        std::uint64_t checksum) {
  std::array<Extent, PagedKv::kMaxPlanes> target;
  const std::size_t count = into_->extents(layer, block_ids_[block], target);
  port_->copy_in({piece.get(), node_.geometry().layer_bytes(layer)}, on_gpu, std::span(target).first(count), owner_,
                 piece, checksum, [weak = weak_from_this(), layer, block](const Status& status) {
                   const auto self = weak.lock();
                   if (!self || self->ended_) return;
                   if (!status.ok()) return self->end(status);
                   self->deliver(layer, block);
                 });
}

void GrantTask::arrived_wrong(std::uint32_t layer, std::uint32_t block) {
  end({Code::kCorrupt, 0, text("grant: layer ", layer, " of block ", block, " arrived with a wrong checksum")});
}

void GrantTask::deliver(std::uint32_t layer, std::uint32_t block) {
  arrived_[at(layer, block)] = true;
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
  task->sender_ = make_sender(
      node, *task->request_.source, link, task->request_.grant, task->request_.lane, *task,
      [raw = task.get()](std::uint32_t, const std::vector<std::uint32_t>& blocks, Outcome outcome) {
        raw->on_sent(blocks.size(), outcome);
      },
      [raw = task.get()](const Status& status) { raw->end(status); });
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

bool SendTask::describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>&, WriteBlock& out) {
  out.block = request_.first_block + index;
  out.extents = static_cast<std::uint32_t>(request_.source->extents(layer, request_.block_ids[index], out.source));
  if (request_.checksums.empty()) return false;
  out.checksum = request_.checksums[(layer - request_.layers.first) * request_.block_ids.size() + index];
  return true;
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

CopyTask::CopyTask(NodeState& node, CopyRequest request)
    : node_(node),
      request_(std::move(request)),
      owner_(next_owner()),
      copier_(choose_copier()),
      left_(std::uint64_t{request_.layers.count} * request_.from_ids.size()) {}

Copier* CopyTask::choose_copier() const {
  const PagedKv &from = *request_.from, &to = *request_.to;
  if (!from.on_host() && !to.on_host()) {
    return from.device() == to.device() ? &node_.port(to)->within() : node_.port(to)->from_other(from.device());
  }
  if (!to.on_host()) return &node_.port(to)->in();
  if (!from.on_host()) return &node_.port(from)->out();
  return node_.copier();
}

std::shared_ptr<CopyTask> CopyTask::begin(NodeState& node, CopyRequest request) {
  const std::uint32_t layers = node.geometry().layers();
  check_ids(*request.from, request.from_ids, layers, "copy");
  check_ids(*request.to, request.to_ids, layers, "copy");
  if (request.from_ids.size() != request.to_ids.size()) {
    throw Error(Code::kInvalidArgument,
                text("copy: ", request.from_ids.size(), " blocks to ", request.to_ids.size(), " places"));
  }
  const LayerRange range = request.layers;
  if (range.count == 0 || std::uint64_t{range.first} + range.count > layers) {
    throw Error(Code::kInvalidArgument, text("copy: layers ", range.first, " + ", range.count, " of ", layers));
  }
  node.know(request.from);
  node.know(request.to);
  std::shared_ptr<CopyTask> task(new CopyTask(node, std::move(request)));
  node.add_task(task);
  task->step_later();
  return task;
}

void CopyTask::step_later() {
  if (std::exchange(stepping_, true)) return;
  node_.progress().post([weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->stepping_ = false;
    if (!self->ended_) self->step();
  });
}

void CopyTask::step() {
  const std::uint64_t blocks = request_.from_ids.size();
  std::uint64_t budget = kCopyStepBytes;
  while (next_ < blocks * request_.layers.count && budget > 0 && under_way_ < kCopyWindowBytes) {
    const auto layer = static_cast<std::uint32_t>(request_.layers.first + next_ / blocks);
    const std::uint64_t block = next_++ % blocks;
    std::array<Extent, PagedKv::kMaxPlanes> from, to;
    const auto source = std::span(from).first(request_.from->extents(layer, request_.from_ids[block], from));
    const auto target = std::span(to).first(request_.to->extents(layer, request_.to_ids[block], to));
    const std::uint64_t bytes = node_.geometry().layer_bytes(layer);
    budget -= std::min(budget, bytes);
    under_way_ += bytes;
    if (copier_ == nullptr) {
      copy(source, target);
      copied(bytes);
      continue;
    }
    copier_->copy(source, target, owner_, nullptr, [weak = weak_from_this(), bytes](const Status& status) {
      const auto self = weak.lock();
      if (self && !status.ok()) return self->end(status);
      if (self) self->copied(bytes);
    });
  }
  if (next_ < blocks * request_.layers.count && under_way_ < kCopyWindowBytes) step_later();
}

void CopyTask::copied(std::uint64_t bytes) {
  if (ended_) return;
  under_way_ -= bytes;
  if (--left_ == 0) return end({});
  if (copier_ != nullptr) step_later();
}

void CopyTask::end(const Status& why) {
  if (std::exchange(ended_, true)) return;
  const auto keep = shared_from_this();
  if (copier_ != nullptr) copier_->withdraw(owner_);
  if (why.ok()) {
    operation_.milestones()->reach(0);
  } else {
    operation_.milestones()->fail(why);
  }
}

}  // namespace dualkv
