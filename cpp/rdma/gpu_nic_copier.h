// GpuNicCopier: copies between the host and a GPU, made by the node's NIC (DualPath, 5: CNIC-assisted copies).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "memory/cuda_copier.h"
#include "memory/gpu_slots.h"
#include "rdma/nic_copier.h"

namespace dualkv {

// The NIC writes between the host's memory and a slot of the GPU, and the GPU copies between the slot and the cache: so
// the way to the GPU is the LOW lane's, and an engine's memory need not be registered. What can't go so the GPU copies
// (no slot is left, memory that is not registered, a queue pair that is not up), and that is counted. Progress thread
// only.
class GpuNicCopier : public Copier {
 public:
  // `within`, `by_gpu`: of the GPU that has the slots. `note` counts fallbacks. All must outlive it.
  GpuNicCopier(NicCopier& nic, GpuSlots& slots, CudaCopier& within, CudaCopier& by_gpu, HostSide host,
               std::function<void(const std::string&)> note)
      : nic_(nic), slots_(slots), within_(within), by_gpu_(by_gpu), host_(host), note_(std::move(note)) {}

  void copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner, std::shared_ptr<void> keep,
            Done done) override {
    begin({{Extents(from), Extents(to), owner, std::move(keep), std::move(done)}, {}});
  }
  // To the GPU, of what comes to `checksum`: looked at in the slot, and `verify`: again where it was copied to, see
  // CudaCopier::copy_verified. What a NIC got wrong the GPU copies.
  void copy_right(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                  std::shared_ptr<void> keep, std::uint64_t checksum, bool verify, Done done) {
    begin({{Extents(from), Extents(to), owner, std::move(keep), std::move(done)}, checksum, verify});
  }
  void withdraw(std::uint64_t owner) override;
  std::uint64_t bytes() const { return bytes_; }  // that the NIC brought

 private:
  struct Job : CopyJob {
    std::optional<std::uint64_t> checksum;
    bool verify = false;
  };
  void begin(Job job);
  void bring(const std::shared_ptr<Job>& job, const FreePieces::Piece& slot);
  void fetch(const std::shared_ptr<Job>& job, const FreePieces::Piece& slot);
  void copy_on(const Job& job, const FreePieces::Piece& slot);
  static void by(CudaCopier& copier, std::span<const Extent> from, std::shared_ptr<void> keep, const Job& job);
  void not_by_nic(const Job& job);

  NicCopier& nic_;
  GpuSlots& slots_;
  CudaCopier& within_;
  CudaCopier& by_gpu_;
  const HostSide host_;
  const std::function<void(const std::string&)> note_;
  std::uint64_t bytes_ = 0;
};

}  // namespace dualkv
