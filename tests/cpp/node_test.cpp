// Loads over every transport: both paths, split, hand-over, back-pressure, failures.
#include <optional>

#include "rdma_support.h"

namespace dualkv::testing {
namespace {

struct Where {
  const char* transport;
  int device;           // of the caches
  bool direct = false;  // storage reads come to its memory, and so do peers' writes where the transport can
  std::string name() const { return std::string(direct ? "direct_" : device == kHostMemory ? "" : "gpu_") + transport; }
};

// What a GPU's kernel can sum up, or what is aligned to nothing.
KvGeometry geometry_for(const Where& where) {
  return where.direct ? KvGeometry({6400, 6912, 7424, 7936}, 16, "test/model") : small_geometry();
}

class NodeTest : public NodeTestBase, public ::testing::TestWithParam<Where> {
 protected:
  NodeTest() : NodeTestBase(GetParam().transport, geometry_for(GetParam()), GetParam().device) {}
  void SetUp() override {
    if (scheme_ == "rdma" && rdma_devices().empty()) GTEST_SKIP() << "no RDMA device; make rdma has some";
    if (!GetParam().direct) return;
    if (find_cufile() == nullptr) GTEST_SKIP() << "a real driver, which the stand-in can't serve";
    gpu_.gds_bytes = 64 << 16;
    if (scheme_ != "rdma") return;
    nics_.emplace(NicsReachTheStandIn::By::kDmaBuf);
    gpu_.rdma_bytes = 1 << 20;
  }
  std::optional<NicsReachTheStandIn> nics_;
};

TEST_P(NodeTest, PrefillPath) {
  start();
  PrefillOnly policy;
  run_whole(policy);
}

TEST_P(NodeTest, DecodePath) {
  start();
  DecodeOnly policy;
  run_whole(policy);
}

TEST_P(NodeTest, SplitPath) {
  start();
  Split policy;
  run_whole(policy);
}

TEST_P(NodeTest, WindowOfTwoLayers) {
  start();
  Split policy;
  run_whole(policy, 2);
  DecodeOnly decode;
  run_whole(decode, 1);
}

TEST_P(NodeTest, HitLargerThanThePoolStreamsThrough) {
  auto pe = options("pe");
  pe.staging.bytes = geometry_.file_bytes() * 3;
  start(pe, options("de"));
  PrefillOnly policy;
  run_whole(policy);
  run_whole(policy, 2);
}

TEST_P(NodeTest, PromptLargerThanDecodeStagingIsRefusedAtOnce) {
  auto de = options("de");
  de.staging.bytes = geometry_.file_bytes() * 8;
  start(options("pe"), de);
  Split policy;
  TestCache cache(geometry_, 64, device_);
  ASSERT_TRUE(eventually([&] { return pe_->peer("de").view().prompt_slots == 6; }));
  EXPECT_EQ(code_of([&] { pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 5}); }), Code::kNoSpace);
  expect_all_free();
}

TEST_P(NodeTest, ManyLoadsAtOnceShareThePools) {
  auto de = options("de");
  de.staging.bytes = geometry_.file_bytes() * 40;  // holds one prompt at a time: the others wait
  start(options("pe"), de);
  Split policy;
  std::vector<std::unique_ptr<TestCache>> caches;
  std::vector<Load> loads;
  std::vector<Incoming> incomings;
  for (int i = 0; i < 8; ++i) {
    caches.push_back(std::make_unique<TestCache>(geometry_, kBlocks, device_));
    loads.push_back(pe_->load({plan(policy), caches.back()->paged(), iota_ids(kBlocks), 20}));
    incomings.push_back(de_->incoming(loads.back().id(), 20));
  }
  // A prompt's staging is held until its decode starts, so each hand-over is taken as it comes.
  std::vector<std::thread> engines;
  for (std::size_t i = 0; i < loads.size(); ++i) {
    engines.emplace_back([&, i] {
      for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
        ASSERT_TRUE(loads[i].wait(layer, in(20)).ok()) << loads[i].milestones()->status().message;
        loads[i].publish(layer);
      }
      ASSERT_TRUE(loads[i].finish(in(20)).ok()) << loads[i].milestones()->status().message;
      ASSERT_TRUE(incomings[i].wait(in(20)).ok());
      incomings[i].close();
    });
  }
  for (auto& engine : engines) engine.join();
  for (const auto& cache : caches) {
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache->holds(i, i + 1));
  }
  expect_all_free();
}

