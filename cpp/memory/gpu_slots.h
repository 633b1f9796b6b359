// GpuSlots: slots in a GPU's memory, that what comes from outside is written to.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/fd.h"
#include "dualkv/geometry.h"
#include "memory/cuda_device.h"
#include "memory/free_pieces.h"

namespace dualkv {

// Of the largest Layer Block: what a piece of memory for any of them holds.
std::uint64_t largest_layer_bytes(const KvGeometry& geometry);

// Memory of a GPU, given back in the end.
class GpuMemory {
 public:
  // `bytes`: whole pages of a GPU. `option` asks for it. Throws Error(kNoSpace).
  GpuMemory(std::shared_ptr<CudaDevice> device, std::uint64_t bytes, const char* option);
  ~GpuMemory();
  GpuMemory(const GpuMemory&) = delete;
  GpuMemory& operator=(const GpuMemory&) = delete;

  CudaDevice& device() const { return *device_; }
  std::span<std::byte> memory() const { return memory_; }
  // A dma-buf of all of it, for NICs; not valid where the driver gives none.
  Fd dma_buf() const;

 private:
  const std::shared_ptr<CudaDevice> device_;
  std::span<std::byte> memory_;
};

// Never the engine's cache: a write that comes late touches nothing of the engine's, and what is wrong goes no further.
// Each slot is taken on the progress thread, and comes back on any.
class GpuSlots {
 public:
  enum class Holds : std::uint8_t { kFullBlock, kLayerBlock };
  // As many slots as `bytes` hold. `option` asks for them. Throws Error: kUnsupported if not every Layer Block in a
  // slot can be summed up on the GPU, kInvalidArgument if not one slot fits, kNoSpace.
  GpuSlots(const std::shared_ptr<CudaDevice>& device, const KvGeometry& geometry, Holds holds, std::uint64_t bytes,
           const char* option);

  // Null if all are out.
  FreePieces::Piece take() { return slots_.take(); }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  std::uint64_t count() const { return count_; }
  // The slots are its beginning.
  const std::shared_ptr<GpuMemory>& memory() const { return memory_; }
  // Lives as long as a slot is out, or this.
  std::shared_ptr<const void> owner() const { return slots_.owner(); }
  // Until no slot is out.
  void keep(std::shared_ptr<const void> thing) { slots_.keep(std::move(thing)); }

 private:
  std::uint64_t slot_bytes_ = 0, count_ = 0;
  std::shared_ptr<GpuMemory> memory_;
  FreePieces slots_;
};

}  // namespace dualkv
