// What is stored: hits, removal, quarantine, leftovers of crashes, and eviction under a quota.
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "base/fd.h"
#include "storage/store_state.h"
#include "store_support.h"

namespace dualkv::testing {
namespace {

class BlockDirectoryTest : public StoreTest {
 protected:
  // Saves one block under `key`, last used `age` seconds ago.
  void save_aged(Store& store, const Key& key, const Key& parent, double age) {
    ASSERT_TRUE(store.save({&key, 1}, *source_.paged(), iota_ids(1), parent, in(20)).wait(in(20)).ok());
    set_age(file_of(key), age);
  }
  // Saves all blocks by a store that is gone, last used long ago.
  void save_unused(const StoreOptions& options) {
    {
      Store store = open(options);
      save_all(store);
    }
    for (const Key& key : keys_) set_age(file_of(key), 5000);
  }
  bool stored(const Key& key) const { return std::filesystem::exists(file_of(key)); }
  std::uint64_t quota(std::uint64_t blocks) const { return blocks * geometry_.file_bytes(); }
};

TEST_F(BlockDirectoryTest, TheHitIsTheLongestStoredPrefix) {
  for (std::uint32_t stored = 0; stored <= kBlocks; ++stored) {
    Store store = open(plain());
    if (stored > 0) {
      const auto saved =
          store.save(std::span(keys_).first(stored), *source_.paged(), iota_ids(stored), {}, in(20)).wait(in(20));
      ASSERT_TRUE(saved.ok());
    }
    EXPECT_EQ(store.match(keys_), stored);
    for (std::uint32_t asked = 0; asked <= kBlocks; ++asked) {
      EXPECT_EQ(store.match(std::span(keys_).first(asked)), std::min(asked, stored)) << asked;
    }
  }
}

TEST_F(BlockDirectoryTest, WhatASecondStoreSavesIsAHitOfTheFirst) {
  Store first = open(plain()), second = open(plain());
  EXPECT_EQ(first.match(keys_), 0u);
  save_all(second);
  EXPECT_EQ(first.match(keys_), kBlocks);
  EXPECT_TRUE(first.contains(keys_[11]));
}

TEST_F(BlockDirectoryTest, ARemovedBlockCutsTheHitWhereverItWas) {
  for (std::uint32_t gone = 0; gone < kBlocks; ++gone) {
    Store store = open(plain());
    save_all(store);
    EXPECT_TRUE(store.remove(keys_[gone]));
    EXPECT_FALSE(store.remove(keys_[gone]));
    EXPECT_FALSE(store.contains(keys_[gone]));
    EXPECT_EQ(store.match(keys_), gone) << "blocks that continue it are unreachable";
    EXPECT_EQ(files().size(), kBlocks - 1);
    save_all(store);  // heals
  }
}

TEST_F(BlockDirectoryTest, ABlockRemovedByAnotherNodeIsMissedAfterItsReadFailed) {
  Store store = open(plain()), other = open(plain());
  save_all(store);
  ASSERT_TRUE(other.remove(keys_[3]));
  EXPECT_EQ(read_one(store, keys_[3]).code, Code::kNotFound);
  EXPECT_EQ(store.match(keys_), 3u);
  save_all(store);
}

TEST_F(BlockDirectoryTest, AQuarantinedBlockIsAMissForEveryNodeUntilSavedAgain) {
  Store store = open(plain()), other = open(plain());
  save_all(store);
  Bytes bytes = read_file(file_of(keys_[11]));
  bytes[100] ^= std::byte{1};
  write_file(file_of(keys_[11]), bytes);
  EXPECT_EQ(read_one(store, keys_[11]).code, Code::kCorrupt);
  EXPECT_EQ(store.match(keys_), 11u);
  EXPECT_TRUE(store.quarantine(keys_[11]));
  EXPECT_FALSE(store.quarantine(keys_[11]));
  EXPECT_EQ(other.match(keys_), 11u);
  EXPECT_FALSE(stored(keys_[11]));
  const std::string path = file_of(keys_[11]);
  EXPECT_EQ(read_file(path.substr(0, path.size() - 3) + ".corrupt"), bytes) << "kept for whoever wants to look";
  save_all(store);
  EXPECT_EQ(other.match(keys_), kBlocks);
  EXPECT_TRUE(read_one(store, keys_[11]).ok());
  EXPECT_TRUE(store.verify().bad.empty());
}

TEST_F(BlockDirectoryTest, AForgottenBlockComesBackAfterItsTime) {
  StoreOptions options = plain();
  options.forget_s = 0.05;
  Store store = open(options);
  save_all(store);
  store.state().directory().forget(keys_[2]);
  EXPECT_TRUE(eventually([&] { return store.match(keys_) == kBlocks; }));
  StoreOptions longer = plain();
  longer.forget_s = 3600;
  Store patient = open(longer);
  patient.state().directory().forget(keys_[2]);
  EXPECT_EQ(patient.match(keys_), 2u);
  patient.state().directory().learn(keys_[2]);
  EXPECT_EQ(patient.match(keys_), kBlocks);
}

TEST_F(BlockDirectoryTest, VerifyNamesBadBlocks) {
  Store store = open(plain());
  save_all(store);
  Bytes bytes = read_file(file_of(keys_[4]));
  bytes[1] ^= std::byte{1};
  write_file(file_of(keys_[4]), bytes);
  bytes.resize(5000);
  write_file(file_of(keys_[9]), bytes);
  const auto before = files();
  const VerifyReport report = store.verify();
  EXPECT_EQ(report.blocks, kBlocks);
  ASSERT_EQ(report.bad.size(), 2u);
  const std::string both = report.bad[0] + report.bad[1];
  EXPECT_NE(both.find(keys_[4].hex()), std::string::npos) << both;
  EXPECT_NE(both.find(keys_[9].hex()), std::string::npos) << both;
  EXPECT_TRUE(files() == before);
}

TEST_F(BlockDirectoryTest, LeftoversOfACrashAreNoHitAndAreCollectedWhenStale) {
  Store store = open(plain());
  save_all(store);
  const Bytes whole = read_file(file_of(keys_[0]));
  for (const Key& key : keys_) ASSERT_TRUE(store.remove(key));
  const std::string stale = space() + "/tmp/00000000000000aa", fresh = space() + "/tmp/00000000000000bb";
  write_file(stale, whole);  // all written, not yet renamed
  write_file(fresh, Bytes(whole.begin(), whole.begin() + 5000));
  set_age(stale, 2 * 3600);
  Store restarted = open(plain());
  EXPECT_EQ(restarted.match(keys_), 0u);
  EXPECT_EQ(restarted.verify().blocks, 0u);
  ASSERT_EQ(restarted.collect(quota(100)), 0u);
  EXPECT_FALSE(std::filesystem::exists(stale));
  EXPECT_TRUE(std::filesystem::exists(fresh)) << "its writer may be at work";
}

TEST_F(BlockDirectoryTest, StrangeFilesAreLeftAlone) {
  Store store = open(plain());
  save_all(store);
  const std::string folder = file_of(keys_[0]).substr(0, file_of(keys_[0]).rfind('/'));
  for (const char* name : {"/.kv", "/zz.kv", "/abc.kv", "/README", "/\xff\xfe.kv", "/ABCD.kv"}) {
    write_file(folder + name, Bytes(10));
  }
  EXPECT_EQ(store.verify().blocks, kBlocks);
  EXPECT_EQ(store.collect(0), kBlocks);
  EXPECT_EQ(files().size(), 4u);
}

// a0 - a1 - { b0 - b1, c0 - c1 }, b used before c, and a before both although every use of b or c is one of a.
TEST_F(BlockDirectoryTest, EvictsByLastUseAndChildrenBeforeParents) {
  Store store = open(plain());
  const Key &a0 = keys_[0], &a1 = keys_[1], &b0 = keys_[2], &b1 = keys_[3], &c0 = keys_[4], &c1 = keys_[5];
  save_aged(store, a0, {}, 9000);
  save_aged(store, a1, a0, 8000);
  save_aged(store, b0, a1, 7000);
  save_aged(store, b1, b0, 6000);
  save_aged(store, c0, a1, 5000);
  save_aged(store, c1, c0, 4000);
  const std::vector<const Key*> order = {&b1, &b0, &c1, &c0, &a1, &a0};
  for (std::size_t i = 0; i < order.size(); ++i) {
    for (std::size_t j = 0; j < order.size(); ++j) EXPECT_EQ(stored(*order[j]), j >= i) << i << " " << j;
    EXPECT_EQ(store.collect(quota(order.size() - i)), 0u) << "within the quota nothing goes";
    EXPECT_EQ(store.collect(quota(order.size() - i - 1)), 1u);
  }
  EXPECT_TRUE(files().empty());
}

TEST_F(BlockDirectoryTest, OneCollectionGoesUpATreeAsItsLeavesFall) {
  Store store = open(plain());
  Key parent;
  for (std::uint32_t i = 0; i < 6; ++i) {  // an old chain
    save_aged(store, keys_[i], parent, 9000 - i);
    parent = keys_[i];
  }
  for (std::uint32_t i = 6; i < kBlocks; ++i) save_aged(store, keys_[i], keys_[0], 1000 - i);  // young siblings
  EXPECT_EQ(store.collect(quota(7)), 5u);
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_EQ(stored(keys_[i]), i == 0 || i >= 6) << i;
}

TEST_F(BlockDirectoryTest, UseRenewsABlock) {
  Store store = open(plain());
  save_aged(store, keys_[0], {}, 9000);
  save_aged(store, keys_[6], {}, 8000);
  EXPECT_EQ(store.match(std::span(keys_).first(1)), 1u);
  const auto used_now = [&] {
    struct stat info;
    return stat(file_of(keys_[0]).c_str(), &info) == 0 && time(nullptr) - info.st_mtim.tv_sec < 1000;
  };
  ASSERT_TRUE(eventually(used_now));
  EXPECT_EQ(store.collect(quota(1)), 1u);
  EXPECT_TRUE(stored(keys_[0]));
  EXPECT_FALSE(stored(keys_[6]));
}

// The mark on disk comes later, behind a save.
TEST_F(BlockDirectoryTest, AHitIsNotEvictedBeforeItsUseIsOnDisk) {
  StoreOptions options = plain();
  options.in_use_grace_s = 600;
  save_unused(options);
  Store store = open(options);
  BlockDirectory& directory = store.state().directory();
  ASSERT_EQ(directory.match(std::span(keys_).first(4)), 4u);
  EXPECT_EQ(store.collect(0), kBlocks - 4);
  EXPECT_EQ(directory.match(keys_), 4u);
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_EQ(stored(keys_[i]), i < 4) << i;
}

TEST_F(BlockDirectoryTest, AHitAndAnEvictionNeverGetTheSameBlock) {
  StoreOptions options = plain();
  options.in_use_grace_s = 600;
  for (int round = 0; round < 20; ++round) {
    save_unused(options);
    Store store = open(options);
    BlockDirectory& directory = store.state().directory();
    std::atomic<bool> go{false};
    std::thread collector([&] {
      while (!go) std::this_thread::yield();
      store.collect(0);
    });
    go = true;
    std::size_t hit = 0;
    for (int i = 0; i < 50 && hit == 0; ++i) hit = directory.match(keys_);
    collector.join();
    for (std::size_t i = 0; i < hit; ++i) EXPECT_TRUE(stored(keys_[i])) << i << " of " << hit;
    std::filesystem::remove_all(options.root);
  }
}

TEST_F(BlockDirectoryTest, NeverEvictsWhatWasUsedWithinTheGraceOrItsAncestors) {
  StoreOptions options = plain();
  options.in_use_grace_s = 600;
  Store store = open(options);
  save_aged(store, keys_[0], {}, 9000);
  save_aged(store, keys_[1], keys_[0], 60);
  save_aged(store, keys_[5], {}, 9000);
  EXPECT_EQ(store.collect(0), 1u);
  EXPECT_TRUE(stored(keys_[0]) && stored(keys_[1]));
  EXPECT_FALSE(stored(keys_[5]));
}

TEST_F(BlockDirectoryTest, NeverEvictsAPinnedBlockOrItsAncestors) {
  Store store = open(plain());
  save_all(store);
  for (const Key& key : keys_) set_age(file_of(key), 5000);
  store.state().directory().pin(keys_[7]);
  store.state().directory().pin(keys_[7]);
  store.state().directory().unpin(keys_[7]);
  EXPECT_EQ(store.collect(0), 4u);
  for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_EQ(stored(keys_[i]), i < 8) << i;
  store.state().directory().unpin(keys_[7]);
  EXPECT_EQ(store.collect(0), 8u);
}

TEST_F(BlockDirectoryTest, NeverEvictsABlockBeingRead) {
  {
    Store writer = open(plain());
    save_all(writer);
  }
  StoreOptions options = plain();
  options.faults.drop_rate = 1;  // the read stays in flight
  Store store = open(options);
  const auto into = slots(1);
  const Operation read = store.read({&keys_[5], 1}, into, all_layers(), in(600));
  store.state().progress().run([] {});  // the read has been submitted
  ASSERT_TRUE(eventually([&] {
    store.collect(0);
    return files().size() <= 6;
  }));
  EXPECT_EQ(store.collect(0), 0u);
  EXPECT_TRUE(stored(keys_[5]));
  EXPECT_FALSE(read.done());
}

TEST_F(BlockDirectoryTest, OneCollectorAtATime) {
  Store store = open(plain());
  save_all(store);
  {
    const Fd lease(::open((space() + "/tmp/.collector").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    ASSERT_EQ(flock(lease.get(), LOCK_EX | LOCK_NB), 0);
    EXPECT_EQ(store.collect(0), std::nullopt);
    EXPECT_EQ(files().size(), kBlocks);
  }
  EXPECT_EQ(store.collect(0), kBlocks) << "the lease outlives no holder";
}

TEST_F(BlockDirectoryTest, SavingKeepsWithinTheQuota) {
  StoreOptions options = plain();
  options.quota_bytes = quota(5);
  Store store = open(options);
  const auto saved = store.save(keys_, *source_.paged(), iota_ids(kBlocks), {}, in(20));
  ASSERT_TRUE(saved.wait(in(20)).ok()) << saved.status().message;
  EXPECT_EQ(files().size(), 5u);
  EXPECT_EQ(store.match(keys_), 5u) << "what is left is a prefix";
  EXPECT_EQ(store.stats().blocks_evicted, kBlocks - 5);
  EXPECT_TRUE(all_free());
}

}  // namespace
}  // namespace dualkv::testing
