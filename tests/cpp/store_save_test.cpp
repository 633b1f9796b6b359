// Opening a store, saving into it, and what a failed save leaves behind: nothing.
#include <sys/mount.h>

#include "store_support.h"

namespace dualkv::testing {
namespace {

TEST_F(StoreTest, SavesInThePublishedFormat) {
  Store store = open(plain());
  save_all(store);
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const Bytes bytes = read_file(file_of(keys_[i]));
    ASSERT_EQ(bytes.size(), geometry_.file_bytes());
    const Bytes payload = image(i);
    EXPECT_TRUE(std::equal(payload.begin(), payload.end(), bytes.begin())) << i;
  }
  EXPECT_EQ(temporary_files(), 0u);
  EXPECT_EQ(store.stats().blocks_saved, kBlocks);
  EXPECT_TRUE(all_free());
}

TEST_F(StoreTest, TheSourceMayChangeAsSoonAsSaveReturns) {
  Store store = open(plain());
  const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
  const Bytes was = image(3);
  for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, 999);
  ASSERT_TRUE(saved.wait(in(20)).ok());
  EXPECT_TRUE(std::equal(was.begin(), was.end(), read_file(file_of(keys_[3])).begin()));
}

TEST_F(StoreTest, ADirectAndABufferedSaveAreTheSameFile) {
  StoreOptions options = plain();
  Store buffered = open(options);
  save_all(buffered);
  const auto first = files();
  for (const Key& key : keys_) ASSERT_TRUE(buffered.remove(key));
  options.direct = "auto";
  options.durable = true;
  Store direct = open(options);
  save_all(direct);
  EXPECT_TRUE(files() == first);
}

TEST_F(StoreTest, StoredBlocksAreSkipped) {
  Store store = open(plain());
  save_all(store);
  struct stat before, after;
  ASSERT_EQ(stat(file_of(keys_[2]).c_str(), &before), 0);
  for (std::uint32_t i = 0; i < kBlocks; ++i) source_.fill(i, 999);  // would show
  ASSERT_TRUE(store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20)).wait(in(20)).ok());
  ASSERT_EQ(stat(file_of(keys_[2]).c_str(), &after), 0);
  EXPECT_EQ(before.st_ino, after.st_ino);
  EXPECT_EQ(store.stats().blocks_saved, kBlocks);
}

TEST_F(StoreTest, OnlyMissingBlocksOfAChainAreWritten) {
  Store store = open(plain());
  ASSERT_TRUE(store.save(std::span(keys_).first(5), *source_.paged(), iota_ids(5), {}, in(20)).wait(in(20)).ok());
  ASSERT_EQ(store.match(keys_), 5u);
  save_all(store);
  EXPECT_EQ(store.stats().blocks_saved, kBlocks);
}

TEST_F(StoreTest, SavesSlotsWithoutACopy) {
  Store store = open(plain());
  {
    auto held = slots(2);
    for (std::uint32_t i = 0; i < 2; ++i) std::memcpy(held[i].get(), image(i).data(), geometry_.block_bytes());
    ASSERT_TRUE(store.save_slots(std::span(keys_).first(2), held, {}).wait(in(20)).ok());
    EXPECT_EQ(code_of([&] { store.save_slots(std::span(keys_).first(1), held, {}); }), Code::kInvalidArgument);
  }
  EXPECT_EQ(store.match(keys_), 2u);
  EXPECT_TRUE(read_one(store, keys_[1]).ok());
  EXPECT_TRUE(all_free());
}

TEST_F(StoreTest, BadSavesChangeNothing) {
  Store store = open(plain());
  const auto refused = [&](std::size_t keys, std::vector<std::uint32_t> ids) {
    return code_of([&] { store.save(std::span(keys_).first(keys), *source_.paged(), ids, {}, in(5)); });
  };
  EXPECT_EQ(refused(2, {0}), Code::kInvalidArgument);
  EXPECT_EQ(refused(2, {0, kBlocks}), Code::kInvalidArgument);
  const KvGeometry other = small_geometry(3);
  TestCache smaller(other, 2);
  EXPECT_EQ(code_of([&] { store.save(std::span(keys_).first(1), *smaller.paged(), iota_ids(1), {}, in(5)); }),
            Code::kInvalidArgument);
  EXPECT_TRUE(files().empty());
  EXPECT_EQ(store.match(keys_), 0u);
  EXPECT_TRUE(all_free());
  EXPECT_TRUE(store.save({}, *source_.paged(), {}, {}, in(5)).wait(in(5)).ok()) << "nothing is asked";
}

