// Reads from storage straight into a GPU's memory: what is right, what goes wrong on the way, what is never touched. On
// stand-ins of cuFile and of CUDA's driver.
#include "memory/gpu_staging.h"
#include "node_support.h"

namespace dualkv::testing {
namespace {

class GdsTest : public NodeTestBase, public ::testing::Test {
 protected:
  GdsTest() : NodeTestBase("tcp", KvGeometry({6400, 6912, 7424, 320}, 16, "test/model"), 0) {}

  void SetUp() override {
    library_ = find_cufile();
    if (library_ == nullptr) GTEST_SKIP() << "a real driver: its GPU's memory can't be written by a stand-in of cuFile";
    if (const std::string why = CudaDevice::open(0)->missing(GpuCopy::kKernel); !why.empty()) GTEST_SKIP() << why;
    baseline_ = registered();
  }
  void TearDown() override {
    if (library_ == nullptr) return;
    release();
    pe_.reset();
    de_.reset();
    EXPECT_EQ(registered(), baseline_) << "files or memory stay registered";
  }

  NodeOptions gds(std::uint32_t slots = 128) {
    NodeOptions pe = options("pe");
    pe.gpu.gds_bytes = slots * (std::uint64_t{64} << 10);
    return pe;
  }
  template <typename Call>
  Call call(const char* name) const {
    return reinterpret_cast<Call>(dlsym(library_, name));
  }
  int registered() const { return call<int (*)()>("stand_in_registered")(); }
  int hanging() const { return call<int (*)()>("stand_in_hanging")(); }
  void hang(int reads) const { call<void (*)(int)>("stand_in_hang")(reads); }
  void fail(int reads) const { call<void (*)(int)>("stand_in_fail_reads")(reads); }
  void spoil(int reads) const { call<void (*)(int)>("stand_in_corrupt")(reads); }
  void release() const { call<void (*)()>("stand_in_release")(); }

  GpuStats gpu() const { return pe_->stats().gpus.at(0); }
  std::uint64_t fallbacks(const std::string& name) const { return pe_->stats().fallbacks[name]; }
  std::uint64_t hit_bytes() const { return kBlocks * geometry_.block_bytes(); }

  // Ends when the last layer is ready, or the load has failed.
  Status load_into(const TestCache& cache, PathPolicy& policy, std::uint32_t layers_per_read = 0) {
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10, 0, layers_per_read});
    Status status;
    for (std::uint32_t layer = 0; layer < geometry_.layers() && status.ok(); ++layer) status = load.wait(layer, in(10));
    if (status.ok()) load.cancel();
    return status;
  }
  void expect_right(const TestCache& cache) const {
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  }

  void* library_ = nullptr;
  int baseline_ = 0;
  PrefillOnly prefill_;
};

TEST_F(GdsTest, AllOfAHitComesThatWayAndIsRight) {
  start(gds(), options("de"));
  for (const std::uint32_t layers_per_read : {0, 1, 2}) {
    const TestCache cache(geometry_, kBlocks, 0);
    const std::uint64_t before = pe_->stats().gpus.empty() ? 0 : gpu().gds_bytes;
    const Status status = load_into(cache, prefill_, layers_per_read);
    ASSERT_TRUE(status.ok()) << status.message;
    expect_right(cache);
    EXPECT_EQ(gpu().gds_bytes - before, hit_bytes());
  }
  EXPECT_EQ(gpu().to_gpu.bytes, 0u) << "something went by the staging";
  EXPECT_EQ(gpu().within.bytes, 3 * hit_bytes());
  EXPECT_EQ(gpu().gds_slots_bytes, 128u << 16);
  EXPECT_EQ(fallbacks("gds_read_failed") + fallbacks("no_gds") + fallbacks("gds_compatibility"), 0u);
  expect_all_free();
}

TEST_F(GdsTest, SlotsOfAnySizeAreRegistered) {
  const KvGeometry geometry({65536, 65536}, 16, "test/model");
  const int before = registered();
  {
    const GpuStaging staging(CudaDevice::open(0), geometry, 10 * (std::uint64_t{192} << 10));
    EXPECT_EQ(registered() - before, 10) << "they don't fill the memory, and none reaches out of it";
  }
  EXPECT_EQ(registered(), before);
}

TEST_F(GdsTest, BothPathsOfALoadMeetInTheCache) {
  start(gds(), options("de"));
  Split split;
  DecodeOnly decode;
  RoundRobin whole;
  for (PathPolicy* policy :
       {static_cast<PathPolicy*>(&split), static_cast<PathPolicy*>(&decode), static_cast<PathPolicy*>(&whole)}) {
    run_whole(*policy);
    run_whole(*policy, 2, 1);
  }
}

TEST_F(GdsTest, WithAllSlotsOutReadsComeToTheStaging) {
  start(gds(/*slots=*/1), options("de"));
  const TestCache cache(geometry_, kBlocks, 0);
  ASSERT_TRUE(load_into(cache, prefill_).ok());
  expect_right(cache);
  EXPECT_GT(gpu().gds_bytes, 0u);
  EXPECT_EQ(gpu().gds_bytes + gpu().to_gpu.bytes, hit_bytes());
}

