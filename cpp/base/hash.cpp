// Binds XXH3 (vendored xxHash, by the CPU's best kernel) and BLAKE2b (vendored Monocypher).
#include "base/hash.h"

#include <sys/random.h>

#include <cerrno>

#include "base/checksum_kernel.h"
#include "dualkv/keys.h"
#include "dualkv/status.h"
#include "monocypher/monocypher.h"

namespace dualkv {

namespace {
const ChecksumKernel& kernel() {
#if defined(__x86_64__)
  static const ChecksumKernel& best = __builtin_cpu_supports("avx512f") ? kAvx512Kernel
                                      : __builtin_cpu_supports("avx2")  ? kAvx2Kernel
                                                                        : kBaselineKernel;
  return best;
#else
  return kBaselineKernel;
#endif
}

const std::uint8_t* u8(std::span<const std::byte> bytes) { return reinterpret_cast<const std::uint8_t*>(bytes.data()); }
}  // namespace

std::uint64_t checksum(std::span<const std::byte> bytes) { return kernel().hash(bytes.data(), bytes.size()); }
std::uint64_t checksum(std::span<const Extent> extents) {
  return kernel().hash_extents(extents.data(), extents.size());
}
std::uint64_t copy_checksum(std::span<const std::byte> source, std::span<const Extent> target) {
  return kernel().copy(source.data(), source.size(), target.data());
}

std::array<std::uint64_t, 32> checksum_constants() {
  constexpr xxh_u64 initial[8] = XXH3_INIT_ACC;
  std::array<std::uint64_t, 32> out;
  static_assert(sizeof(XXH3_kSecret) + sizeof(initial) == sizeof(out));
  std::memcpy(out.data(), XXH3_kSecret, sizeof(XXH3_kSecret));
  std::memcpy(out.data() + sizeof(XXH3_kSecret) / sizeof(std::uint64_t), initial, sizeof(initial));
  return out;
}

std::uint64_t checksum_of_lanes(std::span<const std::uint64_t, 8> lanes, std::uint64_t bytes) {
  alignas(64) xxh_u64 acc[8];
  std::memcpy(acc, lanes.data(), sizeof(acc));
  return XXH3_mergeAccs(acc, XXH3_kSecret + XXH_SECRET_MERGEACCS_START, bytes * XXH_PRIME64_1);
}

Digest blake2b(std::span<const std::byte> key, std::span<const std::byte> first, std::span<const std::byte> second) {
  Digest digest;
  crypto_blake2b_ctx context;
  crypto_blake2b_keyed_init(&context, digest.size(), u8(key), key.size());
  crypto_blake2b_update(&context, u8(first), first.size());
  crypto_blake2b_update(&context, u8(second), second.size());
  crypto_blake2b_final(&context, reinterpret_cast<std::uint8_t*>(digest.data()));
  return digest;
}

bool equal(const Digest& a, const Digest& b) { return crypto_verify32(u8(a), u8(b)) == 0; }

void fill_random(std::span<std::byte> out) {
  std::size_t filled = 0;
  while (filled < out.size()) {
    const ssize_t got = getrandom(out.data() + filled, out.size() - filled, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(Code::kIo, "getrandom", errno);
    filled += static_cast<std::size_t>(got);
  }
}

std::uint64_t random_u64() {
  std::uint64_t value = 0;
  while (value == 0) fill_random(std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

}  // namespace dualkv
