// What peers write for a GPU's cache: when it is looked at, who is told, and that one copy at most goes to a place. On
// the stand-in of CUDA's driver, whose kernels can be held up.
#include "base/hash.h"
#include "gpu_support.h"
#include "node/node_state.h"
#include "node_support.h"

namespace dualkv::testing {
namespace {

constexpr std::uint64_t kBytes = 6400;

class LandingTest : public NodeTestBase, public ::testing::Test {
 protected:
  LandingTest() : NodeTestBase("loopback", KvGeometry({kBytes, 6912}, 16, "test/model"), 0) {}

  void SetUp() override {
    if (const std::string why = no_stand_in(); !why.empty()) GTEST_SKIP() << why;
    state_ = std::make_shared<NodeState>(geometry_, options("pe"));
    state_->start();
    auto slots = test_slots(geometry_, 4);
    slots_ = slots.get();
    port_ = std::make_unique<DevicePort>(*state_, CudaDevice::open(0), nullptr, std::move(slots));
    on_progress([&] { landing_.emplace(*port_, 7); });
    for (std::size_t i = 0; i < kBytes; ++i) right_[i] = static_cast<std::byte>(i * 7);
    sum_ = checksum({right_.data(), kBytes});
  }
  void TearDown() override {
    if (!state_) return;
    on_progress([&] {
      port_->withdraw(7);
      landing_.reset();
      EXPECT_EQ(free_here(), 4u);
      port_.reset();
    });
    state_->close();
  }

  template <typename Task>
  void on_progress(Task task) {
    state_->progress().run(task);
  }
  std::uint32_t free_here() { return free_slots(slots_->landing); }
  // Where a NIC may write; null: nowhere.
  std::byte* ask(Writer writer = Writer::kNic) {
    std::byte* at = nullptr;
    on_progress([&] {
      bool full = false;
      std::array<Extent, PagedKv::kMaxPlanes> out;
      if (landing_->target(0, kBytes, writer, out, full).extents > 0) at = out[0].data;
      EXPECT_FALSE(full);
    });
    return at;
  }
  void write(std::byte* to, bool spoil = false) {
    auto bytes = right_;
    if (spoil) bytes[17] ^= std::byte{1};
    ASSERT_TRUE(driver_call<bool (*)(std::uint64_t, const void*, std::size_t)>("stand_in_write")(
        reinterpret_cast<std::uint64_t>(to), bytes.data(), kBytes));
  }
  void land() {
    on_progress([&] {
      landing_->land(
          0, kBytes, sum_,
          [this](const FreePieces::Piece& piece, bool on_gpu) {
            EXPECT_TRUE(on_gpu);
            right_at_.push_back(piece.get());
          },
          [this](const Status& why) { wrong_.push_back(why.code); });
    });
  }
  std::size_t told() {
    std::size_t count = 0;
    on_progress([&] { count = right_at_.size() + wrong_.size(); });
    return count;
  }

