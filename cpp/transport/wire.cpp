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
constexpr std::size_t kRdmaSetupBytes = 40;
constexpr std::size_t kExtentBytes = 24;
constexpr std::uint32_t kMaxClearBytes = 16 + kMaxWriteBlocks * (8 + PagedKv::kMaxPlanes * kExtentBytes);
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
    case FrameType::kRdmaSetup: return kRdmaSetupBytes;
    case FrameType::kWriteAsk: return 8 + kMaxWriteBytes;
    case FrameType::kWriteClear: return kMaxClearBytes;
    case FrameType::kWriteDrop: return 8;
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

std::vector<std::byte> encode_rdma_setup(const RdmaSetup& setup) {
  ByteWriter out;
  out.put(setup.pair);
  out.put(setup.epoch);
  out.put(setup.number);
  out.put(setup.packet_sequence);
  out.put(setup.lid);
  out.put(setup.mtu);
  out.put(static_cast<std::uint8_t>(setup.ethernet));
  out.put(static_cast<std::uint32_t>(setup.step));
  out.put_bytes(std::as_bytes(std::span(setup.gid)));
  return out.take();
}

std::optional<RdmaSetup> decode_rdma_setup(std::span<const std::byte> body) {
  if (body.size() != kRdmaSetupBytes) return std::nullopt;
  ByteReader in(body);
  RdmaSetup setup;
  setup.pair = in.get<std::uint32_t>();
  setup.epoch = in.get<std::uint32_t>();
  setup.number = in.get<std::uint32_t>();
  setup.packet_sequence = in.get<std::uint32_t>();
  setup.lid = in.get<std::uint16_t>();
  setup.mtu = in.get<std::uint8_t>();
  const auto ethernet = in.get<std::uint8_t>();
  const auto step = in.get<std::uint32_t>();
  for (std::uint8_t& byte : setup.gid) byte = in.get<std::uint8_t>();
  if (!in.complete() || ethernet > 1 || step > static_cast<std::uint32_t>(RdmaSetup::Step::kUp)) return std::nullopt;
  setup.ethernet = ethernet == 1;
  setup.step = static_cast<RdmaSetup::Step>(step);
  return setup;
}

std::vector<std::byte> encode_write_ask(const WriteAsk& ask) {
  ByteWriter out;
  out.put(ask.pair);
  out.put(ask.epoch);
  out.put_bytes(encode_write(ask.write));
  return out.take();
}

std::optional<WriteAsk> decode_write_ask(std::span<const std::byte> body, const KvGeometry& geometry) {
  ByteReader in(body);
  WriteAsk ask;
  ask.pair = in.get<std::uint32_t>();
  ask.epoch = in.get<std::uint32_t>();
  if (!in.ok()) return std::nullopt;
  auto write = decode_write(body.last(in.left()), FrameType::kWrite, geometry);
  if (!write) return std::nullopt;
  ask.write = std::move(*write);
  return ask;
}

std::vector<std::byte> encode_write_clear(const WriteClear& clear) {
  ByteWriter out;
  out.put(clear.id);
  out.put(clear.immediate);
  out.put(static_cast<std::uint32_t>(clear.entries.size()));
  for (const WriteClear::Entry& entry : clear.entries) {
    out.put(entry.count);
    out.put(std::uint32_t{0});
    for (const RemoteExtent& extent : std::span(entry.extents).first(entry.count)) {
      out.put(extent.address);
      out.put(extent.bytes);
      out.put(extent.key);
      out.put(std::uint32_t{0});
    }
  }
  return out.take();
}

std::optional<WriteClear> decode_write_clear(std::span<const std::byte> body) {
  ByteReader in(body);
  WriteClear clear;
  clear.id = in.get<std::uint64_t>();
  clear.immediate = in.get<std::uint32_t>();
  const auto count = in.get<std::uint32_t>();
  if (!in.ok() || count > kMaxWriteBlocks) return std::nullopt;
  clear.entries.resize(count);
  for (WriteClear::Entry& entry : clear.entries) {
    entry.count = in.get<std::uint32_t>();
    if (in.get<std::uint32_t>() != 0 || entry.count > PagedKv::kMaxPlanes) return std::nullopt;
    for (std::uint32_t i = 0; i < entry.count; ++i) {
      RemoteExtent& extent = entry.extents[i];
      extent.address = in.get<std::uint64_t>();
      extent.bytes = in.get<std::uint64_t>();
      extent.key = in.get<std::uint32_t>();
      if (in.get<std::uint32_t>() != 0) return std::nullopt;
    }
  }
  if (!in.complete()) return std::nullopt;
  return clear;
}

std::vector<std::byte> encode_write_drop(std::uint64_t id) {
  ByteWriter out;
  out.put(id);
  return out.take();
}

std::optional<std::uint64_t> decode_write_drop(std::span<const std::byte> body) {
  ByteReader in(body);
  const auto id = in.get<std::uint64_t>();
  return in.complete() ? std::optional(id) : std::nullopt;
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
