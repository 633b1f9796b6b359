// USRBIO, the user-space ring of 3FS, opened at run time. The part of its ABI in use is declared here, as in
// hf3fs_usrbio.h of 3FS (src/lib/api).
#pragma once

#include <sys/types.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace dualkv::usrbio {

// hf3fs_iov: memory that the FUSE process reads into.
struct Iov {
  std::uint8_t* base;
  void* handle;
  char id[16];
  char mount_point[256];
  std::size_t size;
  std::size_t block_size;
  int numa;
};

// hf3fs_ior: a ring.
struct Ior {
  Iov iov;
  void* handle;
  char mount_point[256];
  bool for_read;
  int io_depth;
  int priority;
  int timeout;
  std::uint64_t flags;
};

// hf3fs_cqe.
struct Completion {
  std::int32_t index;
  std::int32_t reserved;
  std::int64_t result;  // bytes, or -errno
  const void* userdata;
};

// Results: 0 or more, or -errno, where nothing else is said.
struct Library {
  // The path's length + 1, or -1 if it is on no 3FS.
  int (*extract_mount_point)(char* mount_point, int size, const char* path);
  int (*iov_create)(Iov*, const char* mount_point, std::size_t size, std::size_t block_size, int numa);
  void (*iov_destroy)(Iov*);
  int (*ior_create)(Ior*, const char* mount_point, int entries, bool for_read, int io_depth, int timeout, int numa,
                    std::uint64_t flags);
  void (*ior_destroy)(Ior*);
  int (*reg_fd)(int fd, std::uint64_t flags);  // 0 or less: fine; else errno
  void (*dereg_fd)(int fd);
  int (*prep_io)(const Ior*, const Iov*, bool read, void* target, int fd, std::size_t offset, std::uint64_t bytes,
                 const void* userdata);
  int (*submit)(const Ior*);
  int (*wait)(const Ior*, Completion* out, int most, int least, const timespec* until);  // on CLOCK_REALTIME
};

// Null where the library is not found; `why` then says so, with the cure. Opened on the first call. Any thread.
const Library* library(std::string* why = nullptr);

}  // namespace dualkv::usrbio
