// Splitting what is queued into frames, and giving every sender its turn.
#include "node/layer_sender.h"

#include <algorithm>

#include "storage/store_state.h"

namespace dualkv {

void SendQueue::enqueue(LayerSender& sender) {
  auto& turns = turns_[&sender.link()];
  if (std::find(turns.begin(), turns.end(), &sender) == turns.end()) turns.push_back(&sender);
}

void SendQueue::remove(LayerSender& sender) {
  if (const auto turns = turns_.find(&sender.link()); turns != turns_.end()) std::erase(turns->second, &sender);
  for (auto& [id, flight] : in_flight_) {
    if (flight.sender == &sender) flight.sender = nullptr;
  }
}

bool SendQueue::send_one(LayerSender& sender, Link& link) {
  LayerWrite write = sender.next(++last_write_);
  const std::uint64_t id = write.id;
  InFlight flight{&link, &sender, write.layer, {}};
  for (const WriteBlock& block : write.blocks) flight.blocks.push_back(block.block);
  if (!link.try_write(write)) {
    sender.put_back(std::move(write));
    return false;
  }
  in_flight_.emplace(id, std::move(flight));
  return true;
}

void SendQueue::pump(Link& link) {
  auto& turns = turns_[&link];
  while (!turns.empty()) {
    LayerSender& sender = *turns.front();
    if (!sender.has_queued()) {
      turns.pop_front();
      continue;
    }
    if (!send_one(sender, link)) return meters_[&link].busy(Clock::now());
    turns.pop_front();
    turns.push_back(&sender);
  }
  meters_[&link].idle();
}

void SendQueue::on_write_done(Link& link, std::uint64_t id, Outcome outcome) {
  auto node = in_flight_.extract(id);
  if (!node.empty()) {
    InFlight& flight = node.mapped();
    meters_[&link].add(flight.blocks.size() * geometry_.layer_bytes(flight.layer), Clock::now());
    if (flight.sender != nullptr) {
      const LayerSender::Sent sent = flight.sender->sent_;
      sent(flight.layer, flight.blocks, outcome);
    }
  }
  pump(link);
}

void SendQueue::on_closed(Link& link) {
  turns_.erase(&link);
  meters_.erase(&link);
  std::erase_if(in_flight_, [&](const auto& item) { return item.second.link == &link; });
}

std::uint64_t SendQueue::bandwidth(const Link& link) const {
  const auto found = meters_.find(&link);
  return found == meters_.end() ? 0 : found->second.bytes_per_s();
}

LayerSender::LayerSender(SendQueue& queue, std::shared_ptr<Link> link, std::uint64_t grant, Lane lane, Sent sent)
    : queue_(queue), link_(std::move(link)), owner_(next_owner()), grant_(grant), lane_(lane), sent_(std::move(sent)) {}

LayerSender::~LayerSender() {
  queue_.remove(*this);
  link_->withdraw(owner_);
}

void LayerSender::add(std::uint32_t layer, WriteBlock block) {
  queued_[layer].push_back(std::move(block));
  queue_.enqueue(*this);
}

// As many blocks of the lowest layer as fit in a frame; at least one.
LayerWrite LayerSender::next(std::uint64_t id) {
  const auto first = queued_.begin();
  const std::uint64_t layer_bytes = queue_.geometry().layer_bytes(first->first);
  const std::uint64_t most = std::clamp<std::uint64_t>(queue_.frame_bytes() / layer_bytes, 1, kMaxWriteBlocks);
  LayerWrite write{id, owner_, grant_, first->first, lane_, {}};
  std::deque<WriteBlock>& blocks = first->second;
  while (!blocks.empty() && write.blocks.size() < most) {
    // One write describes its blocks alike.
    if (!write.blocks.empty() && blocks.front().extents != write.blocks.front().extents) break;
    write.blocks.push_back(std::move(blocks.front()));
    blocks.pop_front();
  }
  if (blocks.empty()) queued_.erase(first);
  return write;
}

void LayerSender::put_back(LayerWrite write) {
  auto& blocks = queued_[write.layer];
  blocks.insert(blocks.begin(), std::make_move_iterator(write.blocks.begin()),
                std::make_move_iterator(write.blocks.end()));
}

}  // namespace dualkv
