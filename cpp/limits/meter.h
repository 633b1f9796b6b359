// Meter: wall and CPU time of a limit loop.
#pragma once

#include <time.h>

#include "dualkv/limits.h"

namespace dualkv::limits {

inline double read_clock_s(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Runs from its construction. `cpu_clock` is that of the calling thread or of the process; both count in
// nanoseconds what getrusage would tell.
class Meter {
 public:
  explicit Meter(clockid_t cpu_clock)
      : cpu_clock_(cpu_clock), cpu_start_s_(read_clock_s(cpu_clock)), start_s_(read_clock_s(CLOCK_MONOTONIC)) {}

  double elapsed_s() const { return read_clock_s(CLOCK_MONOTONIC) - start_s_; }
  Sample stop(std::uint64_t bytes) const {
    const double seconds = elapsed_s();
    return {seconds, read_clock_s(cpu_clock_) - cpu_start_s_, bytes, {}};
  }

 private:
  clockid_t cpu_clock_;
  double cpu_start_s_;
  double start_s_;
};

}  // namespace dualkv::limits
