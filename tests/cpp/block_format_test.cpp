// The block file's bytes: trailers are written, read back and checked.
#include "storage/block_format.h"

#include "support.h"

namespace dualkv::testing {
namespace {

class BlockFormat : public ::testing::Test {
 protected:
  void SetUp() override {
    std::mt19937 random(3);
    for (auto& byte : image_) byte = static_cast<std::byte>(random());
    write_trailer(geometry_, {keys_[1], keys_[0]}, image_);
  }
  std::span<std::byte> trailer() { return std::span(image_).subspan(geometry_.payload_bytes()); }
  LayerRange all() const { return {0, geometry_.layers()}; }

  const KvGeometry geometry_ = small_geometry();
  const std::vector<Key> keys_ = test_keys(geometry_, 3);
  std::vector<std::byte> image_ = std::vector<std::byte>(geometry_.file_bytes());
};

TEST_F(BlockFormat, RoundTrip) {
  EXPECT_EQ(check_image(geometry_, keys_[1], image_, all()), "");
  TrailerInfo info;
  ASSERT_TRUE(read_trailer(trailer(), &info));
  EXPECT_EQ(info.key, keys_[1]);
  EXPECT_EQ(info.parent, keys_[0]);
  for (std::uint32_t i = 0; i < geometry_.layers(); ++i) {
    const auto layer = std::span(image_).subspan(geometry_.layer_offset(i), geometry_.layer_bytes(i));
    EXPECT_EQ(trailer_checksum(trailer(), i), checksum(layer));
  }
}

TEST_F(BlockFormat, PaddingIsZeroAndPayloadIsUntouched) {
  std::mt19937 random(3);
  for (std::uint64_t i = 0; i < geometry_.block_bytes(); ++i) ASSERT_EQ(image_[i], static_cast<std::byte>(random()));
  for (std::uint64_t i = geometry_.block_bytes(); i < geometry_.payload_bytes(); ++i) {
    ASSERT_EQ(image_[i], std::byte{0}) << i;
  }
}

TEST_F(BlockFormat, AChainsFirstBlockHasNoParent) {
  write_trailer(geometry_, {keys_[0], {}}, image_);
  TrailerInfo info;
  ASSERT_TRUE(read_trailer(trailer(), &info));
  EXPECT_EQ(info.key, keys_[0]);
  EXPECT_TRUE(info.parent.empty());
}

TEST_F(BlockFormat, ShortKeysKeepTheirLength) {
  const std::byte bytes[] = {std::byte{0}, std::byte{0}};
  write_trailer(geometry_, {Key(bytes), Key(std::span(bytes).first(1))}, image_);
  EXPECT_EQ(check_image(geometry_, Key(bytes), image_, all()), "");
  EXPECT_NE(check_image(geometry_, Key(std::span(bytes).first(1)), image_, all()), "");
}

TEST_F(BlockFormat, EveryFlippedTrailerBitIsSeen) {
  TrailerInfo info;
  for (std::size_t bit = 0; bit < geometry_.trailer_bytes() * 8; bit += bit < 2400 ? 1 : 97) {
    trailer()[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_NE(check_trailer(geometry_, keys_[1], trailer()), "") << bit;
    EXPECT_FALSE(read_trailer(trailer(), &info)) << bit;
    trailer()[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  EXPECT_EQ(check_image(geometry_, keys_[1], image_, all()), "");
}

TEST_F(BlockFormat, TheReasonSaysWhatIsWrong) {
  const auto has = [](const std::string& reason, const char* word) { return reason.find(word) != std::string::npos; };
  EXPECT_TRUE(has(check_trailer(geometry_, keys_[2], trailer()), "key"));
  const KvGeometry other(std::vector<std::uint64_t>(3, 100), 16, "other");
  EXPECT_TRUE(has(check_trailer(other, keys_[1], trailer()), "geometry"));
  image_[geometry_.layer_offset(2)] ^= std::byte{1};
  EXPECT_TRUE(has(check_image(geometry_, keys_[1], image_, all()), "layer 2"));
  EXPECT_EQ(check_image(geometry_, keys_[1], image_, {0, 2}), "") << "layers not asked for are not checked";
  EXPECT_EQ(check_image(geometry_, keys_[1], image_, {3, 1}), "");
}

TEST_F(BlockFormat, TooShortToBeATrailer) {
  TrailerInfo info;
  for (const std::size_t size : {0u, 1u, 8u, 191u}) EXPECT_FALSE(read_trailer(trailer().first(size), &info)) << size;
}

}  // namespace
}  // namespace dualkv::testing
