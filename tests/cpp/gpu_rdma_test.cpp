// RDMA straight into a GPU's memory and out of it: what peers write lands in its slots, is verified there, and goes on;
// what they are sent leaves from others; what goes wrong on the way. On the stand-in of CUDA's driver; but for the
// last, needs an RDMA device (make rdma).
#include <atomic>
#include <memory>
#include <set>
#include <thread>

#include "gpu_support.h"
#include "rdma_support.h"

namespace dualkv::testing {
namespace {

using By = NicsReachTheStandIn::By;

// `device`: of the caches. NICs' writes to the second must be flushed.
class GpuRdmaTestBase : public NodeTestBase, public ::testing::Test {
 protected:
  explicit GpuRdmaTestBase(int device = 0)
      : NodeTestBase("rdma", KvGeometry({6400, 6912, 7424, 320}, 16, "test/model"), device) {}

  void SetUp() override {
    if (rdma_devices().empty()) GTEST_SKIP() << "no RDMA device; make rdma has some";
    if (find_cufile() == nullptr) GTEST_SKIP() << "a real driver, whose memory the stand-in for NICs does not reach";
    if (const std::string why = CudaDevice::open(0)->missing(GpuCopy::kKernel); !why.empty()) GTEST_SKIP() << why;
    reach(By::kDmaBuf);
  }
  void TearDown() override {
    pe_.reset();
    de_.reset();
  }
  void reach(By by) {
    nics_.reset();
    nics_ = std::make_unique<NicsReachTheStandIn>(by);
  }

  NodeOptions direct(std::uint32_t slots = kBlocks * 4) {
    NodeOptions pe = options("pe");
    pe.gpu.rdma_bytes = 2 * slots * std::uint64_t{7424};
    pe.gpu.bounce_bytes = 4 << 20;  // little enough to be registered at once
    return pe;
  }
  // Writes that began before all queue pairs are up go inline.
  void start_all(NodeOptions pe) {
    start(std::move(pe), options("de"));
    TestCache any(geometry_, 1, device_);
    pe_->prepare(*any.paged());
    ASSERT_TRUE(eventually([&] {
      const LinkStats pe_link = pe_->stats().links.at(0), de_link = de_->stats().links.at(0);
      return pe_link.rdma.queue_pairs_up == 4 && de_link.rdma.queue_pairs_up == 4;
    }));
  }

  GpuStats gpu() const { return pe_->stats().gpus.at(0); }
  std::uint64_t hit_bytes() const { return kBlocks * geometry_.block_bytes(); }
  std::uint64_t by_rdma() const { return de_->stats().links.at(0).rdma.bytes_written[0]; }
  std::uint64_t fallbacks(const std::string& name) const { return pe_->stats().fallbacks[name]; }
  int flushes() const { return driver_call<int (*)()>("stand_in_flushes")(); }

  // All of a hit is read by the decode node and written here.
  Status load_into(const TestCache& cache) {
    Load load = pe_->load({plan(decode_), cache.paged(), iota_ids(kBlocks), 10});
    Status status;
    for (std::uint32_t layer = 0; layer < geometry_.layers() && status.ok(); ++layer) status = load.wait(layer, in(10));
    failovers_ = load.result().failovers;
    if (status.ok()) load.cancel();
    return status;
  }
  void expect_right(const TestCache& cache) const {
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  }

