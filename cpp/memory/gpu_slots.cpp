// The memory of GpuSlots.
#include "memory/gpu_slots.h"

#include <algorithm>

#include "base/text.h"

namespace dualkv {

namespace {

constexpr std::uint64_t kPage = std::uint64_t{64} << 10;  // of a GPU
// The driver gives what is smaller a part of a page of others', which no NIC gets.
constexpr std::uint64_t kLargePage = std::uint64_t{2} << 20;
constexpr std::uint64_t kAlign = 256;  // of Layer Blocks

std::uint64_t whole(std::uint64_t bytes, std::uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

std::uint64_t slot_for(const KvGeometry& geometry, GpuSlots::Holds holds) {
  if (holds == GpuSlots::Holds::kFullBlock) return whole(geometry.file_bytes(), kPage);
  return whole(largest_layer_bytes(geometry), kAlign);
}

void require_sums(const CudaDevice& device, const KvGeometry& geometry, GpuSlots::Holds holds, const char* option) {
  if (const std::string why = device.missing(GpuCopy::kKernel); !why.empty()) {
    throw Error(Code::kUnsupported, text(option, ": no kernel for checksums on GPU ", device.ordinal(), ": ", why));
  }
  for (std::uint32_t i = 0; i < geometry.layers(); ++i) {
    const std::uint64_t offset = holds == GpuSlots::Holds::kFullBlock ? geometry.layer_offset(i) : 0;
    if (device.can_sum({{offset}, {geometry.layer_bytes(i)}, 1})) continue;
    throw Error(Code::kUnsupported, text(option, ": Layer Blocks of ", geometry.layer_bytes(i),
                                         " bytes can't be verified on a GPU: not whole 64 bytes, or too few"));
  }
}

}  // namespace

std::uint64_t largest_layer_bytes(const KvGeometry& geometry) {
  std::uint64_t most = 0;
  for (std::uint32_t i = 0; i < geometry.layers(); ++i) most = std::max(most, geometry.layer_bytes(i));
  return most;
}

GpuMemory::GpuMemory(std::shared_ptr<CudaDevice> device, std::uint64_t bytes, const char* option)
    : device_(std::move(device)) {
  const CudaDevice::Current current(*device_);
  cuda::DevicePtr begin = 0;
  if (device_->driver().mem_alloc(&begin, bytes) != cuda::kSuccess) {
    throw Error(Code::kNoSpace, text(option, ": GPU ", device_->ordinal(), " has no ", bytes, " bytes free"));
  }
  memory_ = {reinterpret_cast<std::byte*>(begin), bytes};
}

GpuMemory::~GpuMemory() {
  try {
    const CudaDevice::Current current(*device_);
    device_->driver().mem_free(reinterpret_cast<cuda::DevicePtr>(memory_.data()));
  } catch (const Error&) {
    // The driver has gone, and all memory with it.
  }
}

Fd GpuMemory::dma_buf() const {
  const CudaDevice::Current current(*device_);
  int fd = -1;
  const cuda::Result result = device_->driver().mem_get_handle_for_address_range(
      &fd, reinterpret_cast<cuda::DevicePtr>(memory_.data()), memory_.size(), cuda::kHandleDmaBuf, 0);
  return result == cuda::kSuccess ? Fd(fd) : Fd();
}

GpuSlots::GpuSlots(const std::shared_ptr<CudaDevice>& device, const KvGeometry& geometry, Holds holds,
                   std::uint64_t bytes, const char* option) {
  require_sums(*device, geometry, holds, option);
  slot_bytes_ = slot_for(geometry, holds);
  count_ = bytes / slot_bytes_;
  if (count_ == 0) {
    throw Error(Code::kInvalidArgument,
                text(option, " = ", bytes, " bytes: not one slot of ", slot_bytes_, " bytes fits"));
  }
  memory_ = std::make_shared<GpuMemory>(device, whole(count_ * slot_bytes_, kLargePage), option);
  for (std::uint64_t i = count_; i-- > 0;) slots_.add(memory_->memory().data() + i * slot_bytes_);
  slots_.keep(memory_);
}

}  // namespace dualkv
