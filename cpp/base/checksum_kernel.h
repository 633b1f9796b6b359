// The checksum's inner loops, compiled once per instruction set (checksum_*.cpp). Nothing here may be an inline
// function with external linkage: the linker could give its AVX-512 copy to code that runs on older CPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dualkv/paged_kv.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Everything in the header becomes static: each includer gets its own copy, for its own instruction set.
#define XXH_INLINE_ALL
#include "xxhash/xxhash.h"

namespace dualkv {

// What one instruction set offers. All give the same results.
struct ChecksumKernel {
  std::uint64_t (*hash)(const std::byte* data, std::size_t bytes);
  std::uint64_t (*hash_extents)(const Extent* extents, std::size_t count);
  std::uint64_t (*copy)(const std::byte* source, std::size_t bytes, const Extent* target);
};

extern const ChecksumKernel kBaselineKernel;
#if defined(__x86_64__)
extern const ChecksumKernel kAvx2Kernel;
extern const ChecksumKernel kAvx512Kernel;
#endif

namespace {

[[maybe_unused]] std::uint64_t hash_run(const std::byte* data, std::size_t bytes) { return XXH3_64bits(data, bytes); }

[[maybe_unused]] std::uint64_t hash_extents(const Extent* extents, std::size_t count) {
  if (count == 1) return XXH3_64bits(extents[0].data, extents[0].bytes);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (std::size_t i = 0; i < count; ++i) XXH3_64bits_update(&state, extents[i].data, extents[i].bytes);
  return XXH3_64bits_digest(&state);
}

constexpr std::size_t kStripe = XXH_STRIPE_LEN;
constexpr std::size_t kStripesPerChunk = (sizeof(XXH3_kSecret) - kStripe) / XXH_SECRET_CONSUME_RATE;
constexpr std::size_t kChunk = kStripe * kStripesPerChunk;  // 1024: what XXH3 mixes between two scrambles
constexpr std::size_t kPrefetch = 16 * kStripe;

// One stripe past the cache: what is copied here is not read again soon, and storing it this way saves the memory
// the read that an ordinary store begins with.
inline void store_past_cache(std::byte* target, const std::byte* source) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i,
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source) + i));
  }
#elif defined(__x86_64__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target) + i,
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i));
  }
#else
  std::memcpy(target, source, kStripe);
#endif
}

// Where the next bytes of a copy go: extents, one after the other.
class Cursor {
 public:
  explicit Cursor(const Extent* target) : extent_(target) {}

  // The next `bytes` of the target if they lie in one run whose start is aligned for store_past_cache, else null.
  std::byte* aligned(std::size_t bytes) {
    std::byte* const at = extent_->data + used_;
    const bool fits = extent_->bytes - used_ >= bytes && reinterpret_cast<std::uintptr_t>(at) % kStripe == 0;
    if (fits) advance(bytes);
    return fits ? at : nullptr;
  }

  void put(const std::byte* source, std::size_t bytes) {
    while (bytes > 0) {
      const std::size_t room = extent_->bytes - used_;
      const std::size_t now = bytes < room ? bytes : room;
      std::memcpy(extent_->data + used_, source, now);
      source += now;
      bytes -= now;
      advance(now);
    }
  }

 private:
  void advance(std::size_t bytes) {
    used_ += bytes;
    if (used_ < extent_->bytes) return;
    ++extent_;  // past the last one when all is copied
    used_ = 0;
  }

  const Extent* extent_;
  std::size_t used_ = 0;
};

// XXH3-64 (its "long" form, for more than a chunk) in the same pass as the copy. The source is loaded once: it may
// belong to another process, and what is hashed must be what is stored.
[[maybe_unused]] std::uint64_t copy_run(const std::byte* source, std::size_t bytes, const Extent* target) {
  Cursor cursor(target);
  alignas(64) std::byte loaded[kStripe + kChunk];  // the last stripe of the chunk before, then this chunk
  std::byte* const chunk = loaded + kStripe;
  if (bytes <= kChunk) {
    std::memcpy(chunk, source, bytes);
    cursor.put(chunk, bytes);
    return XXH3_64bits(chunk, bytes);
  }
  alignas(64) xxh_u64 acc[8] = XXH3_INIT_ACC;
  const auto* secret = XXH3_kSecret;
  const std::size_t chunks = (bytes - 1) / kChunk;
  for (std::size_t n = 0; n < chunks; ++n) {
    const std::byte* from = source + n * kChunk;
    std::byte* to = cursor.aligned(kChunk);
    for (std::size_t i = 0; i < kStripesPerChunk; ++i) {
      XXH_PREFETCH(from + i * kStripe + kPrefetch);
      std::byte* stripe = chunk + i * kStripe;
      std::memcpy(stripe, from + i * kStripe, kStripe);
      XXH3_accumulate_512(acc, reinterpret_cast<const xxh_u8*>(stripe), secret + i * XXH_SECRET_CONSUME_RATE);
      if (to != nullptr) store_past_cache(to + i * kStripe, stripe);
    }
    if (to == nullptr) cursor.put(chunk, kChunk);
    XXH3_scrambleAcc(acc, secret + sizeof(XXH3_kSecret) - kStripe);
  }
  std::memcpy(loaded, chunk + kChunk - kStripe, kStripe);
  const std::size_t tail = bytes - chunks * kChunk;
  std::memcpy(chunk, source + chunks * kChunk, tail);
  for (std::size_t i = 0; i < (tail - 1) / kStripe; ++i) {
    XXH3_accumulate_512(acc, reinterpret_cast<const xxh_u8*>(chunk + i * kStripe),
                        secret + i * XXH_SECRET_CONSUME_RATE);
  }
  XXH3_accumulate_512(acc, reinterpret_cast<const xxh_u8*>(loaded + tail),
                      secret + sizeof(XXH3_kSecret) - kStripe - XXH_SECRET_LASTACC_START);
  cursor.put(chunk, tail);
#if defined(__x86_64__)
  _mm_sfence();  // stores past the cache are ordered by nothing else
#endif
  return XXH3_mergeAccs(acc, secret + XXH_SECRET_MERGEACCS_START, static_cast<xxh_u64>(bytes) * XXH_PRIME64_1);
}

}  // namespace
}  // namespace dualkv
