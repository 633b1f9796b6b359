// Frames: what encode_* writes is read back; anything damaged, too large or impossible is refused.
#include "transport/wire.h"

#include <cstring>

#include "base/bytes.h"
#include "rdma/write_chain.h"
#include "support.h"

namespace dualkv::testing {
namespace {

using Bytes = std::vector<std::byte>;

constexpr FrameType kTypes[] = {FrameType::kHello,     FrameType::kChallenge, FrameType::kProof, FrameType::kWelcome,
                                FrameType::kRefuse,    FrameType::kMessage,   FrameType::kWrite, FrameType::kWriteRef,
                                FrameType::kWriteDone, FrameType::kRdmaSetup};

Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  Bytes bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

std::optional<FrameHeader> header_of(const Bytes& frame) {
  return decode_header(std::span<const std::byte, FrameHeader::kBytes>(frame.data(), FrameHeader::kBytes));
}

// A right frame, as a receiver sees it: header, then exactly its body.
bool accepted(const Bytes& frame) {
  if (frame.size() < FrameHeader::kBytes) return false;
  const auto header = header_of(frame);
  const auto body = std::span(frame).subspan(FrameHeader::kBytes);
  return header && header->body_bytes == body.size() && body_is_right(*header, body);
}

// A header whose own checksum is right, whatever its fields say.
Bytes forged(std::uint32_t magic, std::uint16_t version, std::uint16_t type, std::uint32_t size, std::uint32_t zero) {
  ByteWriter out;
  out.put(magic);
  out.put(version);
  out.put(type);
  out.put(size);
  out.put(zero);
  out.put(std::uint64_t{1234});
  Bytes header = out.take();
  ByteWriter rest;
  rest.put(checksum(header));
  const Bytes tail = rest.take();
  header.insert(header.end(), tail.begin(), tail.end());
  return header;
}

TEST(Frame, RoundTripOfEveryType) {
  for (const FrameType type : kTypes) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{16}}) {
      const Bytes body = random_bytes(size, 1);
      const Bytes frame = encode_frame(type, body);
      ASSERT_EQ(frame.size(), FrameHeader::kBytes + size);
      const auto header = header_of(frame);
      ASSERT_TRUE(header.has_value());
      EXPECT_EQ(header->type, type);
      EXPECT_EQ(header->body_bytes, size);
      EXPECT_TRUE(std::equal(body.begin(), body.end(), frame.begin() + FrameHeader::kBytes));
      EXPECT_TRUE(accepted(frame));
    }
  }
}

