// What tests of what passes through a GPU share: the stand-in driver held up, and slots that nothing registers.
#pragma once

#include "memory/gpu_slots.h"
#include "node/device_port.h"
#include "node_support.h"

namespace dualkv::testing {

template <typename Call>
Call driver_call(const char* name) {
  return reinterpret_cast<Call>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), name));
}

// Kernels of the stand-in wait while there is one.
class HeldKernels {
 public:
  HeldKernels() { hold(true); }
  ~HeldKernels() { hold(false); }

 private:
  static void hold(bool held) { driver_call<void (*)(bool)>("stand_in_hold")(held); }
};

// Why a test can't have the stand-in and its kernels; empty if it can.
inline std::string no_stand_in() {
  if (find_cufile() == nullptr) return "a real driver: the test holds up and writes as only the stand-in lets it";
  return CudaDevice::open(0)->missing(GpuCopy::kKernel);
}

inline std::unique_ptr<NicSlots> test_slots(const KvGeometry& geometry, std::uint32_t count) {
  const auto side = [&] {
    const std::uint64_t bytes = count * largest_layer_bytes(geometry);
    return NicSlots::Side{GpuSlots(CudaDevice::open(0), geometry, GpuSlots::Holds::kLayerBlock, bytes, "test"),
                          nullptr};
  };
  return std::make_unique<NicSlots>(nullptr, side(), side());
}

inline std::uint32_t free_slots(NicSlots::Side& side) {
  std::vector<FreePieces::Piece> taken;
  while (auto piece = side.slots.take()) taken.push_back(std::move(piece));
  return static_cast<std::uint32_t>(taken.size());
}

}  // namespace dualkv::testing
