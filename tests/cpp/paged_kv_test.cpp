// PagedKv: which descriptions of a cache are accepted, and where their Layer Blocks lie.
#include "memory/copier.h"
#include "support.h"

namespace dualkv::testing {
namespace {

class PagedKvTest : public ::testing::Test {
 protected:
  Code make(std::vector<std::vector<Plane>> layers, std::uint32_t blocks = 4) {
    return code_of([&] { PagedKv(geometry_, std::move(layers), blocks); });
  }
  std::vector<Plane> one(std::uint64_t bytes) { return {{memory_.data(), bytes, bytes}}; }

  const KvGeometry geometry_{{100, 60}, 16, "x"};
  std::vector<std::byte> memory_ = std::vector<std::byte>(4096);
};

TEST_F(PagedKvTest, AcceptsPlanesThatAddUp) {
  EXPECT_EQ(make({one(100), one(60)}), Code::kOk);
  std::byte* p = memory_.data();
  EXPECT_EQ(make({{{p, 50, 50}, {p + 500, 64, 50}}, one(60)}), Code::kOk);
  EXPECT_EQ(make({{{p, 25, 25}, {p + 100, 25, 25}, {p + 200, 25, 25}, {p + 300, 25, 25}}, one(60)}), Code::kOk);
}

TEST_F(PagedKvTest, RefusesWhatDoesNotMatchTheGeometry) {
  std::byte* p = memory_.data();
  EXPECT_EQ(make({one(100)}), Code::kInvalidArgument) << "a layer too few";
  EXPECT_EQ(make({one(100), one(60), one(60)}), Code::kInvalidArgument) << "a layer too many";
  EXPECT_EQ(make({one(99), one(60)}), Code::kInvalidArgument) << "a byte too few";
  EXPECT_EQ(make({one(101), one(60)}), Code::kInvalidArgument) << "a byte too many";
  EXPECT_EQ(make({one(100), {}}), Code::kInvalidArgument) << "no plane";
  EXPECT_EQ(make({{{p, 20, 20}, {p, 20, 20}, {p, 20, 20}, {p, 20, 20}, {p, 20, 20}}, one(60)}), Code::kInvalidArgument)
      << "five planes";
  EXPECT_EQ(make({one(100), one(60)}, 0), Code::kInvalidArgument) << "no blocks";
}

TEST_F(PagedKvTest, RefusesBadPlanes) {
  std::byte* p = memory_.data();
  EXPECT_EQ(make({{{nullptr, 100, 100}}, one(60)}), Code::kInvalidArgument) << "null";
  EXPECT_EQ(make({{{p, 100, 100}, {p, 100, 0}}, one(60)}), Code::kInvalidArgument) << "an empty plane";
  EXPECT_EQ(make({{{p, 99, 100}}, one(60)}), Code::kInvalidArgument) << "blocks overlap";
  EXPECT_EQ(make({{{p, 0, 100}}, one(60)}), Code::kInvalidArgument) << "blocks are one";
  EXPECT_EQ(make({{{p, 0, 100}}, one(60)}, 1), Code::kOk) << "a single block has no next one";
}

TEST_F(PagedKvTest, RefusesSizesThatOverflowToTheRightSum) {
  constexpr std::uint64_t kHuge = std::uint64_t{1} << 63;
  std::byte* p = memory_.data();
  EXPECT_EQ(make({{{p, kHuge, kHuge}, {p, kHuge + 100, kHuge + 100}}, one(60)}), Code::kInvalidArgument);
}

TEST_F(PagedKvTest, TheErrorNamesTheLayer) {
  try {
    PagedKv(geometry_, {one(100), one(61)}, 2);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("layer 1"), std::string::npos) << error.what();
  }
}

TEST_F(PagedKvTest, ExtentsFollowBaseStrideAndOrder) {
  std::byte* p = memory_.data();
  const PagedKv paged(geometry_, {{{p, 128, 40}, {p + 2048, 60, 60}}, one(60)}, 4);
  EXPECT_EQ(paged.block_count(), 4u);
  EXPECT_EQ(paged.layers(), 2u);
  Extent out[PagedKv::kMaxPlanes];
  ASSERT_EQ(paged.extents(0, 3, out), 2u);
  EXPECT_EQ(out[0].data, p + 3 * 128);
  EXPECT_EQ(out[0].bytes, 40u);
  EXPECT_EQ(out[1].data, p + 2048 + 3 * 60);
  EXPECT_EQ(out[1].bytes, 60u);
  ASSERT_EQ(paged.extents(1, 0, out), 1u);
  EXPECT_EQ(out[0].data, p);
}

TEST_F(PagedKvTest, ScatterUndoesGather) {
  TestCache cache(geometry_, 3);
  for (std::uint32_t block = 0; block < 3; ++block) cache.fill(block, block + 1);
  Extent extents[PagedKv::kMaxPlanes];
  std::vector<std::byte> flat(100);
  gather(std::span(extents).first(cache.paged()->extents(0, 1, extents)), flat.data());
  scatter(flat.data(), std::span(extents).first(cache.paged()->extents(0, 2, extents)));
  EXPECT_TRUE(cache.layer_is(0, 2, 2));
  EXPECT_TRUE(cache.layer_is(0, 1, 2)) << "the source";
  EXPECT_TRUE(cache.layer_is(1, 2, 3)) << "the other layer";
  EXPECT_TRUE(cache.holds(0, 1)) << "the other block";
}

}  // namespace
}  // namespace dualkv::testing
