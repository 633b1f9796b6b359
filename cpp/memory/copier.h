// Copies between Layer Blocks, contiguous ones and the planes of paged caches: by the CPU (host memory), and Copier:
// what copies in its place.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>

#include "dualkv/paged_kv.h"
#include "dualkv/status.h"

namespace dualkv {

// The extents' total is the contiguous side's size.
inline void scatter(const std::byte* source, std::span<const Extent> target) {
  for (const Extent& extent : target) {
    std::memcpy(extent.data, source, extent.bytes);
    source += extent.bytes;
  }
}

inline void gather(std::span<const Extent> source, std::byte* target) {
  for (const Extent& extent : source) {
    std::memcpy(target, extent.data, extent.bytes);
    target += extent.bytes;
  }
}

// Copies on the progress thread's behalf. Progress thread only.
class Copier {
 public:
  using Done = std::function<void(const Status&)>;

  virtual ~Copier() = default;
  // Both have as many bytes, and at most PagedKv::kMaxPlanes extents. `keep` holds the host's memory until `done` or
  // withdraw(). `done` may be called before this returns.
  virtual void copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                    std::shared_ptr<void> keep, Done done) = 0;
  // When this returns the owner's copies read and write nothing any more; no `done` follows.
  virtual void withdraw(std::uint64_t owner) = 0;
};

// The planes of a Layer Block, without an allocation.
class Extents {
 public:
  explicit Extents(std::span<const Extent> extents) : count_(extents.size()) {
    std::copy(extents.begin(), extents.end(), all_.begin());
  }
  std::span<const Extent> span() const { return std::span(all_).first(count_); }
  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (const Extent& extent : span()) sum += extent.bytes;
    return sum;
  }

 private:
  std::array<Extent, PagedKv::kMaxPlanes> all_{};
  std::size_t count_;
};

// What a Copier was asked for, until it is done.
struct CopyJob {
  Extents from, to;
  std::uint64_t owner = 0;
  std::shared_ptr<void> keep;
  Copier::Done done;
};

// The runs of at most `most` bytes that are in a row on both sides, in order: use(from, offset in it, to, offset in it,
// bytes). Both have as many bytes in all.
template <typename From, typename To, typename Use>
void for_each_run(std::span<const From> from, std::span<const To> to, Use use, std::uint64_t most = UINT64_MAX) {
  std::uint64_t read = 0, written = 0;  // of the first of each
  while (!from.empty() && !to.empty()) {
    const std::uint64_t run = std::min<std::uint64_t>({from[0].bytes - read, to[0].bytes - written, most});
    use(from[0], read, to[0], written, run);
    read += run;
    written += run;
    if (read == from[0].bytes) {
      from = from.subspan(1);
      read = 0;
    }
    if (written == to[0].bytes) {
      to = to.subspan(1);
      written = 0;
    }
  }
}

inline void copy(std::span<const Extent> from, std::span<const Extent> to) {
  for_each_run(from, to,
               [](const Extent& source, std::uint64_t read, const Extent& target, std::uint64_t written,
                  std::uint64_t run) { std::memcpy(target.data + written, source.data + read, run); });
}

}  // namespace dualkv
