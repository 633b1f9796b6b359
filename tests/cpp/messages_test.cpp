// Control messages: round trips, damage, and bytes from a hostile peer.
#include "node/messages.h"

#include "support.h"

namespace dualkv::testing {
namespace {

using Bytes = std::vector<std::byte>;

Key key_of(std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i + 1);
  return Key(bytes);
}

NodeView view() {
  NodeView v;
  v.name = "decode-3";
  v.block_bytes = 1;
  v.tokens_per_block = 2;
  v.read_queue_bytes = 3;
  v.read_bandwidth = 4;
  v.link_bandwidth = 5;
  v.lane_bytes[0] = 6;
  v.lane_bytes[1] = ~std::uint64_t{0};
  v.free_slots = 8;
  v.prompt_slots = ~0u;
  v.reads_done = 10;
  return v;
}

// Each kind, with every field unlike its default and unlike its neighbours.
std::vector<Message> samples() {
  return {
      ViewMessage{view()},
      OpenLoad{11, true, 12, 13, 14, 15, 16},
      OpenLoad{11, false, 12, 13, 14, 15, 16},
      LoadOpened{21, 22, Code::kNoSpace, "pool of 3 slots"},
      ReadBlocks{31, {{5, key_of(32)}, {6, key_of(1)}, {7, key_of(20)}}},
      ReadBlocks{32, {}},
      Credit{41, 42},
      BlocksFailed{51, Code::kIo, -5, "read failed", {9, 8, 7}},
      BlocksFailed{52, Code::kCorrupt, 0, "", {}},
      CloseLoad{61, Code::kCancelled, "the caller"},
      ReadReport{71, {{{1, 2}, 0.5, 0.75, 0.125, 99}, {{3, 4}, 1.5, 2.25, 0, ~std::uint64_t{0}}}},
      ReadReport{72, {}},
  };
}

TEST(Messages, RoundTripOfEveryKind) {
  std::vector<bool> seen(std::variant_size_v<Message>);
  for (const Message& message : samples()) {
    const Bytes bytes = encode_message(message);
    const auto back = decode_message(bytes);
    ASSERT_TRUE(back) << message.index();
    EXPECT_EQ(back->index(), message.index());
    EXPECT_EQ(encode_message(*back), bytes);
    seen[message.index()] = true;
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), true), static_cast<std::ptrdiff_t>(seen.size()));
}

template <typename T>
T through(const T& message) {
  const auto back = decode_message(encode_message(message));
  return std::get<T>(back.value());
}

TEST(Messages, EveryFieldArrives) {
  const NodeView v = through(ViewMessage{view()}).view, want = view();
  EXPECT_EQ(v.name, want.name);
  EXPECT_EQ(v.block_bytes, want.block_bytes);
  EXPECT_EQ(v.tokens_per_block, want.tokens_per_block);
  EXPECT_EQ(v.read_queue_bytes, want.read_queue_bytes);
  EXPECT_EQ(v.read_bandwidth, want.read_bandwidth);
  EXPECT_EQ(v.link_bandwidth, want.link_bandwidth);
  EXPECT_EQ(v.lane_bytes[0], want.lane_bytes[0]);
  EXPECT_EQ(v.lane_bytes[1], want.lane_bytes[1]);
  EXPECT_EQ(v.free_slots, want.free_slots);
  EXPECT_EQ(v.prompt_slots, want.prompt_slots);
  EXPECT_EQ(v.reads_done, want.reads_done);
  const OpenLoad open = through(OpenLoad{11, true, 12, 13, 14, 15, 16});
  EXPECT_EQ(open.load, 11u);
  EXPECT_TRUE(open.decode);
  EXPECT_EQ(open.time_left_us, 12u);
  EXPECT_EQ(open.prompt_blocks, 13u);
  EXPECT_EQ(open.layers_per_read, 14u);
  EXPECT_EQ(open.credit_layers, 15u);
  EXPECT_EQ(open.grant, 16u);
}