TEST_P(NodeTest, HelperReadsForOthers) {
  start();
  Node helper(geometry_, options("helper"));
  pe_->connect(helper.addresses()[0]);
  PlanRequest request;
  request.keys = keys_;
  request.prefill = pe_->view();
  request.helpers = {pe_->peer("helper").view()};
  Split policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({policy.plan(request), cache.paged(), iota_ids(kBlocks), 10});
  ASSERT_TRUE(load.finish(in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1));
  EXPECT_GT(load.result().paths[1].bytes, 0u);
  expect_all_free();
}

TEST_P(NodeTest, CorruptBlockFailsTheLoadByNameAndIsForgotten) {
  start();
  corrupt(5, 100);
  Split policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  const Status status = load.finish(in(10));
  EXPECT_EQ(status.code, Code::kCorrupt) << status.message;
  EXPECT_NE(status.message.find(keys_[5].hex()), std::string::npos);
  EXPECT_EQ(load.failed_block(), 5);
  EXPECT_EQ(pe_->store().match(keys_), 5u);
  expect_all_free();
}

TEST_P(NodeTest, StorageErrorsOfOneSideAreTakenOverByTheOther) {
  auto de = options("de");
  de.store.faults = {7, 0.4, 0.2, 0.2, 0, 0, 0};
  start(options("pe"), de);
  DecodeOnly policy;
  run_whole(policy);
  auto pe = options("pe");
  pe_.reset();
  de_.reset();
  pe.store.faults = {8, 0.4, 0.2, 0.2, 0, 0, 0};
  start(pe, options("de"));
  PrefillOnly prefill;
  run_whole(prefill);
}

TEST_P(NodeTest, StorageThatNeverAnswersIsTakenOver) {
  auto pe = options("pe"), de = options("de");
  pe.stall_s = 0.3;
  de.store.faults.drop_rate = 1;
  start(pe, de);
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1));
  EXPECT_EQ(load.result().failovers, kBlocks);
}

TEST_P(NodeTest, StorageThatNeverAnswersAnywhereEndsAtTheDeadline) {
  auto faulty = options("pe");
  start();
  pe_.reset();
  faulty.store.faults.drop_rate = 1;
  pe_ = std::make_unique<Node>(geometry_, faulty);
  PlanRequest request;
  request.keys = keys_;
  request.prefill = pe_->view();
  PrefillOnly policy;
  TestCache cache(geometry_, kBlocks, device_);
  const auto began = Clock::now();
  Load load = pe_->load({policy.plan(request), cache.paged(), iota_ids(kBlocks), 0.2});
  EXPECT_EQ(load.finish(in(10)).code, Code::kTimeout);
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(5));
}

TEST_P(NodeTest, DecodeNodeDiesWhileItReads) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 20;
  start(options("pe"), de);
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  de_->close();
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
    if (load.milestones()->status().ok() && !load.milestones()->ended(geometry_.layers())) load.publish(layer);
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1));
  const Code code = load.finish(in(10)).code;
  EXPECT_TRUE(code == Code::kPeerLost || code == Code::kCancelled) << to_string(code);
  de_.reset();
  expect_all_free();
}

TEST_P(NodeTest, PrefillNodeDiesBeforeTheHandOver) {
  start();
  DecodeOnly policy;
  TestCache cache(geometry_, 64, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks + 1), 10});
  Incoming incoming = de_->incoming(load.id(), 10);
  ASSERT_TRUE(load.wait(0, in(10)).ok());
  pe_->close();
  const Code code = incoming.wait(in(10)).code;
  EXPECT_TRUE(code == Code::kPeerLost || code == Code::kCancelled) << to_string(code);
  pe_.reset();
  expect_all_free();
}

TEST_P(NodeTest, CancelFreesEverythingAndTouchesNothingAfterwards) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 50;
  start(options("pe"), de);
  Split policy;
  TestCache cache(geometry_, kBlocks, device_);
  for (int round = 0; round < 5; ++round) {
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
    Incoming incoming = de_->incoming(load.id(), 10);
    std::this_thread::sleep_for(std::chrono::milliseconds(round * 5));
    load.cancel();
    EXPECT_EQ(load.finish(in(1)).code, Code::kCancelled);
    for (std::uint32_t i = 0; i < kBlocks; ++i) cache.fill(i, 1000 + i);
    EXPECT_EQ(incoming.wait(in(5)).code, Code::kCancelled);
    incoming.close();
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    for (std::uint32_t i = 0; i < kBlocks; ++i) ASSERT_TRUE(cache.holds(i, 1000 + i)) << "written after cancel()";
  }
  expect_all_free();
}