TEST_F(GdsTest, WhatCameWrongIsReadAgainByTheStaging) {
  start(gds(), options("de"));
  for (const std::uint32_t layers_per_read : {0, 1}) {
    const TestCache cache(geometry_, kBlocks, 0);
    spoil(3);
    const Status status = load_into(cache, prefill_, layers_per_read);
    ASSERT_TRUE(status.ok()) << status.message;
    expect_right(cache);
  }
  EXPECT_EQ(fallbacks("gds_read_failed"), 6u);
  EXPECT_EQ(pe_->store().match(keys_), kBlocks) << "what is stored was right";
}

TEST_F(GdsTest, ReadsThatFailAreReadAgainByTheStaging) {
  start(gds(), options("de"));
  const TestCache cache(geometry_, kBlocks, 0);
  fail(kBlocks);
  ASSERT_TRUE(load_into(cache, prefill_).ok());
  expect_right(cache);
  EXPECT_EQ(fallbacks("gds_read_failed"), kBlocks);
  EXPECT_EQ(gpu().to_gpu.bytes, hit_bytes());
  EXPECT_EQ(pe_->store().match(keys_), kBlocks);
}

TEST_F(GdsTest, ABlockThatIsStoredWrongFailsTheLoadAndIsMovedAside) {
  start(gds(), options("de"));
  corrupt(5, geometry_.layer_offset(2) + 7);
  const TestCache cache(geometry_, kBlocks, 0);
  Load load = pe_->load({plan(prefill_), cache.paged(), iota_ids(kBlocks), 10});
  const Status status = load.finish(in(10));
  EXPECT_EQ(status.code, Code::kCorrupt);
  EXPECT_NE(status.message.find(keys_[5].hex()), std::string::npos) << status.message;
  EXPECT_EQ(load.failed_block(), 5);
  EXPECT_FALSE(load.wait(2, in(0)).ok());
  EXPECT_FALSE(cache.layer_is(2, 5, 6));
  EXPECT_EQ(pe_->store().match(keys_), 5u);
  expect_all_free();
}

TEST_F(GdsTest, FaultsInjectedIntoReadsAreFoundThereToo) {
  NodeOptions pe = gds();
  start(pe, options("de"));
  pe_.reset();
  pe.store.faults = {.seed = 3, .corrupt_rate = 1};
  pe_ = std::make_unique<Node>(geometry_, pe);
  pe_->connect(de_->addresses()[0]);
  // A layer of every read of this node is wrong, also of the second: the decode node's are right.
  const TestCache cache(geometry_, kBlocks, 0);
  const Status status = load_into(cache, prefill_);
  ASSERT_TRUE(status.ok()) << status.message;
  expect_right(cache);
  EXPECT_EQ(fallbacks("gds_read_failed"), kBlocks);
  EXPECT_LT(gpu().within.bytes, hit_bytes()) << "what was wrong came to the cache";
}

TEST_F(GdsTest, AReadThatHangsIsTakenOverAndWritesNothingLater) {
  start(gds(), options("de"));
  const TestCache cache(geometry_, kBlocks, 0);
  hang(1);
  const Status status = load_into(cache, prefill_);
  ASSERT_TRUE(status.ok()) << status.message;
  expect_right(cache);
  EXPECT_EQ(hanging(), 1);
  // The cache is the engine's again.
  const TestCache next(geometry_, kBlocks, 0);
  release();
  EXPECT_TRUE(eventually([&] { return pe_->stats().store.read_queue_bytes == 0; }));
  expect_right(cache);
  expect_all_free();
}

TEST_F(GdsTest, CancelReturnsWhileReadsHangAndTheCacheStaysUntouched) {
  NodeOptions pe = gds();
  pe.stall_s = 60;
  start(pe, options("de"));
  const TestCache cache(geometry_, kBlocks, 0);
  hang(kBlocks);
  Load load = pe_->load({plan(prefill_), cache.paged(), iota_ids(kBlocks), 30});
  EXPECT_TRUE(eventually([&] { return hanging() > 0; }));
  const auto began = Clock::now();
  load.cancel();
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(1));
  release();
  EXPECT_TRUE(eventually([&] { return pe_->stats().store.read_queue_bytes == 0; }));
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_FALSE(cache.holds(i, i + 1)) << i;
  EXPECT_EQ(gpu().within.bytes, 0u);
  expect_all_free();
}

TEST_F(GdsTest, IsRefusedOrLeftOutWhereItCantBe) {
  start(gds(), options("de"));
  pe_.reset();
  const TestCache cache(geometry_, kBlocks, 0);
  NodeOptions small = gds();
  small.gpu.gds_bytes = 1000;
  {
    Node node(geometry_, small);
    EXPECT_EQ(code_of([&] { node.prepare(*cache.paged()); }), Code::kInvalidArgument);
  }
  // Layer Blocks that the kernel can't sum up.
  const KvGeometry odd = small_geometry();
  const TestCache other(odd, kBlocks, 0);
  const TempDir root;
  NodeOptions pe = gds();
  pe.store.root = root.path();
  {
    Node node(odd, pe);
    node.prepare(*other.paged());
    EXPECT_EQ(node.stats().fallbacks["no_gds"], 1u);
    EXPECT_EQ(node.stats().gpus.at(0).gds_slots_bytes, 0u);
  }
  pe.store.fail_on_fallback = true;
  pe.staging.lock_memory = pe.staging.huge_pages = false;
  pe.store.direct = "off";
  pe.store.backend = "pread";
  Node node(odd, pe);
  EXPECT_EQ(code_of([&] { node.prepare(*other.paged()); }), Code::kUnsupported);
}

}  // namespace
}  // namespace dualkv::testing