  DecodeOnly decode_;
  std::unique_ptr<NicsReachTheStandIn> nics_;
  std::uint32_t failovers_ = 0;
};

class GpuRdmaTest : public GpuRdmaTestBase {};

TEST_F(GpuRdmaTest, AllThatPeersWriteComesThatWayAndIsRight) {
  for (const By by : {By::kDmaBuf, By::kPeerMemory}) {
    reach(by);
    start_all(direct());
    EXPECT_EQ(gpu().rdma_by_dma_buf, by == By::kDmaBuf);
    EXPECT_GE(gpu().rdma_slots_bytes, 2 * kBlocks * 4 * 7424u);
    const int before = flushes();
    for (int round = 1; round <= 2; ++round) {  // the slots come back
      const TestCache cache(geometry_, kBlocks, device_);
      const Status status = load_into(cache);
      ASSERT_TRUE(status.ok()) << status.message;
      expect_right(cache);
      EXPECT_EQ(gpu().rdma_bytes, round * hit_bytes());
      EXPECT_EQ(gpu().within.bytes, round * hit_bytes());
    }
    EXPECT_EQ(by_rdma(), 2 * hit_bytes());
    EXPECT_EQ(gpu().to_gpu.bytes, 0u) << "something went by pinned memory";
    EXPECT_EQ(gpu().within.verified, 2 * kBlocks * geometry_.layers());
    EXPECT_EQ(fallbacks("no_gpu_rdma"), 0u);
    EXPECT_EQ(flushes(), before) << "this GPU sees NICs' writes by itself";
    expect_all_free();
    pe_.reset();
    de_.reset();
  }
}

TEST_F(GpuRdmaTest, WithNoSlotLeftItComesToPinnedMemory) {
  start_all(direct(3));
  const TestCache cache(geometry_, kBlocks, device_);
  const Status status = load_into(cache);
  ASSERT_TRUE(status.ok()) << status.message;
  expect_right(cache);
  EXPECT_GT(gpu().rdma_bytes, 0u);
  EXPECT_GT(gpu().to_gpu.bytes, 0u);
  EXPECT_EQ(gpu().rdma_bytes + gpu().to_gpu.bytes, hit_bytes());
  EXPECT_EQ(by_rdma(), hit_bytes());
}

TEST_F(GpuRdmaTest, WhatIsWrongNeverIsInTheCache) {
  NodeOptions pe = direct();
  pe.gpu.verify = true;
  start_all(pe);
  const TestCache cache(geometry_, kBlocks, device_);
  std::atomic<int> spoilt{0};
  {
    // What the NIC reads is not what was summed up.
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      if (!carries_data(wr) || spoilt.fetch_add(1) > 0) return 0;
      auto* byte = reinterpret_cast<std::uint8_t*>(wr->sg_list[0].addr);
      *byte = static_cast<std::uint8_t>(*byte ^ 1);
      return 0;
    });
    const Status status = load_into(cache);
    ASSERT_TRUE(status.ok()) << status.message;
  }
  EXPECT_GE(spoilt, 1);
  EXPECT_GE(failovers_, 1u);
  expect_right(cache);
  EXPECT_LT(gpu().rdma_bytes, hit_bytes());
  EXPECT_GT(gpu().to_gpu.bytes, 0u) << "this node read the block itself";
  expect_all_free();
}

TEST_F(GpuRdmaTest, WhatAFailedQueuePairHadComesInline) {
  start_all(direct());
  for (int round = 0; round < 2; ++round) {
    const TestCache cache(geometry_, kBlocks, device_);
    {
      std::atomic<int> posts{0};
      const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) { return carries_data(wr) && posts++ > 0 ? ENOMEM : 0; });
      const Status status = load_into(cache);
      ASSERT_TRUE(status.ok()) << status.message;
    }
    expect_right(cache);
    EXPECT_GT(gpu().to_gpu.bytes, 0u);
    const TestCache after(geometry_, kBlocks, device_);
    ASSERT_TRUE(eventually([&] { return de_->stats().links.at(0).rdma.queue_pairs_up == 4; }));
    const std::uint64_t before = gpu().rdma_bytes;
    ASSERT_TRUE(load_into(after).ok());
    expect_right(after);
    EXPECT_EQ(gpu().rdma_bytes - before, hit_bytes()) << "slots are missing";
  }
  expect_all_free();
}

