// Reads that share a ring, or a pool of threads: full queues, bad files between good ones, and files that are let go.
#include <sys/mount.h>
#include <sys/statvfs.h>

#include <functional>

#include "store_support.h"

namespace dualkv::testing {
namespace {

class SharedRing : public StoreTest, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    Store writer = open(plain());
    save_all(writer);
    try {
      open(ring(1));
    } catch (const Error& error) {
      if (error.code() != Code::kUnsupported) throw;
      GTEST_SKIP() << error.what();
    }
  }
  StoreOptions ring(std::uint32_t depth) const {
    StoreOptions options = plain();
    options.backend = GetParam();
    options.depth = depth;
    options.forget_s = 0;
    return options;
  }
  // Every block by an operation of its own, all at once: one letter each. Good ones are checked byte by byte.
  std::string read_each(Store& store, LayerRange layers) {
    const auto into = slots(kBlocks);
    std::vector<Operation> reads;
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
      reads.push_back(store.read({&keys_[i], 1}, {&into[i], 1}, layers, in(20)));
    }
    std::string out;
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
      const Status status = reads[i].wait(in(20));
      if (status.ok()) {
        EXPECT_TRUE(slot_holds(into[i], i, layers)) << i;
      } else {
        EXPECT_NE(status.message.find(keys_[i].hex()), std::string::npos) << status.message;
      }
      out += status.ok()                      ? '.'
             : status.code == Code::kNotFound ? 'n'
             : status.code == Code::kCorrupt  ? 'c'
             : status.code == Code::kIo       ? 'i'
                                              : '?';
    }
    return out;
  }
  std::string all_good() const { return std::string(kBlocks, '.'); }
};

TEST_P(SharedRing, ManyMoreBlocksThanFit) {
  for (const std::uint32_t depth : {1u, 2u, 3u, 4096u}) {
    Store store = open(ring(depth));
    for (int round = 0; round < 20; ++round) {
      EXPECT_EQ(read_each(store, {static_cast<std::uint32_t>(round) % 4, 1}), all_good()) << "depth " << depth;
      EXPECT_EQ(read_each(store, all_layers()), all_good()) << "depth " << depth;
    }
    EXPECT_EQ(store.stats().read_errors, 0u);
    EXPECT_EQ(store.stats().read_queue_bytes, 0u);
  }
  EXPECT_TRUE(all_free());
}

TEST_P(SharedRing, BadFilesBetweenGoodOnesHurtNobodyElse) {
  for (const std::uint32_t depth : {1u, 2u, 5u, 32u}) {
    Store store = open(ring(depth));
    EXPECT_EQ(read_each(store, all_layers()), all_good());
    const auto before = files();
    const std::string missing = file_of(keys_[4]), cut = file_of(keys_[6]), folder = file_of(keys_[8]);
    for (int round = 0; round < 10; ++round) {
      std::filesystem::remove(missing);
      std::filesystem::resize_file(cut, geometry_.file_bytes() / 2);
      std::filesystem::remove(folder);
      std::filesystem::create_directory(folder);
      EXPECT_EQ(read_each(store, all_layers()), "....n.c.i...") << "depth " << depth << " round " << round;
      // The last layer lies behind the cut, and so does the trailer.
      EXPECT_EQ(read_each(store, {geometry_.layers() - 1, 1}), "....n.c.i...") << "depth " << depth;
      std::filesystem::remove(folder);
      for (const std::string& path : {missing, cut, folder}) write_file(path, before.at(path));
      EXPECT_EQ(read_each(store, all_layers()), all_good()) << "the same ring, depth " << depth;
    }
    EXPECT_EQ(store.stats().read_queue_bytes, 0u);
  }
  EXPECT_TRUE(all_free());
}

TEST_P(SharedRing, NothingButBadFiles) {
  Store store = open(ring(3));
  const auto before = files();
  for (const Key& key : keys_) std::filesystem::remove(file_of(key));
  for (int round = 0; round < 20; ++round) EXPECT_EQ(read_each(store, all_layers()), std::string(kBlocks, 'n'));
  for (const auto& [path, bytes] : before) write_file(path, bytes);
  EXPECT_EQ(read_each(store, all_layers()), all_good());
}

