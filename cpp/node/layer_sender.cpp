// Splitting what is queued into frames, and giving every sender its turn.
#include "node/layer_sender.h"

#include <algorithm>

#include "base/hash.h"
#include "storage/store_state.h"

namespace dualkv {

void SendQueue::enqueue(LayerSender& sender) {
  if (std::exchange(sender.in_turn_, true)) return;
  turns_[&sender.link()][static_cast<int>(sender.lane())].push_back(&sender);
}

void SendQueue::remove(LayerSender& sender) {
  if (const auto turns = turns_.find(&sender.link()); turns != turns_.end()) {
    std::erase(turns->second[static_cast<int>(sender.lane())], &sender);
  }
  std::erase_if(in_flight_, [&](const auto& item) { return item.second.sender == &sender; });
}

void SendQueue::send_one(LayerSender& sender, Link& link) {
  LayerWrite write = sender.next(++last_write_);
  InFlight flight{&link, &sender, write.layer, {}};
  for (const WriteBlock& block : write.blocks) flight.blocks.push_back(block.block);
  in_flight_.emplace(write.id, std::move(flight));
  link.write(std::move(write));
}

bool SendQueue::pump_lane(Link& link, Turns& turns) {
  while (!turns.empty()) {
    LayerSender& sender = *turns.front();
    if (!link.can_write(sender.lane(), sender.next_bytes())) return false;
    send_one(sender, link);
    turns.pop_front();
    sender.in_turn_ = sender.has_queued();
    if (sender.in_turn_) turns.push_back(&sender);
  }
  return true;
}

void SendQueue::pump(Link& link) {
  auto& lanes = turns_[&link];
  const bool high_idle = pump_lane(link, lanes[static_cast<int>(Lane::kHigh)]);
  const bool low_idle = pump_lane(link, lanes[static_cast<int>(Lane::kLow)]);
  if (high_idle && low_idle) return meters_[&link].idle();
  meters_[&link].busy(Clock::now());
}

void SendQueue::on_write_done(Link& link, std::uint64_t id, Outcome outcome) {
  auto node = in_flight_.extract(id);
  if (!node.empty()) {
    InFlight& flight = node.mapped();
    meters_[&link].add(flight.blocks.size() * geometry_.layer_bytes(flight.layer), Clock::now());
    const BlockSender::Sent sent = flight.sender->sent_;
    sent(flight.layer, flight.blocks, outcome);
  }
  pump(link);
}

void SendQueue::on_write_returned(Link& link, std::uint64_t id) {
  const auto found = in_flight_.find(id);
  if (found == in_flight_.end()) return;
  const InFlight flight = found->second;
  flight.sender->source_.on_returned(id, flight.layer, flight.blocks);
  pump(link);
}

void SendQueue::pump_later(const std::shared_ptr<Link>& link) {
  progress_.post([this, alive = std::weak_ptr(alive_), link] {
    if (!alive.expired() && link->open()) pump(*link);
  });
}

void SendQueue::on_closed(Link& link) {
  turns_.erase(&link);
  meters_.erase(&link);
  std::erase_if(in_flight_, [&](const auto& item) { return item.second.link == &link; });
}

std::uint64_t SendQueue::bandwidth(const Link& link) const {
  const auto found = meters_.find(&link);
  return found == meters_.end() ? 0 : found->second.estimate().bytes_per_s(Clock::now());
}

LayerSender::LayerSender(SendQueue& queue, std::shared_ptr<Link> link, std::uint64_t grant, Lane lane,
                         BlockSource& source, Sent sent, std::uint32_t most_blocks)
    : queue_(queue),
      link_(std::move(link)),
      owner_(next_owner()),
      grant_(grant),
      lane_(lane),
      source_(source),
      sent_(std::move(sent)),
      most_blocks_(most_blocks) {}

LayerSender::~LayerSender() {
  queue_.remove(*this);
  link_->withdraw(owner_);
  queue_.pump_later(link_);
}

void LayerSender::add(std::uint32_t layer, std::uint32_t first, std::uint32_t count, std::shared_ptr<void> keep,
                      bool nic_only) {
  if (count == 0) return;
  queued_[layer].push_back({first, first + count, std::move(keep), nic_only});
  queue_.enqueue(*this);
}

std::uint32_t LayerSender::frame_blocks() const {
  const std::uint64_t layer_bytes = queue_.geometry().layer_bytes(queued_.begin()->first);
  return static_cast<std::uint32_t>(std::clamp<std::uint64_t>(queue_.frame_bytes() / layer_bytes, 1, most_blocks_));
}

std::uint64_t LayerSender::next_bytes() const {
  const auto& [layer, runs] = *queued_.begin();
  const std::uint32_t most = frame_blocks();
  std::uint32_t blocks = 0;
  for (auto run = runs.begin(); run != runs.end() && blocks < most; ++run) blocks += run->end - run->next;
  return std::min(blocks, most) * queue_.geometry().layer_bytes(layer);
}

LayerWrite LayerSender::next(std::uint64_t id) {
  const auto first = queued_.begin();
  const std::uint32_t most = frame_blocks();
  std::deque<Run>& runs = first->second;
  LayerWrite write{id, owner_, grant_, first->first, lane_, {}, runs.front().nic_only};
  while (!runs.empty() && write.blocks.size() < most && runs.front().nic_only == write.nic_only) {
    Run& run = runs.front();
    describe(run.next, run.keep, write);
    if (++run.next == run.end) runs.pop_front();
  }
  if (runs.empty()) queued_.erase(first);
  return write;
}

void LayerSender::describe(std::uint32_t index, const std::shared_ptr<void>& keep, LayerWrite& write) {
  WriteBlock& block = write.blocks.emplace_back();
  if (source_.describe(write.layer, index, keep, block)) return;
  block.checksum = checksum(std::span<const Extent>(block.source).first(block.extents));
}

void LayerSender::write_again(std::uint64_t id, std::uint32_t layer, std::span<const std::uint32_t> indices) {
  LayerWrite write{id, owner_, grant_, layer, lane_, {}};
  for (const std::uint32_t index : indices) describe(index, nullptr, write);
  link_->write_again(std::move(write));
}

}  // namespace dualkv
