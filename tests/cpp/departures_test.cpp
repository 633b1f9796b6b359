// What leaves a GPU's cache for a peer: by slots that a NIC reads, or by pinned memory; what comes back of it. Over a
// link that does as it is told, on the stand-in of CUDA's driver, whose kernels can be held up.
#include <atomic>
#include <set>
#include <thread>

#include "base/hash.h"
#include "gpu_support.h"
#include "node/node_state.h"
#include "test_link.h"

namespace dualkv::testing {
namespace {

constexpr std::uint32_t kSlots = 4, kFirst = 100;  // kFirst: of the grant

class DeparturesTest : public NodeTestBase, public BlockSource, public ::testing::Test {
 protected:
  DeparturesTest() : NodeTestBase("loopback", KvGeometry({6400, 6912}, 16, "test/model"), 0) {}

  void SetUp() override {
    if (const std::string why = no_stand_in(); !why.empty()) GTEST_SKIP() << why;
    NodeOptions pe = options("pe");
    pe.write_frame_bytes = frame_;
    pe.write_window_bytes = window_;
    state_ = std::make_shared<NodeState>(geometry_, pe);
    state_->start();
    cache_.emplace(geometry_, kBlocks, 0);
    for (std::uint32_t i = 0; i < kBlocks; ++i) cache_->fill(i, i + 1);
    auto slots = test_slots(geometry_, kSlots);
    slots_ = slots.get();
    link_->nic = true;
    port_ = std::make_unique<DevicePort>(*state_, CudaDevice::open(0), nullptr, std::move(slots));
    on_progress([&] {
      departures_.emplace(
          *state_, *port_, link_, 7, Lane::kLow, *this,
          [this](std::uint32_t, const std::vector<std::uint32_t>& blocks, Outcome) { sent_ += blocks.size(); },
          [this](const Status& why) { failed_ = why; });
    });
  }
  void TearDown() override {
    if (!state_) return;
    on_progress([&] {
      departures_.reset();
      EXPECT_TRUE(link_->writes.empty());
      EXPECT_EQ(free_here(), kSlots);
      EXPECT_TRUE(failed_.ok()) << failed_.message;
      port_.reset();
    });
    state_->close();
  }

  bool describe(std::uint32_t layer, std::uint32_t index, const std::shared_ptr<void>&, WriteBlock& out) override {
    out.block = kFirst + index;
    out.extents = static_cast<std::uint32_t>(cache_->paged()->extents(layer, index, out.source));
    out.checksum = index < known_ ? 1000 * layer + index : 0;
    return index < known_;
  }

  template <typename Task>
  void on_progress(Task task) {
    state_->progress().run(task);
  }
  std::uint32_t free_here() { return free_slots(slots_->departing); }
  void send(std::uint32_t layer, std::uint32_t blocks) {
    on_progress([&] {
      departures_->add(layer, 0, blocks);
      departures_->pump();
    });
  }
  // Layer Blocks of writes that the link has.
  std::size_t written() {
    std::size_t count = 0;
    on_progress([&] {
      for (const LayerWrite& write : link_->writes) count += write.blocks.size();
    });
    return count;
  }
  // Looks at what is written and where from; the peer acknowledges it.
  void look(bool nic) {
    on_progress([&] {
      for (const LayerWrite& write : std::exchange(link_->writes, {})) {
        EXPECT_EQ(write.nic_only, nic);
        look_at(write);
        state_->sends().on_write_done(*link_, write.id, {});
      }
    });
  }
  // No NIC takes what only a NIC reads; the peer acknowledges the rest.
  void give_back() {
    on_progress([&] {
      for (LayerWrite& write : std::exchange(link_->writes, {})) {
        look_at(write);
        if (!write.nic_only) {
          state_->sends().on_write_done(*link_, write.id, {});
          continue;
        }
        write.blocks.clear();  // the link holds their memory no more
        link_->returned.insert(write.id);
        state_->sends().on_write_returned(*link_, write.id);
      }
    });
  }
  void look_at(const LayerWrite& write) {
    for (const WriteBlock& block : write.blocks) look_at(write.layer, block, write.nic_only);
  }
  void look_at(std::uint32_t layer, const WriteBlock& block, bool nic) {
    const std::uint32_t index = block.block - kFirst;
    ASSERT_LT(index, kBlocks);
    ASSERT_EQ(block.extents, 1u);
    const auto slots = slots_->departing.slots.memory()->memory();
    EXPECT_EQ(block.source[0].data >= slots.data() && block.source[0].data < slots.data() + slots.size(), nic);
    EXPECT_EQ(block.keep.get(), block.source[0].data);
    std::array<Extent, PagedKv::kMaxPlanes> planes;
    const auto of_cache = std::span(planes).first(cache_->paged()->extents(layer, index, planes));
    const std::vector<std::byte> expected = read(of_cache), is = read({block.source.data(), 1});
    EXPECT_EQ(is, expected) << layer << " " << index;
    EXPECT_EQ(block.checksum, index < known_ ? 1000 * layer + index : checksum(std::span<const std::byte>(expected)));
    seen_.insert({layer, index});
  }
  static std::vector<std::byte> read(std::span<const Extent> extents) {
    std::vector<std::byte> bytes;
    for (const Extent& extent : extents) bytes.resize(bytes.size() + extent.bytes);
    const Extent to{bytes.data(), bytes.size()};
    std::vector<CopyRun> runs;
    append_runs(extents, {&to, 1}, runs);
    CudaDevice::open(0)->copy_now(runs, HostSide::kTo);
    return bytes;
  }
  std::uint64_t by_nic() {
    std::uint64_t bytes = 0;
    on_progress([&] { bytes = port_->nic_sent_bytes(); });
    return bytes;
  }

