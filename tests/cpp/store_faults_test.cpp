// Reads that go wrong: every kind of injected fault, deadlines, quarantined slots, and stores that go away.
#include "store_support.h"

namespace dualkv::testing {
namespace {

class StoreFaults : public StoreTest, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    Store writer = open(plain());
    save_all(writer);
    before_ = files();
    try {
      open(faulty({}));
    } catch (const Error& error) {
      if (error.code() != Code::kUnsupported) throw;
      GTEST_SKIP() << error.what();
    }
  }
  StoreOptions faulty(const ReadFaults& faults) const {
    StoreOptions options = plain();
    find_usrbio();
    options.backend = GetParam();
    options.faults = faults;
    return options;
  }
  static ReadFaults fault(double ReadFaults::* rate, double value = 1) {
    ReadFaults faults;
    faults.seed = 17;
    faults.*rate = value;
    return faults;
  }
  // One letter a read: ok, io, corrupt.
  std::string outcomes(const ReadFaults& faults, int reads) {
    StoreOptions options = faulty(faults);
    options.depth = 1;
    Store store = open(options);
    std::string out;
    for (int i = 0; i < reads; ++i) {
      const Code code = read_one(store, keys_[static_cast<std::size_t>(i) % kBlocks]).code;
      out += code == Code::kOk ? '.' : code == Code::kIo ? 'i' : code == Code::kCorrupt ? 'c' : '?';
    }
    return out;
  }
  void expect_nothing_changed() {
    EXPECT_TRUE(all_free());
    EXPECT_TRUE(files() == before_);
  }

  std::map<std::string, Bytes> before_;
};

TEST_P(StoreFaults, AnErrorIsReportedWithItsErrno) {
  Store store = open(faulty(fault(&ReadFaults::error_rate)));
  const Status status = read_one(store, keys_[3]);
  EXPECT_EQ(status.code, Code::kIo);
  EXPECT_EQ(status.os_errno, EIO);
  EXPECT_NE(status.message.find(keys_[3].hex()), std::string::npos) << status.message;
  EXPECT_EQ(store.stats().read_errors, 1u);
  expect_nothing_changed();
  EXPECT_EQ(store.match(keys_), 3u) << "a block whose read failed lately counts as missing";
  Store other = open(plain());
  EXPECT_EQ(other.match(keys_), kBlocks) << "for this node only";
}

TEST_P(StoreFaults, AShortReadIsCorrupt) {
  Store store = open(faulty(fault(&ReadFaults::short_rate)));
  EXPECT_EQ(read_one(store, keys_[3]).code, Code::kCorrupt);
  EXPECT_EQ(store.stats().blocks_corrupt, 1u);
  EXPECT_EQ(store.match(keys_), 3u);
  expect_nothing_changed();
}

TEST_P(StoreFaults, AFlippedBitIsCaughtInEveryLayerRange) {
  Store store = open(faulty(fault(&ReadFaults::corrupt_rate)));
  for (std::uint32_t first = 0; first < geometry_.layers(); ++first) {
    for (std::uint32_t count = 1; first + count <= geometry_.layers(); ++count) {
      for (int i = 0; i < 5; ++i) EXPECT_EQ(read_one(store, keys_[7], LayerRange{first, count}).code, Code::kCorrupt);
    }
  }
  expect_nothing_changed();
}

TEST_P(StoreFaults, ADelayChangesNothingButTheTime) {
  ReadFaults faults = fault(&ReadFaults::delay_rate);
  faults.delay_s = 0.01;
  Store store = open(faulty(faults));
  {
    const auto into = slots(kBlocks);
    const Status status = store.read(keys_, into, all_layers(), in(20)).wait(in(20));
    ASSERT_TRUE(status.ok()) << status.message;
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(slot_holds(into[i], i, all_layers())) << i;
  }
  expect_nothing_changed();
}

