// io_uring backend: open and read into registered staging as one linked submission, batched by flush().
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <vector>

#include "base/fd.h"
#include "base/text.h"
#include "shim/uring.h"
#include "storage/block_reader.h"

namespace dualkv {

#ifdef DUALKV_HAVE_URING

namespace {

constexpr std::uint64_t kMaxBufferBytes = std::uint64_t{1} << 30;  // kernel limit of one registered buffer
constexpr std::uint64_t kBufferBytes = std::uint64_t{256} << 20;   // registered at once, if there are not too many
constexpr std::uint64_t kMaxBuffers = 16384;                       // kernel limit
constexpr auto kRetryPause = std::chrono::milliseconds(1);         // after the kernel took no submissions

// What the kernel refused, and the likely cure.
[[noreturn]] void refuse(int error) {
  const char* cure = error == EPERM || error == ENOSYS
                         ? "; allow it (sysctl kernel.io_uring_disabled=0, a seccomp profile that permits "
                           "io_uring_setup), or use backend='pread'"
                     : error == EINVAL || error == EBUSY
                         ? "; it opens files within the ring, which needs Linux 5.19: update, or use backend='pread'"
                         : "; raise the memlock limit or lower `depth`, or use backend='pread'";
  throw Error(Code::kUnsupported, text("io_uring is refused by the kernel", cure), error);
}

// The ring and what is registered with it.
class Ring {
 public:
  explicit Ring(std::uint32_t depth) {
    io_uring_params params{};
    params.flags = IORING_SETUP_CQSIZE;
    params.cq_entries = depth * 4;
    if (const int error = io_uring_queue_init_params(depth * 2, &ring_, &params); error < 0) refuse(-error);
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  io_uring* get() { return &ring_; }

 private:
  io_uring ring_{};
};

// One request: open into its own place in the ring's file table, and read run 0 from there, as one linked submission;
// then read run 1 if there is one. The next request's open replaces the file, so a block costs two operations and one
// completion; idle() closes what is left.
class UringReader : public BlockReader {
 public:
  UringReader(const KvGeometry& geometry, const FileAccess& access, const StagingPool& pool, std::uint32_t depth,
              std::shared_ptr<Registration> registration)
      : geometry_(geometry),
        access_(access),
        pool_(pool),
        memory_(pool_.memory()),
        registration_(std::move(registration)),
        entries_(depth),
        event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
        ring_(depth) {
    if (const int error = io_uring_register_eventfd(ring_.get(), event_.get()); error < 0) refuse(-error);
    const std::vector<int> files(depth, -1);
    if (const int error = io_uring_register_files(ring_.get(), files.data(), depth); error < 0) refuse(-error);
    probe_files();
    reserve_buffers();
    register_ready();
    for (std::uint32_t i = depth; i-- > 0;) free_.push_back(i);
  }

  bool drain(Clock::time_point deadline) noexcept override {
    while (free_.size() < entries_.size()) {
      const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
      if (left <= 0) return false;
      submit();
      __kernel_timespec wait{left / 1'000'000'000, left % 1'000'000'000};
      io_uring_cqe* cqe = nullptr;
      const int error = io_uring_wait_cqe_timeout(ring_.get(), &cqe, &wait);
      if (error < 0 && error != -EINTR) return false;
      reap(/*restart=*/false);
    }
    return true;
  }

  bool try_submit(const ReadRequest& request) noexcept override {
    if (free_.empty()) return false;
    register_ready();
    const std::uint32_t index = free_.back();
    free_.pop_back();
    Entry& entry = entries_[index];
    entry = {request, file_runs(geometry_, request.layers, request.trailer), 0, 0, 0, entry.generation + 1, false};
    open_and_read(index);
    return true;
  }

  void flush() noexcept override { submit(); }

  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
    eventfd_t count;
    eventfd_read(event_.get(), &count);
    reap(/*restart=*/true);
    std::size_t taken = 0;
    while (taken < out.size() && !done_.empty()) {
      out[taken++] = done_.front();
      done_.pop_front();
    }
    if (!done_.empty()) eventfd_write(event_.get(), 1);
    submit();
    return taken;
  }

  int event_fd() const override { return event_.get(); }

  std::optional<Clock::time_point> next_wake() const override {
    if (!refused_) return std::nullopt;
    return Clock::now() + kRetryPause;
  }