TEST_F(StoreTest, ASaveThatFindsNoSlotEndsAtItsDeadline) {
  Store store = open(plain());
  const auto held = slots(kSlots);
  const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(0.05));
  EXPECT_EQ(saved.wait(in(5)).code, Code::kTimeout);
  EXPECT_EQ(pool_.stats().waiting, 0u) << "it no longer stands in line";
  EXPECT_TRUE(files().empty());
}

TEST_F(StoreTest, ConcurrentSavesOfTheSameKeys) {
  Store first = open(plain()), second = open(plain());
  std::vector<std::thread> threads;
  for (Store* store : {&first, &second}) {
    threads.emplace_back([&, store] {
      const auto saved = store->save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
      EXPECT_TRUE(saved.wait(in(20)).ok()) << saved.status().message;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(first.match(keys_), kBlocks);
  EXPECT_EQ(files().size(), kBlocks);
  EXPECT_TRUE(second.verify().bad.empty());
  EXPECT_EQ(temporary_files(), 0u);
  EXPECT_TRUE(all_free());
}

// A block that could not be published must not be followed by its children: hits are prefixes.
TEST_F(StoreTest, AFailedSaveLeavesAClosedPrefix) {
  Store store = open(plain());
  std::filesystem::create_directory(file_of(keys_[4]));  // the rename will fail
  const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
  EXPECT_EQ(saved.wait(in(20)).code, Code::kIo) << saved.status().message;
  EXPECT_NE(saved.status().message.find(keys_[4].hex()), std::string::npos) << saved.status().message;
  EXPECT_TRUE(all_free());
  EXPECT_EQ(temporary_files(), 0u);
  EXPECT_EQ(store.match(keys_), 4u);
  Store other = open(plain());
  EXPECT_EQ(other.match(keys_), 4u) << "another node, which knows nothing of the failure";
}

class Mounted {
 public:
  Mounted(const std::string& path, const char* options, unsigned long flags) : path_(path) {
    mounted_ = mount("tmpfs", path.c_str(), "tmpfs", flags, options) == 0;
  }
  ~Mounted() {
    if (mounted_) umount2(path_.c_str(), MNT_DETACH);
  }
  bool ok() const { return mounted_; }

 private:
  const std::string path_;
  bool mounted_;
};

TEST_F(StoreTest, AFullDiskFailsTheSaveAndLeavesNothingPartial) {
  std::filesystem::create_directory(root_.path() + "/kv");
  const std::string size = "size=" + std::to_string(geometry_.file_bytes() * 6 + 20000);
  const Mounted disk(root_.path() + "/kv", size.c_str(), 0);
  if (!disk.ok()) GTEST_SKIP() << "mounting a small tmpfs needs root";
  StoreOptions options = plain();
  options.direct = "auto";
  Store store = open(options);
  const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
  EXPECT_EQ(saved.wait(in(20)).code, Code::kNoSpace) << saved.status().message;
  EXPECT_TRUE(all_free());
  EXPECT_EQ(temporary_files(), 0u);
  const std::size_t stored = files().size();
  EXPECT_GT(stored, 0u);
  EXPECT_LT(stored, kBlocks);
  EXPECT_EQ(store.match(keys_), stored);
  EXPECT_TRUE(store.verify().bad.empty());
  EXPECT_GT(store.stats().save_errors, 0u);
  ASSERT_TRUE(store.remove(keys_[stored - 1]));
  const std::span<const Key> last(&keys_[stored - 1], 1);
  EXPECT_TRUE(store.save(last, *source_.paged(), iota_ids(1, static_cast<std::uint32_t>(stored) - 1), {}, in(20))
                  .wait(in(20))
                  .ok())
      << "with space again, saving goes on";
  EXPECT_EQ(store.match(keys_), stored);
}

TEST_F(StoreTest, ARootThatCanNotBeWrittenIsAnErrorThatNamesIt) {
  std::filesystem::create_directory(root_.path() + "/kv");
  const Mounted disk(root_.path() + "/kv", "size=1m", MS_RDONLY);
  if (!disk.ok()) GTEST_SKIP() << "mounting a read-only tmpfs needs root";
  try {
    open(plain());
    FAIL() << "opened";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kIo);
    EXPECT_EQ(error.os_errno(), EROFS);
    EXPECT_NE(std::string(error.what()).find(plain().root), std::string::npos) << error.what();
  }
  EXPECT_TRUE(std::filesystem::is_empty(root_.path() + "/kv"));
}

TEST_F(StoreTest, RootsThatAreNotThereAreRefused) {
  StoreOptions options = plain();
  options.root = root_.path() + "/no/parent";
  EXPECT_EQ(code_of([&] { open(options); }), Code::kIo);
  options.root = root_.path() + "/file";
  write_file(options.root, Bytes(3));
  EXPECT_EQ(code_of([&] { open(options); }), Code::kIo);
  EXPECT_EQ(read_file(options.root).size(), 3u);
  options.root = "";
  EXPECT_EQ(code_of([&] { open(options); }), Code::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(root_.path() + "/no"));
}

TEST_F(StoreTest, BadOptionsAreRefusedBeforeAnythingIsCreated) {
  const auto refused = [&](auto change) {
    StoreOptions options = plain();
    change(options);
    return code_of([&] { open(options); });
  };
  EXPECT_EQ(refused([](auto& o) { o.backend = "tape"; }), Code::kInvalidArgument);
  EXPECT_EQ(refused([](auto& o) { o.direct = "maybe"; }), Code::kInvalidArgument);
  EXPECT_EQ(refused([](auto& o) { o.depth = 4097; }), Code::kInvalidArgument);
  EXPECT_EQ(refused([](auto& o) { o.save_queue = 0; }), Code::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(plain().root));
}

TEST_F(StoreTest, AnotherGeometryInTheSameNamespaceIsRefused) {
  Store store = open(plain());
  save_all(store);
  const auto before = files();
  const KvGeometry other({100}, 16, geometry_.namespace_name());
  const StagingPool pool(other, staging(other, 2));
  EXPECT_EQ(code_of([&] { Store(other, plain(), pool); }), Code::kInvalidArgument);
  EXPECT_EQ(temporary_files(), 0u);
  EXPECT_EQ(store.match(keys_), kBlocks);
  EXPECT_TRUE(files() == before);
}

TEST_F(StoreTest, APoolOfOtherSlotsIsRefusedBeforeAnythingIsCreated) {
  const KvGeometry other({100}, 16, "other");
  EXPECT_EQ(code_of([&] { Store(other, plain(), pool_); }), Code::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(plain().root));
}

TEST_F(StoreTest, BlocksOfManyLayersComeBack) {
  // 244 layers fill the trailer's first page to the last byte.
  for (const std::uint32_t layers : {1u, 243u, 244u, 245u, 500u}) {
    const KvGeometry geometry(std::vector<std::uint64_t>(layers, 64), 16, "layers " + std::to_string(layers));
    StagingPool pool(geometry, staging(geometry, 2));
    Store store(geometry, plain(), pool);
    TestCache cache(geometry, 1);
    cache.fill(0, 5);
    ASSERT_TRUE(store.save({keys_.data(), 1}, *cache.paged(), iota_ids(1), {}, in(20)).wait(in(20)).ok());
    const std::vector<Slot> into = {pool.try_acquire(SlotUse::kTransit)};
    const Status status = store.read({keys_.data(), 1}, into, {0, layers}, in(20)).wait(in(20));
    EXPECT_TRUE(status.ok()) << layers << " layers: " << status.message;
  }
}

}  // namespace
}  // namespace dualkv::testing
