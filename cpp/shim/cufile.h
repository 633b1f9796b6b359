// cuFile, GPUDirect Storage's library, opened at run time. The part of its ABI in use is declared here;
// tests/cuda/abi_test.cpp checks it against the header where there is one.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "shim/cuda.h"

namespace dualkv::cufile {

inline constexpr int kSuccess = 0;
inline constexpr int kOpaqueFd = 1;
inline constexpr unsigned kStatusNvmeP2p = 1u << 11;

// CUfileError_t.
struct Result {
  int error;  // CUfileOpError
  cuda::Result driver;
};

// CUfileDescr_t.
struct Description {
  int type;
  union {
    int fd;
    void* pointer;
  } handle;
  const void* operations;
};

// CUfileDrvProps_t.
struct Properties {
  unsigned major_version;  // of nvidia-fs
  unsigned minor_version;
  std::size_t poll_threshold;
  std::size_t max_direct_bytes;
  unsigned status;
  unsigned control;
  unsigned features;
  unsigned max_device_cache;
  unsigned per_buffer_cache;
  unsigned max_device_pinned;
  unsigned max_batch;
  unsigned max_batch_timeout_ms;
};

using Handle = void*;

struct Library {
  Result (*driver_open)();
  Result (*driver_get_properties)(Properties*);
  Result (*handle_register)(Handle*, Description*);
  void (*handle_deregister)(Handle);
  Result (*buffer_register)(const void* memory, std::size_t bytes, int flags);
  Result (*buffer_deregister)(const void* memory);
  // Bytes; -1 and errno, or -CUfileOpError.
  ssize_t (*read)(Handle, void* memory, std::size_t bytes, off_t offset_in_file, off_t offset_in_memory);
  // Without nvidia-fs or NVMe P2P: the library reads to the host's memory and copies. A file system that has no
  // GPUDirect Storage makes it do so as well, and can't be told apart.
  bool compatibility = false;
};

// Null where the library is not found or its driver does not open; `why` then says so, with the cure. Opened on the
// first call, which must follow the first use of CUDA. Any thread.
const Library* library(std::string* why = nullptr);

}  // namespace dualkv::cufile
