// ThreadedReader: a reader of a few threads, each of which reads one request at a time.
#pragma once

#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "storage/block_reader.h"

namespace dualkv {

class ThreadedReader : public BlockReader {
 public:
  // Blocks; adds what it read to `bytes`. Called on several threads at once.
  using Read = std::function<Outcome(const ReadRequest& request, std::uint64_t* bytes)>;

  ThreadedReader(std::uint32_t depth, unsigned threads, Read read);
  ~ThreadedReader() override;

  bool try_submit(const ReadRequest& request) noexcept override;
  void flush() noexcept override { wanted_.notify_all(); }
  std::size_t poll(std::span<ReadCompletion> out) noexcept override;
  int event_fd() const override { return event_.get(); }
  bool drain(Clock::time_point deadline) noexcept override;

 private:
  void work();

  const std::uint32_t depth_;
  const Read read_;
  Fd event_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wanted_, idle_;
  std::deque<ReadRequest> queue_;
  std::vector<ReadCompletion> done_;
  std::uint32_t in_flight_ = 0;
  std::uint32_t reading_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Reads `run` of the file to the same offset of `target`.
Outcome read_fully(int fd, std::byte* target, FileRuns::Run run, std::uint64_t* bytes);
// The file of a request, opened as the store wants it; invalid, with errno, where that fails.
Fd open_block(const FileAccess& access, const ReadRequest& request);
// Of an open that failed.
inline Outcome open_failed(int error) { return {error == ENOENT ? Code::kNotFound : Code::kIo, error}; }

}  // namespace dualkv
