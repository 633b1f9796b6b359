// What C++ tests share: temporary folders, KV caches with recognisable bytes, nodes.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
#include "memory/copier.h"
#include "memory/cuda_device.h"

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

// The driver that tests of GPU memory use: the machine's, else tests/cuda/stand_in.cpp.
inline void find_a_driver() {
  if (dlopen("libcuda.so.1", RTLD_NOW) == nullptr) dlopen(DUALKV_CUDA_STAND_IN, RTLD_NOW);
}

// The library that tests of 3FS use: tests/usrbio/stand_in.cpp.
inline void* find_usrbio() { return dlopen(DUALKV_USRBIO_STAND_IN, RTLD_NOW); }

// The library that tests of GPUDirect Storage use, with the driver that it needs: tests/cufile/stand_in.cpp. Null where
// there is a real driver, which the stand-in can't serve.
inline void* find_cufile() {
  find_a_driver();
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr || dlsym(driver, "stand_in_write") == nullptr) return nullptr;
  return dlopen(DUALKV_CUFILE_STAND_IN, RTLD_NOW);
}

// Zeroed memory of the host or of a GPU.
inline std::shared_ptr<std::byte> test_memory(std::uint64_t bytes, int device) {
  if (device == kHostMemory) {
    return {static_cast<std::byte*>(std::calloc(bytes, 1)), std::free};
  }
  find_a_driver();
  const auto gpu = CudaDevice::open(device);
  cuda::DevicePtr memory = 0;
  {
    const CudaDevice::Current current(*gpu);
    cuda_check(gpu->driver().mem_alloc(&memory, bytes), "memory for a test");
  }
  std::vector<std::byte> zeros(bytes);
  const CopyRun run{reinterpret_cast<std::uint64_t>(zeros.data()), memory, bytes};
  gpu->copy_now({&run, 1}, HostSide::kFrom);
  return {reinterpret_cast<std::byte*>(memory), [gpu](std::byte* memory) {
            const CudaDevice::Current current(*gpu);
            gpu->driver().mem_free(reinterpret_cast<cuda::DevicePtr>(memory));
          }};
}

// A paged cache with two planes a layer, in the host's memory or a GPU's.
class TestCache {
 public:
  TestCache(const KvGeometry& geometry, std::uint32_t blocks, int device = kHostMemory) : geometry_(geometry) {
    std::vector<std::vector<Plane>> layers;
    for (std::uint32_t i = 0; i < geometry.layers(); ++i) {
      const std::uint64_t first = geometry.layer_bytes(i) / 2, second = geometry.layer_bytes(i) - first;
      memory_.push_back(test_memory(blocks * first, device));
      std::byte* k = memory_.back().get();
      memory_.push_back(test_memory(blocks * second, device));
      layers.push_back({{k, first, first}, {memory_.back().get(), second, second}});
    }
    paged_ = std::make_shared<PagedKv>(geometry, layers, blocks, device);
  }

  const std::shared_ptr<PagedKv>& paged() const { return paged_; }

  void fill(std::uint32_t block, std::uint64_t seed) {
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      std::vector<std::byte> bytes = expected(layer, seed);
      if (paged_->on_host()) {
        scatter(bytes.data(), places(layer, block));
      } else {
        const Extent from{bytes.data(), bytes.size()};
        std::vector<CopyRun> runs;
        append_runs({&from, 1}, places(layer, block), runs);
        CudaDevice::open(paged_->device())->copy_now(runs, HostSide::kFrom);
      }
    }
  }
  // Layers of the block that hold what fill(seed) wrote.
  std::uint32_t right_layers(std::uint32_t block, std::uint64_t seed) const {
    std::uint32_t right = 0;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) right += layer_is(layer, block, seed);
    return right;
  }
  bool layer_is(std::uint32_t layer, std::uint32_t block, std::uint64_t seed) const {
    std::vector<std::byte> bytes(geometry_.layer_bytes(layer));
    if (paged_->on_host()) {
      gather(places(layer, block), bytes.data());
    } else {
      const Extent to{bytes.data(), bytes.size()};
      std::vector<CopyRun> runs;
      append_runs(places(layer, block), {&to, 1}, runs);
      CudaDevice::open(paged_->device())->copy_now(runs, HostSide::kTo);
    }
    return bytes == expected(layer, seed);
  }
  bool holds(std::uint32_t block, std::uint64_t seed) const { return right_layers(block, seed) == geometry_.layers(); }
  // What fill(seed) writes.
  std::vector<std::byte> expected(std::uint32_t layer, std::uint64_t seed) const {
    std::mt19937_64 random(seed * 1000 + layer);
    std::vector<std::byte> bytes(geometry_.layer_bytes(layer));
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::uint64_t)) {
      const std::uint64_t word = random();
      std::memcpy(bytes.data() + at, &word, std::min(sizeof(word), bytes.size() - at));
    }
    return bytes;
  }

 private:
  std::vector<Extent> places(std::uint32_t layer, std::uint32_t block) const {
    std::vector<Extent> extents(PagedKv::kMaxPlanes);
    extents.resize(paged_->extents(layer, block, extents));
    return extents;
  }

  const KvGeometry geometry_;
  std::vector<std::shared_ptr<std::byte>> memory_;
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
