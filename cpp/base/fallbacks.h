// Fallbacks: counts what was degraded, so that nothing is silently slow; or makes it an error.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "dualkv/status.h"

namespace dualkv {

// Thread-safe.
class Fallbacks {
 public:
  explicit Fallbacks(bool fail) : fail_(fail) {}

  // `what` names the fallback ("no_direct"); throws Error(kUnsupported, why) when they are not allowed.
  void count(const std::string& what, const std::string& why) {
    note(what);
    if (fail_) throw Error(Code::kUnsupported, "fallback '" + what + "' is not allowed (fail_on_fallback): " + why);
  }
  // Only counts: for what happens while links run, which are not torn down for it.
  void note(const std::string& what) {
    const std::lock_guard lock(mutex_);
    ++counts_[what];
  }

  std::map<std::string, std::uint64_t> counts() const {
    const std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  const bool fail_;
  mutable std::mutex mutex_;
  std::map<std::string, std::uint64_t> counts_;
};

}  // namespace dualkv
