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
#include "rdma/remote_extent.h"

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
  kRegions = 10,     // all memory of the sender that the receiver may map (shm)
  kRdmaSetup = 11,   // queue pairs come and go
  kWriteAsk = 12,    // may these Layer Blocks be written, by RDMA?
  kWriteClear = 13,  // yes, to these addresses; or send them inline
  kWriteDrop = 14,   // what was asked will not be written
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

// One step of making a queue pair work, or its end (docs/formats.md, "RDMA").
struct RdmaSetup {
  enum class Step : std::uint8_t { kDown = 0, kOffer = 1, kAnswer = 2, kUp = 3 };
  Step step = Step::kDown;
  std::uint32_t pair = 0;   // index on the link: lane * connections_per_lane + n
  std::uint32_t epoch = 0;  // counts what stood in this place; a step of another epoch is out of date
  std::uint32_t number = 0;
  std::uint32_t packet_sequence = 0;
  std::uint16_t lid = 0;
  std::uint8_t mtu = 0;
  bool ethernet = false;
  std::array<std::uint8_t, 16> gid{};
};
std::vector<std::byte> encode_rdma_setup(const RdmaSetup& setup);
std::optional<RdmaSetup> decode_rdma_setup(std::span<const std::byte> body);

struct WriteAsk {
  std::uint32_t pair = 0;
  std::uint32_t epoch = 0;
  WriteHeader write;  // without extents
};
std::vector<std::byte> encode_write_ask(const WriteAsk& ask);
std::optional<WriteAsk> decode_write_ask(std::span<const std::byte> body, const KvGeometry& geometry);

struct WriteClear {
  struct Entry {
    std::uint32_t count = 0;  // 0: not wanted
    std::array<RemoteExtent, PagedKv::kMaxPlanes> extents{};
  };
  std::uint64_t id = 0;
  std::uint32_t immediate = 0;  // to be sent after the bytes
  std::vector<Entry> entries;   // one for each block asked for, in order; none: send inline
};
std::vector<std::byte> encode_write_clear(const WriteClear& clear);
std::optional<WriteClear> decode_write_clear(std::span<const std::byte> body);

std::vector<std::byte> encode_write_drop(std::uint64_t id);
std::optional<std::uint64_t> decode_write_drop(std::span<const std::byte> body);

std::vector<std::byte> encode_regions(std::span<const SharedRegion> regions);
std::optional<std::vector<SharedRegion>> decode_regions(std::span<const std::byte> body);

struct WriteDone {
  std::uint64_t id = 0;
  Code code = Code::kOk;
};
std::vector<std::byte> encode_write_done(const WriteDone& done);
std::optional<WriteDone> decode_write_done(std::span<const std::byte> body);

}  // namespace dualkv
