// Encoding and decoding of frames.
#include "transport/wire.h"

#include "base/bytes.h"
#include "dualkv/keys.h"

namespace dualkv {

namespace {
constexpr std::uint32_t kMagic = 0x504b4c44;  // "DLKP"
constexpr std::uint16_t kVersion = 2;
constexpr std::size_t kCheckedHeaderBytes = 24;
constexpr std::uint32_t kMaxHandshakeBytes = 1024;
constexpr std::uint32_t kMaxMessageBytes = 4u << 20;
constexpr std::size_t kRegionBytes = 32;
constexpr std::uint32_t kMaxWriteBytes = 32 + kMaxWriteBlocks * (16 + PagedKv::kMaxPlanes * 16);
}  // namespace

bool is_handshake(FrameType type) { return type >= FrameType::kHello && type <= FrameType::kRefuse; }

std::uint32_t max_body_bytes(FrameType type) {
  if (is_handshake(type)) return kMaxHandshakeBytes;
  switch (type) {
    case FrameType::kMessage: return kMaxMessageBytes;
    case FrameType::kWrite:
    case FrameType::kWriteRef: return kMaxWriteBytes;
    case FrameType::kWriteDone: return 16;
    case FrameType::kRegions: return SharedRegions::kMost * kRegionBytes;
    default: return 0;
  }
}

std::vector<std::byte> encode_frame(FrameType type, std::span<const std::byte> body) {
  ByteWriter out;
  out.put(kMagic);
  out.put(kVersion);
  out.put(type);
  out.put(static_cast<std::uint32_t>(body.size()));
  out.put(std::uint32_t{0});
  out.put(checksum(body));
  std::vector<std::byte> frame = out.take();
  const std::uint64_t header = checksum(std::span<const std::byte>(frame).first(kCheckedHeaderBytes));
  ByteWriter rest;
  rest.put(header);
  rest.put_bytes(body);
  const auto tail = rest.take();
  frame.insert(frame.end(), tail.begin(), tail.end());
  return frame;
}

std::optional<FrameHeader> decode_header(std::span<const std::byte, FrameHeader::kBytes> bytes) {
  ByteReader in(bytes);
  if (in.get<std::uint32_t>() != kMagic || in.get<std::uint16_t>() != kVersion) return std::nullopt;
  FrameHeader header;
  header.type = in.get<FrameType>();
  header.body_bytes = in.get<std::uint32_t>();
  if (in.get<std::uint32_t>() != 0) return std::nullopt;
  header.body_checksum = in.get<std::uint64_t>();
  if (in.get<std::uint64_t>() != checksum(bytes.first(kCheckedHeaderBytes))) return std::nullopt;
  if (header.body_bytes > max_body_bytes(header.type)) return std::nullopt;
  return header;
}

bool body_is_right(const FrameHeader& header, std::span<const std::byte> body) {
  return checksum(body) == header.body_checksum && max_body_bytes(header.type) > 0;
}

std::vector<std::byte> encode_write(const WriteHeader& write) {
  ByteWriter out;
  out.put(write.id);
  out.put(write.grant);
  out.put(write.layer);
  out.put(static_cast<std::uint32_t>(write.entries.size()));
  out.put(write.extents);
  out.put(write.region);
  for (const WriteEntry& entry : write.entries) {
    out.put(entry.block);
    out.put(std::uint32_t{0});
    out.put(entry.checksum);
    for (std::uint32_t i = 0; i < write.extents; ++i) {
      out.put(reinterpret_cast<std::uint64_t>(entry.source[i].data));
      out.put(entry.source[i].bytes);
    }
  }
  return out.take();
}

static bool sources_add_up(const WriteEntry& entry, std::uint32_t extents, std::uint64_t layer_bytes) {
  std::uint64_t total = 0;
  for (std::uint32_t i = 0; i < extents; ++i) {
    if (entry.source[i].bytes > layer_bytes) return false;
    total += entry.source[i].bytes;
  }
  return total == layer_bytes;
}

std::optional<WriteHeader> decode_write(std::span<const std::byte> body, FrameType type, const KvGeometry& geometry) {
  ByteReader in(body);
  WriteHeader write;
  write.id = in.get<std::uint64_t>();
  write.grant = in.get<std::uint64_t>();
  write.layer = in.get<std::uint32_t>();
  const auto count = in.get<std::uint32_t>();
  write.extents = in.get<std::uint32_t>();
  write.region = in.get<std::uint32_t>();
  if (!in.ok()) return std::nullopt;
  if (count == 0 || count > kMaxWriteBlocks || write.layer >= geometry.layers()) return std::nullopt;
  const bool referenced = type == FrameType::kWriteRef;
  if (!referenced && write.region != 0) return std::nullopt;
  if (referenced != (write.extents > 0) || write.extents > PagedKv::kMaxPlanes) return std::nullopt;
  if (in.left() != std::size_t{count} * (16 + write.extents * 16)) return std::nullopt;
  write.entries.resize(count);
  for (WriteEntry& entry : write.entries) {
    entry.block = in.get<std::uint32_t>();
    if (in.get<std::uint32_t>() != 0) return std::nullopt;
    entry.checksum = in.get<std::uint64_t>();
    for (std::uint32_t i = 0; i < write.extents; ++i) {
      entry.source[i].data = reinterpret_cast<std::byte*>(in.get<std::uint64_t>());
      entry.source[i].bytes = in.get<std::uint64_t>();
    }
    if (referenced && !sources_add_up(entry, write.extents, geometry.layer_bytes(write.layer))) return std::nullopt;
  }
  return write;
}

std::vector<std::byte> encode_regions(std::span<const SharedRegion> regions) {
  ByteWriter out;
  for (const SharedRegion& region : regions) {
    out.put(region.id);
    out.put(region.fd);
    out.put(region.base);
    out.put(region.bytes);
    out.put(region.inode);
  }
  return out.take();
}

std::optional<std::vector<SharedRegion>> decode_regions(std::span<const std::byte> body) {
  if (body.size() % kRegionBytes != 0 || body.size() / kRegionBytes > SharedRegions::kMost) return std::nullopt;
  ByteReader in(body);
  std::vector<SharedRegion> regions(body.size() / kRegionBytes);
  for (SharedRegion& region : regions) {
    region.id = in.get<std::uint32_t>();
    region.fd = in.get<std::int32_t>();
    region.base = in.get<std::uint64_t>();
    region.bytes = in.get<std::uint64_t>();
    region.inode = in.get<std::uint64_t>();
    if (region.id == 0 || region.fd < 0 || region.base + region.bytes < region.base) return std::nullopt;
  }
  return regions;
}

std::vector<std::byte> encode_write_done(const WriteDone& done) {
  ByteWriter out;
  out.put(done.id);
  out.put(static_cast<std::uint64_t>(done.code));
  return out.take();
}

std::optional<WriteDone> decode_write_done(std::span<const std::byte> body) {
  ByteReader in(body);
  WriteDone done;
  done.id = in.get<std::uint64_t>();
  const auto code = in.get<std::uint64_t>();
  if (!in.complete() || code > static_cast<std::uint64_t>(Code::kUnsupported)) return std::nullopt;
  done.code = static_cast<Code>(code);
  return done;
}

}  // namespace dualkv
