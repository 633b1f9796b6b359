// What the store's tests share: a root with saved blocks, the files behind them, and reads into staging.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <map>
#include <optional>

#include "dualkv/store.h"
#include "support.h"

namespace dualkv::testing {

using Bytes = std::vector<std::byte>;

inline Bytes read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  Bytes bytes(in ? static_cast<std::size_t>(in.tellg()) : 0);
  in.seekg(0);
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

inline void write_file(const std::string& path, const Bytes& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// Seconds into the past.
inline void set_age(const std::string& path, double seconds) {
  timespec times[2];
  clock_gettime(CLOCK_REALTIME, &times[0]);
  times[0].tv_sec -= static_cast<time_t>(seconds);
  times[1] = times[0];
  ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), times, 0), 0) << path;
}

// A root, a pool and a source cache: block i of it is filled with seed i + 1 and named keys_[i].
class StoreTestBase {
 protected:
  static constexpr std::uint32_t kBlocks = 12;
  static constexpr std::uint32_t kSlots = 16;

  StoreTestBase() {
    for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, i + 1);
  }

  static StagingOptions staging(const KvGeometry& geometry, std::uint32_t slots) {
    StagingOptions options;
    options.bytes = geometry.file_bytes() * slots;
    options.lock_memory = false;
    options.huge_pages = false;
    return options;
  }
  StoreOptions plain() const {
    StoreOptions options;
    options.root = root_.path() + "/kv";
    options.backend = "pread";
    options.direct = "off";
    options.in_use_grace_s = 0;
    options.durable = false;
    return options;
  }
  Store open(const StoreOptions& options) const { return Store(geometry_, options, pool_); }

  void save_all(Store& store) {
    const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
    ASSERT_TRUE(saved.wait(in(20)).ok()) << saved.status().message;
    ASSERT_EQ(store.match(keys_), kBlocks);
  }

  // <root>/<namespace>: the only folder there.
  std::string space() const {
    for (const auto& entry : std::filesystem::directory_iterator(root_.path() + "/kv")) return entry.path();
    return {};
  }
  std::string file_of(const Key& key) const { return space() + "/" + key.hex().substr(0, 2) + "/" + key.hex() + ".kv"; }
  // Every block file, by path.
  std::map<std::string, Bytes> files() const {
    std::map<std::string, Bytes> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(space())) {
      if (entry.path().extension() == ".kv") found[entry.path()] = read_file(entry.path());
    }
    return found;
  }
  std::size_t temporary_files() const {
    std::size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(space() + "/tmp")) {
      count += entry.path().filename().string()[0] != '.';
    }
    return count;
  }

  // What Full Block `block` is: its layers one after the other.
  Bytes image(std::uint32_t block) const {
    Bytes bytes;
    for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
      Extent extents[PagedKv::kMaxPlanes];
      const std::size_t count = source_.paged()->extents(layer, block, extents);
      for (std::size_t i = 0; i < count; ++i) {
        bytes.insert(bytes.end(), extents[i].data, extents[i].data + extents[i].bytes);
      }
    }
    return bytes;
  }
  bool slot_holds(const Slot& slot, std::uint32_t block, LayerRange layers) const {
    const std::uint64_t begin = geometry_.layer_offset(layers.first);
    const std::uint64_t end = geometry_.layer_offset(layers.first + layers.count);
    return std::memcmp(slot.get() + begin, image(block).data() + begin, end - begin) == 0;
  }
  LayerRange all_layers() const { return {0, geometry_.layers()}; }

  // Slots with a recognisable filling.
  std::vector<Slot> slots(std::size_t count) {
    std::vector<Slot> out;
    for (std::size_t i = 0; i < count; ++i) {
      out.push_back(pool_.try_acquire(SlotUse::kTransit));
      if (out.back()) std::memset(out.back().get(), 0xee, geometry_.file_bytes());
    }
    return out;
  }
  Status read_one(Store& store, const Key& key, std::optional<LayerRange> layers = {}) {
    const auto into = slots(1);
    const Operation read = store.read({&key, 1}, into, layers.value_or(all_layers()), in(20));
    return read.wait(in(20));
  }
  bool all_free() const {
    return eventually([&] { return pool_.stats().free_slots == kSlots; });
  }

  TempDir root_;
  const KvGeometry geometry_ = small_geometry();
  StagingPool pool_{geometry_, staging(geometry_, kSlots)};
  TestCache source_{geometry_, kBlocks};
  const std::vector<Key> keys_ = test_keys(geometry_, kBlocks);
};

class StoreTest : public StoreTestBase, public ::testing::Test {};

}  // namespace dualkv::testing
