// What the node's tests share: a prefill and a decode node over one root, and loads that check every byte.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include "support.h"

namespace dualkv::testing {

// Names of this machine's RDMA devices, in order.
inline std::vector<std::string> rdma_devices() {
  std::vector<std::string> names;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/infiniband", missing)) {
    names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// A prefill and a decode node (and helpers) over one root, and a source cache whose blocks are stored.
class NodeTestBase {
 protected:
  static constexpr std::uint32_t kBlocks = 24;

  // `device`: of the caches.
  NodeTestBase(std::string scheme, const KvGeometry& geometry, int device = kHostMemory)
      : scheme_(std::move(scheme)), geometry_(geometry), device_(device) {
    for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, i + 1);
  }

  NodeOptions options(const std::string& name) {
    NodeOptions options;
    options.name = name;
    options.store.root = root_.path();
    options.store.in_use_grace_s = 0;
    options.staging.bytes = geometry_.file_bytes() * 64;
    options.loopback = hub_;
    options.gpu = gpu_;
    if (scheme_ == "tcp") options.listen = {"tcp://127.0.0.1:0"};
    if (scheme_ == "shm") options.listen = {"shm://" + root_.path() + "/" + name + ".sock"};
    if (scheme_ == "rdma") {
      options.listen = {"rdma://127.0.0.1:0"};
      const auto devices = rdma_devices();
      if (!devices.empty()) options.rdma.devices = {name == "pe" ? devices.front() : devices.back()};
    }
    if (scheme_ == "loopback") options.listen = {"loopback://" + name};
    return options;
  }

  void start() { start(options("pe"), options("de")); }
  void start(NodeOptions pe, NodeOptions de) {
    pe_ = std::make_unique<Node>(geometry_, std::move(pe));
    de_ = std::make_unique<Node>(geometry_, std::move(de));
    pe_->connect(de_->addresses()[0]);
    store_blocks();
  }
  void store_blocks() {
    const auto ids = iota_ids(kBlocks);
    ASSERT_TRUE(pe_->store().save(keys_, *source_.paged(), ids, {}, in(10)).wait(in(10)).ok());
    ASSERT_EQ(pe_->store().match(keys_), kBlocks);
  }

  Plan plan(PathPolicy& policy, std::uint32_t hit = kBlocks) {
    PlanRequest request;
    request.keys.assign(keys_.begin(), keys_.begin() + hit);
    request.prefill = pe_->view();
    request.decode = pe_->peer("de").view();
    return policy.plan(request);
  }

  // Loads, "computes" two new blocks, publishes every layer, and checks every byte on both sides.
  void run_whole(PathPolicy& policy, std::uint32_t window = 0, std::uint32_t layers_per_read = 0) {
    TestCache cache(geometry_, 64, device_), decode_cache(geometry_, 64, device_);
    const std::uint32_t prompt = kBlocks + 2;
    for (std::uint32_t i = kBlocks; i < prompt; ++i) cache.fill(63 - i, i + 1);
    std::vector<std::uint32_t> ids, decode_ids;
    for (std::uint32_t i = 0; i < prompt; ++i) {
      ids.push_back(63 - i);
      decode_ids.push_back((i * 5) % 64);
    }
    Load load = pe_->load({plan(policy), cache.paged(), ids, 10, window, layers_per_read});
    Incoming incoming = de_->incoming(load.id(), 10);
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      const Status status = load.wait(layer, in(10));
      ASSERT_TRUE(status.ok()) << status.message;
      for (std::uint32_t i = 0; i < kBlocks; ++i)
        ASSERT_TRUE(cache.layer_is(layer, ids[i], i + 1)) << layer << " " << i;
      load.publish(layer);
      load.release(layer);
    }
    const Status finished = load.finish(in(10));
    ASSERT_TRUE(finished.ok()) << finished.message;
    const Status handed_over = incoming.wait(in(10));
    ASSERT_TRUE(handed_over.ok()) << handed_over.message;
    incoming.copy_to(*decode_cache.paged(), decode_ids);
    for (std::uint32_t i = 0; i < prompt; ++i) EXPECT_TRUE(decode_cache.holds(decode_ids[i], i + 1)) << i;
    std::uint64_t bytes = 0;
    for (const PathResult& path : load.result().paths) bytes += path.bytes;
    EXPECT_EQ(bytes, kBlocks * geometry_.block_bytes());
    incoming.close();
    expect_all_free();
  }

  void expect_all_free() {
    for (Node* node : {pe_.get(), de_.get()}) {
      if (node == nullptr) continue;
      EXPECT_TRUE(eventually([&] {
        const NodeStats stats = node->stats();
        return stats.staging.free_slots == stats.staging.slots && stats.loads_active == 0 && stats.loads_served == 0;
      })) << node->name()
          << " free " << node->stats().staging.free_slots << " of " << node->stats().staging.slots << " active "
          << node->stats().loads_active << " served " << node->stats().loads_served;
    }
  }

  void corrupt(std::uint32_t block, std::uint64_t offset) { corrupt(block, offset, root_.path()); }
  void corrupt(std::uint32_t block, std::uint64_t offset, const std::string& root) {
    const std::string hex = keys_[block].hex();
    std::string path;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
      if (entry.path().filename() == hex + ".kv") path = entry.path();
    }
    const int fd = open(path.c_str(), O_RDWR);
    ASSERT_GE(fd, 0);
    char byte = 0;
    ASSERT_EQ(pread(fd, &byte, 1, static_cast<off_t>(offset)), 1);
    byte = static_cast<char>(byte ^ 4);
    ASSERT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(offset)), 1);
    close(fd);
  }

  const std::string scheme_;
  TempDir root_;
  const KvGeometry geometry_;
  const int device_;
  GpuOptions gpu_;
  std::shared_ptr<LoopbackHub> hub_ = make_loopback_hub();
  TestCache source_{geometry_, kBlocks, device_};
  const std::vector<Key> keys_ = test_keys(geometry_, kBlocks);
  std::unique_ptr<Node> pe_, de_;
};

}  // namespace dualkv::testing
