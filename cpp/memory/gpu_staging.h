// GpuStaging: slots in a GPU's memory, that storage reads straight into.
#pragma once

#include "memory/gpu_slots.h"

namespace dualkv {

// Registered with cuFile, one Full Block each.
class GpuStaging {
 public:
  // As many slots as `bytes` hold. Throws Error: as GpuSlots, kUnsupported where there is no cuFile, kIo if it refuses
  // the memory.
  GpuStaging(const std::shared_ptr<CudaDevice>& device, const KvGeometry& geometry, std::uint64_t bytes);

  // Null if all are out.
  FreePieces::Piece take() { return slots_.take(); }
  const CudaDevice& device() const { return slots_.memory()->device(); }
  std::uint64_t bytes() const { return slots_.memory()->memory().size(); }
  // True if cuFile itself goes by the host's memory.
  bool compatibility() const { return compatibility_; }

 private:
  GpuSlots slots_;
  bool compatibility_ = false;
};

}  // namespace dualkv
