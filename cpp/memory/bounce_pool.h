// BouncePool: pinned memory that Layer Blocks pass through between a GPU and a socket or NIC that can't reach it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "memory/free_pieces.h"
#include "memory/pinned.h"

namespace dualkv {

// Pieces of one size. All of it is pinned at once: pinning may wait for what a GPU does, which may wait for what a
// piece is wanted for. Any thread.
class BouncePool {
 public:
  using Piece = FreePieces::Piece;

  // As many pieces as `bytes` hold, at least one. Throws Error.
  BouncePool(std::shared_ptr<CudaDevice> device, std::uint64_t piece_bytes, std::uint64_t bytes, int numa_node) {
    const std::uint64_t piece = (piece_bytes + kAlign - 1) / kAlign * kAlign;
    count_ = std::max(bytes / piece, std::uint64_t{1});
    const auto pinned = std::make_shared<PinnedMemory>(std::move(device), count_ * piece, numa_node);
    memory_ = pinned->memory();
    for (std::uint64_t i = count_; i-- > 0;) pieces_.add(memory_.data() + i * piece);
    pieces_.keep(pinned);
  }

  // Null if all pieces are out.
  Piece take() { return pieces_.take(); }
  std::uint64_t count() const { return count_; }
  std::span<std::byte> memory() const { return memory_; }
  // Lives as long as the memory.
  std::shared_ptr<const void> owner() const { return pieces_.owner(); }

 private:
  static constexpr std::uint64_t kAlign = 256;

  std::uint64_t count_ = 0;
  FreePieces pieces_;
  std::span<std::byte> memory_;
};

}  // namespace dualkv
