// FlowNet: transfers that share links, max-min fairly, in two lanes.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace dualkv::sim {

using LinkId = std::uint32_t;
using FlowId = std::uint32_t;

// A link that a flow uses; `weight` bytes cross it for each byte of the flow (2: in and out of the same memory).
struct Hop {
  LinkId link = 0;
  float weight = 1;
};

// Links have a capacity; flows have bytes to move over up to kMaxHops of them. Rates are max-min fair: they grow
// together until a link is full, whose flows keep what they have while the others go on. What HIGH takes of a link is
// taken first. A link that its flows could not fill if each had it to itself binds nobody; only flows connected to a
// change over links that may bind get new rates. Single-threaded.
class FlowNet {
 public:
  static constexpr std::size_t kMaxHops = 4;
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  // `high` bytes/s of it belong to the HIGH lane, whether used or not.
  LinkId add_link(double capacity, double high = 0);
  // `owner` comes back when it has ended. `bytes` > 0, at least one hop.
  FlowId start(double now, double bytes, std::uint64_t owner, const std::array<Hop, kMaxHops>& hops, std::size_t count);

  // When the next flow ends; kNever without flows.
  double next_end() const { return heap_.empty() ? kNever : heap_.front().end; }
  // Ends the flow whose time has come; its owner.
  std::uint64_t finish_next();

  // Bytes that have crossed a link so far, up to `now`.
  double carried(LinkId link, double now);
  std::size_t flows() const { return active_; }

 private:
  struct Flow {
    std::array<Hop, kMaxHops> hops;
    std::array<std::uint32_t, kMaxHops> place;  // in the links' lists
    std::uint8_t hop_count = 0;
    bool active = false;
    std::uint64_t owner = 0;
    double left = 0;
    double most = 0;  // what its narrowest link would give it alone
    double rate = 0;
    double since = 0;
    std::uint32_t visit = 0;
    std::uint32_t heap_place = 0;
  };
  struct Use {
    FlowId flow;
    std::uint8_t hop;
  };
  struct Link {
    double capacity = 0;
    double demand = 0;  // of its flows, each at its most
    double carried = 0;
    std::vector<Use> uses;
    double left = 0;  // while rates are shared out
    double weight = 0;
    std::uint32_t visit = 0;

    bool may_bind() const { return demand > capacity * (1 + 1e-9); }
  };
  struct End {
    double end;
    std::uint64_t order;
    FlowId flow;
    bool operator<(const End& other) const { return end != other.end ? end < other.end : order < other.order; }
  };

  void settle(Flow& flow, double now);
  void begin_change();
  void reach(LinkId link);
  void share(double now);
  void give(Flow& flow, double rate, double now);
  void push(FlowId flow, double end);
  void remove(std::uint32_t place);
  void sift(std::uint32_t place);
  void put(std::uint32_t place, const End& end);

  std::vector<Link> links_;
  std::vector<Flow> flows_;
  std::vector<FlowId> free_;
  std::vector<End> heap_;
  std::vector<FlowId> touched_flows_;
  std::vector<LinkId> touched_links_;
  std::uint32_t visit_ = 0;
  std::uint64_t order_ = 0;
  std::size_t active_ = 0;
};

}  // namespace dualkv::sim
