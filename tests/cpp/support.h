// What C++ tests share: temporary folders, host KV caches with recognisable bytes, nodes.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dualkv/geometry.h"
#include "dualkv/keys.h"
#include "dualkv/node.h"
#include "dualkv/paged_kv.h"

namespace dualkv::testing {

class TempDir {
 public:
  TempDir() {
    const char* base = std::getenv("DUALKV_TEST_DIR");
    std::string path = std::string(base ? base : "/tmp") + "/dualkv-test-XXXXXX";
    path_ = mkdtemp(path.data());
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline KvGeometry small_geometry(std::uint32_t layers = 4) {
  std::vector<std::uint64_t> bytes;
  for (std::uint32_t i = 0; i < layers; ++i) bytes.push_back(6000 + 512 * i);  // unaligned, and not alike
  return KvGeometry(bytes, 16, "test/model");
}

// A paged cache in host memory with two planes a layer.
class HostCache {
 public:
  HostCache(const KvGeometry& geometry, std::uint32_t blocks) : geometry_(geometry) {
    std::vector<std::vector<Plane>> layers;
    for (std::uint32_t i = 0; i < geometry.layers(); ++i) {
      const std::uint64_t first = geometry.layer_bytes(i) / 2, second = geometry.layer_bytes(i) - first;
      memory_.emplace_back(blocks * first);
      std::byte* k = memory_.back().data();
      memory_.emplace_back(blocks * second);
      layers.push_back({{k, first, first}, {memory_.back().data(), second, second}});
    }
    paged_ = std::make_shared<PagedKv>(geometry, layers, blocks);
  }

  const std::shared_ptr<PagedKv>& paged() const { return paged_; }

  void fill(std::uint32_t block, std::uint64_t seed) {
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      std::mt19937_64 random(seed * 1000 + layer);
      visit(layer, block, [&](std::byte& b) { b = static_cast<std::byte>(random()); });
    }
  }
  // Layers of the block that hold what fill(seed) wrote.
  std::uint32_t right_layers(std::uint32_t block, std::uint64_t seed) const {
    std::uint32_t right = 0;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) right += layer_is(layer, block, seed);
    return right;
  }
  bool layer_is(std::uint32_t layer, std::uint32_t block, std::uint64_t seed) const {
    std::mt19937_64 random(seed * 1000 + layer);
    bool same = true;
    visit(layer, block, [&](const std::byte& b) { same &= b == static_cast<std::byte>(random()); });
    return same;
  }
  bool holds(std::uint32_t block, std::uint64_t seed) const { return right_layers(block, seed) == geometry_.layers(); }

 private:
  template <typename Visit>
  void visit(std::uint32_t layer, std::uint32_t block, Visit visit) const {
    Extent extents[PagedKv::kMaxPlanes];
    const std::size_t count = paged_->extents(layer, block, extents);
    for (std::size_t i = 0; i < count; ++i) {
      for (std::uint64_t at = 0; at < extents[i].bytes; ++at) visit(extents[i].data[at]);
    }
  }

  const KvGeometry geometry_;
  std::vector<std::vector<std::byte>> memory_;
  std::shared_ptr<PagedKv> paged_;
};

inline Clock::time_point in(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

inline std::vector<Key> test_keys(const KvGeometry& geometry, std::uint32_t count) {
  std::vector<std::uint32_t> tokens(count * geometry.tokens_per_block());
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i * 7);
  return block_keys(tokens, geometry);
}

inline std::vector<std::uint32_t> iota_ids(std::uint32_t count, std::uint32_t first = 0) {
  std::vector<std::uint32_t> ids(count);
  for (std::uint32_t i = 0; i < count; ++i) ids[i] = first + i;
  return ids;
}

template <typename Call>
Code code_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  return Code::kOk;
}

// True as soon as the condition holds, within the time.
template <typename Condition>
bool eventually(Condition condition, double seconds = 10) {
  const auto until = in(seconds);
  while (!condition()) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace dualkv::testing
