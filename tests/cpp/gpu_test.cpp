// GPU memory: copy engines, checksums, stream order, pinned memory that runs out, devices that fail. That loads, grants
// and sends are right with caches in a GPU's memory is shown by the tests of the node, which run with them too.
#include <algorithm>
#include <atomic>
#include <future>
#include <numeric>

#include "base/hash.h"
#include "gpu_support.h"
#include "node_support.h"

namespace dualkv::testing {
namespace {

// Of a device of the tests' driver, with how it is undone.
class TestStream {
 public:
  explicit TestStream(int device = 0) : gpu_(CudaDevice::open(device)), stream_(gpu_->new_stream(false)) {}
  ~TestStream() {
    gate_ = 1;
    wait();
    gpu_->end_stream(stream_);
  }
  void* get() const { return stream_; }
  bool idle() const {
    const CudaDevice::Current current(*gpu_);
    return gpu_->driver().stream_query(stream_) == cuda::kSuccess;
  }
  void wait() const {
    const CudaDevice::Current current(*gpu_);
    gpu_->driver().stream_synchronize(stream_);
  }
  // What follows waits until open().
  void close() {
    const CudaDevice::Current current(*gpu_);
    const auto address = reinterpret_cast<std::uint64_t>(word_.data());
    cuda_check(gpu_->driver().stream_wait_value32(stream_, address, 1, cuda::kWaitGeq), "a gate of a test");
  }
  void open() { gate_ = 1; }
  // Queues copies from the GPU to `to`.
  void read(const PagedKv& cache, std::uint32_t layer, std::uint32_t block, std::span<std::byte> to) {
    std::vector<Extent> from(PagedKv::kMaxPlanes);
    from.resize(cache.extents(layer, block, from));
    const Extent target{to.data(), to.size()};
    std::vector<CopyRun> runs;
    append_runs(from, {&target, 1}, runs);
    const CudaDevice::Current current(*gpu_);
    gpu_->enqueue(stream_, runs, HostSide::kTo, GpuCopy::kMemcpy);
  }

 private:
  std::shared_ptr<CudaDevice> gpu_;
  cuda::Stream stream_;
  PinnedMemory word_{gpu_, sizeof(std::uint32_t)};
  std::atomic_ref<std::uint32_t> gate_{*reinterpret_cast<std::uint32_t*>(word_.data())};
};

class GpuTest : public NodeTestBase, public ::testing::Test {
 protected:
  GpuTest() : NodeTestBase("tcp", small_geometry(), 0) {}
  GpuStats stats_of(const Node& node) const {
    const auto gpus = node.stats().gpus;
    return gpus.empty() ? GpuStats{} : gpus.front();
  }
};

// Random paged layouts: planes of odd sizes and of multiples of 16, gaps between blocks, in all directions.
class GpuEngineTest : public ::testing::TestWithParam<GpuCopy> {
 protected:
  struct Layout {
    int device = kHostMemory;
    std::vector<std::vector<Plane>> layers;
    std::vector<std::shared_ptr<std::byte>> memory;
    std::vector<std::uint64_t> sizes;
  };
  static constexpr std::uint32_t kBlocks = 40;

  KvGeometry random_geometry(bool whole_vectors) {
    std::vector<std::uint64_t> bytes;
    for (std::uint64_t i = 0, layers = 1 + random_() % 3; i < layers; ++i) {
      bytes.push_back(whole_vectors ? 16 * (1 + random_() % 3000) : 1 + random_() % 30000);
    }
    return KvGeometry(bytes, 16, "test/model");
  }
  // Every byte of it is `fill`.
  Layout random_layout(const KvGeometry& geometry, int device, bool whole_vectors, std::byte fill) {
    Layout out;
    out.device = device;
    for (std::uint32_t layer = 0; layer < geometry.layers(); ++layer) {
      std::vector<Plane> planes;
      const std::uint64_t unit = whole_vectors ? 16 : 1;
      std::uint64_t left = geometry.layer_bytes(layer);
      for (std::size_t wanted = 1 + random_() % PagedKv::kMaxPlanes; left > 0; --wanted) {
        const std::uint64_t bytes = wanted <= 1 ? left : std::min(left, unit * (1 + random_() % (left / unit)));
        const std::uint64_t stride = bytes + unit * (random_() % 50);
        out.sizes.push_back(stride * kBlocks);
        out.memory.push_back(test_memory(stride * kBlocks, device));
        const std::vector<std::byte> filled(stride * kBlocks, fill);
        move(filled.data(), out.memory.back().get(), filled.size(), device);
        planes.push_back({out.memory.back().get(), stride, bytes});
        left -= bytes;
      }
      out.layers.push_back(std::move(planes));
    }
    return out;
  }
  static void move(const std::byte* from, std::byte* to, std::uint64_t bytes, int device) {
    const CopyRun run{reinterpret_cast<std::uint64_t>(from), reinterpret_cast<std::uint64_t>(to), bytes};
    CudaDevice::open(std::max(device, 0))->copy_now({&run, 1}, HostSide::kFrom);  // never pinned here
  }
  static std::vector<std::byte> block_of(const PagedKv& cache, std::uint32_t layer, std::uint32_t block) {
    std::vector<Extent> from(PagedKv::kMaxPlanes);
    from.resize(cache.extents(layer, block, from));
    std::vector<std::byte> bytes;
    for (const Extent& extent : from) {
      bytes.resize(bytes.size() + extent.bytes);
      move(extent.data, bytes.data() + bytes.size() - extent.bytes, extent.bytes, cache.device());
    }
    return bytes;
  }
  std::uint64_t count_of(const Layout& layout, std::byte value) {
    std::uint64_t count = 0;
    for (std::size_t i = 0; i < layout.memory.size(); ++i) {
      std::vector<std::byte> bytes(layout.sizes[i]);
      move(layout.memory[i].get(), bytes.data(), bytes.size(), layout.device);
      count += static_cast<std::uint64_t>(std::count(bytes.begin(), bytes.end(), value));
    }
    return count;
  }

