// FaultyReader: seeded faults in front of a reader, for tests of everything above storage.
#include <cerrno>
#include <map>
#include <random>
#include <unordered_map>

#include "base/clock.h"
#include "memory/cuda_device.h"
#include "storage/block_reader.h"

namespace dualkv {

namespace {

class FaultyReader : public BlockReader {
 public:
  FaultyReader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry, const ReadFaults& faults)
      : inner_(std::move(inner)), geometry_(geometry), faults_(faults), random_(faults.seed) {}

  bool try_submit(const ReadRequest& request) noexcept override {
    if (!inner_->try_submit(request)) return false;
    in_flight_.emplace(request.id, request);
    return true;
  }

  void flush() noexcept override { inner_->flush(); }

  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
    std::size_t taken = 0;
    ReadCompletion completion;
    while (taken < out.size() && inner_->poll({&completion, 1}) == 1) {
      if (apply(completion)) out[taken++] = completion;
    }
    const auto now = Clock::now();
    while (taken < out.size() && !late_.empty() && late_.begin()->first <= now) {
      out[taken++] = late_.begin()->second;
      late_.erase(late_.begin());
    }
    return taken;
  }

  int event_fd() const override { return inner_->event_fd(); }
  void idle() noexcept override { inner_->idle(); }

  bool drain(Clock::time_point deadline) noexcept override { return inner_->drain(deadline); }

  std::optional<Clock::time_point> next_wake() const override {
    const auto inner = inner_->next_wake();
    if (late_.empty()) return inner;
    const auto mine = late_.begin()->first;
    return inner && *inner < mine ? *inner : mine;
  }

 private:
  bool hit(double rate) { return rate > 0 && std::uniform_real_distribution<>(0, 1)(random_) < rate; }

  // False: nothing to report now (dropped, or late).
  bool apply(ReadCompletion& completion) {
    const auto node = in_flight_.extract(completion.id);
    const ReadRequest& request = node.mapped();
    if (hit(faults_.drop_rate)) return false;
    if (hit(faults_.error_rate)) completion.outcome = {Code::kIo, EIO};
    if (hit(faults_.short_rate)) completion = {completion.id, {Code::kCorrupt, 0}, completion.bytes / 2};
    if (completion.outcome.ok() && hit(faults_.corrupt_rate)) flip_bit(request);
    if (!hit(faults_.delay_rate)) return true;
    const auto delay = to_duration(faults_.delay_s);
    late_.emplace(Clock::now() + delay, completion);
    return false;
  }

  void flip_bit(const ReadRequest& request) {
    const std::uint64_t begin = geometry_.layer_offset(request.layers.first);
    const std::uint64_t end = geometry_.layer_offset(request.layers.first + request.layers.count);
    const std::uint64_t at = std::uniform_int_distribution<std::uint64_t>(begin, end - 1)(random_);
    if (request.gpu_slot == nullptr) {
      request.slot[at] ^= std::byte{1};
      return;
    }
    std::byte byte{};
    const auto host = reinterpret_cast<std::uint64_t>(&byte), gpu = reinterpret_cast<std::uint64_t>(request.gpu_slot);
    auto device = CudaDevice::open(request.gpu->ordinal());
    const CopyRun out{gpu + at, host, 1}, back{host, gpu + at, 1};
    device->copy_now({&out, 1}, HostSide::kTo);
    byte ^= std::byte{1};
    device->copy_now({&back, 1}, HostSide::kFrom);
  }

  std::unique_ptr<BlockReader> inner_;
  const KvGeometry geometry_;
  const ReadFaults faults_;
  std::mt19937_64 random_;
  std::unordered_map<std::uint64_t, ReadRequest> in_flight_;
  std::multimap<Clock::time_point, ReadCompletion> late_;
};

}  // namespace

std::unique_ptr<BlockReader> make_faulty_reader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry,
                                                const ReadFaults& faults) {
  return std::make_unique<FaultyReader>(std::move(inner), geometry, faults);
}

}  // namespace dualkv
