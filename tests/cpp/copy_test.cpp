// Copies within a node, by the CPU and by the NIC.
#include <atomic>

#include "node_support.h"
#include "shim/verbs.h"

namespace dualkv::testing {
namespace {

class CopyTest : public NodeTestBase, public ::testing::TestWithParam<CopyEngine> {
 protected:
  CopyTest() : NodeTestBase("tcp", small_geometry()) {}
  void SetUp() override {
    if (GetParam() == CopyEngine::kNic && rdma_devices().empty()) GTEST_SKIP() << "no RDMA device; make rdma has some";
    NodeOptions pe = options("pe");
    pe.copy = GetParam();
    pe.rdma.stall_s = 0.3;
    if (GetParam() == CopyEngine::kNic) pe.rdma.devices = {rdma_devices().front()};
    start(pe, options("de"));
    if (GetParam() == CopyEngine::kNic) wait_for_the_nic();
  }
  CopyRequest request(const TestCache& target) {
    std::vector<std::uint32_t> reversed;
    for (std::uint32_t i = 0; i < kBlocks; ++i) reversed.push_back(kBlocks - 1 - i);
    return {source_.paged(), iota_ids(kBlocks), target.paged(), reversed, {0, geometry_.layers()}};
  }
  Status copy_all(TestCache& target) { return pe_->copy(request(target)).wait(in(10)); }
  bool holds_all(const TestCache& target) {
    bool right = true;
    for (std::uint32_t i = 0; i < kBlocks; ++i) right &= target.holds(kBlocks - 1 - i, i + 1);
    return right;
  }
  void wait_for_the_nic() {
    TestCache target(geometry_, kBlocks, device_);
    ASSERT_TRUE(eventually([&] {
      EXPECT_TRUE(copy_all(target).ok());
      return pe_->stats().copies.bytes_by_nic > 0;
    }));
  }
};

TEST_P(CopyTest, EveryByteAndNoOther) {
  TestCache target(geometry_, kBlocks + 1, device_);
  target.fill(kBlocks, 77);
  const CopyStats before = pe_->stats().copies;
  EXPECT_EQ(before.engine, GetParam());
  ASSERT_TRUE(copy_all(target).ok());
  EXPECT_TRUE(holds_all(target));
  EXPECT_TRUE(target.holds(kBlocks, 77));
  const CopyStats after = pe_->stats().copies;
  if (GetParam() == CopyEngine::kNic) {
    EXPECT_EQ(after.bytes_by_nic - before.bytes_by_nic, kBlocks * geometry_.block_bytes());
    EXPECT_LE(after.doorbells - before.doorbells, 3u);
  }
}

TEST_P(CopyTest, SomeLayersOnly) {
  TestCache target(geometry_, kBlocks, device_);
  for (std::uint32_t i = 0; i < kBlocks; ++i) target.fill(i, 500 + i);
  CopyRequest some = request(target);
  some.layers = {1, 2};
  ASSERT_TRUE(pe_->copy(some).wait(in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const std::uint32_t place = kBlocks - 1 - i;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      const bool copied = layer == 1 || layer == 2;
      EXPECT_TRUE(target.layer_is(layer, place, copied ? i + 1 : 500 + place)) << layer << " " << place;
    }
  }
}

TEST_P(CopyTest, LoadsAreExact) {
  Split split;
  run_whole(split);
  PrefillOnly prefill;
  run_whole(prefill);
  run_whole(prefill, 2);
  if (GetParam() == CopyEngine::kNic) {
    EXPECT_GT(pe_->stats().copies.bytes_by_nic, 2 * kBlocks * geometry_.block_bytes());
  }
}

TEST_P(CopyTest, BadRequestsCopyNothing) {
  TestCache target(geometry_, kBlocks, device_);
  for (std::uint32_t i = 0; i < kBlocks; ++i) target.fill(i, 500 + i);
  const auto refused = [&](const std::function<void(CopyRequest&)>& change) {
    CopyRequest bad = request(target);
    change(bad);
    EXPECT_EQ(code_of([&] { pe_->copy(bad); }), Code::kInvalidArgument);
  };
  refused([](CopyRequest& r) { r.from.reset(); });
  refused([](CopyRequest& r) { r.from_ids.pop_back(); });
  refused([](CopyRequest& r) { r.to_ids[3] = kBlocks; });
  refused([](CopyRequest& r) { r.layers = {3, 2}; });
  refused([](CopyRequest& r) { r.layers = {0, 0}; });
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(target.holds(i, 500 + i));
}

TEST_P(CopyTest, DroppedIsOverWhenDropReturns) {
  TestCache target(geometry_, kBlocks, device_);
  {
    const Operation dropped = pe_->copy(request(target));
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) target.fill(i, 900 + i);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(target.holds(i, 900 + i));
  ASSERT_TRUE(copy_all(target).ok());
  EXPECT_TRUE(holds_all(target));
}

TEST_P(CopyTest, ClosingTheNodeEndsIt) {
  TestCache target(geometry_, kBlocks, device_);
  std::vector<Operation> copies;
  for (int i = 0; i < 8; ++i) copies.push_back(pe_->copy(request(target)));
  pe_->close();
  for (const Operation& copy : copies) EXPECT_TRUE(copy.done());
}

// The NIC stops in the middle: the CPU takes over, and the NIC again later.
TEST_P(CopyTest, AFailedNicIsTakenOverByTheCpu) {
  if (GetParam() != CopyEngine::kNic) GTEST_SKIP() << "no NIC in it";
  static std::atomic<int> swallow{0};
  static std::atomic<ibv_qp*> silent{nullptr};
  static const auto real = verbs()->post_send;
  for (const int fault : {1, 2}) {
    swallow = fault;
    verbs()->post_send = [](ibv_qp* pair, ibv_send_wr* wr, ibv_send_wr** bad) {
      const int kind = swallow.exchange(0);
      if (kind == 1) silent = pair;
      if (silent == pair) return 0;  // taken, and never heard of again
      if (kind == 2) return ENOMEM;
      return real(pair, wr, bad);
    };
    TestCache target(geometry_, kBlocks, device_);
    const std::uint64_t before = pe_->stats().copies.bytes_by_cpu;
    ASSERT_TRUE(copy_all(target).ok()) << fault;
    verbs()->post_send = real;
    silent = nullptr;
    EXPECT_TRUE(holds_all(target));
    EXPECT_GT(pe_->stats().copies.bytes_by_cpu, before);
    EXPECT_GT(pe_->stats().fallbacks["copy_by_cpu"], 0u);
    EXPECT_TRUE(eventually([&] {
      const std::uint64_t nic = pe_->stats().copies.bytes_by_nic;
      EXPECT_TRUE(copy_all(target).ok());
      return pe_->stats().copies.bytes_by_nic > nic;
    }));
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, CopyTest, ::testing::Values(CopyEngine::kCpu, CopyEngine::kNic),
                         [](const auto& info) { return info.param == CopyEngine::kCpu ? "cpu" : "rdma_nic"; });

TEST(CopyOptionsTest, NicWithoutADeviceIsRefused) {
  if (!rdma_devices().empty()) GTEST_SKIP() << "this machine has RDMA devices";
  TempDir root;
  NodeOptions options;
  options.name = "pe";
  options.store.root = root.path();
  options.staging.bytes = 1 << 20;
  options.copy = CopyEngine::kNic;
  EXPECT_EQ(code_of([&] { Node node(small_geometry(), options); }), Code::kUnsupported);
}

}  // namespace
}  // namespace dualkv::testing