TEST(Messages, EveryFieldOfTheOthersArrives) {
  const LoadOpened opened = through(LoadOpened{21, 22, Code::kNoSpace, "why"});
  EXPECT_EQ(opened.load, 21u);
  EXPECT_EQ(opened.grant, 22u);
  EXPECT_EQ(opened.code, Code::kNoSpace);
  EXPECT_EQ(opened.why, "why");
  const ReadBlocks read = through(ReadBlocks{31, {{5, key_of(32)}, {6, key_of(1)}}});
  EXPECT_EQ(read.load, 31u);
  ASSERT_EQ(read.blocks.size(), 2u);
  EXPECT_EQ(read.blocks[1].block, 6u);
  EXPECT_EQ(read.blocks[0].key, key_of(32));
  EXPECT_EQ(read.blocks[1].key, key_of(1));
  EXPECT_EQ(through(Credit{41, 42}).layers, 42u);
  const BlocksFailed failed = through(BlocksFailed{51, Code::kIo, -5, "read", {9, 8}});
  EXPECT_EQ(failed.load, 51u);
  EXPECT_EQ(failed.code, Code::kIo);
  EXPECT_EQ(failed.os_errno, -5);
  EXPECT_EQ(failed.why, "read");
  EXPECT_EQ(failed.blocks, (std::vector<std::uint32_t>{9, 8}));
  EXPECT_EQ(through(CloseLoad{61, Code::kCancelled, "c"}).code, Code::kCancelled);
}

TEST(Messages, LongTextsAreCutNotRefused) {
  const CloseLoad close = through(CloseLoad{61, Code::kIo, std::string(100'000, 'x')});
  EXPECT_GT(close.why.size(), 100u);
  EXPECT_EQ(close.why.find_first_not_of('x'), std::string::npos);
}

// "Nullopt for anything encode_message would not have written."
void expect_canonical(const Bytes& bytes, const std::string& about) {
  const auto back = decode_message(bytes);
  EXPECT_TRUE(!back || encode_message(*back) == bytes) << about;
}

TEST(Messages, EveryTruncationIsRefusedOrIsAShorterList) {
  for (const Message& message : samples()) {
    const Bytes bytes = encode_message(message);
    const bool list = std::holds_alternative<ReadBlocks>(message) || std::holds_alternative<BlocksFailed>(message) ||
                      std::holds_alternative<ReadReport>(message);
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      const Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
      EXPECT_TRUE(list || !decode_message(cut)) << message.index() << " cut to " << size;
      expect_canonical(cut, "cut");
    }
  }
}

TEST(Messages, LeftoverBytesAreRefused) {
  for (const Message& message : samples()) {
    Bytes bytes = encode_message(message);
    bytes.push_back(std::byte{0});
    EXPECT_FALSE(decode_message(bytes)) << message.index();
  }
}

TEST(Messages, EveryFlippedBitIsRefusedOrMeansWhatItSays) {
  for (const Message& message : samples()) {
    Bytes bytes = encode_message(message);
    for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
      expect_canonical(bytes, "kind " + std::to_string(message.index()) + " bit " + std::to_string(bit));
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    }
  }
}

TEST(Messages, UnknownKindsAreRefused) {
  for (int type = static_cast<int>(std::variant_size_v<Message>); type < 256; ++type) {
    Bytes bytes(40);
    bytes[0] = static_cast<std::byte>(type);
    EXPECT_FALSE(decode_message(bytes)) << type;
  }
  EXPECT_FALSE(decode_message({}));
}

TEST(Messages, RandomBytesNeverCrash) {
  std::mt19937 random(5);
  for (int round = 0; round < 20'000; ++round) {
    Bytes bytes(random() % 120);
    for (auto& byte : bytes) byte = static_cast<std::byte>(random());
    if (!bytes.empty()) bytes[0] = static_cast<std::byte>(random() % (std::variant_size_v<Message> + 1));
    decode_message(bytes);
  }
}

}  // namespace
}  // namespace dualkv::testing