TEST_F(GpuRdmaTest, AGrantIsFilledThatWay) {
  start_all(direct());
  for (const bool spoil : {false, true}) {
    const TestCache cache(geometry_, kBlocks, device_), host(geometry_, kBlocks);
    TestCache from(geometry_, kBlocks);
    for (std::uint32_t i = 0; i < kBlocks; ++i) from.fill(i, i + 1);
    const Grant grant = pe_->grant("de", cache.paged(), iota_ids(kBlocks), 10);
    SendRequest request;
    request.grant = grant.id();
    request.source = from.paged();
    request.block_ids = iota_ids(kBlocks);
    request.layers = {0, geometry_.layers()};
    request.deadline_s = 10;
    std::atomic<int> posts{0};
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      if (!spoil || !carries_data(wr) || posts.fetch_add(1) > 0) return 0;
      auto* byte = reinterpret_cast<std::uint8_t*>(wr->sg_list[0].addr);
      *byte = static_cast<std::uint8_t>(*byte ^ 1);
      return 0;
    });
    const std::uint64_t before = gpu().rdma_bytes;
    const auto sent = de_->peer("pe").send_layers(request);
    const Status status = grant.wait(geometry_.layers() - 1, in(10));
    if (spoil) {
      EXPECT_EQ(status.code, Code::kCorrupt) << status.message;
      EXPECT_LT(gpu().rdma_bytes - before, hit_bytes());
      continue;
    }
    ASSERT_TRUE(status.ok()) << status.message;
    expect_right(cache);
    EXPECT_EQ(gpu().rdma_bytes - before, hit_bytes());
    EXPECT_TRUE(sent.wait(in(1)).ok());
  }
}

// From a GPU's cache to one of the host, by pe_'s NIC, in a window of a few writes.
class GpuRdmaSendTest : public GpuRdmaTestBase {
 protected:
  void SetUp() override {
    GpuRdmaTestBase::SetUp();
    if (IsSkipped()) return;
    from_.emplace(geometry_, kBlocks, device_);
    for (std::uint32_t i = 0; i < kBlocks; ++i) from_->fill(i, i + 1);
  }
  NodeOptions narrow(std::uint32_t slots = kBlocks * 4) {
    NodeOptions pe = direct(slots);
    pe.write_frame_bytes = 16 << 10;
    pe.write_window_bytes = 64 << 10;
    return pe;
  }
  SendRequest request(const Grant& grant) const {
    SendRequest request;
    request.grant = grant.id();
    request.source = from_->paged();
    request.block_ids = iota_ids(kBlocks);
    request.layers = {0, geometry_.layers()};
    request.deadline_s = 10;
    return request;
  }
  // All of it, to memory that the peer's NIC has not seen.
  Status send(std::optional<TestCache>& to) {
    to.emplace(geometry_, kBlocks);
    const Grant grant = de_->grant("pe", to->paged(), iota_ids(kBlocks), 10);
    const auto sent = pe_->peer("de").send_layers(request(grant));
    if (const Status status = grant.wait(geometry_.layers() - 1, in(10)); !status.ok()) return status;
    return sent.wait(in(10));
  }
  std::uint64_t left() const { return gpu().rdma_sent_bytes; }

  std::optional<TestCache> from_;
};

TEST_F(GpuRdmaSendTest, AllThatPeersAreSentLeavesThatWayAndIsRight) {
  for (const By by : {By::kDmaBuf, By::kPeerMemory}) {
    reach(by);
    start_all(narrow());
    for (int round = 1; round <= 2; ++round) {  // the slots come back
      std::optional<TestCache> to;
      const Status status = send(to);
      ASSERT_TRUE(status.ok()) << status.message;
      expect_right(*to);
      EXPECT_EQ(left(), round * hit_bytes());
    }
    EXPECT_EQ(gpu().from_gpu.bytes, 0u) << "something went by pinned memory";
    EXPECT_EQ(fallbacks("gpu_rdma_returned"), 0u);
    expect_all_free();
    pe_.reset();
    de_.reset();
  }
}

TEST_F(GpuRdmaSendTest, WhatAnEnginePublishesLeavesThatWay) {
  start_all(narrow());
  run_whole(decode_);
  EXPECT_EQ(gpu().from_gpu.bytes, 0u);
  EXPECT_EQ(left(), 2 * geometry_.block_bytes()) << "what is new; the decode node read the rest itself";
  EXPECT_EQ(de_->stats().links.at(0).writes_corrupt, 0u);
  PrefillOnly prefill;
  run_whole(prefill);
  EXPECT_EQ(left(), (2 + kBlocks + 2) * geometry_.block_bytes());
  EXPECT_EQ(gpu().from_gpu.bytes, 0u);
}

