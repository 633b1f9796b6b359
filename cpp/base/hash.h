// Hashes: XXH3 for integrity, BLAKE2b for names and for proving the secret. The only file that knows the vendored
// libraries' headers, with hash.cpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "dualkv/paged_kv.h"

namespace dualkv {

using Digest = std::array<std::byte, 32>;

// XXH3-64 of the concatenation of the extents.
std::uint64_t checksum(std::span<const Extent> extents);
// Copies `source` to the extents, whose total is its size, and returns the XXH3-64 of what was copied: one pass over
// memory, past the cache, so it costs no more than memcpy.
std::uint64_t copy_checksum(std::span<const std::byte> source, std::span<const Extent> target);
// XXH3-64 in parts, for those who sum on another device: its 192 bytes of secret and eight initial accumulators, and
// what the final accumulators of an input of more than 240 bytes come to.
std::array<std::uint64_t, 32> checksum_constants();
std::uint64_t checksum_of_lanes(std::span<const std::uint64_t, 8> lanes, std::uint64_t bytes);
// BLAKE2b-256 of the concatenation of two parts, keyed if `key` is not empty (at most 64 bytes are allowed).
Digest blake2b(std::span<const std::byte> key, std::span<const std::byte> first, std::span<const std::byte> second);
// Constant-time comparison.
bool equal(const Digest& a, const Digest& b);
// Bytes from the kernel's random source; throws Error if there is none.
void fill_random(std::span<std::byte> out);
std::uint64_t random_u64();

}  // namespace dualkv
