// What the kernels of cuda_kernels.cu and their callers share. Also compiled by nvcc, and for the host by the tests'
// stand-in driver: no library headers but these.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dualkv {

// A run of bytes to copy. Addresses as the device sees them.
struct CopyRun {
  uint64_t from;
  uint64_t to;
  uint64_t bytes;
};

// A Layer Block to sum up: a few runs, each a multiple of kChecksumStripe.
struct ChecksumRuns {
  static constexpr uint32_t kMost = 4;
  uint64_t data[kMost];
  uint64_t bytes[kMost];
  uint32_t count;
};

constexpr uint64_t kChecksumStripe = 64;     // bytes that XXH3's eight lanes take at once
constexpr uint32_t kChecksumLanes = 8;       // threads of a Layer Block; each leaves its lane, the host merges them
constexpr uint64_t kChecksumShortest = 256;  // shorter input has another form of XXH3
constexpr uint32_t kCopyPiece = 8192;        // bytes of a run that one warp copies before it takes the next piece

}  // namespace dualkv
