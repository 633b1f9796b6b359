// Encoding and checking of block file trailers.
#include "storage/block_format.h"

#include <cstring>

#include "base/text.h"

namespace dualkv {

namespace {

constexpr std::uint64_t kMagic = 0x314b4c42564b4c44;  // "DLKVBLK1"
constexpr std::uint32_t kVersion = 1;

// Fixed part, little endian. Layer entries follow it; the last 8 bytes of the trailer are the checksum of the rest.
struct Fixed {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t layers;
  std::uint64_t fingerprint;
  std::uint64_t block_bytes;
  std::uint64_t payload_bytes;
  std::uint64_t trailer_bytes;
  std::uint32_t tokens_per_block;
  std::uint8_t key_size;
  std::uint8_t parent_size;
  std::uint8_t reserved[2];
  std::uint8_t key[Key::kMaxBytes];
  std::uint8_t parent[Key::kMaxBytes];
  std::uint8_t zero[72];
};
static_assert(sizeof(Fixed) == 192);

struct LayerEntry {
  std::uint64_t bytes;
  std::uint64_t checksum;
};
static_assert(sizeof(LayerEntry) == 16);

Fixed fixed_of(std::span<const std::byte> trailer) {
  Fixed fixed;
  std::memcpy(&fixed, trailer.data(), sizeof(fixed));
  return fixed;
}

LayerEntry entry_of(std::span<const std::byte> trailer, std::uint32_t layer) {
  LayerEntry entry;
  std::memcpy(&entry, trailer.data() + sizeof(Fixed) + layer * sizeof(entry), sizeof(entry));
  return entry;
}

std::uint64_t stored_seal(std::span<const std::byte> trailer) {
  std::uint64_t seal;
  std::memcpy(&seal, trailer.data() + trailer.size() - sizeof(seal), sizeof(seal));
  return seal;
}

std::uint64_t seal_of(std::span<const std::byte> trailer) {
  return checksum(trailer.first(trailer.size() - sizeof(std::uint64_t)));
}

Key key_of(const std::uint8_t* bytes, std::uint8_t size) {
  if (size == 0 || size > Key::kMaxBytes) return {};
  return Key(std::as_bytes(std::span(bytes, size)));
}

}  // namespace

void write_trailer(const KvGeometry& geometry, const TrailerInfo& info, std::span<std::byte> image) {
  std::memset(image.data() + geometry.block_bytes(), 0, geometry.payload_bytes() - geometry.block_bytes());
  const auto trailer = image.subspan(geometry.payload_bytes());
  std::memset(trailer.data(), 0, trailer.size());
  Fixed fixed{};
  fixed.magic = kMagic;
  fixed.version = kVersion;
  fixed.layers = geometry.layers();
  fixed.fingerprint = geometry.fingerprint();
  fixed.block_bytes = geometry.block_bytes();
  fixed.payload_bytes = geometry.payload_bytes();
  fixed.trailer_bytes = geometry.trailer_bytes();
  fixed.tokens_per_block = geometry.tokens_per_block();
  fixed.key_size = static_cast<std::uint8_t>(info.key.bytes().size());
  fixed.parent_size = static_cast<std::uint8_t>(info.parent.bytes().size());
  std::memcpy(fixed.key, info.key.bytes().data(), fixed.key_size);
  std::memcpy(fixed.parent, info.parent.bytes().data(), fixed.parent_size);
  std::memcpy(trailer.data(), &fixed, sizeof(fixed));
  for (std::uint32_t i = 0; i < geometry.layers(); ++i) {
    const LayerEntry entry{geometry.layer_bytes(i),
                           checksum(image.subspan(geometry.layer_offset(i), geometry.layer_bytes(i)))};
    std::memcpy(trailer.data() + sizeof(fixed) + i * sizeof(entry), &entry, sizeof(entry));
  }
  const std::uint64_t seal = seal_of(trailer);
  std::memcpy(trailer.data() + trailer.size() - sizeof(seal), &seal, sizeof(seal));
}

std::string check_trailer(const KvGeometry& geometry, const Key& key, std::span<const std::byte> trailer) {
  const Fixed fixed = fixed_of(trailer);
  if (fixed.magic != kMagic) return "not a block file (bad magic)";
  if (fixed.version != kVersion) return text("format version ", fixed.version, ", this build reads ", kVersion);
  if (stored_seal(trailer) != seal_of(trailer)) return "trailer checksum is wrong";
  if (fixed.fingerprint != geometry.fingerprint() || fixed.trailer_bytes != trailer.size()) {
    return text("block of another geometry: ", fixed.layers, " layers, ", fixed.tokens_per_block, " tokens, ",
                fixed.block_bytes, " bytes; wanted ", geometry.describe());
  }
  if (key_of(fixed.key, fixed.key_size) != key) return "block of another key";
  return {};
}

std::uint64_t trailer_checksum(std::span<const std::byte> trailer, std::uint32_t layer) {
  return entry_of(trailer, layer).checksum;
}

std::string check_image(const KvGeometry& geometry, const Key& key, std::span<const std::byte> image,
                        LayerRange layers) {
  const auto trailer = image.subspan(geometry.payload_bytes());
  std::string reason = check_trailer(geometry, key, trailer);
  if (!reason.empty()) return reason;
  for (std::uint32_t i = layers.first; i < layers.first + layers.count; ++i) {
    if (checksum(image.subspan(geometry.layer_offset(i), geometry.layer_bytes(i))) != trailer_checksum(trailer, i)) {
      return text("checksum of layer ", i, " is wrong");
    }
  }
  return {};
}

bool read_trailer(std::span<const std::byte> trailer, TrailerInfo* info) {
  if (trailer.size() < sizeof(Fixed)) return false;
  const Fixed fixed = fixed_of(trailer);
  if (fixed.magic != kMagic || stored_seal(trailer) != seal_of(trailer)) return false;
  *info = {key_of(fixed.key, fixed.key_size), key_of(fixed.parent, fixed.parent_size)};
  return true;
}

}  // namespace dualkv