TEST_P(NodeTest, UnclaimedHandOverEndsByItsDeadline) {
  start();
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 0.5});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    ASSERT_TRUE(load.wait(layer, in(10)).ok());
    load.publish(layer);
  }
  ASSERT_TRUE(load.finish(in(10)).ok());
  expect_all_free();
}

TEST_P(NodeTest, BadRequestsChangeNothing) {
  start();
  TestCache cache(geometry_, kBlocks, device_);
  Split policy;
  const auto refused = [&](LoadRequest request) { return code_of([&] { pe_->load(std::move(request)); }); };
  LoadRequest good{plan(policy), cache.paged(), iota_ids(kBlocks), 5};
  LoadRequest bad = good;
  bad.block_ids[3] = kBlocks;
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  bad = good;
  bad.block_ids[3] = bad.block_ids[4];
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  bad = good;
  bad.block_ids.pop_back();
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  bad = good;
  bad.plan.ranges[0].count += 1;
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  bad = good;
  bad.plan.ranges[1].node = "nobody";
  EXPECT_EQ(refused(bad), Code::kPeerLost);
  bad = good;
  bad.deadline_s = 0;
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  bad = good;
  bad.into = nullptr;
  EXPECT_EQ(refused(bad), Code::kInvalidArgument);
  EXPECT_EQ(pe_->stats().loads_done + pe_->stats().loads_failed, 0u);
  Load load = pe_->load(good);
  EXPECT_EQ(code_of([&] { load.wait(99); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { load.publish(99); }), Code::kInvalidArgument);
  load.cancel();
  expect_all_free();
}

// Chunked prefill: the engine allocates the prompt's last blocks only when it comes to them.
TEST_P(NodeTest, BlocksMayGetTheirPlaceLater) {
  start();
  TestCache cache(geometry_, 64, device_), decode_cache(geometry_, 64, device_);
  const std::uint32_t prompt = kBlocks + 2;
  for (std::uint32_t i = kBlocks; i < prompt; ++i) cache.fill(i + 10, i + 1);
  Split policy;
  LoadRequest request{plan(policy), cache.paged(), iota_ids(kBlocks), 10};
  request.prompt_blocks = prompt;
  request.load_id = 4711;
  Load load = pe_->load(request);
  EXPECT_EQ(load.id(), 4711u);
  EXPECT_EQ(code_of([&] { pe_->load(request); }), Code::kInvalidArgument) << "one id, two loads";
  Incoming incoming = de_->incoming(4711, 10);
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) ASSERT_TRUE(load.wait(layer, in(10)).ok());
  const auto refused = [&](std::vector<std::uint32_t> ids) { return code_of([&] { load.add_blocks(ids); }); };
  EXPECT_EQ(code_of([&] { load.publish(0); }), Code::kInvalidArgument) << "two blocks have no place yet";
  EXPECT_EQ(refused({64}), Code::kInvalidArgument);
  EXPECT_EQ(refused({3}), Code::kInvalidArgument) << "in use";
  EXPECT_EQ(refused({40, 41, 42}), Code::kInvalidArgument) << "one too many";
  load.add_blocks(std::vector<std::uint32_t>{kBlocks + 10});
  EXPECT_EQ(code_of([&] { load.publish(0); }), Code::kInvalidArgument) << "one block has no place yet";
  load.add_blocks(std::vector<std::uint32_t>{kBlocks + 11});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) load.publish(layer);
  ASSERT_TRUE(load.finish(in(10)).ok());
  ASSERT_TRUE(incoming.wait(in(10)).ok());
  const std::vector<std::uint32_t> some = {kBlocks + 1, 0, 2}, to = {5, 6, 7}, beyond = {prompt, 0, 1};
  EXPECT_EQ(code_of([&] { incoming.copy_to(*decode_cache.paged(), to, std::span(beyond)); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { incoming.copy_to(*decode_cache.paged(), to); }), Code::kInvalidArgument);
  incoming.copy_to(*decode_cache.paged(), to, std::span(some));
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(decode_cache.holds(to[i], some[i] + 1)) << i;
  for (std::uint32_t id : {4u, 8u}) EXPECT_FALSE(decode_cache.holds(id, kBlocks + 2));
  incoming.close();
  expect_all_free();
}

