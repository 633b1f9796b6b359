// FlowNet: transfers that share links, max-min fairly, in two lanes.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <utility>
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
// taken first. Only flows that are connected to a change over full links get new rates: others have their own full
// link, and nothing happened there. Single-threaded.
class FlowNet {
 public:
  static constexpr std::size_t kMaxHops = 4;
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  // `high` bytes/s of it belong to the HIGH lane, whether used or not.
  LinkId add_link(double capacity, double high = 0);
  // `owner` comes back when it has ended. `bytes` > 0, at least one hop. It moves from next_end() on.
  void start(double now, double bytes, std::uint64_t owner, const std::array<Hop, kMaxHops>& hops, std::size_t count);

  // When the next flow ends; kNever without flows. Rates follow all starts and ends up to here at once, so those of one
  // instant cost one sharing out. The time must not be before that of the last change.
  double next_end() {
    if (changed_) share();
    return heap_.empty() ? kNever : heap_.front().end;
  }
  // Ends the flow whose time has come; its owner. Only right behind next_end().
  std::uint64_t finish_next();

  // Bytes that have crossed a link so far, up to `now`.
  double carried(LinkId link, double now);
  std::size_t flows() const { return heap_.size(); }

 private:
  struct Flow {
    std::array<Hop, kMaxHops> hops;
    std::array<std::uint32_t, kMaxHops> place;  // in the links' lists
    std::uint8_t hop_count = 0;
    std::uint64_t owner = 0;
    double left = 0;
    double most = 0;  // what its narrowest link would give it alone
    double rate = 0;
    double next = 0;  // rate, while rates are shared out
    bool open = false;
    double since = 0;
    std::uint32_t visit = 0;
    std::uint32_t heap_place = 0;
  };
  static constexpr double kSame = 1e-9;  // rates that differ by less are one

  struct Use {
    FlowId flow;
    std::uint8_t hop;
  };
  struct Link {
    double capacity = 0;
    double used = 0;  // bytes/s
    double carried = 0;
    std::vector<Use> uses;
    // While rates are shared out:
    double left = 0, weight = 0;
    double more = 0;            // what new rates of its flows add
    std::uint32_t visit = 0;    // the change that reached it
    std::uint32_t checked = 0;  // the round that added up `more`

    bool full() const { return used >= capacity * (1 - kSame); }
  };
  struct End {
    double end;
    std::uint64_t order;
    FlowId flow;
    bool operator<(const End& other) const { return end != other.end ? end < other.end : order < other.order; }
  };

  void settle(Flow& flow, double now);
  void change_at(double now);
  void touch(LinkId link);
  void share();
  void reach();
  void fill();
  void give(Flow& flow, double rate);
  bool overfull();
  void adopt();
  void push(FlowId flow, double end);
  void remove(std::uint32_t place);
  void sift(std::uint32_t place);
  void put(std::uint32_t place, const End& end);

  std::vector<Link> links_;
  std::vector<Flow> flows_;
  std::vector<FlowId> free_;
  std::vector<End> heap_;
  // Of the change under way: where it began, and what it reaches.
  bool changed_ = false;
  double changed_at_ = 0;
  std::vector<FlowId> touched_flows_;
  std::vector<LinkId> touched_links_, checked_links_;
  std::size_t reached_ = 0;  // links whose flows are touched
  std::uint32_t round_ = 0;
  std::vector<std::pair<double, LinkId>> fullest_;  // a heap; first is the rate at which the link is full
  std::uint32_t visit_ = 0;
  std::uint64_t order_ = 0;
};

}  // namespace dualkv::sim
