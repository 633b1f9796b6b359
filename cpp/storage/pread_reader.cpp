// The oracle backend: a few threads that pread. Also the fallback where io_uring is not allowed.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "storage/block_reader.h"

namespace dualkv {

FileRuns file_runs(const KvGeometry& geometry, LayerRange layers, bool trailer) {
  constexpr std::uint64_t kPage = KvGeometry::kPageBytes;
  const std::uint64_t begin = geometry.layer_offset(layers.first) / kPage * kPage;
  const std::uint64_t end = (geometry.layer_offset(layers.first + layers.count) + kPage - 1) / kPage * kPage;
  if (!trailer) return {{{begin, end - begin}, {}}, 1};
  if (end == geometry.payload_bytes()) return {{{begin, geometry.file_bytes() - begin}, {}}, 1};
  return {{{begin, end - begin}, {geometry.payload_bytes(), geometry.trailer_bytes()}}, 2};
}

namespace {

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

class PreadReader : public BlockReader {
 public:
  PreadReader(const KvGeometry& geometry, const FileAccess& access, std::uint32_t depth)
      : geometry_(geometry), access_(access), depth_(depth), event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    const unsigned threads = std::min(depth, 4u);
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~PreadReader() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wanted_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  bool try_submit(const ReadRequest& request) noexcept override {
    const std::lock_guard lock(mutex_);
    if (in_flight_ == depth_) return false;
    ++in_flight_;
    queue_.push_back(request);
    return true;
  }

  void flush() noexcept override { wanted_.notify_all(); }

  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
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

  int event_fd() const override { return event_.get(); }

  bool drain(Clock::time_point deadline) noexcept override {
    std::unique_lock lock(mutex_);
    stopping_ = true;  // queued requests are not begun
    return idle_.wait_until(lock, deadline, [this] { return reading_ == 0; });
  }

 private:
  void work() {
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
      completion.outcome = read(request, &completion.bytes);
      const std::lock_guard lock(mutex_);
      --reading_;
      done_.push_back(completion);
      eventfd_write(event_.get(), 1);
      idle_.notify_all();
    }
  }

  Outcome read(const ReadRequest& request, std::uint64_t* bytes) const {
    const int flags = O_RDONLY | O_CLOEXEC | (access_.direct ? O_DIRECT : 0);
    const Fd fd(openat(access_.directory_fd, request.path.c_str(), flags));
    if (!fd.valid()) return {errno == ENOENT ? Code::kNotFound : Code::kIo, errno};
    const FileRuns runs = file_runs(geometry_, request.layers, request.trailer);
    for (int i = 0; i < runs.count; ++i) {
      const Outcome outcome = read_fully(fd.get(), request.slot, runs.runs[i], bytes);
      if (!outcome.ok()) return outcome;
    }
    return {};
  }

  const KvGeometry geometry_;
  const FileAccess access_;
  const std::uint32_t depth_;
  Fd event_;
  std::mutex mutex_;
  std::condition_variable wanted_;
  std::condition_variable idle_;
  std::deque<ReadRequest> queue_;
  std::vector<ReadCompletion> done_;
  std::uint32_t in_flight_ = 0;
  std::uint32_t reading_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<BlockReader> make_pread_reader(const KvGeometry& geometry, const FileAccess& access,
                                               std::uint32_t depth) {
  return std::make_unique<PreadReader>(geometry, access, depth);
}

}  // namespace dualkv