  void idle() noexcept override {
    bool any = false;
    for (std::uint32_t index = 0; index < entries_.size(); ++index) {
      if (!entries_[index].opened || std::find(free_.begin(), free_.end(), index) == free_.end()) continue;
      std::erase(free_, index);
      io_uring_sqe* sqe = next_sqe(1);
      io_uring_prep_close_direct(sqe, index);
      io_uring_sqe_set_data64(sqe, tag(Step::kClose, index));
      any = true;
    }
    if (any) submit();
  }

 private:
  enum class Step : std::uint8_t { kOpen, kRead, kClose };
  struct Entry {
    ReadRequest request;
    FileRuns runs;
    int run = 0;                   // being read
    std::uint64_t run_done = 0;    // bytes of it that arrived
    std::uint64_t bytes = 0;       // of all runs
    std::uint32_t generation = 0;  // tells this request's completions from those of earlier ones
    bool opened = false;           // the entry's place in the file table holds a file
  };

  std::uint64_t tag(Step step, std::uint32_t index) const {
    return std::uint64_t{entries_[index].generation} << 32 | std::uint64_t{index} << 8 |
           static_cast<std::uint8_t>(step);
  }

  // A slot must lie in one buffer, so buffers hold whole slots.
  void reserve_buffers() {
    const std::uint64_t slot = geometry_.file_bytes();
    const std::uint64_t wanted = std::max({kBufferBytes, slot, memory_.size() / (kMaxBuffers / 2)});
    buffer_bytes_ = wanted / slot * slot;
    buffers_ = static_cast<std::uint32_t>((memory_.size() + buffer_bytes_ - 1) / buffer_bytes_);
    const bool fits = buffer_bytes_ <= kMaxBufferBytes && buffers_ <= kMaxBuffers;
    if (!fits || io_uring_register_buffers_sparse(ring_.get(), buffers_) < 0) registration_->refused = true;
  }

  // Registers the buffers whose memory has been prepared since the last time.
  void register_ready() {
    const std::uint64_t ready = std::min<std::uint64_t>(pool_.ready_bytes(), memory_.size());
    while (!registration_->refused && registration_->buffers < buffers_) {
      const std::uint32_t next = registration_->buffers;
      const std::uint64_t first = next * buffer_bytes_;
      const std::uint64_t bytes = std::min(buffer_bytes_, memory_.size() - first);
      if (first + bytes > ready) return;
      const auto begin = Clock::now();
      const iovec memory{memory_.data() + first, bytes};
      if (io_uring_register_buffers_update_tag(ring_.get(), next, &memory, nullptr, 1) != 1) {
        registration_->refused = true;
        return;
      }
      ++registration_->buffers;
      registration_->bytes += bytes;
      registration_->ns += static_cast<std::uint64_t>((Clock::now() - begin).count());
    }
  }

  // Opens a directory twice into one place and closes it: what the reads will do, so that a kernel too old for it is
  // found out now.
  void probe_files() {
    for (int step = 0; step < 3; ++step) {
      io_uring_sqe* sqe = next_sqe(1);
      if (step < 2) {
        io_uring_prep_openat_direct(sqe, access_.directory_fd, ".", O_RDONLY | O_DIRECTORY, 0, 0);
      } else {
        io_uring_prep_close_direct(sqe, 0);
      }
      io_uring_submit(ring_.get());
      io_uring_cqe* cqe = nullptr;
      const int error = io_uring_wait_cqe(ring_.get(), &cqe);
      if (error < 0) refuse(-error);
      const int result = cqe->res;
      io_uring_cqe_seen(ring_.get(), cqe);
      if (result < 0) refuse(-result);
    }
  }

  // `together`: submissions that must go in one batch, because they are linked.
  io_uring_sqe* next_sqe(unsigned together) {
    while (io_uring_sq_space_left(ring_.get()) < together) io_uring_submit(ring_.get());
    return io_uring_get_sqe(ring_.get());
  }

  // What the kernel does not take now (no memory, too many completions waiting) stays queued.
  void submit() {
    const int taken = io_uring_submit(ring_.get());
    refused_ = taken < 0;
  }

  void open_and_read(std::uint32_t index) {
    Entry& entry = entries_[index];
    const int flags = O_RDONLY | (access_.direct ? O_DIRECT : 0);  // the file table is never inherited
    io_uring_sqe* sqe = next_sqe(2);
    io_uring_prep_openat_direct(sqe, access_.directory_fd, entry.request.path.c_str(), flags, 0, index);
    sqe->flags |= IOSQE_IO_LINK | IOSQE_CQE_SKIP_SUCCESS;
    io_uring_sqe_set_data64(sqe, tag(Step::kOpen, index));
    entry.opened = true;
    read(index);
  }

