// A stand-in for libcufile.so.0, for tests on machines without a GPU: the calls that dualkv makes, with the rules of
// cufile.h, over pread and the stand-in of CUDA's driver (tests/cuda). It declares the ABI anew. Nothing here says how
// fast GPUDirect Storage is, nor that the real library does what its documentation says.
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#define CALL extern "C" __attribute__((visibility("default")))

struct CUfileError_t {
  int err, cu_err;
};
struct CUfileDescr_t {
  int type;
  union {
    int fd;
    void* handle;
  } handle;
  const void* fs_ops;
};
struct CUfileDrvProps_t {
  struct {
    unsigned major_version, minor_version;
    size_t poll_thresh_size, max_direct_io_size;
    unsigned dstatusflags, dcontrolflags;
  } nvfs;
  unsigned fflags, max_device_cache_size, per_buffer_cache_size, max_device_pinned_mem_size, max_batch_io_size,
      max_batch_io_timeout_msecs;
};

namespace {

constexpr int kDriverNotInitialized = 5001, kInvalidValue = 5007, kInvalidMapping = 5009, kNotRegistered = 5027,
              kAlreadyRegistered = 5023, kPinningFailed = 5036;

struct File {
  int fd;
};

std::mutex mutex;
std::condition_variable changed;
std::map<uintptr_t, size_t> buffers;
std::set<File*> files;
std::atomic<bool> open{false};
std::atomic<int> hang{0}, fail{0}, corrupt{0};
int hanging = 0;

bool take(std::atomic<int>& count) {
  int left = count;
  while (left > 0 && !count.compare_exchange_weak(left, left - 1)) {
  }
  return left > 0;
}

// The driver's stand-in writes the memory of its devices.
bool write_device(uint64_t address, const void* from, size_t bytes) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  const auto write = reinterpret_cast<bool (*)(uint64_t, const void*, size_t)>(dlsym(driver, "stand_in_write"));
  return write != nullptr && write(address, from, bytes);
}

}  // namespace

// For tests: so many reads from now on get no answer until stand_in_release(); end with EIO; or bring a wrong bit.
CALL void stand_in_hang(int count) {
  const std::lock_guard lock(mutex);
  hang = count;
  hanging = 0;
}
CALL void stand_in_fail_reads(int count) { fail = count; }
CALL void stand_in_corrupt(int count) { corrupt = count; }
CALL void stand_in_release() {
  const std::lock_guard lock(mutex);
  hang = 0;
  hanging = -1;
  changed.notify_all();
}
CALL int stand_in_hanging() {
  const std::lock_guard lock(mutex);
  return hanging;
}
CALL int stand_in_registered() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(buffers.size() + files.size());
}

CALL CUfileError_t cuFileDriverOpen() {
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD) == nullptr) return {kDriverNotInitialized, 0};
  open = true;
  return {0, 0};
}
CALL CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t* props) {
  if (!open) return {kDriverNotInitialized, 0};
  *props = {};
  if (getenv("DUALKV_STAND_IN_NO_NVFS") == nullptr) props->nvfs.major_version = 2;
  return {0, 0};
}
CALL CUfileError_t cuFileHandleRegister(void** handle, CUfileDescr_t* descr) {
  if (descr->type != 1 || descr->fs_ops != nullptr) return {kInvalidValue, 0};
  auto* file = new File{dup(descr->handle.fd)};
  const std::lock_guard lock(mutex);
  files.insert(file);
  *handle = file;
  return {0, 0};
}
CALL void cuFileHandleDeregister(void* handle) {
  auto* file = static_cast<File*>(handle);
  const std::lock_guard lock(mutex);
  files.erase(file);
  close(file->fd);
  delete file;
}
CALL CUfileError_t cuFileBufRegister(const void* begin, size_t bytes, int flags) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  if (flags != 0 || bytes == 0 || address % 4096 != 0) return {kInvalidValue, 0};
  if (!write_device(address, nullptr, bytes)) return {kInvalidMapping, 0};
  const std::lock_guard lock(mutex);
  if (const char* most = getenv("DUALKV_STAND_IN_BUFFERS");
      most != nullptr && buffers.size() >= strtoul(most, nullptr, 10))
    return {kPinningFailed, 0};
  return {buffers.emplace(address, bytes).second ? 0 : kAlreadyRegistered, 0};
}
CALL CUfileError_t cuFileBufDeregister(const void* begin) {
  const std::lock_guard lock(mutex);
  return {buffers.erase(reinterpret_cast<uintptr_t>(begin)) == 1 ? 0 : kNotRegistered, 0};
}
CALL ssize_t cuFileRead(void* handle, void* base, size_t size, off_t file_offset, off_t offset) {
  const auto address = reinterpret_cast<uintptr_t>(base);
  int fd;
  {
    std::unique_lock lock(mutex);
    const auto buffer = buffers.find(address);
    if (buffer == buffers.end()) return -kInvalidMapping;
    if (size > buffer->second || static_cast<size_t>(offset) > buffer->second - size) return -kInvalidValue;
    if (files.count(static_cast<File*>(handle)) == 0) return -kNotRegistered;
    fd = static_cast<File*>(handle)->fd;
    if (take(hang)) {
      ++hanging;
      changed.wait(lock, [] { return hanging < 0; });
    }
  }
  if (take(fail)) {
    errno = EIO;
    return -1;
  }
  void* pages = nullptr;
  if (posix_memalign(&pages, 4096, size) != 0) return -kInvalidValue;
  const ssize_t got = pread(fd, pages, size, file_offset);
  const int error = errno;
  bool written = true;
  if (got > 0) {
    if (take(corrupt)) static_cast<char*>(pages)[got / 2] ^= 1;
    written = write_device(address + static_cast<uintptr_t>(offset), pages, static_cast<size_t>(got));
  }
  free(pages);
  errno = error;
  return written ? got : -kInvalidMapping;
}