  // Copies blocks of random bytes from each to the next, from other places to others, and looks at all that came to the
  // last and at every byte in between. The bytes that each got, and what its node said.
  std::pair<std::uint64_t, NodeStats> copy_along(const std::vector<int>& devices, bool whole_vectors) {
    const KvGeometry geometry = random_geometry(whole_vectors);
    const TempDir root;
    NodeOptions options;
    options.name = "node";
    options.store.root = root.path();
    options.gpu.copy = GetParam();
    Node node(geometry, options);
    const std::byte gap{0xee};
    std::vector<Layout> layouts;
    std::vector<std::shared_ptr<const PagedKv>> caches;
    std::vector<std::vector<std::uint32_t>> places;
    for (const int device : devices) {
      layouts.push_back(random_layout(geometry, device, whole_vectors, gap));
      caches.push_back(std::make_shared<PagedKv>(geometry, layouts.back().layers, kBlocks, device));
      places.push_back(iota_ids(kBlocks));
      std::shuffle(places.back().begin(), places.back().end(), random_);
      places.back().resize(kBlocks - 7);
    }
    for (std::size_t i = 0; i < layouts[0].memory.size(); ++i) {
      for (std::uint64_t at = 0; at < layouts[0].sizes[i]; ++at) {
        layouts[0].memory[i].get()[at] = static_cast<std::byte>(random_() % 0xee);  // never `gap`
      }
    }
    const std::uint64_t copied = places[0].size() * geometry.block_bytes();
    for (std::size_t step = 0; step + 1 < devices.size(); ++step) {
      const std::uint64_t gaps_before = count_of(layouts[step + 1], gap);
      const CopyRequest request{caches[step], places[step], caches[step + 1], places[step + 1], {0, geometry.layers()}};
      const Status status = node.copy(request).wait(in(20));
      EXPECT_TRUE(status.ok()) << status.message;
      EXPECT_EQ(gaps_before - count_of(layouts[step + 1], gap), copied);
    }
    for (std::size_t i = 0; i < places[0].size(); ++i) {
      for (std::uint32_t layer = 0; layer < geometry.layers(); ++layer) {
        EXPECT_EQ(block_of(*caches.back(), layer, places.back()[i]), block_of(*caches[0], layer, places[0][i]))
            << layer;
      }
    }
    return {copied, node.stats()};
  }

