// Serving a peer's load, and the hand-over to the decode engine.
#include "node/serve_task.h"

#include <cstring>

#include "base/text.h"
#include "storage/block_format.h"

namespace dualkv {

std::vector<Slot> IncomingTask::slots() const {
  const std::lock_guard lock(mutex_);
  return slots_;
}

void IncomingTask::set_deadline(Clock::time_point when) {
  node_.progress().cancel(timer_);
  timer_ = node_.progress().at(when, [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    self->timer_ = 0;
    if (self->complete_ && self->claimed_) return;
    self->fail({Code::kTimeout, 0,
                self->complete_
                    ? "hand-over: nobody claimed it by its deadline"
                    : text("hand-over of load ", self->load_, ": the prompt was not complete by the deadline")});
  });
}

void IncomingTask::attach(const std::shared_ptr<ServeTask>& serve) {
  attached_ = true;
  serve_ = serve;
}

void IncomingTask::complete(std::vector<Slot> slots) {
  complete_ = true;
  {
    const std::lock_guard lock(mutex_);
    slots_ = std::move(slots);
  }
  milestones_->reach(0);
}

void IncomingTask::release() {
  node_.progress().cancel(timer_);
  std::vector<Slot> slots;
  {
    const std::lock_guard lock(mutex_);
    slots.swap(slots_);
  }
}

void IncomingTask::fail(const Status& why) {
  const auto keep = shared_from_this();
  node_.remove_incoming(load_);
  milestones_->fail(why);
  // A complete prompt ends with the engine, but the prefill node may still be reading from it.
  const auto serve = serve_.lock();
  if (serve && !complete_) serve->cancel();
  release();
}

void IncomingTask::close() { fail({Code::kCancelled, 0, "the hand-over was closed"}); }

std::shared_ptr<ServeTask> ServeTask::begin(NodeState& node, std::shared_ptr<Link> link, const OpenLoad& open) {
  std::shared_ptr<ServeTask> task(new ServeTask(node, std::move(link), open));
  const std::weak_ptr<ServeTask> weak = task;
  // The decode node holds the whole prompt anyway, so its reads don't wait for credit. They go group by group into one
  // slot, where a later read must not touch a page of what has been verified.
  const KvGeometry& geometry = node.geometry();
  task->reads_ = std::make_unique<BlockReads>(
      node.storage(), open.decode ? page_aligned_group(geometry, open.layers_per_read) : open.layers_per_read,
      open.decode ? task->layers_ : open.credit_layers,
      [weak](std::uint32_t block, LayerRange layers, ReadResult result) {
        if (const auto self = weak.lock()) self->on_read(block, layers, std::move(result));
      });
  task->sender_ = std::make_unique<LayerSender>(
      node.sends(), task->link_, open.grant, Lane::kLow, *task,
      [](std::uint32_t, const std::vector<std::uint32_t>&, Outcome) {});  // refusals come as messages
  task->timer_ = node.progress().at(Clock::now() + std::chrono::microseconds(open.time_left_us), [weak] {
    const auto self = weak.lock();
    if (!self) return;
    self->timer_ = 0;
    self->end({Code::kTimeout, 0, "the load's deadline passed"}, /*tell=*/true);
  });
  node.add_task(task);
  if (open.decode) {
    task->incoming_ = node.incoming(open.load, Clock::now() + std::chrono::microseconds(open.time_left_us));
    task->incoming_->attach(task);
    task->reserve_prompt();
  }
  return task;
}

ServeTask::ServeTask(NodeState& node, std::shared_ptr<Link> link, const OpenLoad& open)
    : node_(node),
      link_(std::move(link)),
      open_(open),
      layers_(node.geometry().layers()),
      credit_(open.credit_layers),
      asked_(open.prompt_blocks) {}

ServeTask::~ServeTask() = default;

void ServeTask::reserve_prompt() {
  const std::uint32_t blocks = open_.prompt_blocks;
  if (blocks == 0) return on_reserved({});
  try {
    ticket_ = node_.pool().acquire(blocks, SlotUse::kPrompt, [weak = weak_from_this(), node = &node_](auto slots) {
      // Runs on whatever thread freed the slots.
      node->progress().post([weak, slots = std::move(slots)]() mutable {
        const auto self = weak.lock();
        if (self && !slots.empty()) self->on_reserved(std::move(slots));
      });
    });
  } catch (const Error& error) {
    end({Code::kNoSpace, 0, error.status().message}, /*tell=*/true);
  }
}

void ServeTask::on_reserved(std::vector<Slot> slots) {
  if (ended_) return;
  slots_ = std::move(slots);
  reserved_ = true;
  reading_.resize(slots_.size());
  own_.resize(layers_ * slots_.size());
  checksums_.resize(own_.size());
  arrived_.resize(layers_ * slots_.size());
  left_ = arrived_.size();
  grant_ = node_.grants().add(*this, link_->peer());
  node_.send(*link_, LoadOpened{open_.load, grant_, Code::kOk, {}});
  for (const BlockToRead& block : std::exchange(waiting_, {})) start_read(block);
  reads_->pump();
  if (left_ == 0) incoming_->complete(slots_);
}

void ServeTask::read(const ReadBlocks& message) {
  if (ended_) return;
  for (const BlockToRead& block : message.blocks) {
    if (block.block >= open_.prompt_blocks || asked_[block.block]) continue;
    asked_[block.block] = true;
    if (open_.decode && !reserved_) {
      waiting_.push_back(block);
    } else {
      start_read(block);
    }
  }
  reads_->pump();
}

void ServeTask::start_read(const BlockToRead& block) {
  if (!open_.decode) return reads_->add(block.block, block.key);
  // What was published of it, and is still under way, is not wanted any more.
  node_.grants().fence(grant_, {&block.block, 1});
  reading_[block.block] = reads_->groups();
  reads_->add(block.block, block.key, slots_[block.block]);
}

void ServeTask::on_read(std::uint32_t block, LayerRange layers, ReadResult result) {
  if (ended_) return;
  if (open_.decode && result.slot == slots_[block]) --reading_[block];
  if (reads_->idle()) node_.send(*link_, ReadReport{open_.load, reads_->times(opened_)});
  if (!result.outcome.ok()) {
    BlocksFailed failed{open_.load, result.outcome.code, result.outcome.os_errno, result.reason, {block}};
    return node_.send(*link_, failed);
  }
  if (open_.decode) note_checksums(block, layers, result.slot);
  const std::uint32_t last = std::min(layers.first + layers.count, credit_);
  if (last > layers.first) send_layers(block, {layers.first, last - layers.first}, result.slot);
  sender_->pump();
  if (open_.decode) on_own_read(block, layers, result.slot);
}

void ServeTask::note_checksums(std::uint32_t block, LayerRange layers, const Slot& slot) {
  const std::span<const std::byte> trailer(slot.get() + node_.geometry().payload_bytes(),
                                           node_.geometry().trailer_bytes());
  for (std::uint32_t layer = layers.first; layer < layers.first + layers.count; ++layer) {
    checksums_[at(layer, block)] = trailer_checksum(trailer, layer);
  }
}

void ServeTask::on_own_read(std::uint32_t block, LayerRange layers, const Slot& slot) {
  node_.grants().fence(grant_, {&block, 1});
  // The slot was replaced while this was being read, for something that the prefill node had published before it asked.
  const bool elsewhere = slot != slots_[block];
  for (std::uint32_t layer = layers.first; layer < layers.first + layers.count; ++layer) {
    if (elsewhere && !arrived_[at(layer, block)]) {
      copy_within(slot, block, node_.geometry().layer_offset(layer), node_.geometry().layer_bytes(layer));
    }
    own_[at(layer, block)] = true;
    mark(layer, block);
  }
}

// To the same place in the block's slot.
void ServeTask::copy_within(const Slot& source, std::uint32_t block, std::uint64_t offset, std::uint64_t bytes) {
  std::memcpy(slots_[block].get() + offset, source.get() + offset, bytes);
}

void ServeTask::send_layers(std::uint32_t block, LayerRange layers, const Slot& slot) {
  for (std::uint32_t layer = layers.first; layer < layers.first + layers.count; ++layer) {
    sender_->add(layer, block, 1, slot);
  }
}

bool ServeTask::describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>& keep, WriteBlock& out) {
  const KvGeometry& geometry = node_.geometry();
  auto* slot = static_cast<std::byte*>(keep.get());
  out.block = block;
  out.checksum = open_.decode ? checksums_[at(layer, block)]
                              : trailer_checksum({slot + geometry.payload_bytes(), geometry.trailer_bytes()}, layer);
  out.source[0] = {slot + geometry.layer_offset(layer), geometry.layer_bytes(layer)};
  out.extents = 1;
  out.keep = keep;
  return true;
}