  std::uint64_t frame_ = 3 * 6912, window_ = 1 << 20;
  std::shared_ptr<NodeState> state_;
  std::optional<TestCache> cache_;
  std::unique_ptr<DevicePort> port_;
  NicSlots* slots_ = nullptr;
  std::shared_ptr<TestLink> link_ = std::make_shared<TestLink>();
  std::optional<Departures> departures_;
  std::uint32_t known_ = 0;  // blocks whose checksum the source knows
  std::set<std::pair<std::uint32_t, std::uint32_t>> seen_;
  std::atomic<std::size_t> sent_ = 0;
  Status failed_;
};

TEST_F(DeparturesTest, ANicReadsItInTheGpuWhereItWasSummedUp) {
  known_ = 1;
  send(1, 2);
  send(0, 2);
  ASSERT_TRUE(eventually([&] { return written() == 4; }));
  EXPECT_EQ(by_nic(), 0u) << "nobody has it yet";
  look(/*nic=*/true);
  EXPECT_EQ(sent_, 4u);
  EXPECT_EQ(seen_.size(), 4u);
  EXPECT_EQ(by_nic(), 2 * geometry_.block_bytes());
  on_progress([&] { EXPECT_EQ(free_here(), kSlots); });
}

TEST_F(DeparturesTest, WithoutASlotOrANicItGoesByPinnedMemory) {
  send(0, kSlots + 2);
  ASSERT_TRUE(eventually([&] { return written() == kSlots + 2; }));
  std::size_t pinned = 0;
  on_progress([&] {
    for (const LayerWrite& write : link_->writes) {
      for (const WriteBlock& block : write.blocks) {
        look_at(0, block, write.nic_only);
        pinned += !write.nic_only;
      }
    }
    for (const LayerWrite& write : std::exchange(link_->writes, {}))
      state_->sends().on_write_done(*link_, write.id, {});
  });
  EXPECT_EQ(pinned, 2u);
  EXPECT_EQ(by_nic(), kSlots * geometry_.layer_bytes(0));
  on_progress([&] { link_->nic = false; });
  send(1, 3);
  ASSERT_TRUE(eventually([&] { return written() == 3; }));
  look(/*nic=*/false);
  EXPECT_EQ(sent_, kSlots + 5u);
  EXPECT_EQ(by_nic(), kSlots * geometry_.layer_bytes(0));
}

TEST_F(DeparturesTest, WhatNoNicTookGoesByPinnedMemoryAndAllThatFollows) {
  send(0, 3);
  ASSERT_TRUE(eventually([&] { return written() == 3; }));
  give_back();
  EXPECT_EQ(sent_, 0u);
  on_progress([&] { EXPECT_EQ(free_here(), kSlots); });
  send(1, 2);
  ASSERT_TRUE(eventually([&] { return written() == 5; }));
  seen_.clear();
  look(/*nic=*/false);
  EXPECT_EQ(sent_, 5u);
  EXPECT_EQ(seen_.size(), 5u);
  EXPECT_EQ(by_nic(), 0u);
  EXPECT_EQ(state_->stats().fallbacks["gpu_rdma_returned"], 1u);
}

class OneByOneDeparturesTest : public DeparturesTest {
 protected:
  OneByOneDeparturesTest() { frame_ = 1; }
};

// The peer had it when the queue pair ended, and says so while it is taken anew.
TEST_F(OneByOneDeparturesTest, AnAnswerThatComesLateIsGoodEnough) {
  send(0, 2);
  ASSERT_TRUE(eventually([&] { return written() == 2; }));
  std::uint64_t first = 0;
  on_progress([&] {
    first = link_->writes.front().id;
    for (const LayerWrite& write : std::exchange(link_->writes, {})) {
      link_->returned.insert(write.id);
      state_->sends().on_write_returned(*link_, write.id);
    }
    EXPECT_EQ(free_here(), kSlots);
    link_->returned.erase(first);
    state_->sends().on_write_done(*link_, first, {});
  });
  EXPECT_EQ(sent_, 1u);
  EXPECT_EQ(by_nic(), geometry_.layer_bytes(0)) << "that way it came";
  ASSERT_TRUE(eventually([&] { return written() == 1; }));
  on_progress([&] { EXPECT_NE(link_->writes.front().id, first); });
  look(/*nic=*/false);
  EXPECT_EQ(sent_, 2u);
  EXPECT_EQ(seen_.size(), 1u);
}

TEST_F(DeparturesTest, WhatNoNicTookWaitsForPinnedMemory) {
  send(0, 3);
  ASSERT_TRUE(eventually([&] { return written() == 3; }));
  std::vector<FreePieces::Piece> taken;
  on_progress([&] {
    while (auto piece = port_->departing().take()) taken.push_back(std::move(piece));
  });
  ASSERT_GT(taken.size(), 3u);
  taken.pop_back();
  give_back();
  EXPECT_EQ(written(), 0u);
  on_progress([&] { taken.clear(); });
  ASSERT_TRUE(eventually([&] { return written() == 3; }));
  look(/*nic=*/false);
  EXPECT_EQ(sent_, 3u);
}

class TightDeparturesTest : public DeparturesTest {
 protected:
  TightDeparturesTest() {
    gpu_.bounce_bytes = 4 * 6912;
    frame_ = 1;
    link_ = std::make_shared<TestLink>(kSlots * 6400);
  }
};

// What came back has the memory that others wait with for the window which it had.
TEST_F(TightDeparturesTest, WhatWaitsForMemoryWaitsForNobodyWhoWaitsForIt) {
  send(0, 2 * kSlots);
  for (int i = 0; i < 20 && sent_ < 2 * kSlots; ++i) {
    ASSERT_TRUE(eventually([&] { return written() > 0; })) << sent_;
    give_back();
  }
  EXPECT_EQ(sent_, 2 * kSlots);
  EXPECT_EQ(seen_.size(), 2 * kSlots);
  EXPECT_GE(state_->stats().fallbacks["gpu_rdma_returned"], 1u);
}

class WideDeparturesTest : public DeparturesTest {
 protected:
  WideDeparturesTest() {
    gpu_.bounce_bytes = 8 * 6912;
    frame_ = 8 * 6912;
  }
};

TEST_F(WideDeparturesTest, WritesAreNoLargerThanFitsIntoPinnedMemoryWithOthers) {
  send(0, kSlots);
  ASSERT_TRUE(eventually([&] { return written() == kSlots; }));
  on_progress([&] {
    for (const LayerWrite& write : link_->writes) EXPECT_LE(write.blocks.size(), 2u);
  });
  give_back();
  ASSERT_TRUE(eventually([&] { return written() == kSlots; }));
  look(/*nic=*/false);
  EXPECT_EQ(sent_, kSlots);
}

TEST_F(DeparturesTest, WhatEndsInTheMiddleGivesItsSlotsBackAndSendsNothingMore) {
  send(0, 1);
  ASSERT_TRUE(eventually([&] { return written() == 1; }));
  std::optional<HeldKernels> held(std::in_place);
  send(1, 2);
  on_progress([] {});  // and the batch is with the GPU
  std::atomic<bool> let_go = false;
  std::thread lets_go([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    let_go = true;
    held.reset();
  });
  on_progress([&] {
    departures_.reset();
    EXPECT_TRUE(let_go) << "a copy was under way";
  });
  lets_go.join();
  EXPECT_EQ(written(), 0u) << "withdrawn";
  EXPECT_TRUE(eventually([&] {
    std::uint32_t free = 0;
    on_progress([&] { free = free_here(); });
    return free == kSlots;
  }));
  EXPECT_EQ(sent_, 0u);
}

TEST_F(DeparturesTest, AGpuThatCopiesNoMoreIsSaid) {
  auto& driver = CudaDevice::open(0)->driver();
  const auto launch = driver.launch_kernel;
  const decltype(driver.launch_kernel) fails = [](cuda::Function, unsigned, unsigned, unsigned, unsigned, unsigned,
                                                  unsigned, unsigned, cuda::Stream, void**, void**) { return 700; };
  on_progress([&] { driver.launch_kernel = fails; });
  send(0, 2);
  EXPECT_TRUE(eventually([&] {
    bool failed = false;
    on_progress([&] { failed = !failed_.ok(); });
    return failed;
  }));
  on_progress([&] {
    driver.launch_kernel = launch;
    EXPECT_EQ(failed_.code, Code::kIo);
    failed_ = {};
  });
  EXPECT_EQ(written(), 0u);
}

class NarrowDeparturesTest : public DeparturesTest {
 protected:
  NarrowDeparturesTest() {
    frame_ = 1;
    window_ = 6400;
  }
};

TEST_F(NarrowDeparturesTest, NoMoreThanTwoWindowsAreTakenAndTheRestFollows) {
  send(0, 5);
  on_progress([&] { EXPECT_EQ(free_here(), kSlots - 2); });
  for (const std::size_t wave : {2, 2, 1}) {
    ASSERT_TRUE(eventually([&] { return written() == wave; }));
    look(/*nic=*/true);
  }
  EXPECT_EQ(sent_, 5u);
  EXPECT_EQ(seen_.size(), 5u);
}

}  // namespace
}  // namespace dualkv::testing
