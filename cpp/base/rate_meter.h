// RateMeter: bytes per second while there is work, as a moving average.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dualkv/operation.h"

namespace dualkv {

// Not thread-safe.
class RateMeter {
 public:
  // Work was there from now on. Nothing happens while it already was.
  void busy(Clock::time_point now) {
    if (begin_ == Clock::time_point{}) begin_ = now;
  }
  // The last of the work is done.
  void idle() {
    begin_ = {};
    bytes_ = 0;
  }
  void add(std::uint64_t bytes, Clock::time_point now) {
    if (begin_ == Clock::time_point{}) return;
    bytes_ += bytes;
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    if (seconds < kSampleSeconds) return;
    // The first samples count alike; later ones fade with kMemorySeconds. Policies turn a few percent of noise into
    // blocks of imbalance when queues are long, so the memory is long against a sample.
    measured_seconds_ += seconds;
    const double weight = std::max(1 - std::exp(-seconds / kMemorySeconds), seconds / measured_seconds_);
    rate_ += weight * (static_cast<double>(bytes_) / seconds - rate_);
    begin_ = now;
    bytes_ = 0;
  }
  // 0 until the first sample.
  std::uint64_t bytes_per_s() const { return static_cast<std::uint64_t>(rate_); }

 private:
  static constexpr double kSampleSeconds = 0.02;
  static constexpr double kMemorySeconds = 2;

  Clock::time_point begin_{};
  std::uint64_t bytes_ = 0;
  double rate_ = 0;
  double measured_seconds_ = 0;
};

}  // namespace dualkv