TEST_P(SharedRing, AFileThatIsReplacedBetweenTwoReadsIsReadAnew) {
  Store store = open(ring(1));
  const auto before = files();
  for (std::uint32_t i = 0; i + 1 < kBlocks; ++i) {
    EXPECT_TRUE(read_one(store, keys_[i]).ok());
    write_file(file_of(keys_[i]) + ".new", before.at(file_of(keys_[i + 1])));
    std::filesystem::rename(file_of(keys_[i]) + ".new", file_of(keys_[i]));
    EXPECT_EQ(read_one(store, keys_[i]).code, Code::kCorrupt) << "another block's file has its name now";
  }
}

// --- files that are read no more take no space

class SmallDisk {
 public:
  SmallDisk() { mounted_ = mount("tmpfs", directory_.path().c_str(), "tmpfs", 0, "size=16m") == 0; }
  ~SmallDisk() {
    if (mounted_) umount2(directory_.path().c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  const std::string& path() const { return directory_.path(); }
  std::uint64_t free_bytes() const {
    struct statvfs info{};
    statvfs(directory_.path().c_str(), &info);
    return info.f_bfree * info.f_bsize;
  }

 private:
  TempDir directory_;
  bool mounted_ = false;
};

class ReleasedFiles : public SharedRing {
 protected:
  void SetUp() override {
    if (!disk_.mounted()) GTEST_SKIP() << "needs root, to mount a small file system";
    SharedRing::SetUp();
  }
  StoreOptions on_disk(std::uint32_t depth) const {
    StoreOptions options = ring(depth);
    options.root = disk_.path() + "/kv";
    return options;
  }
  std::string disk_file_of(const Key& key) const {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(disk_.path())) {
      if (entry.path().filename() == key.hex() + ".kv") return entry.path();
    }
    return {};
  }
  // Saves, reads in the given way, removes: the disk must be as empty as before.
  void expect_freed(std::uint32_t depth, const std::function<void(Store&)>& read) {
    Store store = open(on_disk(depth));
    for (int round = 0; round < 3; ++round) {
      const std::uint64_t empty = disk_.free_bytes();
      ASSERT_TRUE(store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20)).wait(in(20)).ok());
      ASSERT_LE(disk_.free_bytes() + kBlocks * geometry_.file_bytes(), empty);
      read(store);
      for (const Key& key : keys_) store.remove(key);
      EXPECT_TRUE(eventually([&] { return disk_.free_bytes() >= empty; }, 2))
          << empty - disk_.free_bytes() << " bytes of removed blocks are still held, depth " << depth;
    }
  }

  SmallDisk disk_;
};

TEST_P(ReleasedFiles, AfterGoodReads) {
  for (const std::uint32_t depth : {1u, 4u, 32u}) {
    expect_freed(depth, [&](Store& store) { EXPECT_EQ(read_each(store, all_layers()), all_good()); });
  }
}

TEST_P(ReleasedFiles, AfterABlockThatWasNotThere) {
  for (const std::uint32_t depth : {1u, 4u}) {
    expect_freed(depth, [&](Store& store) {
      EXPECT_TRUE(read_one(store, keys_[0]).ok());
      store.remove(keys_[1]);
      EXPECT_EQ(read_one(store, keys_[1]).code, Code::kNotFound);
    });
  }
}

TEST_P(ReleasedFiles, AfterGoodReadsThenABatchOfMissingOnes) {
  expect_freed(4, [&](Store& store) {
    EXPECT_EQ(read_each(store, all_layers()), all_good());
    for (std::uint32_t i = 4; i < kBlocks; ++i) store.remove(keys_[i]);
    EXPECT_EQ(read_each(store, all_layers()), "....nnnnnnnn");
  });
}

TEST_P(ReleasedFiles, AfterATruncatedFile) {
  expect_freed(2, [&](Store& store) {
    std::filesystem::resize_file(disk_file_of(keys_[3]), 5000);
    EXPECT_EQ(read_one(store, keys_[3]).code, Code::kCorrupt);
  });
}

