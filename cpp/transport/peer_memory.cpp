// Mapping through /proc/<pid>/fd: as much access as reading the process's memory, and never more than reading.
#include "transport/peer_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/fd.h"
#include "base/text.h"

namespace dualkv {

namespace {

// Empty if the region is not what the peer says, or may not be opened.
std::span<std::byte> map_region(pid_t pid, const SharedRegion& region) {
  const std::string path = text("/proc/", pid, "/fd/", region.fd);
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info{};
  if (!fd.valid() || fstat(fd.get(), &info) != 0) return {};
  // Only memory that can't shrink: a page that is gone would kill whoever reads it.
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  const bool right = S_ISREG(info.st_mode) && info.st_ino == region.inode && seals >= 0 && (seals & F_SEAL_SHRINK) &&
                     region.bytes > 0 && region.bytes <= static_cast<std::uint64_t>(info.st_size);
  if (!right) return {};
  void* mapping = mmap(nullptr, region.bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (mapping == MAP_FAILED) return {};
  return {static_cast<std::byte*>(mapping), region.bytes};
}

}  // namespace

PeerMemory::~PeerMemory() {
  for (const auto& [id, mapping] : mappings_) munmap(mapping.memory.data(), mapping.memory.size());
}

bool PeerMemory::update(pid_t pid, std::span<const SharedRegion> regions) {
  std::erase_if(mappings_, [&](const auto& item) {
    const bool kept = std::any_of(regions.begin(), regions.end(), [&](const auto& r) { return r.id == item.first; });
    if (!kept) munmap(item.second.memory.data(), item.second.memory.size());
    return !kept;
  });
  bool all = true;
  for (const SharedRegion& region : regions) {
    if (mappings_.contains(region.id)) continue;
    const auto memory = map_region(pid, region);
    if (memory.empty()) {
      all = false;
    } else {
      mappings_[region.id] = {region.base, memory};
    }
  }
  return all;
}

const std::byte* PeerMemory::find(std::uint32_t region, std::uint64_t address, std::uint64_t bytes) const {
  const auto found = mappings_.find(region);
  if (found == mappings_.end()) return nullptr;
  const auto& [base, memory] = found->second;
  if (address < base || address - base > memory.size() || memory.size() - (address - base) < bytes) return nullptr;
  return memory.data() + (address - base);
}

}  // namespace dualkv
