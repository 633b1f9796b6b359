// What stream sockets carry: a blocking thread a stream, nothing but send and recv.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/text.h"
#include "limits/faulted_memory.h"
#include "limits/meter.h"

namespace dualkv::limits {

namespace {

constexpr std::uint64_t kPageBytes = 4096;

struct Stream {
  int fd = -1;
  std::uint64_t bytes = 0;
  std::uint64_t chunk_bytes = 0;
  std::span<std::byte> memory;  // its own part
  double cpu_s = 0;
};

Status describe(const char* what, ssize_t moved, int error) {
  if (moved == 0) return {Code::kPeerLost, 0, text(what, ": the other side closed a stream")};
  if (error == EAGAIN) return {Code::kTimeout, error, text(what, ": the other side moves nothing; did it stop?")};
  const bool lost = error == EPIPE || error == ECONNRESET;
  return {lost ? Code::kPeerLost : Code::kIo, error, text(what, lost ? ": the other side ended" : ": a stream failed")};
}

// The first failure ends all streams, or the others would wait for bytes that never come. Thread-safe.
class FirstFailure {
 public:
  explicit FirstFailure(std::span<const int> fds) : fds_(fds) {}

  void set(Status status) {
    const std::lock_guard lock(mutex_);
    if (!status_.ok()) return;
    status_ = std::move(status);
    for (const int fd : fds_) shutdown(fd, SHUT_RDWR);
  }
  void raise_if_set() const {
    if (!status_.ok()) throw Error(status_);
  }

 private:
  const std::span<const int> fds_;
  std::mutex mutex_;
  Status status_;
};

ssize_t send_some(int fd, std::byte* data, std::size_t bytes) { return ::send(fd, data, bytes, MSG_NOSIGNAL); }
ssize_t receive_some(int fd, std::byte* data, std::size_t bytes) { return ::recv(fd, data, bytes, 0); }

using Move = ssize_t (*)(int fd, std::byte* data, std::size_t bytes);

struct Direction {
  const char* name;
  Move move;
};
constexpr Direction kSend{"send", &send_some};
constexpr Direction kReceive{"receive", &receive_some};

void pump(Stream& stream, const Direction& direction, FirstFailure& failure) {
  std::uint64_t left = stream.bytes;
  std::uint64_t at = 0;
  while (left > 0) {
    const std::uint64_t bytes = std::min({stream.chunk_bytes, left, stream.memory.size() - at});
    const ssize_t moved = direction.move(stream.fd, stream.memory.data() + at, bytes);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return failure.set(describe(direction.name, moved, errno));
    left -= static_cast<std::uint64_t>(moved);
    at = (at + static_cast<std::uint64_t>(moved)) % stream.memory.size();
  }
}

std::vector<Stream> split(std::span<const int> fds, std::uint64_t bytes, std::uint64_t chunk_bytes,
                          std::span<std::byte> memory) {
  const std::size_t count = fds.size();
  const std::uint64_t part = count == 0 ? 0 : memory.size() / count / kPageBytes * kPageBytes;
  if (part == 0 || chunk_bytes == 0 || bytes == 0) {
    throw Error(Code::kInvalidArgument,
                text("sockets: ", count, " streams, ", bytes, " bytes in chunks of ", chunk_bytes, ", ", memory.size(),
                     " bytes of memory: give at least one of each, and a page a stream"));
  }
  std::vector<Stream> streams;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t share = bytes / count + (i < bytes % count ? 1 : 0);
    streams.push_back({fds[i], share, chunk_bytes, memory.subspan(i * part, part)});
  }
  return streams;
}

// Returns when every stream has ended, well or not.
void run_streams(std::span<Stream> streams, const Direction& direction, FirstFailure& failure) {
  std::vector<std::jthread> threads;
  try {
    for (Stream& stream : streams) {
      threads.emplace_back([&stream, &direction, &failure] {
        pump(stream, direction, failure);
        stream.cpu_s = read_clock_s(CLOCK_THREAD_CPUTIME_ID);
      });
    }
  } catch (const std::system_error& error) {
    failure.set({Code::kNoSpace, error.code().value(), "sockets: a thread is refused; use fewer streams"});
  }
}

// The one byte that says all has arrived.
void acknowledge(int fd, const Direction& direction, FirstFailure& failure) {
  std::byte byte{1};
  Stream stream{fd, 1, 1, std::span(&byte, 1)};
  pump(stream, direction, failure);
}

Sample transfer(std::vector<Stream> streams, std::span<const int> fds, const Direction& there, const Direction& back) {
  FirstFailure failure(fds);
  std::uint64_t bytes = 0;
  const Meter meter(CLOCK_THREAD_CPUTIME_ID);
  run_streams(streams, there, failure);
  failure.raise_if_set();
  acknowledge(fds[0], back, failure);
  failure.raise_if_set();
  for (const Stream& stream : streams) bytes += stream.bytes;
  Sample sample = meter.stop(bytes);
  for (const Stream& stream : streams) sample.cpu_s += stream.cpu_s;
  return sample;
}

}  // namespace

SocketLimit::SocketLimit(std::uint64_t memory_bytes)
    : memory_(std::make_unique<FaultedMemory>(memory_bytes, /*huge_pages=*/true)) {}

SocketLimit::~SocketLimit() = default;

std::span<std::byte> SocketLimit::memory() { return memory_->bytes(); }

Sample SocketLimit::send(std::span<const int> fds, std::uint64_t bytes, std::uint64_t chunk_bytes) {
  return transfer(split(fds, bytes, chunk_bytes, memory_->bytes()), fds, kSend, kReceive);
}

Sample SocketLimit::receive(std::span<const int> fds, std::uint64_t bytes, std::uint64_t chunk_bytes) {
  return transfer(split(fds, bytes, chunk_bytes, memory_->bytes()), fds, kReceive, kSend);
}

}  // namespace dualkv::limits