TEST(Frame, EveryFlippedBitIsRefused) {
  Bytes frame = encode_frame(FrameType::kMessage, random_bytes(100, 2));
  for (std::size_t bit = 0; bit < frame.size() * 8; ++bit) {
    frame[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(accepted(frame)) << bit;
    frame[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  EXPECT_TRUE(accepted(frame));
}

TEST(Frame, EveryTruncationIsRefused) {
  const Bytes frame = encode_frame(FrameType::kMessage, random_bytes(100, 2));
  for (std::size_t size = 0; size < frame.size(); ++size) {
    EXPECT_FALSE(accepted(Bytes(frame.begin(), frame.begin() + static_cast<std::ptrdiff_t>(size)))) << size;
  }
}

TEST(Frame, LimitsOfEveryType) {
  const Bytes good = encode_frame(FrameType::kMessage, {});
  std::uint32_t magic;
  std::uint16_t version;
  std::memcpy(&magic, good.data(), 4);
  std::memcpy(&version, good.data() + 4, 2);
  for (const FrameType type : kTypes) {
    const auto number = static_cast<std::uint16_t>(type);
    const std::uint32_t most = max_body_bytes(type);
    ASSERT_GT(most, 0u);
    EXPECT_LE(most, 16u << 20) << "a peer must not make us allocate without bound";
    EXPECT_TRUE(header_of(forged(magic, version, number, most, 0)));
    EXPECT_FALSE(header_of(forged(magic, version, number, most + 1, 0)));
    EXPECT_FALSE(header_of(forged(magic, version, number, ~0u, 0)));
  }
  EXPECT_FALSE(header_of(forged(magic + 1, version, 6, 10, 0)));
  EXPECT_FALSE(header_of(forged(magic, static_cast<std::uint16_t>(version + 1), 6, 10, 0)));
  EXPECT_FALSE(header_of(forged(magic, version, 6, 10, 1))) << "reserved";
}

TEST(Frame, UnknownTypesAreRefused) {
  const Bytes good = encode_frame(FrameType::kMessage, {});
  std::uint32_t magic;
  std::uint16_t version;
  std::memcpy(&magic, good.data(), 4);
  std::memcpy(&version, good.data() + 4, 2);
  for (const std::uint16_t type : {0, 15, 255, 256, 65535}) {
    EXPECT_EQ(max_body_bytes(static_cast<FrameType>(type)), 0u);
    const Bytes frame = forged(magic, version, type, 0, 0);
    const auto header = header_of(frame);
    EXPECT_FALSE(header && body_is_right(*header, {})) << type;
  }
}

class WriteFrame : public ::testing::Test {
 protected:
  WriteHeader make(std::uint32_t extents, std::size_t blocks = 3) const {
    WriteHeader write{7, 99, 2, extents, extents == 0 ? 0u : 12u, {}};
    for (std::uint32_t i = 0; i < blocks; ++i) {
      WriteEntry entry;
      entry.block = 10 + i;
      entry.checksum = 0x1111111111111111u * (i + 1);
      std::uint64_t left = geometry_.layer_bytes(2);
      for (std::uint32_t e = 0; e < extents; ++e) {
        const std::uint64_t bytes = e + 1 == extents ? left : left / 3;
        entry.source[e] = {reinterpret_cast<std::byte*>(0x1000 * (e + 1)), bytes};
        left -= bytes;
      }
      write.entries.push_back(entry);
    }
    return write;
  }
  static FrameType type_of(std::uint32_t extents) { return extents == 0 ? FrameType::kWrite : FrameType::kWriteRef; }
  bool ok(const WriteHeader& write, FrameType type) const {
    return decode_write(encode_write(write), type, geometry_).has_value();
  }

  const KvGeometry geometry_ = small_geometry();
};

TEST_F(WriteFrame, RoundTrip) {
  for (std::uint32_t extents = 0; extents <= PagedKv::kMaxPlanes; ++extents) {
    const WriteHeader write = make(extents);
    const auto back = decode_write(encode_write(write), type_of(extents), geometry_);
    ASSERT_TRUE(back) << extents;
    EXPECT_EQ(back->id, write.id);
    EXPECT_EQ(back->grant, write.grant);
    EXPECT_EQ(back->layer, write.layer);
    EXPECT_EQ(back->extents, extents);
    EXPECT_EQ(back->region, write.region);
    ASSERT_EQ(back->entries.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(back->entries[i].block, write.entries[i].block);
      EXPECT_EQ(back->entries[i].checksum, write.entries[i].checksum);
      for (std::uint32_t e = 0; e < extents; ++e) {
        EXPECT_EQ(back->entries[i].source[e].data, write.entries[i].source[e].data);
        EXPECT_EQ(back->entries[i].source[e].bytes, write.entries[i].source[e].bytes);
      }
    }
  }
}

TEST_F(WriteFrame, TheLargestFitsItsLimit) {
  const Bytes body = encode_write(make(PagedKv::kMaxPlanes, kMaxWriteBlocks));
  EXPECT_LE(body.size(), max_body_bytes(FrameType::kWriteRef));
  EXPECT_TRUE(decode_write(body, FrameType::kWriteRef, geometry_));
  EXPECT_FALSE(ok(make(PagedKv::kMaxPlanes, kMaxWriteBlocks + 1), FrameType::kWriteRef));
  EXPECT_FALSE(ok(make(0, kMaxWriteBlocks + 1), FrameType::kWrite));
}

TEST_F(WriteFrame, ImpossibleWritesAreRefused) {
  EXPECT_FALSE(ok(make(0, 0), FrameType::kWrite)) << "no blocks";
  EXPECT_FALSE(ok(make(0), FrameType::kWriteRef)) << "bytes by reference without an address";
  EXPECT_FALSE(ok(make(1), FrameType::kWrite)) << "bytes inline with an address";
  WriteHeader write = make(0);
  write.layer = geometry_.layers();
  EXPECT_FALSE(ok(write, FrameType::kWrite));
  write.layer = ~0u;
  EXPECT_FALSE(ok(write, FrameType::kWrite));
  write = make(2);
  write.entries[1].source[0].bytes += 1;
  EXPECT_FALSE(ok(write, FrameType::kWriteRef)) << "not a Layer Block's size";
  write = make(2);
  write.entries[0].source[0].bytes = std::uint64_t{1} << 63;
  write.entries[0].source[1].bytes = (std::uint64_t{1} << 63) + geometry_.layer_bytes(2);
  EXPECT_FALSE(ok(write, FrameType::kWriteRef)) << "sizes that overflow to the right sum";
}

TEST_F(WriteFrame, EveryTruncationAndExtensionIsRefused) {
  for (const std::uint32_t extents : {0u, 1u, 2u}) {
    Bytes body = encode_write(make(extents));
    for (std::size_t size = 0; size < body.size(); ++size) {
      EXPECT_FALSE(decode_write(std::span(body).first(size), type_of(extents), geometry_)) << extents << " " << size;
    }
    body.push_back(std::byte{0});
    EXPECT_FALSE(decode_write(body, type_of(extents), geometry_));
  }
}

TEST_F(WriteFrame, WhatIsAcceptedIsWrittenBackTheSame) {
  for (const std::uint32_t extents : {0u, 2u}) {
    Bytes body = encode_write(make(extents));
    for (std::size_t bit = 0; bit < body.size() * 8; ++bit) {
      body[bit / 8] ^= std::byte{1} << (bit % 8);
      const auto back = decode_write(body, type_of(extents), geometry_);
      EXPECT_TRUE(!back || encode_write(*back) == body) << bit;
      body[bit / 8] ^= std::byte{1} << (bit % 8);
    }
  }
}

TEST(WriteDoneFrame, RoundTripAndRefusals) {
  for (int code = 0; code <= static_cast<int>(Code::kUnsupported); ++code) {
    const auto back = decode_write_done(encode_write_done({42, static_cast<Code>(code)}));
    ASSERT_TRUE(back);
    EXPECT_EQ(back->id, 42u);
    EXPECT_EQ(static_cast<int>(back->code), code);
  }
  Bytes body = encode_write_done({42, Code::kOk});
  for (std::size_t size = 0; size < body.size(); ++size) EXPECT_FALSE(decode_write_done(std::span(body).first(size)));
  body[8] = std::byte{200};
  EXPECT_FALSE(decode_write_done(body)) << "an unknown code";
  body[8] = std::byte{0};
  body.push_back(std::byte{0});
  EXPECT_FALSE(decode_write_done(body));
}

TEST(RdmaFrames, RoundTripAndRefusals) {
  RdmaSetup setup{RdmaSetup::Step::kAnswer, 3, 9, 0x1234, 0xabcdef, 17, 5, true, {}};
  for (std::size_t i = 0; i < setup.gid.size(); ++i) setup.gid[i] = static_cast<std::uint8_t>(i * 3);
  Bytes body = encode_rdma_setup(setup);
  const auto back = decode_rdma_setup(body);
  ASSERT_TRUE(back);
  EXPECT_EQ(back->step, RdmaSetup::Step::kAnswer);
  EXPECT_EQ(std::tuple(back->pair, back->epoch, back->number, back->packet_sequence, back->lid, back->mtu),
            std::tuple(3u, 9u, 0x1234u, 0xabcdefu, 17, 5));
  EXPECT_TRUE(back->ethernet);
  EXPECT_EQ(back->gid, setup.gid);
  for (std::size_t size = 0; size < body.size(); ++size) EXPECT_FALSE(decode_rdma_setup(std::span(body).first(size)));
  body[20] = std::byte{4};
  EXPECT_FALSE(decode_rdma_setup(body)) << "an unknown step";
  body[20] = std::byte{0};
  body[19] = std::byte{2};
  EXPECT_FALSE(decode_rdma_setup(body)) << "neither Ethernet nor not";

  const KvGeometry geometry = small_geometry();
  WriteAsk ask{5, 6, {7, 8, 3, 0, 0, std::vector<WriteEntry>(4)}};
  ask.write.entries[2] = {11, 12, {}};
  body = encode_write_ask(ask);
  const auto asked = decode_write_ask(body, geometry);
  ASSERT_TRUE(asked);
  EXPECT_EQ(std::tuple(asked->pair, asked->epoch, asked->write.id, asked->write.layer), std::tuple(5u, 6u, 7u, 3u));
  EXPECT_EQ(std::pair(asked->write.entries[2].block, asked->write.entries[2].checksum), std::pair(11u, 12ul));
  for (std::size_t size = 0; size < body.size(); ++size) {
    EXPECT_FALSE(decode_write_ask(std::span(body).first(size), geometry)) << size;
  }
  ask.write.layer = geometry.layers();
  EXPECT_FALSE(decode_write_ask(encode_write_ask(ask), geometry)) << "a layer that is not there";

  WriteClear clear{21, 22, std::vector<WriteClear::Entry>(3)};
  clear.entries[1].count = 2;
  clear.entries[1].extents[1] = {4096, 77, 9};
  body = encode_write_clear(clear);
  const auto cleared = decode_write_clear(body);
  ASSERT_TRUE(cleared);
  ASSERT_EQ(cleared->entries.size(), 3u);
  EXPECT_EQ(cleared->entries[0].count, 0u);
  const RemoteExtent& extent = cleared->entries[1].extents[1];
  EXPECT_EQ(std::tuple(extent.address, extent.bytes, extent.key), std::tuple(4096ul, 77ul, 9u));
  for (std::size_t size = 0; size < body.size(); ++size) EXPECT_FALSE(decode_write_clear(std::span(body).first(size)));
  body[24] = std::byte{5};  // of the second entry: more extents than a block has
  EXPECT_FALSE(decode_write_clear(body));
  EXPECT_FALSE(decode_write_clear(encode_write_clear({1, 0, std::vector<WriteClear::Entry>(kMaxWriteBlocks + 1)})));

  EXPECT_EQ(decode_write_drop(encode_write_drop(99)), 99u);
  EXPECT_FALSE(decode_write_drop(Bytes(7)));
}

// One request per run of the target, gathered from the pieces of the source; no request over the limit.
TEST(WriteChain, PairsRunsOfBothSides) {
  std::vector<std::byte> memory(10000);
  const auto local = [&](std::size_t at, std::uint64_t bytes) { return LocalExtent{memory.data() + at, bytes, 1}; };
  WriteChain chain;
  // Two planes into one run, whose end the next block's begins at.
  chain.append(std::array{local(0, 100), local(5000, 100)}, std::array{RemoteExtent{1000, 200, 7}});
  chain.append(std::array{local(100, 50)}, std::array{RemoteExtent{1200, 50, 7}});
  ASSERT_EQ(chain.writes().size(), 1u);
  EXPECT_EQ(chain.writes()[0].count, 3u);
  // Another key, then one run into two.
  chain.append(std::array{local(150, 50)}, std::array{RemoteExtent{1250, 50, 8}});
  chain.append(std::array{local(200, 300)}, std::array{RemoteExtent{3000, 100, 8}, RemoteExtent{4000, 200, 8}});
  ASSERT_EQ(chain.writes().size(), 4u);
  EXPECT_EQ(chain.writes()[3].remote, 4000u);
  EXPECT_EQ(chain.writes()[3].pieces[0].addr, reinterpret_cast<std::uint64_t>(memory.data() + 300));
  WriteChain small(64);
  small.append(std::array{local(0, 200)}, std::array{RemoteExtent{0, 200, 1}});
  std::uint64_t total = 0;
  for (const RdmaWrite& write : small.writes()) {
    EXPECT_EQ(write.remote, total);
    EXPECT_LE(write.pieces[0].length, 64u);
    total += write.pieces[0].length;
  }
  EXPECT_EQ(total, 200u);
}

}  // namespace
}  // namespace dualkv::testing
