// Limits: what storage, memory and sockets give to a bare loop, the denominators of benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dualkv/gpu.h"

namespace dualkv::limits {

// What one loop did. Memory is allocated, faulted in and registered before the clock starts.
struct Sample {
  double seconds = 0;
  double cpu_s = 0;  // of the threads that worked; the kernel's interrupt work is charged as the kernel does
  std::uint64_t bytes = 0;
  std::vector<double> latencies_us;  // of each operation from submission to reaping, in order of completion; or empty
};

struct FileReads {
  std::string path;
  std::uint64_t block_bytes = 0;
  std::vector<std::uint64_t> offsets;  // one read each
  std::uint32_t depth = 32;            // reads in flight
  bool direct = true;                  // O_DIRECT: offsets and block_bytes are multiples of the device's block
  // Each read has memory of its own, as when the data is kept. Else `depth` buffers are used over and over, and on
  // machines whose storage is copied by the CPU (virtual disks, the page cache) they stay in its cache: faster than
  // anything that delivers the data can be.
  bool keep = true;
};

// Reads blocks of one file through io_uring, with registered buffers and a registered file. A short read is an error.
// cpu_s is that of the whole process, since the kernel may read on threads of its own. Blocking.
// Throws Error: kUnsupported without io_uring, or where the kernel or the file system refuses it.
Sample read_file(const FileReads& reads);

// One pass of the library's own checksum over `bytes` of memory, in blocks, in a scattered order; one thread.
Sample checksum_memory(std::uint64_t bytes, std::uint64_t block_bytes);

class FaultedMemory;

struct BlockCopies {
  std::uint64_t block_bytes = 0;
  std::vector<std::uint64_t> source_offsets;
  std::vector<std::uint64_t> target_offsets;  // one for each source
};

// Owns two mappings, so that repeated runs don't pay for allocation. One thread at a time.
class CopyArena {
 public:
  // `bytes` each, faulted in; transparent huge pages or none at all. Throws Error(kNoSpace).
  CopyArena(std::uint64_t bytes, bool huge_pages);
  ~CopyArena();
  CopyArena(const CopyArena&) = delete;
  CopyArena& operator=(const CopyArena&) = delete;

  std::span<const std::byte> source() const;  // 64-bit words that count up
  std::span<const std::byte> target() const;  // zeros before the first run

  // memcpy of each block, on the calling thread.
  Sample run(const BlockCopies& copies);

 private:
  std::unique_ptr<FaultedMemory> source_;
  std::unique_ptr<FaultedMemory> target_;
};

// One side of a transfer over several connected stream sockets: a thread and a part of the memory for each.
// The descriptors are borrowed and blocking, and both sides give them in the same order. One thread at a time.
class SocketLimit {
 public:
  explicit SocketLimit(std::uint64_t memory_bytes);
  ~SocketLimit();
  SocketLimit(const SocketLimit&) = delete;
  SocketLimit& operator=(const SocketLimit&) = delete;

  std::span<std::byte> memory();

  // Both move `bytes` in all, split evenly; each stream cycles through its part of the memory in calls of at most
  // chunk_bytes. receive() then sends one byte on the first socket; send() ends with that byte.
  // Throws Error when the other side closes or a socket's own timeout passes; all sockets are shut down then.
  Sample send(std::span<const int> fds, std::uint64_t bytes, std::uint64_t chunk_bytes);
  Sample receive(std::span<const int> fds, std::uint64_t bytes, std::uint64_t chunk_bytes);

 private:
  std::unique_ptr<FaultedMemory> memory_;
};

struct GpuCopies {
  int gpu = 0;
  bool to_gpu = true;  // else from it
  std::uint64_t block_bytes = 0;
  std::uint64_t count = 0;
};

struct GpuSample {
  Sample sample;
  double submit_s = 0;  // until the calls had returned
};

// Pinned memory of the host, as much of a GPU's, and blocks that go from the one to the other in scattered order.
// One thread at a time; every run blocks until the last byte is there.
class GpuArena {
 public:
  // Throws Error: kUnsupported without such a GPU, kIo where there is not so much memory.
  explicit GpuArena(const GpuCopies& copies);
  ~GpuArena();
  GpuArena(const GpuArena&) = delete;
  GpuArena& operator=(const GpuArena&) = delete;

  // All blocks by one engine. Throws Error(kUnsupported) where it can't be had.
  GpuSample run(GpuCopy engine);
  // And their checksums, on the GPU.
  GpuSample run_verified(GpuCopy engine);
  // As many bytes by one call: what the link gives.
  GpuSample one_copy();
  // Of the GPU; whoever uses it for something else makes no runs meanwhile. Lives as long as this.
  std::byte* memory() const;
  // Fills the source with noise, runs, and compares.
  bool moves_the_right_bytes(GpuCopy engine);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dualkv::limits