  std::shared_ptr<NodeState> state_;
  std::unique_ptr<DevicePort> port_;
  NicSlots* slots_ = nullptr;
  std::optional<Landing> landing_;
  std::array<std::byte, kBytes> right_;
  std::uint64_t sum_ = 0;
  std::vector<std::byte*> right_at_;
  std::vector<Code> wrong_;
};

TEST_F(LandingTest, WhatIsRightIsSaidOnceAndNotWantedAgain) {
  std::byte* at = ask();
  EXPECT_EQ(ask(), at) << "the same place while nothing has come";
  write(at);
  {
    const HeldKernels held;
    land();
    EXPECT_EQ(ask(), nullptr) << "it is here, to be looked at yet";
    EXPECT_EQ(told(), 0u);
  }
  ASSERT_TRUE(eventually([&] { return told() == 1; }));
  EXPECT_EQ(right_at_, std::vector<std::byte*>{at});
  EXPECT_EQ(ask(), nullptr);
  on_progress([&] { landing_->drop(0); });
  EXPECT_EQ(ask(), nullptr) << "it was right, whoever is to bring it now";
}

TEST_F(LandingTest, WhatIsWrongMayComeAgain) {
  write(ask(), /*spoil=*/true);
  land();
  ASSERT_TRUE(eventually([&] { return told() == 1; }));
  EXPECT_EQ(wrong_, std::vector<Code>{Code::kCorrupt});
  write(ask());
  land();
  ASSERT_TRUE(eventually([&] { return told() == 2; }));
  EXPECT_EQ(right_at_.size(), 1u);
}

TEST_F(LandingTest, ALateVerdictOfWhatAnotherBringsIsNobodys) {
  std::byte* first = ask();
  write(first, /*spoil=*/true);
  std::byte* second = nullptr;
  {
    const HeldKernels held;
    land();
    on_progress([&] { landing_->drop(0); });
    second = ask();
    ASSERT_NE(second, nullptr) << "who takes over may write it";
    EXPECT_NE(second, first) << "which is being looked at";
  }
  ASSERT_TRUE(eventually([&] {
    std::uint32_t free = 0;
    on_progress([&] { free = free_here(); });
    return free == 3;
  }));
  EXPECT_EQ(told(), 0u);
  EXPECT_EQ(ask(), second) << "the verdict took its place away";
  write(second);
  land();
  ASSERT_TRUE(eventually([&] { return told() == 1; }));
  EXPECT_EQ(right_at_, std::vector<std::byte*>{second});
}

// A NIC may still write to the slot, by another link perhaps. SetUp's counterpart sees that it comes back in the end.
TEST_F(LandingTest, WhatComesInlineInTheEndIsNotWhereANicMayWrite) {
  std::byte* slot = ask();
  std::byte* pinned = ask(Writer::kCpu);
  EXPECT_NE(pinned, nullptr);
  EXPECT_NE(pinned, slot);
  on_progress([&] { EXPECT_EQ(free_here(), 3u); });
}

class OneCopyTest : public NodeTestBase, public ::testing::Test {
 protected:
  OneCopyTest() : NodeTestBase("tcp", KvGeometry({6400, 6912, 7424, 320}, 16, "test/model"), 0) {}
  void SetUp() override {
    if (const std::string why = no_stand_in(); !why.empty()) GTEST_SKIP() << why;
    gpu_.copy = GpuCopy::kKernel;
  }
};

// Where layers share their memory, a second copy of one could fall on the next.
TEST_F(OneCopyTest, WhatIsOnItsWayToTheCacheIsNotBroughtByWhoTakesOver) {
  start();
  const TestCache cache(geometry_, kBlocks, device_);
  DecodeOnly policy;
  std::optional<HeldKernels> held(std::in_place);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  const std::uint64_t bytes = kBlocks * geometry_.block_bytes();
  ASSERT_TRUE(eventually([&] { return pe_->stats().links.at(0).bytes_received >= bytes; }));
  de_.reset();
  ASSERT_TRUE(eventually([&] { return !pe_->peer("de").connected(); }));
  EXPECT_FALSE(load.wait(0, in(0)).ok());
  held.reset();
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) EXPECT_TRUE(load.wait(layer, in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  EXPECT_EQ(pe_->stats().gpus.at(0).to_gpu.bytes, bytes);
  EXPECT_EQ(load.result().failovers, 0u);
  load.cancel();
  expect_all_free();
}

// Half of each block is on its way when its reader dies: this node reads all of it, and copies only the rest.
TEST_F(OneCopyTest, WhoTakesOverCopiesOnlyTheRest) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 40;
  start(options("pe"), de);
  const TestCache cache(geometry_, kBlocks, device_);
  DecodeOnly policy;
  std::optional<HeldKernels> held(std::in_place);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20, 0, 1});
  const std::uint64_t bytes = kBlocks * geometry_.block_bytes();
  ASSERT_TRUE(eventually([&] { return pe_->stats().links.at(0).bytes_received > bytes / 2; }));
  de_.reset();
  ASSERT_TRUE(eventually([&] { return load.result().failovers > 0; }));
  ASSERT_TRUE(eventually([&] { return pe_->store().stats().blocks_read > 0; }));
  held.reset();
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) EXPECT_TRUE(load.wait(layer, in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  EXPECT_EQ(pe_->stats().gpus.at(0).to_gpu.bytes, bytes);
  load.cancel();
  expect_all_free();
}

}  // namespace
}  // namespace dualkv::testing
