// Registrations: the memory that this node's NICs may read and write.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/worker.h"
#include "memory/gpu_slots.h"
#include "memory/known_memory.h"
#include "rdma/rail.h"

namespace dualkv {

// One range, registered with every rail. Immutable; ends when its last holder lets go of it.
class RdmaRegistration {
 public:
  // Throws Error. Blocking: pins all of the memory. Any thread.
  RdmaRegistration(std::span<const std::unique_ptr<Rail>> rails, std::span<std::byte> memory,
                   const RdmaOptions& options);
  // Of a GPU's memory: by dma-buf where its driver, the kernel and the NIC's driver have it, else by nvidia-peermem,
  // which makes it look like any memory.
  RdmaRegistration(std::span<const std::unique_ptr<Rail>> rails, const std::shared_ptr<const GpuMemory>& memory,
                   const RdmaOptions& options);
  ~RdmaRegistration();
  RdmaRegistration(const RdmaRegistration&) = delete;
  RdmaRegistration& operator=(const RdmaRegistration&) = delete;

  bool covers(const std::byte* data, std::uint64_t bytes) const {
    return data >= memory_.data() && data + bytes <= memory_.data() + memory_.size();
  }
  std::uint32_t local_key(std::size_t rail) const { return regions_[rail]->lkey; }
  std::uint32_t remote_key(std::size_t rail) const { return regions_[rail]->rkey; }
  bool by_dma_buf() const { return by_dma_buf_; }

 private:
  template <typename Register>
  void register_all(Register one);
  void end();

  std::span<const std::unique_ptr<Rail>> rails_;
  const std::shared_ptr<const void> keep_;
  const std::span<std::byte> memory_;
  std::vector<ibv_mr*> regions_;
  bool by_dma_buf_ = false;
};

// Registers ranges of KnownMemory when they are first asked for: small ones at once, large ones on the worker, as
// pinning takes seconds for a whole cache. A registration goes with its range, or to make room under the budget.
// Progress thread only.
class Registrations {
 public:
  // `note` counts a fallback. All must outlive it; the worker may still run its jobs afterwards.
  Registrations(Progress& progress, Worker& worker, const KnownMemory& known,
                std::span<const std::unique_ptr<Rail>> rails, const RdmaOptions& options,
                std::function<void(const std::string&)> note);
  ~Registrations();

  // Null if the bytes are in no known range, or that is not registered (yet).
  std::shared_ptr<const RdmaRegistration> find(const std::byte* data, std::uint64_t bytes);
  // Of a known range, made ahead. Does not count for the budget.
  void add(std::span<std::byte> memory, std::shared_ptr<const RdmaRegistration> registration);

 private:
  enum class State : std::uint8_t { kNone, kInWork, kRefused };
  struct Entry {
    std::shared_ptr<const RdmaRegistration> registration;
    std::uint64_t used = 0;
    std::uint64_t bytes = 0;
    State state = State::kNone;
  };
  // What the worker has made, kept here and not in a task for the progress thread: that may outlive the rails.
  struct Made {
    std::mutex mutex;
    std::vector<std::pair<std::uint64_t, std::shared_ptr<const RdmaRegistration>>> registrations;
  };
  bool make_room(std::uint64_t bytes);
  std::shared_ptr<const RdmaRegistration> begin(const KnownMemory::Range& range);
  std::shared_ptr<const RdmaRegistration> settle(std::uint64_t id, std::shared_ptr<const RdmaRegistration> made);
  void collect();
  void sweep();
  void tick();

  Progress& progress_;
  Worker& worker_;
  const KnownMemory& known_;
  const std::span<const std::unique_ptr<Rail>> rails_;
  const RdmaOptions options_;
  const std::function<void(const std::string&)> note_;
  std::unordered_map<std::uint64_t, Entry> entries_;
  std::uint64_t uses_ = 0;
  std::uint64_t registered_ = 0;
  Progress::TimerId timer_ = 0;
  const std::shared_ptr<Made> made_ = std::make_shared<Made>();
};

}  // namespace dualkv
