// BlockReader: asynchronous reads of block files into staging. Every backend passes one conformance suite.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/outcome.h"
#include "dualkv/geometry.h"
#include "dualkv/operation.h"
#include "dualkv/store.h"

namespace dualkv {

class CudaDevice;

// Reads `layers` of the file, and its trailer if wanted, to the same offsets of `slot` (as aligned extents that may
// cover more).
struct ReadRequest {
  std::uint64_t id = 0;
  std::string path;  // relative to the namespace directory
  LayerRange layers;
  bool trailer = true;
  std::byte* slot = nullptr;  // file_bytes() long, borrowed until the completion is polled
  // As long, and borrowed too, if the layers are to come to this GPU's memory; then only the trailer comes to `slot`.
  std::byte* gpu_slot = nullptr;
  const CudaDevice* gpu = nullptr;
};

struct ReadCompletion {
  std::uint64_t id = 0;
  Outcome outcome;
  std::uint64_t bytes = 0;  // read from storage
};

// The byte runs of a file that a request needs: one if they touch, else two (layers, trailer). Page aligned.
struct FileRuns {
  struct Run {
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  Run runs[2];
  int count = 0;
  std::uint64_t bytes() const { return runs[0].bytes + (count > 1 ? runs[1].bytes : 0); }
};
FileRuns file_runs(const KvGeometry& geometry, LayerRange layers, bool trailer);

// Used on one thread. A short file is an error (kCorrupt); a missing one is kNotFound.
class BlockReader {
 public:
  virtual ~BlockReader() = default;
  // False if the backend is full: poll, then try again. The request is copied.
  virtual bool try_submit(const ReadRequest& request) noexcept = 0;
  // Starts what was submitted since the last flush (one syscall for all of it, where the backend batches).
  virtual void flush() noexcept = 0;
  // Takes finished requests; returns how many.
  virtual std::size_t poll(std::span<ReadCompletion> out) noexcept = 0;
  // Readable when poll may return something.
  virtual int event_fd() const = 0;
  // Nothing is wanted for now: gives back what is kept for the next request, such as open files.
  virtual void idle() noexcept {}
  // Waits until the kernel can no longer write to any slot, at most until `deadline`. False if it still can: then
  // neither this reader nor the slots may be freed.
  virtual bool drain(Clock::time_point deadline) noexcept = 0;
  // When to try again if nothing else happens (a limiter out of tokens, a delayed completion).
  virtual std::optional<Clock::time_point> next_wake() const { return std::nullopt; }
};

// How block files are opened, probed once per store.
struct FileAccess {
  int directory_fd = -1;
  bool direct = false;
  std::uint32_t alignment = 1;
};

// How much of the staging is registered with the ring so far, and what it took.
struct Registration {
  std::atomic<bool> refused{false};
  std::atomic<std::uint32_t> buffers{0};
  std::atomic<std::uint64_t> bytes{0};
  std::atomic<std::uint64_t> ns{0};
};

// Throws Error(kUnsupported), naming the cure, where the kernel or the build has no io_uring. Registers the pool's
// memory as it becomes ready.
std::unique_ptr<BlockReader> make_uring_reader(const KvGeometry& geometry, const FileAccess& access,
                                               const StagingPool& pool, std::uint32_t depth,
                                               std::shared_ptr<Registration> registration);
std::unique_ptr<BlockReader> make_pread_reader(const KvGeometry& geometry, const FileAccess& access,
                                               std::uint32_t depth);
// Throws Error(kUnsupported) where 3FS's library is not found, the directory is on no 3FS, or 3FS gives no memory.
std::unique_ptr<BlockReader> make_usrbio_reader(const KvGeometry& geometry, const FileAccess& access,
                                                std::uint32_t depth);
// Adds reads into GPUs' memory, by cuFile, to what `host` can. cuFile must be there (GpuStaging).
std::unique_ptr<BlockReader> make_cufile_reader(std::unique_ptr<BlockReader> host, const KvGeometry& geometry,
                                                const FileAccess& access, std::uint32_t depth);
// Paces submissions to bytes_per_s, as a storage NIC of that speed would.
std::unique_ptr<BlockReader> make_limited_reader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry,
                                                 std::uint64_t bytes_per_s);
std::unique_ptr<BlockReader> make_faulty_reader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry,
                                                const ReadFaults& faults);

}  // namespace dualkv