TEST_P(ReleasedFiles, AfterManyRoundsOfIdleAndBusy) {
  expect_freed(3, [&](Store& store) {
    for (int round = 0; round < 50; ++round) {
      EXPECT_TRUE(read_one(store, keys_[static_cast<std::size_t>(round) % kBlocks]).ok());
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Backends, SharedRing, ::testing::Values("pread", "uring"),
                         [](const auto& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Backends, ReleasedFiles, ::testing::Values("pread", "uring"),
                         [](const auto& info) { return std::string(info.param); });

// --- a pool that is still being prepared

class LazyPool : public StoreTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(LazyPool, ReadsAreRightWhileMemoryIsPreparedAndInTheEndAllOfItIsRegistered) {
  {
    Store writer = open(plain());
    save_all(writer);
  }
  StagingOptions staging;
  staging.bytes = std::uint64_t{300} << 20;
  staging.huge_pages = false;
  staging.chunk_bytes = std::uint64_t{4} << 20;
  staging.prepare_threads = 1;
  staging.lazy = true;
  StagingPool pool(geometry_, staging);
  StoreOptions options = plain();
  options.backend = GetParam();
  std::optional<Store> store;
  try {
    store.emplace(geometry_, options, pool);
  } catch (const Error& error) {
    if (error.code() != Code::kUnsupported) throw;
    GTEST_SKIP() << error.what();
  }
  std::uint64_t last_bytes = 0;
  bool ready = false;
  for (int round = 0; !ready || round < 3; ++round) {
    ready = pool.stats().ready_chunks == pool.stats().chunks;
    std::vector<Slot> into;
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
      into.push_back(pool.try_acquire(SlotUse::kTransit));
      ASSERT_NE(into.back(), nullptr) << "the first chunk holds so many";
      std::memset(into.back().get(), 0xee, geometry_.file_bytes());
    }
    const Status status = store->read(keys_, into, all_layers(), in(20)).wait(in(20));
    ASSERT_TRUE(status.ok()) << status.message;
    for (std::uint32_t i = 0; i < kBlocks; ++i) ASSERT_TRUE(slot_holds(into[i], i, all_layers())) << i;
    const StoreStats stats = store->stats();
    EXPECT_GE(stats.registered_bytes, last_bytes);
    EXPECT_LE(stats.registered_bytes, pool.memory().size());
    EXPECT_EQ(stats.registered_buffers == 0, stats.registered_bytes == 0);
    last_bytes = stats.registered_bytes;
  }
  const StoreStats stats = store->stats();
  if (std::string(GetParam()) == "pread" || !stats.registered) {
    EXPECT_EQ(stats.registered_bytes, 0u);
    return;
  }
  EXPECT_EQ(stats.registered_bytes, pool.memory().size());
  EXPECT_GE(stats.registered_buffers, 2u);
  EXPECT_GE(stats.register_s, 0);
  // Slots of the last buffer too.
  ASSERT_TRUE(eventually([&] { return pool.stats().free_slots == pool.stats().slots; }));
  std::vector<Slot> rest;
  for (Slot slot = pool.try_acquire(SlotUse::kTransit); slot; slot = pool.try_acquire(SlotUse::kTransit)) {
    rest.push_back(std::move(slot));
  }
  EXPECT_EQ(rest.size(), pool.stats().slots);
  const std::span last(&rest.back(), 1);
  ASSERT_TRUE(store->read({&keys_[7], 1}, last, all_layers(), in(20)).wait(in(20)).ok());
  EXPECT_TRUE(slot_holds(rest.back(), 7, all_layers()));
}

TEST_P(LazyPool, AStoreMayEndBeforeItsPoolIsReady) {
  for (int round = 0; round < 4; ++round) {
    StagingOptions staging;
    staging.bytes = std::uint64_t{64} << 20;
    staging.chunk_bytes = 1;
    staging.huge_pages = false;
    staging.lazy = true;
    StoreOptions options = plain();
    options.backend = GetParam();
    try {
      StagingPool pool(geometry_, staging);
      Store store(geometry_, options, pool);
    } catch (const Error& error) {
      if (error.code() != Code::kUnsupported) throw;
      GTEST_SKIP() << error.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LazyPool, ::testing::Values("pread", "uring"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace dualkv::testing
