// FreePieces: equal pieces of memory that their last owners give back.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace dualkv {

// Pieces come back on any thread, also after this is gone; the memory lives as long as one is out.
class FreePieces {
 public:
  using Piece = std::shared_ptr<std::byte>;

  void add(std::byte* piece) {
    const std::lock_guard lock(state_->mutex);
    state_->free.push_back(piece);
  }
  // Of what was added.
  void keep(std::shared_ptr<const void> memory) {
    const std::lock_guard lock(state_->mutex);
    state_->memory.push_back(std::move(memory));
  }
  // Null if all are out.
  Piece take() {
    std::byte* piece;
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->free.empty()) return nullptr;
      piece = state_->free.back();
      state_->free.pop_back();
    }
    return Piece(piece, [state = state_](std::byte* back) {
      const std::lock_guard lock(state->mutex);
      state->free.push_back(back);
    });
  }
  // Lives as long as the memory.
  std::shared_ptr<const void> owner() const { return state_; }

 private:
  struct State {
    std::mutex mutex;
    std::vector<std::byte*> free;
    std::vector<std::shared_ptr<const void>> memory;
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace dualkv