TEST_F(GpuRdmaSendTest, WithNoSlotLeftItGoesByPinnedMemory) {
  start_all(narrow(3));
  std::optional<TestCache> to;
  const Status status = send(to);
  ASSERT_TRUE(status.ok()) << status.message;
  expect_right(*to);
  EXPECT_GT(left(), 0u);
  EXPECT_GT(gpu().from_gpu.bytes, 0u);
  EXPECT_EQ(left() + gpu().from_gpu.bytes, hit_bytes());
}

TEST_F(GpuRdmaSendTest, WhatAFailedQueuePairHadGoesByPinnedMemory) {
  start_all(narrow());
  for (std::uint64_t round = 1; round <= 2; ++round) {
    std::optional<TestCache> to;
    {
      std::atomic<int> posts{0};
      const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) { return carries_data(wr) && posts++ > 0 ? ENOMEM : 0; });
      const Status status = send(to);
      ASSERT_TRUE(status.ok()) << status.message;
    }
    expect_right(*to);
    EXPECT_GE(fallbacks("gpu_rdma_returned"), round);
    EXPECT_GT(gpu().from_gpu.bytes, 0u);
    ASSERT_TRUE(eventually([&] { return pe_->stats().links.at(0).rdma.queue_pairs_up == 4; }));
    // Each send finds out by itself.
    const std::uint64_t before = left();
    ASSERT_TRUE(send(to).ok());
    expect_right(*to);
    EXPECT_EQ(left() - before, hit_bytes()) << "slots are missing";
  }
  expect_all_free();
}

TEST_F(GpuRdmaSendTest, WhatIsWrongOnTheWayIsFoundByThePeer) {
  start_all(narrow());
  std::atomic<int> posts{0};
  std::optional<TestCache> to;
  {
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      // The wrong bytes of its slots.
      if (carries_data(wr) && posts++ == 0) wr->sg_list[0].addr += 64;
      return 0;
    });
    EXPECT_EQ(send(to).code, Code::kCorrupt);
  }
  EXPECT_EQ(de_->stats().links.at(0).writes_corrupt, 1u);
  EXPECT_LT(left(), hit_bytes());
  ASSERT_TRUE(send(to).ok());
  expect_right(*to);
  expect_all_free();
}

TEST_F(GpuRdmaSendTest, APeerWithoutRegisteredMemoryGetsItAllTheSame) {
  start_all(narrow());
  // The peer clears nothing: every write is refused.
  std::optional<TestCache> to;
  auto* real = verbs()->reg_mr_iova2;
  verbs()->reg_mr_iova2 = [](ibv_pd*, void*, std::size_t, std::uint64_t, unsigned) -> ibv_mr* {
    errno = ENOMEM;
    return nullptr;
  };
  const Status status = send(to);
  verbs()->reg_mr_iova2 = real;
  ASSERT_TRUE(status.ok()) << status.message;
  expect_right(*to);
  EXPECT_EQ(left(), 0u);
  EXPECT_EQ(gpu().from_gpu.bytes, hit_bytes());
  EXPECT_GE(fallbacks("gpu_rdma_returned"), 1u);
}

