// io_uring backend: open, read into registered staging, close - all through the ring, batched by flush().
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

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
constexpr std::size_t kMaxBuffers = 1024;                          // UIO_MAXIOV, the limit of older kernels
constexpr std::uint64_t kCloseTag = ~std::uint64_t{0};

// What the kernel refused, and the likely cure.
[[noreturn]] void refuse(int error) {
  const char* cure = error == EPERM || error == ENOSYS
                         ? "; allow it (sysctl kernel.io_uring_disabled=0, a seccomp profile that permits "
                           "io_uring_setup), or use backend='pread'"
                         : "; raise the memlock limit or lower `depth`, or use backend='pread'";
  throw Error(Code::kUnsupported, text("io_uring is refused by the kernel", cure), error);
}

// One request moves through open -> read run 0 -> read run 1 -> done; its close is not waited for.
class UringReader : public BlockReader {
 public:
  UringReader(const KvGeometry& geometry, const FileAccess& access, std::span<std::byte> memory, std::uint32_t depth,
              bool* registered)
      : geometry_(geometry),
        access_(access),
        memory_(memory),
        entries_(depth),
        event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    io_uring_params params{};
    params.flags = IORING_SETUP_CQSIZE;
    params.cq_entries = depth * 8;  // an entry has one operation in flight plus closes of earlier ones
    const int error = io_uring_queue_init_params(depth * 2, &ring_, &params);
    if (error < 0) refuse(-error);
    if (const int e = io_uring_register_eventfd(&ring_, event_.get()); e < 0) {
      io_uring_queue_exit(&ring_);
      refuse(-e);
    }
    *registered = register_memory();
    for (std::uint32_t i = depth; i-- > 0;) free_.push_back(i);
  }

  ~UringReader() override { io_uring_queue_exit(&ring_); }

  bool drain(Clock::time_point deadline) noexcept override {
    while (free_.size() < entries_.size() || closing_ > 0) {
      const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
      if (left <= 0) return false;
      io_uring_submit(&ring_);
      __kernel_timespec wait{left / 1'000'000'000, left % 1'000'000'000};
      io_uring_cqe* cqe = nullptr;
      const int error = io_uring_wait_cqe_timeout(&ring_, &cqe, &wait);
      if (error < 0 && error != -EINTR) return false;
      reap(/*restart=*/false);
    }
    return true;
  }

  bool try_submit(const ReadRequest& request) noexcept override {
    if (free_.empty()) return false;
    const std::uint32_t index = free_.back();
    free_.pop_back();
    entries_[index] = {request, file_runs(geometry_, request.layers), 0, 0, 0, -1};
    submit_open(index);
    return true;
  }

  void flush() noexcept override { io_uring_submit(&ring_); }

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
    io_uring_submit(&ring_);
    return taken;
  }

  int event_fd() const override { return event_.get(); }

 private:
  struct Entry {
    ReadRequest request;
    FileRuns runs;
    int run = 0;                 // being read
    std::uint64_t run_done = 0;  // bytes of it that arrived
    std::uint64_t bytes = 0;     // of all runs
    int fd = -1;
  };

  bool register_memory() {
    // A slot must lie in one buffer, so buffers hold whole slots.
    const std::uint64_t slot = geometry_.file_bytes();
    if (slot > kMaxBufferBytes) return false;
    buffer_bytes_ = kMaxBufferBytes / slot * slot;
    std::vector<iovec> buffers;
    for (std::uint64_t at = 0; at < memory_.size(); at += buffer_bytes_) {
      buffers.push_back({memory_.data() + at, std::min<std::size_t>(buffer_bytes_, memory_.size() - at)});
    }
    if (buffers.size() > kMaxBuffers) return false;
    registered_ = io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(buffers.size())) == 0;
    return registered_;
  }

  io_uring_sqe* next_sqe() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (sqe == nullptr) {
      io_uring_submit(&ring_);
      sqe = io_uring_get_sqe(&ring_);
    }
    return sqe;
  }

  void submit_open(std::uint32_t index) {
    Entry& entry = entries_[index];
    const int flags = O_RDONLY | O_CLOEXEC | (access_.direct ? O_DIRECT : 0);
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_openat(sqe, access_.directory_fd, entry.request.path.c_str(), flags, 0);
    io_uring_sqe_set_data64(sqe, index);
  }

  void submit_read(std::uint32_t index) {
    Entry& entry = entries_[index];
    const FileRuns::Run& run = entry.runs.runs[entry.run];
    const std::uint64_t offset = run.offset + entry.run_done;
    std::byte* target = entry.request.slot + offset;
    const auto bytes = static_cast<unsigned>(std::min<std::uint64_t>(run.bytes - entry.run_done, kMaxBufferBytes));
    io_uring_sqe* sqe = next_sqe();
    const bool inside = target >= memory_.data() && target < memory_.data() + memory_.size();
    if (registered_ && inside) {
      const auto buffer = static_cast<int>((target - memory_.data()) / static_cast<std::ptrdiff_t>(buffer_bytes_));
      io_uring_prep_read_fixed(sqe, entry.fd, target, bytes, offset, buffer);
    } else {
      io_uring_prep_read(sqe, entry.fd, target, bytes, offset);
    }
    io_uring_sqe_set_data64(sqe, index);
  }

  void submit_close(int fd) {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_close(sqe, fd);
    io_uring_sqe_set_data64(sqe, kCloseTag);
    ++closing_;
  }

  void reap(bool restart) {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      const std::uint64_t tag = io_uring_cqe_get_data64(cqe);
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      if (tag == kCloseTag) {
        --closing_;
      } else {
        step(static_cast<std::uint32_t>(tag), result, restart);
      }
    }
  }

  void step(std::uint32_t index, int result, bool restart) {
    Entry& entry = entries_[index];
    if (result == -EINTR || result == -EAGAIN) {
      if (!restart) return finish(index, {Code::kCancelled, 0});
      return entry.fd < 0 ? submit_open(index) : submit_read(index);
    }
    if (entry.fd < 0) return opened(index, result, restart);
    if (result < 0) return finish(index, {Code::kIo, -result});
    const FileRuns::Run& run = entry.runs.runs[entry.run];
    entry.run_done += static_cast<std::uint64_t>(result);
    entry.bytes += static_cast<std::uint64_t>(result);
    if (entry.run_done < run.bytes) {
      // A short read goes on where it stopped, unless the file ends there: then the block is torn.
      const bool ended = result == 0 || entry.run_done % KvGeometry::kPageBytes != 0;
      if (ended) return finish(index, {Code::kCorrupt, 0});
    } else if (++entry.run == entry.runs.count) {
      return finish(index, {});
    } else {
      entry.run_done = 0;
    }
    if (!restart) return finish(index, {Code::kCancelled, 0});
    submit_read(index);
  }

  void opened(std::uint32_t index, int result, bool restart) {
    if (result < 0) return finish(index, {result == -ENOENT ? Code::kNotFound : Code::kIo, -result});
    entries_[index].fd = result;
    if (!restart) return finish(index, {Code::kCancelled, 0});
    submit_read(index);
  }

  void finish(std::uint32_t index, Outcome outcome) {
    Entry& entry = entries_[index];
    if (entry.fd >= 0) submit_close(entry.fd);
    done_.push_back({entry.request.id, outcome, entry.bytes});
    free_.push_back(index);
  }

  const KvGeometry geometry_;
  const FileAccess access_;
  const std::span<std::byte> memory_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> free_;
  std::deque<ReadCompletion> done_;
  std::uint32_t closing_ = 0;
  std::uint64_t buffer_bytes_ = 0;
  bool registered_ = false;
  Fd event_;
  io_uring ring_{};
};

}  // namespace

std::unique_ptr<BlockReader> make_uring_reader(const KvGeometry& geometry, const FileAccess& access,
                                               std::span<std::byte> memory, std::uint32_t depth, bool* registered) {
  return std::make_unique<UringReader>(geometry, access, memory, depth, registered);
}

#else

std::unique_ptr<BlockReader> make_uring_reader(const KvGeometry&, const FileAccess&, std::span<std::byte>,
                                               std::uint32_t, bool*) {
  throw Error(Code::kUnsupported,
              "this build has no io_uring: install liburing's headers (Debian: apt install liburing-dev) and "
              "reinstall dualkv, or use backend='pread'");
}

#endif

}  // namespace dualkv
