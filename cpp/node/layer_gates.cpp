// Gates of fixed addresses, for CUDA graphs.
#include "node/layer_gates.h"

#include <atomic>

#include "base/clock.h"
#include "base/keep_for_ever.h"
#include "node/load_task.h"

namespace dualkv {

GateState::GateState(std::shared_ptr<Progress> progress, std::shared_ptr<CudaDevice> device, std::uint32_t layers)
    : progress_(std::move(progress)),
      device_(std::move(device)),
      layers_(layers),
      words_(device_, layers * sizeof(std::uint32_t), device_->numa_node()) {
  for (std::uint32_t layer = 0; layer < layers; ++layer) marks_.push_back({this, layer});
  raise_all(taken_);
}

void GateState::wait(std::uint32_t layer, cuda::Stream stream) const {
  const CudaDevice::Current current(*device_);
  const auto& driver = device_->driver();
  cuda::DevicePtr address = 0;
  cuda_check(driver.mem_host_get_device_pointer(&address, word(layer), 0), "a gate (cuMemHostGetDevicePointer)");
  cuda_check(driver.stream_wait_value32(stream, address, 1, cuda::kWaitGeq), "a gate (cuStreamWaitValue32)");
}

void GateState::publish(std::uint32_t layer, cuda::Stream stream) {
  const auto reached = [](void* data) {
    const Mark& mark = *static_cast<Mark*>(data);
    const std::lock_guard lock(mark.gates->mutex_);
    mark.gates->progress_->post([load = mark.gates->load_, layer = mark.layer, now = Clock::now()] {
      if (const auto task = load.lock()) task->stream_reached(layer, now);
    });
  };
  const CudaDevice::Current current(*device_);
  cuda_check(device_->driver().launch_host_func(stream, reached, &marks_[layer]), "a gate (cuLaunchHostFunc)");
}

void GateState::open(const std::shared_ptr<LoadTask>& load, cuda::Stream stream) {
  struct Call {
    std::shared_ptr<GateState> gates;
    std::weak_ptr<LoadTask> load;
    std::uint64_t taken = 0;
  };
  auto call = std::make_unique<Call>(shared_from_this(), load);
  // On a thread of the driver, which must not call it: what the call holds ends elsewhere, or not at all.
  const auto reached = [](void* data) {
    auto* call = static_cast<Call*>(data);
    const auto progress = call->gates->progress_;
    call->taken = call->gates->take(call->load);
    const bool posted = progress->post([call] {
      const std::unique_ptr<Call> mine(call);
      if (const auto task = mine->load.lock()) return task->attach(mine->gates);
      mine->gates->raise_all(mine->taken);
    });
    if (posted) return;
    call->gates->raise_all(call->taken);
    keep_for_ever(std::shared_ptr<Call>(call));
  };
  const CudaDevice::Current current(*device_);
  cuda_check(device_->driver().launch_host_func(stream, reached, call.get()), "open_gates (cuLaunchHostFunc)");
  call.release();
}

std::uint64_t GateState::take(const std::weak_ptr<LoadTask>& load) {
  const std::lock_guard lock(mutex_);
  load_ = load;
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    std::atomic_ref(*word(layer)).store(0, std::memory_order_release);
  }
  return ++taken_;
}

void GateState::raise(const LoadTask& load, std::uint32_t layer) {
  const std::lock_guard lock(mutex_);
  if (load_.lock().get() == &load) std::atomic_ref(*word(layer)).store(1, std::memory_order_release);
}

void GateState::raise_all(std::uint64_t taken) {
  const std::lock_guard lock(mutex_);
  if (taken != taken_) return;
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    std::atomic_ref(*word(layer)).store(1, std::memory_order_release);
  }
}

}  // namespace dualkv
