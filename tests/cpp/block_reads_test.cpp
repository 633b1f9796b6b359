// Reads by groups of layers: the same bytes as whole blocks whatever the groups, the faults and the pages they share.
#include <tuple>

#include "node_support.h"

namespace dualkv::testing {
namespace {

// Ragged: layers far smaller and larger than a page, none of them aligned, so that groups would share pages. Paged:
// every boundary lies between pages, so that also a decode node reads group by group.
KvGeometry geometry_called(const std::string& name) {
  if (name == "ragged") return KvGeometry({777, 100, 5000, 4096, 33, 12001, 2}, 16, "test/ragged");
  return KvGeometry({4096, 8192, 4096, 4096, 12288, 4096, 8192}, 16, "test/paged");
}

using Parameters = std::tuple<const char*, const char*>;  // transport, geometry

class GroupedReads : public NodeTestBase, public ::testing::TestWithParam<Parameters> {
 protected:
  GroupedReads() : NodeTestBase(std::get<0>(GetParam()), geometry_called(std::get<1>(GetParam()))) {}

  std::uint32_t layers() const { return geometry_.layers(); }

  Plan local_plan(std::uint32_t hit = kBlocks) {
    PlanRequest request;
    request.keys.assign(keys_.begin(), keys_.begin() + hit);
    request.prefill = pe_->view();
    PrefillOnly policy;
    return policy.plan(request);
  }

  LoadRequest request(const Plan& plan, const TestCache& cache, std::uint32_t layers_per_read, double deadline_s = 10) {
    LoadRequest request{plan, cache.paged(), iota_ids(kBlocks), deadline_s};
    request.layers_per_read = layers_per_read;
    return request;
  }

  // What the side read, group by group: every layer once, in order. A decode node may read more at once.
  void expect_every_layer_once(const PathResult& path, std::uint32_t layers_per_read) {
    std::uint32_t next = 0;
    for (const ReadTimes& read : path.reads) {
      EXPECT_EQ(read.layers.first, next) << path.node;
      const bool whole = next + read.layers.count == layers();
      EXPECT_TRUE(whole || read.layers.count >= layers_per_read) << read.layers.count;
      EXPECT_TRUE(path.path == Path::kDecode || whole || read.layers.count == layers_per_read) << read.layers.count;
      next += read.layers.count;
      EXPECT_LE(read.begin_s, read.end_s);
      EXPECT_GE(read.begin_s, 0);
      EXPECT_GE(read.verify_s, 0);
      EXPECT_LE(read.verify_s, read.end_s - read.begin_s);
      const std::uint64_t bytes = geometry_.layer_offset(next) - geometry_.layer_offset(read.layers.first);
      EXPECT_EQ(read.bytes, bytes * path.blocks) << path.node << " layer " << read.layers.first;
    }
    EXPECT_EQ(next, layers()) << path.node;
  }

