// Keys and the chain that makes them.
#include "dualkv/keys.h"

#include <bit>
#include <cstring>

#include "base/hash.h"
#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

static_assert(std::endian::native == std::endian::little, "keys, blocks and frames are written in host order");

Key::Key(std::span<const std::byte> bytes) {
  if (bytes.empty() || bytes.size() > kMaxBytes) {
    throw Error(Code::kInvalidArgument, text("key has ", bytes.size(), " bytes: must be 1 to ", kMaxBytes));
  }
  std::memcpy(bytes_.data(), bytes.data(), bytes.size());
  size_ = static_cast<std::uint8_t>(bytes.size());
}

std::string Key::hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (std::byte b : bytes()) {
    out += kDigits[std::to_integer<int>(b) >> 4];
    out += kDigits[std::to_integer<int>(b) & 15];
  }
  return out;
}

std::size_t KeyHash::operator()(const Key& key) const noexcept { return checksum(key.bytes()); }

std::vector<Key> block_keys(std::span<const std::uint32_t> tokens, const KvGeometry& geometry, const Key& parent) {
  const std::size_t block = geometry.tokens_per_block();
  std::vector<Key> keys;
  keys.reserve(tokens.size() / block);
  Key last = parent;
  if (last.empty()) {
    const std::string root = text("dualkv key v1\n", block, "\n", geometry.namespace_name());
    last = Key(blake2b({}, std::as_bytes(std::span(root)), {}));
  }
  for (std::size_t first = 0; first + block <= tokens.size(); first += block) {
    last = Key(blake2b({}, last.bytes(), std::as_bytes(tokens.subspan(first, block))));
    keys.push_back(last);
  }
  return keys;
}

}  // namespace dualkv