// Its end takes the queue pair down, with the writes of another on it.
TEST_F(GpuRdmaSendTest, OneThatIsDroppedCostsAnotherNothing) {
  NodeOptions pe = narrow();
  pe.rdma.stall_s = 0.3;
  start_all(pe);
  for (int round = 0; round < 3; ++round) {
    const TestCache first(geometry_, kBlocks), second(geometry_, kBlocks);
    const Grant of_first = de_->grant("pe", first.paged(), iota_ids(kBlocks), 10);
    const Grant of_second = de_->grant("pe", second.paged(), iota_ids(kBlocks), 10);
    std::optional<Operation> kept;
    {
      // The NIC has them, and does nothing.
      std::atomic<int> posts{0};
      const PostHook hook(
          [&](ibv_qp*, ibv_send_wr* wr) { return carries_data(wr) && ++posts ? PostHook::kSwallow : 0; });
      const std::uint64_t before = pe_->stats().links.at(0).rdma.fences;
      std::optional<Operation> dropped(pe_->peer("de").send_layers(request(of_first)));
      kept.emplace(pe_->peer("de").send_layers(request(of_second)));
      ASSERT_TRUE(eventually([&] { return posts >= 3; }));
      dropped.reset();
      EXPECT_GT(pe_->stats().links.at(0).rdma.fences, before);
    }
    const Status status = kept->wait(in(10));
    ASSERT_TRUE(status.ok()) << round << ": " << status.message;
    EXPECT_TRUE(of_second.wait(geometry_.layers() - 1, in(10)).ok());
    expect_right(second);
    ASSERT_TRUE(eventually([&] { return pe_->stats().links.at(0).rdma.queue_pairs_up == 4; }));
  }
  std::optional<TestCache> to;
  const std::uint64_t before = left();
  ASSERT_TRUE(send(to).ok());
  EXPECT_EQ(left() - before, hit_bytes()) << "slots are missing";
}

TEST_F(GpuRdmaSendTest, APublishOverAFailingQueuePairIsExact) {
  start_all(narrow());
  std::atomic<int> posts{0};
  const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) { return carries_data(wr) && ++posts % 5 == 0 ? ENOMEM : 0; });
  PrefillOnly prefill;
  run_whole(prefill);
  EXPECT_GE(fallbacks("gpu_rdma_returned"), 1u);
}

// Copies within a node to a GPU and back, by its NIC.
class GpuRdmaCopyTest : public GpuRdmaTestBase {
 protected:
  void SetUp() override {
    GpuRdmaTestBase::SetUp();
    if (IsSkipped()) return;
    for (std::uint32_t i = 0; i < kBlocks; ++i) host_.fill(i, i + 1);
  }
  // Until the NIC copies.
  void start_copying(NodeOptions pe) {
    pe.copy = CopyEngine::kNic;
    pe.rdma.stall_s = 0.3;
    start_all(pe);
    TestCache to(geometry_, kBlocks, device_);
    ASSERT_TRUE(eventually([&] {
      EXPECT_TRUE(copy(host_, to).ok());
      return gpu().to_gpu_by_nic > 0;
    }));
  }
  Status copy(const TestCache& from, const TestCache& to) {
    return pe_->copy({from.paged(), iota_ids(kBlocks), to.paged(), iota_ids(kBlocks), {0, geometry_.layers()}})
        .wait(in(10));
  }

  TestCache host_{geometry_, kBlocks};
};

TEST_F(GpuRdmaCopyTest, EveryByteThereAndBack) {
  start_copying(direct());
  const GpuStats before = gpu();
  const TestCache there(geometry_, kBlocks, device_), back(geometry_, kBlocks);
  ASSERT_TRUE(copy(host_, there).ok());
  expect_right(there);
  ASSERT_TRUE(copy(there, back).ok());
  expect_right(back);
  EXPECT_EQ(gpu().to_gpu_by_nic - before.to_gpu_by_nic, hit_bytes());
  EXPECT_EQ(gpu().from_gpu_by_nic, hit_bytes());
  EXPECT_EQ(gpu().to_gpu.bytes, before.to_gpu.bytes);
  EXPECT_EQ(gpu().from_gpu.bytes, 0u);
}

TEST_F(GpuRdmaCopyTest, LoadsAreExact) {
  NodeOptions pe = direct();
  pe.gpu.verify = true;
  start_copying(pe);
  const GpuStats before = gpu();
  PrefillOnly prefill;
  run_whole(prefill);
  run_whole(prefill, 2);
  Split split;
  run_whole(split);
  EXPECT_GE(gpu().to_gpu_by_nic - before.to_gpu_by_nic, 2 * hit_bytes());
  EXPECT_EQ(gpu().to_gpu.bytes, before.to_gpu.bytes);
  // In slots; in the cache again but for the last layer, whose planes are not of whole 64 bytes.
  EXPECT_GE(gpu().within.verified - before.within.verified, 3 * kBlocks * (geometry_.layers() - 1));
}

