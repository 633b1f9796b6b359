// KvGeometry: validation and derived sizes.
#include "dualkv/geometry.h"

#include <cstring>
#include <span>

#include "base/text.h"
#include "dualkv/keys.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {

constexpr std::uint64_t kTrailerFixedBytes = 192;  // docs/formats.md, "Trailer"
constexpr std::uint64_t kTrailerLayerBytes = 16;   // size and checksum of each Layer Block
constexpr std::uint64_t kTrailerSealBytes = 8;

std::uint64_t round_up(std::uint64_t bytes, std::uint64_t to) { return (bytes + to - 1) / to * to; }

void check(bool fine, const std::string& message) {
  if (!fine) throw Error(Code::kInvalidArgument, message);
}

template <typename T>
void append(std::vector<std::byte>& out, const T& value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), begin, begin + sizeof(value));
}

}  // namespace

KvGeometry::KvGeometry(std::vector<std::uint64_t> layer_bytes, std::uint32_t tokens_per_block,
                       std::string namespace_name)
    : layer_bytes_(std::move(layer_bytes)), tokens_per_block_(tokens_per_block), namespace_(std::move(namespace_name)) {
  check(!layer_bytes_.empty() && layer_bytes_.size() <= kMaxLayers,
        text("layers = ", layer_bytes_.size(), ": must be 1 to ", kMaxLayers));
  check(tokens_per_block_ >= 1 && tokens_per_block_ <= 65536,
        text("tokens_per_block = ", tokens_per_block_, ": must be 1 to 65536"));
  check(!namespace_.empty() && namespace_.size() <= kMaxNamespaceBytes,
        text("namespace has ", namespace_.size(), " bytes: must be 1 to ", kMaxNamespaceBytes,
             " naming model, dtype and rank, so that different caches never meet"));
  layer_offset_.push_back(0);
  for (std::size_t i = 0; i < layer_bytes_.size(); ++i) {
    check(layer_bytes_[i] >= 1 && layer_bytes_[i] <= kMaxLayerBytes,
          text("layer_bytes[", i, "] = ", layer_bytes_[i], ": must be 1 to ", kMaxLayerBytes));
    layer_offset_.push_back(layer_offset_.back() + layer_bytes_[i]);
  }
  std::vector<std::byte> fields;
  append(fields, tokens_per_block_);
  append(fields, static_cast<std::uint32_t>(layer_bytes_.size()));
  for (std::uint64_t bytes : layer_bytes_) append(fields, bytes);
  const auto name = std::as_bytes(std::span(namespace_));
  fields.insert(fields.end(), name.begin(), name.end());
  fingerprint_ = checksum(fields);
}

std::uint64_t KvGeometry::payload_bytes() const { return round_up(block_bytes(), kPageBytes); }

std::uint64_t KvGeometry::trailer_bytes() const {
  return round_up(kTrailerFixedBytes + layers() * kTrailerLayerBytes + kTrailerSealBytes, kPageBytes);
}

std::string KvGeometry::describe() const {
  return text(layers(), " layers, ", tokens_per_block_, " tokens a block, ", block_bytes(), " bytes a Full Block, ",
              "namespace '", namespace_, "'");
}

}  // namespace dualkv
