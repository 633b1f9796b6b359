// WriteChain: pairs memory of this node with memory that may be written, as few requests as possible.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "rdma/queue_pair.h"
#include "rdma/remote_extent.h"

namespace dualkv {

// Registered memory of this node.
struct LocalExtent {
  const std::byte* data = nullptr;
  std::uint64_t bytes = 0;
  std::uint32_t key = 0;
};

// A value. One request per run of the other side's memory, gathered from up to RdmaWrite::kMaxPieces of this one's.
class WriteChain {
 public:
  // `largest`: of one request; ports say (ibv_port_attr::max_msg_sz).
  explicit WriteChain(std::uint64_t largest = kLargest) : largest_(std::min(largest, kLargest)) {}
  void reserve(std::size_t writes) { writes_.reserve(writes); }
  // Both must have as many bytes in all.
  void append(std::span<const LocalExtent> from, std::span<const RemoteExtent> to);
  std::vector<RdmaWrite>& writes() { return writes_; }
  const std::vector<RdmaWrite>& writes() const { return writes_; }

 private:
  static constexpr std::uint64_t kLargest = std::uint64_t{1} << 30;
  std::uint64_t largest_;
  std::vector<RdmaWrite> writes_;
  std::uint64_t last_bytes_ = 0;  // of the last request
};

}  // namespace dualkv
