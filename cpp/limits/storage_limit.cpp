// What the storage gives: one file, one ring, one thread, always `depth` reads in flight.
#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "base/fd.h"
#include "base/text.h"
#include "limits/faulted_memory.h"
#include "limits/meter.h"
#include "shim/uring.h"

namespace dualkv::limits {

#ifdef DUALKV_HAVE_URING

namespace {

constexpr std::uint64_t kMaxBlockBytes = std::uint64_t{1} << 30;  // kernel limit of one registered buffer
constexpr std::uint32_t kMaxDepth = 1024;                         // UIO_MAXIOV, the limit of older kernels
constexpr std::uint64_t kPageBytes = 4096;

[[noreturn]] void refuse(const char* what, int error) {
  const char* cure = error == EPERM || error == ENOSYS
                         ? "; allow it (sysctl kernel.io_uring_disabled=0, a seccomp profile that permits "
                           "io_uring_setup)"
                         : "; raise the memlock limit (ulimit -l), or lower depth or block_bytes";
  throw Error(Code::kUnsupported, text("read_file: ", what, " is refused by the kernel", cure), error);
}

void require_valid(const FileReads& reads) {
  const bool fine = reads.block_bytes > 0 && reads.block_bytes <= kMaxBlockBytes && reads.depth > 0 &&
                    reads.depth <= kMaxDepth && !reads.offsets.empty();
  if (fine) return;
  throw Error(Code::kInvalidArgument,
              text("read_file: block_bytes = ", reads.block_bytes, ", depth = ", reads.depth, ", ",
                   reads.offsets.size(), " offsets: must be 1 to 2**30, 1 to ", kMaxDepth, ", and at least one"));
}

Fd open_file(const FileReads& reads) {
  Fd file(open(reads.path.c_str(), O_RDONLY | O_CLOEXEC | (reads.direct ? O_DIRECT : 0)));
  if (file.valid()) return file;
  if (reads.direct && errno == EINVAL) {
    throw Error(Code::kUnsupported,
                text("read_file: the file system of ", reads.path, " refuses O_DIRECT; use direct=False"), EINVAL);
  }
  throw Error(errno == ENOENT ? Code::kNotFound : Code::kIo, text("read_file: open of ", reads.path), errno);
}

// Owns the ring. Its end waits for no read: the kernel holds the registered pages of those in flight.
class Ring {
 public:
  explicit Ring(unsigned entries) {
    if (const int e = io_uring_queue_init(entries, &ring_, 0); e < 0) refuse("io_uring", -e);
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  io_uring* get() { return &ring_; }

 private:
  io_uring ring_{};
};

// Of `depth` reads in flight, the one that ends makes room for the next.
class ReadLoop {
 public:
  explicit ReadLoop(const FileReads& reads)
      : reads_(reads),
        buffer_count_(static_cast<std::uint32_t>(std::min<std::size_t>(reads.depth, reads.offsets.size()))),
        stride_((reads.block_bytes + kPageBytes - 1) / kPageBytes * kPageBytes),
        places_(reads.keep ? reads.offsets.size() : buffer_count_),
        places_per_buffer_(kMaxBlockBytes / stride_),
        file_(open_file(reads)),
        memory_(places_ * stride_, /*huge_pages=*/true),
        ring_(buffer_count_),
        in_buffer_(buffer_count_) {
    register_buffers();
    const int fd = file_.get();
    if (const int e = io_uring_register_files(ring_.get(), &fd, 1); e < 0) refuse("a registered file", -e);
    // Spares a look-up for each system call; kernels before 5.18 don't know it.
    io_uring_register_ring_fd(ring_.get());
    latencies_us_.reserve(reads.offsets.size());
  }

