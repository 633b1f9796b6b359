// RateMeter: bytes per second that a device or link gives while there is work for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dualkv/operation.h"

namespace dualkv {

// What a meter has found. A value: it can be read anywhere, at any later time.
struct RateEstimate {
  double rate = 0;  // bytes/s; 0: not measured
  double best = 0;  // that was seen lately
  Clock::time_point at{};

  // Whoever looked slow is given less, and is then not measured any more: so an estimate that nothing has confirmed for
  // a while goes back to the best, half of the way every kRecoverSeconds.
  std::uint64_t bytes_per_s(Clock::time_point now) const {
    const double unconfirmed = std::chrono::duration<double>(now - at).count() - kTrustSeconds;
    if (rate <= 0 || unconfirmed <= 0) return static_cast<std::uint64_t>(rate);
    return static_cast<std::uint64_t>(best - (best - rate) * std::exp2(-unconfirmed / kRecoverSeconds));
  }

  static constexpr double kTrustSeconds = 2;
  static constexpr double kRecoverSeconds = 2;
};

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
    saturated_ = true;
  }
  // `saturated`: more work was waiting. Otherwise what is seen may be all that was asked for: a lower bound.
  void add(std::uint64_t bytes, Clock::time_point now, bool saturated = true) {
    if (begin_ == Clock::time_point{}) return;
    bytes_ += bytes;
    saturated_ &= saturated;
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    if (seconds < kSampleSeconds) return;
    const double seen = static_cast<double>(bytes_) / seconds;
    if (saturated_ || seen > estimate_.rate) learn(seen, seconds, now);
    begin_ = now;
    bytes_ = 0;
    saturated_ = true;
  }
  const RateEstimate& estimate() const { return estimate_; }

 private:
  void learn(double seen, double seconds, Clock::time_point now) {
    // The first samples count alike; later ones fade with kMemorySeconds. Policies turn a few percent of noise into
    // blocks of imbalance when queues are long, so the memory is long against a sample.
    measured_seconds_ += seconds;
    const double weight = std::max(1 - std::exp(-seconds / kMemorySeconds), seconds / measured_seconds_);
    estimate_.rate += weight * (seen - estimate_.rate);
    estimate_.best += (1 - std::exp(-seconds / kBestSeconds)) * (estimate_.rate - estimate_.best);
    estimate_.best = std::max(estimate_.best, estimate_.rate);
    estimate_.at = now;
  }

  static constexpr double kSampleSeconds = 0.02;
  static constexpr double kMemorySeconds = 2;
  static constexpr double kBestSeconds = 60;  // of being slower, until that is the best

  Clock::time_point begin_{};
  std::uint64_t bytes_ = 0;
  bool saturated_ = true;
  RateEstimate estimate_;
  double measured_seconds_ = 0;
};

}  // namespace dualkv