void ServeTask::credit(std::uint32_t layers) {
  if (ended_ || layers <= credit_ || layers > layers_) return;
  const std::uint32_t before = std::exchange(credit_, layers);
  if (!open_.decode) return reads_->credit(layers);
  for (std::uint32_t layer = before; layer < layers; ++layer) {
    for (std::uint32_t block = 0; block < slots_.size(); ++block) {
      if (own_[at(layer, block)]) sender_->add(layer, block, 1, slots_[block]);
    }
  }
  sender_->pump();
}

GrantSink::Target ServeTask::target(std::uint32_t layer, std::uint32_t block, Writer, std::span<Extent> out) {
  if (ended_ || block >= slots_.size() || arrived_[at(layer, block)]) return {};
  if (reading_[block] > 0 && !take_fresh_slot(block)) return {};
  const KvGeometry& geometry = node_.geometry();
  out[0] = {slots_[block].get() + geometry.layer_offset(layer), geometry.layer_bytes(layer)};
  return {1};
}

// The prefill node gave up on this node's reads of the block, but the kernel may still write to its slot: take another,
// with what has been read already.
bool ServeTask::take_fresh_slot(std::uint32_t block) {
  Slot fresh = node_.pool().try_acquire(SlotUse::kTransit);
  if (!fresh) {
    // The prompt can't be completed here. The writer hears it with this very write; the rest ends after it.
    node_.grants().remove(grant_);
    node_.progress().post([weak = weak_from_this()] {
      if (const auto self = weak.lock())
        self->end({Code::kNoSpace, 0, "no staging is free for a block"}, /*tell=*/true);
    });
    return false;
  }
  node_.grants().fence(grant_, {&block, 1});
  const Slot before = std::exchange(slots_[block], std::move(fresh));
  const KvGeometry& geometry = node_.geometry();
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    if (arrived_[at(layer, block)])
      copy_within(before, block, geometry.layer_offset(layer), geometry.layer_bytes(layer));
  }
  reading_[block] = 0;
  return true;
}

