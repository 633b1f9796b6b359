// Max-min fair rates by progressive filling, over the connected part of the network that a change touches.
#include "sim/flow_net.h"

#include <algorithm>

namespace dualkv::sim {

LinkId FlowNet::add_link(double capacity, double high) {
  links_.push_back({});
  links_.back().capacity = capacity - high;
  return static_cast<LinkId>(links_.size() - 1);
}

FlowId FlowNet::start(double now, double bytes, std::uint64_t owner, const std::array<Hop, kMaxHops>& hops,
                      std::size_t count) {
  FlowId id;
  if (free_.empty()) {
    id = static_cast<FlowId>(flows_.size());
    flows_.push_back({});
  } else {
    id = free_.back();
    free_.pop_back();
  }
  Flow& flow = flows_[id];
  flow.hops = hops;
  flow.hop_count = static_cast<std::uint8_t>(count);
  flow.active = true;
  flow.owner = owner;
  flow.left = bytes;
  flow.rate = 0;
  flow.since = now;
  flow.most = kNever;
  for (std::size_t i = 0; i < count; ++i)
    flow.most = std::min(flow.most, links_[hops[i].link].capacity / hops[i].weight);
  ++active_;
  push(id, kNever);
  begin_change();
  touched_flows_.push_back(id);
  flow.visit = visit_;
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[hops[i].link];
    flow.place[i] = static_cast<std::uint32_t>(link.uses.size());
    link.uses.push_back({id, i});
    link.demand += flow.most * hops[i].weight;
    if (link.may_bind()) reach(hops[i].link);
  }
  share(now);
  return id;
}

std::uint64_t FlowNet::finish_next() {
  const FlowId id = heap_.front().flow;
  const double now = heap_.front().end;
  Flow& flow = flows_[id];
  // To the last byte: rounding must not lose any.
  for (std::uint8_t i = 0; i < flow.hop_count; ++i)
    links_[flow.hops[i].link].carried += flow.left * flow.hops[i].weight;
  flow.left = 0;
  remove(0);
  begin_change();
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[flow.hops[i].link];
    const Use moved = link.uses.back();
    link.uses[flow.place[i]] = moved;
    flows_[moved.flow].place[moved.hop] = flow.place[i];
    link.uses.pop_back();
    const bool bound = link.may_bind();
    link.demand = link.uses.empty() ? 0 : link.demand - flow.most * flow.hops[i].weight;
    if (bound) reach(flow.hops[i].link);
  }
  flow.active = false;
  --active_;
  free_.push_back(id);
  share(now);
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

void FlowNet::begin_change() {
  ++visit_;
  touched_flows_.clear();
  touched_links_.clear();
}

// A link that binds or did, and all flows and links that can be reached from it over links that may bind.
void FlowNet::reach(LinkId id) {
  if (links_[id].visit == visit_) return;
  links_[id].visit = visit_;
  std::size_t next = touched_links_.size();
  touched_links_.push_back(id);
  for (; next < touched_links_.size(); ++next) {
    for (const Use& use : links_[touched_links_[next]].uses) {
      Flow& flow = flows_[use.flow];
      if (flow.visit == visit_) continue;
      flow.visit = visit_;
      touched_flows_.push_back(use.flow);
      for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
        Link& link = links_[flow.hops[i].link];
        if (link.visit == visit_ || !link.may_bind()) continue;
        link.visit = visit_;
        touched_links_.push_back(flow.hops[i].link);
      }
    }
  }
}

void FlowNet::share(double now) {
  for (const LinkId id : touched_links_) {
    Link& link = links_[id];
    link.left = link.capacity;
    link.weight = 0;
    for (const Use& use : link.uses) link.weight += flows_[use.flow].hops[use.hop].weight;
  }
  while (!touched_flows_.empty()) {
    const Link* full = nullptr;
    double rate = kNever;
    for (const LinkId id : touched_links_) {
      const Link& link = links_[id];
      if (link.weight > 1e-6 && link.left / link.weight < rate) {
        rate = link.left / link.weight;
        full = &link;
      }
    }
    // Those that can't use as much keep their most; if there are none, the fullest link's flows keep its rate.
    const std::size_t before = touched_flows_.size();
    std::erase_if(touched_flows_, [&](FlowId id) {
      if (flows_[id].most > rate) return false;
      give(flows_[id], flows_[id].most, now);
      return true;
    });
    if (touched_flows_.size() < before) continue;
    for (const Use& use : full->uses) {
      if (flows_[use.flow].visit == visit_) give(flows_[use.flow], rate, now);
    }
    std::erase_if(touched_flows_, [&](FlowId id) { return flows_[id].visit != visit_; });
  }
}

void FlowNet::give(Flow& flow, double rate, double now) {
  flow.visit = visit_ - 1;
  for (std::uint8_t i = 0; i < flow.hop_count; ++i) {
    Link& link = links_[flow.hops[i].link];
    link.left = std::max(0.0, link.left - rate * flow.hops[i].weight);
    link.weight -= flow.hops[i].weight;
  }
  if (rate == flow.rate) return;
  settle(flow, now);
  flow.rate = rate;
  End& end = heap_[flow.heap_place];
  end = {now + flow.left / rate, ++order_, end.flow};
  sift(flow.heap_place);
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
