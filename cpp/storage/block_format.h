// The block file: layer-major payload, then a trailer that names and checks it (docs/formats.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "dualkv/geometry.h"
#include "dualkv/keys.h"
#include "dualkv/store.h"

namespace dualkv {

// What a trailer says beyond the geometry.
struct TrailerInfo {
  Key key;
  Key parent;
};

// Fills the padding and the trailer of a file image whose payload is in place. image.size() == file_bytes().
void write_trailer(const KvGeometry& geometry, const TrailerInfo& info, std::span<std::byte> image);

// Empty if the trailer (trailer_bytes() long) is whole and is for this geometry and key; else the reason.
std::string check_trailer(const KvGeometry& geometry, const Key& key, std::span<const std::byte> trailer);

// The checksum the trailer holds for a layer. The trailer must have been checked.
std::uint64_t trailer_checksum(std::span<const std::byte> trailer, std::uint32_t layer);

// Empty if trailer and `layers` of the image are right; else the reason, naming the layer.
std::string check_image(const KvGeometry& geometry, const Key& key, std::span<const std::byte> image,
                        LayerRange layers);

// Reads parent and key from a trailer of any geometry; false if it is not a whole trailer.
bool read_trailer(std::span<const std::byte> trailer, TrailerInfo* info);

}  // namespace dualkv
