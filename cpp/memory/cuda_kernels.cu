// Kernels: copies of many runs between pinned host memory and the device, and XXH3-64 of Layer Blocks.
// Threads never talk to each other, so a host compiler can run the same code, one thread after the other, in tests.
#include "memory/cuda_kernels.h"

using namespace dualkv;

namespace {

constexpr uint32_t kWarp = 32;

__device__ __forceinline__ bool aligned(const CopyRun& run) { return (run.from | run.to | run.bytes) % 16 == 0; }

// Four loads of 16 bytes a thread before the first store: enough in flight to fill a link with few warps.
__device__ __forceinline__ void copy_vectors(const uint4* from, uint4* to, uint32_t count, uint32_t lane) {
  uint32_t at = lane;
  for (; at + 3 * kWarp < count; at += 4 * kWarp) {
    const uint4 a = __ldcs(from + at);
    const uint4 b = __ldcs(from + at + kWarp);
    const uint4 c = __ldcs(from + at + 2 * kWarp);
    const uint4 d = __ldcs(from + at + 3 * kWarp);
    __stcs(to + at, a);
    __stcs(to + at + kWarp, b);
    __stcs(to + at + 2 * kWarp, c);
    __stcs(to + at + 3 * kWarp, d);
  }
  for (; at < count; at += kWarp) __stcs(to + at, __ldcs(from + at));
}

__device__ __forceinline__ uint64_t low32(uint64_t value) { return value & 0xffffffffu; }

// Where the eight bytes at `offset` of the runs are.
__device__ __forceinline__ const uint64_t* word_at(const ChecksumRuns& runs, uint64_t offset) {
  uint32_t run = 0;
#pragma unroll
  for (uint32_t i = 0; i + 1 < ChecksumRuns::kMost; ++i) {
    if (run == i && i + 1 < runs.count && offset >= runs.bytes[i]) {
      offset -= runs.bytes[i];
      run = i + 1;
    }
  }
  uint64_t base = runs.data[0];
#pragma unroll
  for (uint32_t i = 1; i < ChecksumRuns::kMost; ++i) {
    if (run == i) base = runs.data[i];
  }
  return reinterpret_cast<const uint64_t*>(base + offset);
}

}  // namespace

// A warp takes pieces of kCopyPiece bytes: piece p of run r is number r * pieces + p; `pieces` is that of the longest
// run. Runs whose addresses and length are not multiples of 16 are copied byte by byte.
extern "C" __global__ void __launch_bounds__(512) dualkv_copy(const CopyRun* runs, uint32_t count, uint32_t pieces) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warps = gridDim.x * (blockDim.x / kWarp);
  const uint64_t end = static_cast<uint64_t>(count) * pieces;
  for (uint64_t work = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp; work < end; work += warps) {
    CopyRun run = runs[work / pieces];
    const uint64_t first = (work % pieces) * kCopyPiece;
    if (first >= run.bytes) continue;
    run.from += first;
    run.to += first;
    run.bytes = run.bytes - first < kCopyPiece ? run.bytes - first : kCopyPiece;
    if (aligned(run)) {
      copy_vectors(reinterpret_cast<const uint4*>(run.from), reinterpret_cast<uint4*>(run.to),
                   static_cast<uint32_t>(run.bytes / sizeof(uint4)), lane);
      continue;
    }
    const auto* from = reinterpret_cast<const unsigned char*>(run.from);
    auto* to = reinterpret_cast<unsigned char*>(run.to);
    for (uint32_t at = lane; at < run.bytes; at += kWarp) to[at] = from[at];
  }
}

// XXH3-64's accumulators of each Layer Block: lanes[block * kChecksumLanes + lane]. `secret`: its 192 bytes, then the
// eight initial accumulators. The eight threads of a block each carry one lane, which needs no other's.
extern "C" __global__ void __launch_bounds__(256) dualkv_checksum(const ChecksumRuns* blocks, uint32_t count,
                                                                  const uint64_t* secret, uint64_t* lanes) {
  constexpr uint32_t kSecretWords = 24, kStripes = 16;  // stripes between two scrambles
  constexpr uint64_t kChunk = kStripes * kChecksumStripe;
  constexpr uint64_t kPrime32 = 0x9E3779B1u;
  const uint32_t lane = threadIdx.x % kChecksumLanes;
  const uint32_t step = gridDim.x * (blockDim.x / kChecksumLanes);
  uint64_t key[kStripes];
#pragma unroll
  for (uint32_t i = 0; i < kStripes; ++i) key[i] = secret[i + lane];
  const uint64_t scramble = secret[kSecretWords - kChecksumLanes + lane];
  // The last stripe's secret begins seven bytes before that of the scramble.
  const uint64_t before = secret[kSecretWords - kChecksumLanes + lane - 1];
  const uint64_t last_key = before >> 8 | scramble << 56;
  for (uint32_t block = blockIdx.x * (blockDim.x / kChecksumLanes) + threadIdx.x / kChecksumLanes; block < count;
       block += step) {
    const ChecksumRuns runs = blocks[block];
    uint64_t total = 0;
#pragma unroll
    for (uint32_t i = 0; i < ChecksumRuns::kMost; ++i) total += i < runs.count ? runs.bytes[i] : 0;
    uint64_t sum = secret[kSecretWords + lane];
    const auto mix = [&](uint64_t offset, uint64_t with) {
      const uint64_t* word = word_at(runs, offset);
      const uint64_t mixed = word[lane] ^ with;
      sum += word[lane ^ 1] + low32(mixed) * (mixed >> 32);
    };
    const uint64_t chunks = (total - 1) / kChunk;
    for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
      for (uint32_t i = 0; i < kStripes; ++i) mix(chunk * kChunk + i * kChecksumStripe, key[i]);
      sum = (sum ^ sum >> 47 ^ scramble) * kPrime32;
    }
    const uint32_t stripes = static_cast<uint32_t>((total - 1 - chunks * kChunk) / kChecksumStripe);
#pragma unroll
    for (uint32_t i = 0; i < kStripes; ++i) {
      if (i < stripes) mix(chunks * kChunk + i * kChecksumStripe, key[i]);
    }
    mix(total - kChecksumStripe, last_key);
    lanes[block * kChecksumLanes + lane] = sum;
  }
}
