// The scheduler's reasons as sentences.
#include "base/text.h"
#include "dualkv/scheduler.h"

namespace dualkv {

std::string Reason::text() const {
  switch (kind) {
    case Kind::kNone: return "";
    case Kind::kShortQueue: return dualkv::text("its node's read queue is short; fewest tokens of such: ", first);
    case Kind::kNoShortQueue: return dualkv::text("no read queue is short; fewest tokens: ", first);
    case Kind::kNearMean: return dualkv::text("within reach of the mean; fewest requests of such: ", first);
    case Kind::kAboveMean: return dualkv::text("all are above the mean; fewest tokens: ", first);
    case Kind::kReadQueues: return dualkv::text("read queues in tokens: prefill ", first, ", decode ", second);
    case Kind::kTooLarge:
      return dualkv::text("needs ", first, " tokens of memory; the largest engine of '", group, "' has ", second,
                          " in all");
  }
  return "";
}

}  // namespace dualkv