  std::mt19937_64 random_{17};
};

TEST_P(GpuEngineTest, EveryByteAndNoOtherOnRandomLayouts) {
  find_a_driver();
  if (const std::string why = CudaDevice::open(0)->missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  for (const bool whole_vectors : {true, false, true, false}) {
    const auto [copied, stats] = copy_along({kHostMemory, 0, 0, kHostMemory}, whole_vectors);
    // Pageable memory is out of a kernel's reach: the driver's copies do what it can't.
    const auto used = static_cast<std::size_t>(GetParam());
    EXPECT_GT(stats.gpus.at(0).within.batches[used], 0u);
    EXPECT_EQ(stats.gpus.at(0).to_gpu.bytes, copied);
    if (GetParam() != GpuCopy::kKernel) {
      EXPECT_GT(stats.gpus.at(0).to_gpu.batches[used], 0u);
    }
  }
}

TEST_P(GpuEngineTest, EveryByteAndNoOtherBetweenGpus) {
  find_a_driver();
  if (gpus().size() < 2) GTEST_SKIP() << "one GPU";
  if (const std::string why = CudaDevice::open(0)->missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  for (const bool whole_vectors : {true, false}) {
    const auto [copied, stats] = copy_along({kHostMemory, 0, 1, 0, kHostMemory}, whole_vectors);
    for (const GpuStats& gpu : stats.gpus) {
      EXPECT_EQ(gpu.from_gpus.bytes, copied);
      EXPECT_EQ(gpu.within.bytes, 0u);
    }
    EXPECT_FALSE(stats.fallbacks.contains("gpu_copy_staged"));
  }
}

TEST_P(GpuEngineTest, LoadsUseIt) {
  find_a_driver();
  if (const std::string why = CudaDevice::open(0)->missing(GetParam()); !why.empty()) GTEST_SKIP() << why;
  struct Loads : NodeTestBase {
    Loads() : NodeTestBase("tcp", small_geometry(), 0) {}
    void run(GpuCopy engine) {
      auto pe = options("pe");
      pe.gpu.copy = engine;
      start(pe, options("de"));
      Split split;
      run_whole(split);
      const GpuStats stats = pe_->stats().gpus.at(0);
      for (const auto& direction : {stats.to_gpu, stats.from_gpu}) {
        for (std::size_t i = 0; i < std::size(direction.batches); ++i) {
          EXPECT_EQ(direction.batches[i] > 0, i == static_cast<std::size_t>(engine)) << i;
        }
      }
    }
  } loads;
  loads.run(GetParam());
}

INSTANTIATE_TEST_SUITE_P(Engines, GpuEngineTest, ::testing::Values(GpuCopy::kMemcpy, GpuCopy::kBatch, GpuCopy::kKernel),
                         [](const auto& info) { return to_string(info.param); });

TEST_F(GpuTest, ChecksumsOnTheGpuAreThoseOfTheCpu) {
  find_a_driver();
  const auto gpu = CudaDevice::open(0);
  std::mt19937_64 random(3);
  for (const std::uint64_t bytes : {64, 192, 256, 320, 1024, 1088, 1100, 2048, 2112, 8192, 20480, 65536, 70016, 5}) {
    std::vector<std::byte> source(bytes);
    for (std::byte& byte : source) byte = static_cast<std::byte>(random());
    const auto memory = test_memory(2 * bytes + 64, 0);
    const auto address = reinterpret_cast<std::uint64_t>(memory.get());
    const auto host = reinterpret_cast<std::uint64_t>(source.data());
    const std::uint64_t first = bytes / 128 * 64;  // in two runs, apart from each other
    const CopyRun copies[] = {{host, address, first}, {host + first, address + bytes / 64 * 64 + 64, bytes - first}};
    gpu->copy_now(copies, HostSide::kFrom);
    ChecksumRuns runs{};
    if (first > 0) {
      runs.data[runs.count] = address;
      runs.bytes[runs.count++] = first;
    }
    runs.data[runs.count] = address + bytes / 64 * 64 + 64;
    runs.bytes[runs.count++] = bytes - first;
    EXPECT_EQ(gpu->can_sum(runs), bytes >= 256 && bytes % 64 == 0 && gpu->missing(GpuCopy::kKernel).empty()) << bytes;
    EXPECT_EQ(gpu->checksums({&runs, 1}), std::vector{checksum(std::span<const std::byte>(source))}) << bytes;
  }
}

// Layer Blocks of whole stripes, as the checksum kernel wants them.
class GpuVerifyTest : public NodeTestBase, public ::testing::Test {
 protected:
  GpuVerifyTest() : NodeTestBase("tcp", KvGeometry({8192, 16384, 4096}, 16, "test/model"), 0) {}
  void SetUp() override {
    find_a_driver();
    const auto gpu = CudaDevice::open(0);
    if (const std::string why = gpu->missing(GpuCopy::kKernel); !why.empty()) GTEST_SKIP() << why;
    driver_ = &gpu->driver();
    original_ = driver_->memcpy_async;
  }
  void TearDown() override {
    if (driver_ != nullptr) driver_->memcpy_async = original_;
  }
  void start_verifying() {
    auto pe = options("pe");
    pe.gpu.copy = GpuCopy::kMemcpy;
    pe.gpu.verify = true;
    start(pe, options("de"));
  }

  static inline cuda::Driver* driver_ = nullptr;
  static inline decltype(cuda::Driver::memcpy_async) original_ = nullptr;
  static inline std::atomic<int> copies_left_ = 0;
};

TEST_F(GpuVerifyTest, WhatIsRightIsFoundRightByBothPaths) {
  start_verifying();
  Split split;
  run_whole(split);
  EXPECT_EQ(pe_->stats().gpus.at(0).to_gpu.verified, kBlocks * geometry_.layers());
}

TEST_F(GpuVerifyTest, WhatACopyGotWrongIsNotServed) {
  start_verifying();
  PrefillOnly prefill;
  DecodeOnly decode;
  for (PathPolicy* policy : {static_cast<PathPolicy*>(&prefill), static_cast<PathPolicy*>(&decode)}) {
    TestCache cache(geometry_, kBlocks, 0);
    copies_left_ = 13;
    driver_->memcpy_async = [](cuda::DevicePtr to, cuda::DevicePtr from, std::size_t bytes, cuda::Stream stream) {
      // One copy comes from four bytes further than it should.
      return original_(to, --copies_left_ == 0 ? from + 4 : from, bytes, stream);
    };
    Load load = pe_->load({plan(*policy), cache.paged(), iota_ids(kBlocks), 10});
    const Status status = load.finish(in(10));
    EXPECT_EQ(status.code, Code::kCorrupt);
    EXPECT_NE(status.message.find("GPU 0"), std::string::npos) << status.message;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      const bool served = load.wait(layer, in(0)).ok();
      EXPECT_TRUE(!served || cache.layer_is(layer, 0, 1)) << layer;
    }
    driver_->memcpy_async = original_;
    EXPECT_EQ(pe_->store().match(keys_), kBlocks) << "what is stored was right";
  }
  expect_all_free();
}

TEST_F(GpuTest, AStreamWaitsForALayerAndTheCpuDoesNot) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 60;
  start(options("pe"), de);
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  TestStream stream;
  const std::uint32_t last = geometry_.layers() - 1;
  std::vector<std::byte> read(geometry_.layer_bytes(last)), expected = cache.expected(last, kBlocks);
  load.wait_on_stream(last, stream.get());
  EXPECT_FALSE(load.milestones()->reached(last)) << "the call waited";
  stream.read(*cache.paged(), last, kBlocks - 1, read);
  EXPECT_FALSE(stream.idle());
  stream.wait();
  EXPECT_TRUE(load.milestones()->reached(last));
  EXPECT_EQ(read, expected);
  load.wait_on_stream(0, stream.get());  // one that has long been there holds nothing up
  stream.wait();
}

TEST_F(GpuTest, AStreamDoesNotWaitForALoadThatFailed) {
  auto faulty = options("pe");
  start();
  pe_.reset();
  faulty.store.faults.drop_rate = 1;
  pe_ = std::make_unique<Node>(geometry_, faulty);
  PlanRequest request;
  request.keys = keys_;
  request.prefill = pe_->view();
  PrefillOnly policy;
  TestCache cache(geometry_, kBlocks, 0);
  TestStream stream;
  Load load = pe_->load({policy.plan(request), cache.paged(), iota_ids(kBlocks), 0.3});
  load.wait_on_stream(1, stream.get());
  EXPECT_FALSE(stream.idle());
  stream.wait();
  EXPECT_EQ(load.finish(in(5)).code, Code::kTimeout);
  EXPECT_EQ(code_of([&] { load.wait_on_stream(1, stream.get()); }), Code::kTimeout);
  EXPECT_TRUE(stream.idle());
}

// The same flags serve one load after the other.
TEST_F(GpuTest, FlagsOfEarlierLoadsDoNotOpenLaterOnes) {
  auto de = options("de");
  start(options("pe"), de);
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  TestStream stream;
  for (int i = 0; i < 20; ++i) {
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
    load.wait_on_stream(0, stream.get());
    stream.wait();
    EXPECT_GT(load.result().layer_ready_s[0], 0) << i;  // told before the flag is raised
    load.cancel();
  }
}

TEST_F(GpuTest, PublishStartsWhenTheStreamReachesIt) {
  start();
  TestCache cache(geometry_, 64, 0), decode_cache(geometry_, 64, 0);
  Split policy;
  const auto ids = iota_ids(kBlocks + 1);
  Load load = pe_->load({plan(policy), cache.paged(), ids, 20});
  Incoming incoming = de_->incoming(load.id(), 20);
  TestStream stream;
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) load.wait_on_stream(layer, stream.get());
  stream.close();
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) load.publish(layer, stream.get());
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) ASSERT_TRUE(load.wait(layer, in(10)).ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  for (double when : load.result().layer_published_s) EXPECT_EQ(when, 0);
  cache.fill(kBlocks, kBlocks + 1);  // "computed" only now
  stream.open();
  ASSERT_TRUE(load.finish(in(10)).ok()) << load.milestones()->status().message;
  ASSERT_TRUE(incoming.wait(in(10)).ok());
  incoming.copy_to(*decode_cache.paged(), ids);
  for (std::uint32_t i = 0; i <= kBlocks; ++i) EXPECT_TRUE(decode_cache.holds(i, i + 1)) << i;
  for (double when : load.result().layer_published_s) EXPECT_GT(when, 0);
  incoming.close();
  expect_all_free();
}

