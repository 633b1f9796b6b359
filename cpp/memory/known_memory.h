// KnownMemory: what a node's transfers may touch, and for how long. What a NIC can be told of before it is needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace dualkv {

// A range is known as long as one of its owners lives; one that comes back at the same address is another range, with
// another id: whatever was kept for the old one (page tables of a NIC) would reach memory that is gone. Progress
// thread only.
class KnownMemory {
 public:
  struct Range {
    std::uint64_t id;  // never used twice
    std::span<std::byte> memory;
    std::vector<std::weak_ptr<const void>> owners;

    bool alive() const {
      return std::any_of(owners.begin(), owners.end(), [](const auto& owner) { return !owner.expired(); });
    }
    bool holds(const std::byte* data, std::uint64_t bytes) const {
      return data >= memory.data() && bytes <= memory.size() &&
             static_cast<std::uint64_t>(data - memory.data()) <= memory.size() - bytes;
    }
  };

  void add(std::span<std::byte> memory, const std::shared_ptr<const void>& owner) {
    sweep();
    for (Range& range : ranges_) {
      if (range.memory.data() != memory.data() || range.memory.size() != memory.size()) continue;
      const auto same = [&](const auto& weak) { return !weak.owner_before(owner) && !owner.owner_before(weak); };
      if (std::none_of(range.owners.begin(), range.owners.end(), same)) range.owners.push_back(owner);
      return;
    }
    ranges_.push_back({++last_id_, memory, {owner}});
  }
  // The range that holds all of these bytes; null if none does.
  const Range* find(const std::byte* data, std::uint64_t bytes) const {
    if (hot_ < ranges_.size() && ranges_[hot_].holds(data, bytes) && ranges_[hot_].alive()) return &ranges_[hot_];
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
      if (!ranges_[i].holds(data, bytes) || !ranges_[i].alive()) continue;
      hot_ = i;
      return &ranges_[i];
    }
    return nullptr;
  }
  bool knows(std::uint64_t id) const {
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& r) { return r.id == id && r.alive(); });
  }

 private:
  void sweep() {
    for (Range& range : ranges_) std::erase_if(range.owners, [](const auto& owner) { return owner.expired(); });
    std::erase_if(ranges_, [](const Range& range) { return range.owners.empty(); });
  }

  std::vector<Range> ranges_;
  std::uint64_t last_id_ = 0;
  mutable std::size_t hot_ = 0;  // where the last find ended: neighbours follow each other
};

}  // namespace dualkv
