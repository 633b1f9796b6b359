// The threads, and reads by pread.
#include "storage/threaded_reader.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace dualkv {

ThreadedReader::ThreadedReader(std::uint32_t depth, unsigned threads, Read read)
    : depth_(depth), read_(std::move(read)), event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  for (unsigned i = 0; i < std::min(depth, threads); ++i) threads_.emplace_back([this] { work(); });
}

ThreadedReader::~ThreadedReader() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool ThreadedReader::try_submit(const ReadRequest& request) noexcept {
  const std::lock_guard lock(mutex_);
  if (in_flight_ == depth_) return false;
  ++in_flight_;
  queue_.push_back(request);
  return true;
}

std::size_t ThreadedReader::poll(std::span<ReadCompletion> out) noexcept {
  const std::lock_guard lock(mutex_);
  eventfd_t count;
  eventfd_read(event_.get(), &count);
  const std::size_t taken = std::min(out.size(), done_.size());
  std::copy_n(done_.begin(), taken, out.begin());
  done_.erase(done_.begin(), done_.begin() + static_cast<std::ptrdiff_t>(taken));
  in_flight_ -= static_cast<std::uint32_t>(taken);
  if (!done_.empty()) eventfd_write(event_.get(), 1);
  return taken;
}

bool ThreadedReader::drain(Clock::time_point deadline) noexcept {
  std::unique_lock lock(mutex_);
  stopping_ = true;  // queued requests are not begun
  return idle_.wait_until(lock, deadline, [this] { return reading_ == 0; });
}

void ThreadedReader::work() {
  for (;;) {
    ReadRequest request;
    {
      std::unique_lock lock(mutex_);
      wanted_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      request = std::move(queue_.front());
      queue_.pop_front();
      ++reading_;
    }
    ReadCompletion completion{request.id, {}, 0};
    completion.outcome = read_(request, &completion.bytes);
    const std::lock_guard lock(mutex_);
    --reading_;
    done_.push_back(completion);
    eventfd_write(event_.get(), 1);
    idle_.notify_all();
  }
}

Outcome read_fully(int fd, std::byte* target, FileRuns::Run run, std::uint64_t* bytes) {
  std::uint64_t done = 0;
  while (done < run.bytes) {
    const ssize_t got = pread(fd, target + run.offset + done, run.bytes - done, static_cast<off_t>(run.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return {Code::kIo, errno};
    if (got == 0) return {Code::kCorrupt, 0};  // shorter than its geometry
    done += static_cast<std::uint64_t>(got);
    *bytes += static_cast<std::uint64_t>(got);
  }
  return {};
}

Fd open_block(const FileAccess& access, const ReadRequest& request) {
  const int flags = O_RDONLY | O_CLOEXEC | (access.direct ? O_DIRECT : 0);
  return Fd(openat(access.directory_fd, request.path.c_str(), flags));
}

}  // namespace dualkv
