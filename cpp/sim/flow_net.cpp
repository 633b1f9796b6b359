// Max-min fair rates by progressive filling, over the connected part of the network that a change touches.
#include "sim/flow_net.h"

#include <algorithm>
#include <functional>

namespace dualkv::sim {

namespace {

constexpr double kNoWeight = 1e-6;  // of a link whose flows all have their rates, but for rounding

}  // namespace

LinkId FlowNet::add_link(double capacity, double high) {
  links_.push_back({});
  links_.back().capacity = capacity - high;
  return static_cast<LinkId>(links_.size() - 1);
}

void FlowNet::start(double now, double bytes, std::uint64_t owner, const std::array<Hop, kMaxHops>& hops,
                    std::size_t count) {
  FlowId id;
  if (free_.empty()) {
    id = static_cast<FlowId>(flows_.size());
    flows_.push_back({});
  } else {
    id = free_.back();
    free_.pop_back();
  }
  change_at(now);
  Flow& flow = flows_[id];
  flow.hops = hops;
  flow.hop_count = static_cast<std::uint8_t>(count);
  flow.owner = owner;
  flow.left = bytes;
  flow.rate = 0;
  flow.since = now;
  flow.most = kNever;
  for (std::size_t i = 0; i < count; ++i) {
    flow.most = std::min(flow.most, links_[hops[i].link].capacity / hops[i].weight);
  }
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[hops[i].link];
    flow.place[i] = static_cast<std::uint32_t>(link.uses.size());
    link.uses.push_back({id, i});
  }
  flow.visit = visit_;
  touched_flows_.push_back(id);
  push(id, kNever);
}

std::uint64_t FlowNet::finish_next() {
  const FlowId id = heap_.front().flow;
  change_at(heap_.front().end);
  Flow& flow = flows_[id];
  // To the last byte: rounding must not lose any.
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    links_[flow.hops[i].link].carried += flow.left * flow.hops[i].weight;
  }
  flow.left = 0;
  remove(0);
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[flow.hops[i].link];
    const Use moved = link.uses.back();
    link.uses[flow.place[i]] = moved;
    flows_[moved.flow].place[moved.hop] = flow.place[i];
    link.uses.pop_back();
    if (link.full()) touch(flow.hops[i].link);
    link.used = link.uses.empty() ? 0 : link.used - flow.rate * flow.hops[i].weight;
  }
  free_.push_back(id);
  return flow.owner;
}

double FlowNet::carried(LinkId id, double now) {
  for (const Use& use : links_[id].uses) settle(flows_[use.flow], now);
  return links_[id].carried;
}

void FlowNet::settle(Flow& flow, double now) {
  const double moved = std::min(flow.left, flow.rate * (now - flow.since));
  flow.since = now;
  flow.left -= moved;
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) links_[flow.hops[i].link].carried += moved * flow.hops[i].weight;
}

void FlowNet::change_at(double now) {
  if (changed_) return;
  changed_ = true;
  changed_at_ = now;
  ++visit_;
  touched_flows_.clear();
  touched_links_.clear();
  reached_ = 0;
}

// All flows of this link get new rates.
void FlowNet::touch(LinkId id) {
  if (links_[id].visit == visit_) return;
  links_[id].visit = visit_;
  touched_links_.push_back(id);
}

// New rates may fill further links, whose flows then get new rates as well.
void FlowNet::share() {
  changed_ = false;
  do {
    reach();
    fill();
  } while (overfull());
  adopt();
}

void FlowNet::reach() {
  for (; reached_ < touched_links_.size(); ++reached_) {
    for (const Use& use : links_[touched_links_[reached_]].uses) {
      Flow& flow = flows_[use.flow];
      if (flow.visit == visit_) continue;
      flow.visit = visit_;
      touched_flows_.push_back(use.flow);
      for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
        if (links_[flow.hops[i].link].full()) touch(flow.hops[i].link);
      }
    }
  }
}

