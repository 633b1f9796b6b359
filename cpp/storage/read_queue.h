// ReadQueue: FIFO of block reads of one node - finds each a slot, submits, verifies, accounts.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>

#include "base/progress.h"
#include "base/rate_meter.h"
#include "dualkv/keys.h"
#include "dualkv/staging.h"
#include "memory/gpu_staging.h"
#include "storage/block_directory.h"
#include "storage/block_reader.h"

namespace dualkv {

// The trailer of a block that is read in pieces: read once, with the first of them.
struct BlockTrailer {
  std::vector<std::byte> bytes;  // empty until it is known and right
};

struct ReadResult {
  Outcome outcome;
  std::string reason;             // of a failure: what is wrong with the block
  Slot slot;                      // holds the verified layers and the trailer
  FreePieces::Piece gpu_slot;     // if not null: the layers are there, at the same offsets, and not verified
  Clock::duration verify_time{};  // spent on checksums
};

struct ReadJob {
  std::uint64_t owner = 0;  // for cancel()
  Key key;
  LayerRange layers;
  Slot slot;                              // null: one is taken from the pool when the job's turn comes
  std::shared_ptr<BlockTrailer> trailer;  // shared by the jobs of a block; null if this is the only one
  std::function<void(ReadResult)> done;   // on the progress thread
  GpuStaging* gpu = nullptr;              // where the layers go, unless all its slots are out
};

struct ReadCounters {
  std::uint64_t blocks = 0, bytes = 0, errors = 0, corrupt = 0;
  std::uint64_t queue_bytes = 0;
  RateEstimate bandwidth;
};

// Lives on the progress thread. Slots of submitted reads are held until the backend is done with them, also when the
// owner has cancelled.
class ReadQueue {
 public:
  // Everything passed by reference must outlive the queue.
  ReadQueue(Progress& progress, const KvGeometry& geometry, BlockDirectory& directory, StagingPool pool,
            std::unique_ptr<BlockReader> reader);
  ~ReadQueue();

  // Drops what is waiting and waits (seconds at most) for what the kernel has. Later calls do nothing.
  void close();
  void submit(ReadJob job);
  // Starts what was submitted, as far as slots and the backend allow.
  void pump();
  // Forgets the owner's jobs: their callbacks are not called.
  void cancel(std::uint64_t owner);
  // Safe from any thread.
  ReadCounters counters() const;

 private:
  struct Running {
    ReadJob job;
    bool with_trailer;
    FreePieces::Piece gpu_slot;
  };
  bool start(ReadJob& job);
  void poll();
  void complete(const ReadCompletion& completion);
  // Empty if the bytes are right; else what is wrong.
  std::string verify(const Running& running, std::byte* slot);
  void schedule_wake();

  Progress& progress_;
  const KvGeometry geometry_;
  BlockDirectory& directory_;
  StagingPool pool_;
  std::unique_ptr<BlockReader> reader_;
  std::deque<ReadJob> waiting_;
  std::unordered_map<std::uint64_t, Running> running_;
  std::uint64_t next_id_ = 1;
  Progress::TimerId wake_ = 0;
  Clock::time_point wake_at_{};
  RateMeter meter_;
  mutable std::mutex counters_mutex_;
  ReadCounters counters_;
};

}  // namespace dualkv
