// Block keys: the chain, what it separates, and the limits of a Key. Known answers are checked from Python against
// another implementation.
#include <chrono>
#include <iostream>
#include <set>

#include "support.h"

namespace dualkv::testing {
namespace {

KvGeometry geometry_of(std::uint32_t tokens_per_block, const std::string& name) {
  return KvGeometry({1000, 2000}, tokens_per_block, name);
}

std::vector<std::uint32_t> tokens_of(std::size_t count, std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<std::uint32_t> tokens(count);
  for (auto& token : tokens) token = random();
  return tokens;
}

TEST(Keys, AreAFunctionOfTheTokens) {
  const auto tokens = tokens_of(64);
  const auto geometry = geometry_of(16, "m");
  EXPECT_EQ(block_keys(tokens, geometry), block_keys(tokens, geometry));
  EXPECT_EQ(block_keys(tokens, geometry).size(), 4u);
  for (const Key& key : block_keys(tokens, geometry)) EXPECT_EQ(key.bytes().size(), 32u);
}

TEST(Keys, AParentContinuesTheChainAtEveryBlock) {
  const auto tokens = tokens_of(16 * 9);
  const auto geometry = geometry_of(16, "m");
  const auto whole = block_keys(tokens, geometry);
  for (std::size_t cut = 1; cut < whole.size(); ++cut) {
    const auto rest = block_keys(std::span(tokens).subspan(cut * 16), geometry, whole[cut - 1]);
    EXPECT_EQ(rest, std::vector<Key>(whole.begin() + static_cast<std::ptrdiff_t>(cut), whole.end())) << cut;
  }
}

TEST(Keys, AChangedTokenChangesItsBlockAndEverythingAfterIt) {
  const auto geometry = geometry_of(16, "m");
  const auto tokens = tokens_of(16 * 8);
  const auto keys = block_keys(tokens, geometry);
  for (const std::size_t at : {std::size_t{0}, std::size_t{15}, std::size_t{16}, std::size_t{70}, std::size_t{127}}) {
    auto changed = tokens;
    changed[at] ^= 0x80000000;  // all 32 bits count
    const auto other = block_keys(changed, geometry);
    for (std::size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(keys[i] == other[i], i < at / 16) << at << " " << i;
  }
}

TEST(Keys, EqualBlocksAtDifferentPositionsHaveDifferentKeys) {
  const std::vector<std::uint32_t> tokens(16 * 20, 7);
  const auto keys = block_keys(tokens, geometry_of(16, "m"));
  EXPECT_EQ(std::set<Key>(keys.begin(), keys.end()).size(), 20u);
}

TEST(Keys, NamespaceAndBlockSizeSeparate) {
  const auto tokens = tokens_of(64);
  std::set<Key> seen;
  std::size_t made = 0;
  // The last two would meet if the fields were glued together without a separator.
  const std::vector<std::pair<std::uint32_t, std::string>> spaces = {{16, "a"},   {16, "b"},   {8, "a"}, {16, "a "},
                                                                     {16, "a\n"}, {1, "6\nx"}, {16, "x"}};
  for (const auto& [block, name] : spaces) {
    for (const Key& key : block_keys(tokens, geometry_of(block, name))) seen.insert(key), ++made;
  }
  EXPECT_EQ(seen.size(), made);
}

TEST(Keys, ABlockOfOtherLayersHasTheSameKey) {
  // Layers are the geometry's business (its fingerprint is in every block): a key names tokens.
  const auto tokens = tokens_of(64);
  EXPECT_EQ(block_keys(tokens, KvGeometry({1}, 16, "m")), block_keys(tokens, KvGeometry({2, 3}, 16, "m")));
}

TEST(Keys, APartlyFilledBlockHasNoKey) {
  const auto geometry = geometry_of(16, "m");
  const auto tokens = tokens_of(40);
  for (std::size_t count = 0; count <= tokens.size(); ++count) {
    const auto keys = block_keys(std::span(tokens).first(count), geometry);
    ASSERT_EQ(keys.size(), count / 16) << count;
  }
  const auto full = block_keys(std::span(tokens).first(32), geometry);
  EXPECT_EQ(block_keys(tokens, geometry), full);
}

TEST(Keys, OfOneTokenBlocks) {
  const auto tokens = tokens_of(100);
  const auto keys = block_keys(tokens, geometry_of(1, "m"));
  EXPECT_EQ(std::set<Key>(keys.begin(), keys.end()).size(), 100u);
}

TEST(Keys, AnEnginesOwnParentIsAccepted) {
  const auto geometry = geometry_of(16, "m");
  const auto tokens = tokens_of(16);
  const std::byte one[] = {std::byte{1}};
  const std::byte two[] = {std::byte{2}};
  EXPECT_NE(block_keys(tokens, geometry, Key(one)), block_keys(tokens, geometry, Key(two)));
  EXPECT_NE(block_keys(tokens, geometry, Key(one)), block_keys(tokens, geometry));
}

TEST(Key, HasOneToThirtyTwoBytes) {
  const std::vector<std::byte> memory(33, std::byte{0xab});
  const std::span<const std::byte> bytes(memory);
  EXPECT_EQ(code_of([&] { Key key(bytes.first(0)); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { Key key(bytes); }), Code::kInvalidArgument);
  for (std::size_t size = 1; size <= Key::kMaxBytes; ++size) {
    const Key key(bytes.first(size));
    EXPECT_EQ(key.bytes().size(), size);
    EXPECT_FALSE(key.empty());
    EXPECT_EQ(key.hex().size(), size * 2);
  }
  EXPECT_TRUE(Key().empty());
  EXPECT_EQ(Key().hex(), "");
}

TEST(Key, HexAndComparison) {
  const std::byte bytes[] = {std::byte{0x00}, std::byte{0x1f}, std::byte{0xa0}, std::byte{0xff}};
  EXPECT_EQ(Key(bytes).hex(), "001fa0ff");
  // Trailing zeros are part of the name.
  const std::byte padded[] = {std::byte{0x00}, std::byte{0x00}};
  EXPECT_NE(Key(std::span(padded).first(1)), Key(padded));
  EXPECT_NE(KeyHash()(Key(std::span(padded).first(1))), KeyHash()(Key(padded)));
}

TEST(Keys, OfALongContext) {
  const auto tokens = tokens_of(128 * 1024);
  const auto geometry = geometry_of(64, "deepseek-v3.2/fp8");
  const auto began = std::chrono::steady_clock::now();
  const auto keys = block_keys(tokens, geometry);
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count();
  std::cout << "keys of 128K tokens: " << ms << " ms (" << keys.size() << " blocks; sanitizers slow this down)\n";
  EXPECT_EQ(keys.size(), 2048u);
  EXPECT_EQ(std::set<Key>(keys.begin(), keys.end()).size(), 2048u);
}

TEST(Checksum, SeesEveryBit) {
  std::vector<std::byte> bytes(300);
  std::set<std::uint64_t> seen{checksum(bytes)};
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    seen.insert(checksum(bytes));
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  EXPECT_EQ(seen.size(), bytes.size() * 8 + 1);
  EXPECT_EQ(checksum({}), 0x2d06800538d394c2u);  // XXH3-64 of nothing, from its specification
}

}  // namespace
}  // namespace dualkv::testing
