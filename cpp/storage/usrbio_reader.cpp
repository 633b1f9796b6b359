// 3FS backend: reads through USRBIO, past FUSE's limits. 3FS reads into memory of its own kind, shared with its FUSE
// process and registered with the NIC there; blocks are copied from it to the staging. One thread opens files and
// submits, another takes what is done: the two that the library allows.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "base/text.h"
#include "shim/usrbio.h"
#include "storage/block_reader.h"

namespace dualkv {

namespace {

constexpr int kMostRuns = 2;  // of a request
constexpr auto kWait = std::chrono::milliseconds(50);
constexpr auto kGrace = std::chrono::seconds(1);

std::string path_of(int directory) {
  std::array<char, 4096> path{};
  const ssize_t size = readlink(text("/proc/self/fd/", directory).c_str(), path.data(), path.size() - 1);
  if (size < 0) throw Error(Code::kIo, "store: the directory's path, in /proc/self/fd", errno);
  return path.data();
}

class UsrbioReader : public BlockReader {
 public:
  UsrbioReader(const usrbio::Library& library, const KvGeometry& geometry, const FileAccess& access,
               std::uint32_t depth)
      : library_(library),
        geometry_(geometry),
        access_(access),
        jobs_(depth),
        event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    std::array<char, 256> mount{};
    const std::string path = path_of(access.directory_fd);
    const int length = library.extract_mount_point(mount.data(), mount.size(), path.c_str());
    if (length < 0 || static_cast<std::size_t>(length) > mount.size()) {
      throw Error(Code::kUnsupported, text("store: backend 'usrbio': '", path, "' is on no mounted 3FS"));
    }
    const std::uint64_t bytes = depth * geometry.file_bytes();
    if (const int result = library.iov_create(&iov_, mount.data(), bytes, 0, -1); result != 0) {
      throw Error(Code::kUnsupported, text("store: 3FS gives no memory of ", bytes, " bytes (hf3fs_iovcreate)"),
                  -result);
    }
    if (const int result =
            library.ior_create(&ior_, mount.data(), static_cast<int>(depth) * kMostRuns, true, 0, 0, -1, 0);
        result != 0) {
      library.iov_destroy(&iov_);
      throw Error(Code::kUnsupported, "store: 3FS gives no ring (hf3fs_iorcreate4)", -result);
    }
    for (std::uint32_t i = 0; i < depth; ++i) {
      jobs_[i].buffer = iov_.base + i * geometry.file_bytes();
      free_.push_back(&jobs_[i]);
    }
    submitter_ = std::thread([this] { submit_all(); });
    try {
      reaper_ = std::thread([this] { reap_all(); });
    } catch (...) {
      stop(/*abandon=*/true);
      submitter_.join();
      throw;
    }
  }

  ~UsrbioReader() override {
    stop(/*abandon=*/true);
    submitter_.join();
    reaper_.join();
    for (const Job& job : jobs_) {
      if (job.file.valid()) library_.dereg_fd(job.file.get());  // else the next file of this number is refused
    }
    // What 3FS still reads goes to its own memory, which then stays.
    if (under_way_ > 0) return;
    library_.ior_destroy(&ior_);
    library_.iov_destroy(&iov_);
  }

  bool try_submit(const ReadRequest& request) noexcept override {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return false;
    Job* job = free_.back();
    free_.pop_back();
    job->request = request;
    job->outcome = {};
    job->bytes = 0;
    queue_.push_back(job);
    return true;
  }

  void flush() noexcept override { changed_.notify_all(); }

  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
    const std::lock_guard lock(mutex_);
    eventfd_t count;
    eventfd_read(event_.get(), &count);
    const std::size_t taken = std::min(out.size(), done_.size());
    for (std::size_t i = 0; i < taken; ++i) {
      Job* job = done_[i];
      out[i] = {job->request.id, job->outcome, job->bytes};
      free_.push_back(job);
    }
    done_.erase(done_.begin(), done_.begin() + static_cast<std::ptrdiff_t>(taken));
    if (!done_.empty()) eventfd_write(event_.get(), 1);
    return taken;
  }

  int event_fd() const override { return event_.get(); }