TEST_F(GpuTest, PublishBeforeTheLayerIsThereFailsTheLoad) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 40;
  start(options("pe"), de);
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  TestStream stream;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  load.publish(0, stream.get());
  const Status status = load.finish(in(10));
  EXPECT_EQ(status.code, Code::kInvalidArgument);
  EXPECT_NE(status.message.find("wait_on_stream(0)"), std::string::npos) << status.message;
  expect_all_free();
}

// A graph that was captured once waits, in each replay, for the load that has the gates then.
TEST_F(GpuTest, AGraphWaitsForOneLoadAfterTheOther) {
  find_a_driver();
  auto* capture = driver_call<void (*)(void*)>("stand_in_capture");
  auto* replay = driver_call<void (*)(void*)>("stand_in_replay");
  if (capture == nullptr) GTEST_SKIP() << "graphs of a real driver are torch's to capture";
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 200;
  start(options("pe"), de);
  const LayerGates gates = pe_->layer_gates();
  TestStream stream;
  TestCache cache(geometry_, 64, 0);
  const std::uint32_t last = geometry_.layers() - 1;
  std::vector<std::byte> read(geometry_.layer_bytes(last)), expected = cache.expected(last, kBlocks);
  capture(stream.get());
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    gates.wait(layer, stream.get());
    if (layer == last) stream.read(*cache.paged(), last, kBlocks - 1, read);
    gates.publish(layer, stream.get());
  }
  DecodeOnly policy;
  const auto begin = [&](std::uint32_t blocks) {
    return pe_->load({plan(policy), cache.paged(), iota_ids(blocks), 20});
  };
  {
    Load load = begin(kBlocks);
    EXPECT_EQ(code_of([&] { load.wait_on_stream(0, stream.get()); }), Code::kInvalidArgument);
    EXPECT_EQ(code_of([&] { load.publish(0, stream.get()); }), Code::kInvalidArgument);
    EXPECT_EQ(code_of([&] { load.open_gates(gates, stream.get()); }), Code::kInvalidArgument);
  }
  replay(stream.get());  // ends the capture
  EXPECT_TRUE(stream.idle());
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    std::fill(read.begin(), read.end(), std::byte{0});
    for (std::uint32_t i = 0; i < kBlocks; ++i) cache.fill(i, 900 + i);
    Load load = begin(kBlocks);
    Incoming incoming = de_->incoming(load.id(), 20);
    load.open_gates(gates, stream.get());
    replay(stream.get());
    stream.wait();
    EXPECT_EQ(read, expected) << "the graph did not wait";
    EXPECT_TRUE(load.finish(in(10)).ok()) << load.milestones()->status().message;
    EXPECT_TRUE(incoming.wait(in(10)).ok());
  }
  {  // one that was given up, before and after the stream came to its gates
    Load load = begin(kBlocks);
    load.open_gates(gates, stream.get());
    replay(stream.get());
    load.cancel();
    stream.wait();
    EXPECT_EQ(code_of([&] { load.open_gates(gates, stream.get()); }), Code::kCancelled);
    Load dropped = begin(kBlocks);
    stream.close();
    dropped.open_gates(gates, stream.get());
    replay(stream.get());
    dropped.cancel();
    stream.open();
    stream.wait();
  }
  std::fill(read.begin(), read.end(), std::byte{0});  // and none of that opened the gates of the next
  for (std::uint32_t i = 0; i < kBlocks; ++i) cache.fill(i, 900 + i);
  Load load = begin(kBlocks);
  load.open_gates(gates, stream.get());
  replay(stream.get());
  stream.wait();
  EXPECT_EQ(read, expected);
  EXPECT_EQ(code_of([&] { gates.wait(geometry_.layers(), stream.get()); }), Code::kInvalidArgument);
}

