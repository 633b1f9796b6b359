// The shape of a model's KV cache, and where each Layer Block lies inside a stored Full Block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dualkv {

// A value. Two nodes can exchange KV, and a stored block can be read, only between equal geometries.
class KvGeometry {
 public:
  static constexpr std::uint32_t kMaxLayers = 1024;
  static constexpr std::uint64_t kMaxLayerBytes = std::uint64_t{1} << 30;
  static constexpr std::size_t kMaxNamespaceBytes = 256;
  static constexpr std::uint64_t kPageBytes = 4096;  // O_DIRECT on every common device

  // layer_bytes: bytes of one layer's KV for tokens_per_block tokens, one entry a layer.
  // namespace_name: what must be equal for KV to be interchangeable: model, dtype, TP rank, salt.
  // Throws Error(kInvalidArgument) naming the value that is out of range.
  KvGeometry(std::vector<std::uint64_t> layer_bytes, std::uint32_t tokens_per_block, std::string namespace_name);

  std::uint32_t layers() const { return static_cast<std::uint32_t>(layer_bytes_.size()); }
  std::uint32_t tokens_per_block() const { return tokens_per_block_; }
  const std::string& namespace_name() const { return namespace_; }
  std::uint64_t layer_bytes(std::uint32_t layer) const { return layer_bytes_[layer]; }
  // Offset of a Layer Block in its Full Block; layer_offset(layers()) is block_bytes().
  std::uint64_t layer_offset(std::uint32_t layer) const { return layer_offset_[layer]; }
  std::uint64_t block_bytes() const { return layer_offset_.back(); }
  // block_bytes padded to a page; the trailer begins here (docs/formats.md).
  std::uint64_t payload_bytes() const;
  std::uint64_t trailer_bytes() const;
  // Size of a block file and of a staging slot.
  std::uint64_t file_bytes() const { return payload_bytes() + trailer_bytes(); }
  // 64-bit digest of every field above; written in each block and exchanged by peers.
  std::uint64_t fingerprint() const { return fingerprint_; }
  std::string describe() const;

  bool operator==(const KvGeometry& other) const {
    return layer_bytes_ == other.layer_bytes_ && tokens_per_block_ == other.tokens_per_block_ &&
           namespace_ == other.namespace_;
  }

 private:
  std::vector<std::uint64_t> layer_bytes_;
  std::vector<std::uint64_t> layer_offset_;
  std::uint32_t tokens_per_block_;
  std::string namespace_;
  std::uint64_t fingerprint_;
};

}  // namespace dualkv
