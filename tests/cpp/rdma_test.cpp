// Writes over real queue pairs, and what happens when they break. Needs an RDMA device (make rdma).
#include <sys/mman.h>

#include <atomic>
#include <mutex>

#include "rdma_support.h"

namespace dualkv::testing {
namespace {

class RdmaTest : public NodeTestBase, public ::testing::Test {
 protected:
  RdmaTest() : NodeTestBase("rdma", small_geometry()) {}
  void SetUp() override {
    if (rdma_devices().empty()) GTEST_SKIP() << "no RDMA device; make rdma has some";
  }
  RdmaStats stats(Node& node) {
    for (const LinkStats& link : node.stats().links) {
      if (link.connected) return link.rdma;
    }
    return {};
  }
  bool all_up() {
    return eventually([&] {
      const RdmaStats pe = stats(*pe_), de = stats(*de_);
      return pe.queue_pairs == 4 && pe.queue_pairs_up == 4 && de.queue_pairs_up == 4;
    });
  }
  void start_all(NodeOptions pe, NodeOptions de) {
    start(std::move(pe), std::move(de));
    ASSERT_TRUE(all_up()) << stats(*pe_).last_failure << " " << stats(*de_).last_failure;
  }
  void start_all() { start_all(options("pe"), options("de")); }

  // Blocks 0..kBlocks-1 of all layers, from the source cache into a new one over there. Every byte is checked.
  Status send_all(TestCache& target, Lane lane = Lane::kLow, double deadline_s = 10) {
    const auto ids = iota_ids(kBlocks);
    const Grant grant = de_->grant("pe", target.paged(), ids, deadline_s);
    SendRequest request;
    request.grant = grant.id();
    request.source = source_.paged();
    request.block_ids = ids;
    request.layers = {0, geometry_.layers()};
    request.lane = lane;
    request.deadline_s = deadline_s;
    Status sent = pe_->peer("de").send_layers(request).wait(in(deadline_s + 1));
    if (!sent.ok()) return sent;
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(target.holds(i, i + 1)) << i;
    return grant.wait(geometry_.layers() - 1, in(1));
  }
  // Sends until it has all gone by RDMA again.
  void expect_recovery() {
    EXPECT_TRUE(all_up()) << stats(*pe_).last_failure << " " << stats(*de_).last_failure;
    const RdmaStats before = stats(*pe_);
    TestCache target(geometry_, kBlocks);
    EXPECT_TRUE(send_all(target).ok());
    const RdmaStats after = stats(*pe_);
    EXPECT_EQ(after.bytes_written[0] - before.bytes_written[0], kBlocks * geometry_.block_bytes());
    EXPECT_EQ(after.inline_batches, before.inline_batches);
  }
};

TEST_F(RdmaTest, LoadsGoByRdmaOnTheLowLaneOneDoorbellABatch) {
  start_all();
  DecodeOnly policy;
  run_whole(policy);
  const RdmaStats pe = stats(*pe_), de = stats(*de_);
  // All that was read over there, and the new blocks that were published here.
  EXPECT_EQ(de.bytes_written[0], kBlocks * geometry_.block_bytes());
  EXPECT_EQ(pe.bytes_written[0], 2 * geometry_.block_bytes());
  for (const RdmaStats& side : {pe, de}) {
    EXPECT_EQ(side.bytes_written[1], 0u);
    EXPECT_EQ(side.inline_batches, 0u);
    EXPECT_EQ(side.failures + side.fences, 0u) << side.last_failure;
    // As the device says; of service levels, soft-RoCE only with our module (tests/rdma/service_levels).
    EXPECT_EQ(side.service_level[0], 2);
    EXPECT_EQ(side.service_level[1], 0);
    EXPECT_EQ(side.traffic_class[0], 8 << 2);
    EXPECT_EQ(side.traffic_class[1], 46 << 2);
    EXPECT_GT(side.batches, 0u);
    EXPECT_LE(side.doorbells, side.batches + 4);  // and one to try each queue pair
    EXPECT_GT(side.work_requests, side.batches);
  }
  EXPECT_EQ(pe_->stats().fallbacks.count("rdma_inline") + de_->stats().fallbacks.count("rdma_inline"), 0u);
}

TEST_F(RdmaTest, EachLaneHasItsQueuePairs) {
  start_all();
  TestCache low(geometry_, kBlocks), high(geometry_, kBlocks);
  ASSERT_TRUE(send_all(low, Lane::kLow).ok());
  ASSERT_TRUE(send_all(high, Lane::kHigh).ok());
  const RdmaStats pe = stats(*pe_);
  EXPECT_EQ(pe.bytes_written[0], kBlocks * geometry_.block_bytes());
  EXPECT_EQ(pe.bytes_written[1], kBlocks * geometry_.block_bytes());
}

TEST_F(RdmaTest, SmallQueuesDoNotOverrun) {
  auto pe = options("pe"), de = options("de");
  for (NodeOptions* each : {&pe, &de}) {
    each->rdma.send_depth = 3;
    each->rdma.receive_depth = 4;
    each->write_frame_bytes = 3 * geometry_.layer_bytes(3);
  }
  start_all(pe, de);
  std::vector<std::unique_ptr<TestCache>> targets;
  for (int i = 0; i < 4; ++i) {
    targets.push_back(std::make_unique<TestCache>(geometry_, kBlocks));
    ASSERT_TRUE(send_all(*targets.back()).ok());
  }
  Split policy;
  run_whole(policy);
  const RdmaStats after = stats(*pe_);
  EXPECT_GT(after.bytes_written[0], 0u);
  EXPECT_EQ(after.failures, 0u) << after.last_failure;
  EXPECT_EQ(pe_->stats().fallbacks.count("rdma_device_fault"), 0u);  // no completion queue overran
}

TEST_F(RdmaTest, AWrongKeyWritesNowhereAndIsSurvived) {
  start_all();
  TestCache target(geometry_, kBlocks);
  {
    std::atomic<int> wrong{0};
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      if (carries_data(wr) && wrong.fetch_add(1) == 0) wr->wr.rdma.rkey ^= 0x5a00;
      return 0;
    });
    ASSERT_TRUE(send_all(target).ok());
    EXPECT_GE(wrong, 1);
  }
  const RdmaStats after = stats(*pe_);
  EXPECT_EQ(after.failures, 1u);
  EXPECT_NE(after.last_failure.find("remote access error"), std::string::npos) << after.last_failure;
  EXPECT_GT(after.inline_batches, 0u);
  EXPECT_GT(pe_->stats().fallbacks["rdma_inline"], 0u);
  expect_recovery();
  EXPECT_GE(stats(*pe_).rebuilds, 1u);
}

