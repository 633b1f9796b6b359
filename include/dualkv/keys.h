// Block keys: the chained hash that names a Full Block, so that equal keys mean equal prefixes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "dualkv/geometry.h"

namespace dualkv {

// Opaque name of a Full Block: 1 to 32 bytes. A value.
class Key {
 public:
  static constexpr std::size_t kMaxBytes = 32;

  Key() = default;
  // Throws Error(kInvalidArgument) unless 1 <= bytes.size() <= 32.
  explicit Key(std::span<const std::byte> bytes);

  std::span<const std::byte> bytes() const { return {bytes_.data(), size_}; }
  bool empty() const { return size_ == 0; }
  std::string hex() const;

  auto operator<=>(const Key&) const = default;

 private:
  std::array<std::byte, kMaxBytes> bytes_{};
  std::uint8_t size_ = 0;
};

struct KeyHash {
  std::size_t operator()(const Key& key) const noexcept;
};

// Keys of the complete blocks of `tokens`, in order: BLAKE2b-256(parent key, the block's tokens), where the
// first parent is BLAKE2b-256 of the namespace and the block size (docs/formats.md). A cryptographic hash, since
// whoever can collide keys can read another tenant's cache. A partly filled last block has no key.
// `parent` continues a chain: pass the last key of the prefix, and only the tokens after it.
std::vector<Key> block_keys(std::span<const std::uint32_t> tokens, const KvGeometry& geometry, const Key& parent = {});

// The 64-bit checksum dualkv stores for a Layer Block (XXH3).
std::uint64_t checksum(std::span<const std::byte> bytes);

}  // namespace dualkv
