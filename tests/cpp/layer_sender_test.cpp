// Turns on a link, and what happens to them when one who has the window ends.
#include "node/layer_sender.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/progress.h"
#include "support.h"
#include "test_link.h"

namespace dualkv::testing {
namespace {

class LayerSenderTest : public ::testing::Test, public BlockSource {
 protected:
  void TearDown() override {
    progress_.run([&] {
      first_.reset();
      second_.reset();
    });
  }
  bool describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>&, WriteBlock& out) override {
    out.block = index;
    out.source[0] = {memory_.data(), geometry_.layer_bytes(layer)};
    out.extents = 1;
    return index > 0;
  }
  std::unique_ptr<LayerSender> sender(std::uint64_t grant) {
    return std::make_unique<LayerSender>(queue_, link_, grant, Lane::kLow, *this,
                                         [](std::uint32_t, const std::vector<std::uint32_t>&, Outcome) {});
  }
  // Of the writes that the link has.
  std::vector<std::uint64_t> grants() {
    std::vector<std::uint64_t> all;
    progress_.run([&] {
      for (const LayerWrite& write : link_->writes) all.push_back(write.grant);
    });
    return all;
  }

  const KvGeometry geometry_ = small_geometry();
  std::vector<std::byte> memory_ = std::vector<std::byte>(1 << 20);
  Progress progress_{"test"};
  SendQueue queue_{progress_, geometry_, 1};
  std::shared_ptr<TestLink> link_ = std::make_shared<TestLink>(geometry_.layer_bytes(0));
  std::unique_ptr<LayerSender> first_, second_;
};

TEST_F(LayerSenderTest, WhoEndsLeavesTheWindowToWhoWaits) {
  progress_.run([&] {
    first_ = sender(1);
    second_ = sender(2);
    first_->add(0, 1, 1);
    first_->pump();
    second_->add(0, 1, 1);
    second_->pump();
  });
  EXPECT_EQ(grants(), std::vector<std::uint64_t>{1}) << "the window is full";
  progress_.run([&] { first_.reset(); });
  EXPECT_TRUE(eventually([&] { return grants() == std::vector<std::uint64_t>{2}; }));
}

TEST_F(LayerSenderTest, WhatOnlyANicReadsIsInWritesOfItsOwn) {
  SendQueue wide(progress_, geometry_, 1 << 20);
  const auto link = std::make_shared<TestLink>();
  progress_.run([&] {
    LayerSender mixed(wide, link, 1, Lane::kLow, *this,
                      [](std::uint32_t, const std::vector<std::uint32_t>&, Outcome) {});
    for (std::uint32_t i = 0; i < 6; ++i) mixed.add(0, i, 1, nullptr, /*nic_only=*/i == 2 || i == 3);
    mixed.pump();
    ASSERT_EQ(link->writes.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(link->writes[i].nic_only, i == 1);
      EXPECT_EQ(link->writes[i].blocks.size(), 2u);
    }
    EXPECT_NE(link->writes[0].blocks[0].checksum, 0u) << "made, where the source knows none";
  });
  progress_.run([] {});  // what ending has posted
}

}  // namespace
}  // namespace dualkv::testing
