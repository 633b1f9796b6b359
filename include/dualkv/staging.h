// The staging pool: registered DRAM slots, one Full Block (with its trailer) each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dualkv/geometry.h"
#include "dualkv/operation.h"
#include "dualkv/status.h"

namespace dualkv {

// Owning reference to a slot. Kernel reads and network sends hold copies, so memory is reused only when the last
// of them is done: that is the quarantine of the contract.
using Slot = std::shared_ptr<std::byte>;

// What a slot is wanted for. Prompts are held until decode starts; transit slots are held only by I/O, which never
// waits for another slot. A share of the pool is kept for transit, so held prompts can't stop reads (no deadlock).
enum class SlotUse : std::uint8_t { kTransit, kPrompt };

struct StagingOptions {
  std::uint64_t bytes = std::uint64_t{256} << 20;
  // Share of the slots that prompts may not take, at least one slot.
  double transit_share = 0.25;
  bool lock_memory = true;  // mlock; a refusal is a counted fallback
  bool huge_pages = true;   // MAP_HUGETLB, else transparent huge pages; a refusal is a counted fallback
  // Peers on this host map the pool and read it without the kernel's help (shm). A node turns it on when it listens on
  // shm://. Transparent huge pages then need transparent_hugepage/shmem_enabled.
  bool shared = false;
  // The pool is locked (and so touched) in chunks of this size, rounded up to 2 MiB, by so many threads at once.
  std::uint64_t chunk_bytes = std::uint64_t{256} << 20;
  std::uint32_t prepare_threads = 2;
  // Opening waits for the first chunk only; the slots of the others come as they are ready.
  bool lazy = false;
  std::uint64_t lock_limit_bytes = 0;  // lock at most so much, the first part of the pool; 0 = all
  int numa_node = -1;                  // where the memory is; -1 = as the kernel likes
};

struct StagingStats {
  std::uint32_t slots = 0;
  std::uint32_t free_slots = 0;
  std::uint32_t prompt_limit = 0;  // most slots prompts may hold at once
  std::uint32_t prompt_slots = 0;
  std::uint32_t waiting = 0;
  bool locked = false;  // all that has been prepared, up to the limit
  std::string pages;    // "huge", "transparent huge" or "small"
  std::uint32_t chunks = 0;
  std::uint32_t ready_chunks = 0;
  std::uint64_t locked_bytes = 0;
  double prepare_s = 0;  // from opening until the last chunk was ready; so far, if one is not
  bool numa_bound = false;
};

class StagingState;

// A handle; copies share the pool. Thread-safe. Memory is freed when the pool and every slot are gone.
class StagingPool {
 public:
  // Throws Error(kInvalidArgument) when the bytes don't hold two slots, Error(kNoSpace) when mmap fails.
  StagingPool(const KvGeometry& geometry, const StagingOptions& options);

  std::uint64_t slot_bytes() const;
  std::span<std::byte> memory() const;
  // The first bytes of memory() that are prepared: whole slots of it can be in use, and are worth registering.
  std::uint64_t ready_bytes() const;
  int shared_fd() const;  // the memfd behind memory(), if it is shared; else -1
  StagingStats stats() const;
  // Null if no slot is free for this use, or if somebody is waiting already (FIFO).
  Slot try_acquire(SlotUse use);
  // All-or-nothing, first come first served within a use. `done` is called exactly once, on the thread that frees
  // the slots (or at once): with `count` slots, or with none after withdraw().
  // Throws Error(kInvalidArgument) when the pool can never satisfy the call.
  using Acquired = std::function<void(std::vector<Slot>)>;
  std::uint64_t acquire(std::uint32_t count, SlotUse use, Acquired done);
  // Ends a waiting acquire with no slots; nothing happens if it was served already.
  void withdraw(std::uint64_t ticket);
  // Called after slots became free and no waiter took them. One listener: the read queue.
  void on_free(std::function<void()> listener);

 private:
  std::shared_ptr<StagingState> state_;
};

}  // namespace dualkv