TEST_P(NodeTest, GrantAndSendLayers) {
  start();
  TestCache target(geometry_, 32, device_);
  Grant grant = de_->grant("pe", target.paged(), {9, 8, 7, 6}, 10);
  SendRequest send;
  send.grant = grant.id();
  send.source = source_.paged();
  send.block_ids = {0, 1, 2, 3};
  send.layers = {0, geometry_.layers()};
  send.lane = Lane::kHigh;
  const Operation sent = pe_->peer("de").send_layers(send);
  ASSERT_TRUE(sent.wait(in(10)).ok()) << sent.status().message;
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) EXPECT_TRUE(grant.wait(layer, in(10)).ok());
  for (std::uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(target.holds(9 - i, i + 1));
  EXPECT_GT(pe_->stats().links[0].bytes_sent[1], 0u);
}

TEST_P(NodeTest, WritesOutsideAGrantAreRefusedAndLandNowhere) {
  start();
  TestCache target(geometry_, 4, device_);
  for (std::uint32_t i = 0; i < 4; ++i) target.fill(i, 50 + i);
  Grant grant = de_->grant("pe", target.paged(), {0, 1}, 10);
  SendRequest send;
  send.source = source_.paged();
  send.block_ids = {0};
  send.layers = {0, 1};
  send.grant = grant.id() + 1;
  EXPECT_EQ(pe_->peer("de").send_layers(send).wait(in(10)).code, Code::kRefused);
  send.grant = grant.id();
  send.first_block = 2;  // beyond the grant: discarded
  EXPECT_TRUE(pe_->peer("de").send_layers(send).wait(in(10)).ok());
  grant.revoke();
  send.first_block = 0;
  EXPECT_EQ(pe_->peer("de").send_layers(send).wait(in(10)).code, Code::kRefused);
  for (std::uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(target.holds(i, 50 + i));
}

TEST_P(NodeTest, WrongSecretAndWrongGeometryAreRefused) {
  auto secret = options("de");
  secret.secret = "one";
  de_ = std::make_unique<Node>(geometry_, secret);
  auto other = options("pe");
  other.secret = "two";
  pe_ = std::make_unique<Node>(geometry_, other);
  EXPECT_EQ(code_of([&] { pe_->connect(de_->addresses()[0]); }), Code::kRefused);
  auto third = options("x");
  third.secret = "one";
  third.store.root = root_.path() + "/other";
  Node stranger(small_geometry(5), third);
  EXPECT_EQ(code_of([&] { stranger.connect(de_->addresses()[0]); }), Code::kRefused);
  EXPECT_TRUE(de_->stats().links.empty());
}

TEST_P(NodeTest, ALostPeerIsFoundAgain) {
  start();
  auto de = options("de");
  if (scheme_ == "tcp" || scheme_ == "rdma") de.listen = {de_->addresses()[0]};
  de_.reset();
  ASSERT_TRUE(eventually([&] { return !pe_->peer("de").connected(); }));
  de_ = std::make_unique<Node>(geometry_, de);
  ASSERT_TRUE(eventually([&] { return pe_->peer("de").connected(); }));
  Split policy;
  run_whole(policy);
}

TEST_P(NodeTest, CloseWithLoadsInProgress) {
  auto slow = options("pe");
  slow.store.read_limit_bytes_per_s = geometry_.block_bytes() * 4;
  start(slow, options("de"));
  Split policy;
  TestCache cache(geometry_, kBlocks, device_);
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  pe_->close();
  EXPECT_EQ(load.finish(in(1)).code, Code::kCancelled);
  EXPECT_EQ(code_of([&] { pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10}); }), Code::kPeerLost);
}

INSTANTIATE_TEST_SUITE_P(Transports, NodeTest,
                         ::testing::Values(Where{"loopback", kHostMemory}, Where{"tcp", kHostMemory},
                                           Where{"shm", kHostMemory}, Where{"rdma", kHostMemory}, Where{"loopback", 0},
                                           Where{"tcp", 0}, Where{"shm", 0}, Where{"tcp", 0, true},
                                           Where{"shm", 0, true}, Where{"rdma", 0, true}),
                         [](const auto& info) { return info.param.name(); });

}  // namespace
}  // namespace dualkv::testing
