// keep_for_ever: for what must not be freed.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

namespace dualkv {

// Until the process ends: what a driver that does not answer may still use, and what must not end on a thread of a
// driver. Any thread.
inline void keep_for_ever(std::shared_ptr<const void> thing) {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::shared_ptr<const void>>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(thing));
}

}  // namespace dualkv