  // Slots are written by the reaper's copies only; what 3FS has may end a little later, so that its memory can be
  // freed.
  bool drain(Clock::time_point deadline) noexcept override {
    stop(/*abandon=*/false);
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, std::min(deadline, Clock::now() + kGrace), [this] { return under_way_ == 0; });
    return changed_.wait_until(lock, deadline, [this] { return copying_ == 0; });
  }

 private:
  struct Job {
    ReadRequest request;
    std::uint8_t* buffer = nullptr;
    Fd file;
    int runs_left = 0;
    Outcome outcome;
    std::uint64_t bytes = 0;
  };

  void stop(bool abandon) {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    abandoned_ = abandon;
    changed_.notify_all();
  }

  void submit_all() {
    std::vector<Job*> batch;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (stopping_) return;
        batch.assign(queue_.begin(), queue_.end());
        queue_.clear();
      }
      for (Job* job : batch) begin(*job);
      library_.submit(&ior_);  // a hint: what was prepared runs without it too, later
    }
  }

  void begin(Job& job) {
    job.file = Fd(openat(access_.directory_fd, job.request.path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!job.file.valid()) {
      return finish(job, {errno == ENOENT ? Code::kNotFound : Code::kIo, errno});
    }
    if (const int error = library_.reg_fd(job.file.get(), 0); error > 0) {
      job.file = Fd();
      return finish(job, {Code::kIo, error});
    }
    const FileRuns runs = file_runs(geometry_, job.request.layers, job.request.trailer);
    {
      const std::lock_guard lock(mutex_);
      job.runs_left = runs.count;
      under_way_ += static_cast<std::size_t>(runs.count);
    }
    changed_.notify_all();
    for (int i = 0; i < runs.count; ++i) {
      const FileRuns::Run& run = runs.runs[i];
      const int index =
          library_.prep_io(&ior_, &iov_, true, job.buffer + run.offset, job.file.get(), run.offset, run.bytes, &job);
      if (index < 0) completed(job, index);
    }
  }

  void reap_all() {
    std::vector<usrbio::Completion> completions(jobs_.size() * kMostRuns);
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return stopping_ || under_way_ > 0; });
        if (abandoned_ || (stopping_ && under_way_ == 0)) return;
      }
      timespec until{};
      clock_gettime(CLOCK_REALTIME, &until);
      const long ns = until.tv_nsec + std::chrono::nanoseconds(kWait).count();
      until.tv_sec += ns / 1'000'000'000;
      until.tv_nsec = ns % 1'000'000'000;
      const int count = library_.wait(&ior_, completions.data(), static_cast<int>(completions.size()), 1, &until);
      for (int i = 0; i < count; ++i) {
        auto& job = *static_cast<Job*>(const_cast<void*>(completions[static_cast<std::size_t>(i)].userdata));
        completed(job, completions[static_cast<std::size_t>(i)].result);
      }
      if (count < 0 && count != -EINTR && count != -ETIMEDOUT) std::this_thread::sleep_for(kWait);
    }
  }

  // One run: `result` bytes, or -errno.
  void completed(Job& job, std::int64_t result) {
    const FileRuns runs = file_runs(geometry_, job.request.layers, job.request.trailer);
    bool copies;
    {
      const std::lock_guard lock(mutex_);
      --under_way_;
      if (result < 0 && job.outcome.ok()) job.outcome = {Code::kIo, static_cast<int>(-result)};
      if (result > 0) job.bytes += static_cast<std::uint64_t>(result);
      if (--job.runs_left > 0) return;
      // Shorter than its geometry.
      if (job.outcome.ok() && job.bytes != runs.bytes()) job.outcome = {Code::kCorrupt, 0};
      copies = job.outcome.ok() && !stopping_;
      copying_ += copies;
    }
    library_.dereg_fd(job.file.get());
    job.file = Fd();
    for (int i = 0; copies && i < runs.count; ++i) {
      std::memcpy(job.request.slot + runs.runs[i].offset, job.buffer + runs.runs[i].offset, runs.runs[i].bytes);
    }
    finish(job, job.outcome, copies);
  }

  void finish(Job& job, Outcome outcome, bool copied = false) {
    const std::lock_guard lock(mutex_);
    copying_ -= copied;
    job.outcome = outcome;
    done_.push_back(&job);
    eventfd_write(event_.get(), 1);
    changed_.notify_all();
  }

  const usrbio::Library& library_;
  const KvGeometry geometry_;
  const FileAccess access_;
  usrbio::Iov iov_{};
  usrbio::Ior ior_{};
  std::vector<Job> jobs_;
  Fd event_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::vector<Job*> free_, done_;
  std::deque<Job*> queue_;
  std::size_t under_way_ = 0;  // runs that 3FS has
  int copying_ = 0;            // to slots
  bool stopping_ = false;      // no read begins, nothing more is copied
  bool abandoned_ = false;     // what 3FS has is left to it
  std::thread submitter_, reaper_;
};

}  // namespace

std::unique_ptr<BlockReader> make_usrbio_reader(const KvGeometry& geometry, const FileAccess& access,
                                                std::uint32_t depth) {
  std::string why;
  const usrbio::Library* library = usrbio::library(&why);
  if (library == nullptr) throw Error(Code::kUnsupported, "store: backend 'usrbio': " + why);
  return std::make_unique<UsrbioReader>(*library, geometry, access, depth);
}

}  // namespace dualkv
