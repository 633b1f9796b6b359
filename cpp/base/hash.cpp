// Binds XXH3 (vendored xxHash) and BLAKE2b (vendored Monocypher).
#include "base/hash.h"

#include <sys/random.h>

#include <cerrno>

#include "dualkv/keys.h"
#include "dualkv/status.h"

#define XXH_INLINE_ALL
#include "monocypher/monocypher.h"
#include "xxhash/xxhash.h"

namespace dualkv {

namespace {
const std::uint8_t* u8(std::span<const std::byte> bytes) { return reinterpret_cast<const std::uint8_t*>(bytes.data()); }
}  // namespace

std::uint64_t checksum(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::uint64_t checksum(std::span<const Extent> extents) {
  if (extents.size() == 1) return XXH3_64bits(extents[0].data, extents[0].bytes);
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (const Extent& extent : extents) XXH3_64bits_update(&state, extent.data, extent.bytes);
  return XXH3_64bits_digest(&state);
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