TEST_F(GpuTest, GatesThatBelongToNoLoadAreOpen) {
  start();
  const LayerGates gates = pe_->layer_gates();
  TestStream stream;
  TestCache cache(geometry_, kBlocks, 0);
  const auto pass = [&] {
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) gates.wait(layer, stream.get());
    stream.wait();
  };
  pass();  // as a warm-up does
  PrefillOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  load.open_gates(gates, stream.get());
  pass();
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  pass();  // a second replay for the same load
}

TEST_F(GpuTest, ALoadThatWasGivenUpDoesNotOpenTheGatesOfTheNext) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 400;
  start(options("pe"), de);
  const LayerGates gates = pe_->layer_gates();
  TestStream stream;
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  const std::uint32_t last = geometry_.layers() - 1;
  std::vector<std::byte> read(geometry_.layer_bytes(last)), expected = cache.expected(last, kBlocks);
  for (int round = 0; round < 10; ++round) {
    cache.fill(kBlocks - 1, 900);
    TestStream closed;
    closed.close();
    {
      Load given_up = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
      given_up.open_gates(gates, closed.get());
    }
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
    load.open_gates(gates, closed.get());
    gates.wait(last, closed.get());
    closed.read(*cache.paged(), last, kBlocks - 1, read);
    closed.open();
    closed.wait();
    EXPECT_EQ(read, expected) << round;
  }
}

