// StoreState: what stands behind a Store - directory, read queue, writer - and the inside view a Node uses.
#pragma once

#include <atomic>
#include <memory>

#include "base/fallbacks.h"
#include "base/progress.h"
#include "dualkv/store.h"
#include "storage/block_directory.h"
#include "storage/block_writer.h"
#include "storage/read_queue.h"

namespace dualkv {

// Read owners are numbers unique in the process, so that cancel() hits one caller's jobs only.
std::uint64_t next_owner();

// reads() only on the progress thread.
class StoreState : public std::enable_shared_from_this<StoreState> {
 public:
  // `reads_to_gpus`: reads may have a GpuStaging.
  StoreState(const KvGeometry& geometry, const StoreOptions& options, const StagingPool& pool,
             std::shared_ptr<Progress> progress, bool reads_to_gpus = false);
  ~StoreState();
  StoreState(const StoreState&) = delete;
  StoreState& operator=(const StoreState&) = delete;
  // Once, after construction: lets freed slots wake the read queue.
  void listen();
  // Ends the read queue on the progress thread. Idempotent; also done by the destructor.
  void close();
  bool closed() const { return closed_; }

  Progress& progress() { return *progress_; }
  ReadQueue& reads() { return *reads_; }
  BlockDirectory& directory() { return directory_; }
  BlockWriter& writer() { return *writer_; }
  const KvGeometry& geometry() const { return geometry_; }
  const StagingPool& pool() const { return pool_; }
  const StoreOptions& options() const { return options_; }
  StoreStats stats() const;

 private:
  std::unique_ptr<BlockReader> make_reader(bool reads_to_gpus);

  const KvGeometry geometry_;
  const StoreOptions options_;
  StagingPool pool_;
  std::shared_ptr<Progress> progress_;
  Fallbacks fallbacks_;
  BlockDirectory directory_;
  FileAccess access_;
  std::string backend_;
  const std::shared_ptr<Registration> registration_ = std::make_shared<Registration>();
  std::atomic<bool> closed_{false};
  std::shared_ptr<ReadQueue> reads_;
  std::unique_ptr<BlockWriter> writer_;
};

}  // namespace dualkv