// Progressive filling of the touched flows over the touched links.
void FlowNet::fill() {
  fullest_.clear();
  for (const LinkId id : touched_links_) {
    Link& link = links_[id];
    link.left = link.capacity;
    link.weight = 0;
    for (const Use& use : link.uses) link.weight += flows_[use.flow].hops[use.hop].weight;
    if (link.weight > kNoWeight) fullest_.emplace_back(link.left / link.weight, id);
  }
  std::make_heap(fullest_.begin(), fullest_.end(), std::greater<>());
  // Those that the links leave as much as they can use, least first; between them, the links that are full.
  std::sort(touched_flows_.begin(), touched_flows_.end(), [&](FlowId a, FlowId b) {
    return flows_[a].most != flows_[b].most ? flows_[a].most < flows_[b].most : a < b;
  });
  for (const FlowId id : touched_flows_) flows_[id].open = true;
  for (const FlowId id : touched_flows_) {
    Flow& flow = flows_[id];
    while (flow.open && !fullest_.empty() && fullest_.front().first < flow.most) {
      std::pop_heap(fullest_.begin(), fullest_.end(), std::greater<>());
      const auto [stood, full] = fullest_.back();
      const Link& link = links_[full];
      fullest_.pop_back();
      if (link.weight < kNoWeight) continue;  // all of its flows have their rates
      // What flows took elsewhere can only have left more for the others.
      const double rate = link.left / link.weight;
      if (rate > stood * (1 + kSame)) {
        fullest_.emplace_back(rate, full);
        std::push_heap(fullest_.begin(), fullest_.end(), std::greater<>());
        continue;
      }
      for (const Use& use : link.uses) {
        if (flows_[use.flow].open) give(flows_[use.flow], rate);
      }
    }
    if (flow.open) give(flow, flow.most);
  }
}

void FlowNet::give(Flow& flow, double rate) {
  flow.open = false;
  flow.next = rate;
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[flow.hops[i].link];
    link.left = std::max(0.0, link.left - rate * flow.hops[i].weight);
    link.weight -= flow.hops[i].weight;
  }
}

// Touches links that the new rates would overfill; false if there are none.
bool FlowNet::overfull() {
  ++round_;
  checked_links_.clear();
  for (const FlowId id : touched_flows_) {
    const Flow& flow = flows_[id];
    for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
      Link& link = links_[flow.hops[i].link];
      if (link.visit == visit_) continue;
      if (link.checked != round_) {
        link.checked = round_;
        link.more = 0;
        checked_links_.push_back(flow.hops[i].link);
      }
      link.more += (flow.next - flow.rate) * flow.hops[i].weight;
    }
  }
  const std::size_t before = touched_links_.size();
  for (const LinkId id : checked_links_) {
    if (links_[id].used + links_[id].more > links_[id].capacity * (1 + kSame)) touch(id);
  }
  return touched_links_.size() > before;
}

void FlowNet::adopt() {
  for (const FlowId id : touched_flows_) {
    Flow& flow = flows_[id];
    if (flow.next == flow.rate) continue;
    settle(flow, changed_at_);
    for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
      links_[flow.hops[i].link].used += (flow.next - flow.rate) * flow.hops[i].weight;
    }
    flow.rate = flow.next;
    heap_[flow.heap_place] = {changed_at_ + flow.left / flow.rate, ++order_, id};
    sift(flow.heap_place);
  }
  // Sums of differences drift; these are exact.
  for (const LinkId id : touched_links_) {
    Link& link = links_[id];
    link.used = 0;
    for (const Use& use : link.uses) link.used += flows_[use.flow].rate * flows_[use.flow].hops[use.hop].weight;
  }
}

void FlowNet::push(FlowId flow, double end) {
  heap_.push_back({});
  put(static_cast<std::uint32_t>(heap_.size() - 1), {end, ++order_, flow});
  sift(static_cast<std::uint32_t>(heap_.size() - 1));
}

void FlowNet::remove(std::uint32_t place) {
  const End last = heap_.back();
  heap_.pop_back();
  if (place == heap_.size()) return;
  put(place, last);
  sift(place);
}

void FlowNet::put(std::uint32_t place, const End& end) {
  heap_[place] = end;
  flows_[end.flow].heap_place = place;
}

// To where it belongs, up or down.
void FlowNet::sift(std::uint32_t place) {
  const End moving = heap_[place];
  while (place > 0 && moving < heap_[(place - 1) / 2]) {
    put(place, heap_[(place - 1) / 2]);
    place = (place - 1) / 2;
  }
  for (std::uint32_t child = 2 * place + 1; child < heap_.size(); child = 2 * place + 1) {
    if (child + 1 < heap_.size() && heap_[child + 1] < heap_[child]) ++child;
    if (!(heap_[child] < moving)) break;
    put(place, heap_[child]);
    place = child;
  }
  put(place, moving);
}

}  // namespace dualkv::sim