  // Right or failed, never wrong: whatever a wait allowed to be read is what was stored.
  void expect_never_wrong(const NodeOptions& pe, const NodeOptions& de, std::uint32_t layers_per_read,
                          const std::string& about) {
    pe_.reset();
    de_.reset();
    start(pe, de);
    Split policy;
    TestCache cache(geometry_, kBlocks), decode_cache(geometry_, kBlocks);
    Load load = pe_->load(request(plan(policy), cache, layers_per_read, 3));
    Incoming incoming = de_->incoming(load.id(), 3);
    for (std::uint32_t layer = 0; layer < layers(); ++layer) {
      const Status status = load.wait(layer, in(10));
      if (!status.ok()) break;
      for (std::uint32_t i = 0; i < kBlocks; ++i) {
        EXPECT_TRUE(cache.layer_is(layer, i, i + 1)) << about << ": layer " << layer << " block " << i;
      }
      if (code_of([&] { load.publish(layer); }) != Code::kOk) break;
    }
    const Status finished = load.finish(in(10));
    const Status handed_over = incoming.wait(in(10));
    EXPECT_TRUE(handed_over.ok() || !finished.ok())
        << about << ": finish() says that all published KV has arrived; at the decode node: " << handed_over.message;
    if (handed_over.ok()) {
      incoming.copy_to(*decode_cache.paged(), iota_ids(kBlocks));
      for (std::uint32_t i = 0; i < kBlocks; ++i) {
        EXPECT_TRUE(decode_cache.holds(i, i + 1)) << about << ": block " << i << " was handed over wrong, "
                                                  << decode_cache.right_layers(i, i + 1) << " layers right";
      }
    }
  }
};

TEST_P(GroupedReads, EveryNumberOfLayersGivesTheSameBytes) {
  start();
  PrefillOnly prefill;
  DecodeOnly decode;
  Split split;
  for (std::uint32_t layers_per_read = 1; layers_per_read <= layers(); ++layers_per_read) {
    SCOPED_TRACE(layers_per_read);
    run_whole(prefill, 0, layers_per_read);
    run_whole(decode, 0, layers_per_read);
    run_whole(split, 0, layers_per_read);
  }
}

TEST_P(GroupedReads, WithEveryWindow) {
  start();
  Split split;
  DecodeOnly decode;
  for (const std::uint32_t window : {1u, 2u, 3u, 5u, layers(), layers() + 1}) {
    for (const std::uint32_t layers_per_read : {0u, 1u, 2u, layers()}) {
      SCOPED_TRACE(std::to_string(window) + " layers of window, " + std::to_string(layers_per_read) + " a read");
      run_whole(window % 2 == 0 ? static_cast<PathPolicy&>(split) : decode, window, layers_per_read);
    }
  }
}

TEST_P(GroupedReads, ThroughAPoolOfTwoSlots) {
  auto pe = options("pe");
  pe.staging.bytes = geometry_.file_bytes() * 2;
  start(pe, options("de"));
  PrefillOnly policy;
  run_whole(policy, 0, 1);
  run_whole(policy, 3, 2);
}

TEST_P(GroupedReads, AHelperReadsForOthers) {
  start();
  Node helper(geometry_, options("helper"));
  pe_->connect(helper.addresses()[0]);
  for (std::uint32_t layers_per_read = 1; layers_per_read <= layers(); ++layers_per_read) {
    for (const std::uint32_t window : {0u, 3u}) {
      PlanRequest request;
      request.keys = keys_;
      request.prefill = pe_->view();
      request.helpers = {pe_->peer("helper").view()};
      Split policy;
      TestCache cache(geometry_, kBlocks);
      Load load = pe_->load({policy.plan(request), cache.paged(), iota_ids(kBlocks), 10, window, layers_per_read});
      for (std::uint32_t layer = 0; layer < layers(); ++layer) {
        ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
        load.release(layer);
      }
      ASSERT_TRUE(load.finish(in(10)).ok());
      for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.holds(i, i + 1)) << layers_per_read << " " << i;
      EXPECT_GT(load.result().paths[1].bytes, 0u);
    }
  }
  expect_all_free();
}

TEST_P(GroupedReads, WhatTheDecodeNodeSavesFromStagingIsRight) {
  start();
  std::vector<Key> renamed;
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const std::string name = "saved again " + std::to_string(i);
    renamed.emplace_back(std::as_bytes(std::span(name)));
  }
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks);
  Load load = pe_->load(request(plan(policy), cache, 2));
  Incoming incoming = de_->incoming(load.id(), 10);
  for (std::uint32_t layer = 0; layer < layers(); ++layer) {
    ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
    load.publish(layer);
  }
  ASSERT_TRUE(incoming.wait(in(10)).ok());
  ASSERT_TRUE(incoming.save(renamed, 0, {}).wait(in(10)).ok());
  incoming.close();
  EXPECT_TRUE(de_->store().verify().bad.empty());
  PlanRequest again;
  again.keys = renamed;
  again.prefill = pe_->view();
  PrefillOnly local;
  TestCache read_back(geometry_, kBlocks);
  ASSERT_TRUE(pe_->load(request(local.plan(again), read_back, 3)).finish(in(10)).ok());
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(read_back.holds(i, i + 1)) << i;
}