TEST_F(GpuTest, OneLoadMayHaveSeveralGates) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 200;
  start(options("pe"), de);
  const LayerGates first = pe_->layer_gates(), second = pe_->layer_gates();
  TestStream one, other;
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  load.open_gates(first, one.get());
  load.open_gates(second, other.get());
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    first.wait(layer, one.get());
    second.wait(layer, other.get());
  }
  one.wait();
  other.wait();
  EXPECT_TRUE(load.wait(geometry_.layers() - 1, in(0)).ok()) << "a stream did not wait";
}

// An engine captures a graph, on a thread and a stream of its own, while KV comes and goes.
TEST_F(GpuTest, ACaptureElsewhereAndLoadsDoNotHurtEachOther) {
  find_a_driver();
  auto* capture = driver_call<void (*)(void*)>("stand_in_capture");
  auto* replay = driver_call<void (*)(void*)>("stand_in_replay");
  if (capture == nullptr) GTEST_SKIP() << "graphs of a real driver are torch's to capture";
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 40;
  start(options("pe"), de);
  TestStream stream;
  TestCache cache(geometry_, kBlocks, 0), source(geometry_, kBlocks, 0);
  capture(stream.get());
  DecodeOnly policy;
  {
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) ASSERT_TRUE(load.wait(layer, in(10)).ok());
  }
  {
    Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
    load.cancel();
  }
  replay(stream.get());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  EXPECT_EQ(pe_->stats().fallbacks["gpu_failed"], 0u);
}

TEST_F(GpuTest, CallsOfALoadWhoseNodeWasClosedAreHarmless) {
  start();
  TestStream stream;
  TestCache cache(geometry_, kBlocks, 0);
  const LayerGates gates = pe_->layer_gates();
  DecodeOnly policy;
  Load ended = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) ended.publish(layer, stream.get());
  stream.wait();
  const Plan same = plan(policy);
  Load running = pe_->load({same, cache.paged(), iota_ids(kBlocks), 20});
  pe_->close();
  for (Load* load : {&ended, &running}) {
    const auto quiet = [](const auto& call) {
      try {
        call();
      } catch (const Error&) {
      }
    };
    quiet([&] { load->wait_on_stream(0, stream.get()); });
    quiet([&] { load->publish(1, stream.get()); });
    quiet([&] { load->open_gates(gates, stream.get()); });
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) gates.wait(layer, stream.get());
    stream.wait();
  }
  EXPECT_EQ(code_of([&] { pe_->load({same, cache.paged(), iota_ids(kBlocks), 20}); }), Code::kCancelled);
}

TEST_F(GpuTest, WhatCannotBeVerifiedIsSaid) {
  auto pe = options("pe");
  pe.gpu.verify = true;
  start(pe, options("de"));
  TestCache cache(geometry_, kBlocks, 0);
  pe_->prepare(*cache.paged());
  EXPECT_GT(pe_->stats().fallbacks["gpu_not_verified"], 0u);
  pe.store.fail_on_fallback = true;
  pe.staging.lock_memory = pe.staging.huge_pages = false;
  pe.store.direct = "off";
  pe.store.backend = "pread";
  Node strict(geometry_, pe);
  EXPECT_EQ(code_of([&] { strict.prepare(*cache.paged()); }), Code::kUnsupported);
}

TEST_F(GpuTest, AGraphDoesNotWaitForANodeThatWasClosed) {
  start();
  const LayerGates gates = pe_->layer_gates();
  TestStream stream;
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  stream.close();
  load.open_gates(gates, stream.get());
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) gates.wait(layer, stream.get());
  pe_->close();
  pe_.reset();
  stream.open();
  stream.wait();
  EXPECT_TRUE(stream.idle());
}