TEST_F(RdmaTest, AQueuePairForcedIntoErrorIsBuiltAnew) {
  start_all();
  for (int round = 0; round < 3; ++round) {
    TestCache target(geometry_, kBlocks);
    std::atomic<bool> forced{false};
    const PostHook hook([&](ibv_qp* pair, ibv_send_wr* wr) {
      if (!carries_data(wr) || forced.exchange(true)) return 0;
      ibv_qp_attr attributes{};
      attributes.qp_state = IBV_QPS_ERR;
      verbs()->modify_qp(pair, &attributes, IBV_QP_STATE);
      return 0;
    });
    ASSERT_TRUE(send_all(target).ok());
    EXPECT_TRUE(forced);
  }
  EXPECT_GE(stats(*pe_).failures, 3u);
  expect_recovery();
}

TEST_F(RdmaTest, AQueuePairThatGoesSilentIsLeft) {
  auto pe = options("pe");
  pe.rdma.stall_s = 0.2;
  start_all(pe, options("de"));
  TestCache target(geometry_, kBlocks);
  std::atomic<int> swallowed{0};
  {
    // Taken by the driver, it says, and never heard of again.
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      if (!carries_data(wr) || swallowed > 0) return 0;
      ++swallowed;
      return PostHook::kSwallow;
    });
    ASSERT_TRUE(send_all(target).ok());
  }
  EXPECT_EQ(swallowed, 1);
  EXPECT_EQ(stats(*pe_).failures, 1u);
  EXPECT_NE(stats(*pe_).last_failure.find("no progress"), std::string::npos) << stats(*pe_).last_failure;
  expect_recovery();
}

TEST_F(RdmaTest, AFailedPostGoesInline) {
  start_all();
  TestCache target(geometry_, kBlocks);
  {
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) { return carries_data(wr) ? ENOMEM : 0; });
    ASSERT_TRUE(send_all(target).ok());
  }
  EXPECT_EQ(stats(*pe_).bytes_written[0] > 0, true);  // posted, as far as the path knows
  EXPECT_GT(stats(*pe_).inline_batches, 0u);
  expect_recovery();
}

TEST_F(RdmaTest, NothingLandsAfterAGrantWasRevoked) {
  start_all();
  TestCache target(geometry_, kBlocks);
  for (std::uint32_t i = 0; i < kBlocks; ++i) target.fill(i, 1000 + i);
  const auto ids = iota_ids(kBlocks);
  std::mutex mutex;
  std::optional<Grant> grant = de_->grant("pe", target.paged(), ids, 10);
  SendRequest request;
  request.grant = grant->id();
  request.source = source_.paged();
  request.block_ids = ids;
  request.layers = {0, geometry_.layers()};
  Status sent;
  {
    // Cleared, and about to be posted: the other side takes its memory back at this moment.
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      const std::lock_guard lock(mutex);
      if (carries_data(wr) && grant) {
        grant->revoke();
        grant.reset();
      }
      return 0;
    });
    sent = pe_->peer("de").send_layers(request).wait(in(12));
  }
  EXPECT_EQ(sent.code, Code::kRefused);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // what could still land, would have
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(target.holds(i, 1000 + i)) << i;
  EXPECT_GE(stats(*de_).fences, 1u);
  expect_recovery();
}

