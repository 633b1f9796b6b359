// KvGeometry: limits, where things lie, and what makes two of them equal.
#include <set>

#include "support.h"

namespace dualkv::testing {
namespace {

Code make(std::vector<std::uint64_t> layers, std::uint32_t tokens, std::string name) {
  return code_of([&] { KvGeometry(std::move(layers), tokens, std::move(name)); });
}

TEST(Geometry, LimitsAreAccepted) {
  EXPECT_EQ(make({1}, 1, "x"), Code::kOk);
  EXPECT_EQ(make(std::vector<std::uint64_t>(KvGeometry::kMaxLayers, KvGeometry::kMaxLayerBytes), 65536,
                 std::string(KvGeometry::kMaxNamespaceBytes, 'n')),
            Code::kOk);
}

TEST(Geometry, ValuesOutOfRangeAreRefused) {
  EXPECT_EQ(make({}, 16, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make(std::vector<std::uint64_t>(KvGeometry::kMaxLayers + 1, 8), 16, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8, 0, 8}, 16, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8, KvGeometry::kMaxLayerBytes + 1}, 16, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8, ~std::uint64_t{0}}, 16, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8}, 0, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8}, ~0u, "x"), Code::kInvalidArgument);
  EXPECT_EQ(make({8}, 16, ""), Code::kInvalidArgument);
  EXPECT_EQ(make({8}, 16, std::string(KvGeometry::kMaxNamespaceBytes + 1, 'n')), Code::kInvalidArgument);
}

TEST(Geometry, TheErrorNamesTheValue) {
  try {
    KvGeometry({8, 8, 0}, 16, "x");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("layer_bytes[2] = 0"), std::string::npos) << error.what();
  }
}

TEST(Geometry, LayersLieOneAfterTheOther) {
  const KvGeometry geometry({100, 1, 5000}, 16, "x");
  EXPECT_EQ(geometry.layers(), 3u);
  EXPECT_EQ(geometry.layer_offset(0), 0u);
  EXPECT_EQ(geometry.layer_offset(1), 100u);
  EXPECT_EQ(geometry.layer_offset(2), 101u);
  EXPECT_EQ(geometry.layer_offset(3), geometry.block_bytes());
  EXPECT_EQ(geometry.block_bytes(), 5101u);
  EXPECT_EQ(geometry.payload_bytes(), 8192u);
  EXPECT_EQ(geometry.file_bytes(), geometry.payload_bytes() + geometry.trailer_bytes());
}

TEST(Geometry, PayloadIsPaddedToAPageAndNoFurther) {
  for (const std::uint64_t bytes : {1u, 4095u, 4096u, 4097u, 8191u, 8192u}) {
    const KvGeometry geometry({bytes}, 16, "x");
    EXPECT_EQ(geometry.payload_bytes() % KvGeometry::kPageBytes, 0u) << bytes;
    EXPECT_GE(geometry.payload_bytes(), bytes);
    EXPECT_LT(geometry.payload_bytes(), bytes + KvGeometry::kPageBytes);
  }
}

// A trailer holds 192 fixed bytes, 16 a layer, and its own checksum in its last 8 bytes.
TEST(Geometry, TheTrailerHasRoomForEveryLayerAndItsChecksum) {
  for (std::uint32_t layers = 1; layers <= KvGeometry::kMaxLayers; ++layers) {
    const KvGeometry geometry(std::vector<std::uint64_t>(layers, 1), 16, "x");
    EXPECT_EQ(geometry.trailer_bytes() % KvGeometry::kPageBytes, 0u) << layers;
    EXPECT_GE(geometry.trailer_bytes(), 192u + 16u * layers + 8u) << layers << " layers";
  }
}

TEST(Geometry, EveryFieldIsInTheFingerprintAndInEquality) {
  const std::vector<KvGeometry> all = {
      KvGeometry({8, 16}, 16, "x"),    KvGeometry({16, 8}, 16, "x"), KvGeometry({24}, 16, "x"),
      KvGeometry({8, 16, 1}, 16, "x"), KvGeometry({8, 16}, 17, "x"), KvGeometry({8, 16}, 16, "y"),
      KvGeometry({8, 16}, 16, "xx"),
  };
  std::set<std::uint64_t> fingerprints;
  for (std::size_t i = 0; i < all.size(); ++i) {
    fingerprints.insert(all[i].fingerprint());
    for (std::size_t j = 0; j < all.size(); ++j) EXPECT_EQ(all[i] == all[j], i == j) << i << " " << j;
  }
  EXPECT_EQ(fingerprints.size(), all.size());
  EXPECT_EQ(KvGeometry({8, 16}, 16, "x").fingerprint(), all[0].fingerprint());
}

TEST(Geometry, DescribesItself) {
  const std::string words = KvGeometry({8, 16}, 16, "model/fp8").describe();
  EXPECT_NE(words.find("2 layers"), std::string::npos) << words;
  EXPECT_NE(words.find("model/fp8"), std::string::npos) << words;
}

}  // namespace
}  // namespace dualkv::testing
