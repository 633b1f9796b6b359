// SharedRegions: the memory of a node that peers on this host may map.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "dualkv/status.h"

namespace dualkv {

// What a peer needs to find and map a region. A value.
struct SharedRegion {
  std::uint32_t id = 0;  // never used twice by a node; 0 = none
  std::uint64_t base = 0;
  std::uint64_t bytes = 0;
  std::int32_t fd = -1;
  std::uint64_t inode = 0;  // tells the region's fd from another that got its number
};

// Memory must be removed before it is freed. Progress thread only.
class SharedRegions {
 public:
  static constexpr std::size_t kMost = 64;

  std::uint32_t add(std::span<const std::byte> memory, int fd) {
    if (regions_.size() >= kMost) throw Error(Code::kNoSpace, "more than 64 regions of shared memory; free some");
    struct stat info{};
    if (fstat(fd, &info) != 0) throw Error(Code::kIo, "fstat of shared memory", errno);
    regions_.push_back({++last_, reinterpret_cast<std::uint64_t>(memory.data()), memory.size(), fd,
                        static_cast<std::uint64_t>(info.st_ino)});
    return last_;
  }
  void remove(std::uint32_t id) {
    std::erase_if(regions_, [id](const SharedRegion& region) { return region.id == id; });
  }
  // The region that holds all of these bytes; 0 if none does.
  std::uint32_t find(const std::byte* data, std::uint64_t bytes) const {
    const auto address = reinterpret_cast<std::uint64_t>(data);
    for (const SharedRegion& region : regions_) {
      if (address >= region.base && address - region.base <= region.bytes - std::min(bytes, region.bytes)) {
        return bytes <= region.bytes ? region.id : 0;
      }
    }
    return 0;
  }
  const std::vector<SharedRegion>& list() const { return regions_; }

 private:
  std::vector<SharedRegion> regions_;
  std::uint32_t last_ = 0;
};

}  // namespace dualkv