TEST_F(RdmaTest, NothingIsReadAfterASendWasDropped) {
  auto pe = options("pe");
  pe.write_frame_bytes = geometry_.layer_bytes(3);
  start_all(pe, options("de"));
  TestCache target(geometry_, kBlocks);
  const auto ids = iota_ids(kBlocks);
  const Grant grant = de_->grant("pe", target.paged(), ids, 10);
  SendRequest request;
  request.grant = grant.id();
  request.source = source_.paged();
  request.block_ids = ids;
  request.layers = {0, geometry_.layers()};
  std::atomic<int> posts{0};
  const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
    posts += carries_data(wr);
    return 0;
  });
  {
    const Operation dropped = pe_->peer("de").send_layers(request);
    ASSERT_TRUE(eventually([&] { return posts > 0; }));
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, 5000 + i);  // its memory is the caller's again
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  // What arrived is what was sent, and no block is a mixture that was taken for whole.
  EXPECT_EQ(stats(*de_).queue_pairs, 4u);
  for (const LinkStats& link : de_->stats().links) EXPECT_EQ(link.writes_corrupt, 0u);
  for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, i + 1);
  expect_recovery();
}

TEST_F(RdmaTest, AnAnnouncementOfNothingEndsTheLink) {
  start_all();
  TestCache target(geometry_, kBlocks);
  const auto ids = iota_ids(kBlocks);
  const Grant grant = de_->grant("pe", target.paged(), ids, 10);
  SendRequest request;
  request.grant = grant.id();
  request.source = source_.paged();
  request.block_ids = ids;
  request.layers = {0, geometry_.layers()};
  {
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      for (; wr != nullptr; wr = wr->next) {
        if (wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM && carries_data(wr)) wr->imm_data ^= htobe32(0x40000000);
      }
      return 0;
    });
    EXPECT_EQ(pe_->peer("de").send_layers(request).wait(in(12)).code, Code::kPeerLost);
  }
  EXPECT_GE(de_->stats().frames_hostile, 1u);
  EXPECT_FALSE(grant.wait(0, in(0.1)).ok());
  ASSERT_TRUE(eventually([&] { return pe_->peer("de").connected() && stats(*pe_).queue_pairs_up == 4; }));
  expect_recovery();
}

TEST_F(RdmaTest, LoadsThatEndWellLeaveTheQueuePairsAlone) {
  start_all();
  PlanRequest request;
  request.keys = keys_;
  request.prefill = pe_->view();
  request.helpers = {pe_->peer("de").view()};
  Split policy;
  constexpr int kLoads = 20;
  for (int i = 0; i < kLoads; ++i) {
    TestCache cache(geometry_, kBlocks);
    Load load = pe_->load({policy.plan(request), cache.paged(), iota_ids(kBlocks), 10});
    ASSERT_TRUE(load.finish(in(10)).ok());
    for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(cache.holds(block, block + 1));
  }
  EXPECT_GT(stats(*de_).batches, 0u);
  // The end of a load may overtake the acknowledgement of its last write: rarely, if it comes at all.
  EXPECT_LE(stats(*de_).fences + stats(*pe_).fences, kLoads / 4u);
}

