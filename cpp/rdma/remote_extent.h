// RemoteExtent: memory that a queue pair's other side may write to. A value, without anything of verbs.
#pragma once

#include <cstdint>

namespace dualkv {

struct RemoteExtent {
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
  std::uint32_t key = 0;
};

}  // namespace dualkv