void ServeTask::arrived(const std::string&, std::uint32_t layer, std::uint32_t block, std::uint64_t, Check check) {
  const auto keep = shared_from_this();
  if (check == Check::kRight) mark(layer, block);
}

void ServeTask::mark(std::uint32_t layer, std::uint32_t block) {
  if (arrived_[at(layer, block)]) return;
  arrived_[at(layer, block)] = true;
  if (--left_ == 0) incoming_->complete(slots_);
}

void ServeTask::on_peer_closed(const CloseLoad& message) {
  const Status why{message.code == Code::kOk ? Code::kCancelled : message.code, 0,
                   message.why.empty() ? "the prefill node ended the load" : message.why};
  const auto incoming = incoming_;
  end(why, /*tell=*/false);
  if (incoming && message.code != Code::kOk) incoming->abandoned(why);
}

void ServeTask::cancel() { end({Code::kCancelled, 0, "the decode engine gave the load up"}, /*tell=*/true); }

void ServeTask::on_link_closed(Link& link, const Status& why) {
  if (&link == link_.get())
    end({Code::kPeerLost, why.os_errno, text("prefill node '", link.peer(), "': ", why.message)}, false);
}

void ServeTask::end(const Status& why, bool tell) {
  if (std::exchange(ended_, true)) return;
  const auto keep = shared_from_this();
  node_.progress().cancel(timer_);
  if (ticket_ != 0) node_.pool().withdraw(ticket_);
  if (grant_ != 0) node_.grants().remove(grant_);
  reads_.reset();
  sender_.reset();
  slots_.clear();
  node_.remove_serve(link_->peer(), open_.load);
  if (tell) node_.send(*link_, CloseLoad{open_.load, why.code, why.message});
  // A complete prompt belongs to the decode engine; anything less is of no use.
  if (incoming_ && !incoming_->milestones()->reached(0)) incoming_->fail(why);
}

}  // namespace dualkv