// With a window the prefill node is served long after the prompt is complete; saving must not disturb what is sent.
TEST_P(GroupedReads, TheDecodeNodeMaySaveWhileItStillServes) {
  start();
  std::vector<Key> renamed;
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const std::string name = "saved early " + std::to_string(i);
    renamed.emplace_back(std::as_bytes(std::span(name)));
  }
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks), decode_cache(geometry_, kBlocks);
  LoadRequest windowed = request(plan(policy), cache, 1);
  windowed.window_layers = 1;
  Load load = pe_->load(std::move(windowed));
  Incoming incoming = de_->incoming(load.id(), 10);
  ASSERT_TRUE(incoming.wait(in(10)).ok()) << incoming.milestones()->status().message;
  const Operation saved = incoming.save(renamed, 0, {});
  for (std::uint32_t layer = 0; layer < layers(); ++layer) {
    ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.layer_is(layer, i, i + 1)) << layer << " " << i;
    load.publish(layer);
    load.release(layer);
  }
  ASSERT_TRUE(load.finish(in(10)).ok()) << load.milestones()->status().message;
  EXPECT_EQ(load.result().failovers, 0u);
  ASSERT_TRUE(saved.wait(in(10)).ok()) << saved.status().message;
  EXPECT_TRUE(de_->store().verify().bad.empty());
  incoming.copy_to(*decode_cache.paged(), iota_ids(kBlocks));
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(decode_cache.holds(i, i + 1)) << i;
}

TEST_P(GroupedReads, TheResultSaysWhenEachGroupWasRead) {
  start();
  Split policy;
  std::size_t reported = 0;
  for (std::uint32_t layers_per_read = 1; layers_per_read <= layers(); ++layers_per_read) {
    TestCache cache(geometry_, kBlocks);
    Load load = pe_->load(request(plan(policy), cache, layers_per_read));
    const Incoming incoming = de_->incoming(load.id(), 10);
    for (std::uint32_t layer = 0; layer < layers(); ++layer) {
      ASSERT_TRUE(load.wait(layer, in(10)).ok());
      load.publish(layer);
    }
    ASSERT_TRUE(load.finish(in(10)).ok());
    const LoadResult result = load.result();
    expect_every_layer_once(result.paths[0], layers_per_read);
    reported += !result.paths[1].reads.empty();
    // Of another node only if it got to report it.
    if (!result.paths[1].reads.empty()) expect_every_layer_once(result.paths[1], layers_per_read);
    EXPECT_EQ(result.failovers, 0u);
  }
  EXPECT_GT(reported, 0u);
}

TEST_P(GroupedReads, TheFirstLayersAreReadyBeforeTheLastAreRead) {
  auto pe = options("pe");
  pe.store.read_limit_bytes_per_s = kBlocks * geometry_.file_bytes() * 10;
  start(pe, options("de"));
  TestCache cache(geometry_, kBlocks);
  Load load = pe_->load(request(local_plan(), cache, 1));
  ASSERT_TRUE(load.finish(in(10)).ok());
  const LoadResult result = load.result();
  const auto& reads = result.paths[0].reads;
  ASSERT_EQ(reads.size(), layers());
  for (std::uint32_t layer = 0; layer + 1 < layers(); ++layer) {
    EXPECT_LE(result.layer_ready_s[layer], result.layer_ready_s[layer + 1]);
    EXPECT_LT(result.layer_ready_s[layer], reads.back().end_s) << "the last layer's bytes were not all read yet";
    EXPECT_LE(reads[layer].end_s, reads[layer + 1].end_s);
  }
}

