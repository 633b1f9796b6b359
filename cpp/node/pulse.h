// Pulse: whether a node's storage stands still, from its views.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dualkv/operation.h"
#include "dualkv/policy.h"

namespace dualkv {

// Storage stands still while reads wait and none ends. Time in which nobody looked counts for one heartbeat at most: a
// thread that did not run for a while can't tell whether reads ended meanwhile.
class Pulse {
 public:
  // Whether `view`, as it is at `now`, makes the storage one that stood still for longer than `limit`. Says so once,
  // and again only after a read ended or none waited.
  bool stalled(const NodeView& view, Clock::time_point now, Clock::duration heartbeat, Clock::duration limit) {
    const bool still = waiting_ && view.read_queue_bytes > 0 && view.reads_done == reads_done_;
    still_for_ = still ? still_for_ + std::min(now - looked_, heartbeat) : Clock::duration::zero();
    reported_ = reported_ && still;
    looked_ = now;
    waiting_ = view.read_queue_bytes > 0;
    reads_done_ = view.reads_done;
    if (reported_ || still_for_ <= limit) return false;
    return reported_ = true;
  }

 private:
  std::uint64_t reads_done_ = 0;
  bool waiting_ = false, reported_ = false;
  Clock::time_point looked_{};
  Clock::duration still_for_{};
};

}  // namespace dualkv
