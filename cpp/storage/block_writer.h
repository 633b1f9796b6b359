// BlockWriter: one thread that writes and publishes block files, so that saves never delay reads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "dualkv/operation.h"
#include "dualkv/staging.h"
#include "storage/block_directory.h"
#include "storage/block_format.h"
#include "storage/block_reader.h"

namespace dualkv {

// One save() of several blocks: done when the last is published, failed when the first fails.
struct SaveCall {
  Operation operation;
  std::atomic<std::uint64_t> left{1};  // blocks accepted and not published, and one for the caller

  void accepted() { ++left; }
  void published() {
    if (--left == 0) operation.milestones()->reach(0);
  }
  // The caller has submitted all its blocks.
  void submitted() { published(); }
};

struct SaveJob {
  TrailerInfo info;
  Slot slot;  // payload in place; padding and trailer are written by the writer
  std::shared_ptr<SaveCall> call;
};

struct SaveCounters {
  std::uint64_t blocks = 0, bytes = 0, errors = 0, evicted = 0;
};

// Owns its thread. Thread-safe. The destructor finishes what was accepted.
class BlockWriter {
 public:
  BlockWriter(const KvGeometry& geometry, const StoreOptions& options, const FileAccess& access,
              BlockDirectory& directory);
  ~BlockWriter();

  // Waits for room in the queue, at most until `deadline`; false if there was none.
  bool submit(SaveJob job, Clock::time_point deadline);
  // For slots the caller holds anyway: the staging pool bounds how many there can be.
  void submit(SaveJob job);
  // Marks blocks as used, on the writer's thread. Dropped if the queue is full.
  void touch(std::vector<Key> keys);
  SaveCounters counters() const;

 private:
  void enqueue(SaveJob job);
  void work();
  void save(SaveJob job);
  Status publish(const TrailerInfo& info, std::byte* image);
  void collect_if_due();

  const KvGeometry geometry_;
  const StoreOptions options_;
  const FileAccess access_;
  BlockDirectory& directory_;
  mutable std::mutex mutex_;
  std::condition_variable wanted_;
  std::condition_variable room_;
  std::deque<SaveJob> jobs_;
  std::deque<std::vector<Key>> touches_;
  bool stopping_ = false;
  SaveCounters counters_;
  std::uint64_t since_collect_ = 0;  // bytes; writer thread only
  std::thread thread_;
};

}  // namespace dualkv