TEST_F(RdmaTest, AStrangerTooManyLeavesNothing) {
  auto de = options("de");
  de.max_peers = 1;
  start_all(options("pe"), de);
  Node third(geometry_, options("third"));
  // Closed by the other side, or by the time it is looked at.
  try {
    third.connect(de_->addresses()[0]);
  } catch (const Error&) {
  }
  Node fourth(geometry_, [&] {
    NodeOptions few = options("fourth");
    few.max_peers = 1;
    return few;
  }());
  fourth.connect(third.addresses()[0]);
  try {
    fourth.connect(pe_->addresses()[0]);
  } catch (const Error&) {
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  expect_recovery();
}

TEST_F(RdmaTest, MemoryBeyondTheBudgetGoesInline) {
  auto pe = options("pe"), de = options("de");
  de.rdma.registered_bytes = 1;
  start_all(pe, de);
  TestCache target(geometry_, kBlocks);
  ASSERT_TRUE(send_all(target).ok());
  EXPECT_EQ(stats(*pe_).bytes_written[0], 0u);
  EXPECT_GT(stats(*pe_).inline_batches, 0u);
  EXPECT_GT(de_->stats().fallbacks["rdma_registration_budget"], 0u);
}

TEST_F(RdmaTest, MemoryThatCameBackAtTheSameAddressIsRegisteredAnew) {
  start_all();
  const std::uint64_t bytes = 64 * geometry_.block_bytes();
  void* place = nullptr;
  for (int round = 0; round < 3; ++round) {
    place = mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (place ? MAP_FIXED : 0), -1, 0);
    ASSERT_NE(place, MAP_FAILED);
    auto* base = static_cast<std::byte*>(place);
    std::vector<std::vector<Plane>> layers;
    for (std::uint32_t i = 0; i < geometry_.layers(); ++i) {
      layers.push_back(
          {{base + kBlocks * geometry_.layer_offset(i), geometry_.layer_bytes(i), geometry_.layer_bytes(i)}});
    }
    const auto ids = iota_ids(kBlocks);
    {
      const auto paged = std::make_shared<PagedKv>(geometry_, layers, kBlocks);
      const Grant grant = de_->grant("pe", paged, ids, 10);
      SendRequest request;
      request.grant = grant.id();
      request.source = source_.paged();
      request.block_ids = ids;
      request.layers = {0, geometry_.layers()};
      ASSERT_TRUE(pe_->peer("de").send_layers(request).wait(in(11)).ok());
      EXPECT_EQ(checksums(*paged, ids, 0, geometry_.layers()), checksums(*source_.paged(), ids, 0, geometry_.layers()));
    }
    munmap(place, bytes);
  }
  EXPECT_EQ(stats(*pe_).inline_batches, 0u);
  EXPECT_EQ(stats(*pe_).failures, 0u);
}

TEST_F(RdmaTest, ANetworkThatGoesAwayIsLeftForTcpAndTakenUpAgain) {
  if (std::getenv("DUALKV_RDMA_WIRE") == nullptr) GTEST_SKIP() << "DUALKV_RDMA_WIRE names no link to take down";
  const std::string wire = std::getenv("DUALKV_RDMA_WIRE");
  auto pe = options("pe"), de = options("de");
  pe.rdma.timeout = de.rdma.timeout = 10;  // 4 ms
  start_all(pe, de);
  ASSERT_EQ(std::system(("ip link set " + wire + " down").c_str()), 0);
  TestCache target(geometry_, kBlocks);
  EXPECT_TRUE(send_all(target).ok());
  EXPECT_GT(stats(*pe_).inline_batches, 0u);
  ASSERT_EQ(std::system(("ip link set " + wire + " up && wires").c_str()), 0);
  expect_recovery();
}

TEST(RdmaWithoutDevices, SaysWhatIsMissingAndLeavesNothing) {
  if (!rdma_devices().empty()) GTEST_SKIP() << "this machine has RDMA devices";
  TempDir root;
  NodeOptions options;
  options.name = "pe";
  options.store.root = root.path();
  options.staging.bytes = 1 << 20;
  options.listen = {"rdma://127.0.0.1:0"};
  try {
    Node node(small_geometry(), options);
    FAIL() << "listened without a device";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("use tcp://"), std::string::npos) << error.what();
  }
  options.listen = {"tcp://127.0.0.1:0"};
  Node node(small_geometry(), options);
  EXPECT_EQ(code_of([&] { node.connect("rdma://127.0.0.1:9"); }), Code::kUnsupported);
  EXPECT_TRUE(node.stats().links.empty());
}

TEST(RdmaOptionsTest, BadOnesAreRefusedByName) {
  TempDir root;
  NodeOptions good;
  good.name = "pe";
  good.store.root = root.path();
  good.staging.bytes = 1 << 20;
  const auto refused = [&](const char* what, const std::function<void(NodeOptions&)>& change) {
    NodeOptions options = good;
    change(options);
    try {
      Node node(small_geometry(), options);
      FAIL() << what;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
    }
  };
  refused("rdma.timeout", [](NodeOptions& o) { o.rdma.timeout = 0; });
  refused("rdma.gpu", [](NodeOptions& o) { o.rdma.gpu = -2; });
  refused("rdma.gpu", [](NodeOptions& o) {
    o.rdma.gpu = 0;
    o.rdma.devices = {"mlx5_0"};
  });
  refused("rdma.retries", [](NodeOptions& o) { o.rdma.retries = 8; });
  refused("rdma.stall_s", [](NodeOptions& o) { o.rdma.stall_s = 0; });
  refused("rdma.mtu", [](NodeOptions& o) { o.rdma.mtu = 9000; });
  refused("rdma.send_depth", [](NodeOptions& o) { o.rdma.send_depth = 0; });
  refused("receive_depth", [](NodeOptions& o) { o.rdma.receive_depth = 1; });
  refused("service_level", [](NodeOptions& o) { o.lanes[0].service_level = 16; });
}

}  // namespace
}  // namespace dualkv::testing