TEST_F(GpuTest, WithoutPinnedMemoryForPeersThePrefillNodeReadsItself) {
  auto pe = options("pe");
  pe.gpu.bounce_bytes = 1;  // one Layer Block
  start(pe, options("de"));
  TestCache cache(geometry_, kBlocks, 0);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 10});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    const Status status = load.wait(layer, in(10));
    ASSERT_TRUE(status.ok()) << status.message;
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << i;
  EXPECT_GT(load.result().failovers, 0u);
  EXPECT_GT(pe_->stats().fallbacks["gpu_bounce_full"], 0u);
}

TEST_F(GpuTest, MemoryThatIsNotTheGpusIsRefused) {
  start();
  const TestCache host(geometry_, kBlocks), there(geometry_, kBlocks, 0);
  const auto claim = [&](const TestCache& cache, int device) {
    std::vector<std::vector<Plane>> layers;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      Extent first[PagedKv::kMaxPlanes], second[PagedKv::kMaxPlanes];
      const std::size_t count = cache.paged()->extents(layer, 0, first);
      cache.paged()->extents(layer, 1, second);
      std::vector<Plane> planes;
      for (std::size_t i = 0; i < count; ++i) {
        planes.push_back({first[i].data, static_cast<std::uint64_t>(second[i].data - first[i].data), first[i].bytes});
      }
      layers.push_back(std::move(planes));
    }
    return std::make_shared<PagedKv>(geometry_, std::move(layers), kBlocks, device);
  };
  PrefillOnly policy;
  const auto load_into = [&](const std::shared_ptr<PagedKv>& cache) {
    return code_of([&] { pe_->load({plan(policy), cache, iota_ids(kBlocks), 10}); });
  };
  EXPECT_EQ(load_into(claim(host, 0)), Code::kInvalidArgument);
  EXPECT_EQ(load_into(claim(there, 99)), Code::kUnsupported);
  if (gpus().size() > 1) {
    EXPECT_EQ(load_into(claim(there, 1)), Code::kInvalidArgument);
  }
  EXPECT_EQ(code_of([&] { pe_->grant("de", claim(host, 0), {1}, 10); }), Code::kInvalidArgument);
  EXPECT_EQ(pe_->stats().loads_active, 0u);
  EXPECT_EQ(load_into(claim(there, 0)), Code::kOk);
}