TEST_F(GpuRdmaCopyTest, WhatTheNicGetsWrongTheGpuCopies) {
  start_copying(direct());
  const std::uint64_t before = fallbacks("copy_by_gpu");
  std::atomic<int> posts{0};
  {
    // The wrong bytes of the staging.
    const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
      if (carries_data(wr) && posts++ == 0) wr->sg_list[0].addr += 64;
      return 0;
    });
    PrefillOnly prefill;
    run_whole(prefill);
  }
  EXPECT_GE(posts, 1);
  EXPECT_GT(fallbacks("copy_by_gpu"), before);
}

TEST_F(GpuRdmaCopyTest, WhatTheNicDoesNotTakeTheGpuCopies) {
  start_copying(direct());
  for (int round = 0; round < 2; ++round) {
    const std::uint64_t before = fallbacks("copy_by_gpu");
    const TestCache there(geometry_, kBlocks, device_), back(geometry_, kBlocks);
    {
      std::atomic<int> posts{0};
      const PostHook hook([&](ibv_qp*, ibv_send_wr* wr) {
        if (!carries_data(wr)) return 0;
        return posts++ > 0 ? ENOMEM : PostHook::kSwallow;
      });
      ASSERT_TRUE(copy(host_, there).ok());
      ASSERT_TRUE(copy(there, back).ok());
    }
    expect_right(there);
    expect_right(back);
    EXPECT_GT(fallbacks("copy_by_gpu"), before);
    const std::uint64_t by_nic = gpu().to_gpu_by_nic;
    ASSERT_TRUE(eventually([&] {
      EXPECT_TRUE(copy(host_, there).ok());
      return gpu().to_gpu_by_nic > by_nic;
    }));
  }
}

TEST_F(GpuRdmaCopyTest, WithNoSlotLeftTheGpuCopies) {
  start_copying(direct(3));
  const GpuStats before = gpu();
  const TestCache there(geometry_, kBlocks, device_), back(geometry_, kBlocks);
  ASSERT_TRUE(copy(host_, there).ok());
  ASSERT_TRUE(copy(there, back).ok());
  expect_right(there);
  expect_right(back);
  const auto by_nic = gpu().to_gpu_by_nic - before.to_gpu_by_nic;
  EXPECT_GT(by_nic, 0u);
  EXPECT_EQ(by_nic + gpu().to_gpu.bytes - before.to_gpu.bytes, hit_bytes());
  EXPECT_EQ(gpu().from_gpu_by_nic + gpu().from_gpu.bytes, hit_bytes());
}

TEST_F(GpuRdmaCopyTest, WhatIsWithdrawnTouchesTheCacheNoMore) {
  start_copying(direct());
  TestCache there(geometry_, kBlocks, device_);
  int unfinished = 0;
  for (int round = 0; round < 20; ++round) {
    for (std::uint32_t i = 0; i < kBlocks; ++i) there.fill(i, 900);
    std::optional<Operation> copying(
        pe_->copy({host_.paged(), iota_ids(kBlocks), there.paged(), iota_ids(kBlocks), {0, geometry_.layers()}}));
    std::this_thread::sleep_for(std::chrono::microseconds(500 * round));
    unfinished += !copying->wait(in(0)).ok();
    copying.reset();
    for (std::uint32_t i = 0; i < kBlocks; ++i) there.fill(i, 901);
    const TestCache other(geometry_, kBlocks, device_);
    ASSERT_TRUE(copy(host_, other).ok());
    expect_right(other);
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(there.holds(i, 901)) << round;
  }
  EXPECT_GT(unfinished, 2);
}

