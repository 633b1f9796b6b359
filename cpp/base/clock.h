// Seconds as options give them, in the clock's own unit.
#pragma once

#include "dualkv/operation.h"

namespace dualkv {

inline Clock::duration to_duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace dualkv
