// Frames on a stream: a fixed header, a checked body, and for writes the raw bytes (docs/formats.md, "Wire").
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/outcome.h"
#include "dualkv/geometry.h"
#include "dualkv/paged_kv.h"
#include "memory/shared_regions.h"

namespace dualkv {

enum class FrameType : std::uint16_t {
  kHello = 1,
  kChallenge = 2,
  kProof = 3,
  kWelcome = 4,
  kRefuse = 5,
  kMessage = 6,   // a control message of the node layer
  kWrite = 7,     // Layer Blocks, bytes inline after the body
  kWriteRef = 8,  // Layer Blocks, to be pulled from the sender's memory
  kWriteDone = 9,
  kRegions = 10,  // all memory of the sender that the receiver may map (shm)
};

struct FrameHeader {
  static constexpr std::size_t kBytes = 32;
  FrameType type = FrameType::kMessage;
  std::uint32_t body_bytes = 0;
  std::uint64_t body_checksum = 0;
};

constexpr std::uint32_t kMaxWriteBlocks = 1024;

bool is_handshake(FrameType type);
// Largest body a frame of this type may have; 0 for unknown types.
std::uint32_t max_body_bytes(FrameType type);

// Header and body in one buffer.
std::vector<std::byte> encode_frame(FrameType type, std::span<const std::byte> body);
// Nullopt for anything but a right header of a known type within its limit.
std::optional<FrameHeader> decode_header(std::span<const std::byte, FrameHeader::kBytes> bytes);
bool body_is_right(const FrameHeader& header, std::span<const std::byte> body);

// One Layer Block of a write.
struct WriteEntry {
  std::uint32_t block = 0;                           // index in the grant
  std::uint64_t checksum = 0;                        // of the Layer Block
  std::array<Extent, PagedKv::kMaxPlanes> source{};  // kWriteRef only: addresses in the sender's memory
};

struct WriteHeader {
  std::uint64_t id = 0;  // the sender's, echoed in kWriteDone
  std::uint64_t grant = 0;
  std::uint32_t layer = 0;
  std::uint32_t extents = 0;  // per block; 0 in kWrite
  std::uint32_t region = 0;   // kWriteRef: the shared region that holds all sources; 0 = none does
  std::vector<WriteEntry> entries;
};

std::vector<std::byte> encode_write(const WriteHeader& write);
// Nullopt if malformed, or impossible under the geometry.
std::optional<WriteHeader> decode_write(std::span<const std::byte> body, FrameType type, const KvGeometry& geometry);

std::vector<std::byte> encode_regions(std::span<const SharedRegion> regions);
std::optional<std::vector<SharedRegion>> decode_regions(std::span<const std::byte> body);

struct WriteDone {
  std::uint64_t id = 0;
  Code code = Code::kOk;
};
std::vector<std::byte> encode_write_done(const WriteDone& done);
std::optional<WriteDone> decode_write_done(std::span<const std::byte> body);

}  // namespace dualkv