TEST_F(GpuTest, StreamCallsNeedACacheOfAGpu) {
  start();
  const TestCache host(geometry_, kBlocks);
  Split policy;
  Load load = pe_->load({plan(policy), host.paged(), iota_ids(kBlocks), 10});
  TestStream stream;
  EXPECT_EQ(code_of([&] { load.wait_on_stream(0, stream.get()); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { load.wait_on_stream(99, stream.get()); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { load.publish(0, stream.get()); }), Code::kInvalidArgument);
  EXPECT_TRUE(load.wait(0, in(10)).ok());
}

TEST_F(GpuTest, TwoGpusOfOneProcessEachGetTheirOwn) {
  find_a_driver();
  if (gpus().size() < 2) GTEST_SKIP() << "one GPU";
  start();
  PrefillOnly policy;
  const TestCache first(geometry_, kBlocks, 0), second(geometry_, kBlocks, 1);
  Load one = pe_->load({plan(policy), first.paged(), iota_ids(kBlocks), 10});
  Load two = pe_->load({plan(policy), second.paged(), iota_ids(kBlocks), 10});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    ASSERT_TRUE(one.wait(layer, in(10)).ok());
    ASSERT_TRUE(two.wait(layer, in(10)).ok());
  }
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(first.holds(i, i + 1) && second.holds(i, i + 1)) << i;
  const NodeStats stats = pe_->stats();
  ASSERT_EQ(stats.gpus.size(), 2u);
  for (const GpuStats& gpu : stats.gpus) EXPECT_EQ(gpu.to_gpu.bytes, kBlocks * geometry_.block_bytes());
}

// Faults of the driver's calls between GPUs.
class BetweenGpusTest : public GpuTest {
 protected:
  void SetUp() override {
    find_a_driver();
    if (gpus().size() < 2) GTEST_SKIP() << "one GPU";
    driver_ = &CudaDevice::open(0)->driver();
    original_ = *driver_;
    start();
    first_.emplace(geometry_, kBlocks, 0);
    second_.emplace(geometry_, kBlocks, 1);
    first_->fill(0, 1);
  }
  void TearDown() override {
    if (driver_ == nullptr) return;
    driver_->device_can_access_peer = original_.device_can_access_peer;
    driver_->ctx_enable_peer_access = original_.ctx_enable_peer_access;
    driver_->memcpy_peer_async = original_.memcpy_peer_async;
  }
  Status copy(const TestCache& from, const TestCache& to) {
    return pe_->copy({from.paged(), {0}, to.paged(), {2}, {0, geometry_.layers()}}).wait(in(10));
  }

  cuda::Driver* driver_ = nullptr;
  cuda::Driver original_{};
  std::optional<TestCache> first_, second_;
};

TEST_F(BetweenGpusTest, ThoseThatDoNotSeeEachOtherAreSaidAndCopyAllTheSame) {
  driver_->device_can_access_peer = [](int* can, int, int) { return *can = 0, cuda::kSuccess; };
  EXPECT_TRUE(copy(*first_, *second_).ok());
  EXPECT_TRUE(second_->holds(2, 1));
  EXPECT_EQ(pe_->stats().fallbacks["gpu_copy_staged"], 1u);
  EXPECT_TRUE(copy(*first_, *second_).ok());
  EXPECT_EQ(pe_->stats().fallbacks["gpu_copy_staged"], 1u);
}

// What copies is the one that gets the bytes: it must see the other's memory.
TEST_F(BetweenGpusTest, PeerAccessIsAskedForOnceAndByWhoCopies) {
  static std::atomic<int> asked;
  static std::atomic<cuda::Context> of;
  asked = 0;
  driver_->ctx_enable_peer_access = [](cuda::Context peer, unsigned) -> cuda::Result {
    cuda::Context current = nullptr;  // on whose behalf
    CudaDevice::open(0)->driver().ctx_pop_current(&current);
    CudaDevice::open(0)->driver().ctx_push_current(current);
    EXPECT_NE(current, peer);
    of = peer;
    ++asked;
    return cuda::kPeerAccessHad;
  };
  EXPECT_TRUE(copy(*first_, *second_).ok());
  EXPECT_TRUE(copy(*first_, *second_).ok());
  EXPECT_EQ(asked, 1);
  cuda::Context first = nullptr;
  driver_->device_primary_ctx_retain(&first, 0);
  EXPECT_EQ(of, first);
  EXPECT_EQ(pe_->stats().fallbacks["gpu_copy_staged"], 0u);
  driver_->ctx_enable_peer_access = [](cuda::Context, unsigned) -> cuda::Result { return 1; };
  EXPECT_TRUE(copy(*second_, *first_).ok());
  EXPECT_EQ(pe_->stats().fallbacks["gpu_copy_staged"], 1u);
}

TEST_F(BetweenGpusTest, ACopyThatFailsIsSaidAndLeavesOtherCopiesAlone) {
  driver_->memcpy_peer_async = [](cuda::DevicePtr, cuda::Context, cuda::DevicePtr, cuda::Context, std::size_t,
                                  cuda::Stream) -> cuda::Result { return 700; };
  const Status status = copy(*first_, *second_);
  EXPECT_EQ(status.code, Code::kIo);
  EXPECT_NE(status.message.find("cuMemcpyPeerAsync"), std::string::npos) << status.message;
  EXPECT_FALSE(second_->holds(2, 1));
  EXPECT_TRUE(copy(*first_, *first_).ok());
  EXPECT_TRUE(first_->holds(2, 1));
  EXPECT_EQ(pe_->stats().fallbacks["gpu_failed"], 1u);
}

// On a GPU that no other test uses: a device that has failed stays so.
TEST_F(GpuTest, LoadsIntoAGpuThatFailsEndWithItsError) {
  find_a_driver();
  auto* fail = driver_call<void (*)(int)>("stand_in_fail");
  if (fail == nullptr) GTEST_SKIP() << "a real GPU isn't broken for a test";
  constexpr int kDoomed = 2;
  auto de = options("de");
  de.store.read_limit_bytes_per_s = geometry_.block_bytes() * 60;
  start(options("pe"), de);
  const TestCache cache(geometry_, kBlocks, kDoomed), healthy(geometry_, kBlocks, 0);
  TestStream stream(kDoomed);
  DecodeOnly policy;
  Load load = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  load.wait_on_stream(geometry_.layers() - 1, stream.get());
  fail(kDoomed);
  const Status status = load.finish(in(5));
  EXPECT_EQ(status.code, Code::kIo);
  EXPECT_NE(status.message.find("illegal memory access"), std::string::npos) << status.message;
  Load again = pe_->load({plan(policy), cache.paged(), iota_ids(kBlocks), 20});
  EXPECT_EQ(again.finish(in(5)).code, Code::kIo);
  PrefillOnly prefill;
  Load other = pe_->load({plan(prefill), healthy.paged(), iota_ids(kBlocks), 20});
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) EXPECT_TRUE(other.wait(layer, in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(healthy.holds(i, i + 1)) << i;
  other.cancel();
  expect_all_free();
}

}  // namespace
}  // namespace dualkv::testing
