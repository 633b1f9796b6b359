// Sides: the nodes that could read a hit, and when each would be done with how much of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dualkv/policy.h"

namespace dualkv {

// One node as a supply of blocks. It has queued what it will read first, then reads at its rate; what it relays also
// waits for the link behind all that is in flight there (HIGH traffic goes first), and then for the link's rate. Room
// in its staging is no cost of its own: slots come back at the pace of its reads or link (decisions/0005).
class Side {
 public:
  Side(const NodeView& view, Path path) : view_(&view), path_(path) {}

  const NodeView& view() const { return *view_; }
  Path path() const { return path_; }

  // Bytes/s of its reads.
  double read_rate() const { return read_rate_; }
  // Bytes done after `seconds`, counted from now.
  double bytes_by(double seconds) const;
  // When so many bytes are done.
  double seconds_for(double bytes) const;
  // Bytes/s of what it reads and relays, once its queues are done.
  double pace() const;
  // When its pace changes: it begins, it meets its link.
  std::vector<double> turns() const;

 private:
  friend std::vector<Side> sides_of(const PlanRequest& request);

  const NodeView* view_;
  Path path_;
  double read_rate_ = 1, link_rate_ = 0;  // bytes/s; link 0: not measured, or none
  double read_queue_ = 0, link_queue_ = 0;
};

// Prefill first, then decode, then helpers: the order blocks are given out in. A node whose rate is not measured yet is
// taken to be as fast as the others on average; with no measurement at all, all are alike and only ratios count. Views
// must outlive them.
std::vector<Side> sides_of(const PlanRequest& request);

// When all sides together are done with so many bytes, if they share them best, and how many each reads.
struct Shares {
  double seconds = 0;
  std::vector<double> bytes;
};
Shares share_out(const std::vector<Side>& sides, double bytes);

// What all sides together are done with by `seconds`, and whenever the pace of one changes: up to `bytes`, and between
// two of these amounts, the seconds of share_out() grow evenly.
std::vector<double> turning_points(const std::vector<Side>& sides, double bytes, double seconds);

// A plan without ranges and reason.
Plan unread_plan(const PlanRequest& request);

}  // namespace dualkv