TEST_P(GroupedReads, ABlockCorruptInALaterLayerFailsTheLoadByNameAfterTheLayersBefore) {
  for (const std::uint32_t bad : {1u, 2u, 4u, 6u}) {
    auto pe = options("pe");
    pe.store.depth = 1;  // strictly in order
    pe_.reset();
    de_.reset();
    start(pe, options("de"));
    corrupt(5, geometry_.layer_offset(bad));
    TestCache cache(geometry_, kBlocks);
    Load load = pe_->load(request(local_plan(), cache, 1));
    const Status status = load.finish(in(10));
    EXPECT_EQ(status.code, Code::kCorrupt) << status.message;
    EXPECT_NE(status.message.find(keys_[5].hex()), std::string::npos) << status.message;
    EXPECT_EQ(load.failed_block(), 5);
    for (std::uint32_t layer = 0; layer < bad; ++layer) {
      EXPECT_TRUE(load.wait(layer, in(1)).ok()) << "layer " << layer << " was read before layer " << bad;
      for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.layer_is(layer, i, i + 1)) << layer << " " << i;
    }
    EXPECT_FALSE(load.wait(bad, in(1)).ok());
    expect_all_free();
  }
}

TEST_P(GroupedReads, ErrorsOfOneSideAreTakenOverByTheOther) {
  for (std::uint32_t layers_per_read = 1; layers_per_read <= 4; ++layers_per_read) {
    SCOPED_TRACE(layers_per_read);
    auto de = options("de");
    de.store.faults = {layers_per_read, 0.1, 0.1, 0.1, 0, 0, 0};
    pe_.reset();
    de_.reset();
    start(options("pe"), de);
    DecodeOnly decode;
    run_whole(decode, 0, layers_per_read);
    Split split;
    run_whole(split, layers_per_read, layers_per_read);
    auto pe = options("pe");
    pe.store.faults = {layers_per_read, 0.1, 0.1, 0.1, 0, 0, 0};
    pe_.reset();
    de_.reset();
    start(pe, options("de"));
    PrefillOnly prefill;
    run_whole(prefill, 0, layers_per_read);
  }
}

// The prefill node has delivered some layers of a block when its read of the next ones fails: the decode node reads the
// block, and what the prefill node has is no longer what is missing there. finish() must wait for it.
TEST_P(GroupedReads, ABlockThatTheDecodeNodeTookOverIsThereWhenTheLoadEnds) {
  auto pe = options("pe"), de = options("de");
  pe.store.root += "/pe";
  de.store.root += "/de";
  for (const NodeOptions* node : {&pe, &de}) std::filesystem::create_directory(node->store.root);
  de.store.faults = {1, 0, 0, 0, 0, 0.5, 0.02};  // some layers of the block come before others
  start(pe, de);
  ASSERT_TRUE(de_->store().save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(10)).wait(in(10)).ok());
  corrupt(5, geometry_.layer_offset(layers() - 1), pe.store.root);  // the last layer, and for the prefill node only
  PrefillOnly policy;
  for (int round = 0; round < 20; ++round) {
    TestCache cache(geometry_, kBlocks), decode_cache(geometry_, kBlocks);
    Load load = pe_->load(request(plan(policy), cache, 1));
    Incoming incoming = de_->incoming(load.id(), 10);
    ASSERT_TRUE(load.wait(layers() - 1, in(10)).ok()) << load.milestones()->status().message;
    for (std::uint32_t layer = 0; layer < layers(); ++layer) {  // an engine slower than storage
      ASSERT_TRUE(load.wait(layer, in(10)).ok()) << load.milestones()->status().message;
      load.publish(layer);
    }
    ASSERT_TRUE(load.finish(in(10)).ok()) << load.milestones()->status().message;
    EXPECT_EQ(load.result().failovers, 1u);
    ASSERT_TRUE(incoming.wait(in(10)).ok()) << "round " << round << ": " << incoming.milestones()->status().message;
    incoming.copy_to(*decode_cache.paged(), iota_ids(kBlocks));
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(decode_cache.holds(i, i + 1)) << i;
  }
}

