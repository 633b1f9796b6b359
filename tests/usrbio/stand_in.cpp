// A stand-in for 3FS's libhf3fs_api_shared.so, for tests where there is no 3FS: the calls that dualkv makes, with the
// rules of hf3fs_usrbio.h, over the local file system. It declares the ABI anew. Nothing here says how fast 3FS is, nor
// that the real library does what its documentation says.
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#define CALL extern "C" __attribute__((visibility("default")))

struct hf3fs_iov {
  uint8_t* base;
  void* iovh;
  char id[16];
  char mount_point[256];
  size_t size;
  size_t block_size;
  int numa;
};
struct hf3fs_ior {
  hf3fs_iov iov;
  void* iorh;
  char mount_point[256];
  bool for_read;
  int io_depth;
  int priority;
  int timeout;
  uint64_t flags;
};
struct hf3fs_cqe {
  int32_t index;
  int32_t reserved;
  int64_t result;
  const void* userdata;
};
static_assert(sizeof(hf3fs_iov) == 312 && sizeof(hf3fs_ior) == 600 && sizeof(hf3fs_cqe) == 24);

namespace {

struct Io {
  int fd;  // its own
  void* target;
  size_t offset;
  uint64_t bytes;
  int32_t index;
  const void* userdata;
};

struct Ring {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Io> prepared, submitted;
  std::deque<hf3fs_cqe> done;
  int entries = 0, used = 0;
  bool ended = false;
  std::vector<std::thread> workers;

  void work() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return ended || !submitted.empty(); });
      if (ended) return;
      const Io io = submitted.front();
      submitted.pop_front();
      lock.unlock();
      int64_t result = 0;
      while (static_cast<uint64_t>(result) < io.bytes) {
        const ssize_t got = pread(io.fd, static_cast<char*>(io.target) + result, io.bytes - result,
                                  static_cast<off_t>(io.offset + result));
        if (got < 0) result = -errno;
        if (got <= 0) break;
        result += got;
      }
      close(io.fd);
      lock.lock();
      done.push_back({io.index, 0, result, io.userdata});
      changed.notify_all();
    }
  }
};

std::mutex files_mutex;
std::map<int, int> files;  // registered: our own descriptor of the same file
std::atomic<int> hang{0}, fail{0};

Ring& ring_of(const hf3fs_ior* ior) { return *static_cast<Ring*>(ior->iorh); }

}  // namespace

// For tests: so many reads from now on get no answer; or end with EIO.
CALL void stand_in_hang(int count) { hang = count; }
CALL void stand_in_fail_reads(int count) { fail = count; }
CALL int stand_in_registered() {
  const std::lock_guard lock(files_mutex);
  return static_cast<int>(files.size());
}

CALL int hf3fs_extract_mount_point(char* mount, int size, const char* path) {
  if (strstr(path, "not-3fs") != nullptr || size < 2) return -1;
  strcpy(mount, "/");
  return 2;
}
CALL int hf3fs_iovcreate(hf3fs_iov* iov, const char* mount, size_t size, size_t block_size, int numa) {
  if (strlen(mount) >= sizeof(iov->mount_point)) return -EINVAL;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return -errno;
  *iov = {};
  iov->base = static_cast<uint8_t*>(memory);
  iov->iovh = memory;
  strcpy(iov->mount_point, mount);
  iov->size = size;
  iov->block_size = block_size;
  iov->numa = numa;
  return 0;
}
CALL void hf3fs_iovdestroy(hf3fs_iov* iov) {
  munmap(iov->base, iov->size);
  iov->iovh = nullptr;
}
CALL int hf3fs_iorcreate4(hf3fs_ior* ior, const char* mount, int entries, bool for_read, int io_depth, int timeout, int,
                          uint64_t flags) {
  if (entries <= 0 || timeout < 0) return -EINVAL;
  *ior = {};
  strcpy(ior->mount_point, mount);
  ior->for_read = for_read;
  ior->io_depth = io_depth;
  ior->flags = flags;
  auto* ring = new Ring;
  ring->entries = entries;
  for (int i = 0; i < 3; ++i) ring->workers.emplace_back([ring] { ring->work(); });
  ior->iorh = ring;
  return 0;
}
CALL void hf3fs_iordestroy(hf3fs_ior* ior) {
  Ring& ring = ring_of(ior);
  {
    const std::lock_guard lock(ring.mutex);
    ring.ended = true;
    ring.changed.notify_all();
  }
  for (std::thread& worker : ring.workers) worker.join();
  delete &ring;
}
CALL int hf3fs_reg_fd(int fd, uint64_t) {
  const std::lock_guard lock(files_mutex);
  if (files.count(fd) != 0) return EINVAL;
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return errno;
  files[fd] = own;
  return -own - 1;
}
CALL void hf3fs_dereg_fd(int fd) {
  const std::lock_guard lock(files_mutex);
  const auto found = files.find(fd);
  if (found == files.end()) return;
  close(found->second);
  files.erase(found);
}
CALL int hf3fs_prep_io(const hf3fs_ior* ior, const hf3fs_iov* iov, bool read, void* ptr, int fd, size_t off,
                       uint64_t len, const void* userdata) {
  Ring& ring = ring_of(ior);
  const auto* at = static_cast<uint8_t*>(ptr);
  if (read != ior->for_read || at < iov->base || len > iov->size ||
      static_cast<size_t>(at - iov->base) > iov->size - len) {
    return -EINVAL;
  }
  int own;
  {
    const std::lock_guard lock(files_mutex);
    const auto found = files.find(fd);
    if (found == files.end()) return -EBADF;
    own = fcntl(found->second, F_DUPFD_CLOEXEC, 0);
  }
  const std::lock_guard lock(ring.mutex);
  if (ring.used == ring.entries) {
    close(own);
    return -EAGAIN;
  }
  const int index = ring.used++;
  ring.prepared.push_back({own, ptr, off, len, index, userdata});
  return index;
}
CALL int hf3fs_submit_ios(const hf3fs_ior* ior) {
  Ring& ring = ring_of(ior);
  const std::lock_guard lock(ring.mutex);
  for (const Io& io : ring.prepared) {
    if (hang > 0) {
      --hang;
      close(io.fd);
    } else if (fail > 0) {
      --fail;
      close(io.fd);
      ring.done.push_back({io.index, 0, -EIO, io.userdata});
    } else {
      ring.submitted.push_back(io);
    }
  }
  ring.prepared.clear();
  ring.changed.notify_all();
  return 0;
}
CALL int hf3fs_wait_for_ios(const hf3fs_ior* ior, hf3fs_cqe* cqes, int cqec, int min_results,
                            const timespec* abs_timeout) {
  Ring& ring = ring_of(ior);
  std::unique_lock lock(ring.mutex);
  const auto until = std::chrono::system_clock::time_point(std::chrono::seconds(abs_timeout->tv_sec) +
                                                           std::chrono::nanoseconds(abs_timeout->tv_nsec));
  ring.changed.wait_until(lock, until, [&] { return static_cast<int>(ring.done.size()) >= min_results; });
  int count = 0;
  for (; count < cqec && !ring.done.empty(); ++count) {
    cqes[count] = ring.done.front();
    ring.done.pop_front();
    --ring.used;
  }
  return count;
}