TEST_F(GpuRdmaCopyTest, WithoutSlotsItIsSaid) {
  NodeOptions pe = direct();
  pe.gpu.rdma_bytes = 0;
  pe.copy = CopyEngine::kNic;
  start_all(pe);
  EXPECT_EQ(fallbacks("copy_by_gpu"), 1u);
  const TestCache there(geometry_, kBlocks, device_);
  ASSERT_TRUE(copy(host_, there).ok());
  expect_right(there);
  EXPECT_EQ(gpu().to_gpu_by_nic, 0u);
  EXPECT_EQ(gpu().to_gpu.bytes, hit_bytes());
}

TEST_F(GpuRdmaTest, ANicThatDoesNotReachTheGpuIsSaid) {
  reach(By::kNothing);
  start_all(direct());
  EXPECT_EQ(fallbacks("no_gpu_rdma"), 1u);
  EXPECT_EQ(gpu().rdma_slots_bytes, 0u);
  const TestCache cache(geometry_, kBlocks, device_);
  ASSERT_TRUE(load_into(cache).ok());
  expect_right(cache);
  EXPECT_EQ(gpu().rdma_bytes, 0u);
  EXPECT_EQ(gpu().to_gpu.bytes, hit_bytes());
  EXPECT_EQ(by_rdma(), hit_bytes());
}

// Soft-RoCE is nowhere on PCIe: all of its ports are as near as can be.
TEST_F(GpuRdmaTest, NicsNearAGpuAreAskedForByIt) {
  NodeOptions pe = direct(), de = options("de");
  pe.rdma.devices = de.rdma.devices = {};
  pe.rdma.gpu = 1;
  start(pe, de);
  const TestCache cache(geometry_, kBlocks, device_);
  ASSERT_TRUE(load_into(cache).ok());
  expect_right(cache);
  const std::vector<std::string> rails = pe_->stats().links.at(0).rdma.rails;
  EXPECT_EQ(std::set<std::string>(rails.begin(), rails.end()).size(), rdma_devices().size());
  pe.name = "other";
  pe.rdma.gpu = 99;
  EXPECT_EQ(code_of([&] { Node other(geometry_, pe); }), Code::kUnsupported);
}

class GpuRdmaFlushTest : public GpuRdmaTestBase {
 protected:
  GpuRdmaFlushTest() : GpuRdmaTestBase(1) {}
};

TEST_F(GpuRdmaFlushTest, WritesAreFlushedWhereTheGpuNeedsIt) {
  start_all(direct());
  const int before = flushes();
  const TestCache cache(geometry_, kBlocks, device_);
  ASSERT_TRUE(load_into(cache).ok());
  expect_right(cache);
  EXPECT_EQ(gpu().rdma_bytes, hit_bytes());
  EXPECT_GT(flushes(), before);
  EXPECT_LT(flushes() - before, static_cast<int>(kBlocks * geometry_.layers())) << "once for all that is looked at";
}

class GpuRdmaOptionTest : public NodeTestBase, public ::testing::Test {
 protected:
  GpuRdmaOptionTest() : NodeTestBase("tcp", KvGeometry({6400, 6912, 7424, 320}, 16, "test/model"), 0) {}
};

TEST_F(GpuRdmaOptionTest, WithoutANicItIsSaidAndLoadsGoOn) {
  if (!rdma_devices().empty()) GTEST_SKIP() << "this machine has RDMA devices";
  NodeOptions pe = options("pe");
  pe.gpu.rdma_bytes = 1 << 20;
  start(pe, options("de"));
  TestCache cache(geometry_, kBlocks, device_);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  ASSERT_TRUE(load.wait(geometry_.layers() - 1, in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  EXPECT_EQ(pe_->stats().fallbacks["no_gpu_rdma"], 1u);
  EXPECT_EQ(pe_->stats().gpus.at(0).rdma_slots_bytes, 0u);
  pe.name = "strict";
  pe.listen = {};
  pe.store.fail_on_fallback = true;
  pe.staging.lock_memory = pe.staging.huge_pages = false;
  pe.store.direct = "off";
  pe.store.backend = "pread";
  Node strict(geometry_, pe);
  EXPECT_EQ(code_of([&] { strict.prepare(*cache.paged()); }), Code::kUnsupported);
}

}  // namespace
}  // namespace dualkv::testing
