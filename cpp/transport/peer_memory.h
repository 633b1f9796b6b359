// PeerMemory: the regions of a peer process of this host, mapped read-only.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>

#include "memory/shared_regions.h"

namespace dualkv {

// Owns the mappings. They stay readable when the peer dies: the kernel keeps the memory until they end.
class PeerMemory {
 public:
  PeerMemory() = default;
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // `regions` are all that process `pid` shares now. False if one could not be mapped (it is read the slow way then).
  bool update(pid_t pid, std::span<const SharedRegion> regions);
  bool has(std::uint32_t region) const { return mappings_.contains(region); }
  // Where the bytes at `address` of the peer lie in this process; null if the region is not mapped or ends before.
  const std::byte* find(std::uint32_t region, std::uint64_t address, std::uint64_t bytes) const;

 private:
  struct Mapping {
    std::uint64_t base;
    std::span<std::byte> memory;
  };
  std::map<std::uint32_t, Mapping> mappings_;
};

}  // namespace dualkv