  void read(std::uint32_t index) {
    Entry& entry = entries_[index];
    const FileRuns::Run& run = entry.runs.runs[entry.run];
    const std::uint64_t offset = run.offset + entry.run_done;
    std::byte* target = entry.request.slot + offset;
    const auto bytes = static_cast<unsigned>(std::min<std::uint64_t>(run.bytes - entry.run_done, kMaxBufferBytes));
    io_uring_sqe* sqe = next_sqe(1);
    const std::uint64_t place = static_cast<std::uint64_t>(target - memory_.data());  // huge if it is not in there
    const std::uint64_t buffer = place / buffer_bytes_;
    if (buffer < registration_->buffers) {
      io_uring_prep_read_fixed(sqe, static_cast<int>(index), target, bytes, offset, static_cast<int>(buffer));
    } else {
      io_uring_prep_read(sqe, static_cast<int>(index), target, bytes, offset);
    }
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, tag(Step::kRead, index));
  }

  void reap(bool restart) {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(ring_.get(), &cqe) == 0) {
      const std::uint64_t tag = io_uring_cqe_get_data64(cqe);
      const int result = cqe->res;
      io_uring_cqe_seen(ring_.get(), cqe);
      const auto index = static_cast<std::uint32_t>(tag >> 8 & 0xffffff);
      if (tag >> 32 != entries_[index].generation) continue;  // cancelled with an open that failed
      switch (static_cast<Step>(tag & 0xff)) {
        case Step::kOpen: on_open_failed(index, result, restart); break;
        case Step::kRead: on_read(index, result, restart); break;
        case Step::kClose: on_closed(index); break;
      }
    }
  }

  void on_open_failed(std::uint32_t index, int result, bool restart) {
    // The linked read is cancelled, and may or may not say so. The file before this one, if any, is still in its place.
    ++entries_[index].generation;
    if (restart && (result == -EINTR || result == -EAGAIN)) return open_and_read(index);
    finish(index, {result == -ENOENT ? Code::kNotFound : Code::kIo, -result});
  }

  void on_closed(std::uint32_t index) {
    entries_[index].opened = false;
    free_.push_back(index);
  }

  void on_read(std::uint32_t index, int result, bool restart) {
    Entry& entry = entries_[index];
    const bool again = result == -EINTR || result == -EAGAIN;
    if (result < 0 && !again) return finish(index, {Code::kIo, -result});
    const FileRuns::Run& run = entry.runs.runs[entry.run];
    if (!again) {
      entry.run_done += static_cast<std::uint64_t>(result);
      entry.bytes += static_cast<std::uint64_t>(result);
    }
    if (entry.run_done == run.bytes) {
      if (++entry.run == entry.runs.count) return finish(index, {});
      entry.run_done = 0;
    } else if (!again && (result == 0 || entry.run_done % KvGeometry::kPageBytes != 0)) {
      // A short read goes on where it stopped, unless the file ends there: then the block is torn.
      return finish(index, {Code::kCorrupt, 0});
    }
    if (!restart) return finish(index, {Code::kCancelled, 0});
    read(index);
  }

  void finish(std::uint32_t index, Outcome outcome) {
    done_.push_back({entries_[index].request.id, outcome, entries_[index].bytes});
    free_.push_back(index);
  }

  const KvGeometry geometry_;
  const FileAccess access_;
  const StagingPool pool_;
  const std::span<std::byte> memory_;
  const std::shared_ptr<Registration> registration_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> free_;
  std::deque<ReadCompletion> done_;
  std::uint64_t buffer_bytes_ = 0;
  std::uint32_t buffers_ = 0;  // that all of the memory makes
  bool refused_ = false;       // the kernel did not take the last submissions
  Fd event_;
  Ring ring_;
};

}  // namespace

std::unique_ptr<BlockReader> make_uring_reader(const KvGeometry& geometry, const FileAccess& access,
                                               const StagingPool& pool, std::uint32_t depth,
                                               std::shared_ptr<Registration> registration) {
  return std::make_unique<UringReader>(geometry, access, pool, depth, std::move(registration));
}

#else

std::unique_ptr<BlockReader> make_uring_reader(const KvGeometry&, const FileAccess&, const StagingPool&, std::uint32_t,
                                               std::shared_ptr<Registration>) {
  throw Error(Code::kUnsupported,
              "this build has no io_uring: install liburing's headers (Debian: apt install liburing-dev) and "
              "reinstall dualkv, or use backend='pread'");
}

#endif

}  // namespace dualkv
