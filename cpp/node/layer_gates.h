// GateState: behind LayerGates.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/progress.h"
#include "memory/cuda_device.h"

namespace dualkv {

class LoadTask;

// A word a layer, that graphs wait for, and the load that they stand for; open as long as that is none. Any thread.
class GateState : public std::enable_shared_from_this<GateState> {
 public:
  // Throws Error.
  GateState(std::shared_ptr<Progress> progress, std::shared_ptr<CudaDevice> device, std::uint32_t layers);

  std::uint32_t layers() const { return layers_; }
  // See LayerGates.
  void wait(std::uint32_t layer, cuda::Stream stream) const;
  void publish(std::uint32_t layer, cuda::Stream stream);
  // When the stream gets there, all gates are closed and belong to the load.
  void open(const std::shared_ptr<LoadTask>& load, cuda::Stream stream);
  // The layer is in place, or never will be; nothing if the gates belong to another by now.
  void raise(const LoadTask& load, std::uint32_t layer);

 private:
  struct Mark {
    GateState* gates;
    std::uint32_t layer;
  };

  std::uint32_t* word(std::uint32_t layer) const { return reinterpret_cast<std::uint32_t*>(words_.data()) + layer; }
  // Returns how often it was called.
  std::uint64_t take(const std::weak_ptr<LoadTask>& load);
  // Nobody will: no graph waits for ever. Nothing if they were taken again since.
  void raise_all(std::uint64_t taken);

  const std::shared_ptr<Progress> progress_;
  const std::shared_ptr<CudaDevice> device_;
  const std::uint32_t layers_;
  const PinnedMemory words_;
  std::vector<Mark> marks_;  // graphs keep their addresses
  std::mutex mutex_;         // guards the words and what follows
  std::weak_ptr<LoadTask> load_;
  std::uint64_t taken_ = 0;
};

}  // namespace dualkv
