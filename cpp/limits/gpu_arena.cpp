// Copies between pinned memory and a GPU, by each engine.
#include <algorithm>
#include <cstring>
#include <random>

#include "base/text.h"
#include "dualkv/limits.h"
#include "limits/meter.h"
#include "memory/cuda_device.h"

namespace dualkv::limits {

struct GpuArena::State {
  std::shared_ptr<CudaDevice> device;
  GpuCopies copies;
  PinnedMemory host, list, sums, lanes;
  cuda::DevicePtr memory = 0;
  cuda::Stream stream = nullptr;

  State(std::shared_ptr<CudaDevice> gpu, const GpuCopies& what)
      : device(std::move(gpu)),
        copies(what),
        host(device, bytes(), device->numa_node()),
        list(device, what.count * sizeof(CopyRun), device->numa_node()),
        sums(device, what.count * sizeof(ChecksumRuns), device->numa_node()),
        lanes(device, what.count * kChecksumLanes * sizeof(std::uint64_t), device->numa_node()) {
    const CudaDevice::Current current(*device);
    cuda_check(device->driver().mem_alloc(&memory, bytes()), "memory of a GPU for a benchmark (cuMemAlloc)");
    try {
      stream = device->new_stream(/*low_priority=*/true);
    } catch (...) {
      device->driver().mem_free(memory);
      throw;
    }
  }
  ~State() {
    device->end_stream(stream);
    const CudaDevice::Current current(*device);
    device->driver().mem_free(memory);
  }

  std::uint64_t bytes() const { return copies.block_bytes * copies.count; }
  std::span<CopyRun> runs() const { return {reinterpret_cast<CopyRun*>(list.data()), copies.count}; }
  std::uint64_t on_host(std::uint64_t block) const {
    return reinterpret_cast<std::uint64_t>(host.data()) + block * copies.block_bytes;
  }
  HostSide side() const { return copies.to_gpu ? HostSide::kFrom : HostSide::kTo; }
  template <typename Submit>
  GpuSample timed(Submit submit) const {
    const CudaDevice::Current current(*device);
    const Meter meter(CLOCK_THREAD_CPUTIME_ID);
    submit();
    const double submitted = meter.elapsed_s();
    cuda_check(device->driver().stream_synchronize(stream), "copies of a benchmark");
    return {meter.stop(bytes()), submitted};
  }
};

GpuArena::GpuArena(const GpuCopies& copies) {
  constexpr std::uint64_t kMost = std::uint64_t{1} << 36;
  if (copies.block_bytes == 0 || copies.count == 0 || copies.count > kMost / copies.block_bytes) {
    throw Error(Code::kInvalidArgument, text("gpu copies: ", copies.count, " blocks of ", copies.block_bytes,
                                             " bytes: give at least one byte, and no more than ", kMost, " in all"));
  }
  state_ = std::make_unique<State>(CudaDevice::open(copies.gpu), copies);
  std::mt19937_64 random(copies.count);
  std::vector<std::uint64_t> from(copies.count), to(copies.count);
  for (std::uint64_t i = 0; i < copies.count; ++i) from[i] = to[i] = i;
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  const auto sums = std::span(reinterpret_cast<ChecksumRuns*>(state_->sums.data()), copies.count);
  for (std::uint64_t i = 0; i < copies.count; ++i) {
    const std::uint64_t host = state_->on_host(from[i]), device = state_->memory + to[i] * copies.block_bytes;
    state_->runs()[i] =
        copies.to_gpu ? CopyRun{host, device, copies.block_bytes} : CopyRun{device, host, copies.block_bytes};
    sums[i] = ChecksumRuns{{device}, {copies.block_bytes}, 1};
  }
}

GpuArena::~GpuArena() = default;

GpuSample GpuArena::run(GpuCopy engine) {
  if (const std::string why = state_->device->missing(engine); !why.empty()) throw Error(Code::kUnsupported, why);
  return state_->timed([&] { state_->device->enqueue(state_->stream, state_->runs(), state_->side(), engine); });
}

GpuSample GpuArena::run_verified(GpuCopy engine) {
  const std::span sums(reinterpret_cast<const ChecksumRuns*>(state_->sums.data()), state_->copies.count);
  if (!state_->device->can_sum(sums[0])) {
    throw Error(Code::kUnsupported, "the checksum kernel is missing, or blocks are not of whole 64 bytes");
  }
  return state_->timed([&] {
    state_->device->enqueue(state_->stream, state_->runs(), state_->side(), engine);
    state_->device->enqueue_checksums(state_->stream, sums, reinterpret_cast<std::uint64_t*>(state_->lanes.data()));
  });
}

std::byte* GpuArena::memory() const { return reinterpret_cast<std::byte*>(state_->memory); }

GpuSample GpuArena::one_copy() {
  const std::uint64_t host = state_->on_host(0);
  const CopyRun whole = state_->copies.to_gpu ? CopyRun{host, state_->memory, state_->bytes()}
                                              : CopyRun{state_->memory, host, state_->bytes()};
  return state_->timed([&] { state_->device->enqueue(state_->stream, {&whole, 1}, state_->side(), GpuCopy::kMemcpy); });
}

bool GpuArena::moves_the_right_bytes(GpuCopy engine) {
  const std::span host = state_->host.memory();
  std::mt19937_64 random(7);
  std::vector<std::byte> before(host.size());
  for (std::size_t at = 0; at < before.size(); at += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(before.data() + at, &word, std::min(sizeof(word), before.size() - at));
  }
  const CopyRun in{reinterpret_cast<std::uint64_t>(before.data()), state_->memory, before.size()};
  std::vector<std::byte> there(before.size());
  const CopyRun out{state_->memory, reinterpret_cast<std::uint64_t>(there.data()), there.size()};
  if (state_->copies.to_gpu) {
    std::copy(before.begin(), before.end(), host.begin());
    run(engine);
    state_->device->copy_now({&out, 1}, HostSide::kTo);
  } else {
    state_->device->copy_now({&in, 1}, HostSide::kFrom);
    run(engine);
  }
  const std::byte* moved = state_->copies.to_gpu ? there.data() : host.data();
  for (const CopyRun& copied : state_->runs()) {
    const std::uint64_t from = copied.from - (state_->copies.to_gpu ? state_->on_host(0) : state_->memory);
    const std::uint64_t to = copied.to - (state_->copies.to_gpu ? state_->memory : state_->on_host(0));
    if (std::memcmp(before.data() + from, moved + to, copied.bytes) != 0) return false;
  }
  return true;
}

}  // namespace dualkv::limits
