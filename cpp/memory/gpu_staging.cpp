// Registering GpuStaging with cuFile.
#include "memory/gpu_staging.h"

#include "base/text.h"
#include "shim/cufile.h"

namespace dualkv {

namespace {

// Slots that cuFile knows, until this ends.
class Registered {
 public:
  Registered(const cufile::Library& library, std::shared_ptr<GpuMemory> memory)
      : library_(library), memory_(std::move(memory)) {}
  ~Registered() {
    try {
      const CudaDevice::Current current(memory_->device());
      for (const std::byte* slot : slots_) library_.buffer_deregister(slot);
    } catch (const Error&) {
      // The driver has gone, and all memory with it.
    }
  }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;

  void add(const std::byte* slot, std::uint64_t bytes) {
    const CudaDevice::Current current(memory_->device());
    const cufile::Result result = library_.buffer_register(slot, bytes, 0);
    if (result.error != cufile::kSuccess) {
      throw Error(Code::kIo, text("gpu_gds: cuFileBufRegister failed with ", result.error));
    }
    slots_.push_back(slot);
  }

 private:
  const cufile::Library& library_;
  const std::shared_ptr<GpuMemory> memory_;
  std::vector<const std::byte*> slots_;
};

}  // namespace

GpuStaging::GpuStaging(const std::shared_ptr<CudaDevice>& device, const KvGeometry& geometry, std::uint64_t bytes)
    : slots_(device, geometry, GpuSlots::Holds::kFullBlock, bytes, "gpu_gds") {
  std::string why;
  const cufile::Library* library = cufile::library(&why);
  if (library == nullptr) throw Error(Code::kUnsupported, "gpu_gds: " + why);
  const auto registered = std::make_shared<Registered>(*library, slots_.memory());
  const std::byte* first = slots_.memory()->memory().data();
  for (std::uint64_t i = 0; i < slots_.count(); ++i) {
    registered->add(first + i * slots_.slot_bytes(), slots_.slot_bytes());
  }
  slots_.keep(registered);
  compatibility_ = library->compatibility;
}

}  // namespace dualkv