  Sample run() {
    const Meter meter(CLOCK_PROCESS_CPUTIME_ID);
    for (std::uint32_t buffer = 0; buffer < buffer_count_; ++buffer) prepare(buffer, 0);
    while (in_flight_ > 0) {
      const int submitted = io_uring_submit_and_wait(ring_.get(), 1);
      if (submitted < 0 && submitted != -EINTR) throw Error(Code::kIo, "read_file: io_uring_enter", -submitted);
      reap(meter.elapsed_s());
    }
    if (failed_) throw_failure();
    Sample sample = meter.stop(reads_.offsets.size() * reads_.block_bytes);
    sample.latencies_us = std::move(latencies_us_);
    return sample;
  }

 private:
  struct InFlight {
    std::uint64_t offset = 0;
    double start_s = 0;
  };
  struct Failure {
    std::uint64_t offset = 0;
    int result = 0;
  };

  void register_buffers() {
    std::vector<iovec> buffers;
    for (std::size_t first = 0; first < places_; first += places_per_buffer_) {
      buffers.push_back({place(first), std::min(places_per_buffer_, places_ - first) * stride_});
    }
    const int error = io_uring_register_buffers(ring_.get(), buffers.data(), static_cast<unsigned>(buffers.size()));
    if (error < 0) refuse("registered memory", -error);
  }

  std::byte* place(std::size_t index) { return memory_.bytes().data() + index * stride_; }

  // The ring has an entry for each buffer, so there is always one free.
  void prepare(std::uint32_t index, double now_s) {
    const std::size_t at = reads_.keep ? next_ : index;
    in_buffer_[index] = {reads_.offsets[next_++], now_s};
    io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
    io_uring_prep_read_fixed(sqe, /*fd=*/0, place(at), static_cast<unsigned>(reads_.block_bytes),
                             in_buffer_[index].offset, static_cast<int>(at / places_per_buffer_));
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, index);
    ++in_flight_;
  }

  void reap(double now_s) {
    unsigned head = 0;
    unsigned reaped = 0;
    io_uring_cqe* cqe = nullptr;
    io_uring_for_each_cqe(ring_.get(), head, cqe) {
      complete(static_cast<std::uint32_t>(io_uring_cqe_get_data64(cqe)), cqe->res, now_s);
      ++reaped;
    }
    io_uring_cq_advance(ring_.get(), reaped);
  }

  void complete(std::uint32_t index, int result, double now_s) {
    --in_flight_;
    latencies_us_.push_back((now_s - in_buffer_[index].start_s) * 1e6);
    if (result != static_cast<int>(reads_.block_bytes) && !failed_) {
      failed_ = true;
      failure_ = {in_buffer_[index].offset, result};
    }
    if (!failed_ && next_ < reads_.offsets.size()) prepare(index, now_s);
  }

  [[noreturn]] void throw_failure() const {
    const std::string what =
        text("read_file: ", reads_.block_bytes, " bytes at offset ", failure_.offset, " of ", reads_.path);
    if (failure_.result >= 0) {
      throw Error(Code::kIo, text(what, ": only ", failure_.result, " came; does the file end there?"));
    }
    const char* cure = failure_.result == -EINVAL && reads_.direct
                           ? "; with direct, both must be multiples of the device's logical block"
                           : "";
    throw Error(Code::kIo, text(what, cure), -failure_.result);
  }

  const FileReads& reads_;
  const std::uint32_t buffer_count_;
  const std::uint64_t stride_;
  const std::size_t places_;
  const std::size_t places_per_buffer_;
  const Fd file_;
  const FaultedMemory memory_;
  Ring ring_;
  std::vector<InFlight> in_buffer_;
  std::size_t next_ = 0;  // of reads_.offsets
  std::uint32_t in_flight_ = 0;
  std::vector<double> latencies_us_;
  bool failed_ = false;  // nothing more is started; what is in flight still ends
  Failure failure_;
};

}  // namespace

Sample read_file(const FileReads& reads) {
  require_valid(reads);
  return ReadLoop(reads).run();
}

#else

Sample read_file(const FileReads&) {
  throw Error(Code::kUnsupported,
              "this build has no io_uring: install liburing's headers (Debian: apt install liburing-dev) and "
              "reinstall dualkv");
}

#endif

}  // namespace dualkv::limits