TEST_P(StoreFaults, SeededFaultsAreTheSameEveryTime) {
  ReadFaults faults;
  faults.error_rate = 0.2;
  faults.short_rate = 0.2;
  faults.corrupt_rate = 0.2;
  faults.seed = 1;
  const std::string first = outcomes(faults, 60);
  EXPECT_EQ(outcomes(faults, 60), first);
  for (const char kind : {'.', 'i', 'c'}) EXPECT_NE(first.find(kind), std::string::npos) << first;
  EXPECT_EQ(first.find('?'), std::string::npos) << first;
  faults.seed = 2;
  EXPECT_NE(outcomes(faults, 60), first);
  expect_nothing_changed();
}

TEST_P(StoreFaults, AReadThatNeverAnswersEndsAtItsDeadlineAndItsSlotsAreQuarantined) {
  {
    Store store = open(faulty(fault(&ReadFaults::drop_rate)));
    {
      const auto into = slots(4);
      const Operation read = store.read(std::span(keys_).first(4), into, all_layers(), in(0.1));
      EXPECT_EQ(read.wait(in(20)).code, Code::kTimeout) << read.status().message;
    }
    EXPECT_EQ(pool_.stats().free_slots, kSlots - 4) << "storage may still write to them";
    const auto rest = slots(kSlots - 4);
    EXPECT_EQ(pool_.try_acquire(SlotUse::kTransit), nullptr);
    EXPECT_EQ(store.match(keys_), kBlocks) << "no block is known to be bad";
  }
  expect_nothing_changed();  // with the reader gone, nothing can write to them
}

TEST_P(StoreFaults, EachReadEndsAtItsOwnDeadline) {
  StoreOptions options = faulty(fault(&ReadFaults::drop_rate));
  options.depth = 1;
  Store store = open(options);
  const auto into = slots(3);
  const Operation patient = store.read(std::span(keys_).first(1), {into.data(), 1}, all_layers(), in(600));
  const Operation behind = store.read(std::span(keys_).subspan(1, 2), {into.data() + 1, 2}, all_layers(), in(0.1));
  EXPECT_EQ(behind.wait(in(20)).code, Code::kTimeout);
  EXPECT_FALSE(patient.done());
}

TEST_P(StoreFaults, ADeadlineInThePastEndsTheReadAndReadsMayFollow) {
  Store store = open(faulty({}));
  {
    const auto into = slots(2);
    const Operation late = store.read(std::span(keys_).first(2), into, all_layers(), in(-1));
    const Code code = late.wait(in(20)).code;
    EXPECT_TRUE(code == Code::kTimeout || code == Code::kOk) << to_string(code);
  }
  EXPECT_TRUE(read_one(store, keys_[0]).ok());
  expect_nothing_changed();
}

TEST_P(StoreFaults, AStoreThatGoesAwayEndsItsReads) {
  Operation dropped, waiting;
  {
    StoreOptions options = faulty(fault(&ReadFaults::drop_rate));
    options.depth = 1;
    Store store = open(options);
    const auto into = slots(2);
    dropped = store.read(std::span(keys_).first(1), {into.data(), 1}, all_layers(), in(0.3));
    waiting = store.read(std::span(keys_).subspan(1, 1), {into.data() + 1, 1}, all_layers(), in(0.3));
    ASSERT_TRUE(eventually([&] { return store.stats().read_queue_bytes == 2 * geometry_.block_bytes(); }));
  }
  for (const Operation& read : {dropped, waiting}) {
    EXPECT_EQ(read.wait(in(2)).code, Code::kCancelled) << read.status().message;
    EXPECT_TRUE(read.done()) << "every handle ends by its deadline, whatever dies";
  }
  expect_nothing_changed();
}

// The last handle may be dropped at any instant of a read, also while the progress thread is about to start it.
TEST_P(StoreFaults, TheStoreMayGoAwayAtAnyInstant) {
  for (int round = 0; round < 100; ++round) {
    const auto into = slots(4);
    {
      Store store = open(faulty({}));
      store.read(std::span(keys_).first(4), into, all_layers(), in(5));
      if (round % 2 == 0) std::this_thread::yield();
    }
  }
  expect_nothing_changed();
}

INSTANTIATE_TEST_SUITE_P(Backends, StoreFaults, ::testing::Values("pread", "uring", "usrbio"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace dualkv::testing