TEST_P(GroupedReads, FaultsOnBothSidesGiveRightBytesOrNone) {
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    auto pe = options("pe"), de = options("de");
    pe.store.faults = {seed, 0.01, 0.01, 0.01, 0, 0, 0};
    de.store.faults = {seed + 100, 0.02, 0.02, 0.02, 0, 0, 0};
    expect_never_wrong(pe, de, 1 + seed % 3, "seed " + std::to_string(seed));
  }
}

TEST_P(GroupedReads, ReadsThatNeverAnswerGiveRightBytesOrNone) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    auto pe = options("pe"), de = options("de");
    pe.stall_s = de.stall_s = 0.1;
    (seed % 2 == 0 ? pe : de).store.faults = {seed, 0, 0, 0, 0.05, 0, 0};
    expect_never_wrong(pe, de, 1 + seed % 3, "seed " + std::to_string(seed));
  }
}

// finish() promises that what was published has arrived. The decode node's own reads hang, and what is published for
// them needs fresh slots: more of them than its pool has.
TEST_P(GroupedReads, WhatADecodeNodeHasNoRoomForHasNotArrived) {
  auto pe = options("pe"), de = options("de");
  pe.stall_s = de.stall_s = 0.1;
  de.staging.bytes = geometry_.file_bytes() * (kBlocks + kBlocks / 3);
  de.store.faults.drop_rate = 1;
  expect_never_wrong(pe, de, 2, "no reads end");
}

// Group by group into one slot: a later read brings the pages that it shares with the layers before it once more. What
// was verified already must not become what storage says now.
TEST_P(GroupedReads, ALaterReadOfASharedPageDamagesNothing) {
  auto de = options("de");
  de.store.read_limit_bytes_per_s = kBlocks * geometry_.file_bytes() * 5;
  de.store.direct = "off";
  start(options("pe"), de);
  DecodeOnly policy;
  TestCache cache(geometry_, kBlocks), decode_cache(geometry_, kBlocks);
  Load load = pe_->load(request(plan(policy), cache, 1));
  Incoming incoming = de_->incoming(load.id(), 10);
  ASSERT_TRUE(load.wait(0, in(10)).ok()) << load.milestones()->status().message;
  for (std::uint32_t i = 0; i < kBlocks; ++i) corrupt(i, geometry_.layer_bytes(0) - 1);  // page 0: layers 0, 1 and 2
  for (std::uint32_t layer = 0; layer < layers(); ++layer) {
    const Status status = load.wait(layer, in(10));
    if (!status.ok()) break;
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(cache.layer_is(layer, i, i + 1)) << layer << " " << i;
    if (code_of([&] { load.publish(layer); }) != Code::kOk) break;
  }
  load.finish(in(10));
  if (!incoming.wait(in(10)).ok()) return;  // failed is fine, wrong is not
  incoming.copy_to(*decode_cache.paged(), iota_ids(kBlocks));
  std::uint32_t right = 0;
  for (std::uint32_t i = 0; i < kBlocks; ++i) right += decode_cache.holds(i, i + 1);
  EXPECT_EQ(right, kBlocks) << "blocks were handed over wrong";
}

TEST_P(GroupedReads, MoreLayersThanThereAreIsRefused) {
  start();
  TestCache cache(geometry_, kBlocks);
  EXPECT_EQ(code_of([&] { pe_->load(request(local_plan(), cache, layers() + 1)); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { pe_->load(request(local_plan(), cache, ~0u)); }), Code::kInvalidArgument);
  expect_all_free();
}

INSTANTIATE_TEST_SUITE_P(Transports, GroupedReads,
                         ::testing::Combine(::testing::Values("loopback", "tcp", "shm"),
                                            ::testing::Values("ragged", "paged")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" + std::get<1>(info.param);
                         });

}  // namespace
}  // namespace dualkv::testing
