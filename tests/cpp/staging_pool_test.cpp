// StagingPool: fairness, the prompts' share, withdrawal, and memory that outlives the handle.
#include <fcntl.h>
#include <sys/stat.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>

#include "support.h"

namespace dualkv::testing {
namespace {

class StagingPoolTest : public ::testing::Test {
 protected:
  StagingPool make(std::uint32_t slots, double transit_share = 0.25) {
    StagingOptions options;
    options.bytes = geometry_.file_bytes() * slots;
    options.transit_share = transit_share;
    options.lock_memory = false;
    options.huge_pages = false;
    return StagingPool(geometry_, options);
  }
  // Keeps what an acquire got; `calls` must end at 1.
  struct Got {
    int calls = 0;
    std::vector<Slot> slots;
  };
  static StagingPool::Acquired into(Got& got) {
    return [&got](std::vector<Slot> slots) {
      ++got.calls;
      got.slots = std::move(slots);
    };
  }
  static std::vector<Slot> take(StagingPool& pool, std::uint32_t count, SlotUse use = SlotUse::kTransit) {
    Got got;
    pool.acquire(count, use, into(got));
    EXPECT_EQ(got.slots.size(), count);
    return got.slots;
  }

  const KvGeometry geometry_ = small_geometry();
};

TEST_F(StagingPoolTest, SlotsArePageAlignedDisjointAndInside) {
  StagingPool pool = make(8);
  EXPECT_EQ(pool.slot_bytes(), geometry_.file_bytes());
  std::set<std::byte*> starts;
  const auto slots = take(pool, 8);
  for (const Slot& slot : slots) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slot.get()) % KvGeometry::kPageBytes, 0u);
    EXPECT_GE(slot.get(), pool.memory().data());
    EXPECT_LE(slot.get() + pool.slot_bytes(), pool.memory().data() + pool.memory().size());
    EXPECT_EQ((slot.get() - pool.memory().data()) % static_cast<std::ptrdiff_t>(pool.slot_bytes()), 0);
    starts.insert(slot.get());
  }
  EXPECT_EQ(starts.size(), 8u);
}

TEST_F(StagingPoolTest, TheLastCopyFreesASlot) {
  StagingPool pool = make(2);
  Slot first = pool.try_acquire(SlotUse::kTransit);
  Slot copy = first;
  first.reset();
  EXPECT_EQ(pool.stats().free_slots, 1u);
  copy.reset();
  EXPECT_EQ(pool.stats().free_slots, 2u);
}

TEST_F(StagingPoolTest, WaitersAreServedInOrderAllOrNothing) {
  StagingPool pool = make(4);
  auto held = take(pool, 4);
  Got large, small;
  pool.acquire(3, SlotUse::kTransit, into(large));
  pool.acquire(1, SlotUse::kTransit, into(small));
  EXPECT_EQ(pool.stats().waiting, 2u);
  held.pop_back();
  held.pop_back();
  EXPECT_EQ(large.calls + small.calls, 0) << "two are free; the first in line wants three, and none may pass it";
  EXPECT_EQ(pool.stats().free_slots, 2u) << "nothing is held back for a waiter";
  EXPECT_EQ(pool.try_acquire(SlotUse::kTransit), nullptr) << "nor may a newcomer pass it";
  held.pop_back();
  EXPECT_EQ(large.slots.size(), 3u);
  EXPECT_EQ(small.calls, 0);
  held.clear();
  EXPECT_EQ(small.slots.size(), 1u);
  EXPECT_EQ(large.calls, 1);
  EXPECT_EQ(small.calls, 1);
  large.slots.clear();
  small.slots.clear();
  EXPECT_EQ(pool.stats().free_slots, 4u);
}

TEST_F(StagingPoolTest, OneFreedSlotServesEveryWaiterThatFits) {
  StagingPool pool = make(4);
  auto held = take(pool, 4);
  Got first, second;
  pool.acquire(2, SlotUse::kTransit, into(first));
  pool.acquire(2, SlotUse::kTransit, into(second));
  held.clear();
  EXPECT_EQ(first.slots.size(), 2u);
  EXPECT_EQ(second.slots.size(), 2u);
}

TEST_F(StagingPoolTest, PromptsLeaveTheTransitShare) {
  StagingPool pool = make(8);
  EXPECT_EQ(pool.stats().prompt_limit, 6u);
  auto prompts = take(pool, 6, SlotUse::kPrompt);
  EXPECT_EQ(pool.stats().prompt_slots, 6u);
  EXPECT_EQ(pool.try_acquire(SlotUse::kPrompt), nullptr);
  EXPECT_EQ(pool.stats().free_slots, 2u);
  Got waiting;
  pool.acquire(1, SlotUse::kPrompt, into(waiting));
  EXPECT_EQ(waiting.calls, 0);
  auto transit = take(pool, 2);  // reads go on although prompts wait
  transit.clear();
  EXPECT_EQ(waiting.calls, 0) << "a transit slot is never given to a prompt beyond the limit";
  prompts.pop_back();
  EXPECT_EQ(waiting.slots.size(), 1u);
  EXPECT_EQ(pool.stats().prompt_slots, 6u);
}

TEST_F(StagingPoolTest, TransitMayUseTheWholePool) {
  StagingPool pool = make(4);
  EXPECT_EQ(take(pool, 4).size(), 4u);
}

TEST_F(StagingPoolTest, TheShareIsAtLeastOneSlotAndNeverAll) {
  EXPECT_EQ(make(4, 0).stats().prompt_limit, 3u);
  EXPECT_EQ(make(4, 1).stats().prompt_limit, 1u);
  EXPECT_EQ(make(2, 0.5).stats().prompt_limit, 1u);
}

TEST_F(StagingPoolTest, ImpossibleRequestsAreRefusedWithNothingTaken) {
  StagingPool pool = make(8);
  Got got;
  const auto refused = [&](std::uint32_t count, SlotUse use) {
    return code_of([&] { pool.acquire(count, use, into(got)); });
  };
  EXPECT_EQ(refused(0, SlotUse::kTransit), Code::kInvalidArgument);
  EXPECT_EQ(refused(9, SlotUse::kTransit), Code::kInvalidArgument);
  EXPECT_EQ(refused(7, SlotUse::kPrompt), Code::kInvalidArgument);
  EXPECT_EQ(refused(~0u, SlotUse::kPrompt), Code::kInvalidArgument);
  EXPECT_EQ(got.calls, 0);
  EXPECT_EQ(pool.stats().free_slots, 8u);
  EXPECT_EQ(pool.stats().waiting, 0u);
}

TEST_F(StagingPoolTest, ImpossiblePoolsAreRefused) {
  EXPECT_EQ(code_of([&] { make(0); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { make(1); }), Code::kInvalidArgument);
  for (const double share : {-0.01, 1.01, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_EQ(code_of([&] { make(4, share); }), Code::kInvalidArgument) << share;
  }
  // More than an address space.
  const KvGeometry huge(std::vector<std::uint64_t>(64, KvGeometry::kMaxLayerBytes), 16, "x");
  StagingOptions options;
  options.bytes = std::uint64_t{1} << 60;
  EXPECT_EQ(code_of([&] { StagingPool(huge, options); }), Code::kNoSpace);
}

TEST_F(StagingPoolTest, WithdrawEndsAWaiterOnceAndLetsTheNextPass) {
  StagingPool pool = make(4);
  auto held = take(pool, 3);
  Got large, small;
  const auto ticket = pool.acquire(4, SlotUse::kTransit, into(large));
  pool.acquire(1, SlotUse::kTransit, into(small));
  EXPECT_EQ(small.calls, 0);
  pool.withdraw(ticket);
  EXPECT_EQ(large.calls, 1);
  EXPECT_TRUE(large.slots.empty());
  EXPECT_EQ(small.slots.size(), 1u) << "it stood behind, and fits";
  pool.withdraw(ticket);
  held.clear();
  EXPECT_EQ(large.calls, 1);
  EXPECT_EQ(pool.stats().free_slots, 3u);
  EXPECT_EQ(pool.stats().waiting, 0u);
}

TEST_F(StagingPoolTest, WithdrawAfterServingDoesNothing) {
  StagingPool pool = make(4);
  Got got;
  const auto ticket = pool.acquire(2, SlotUse::kPrompt, into(got));
  pool.withdraw(ticket);
  pool.withdraw(ticket + 1000);
  EXPECT_EQ(got.calls, 1);
  EXPECT_EQ(got.slots.size(), 2u);
  EXPECT_EQ(pool.stats().free_slots, 2u);
}

TEST_F(StagingPoolTest, SlotsOutliveThePool) {
  std::vector<Slot> slots;
  Got waiting;
  {
    StagingPool pool = make(3);
    slots = take(pool, 3);
    pool.acquire(2, SlotUse::kTransit, into(waiting));
  }
  for (const Slot& slot : slots) std::memset(slot.get(), 0x5a, geometry_.file_bytes());
  slots.resize(1);
  EXPECT_EQ(waiting.slots.size(), 2u) << "who waits is served although the handle is gone";
  for (const Slot& slot : waiting.slots) EXPECT_EQ(slot.get()[geometry_.file_bytes() - 1], std::byte{0x5a});
}

TEST_F(StagingPoolTest, TheListenerHearsOfSlotsNobodyTook) {
  StagingPool pool = make(2);
  int heard = 0;
  pool.on_free([&heard] { ++heard; });
  auto held = take(pool, 2);
  Got waiting;
  pool.acquire(1, SlotUse::kTransit, into(waiting));
  held.pop_back();
  EXPECT_EQ(waiting.slots.size(), 1u);
  const int before = heard;
  waiting.slots.clear();
  EXPECT_GT(heard, before);
  pool.on_free(nullptr);
  held.clear();
  EXPECT_EQ(pool.stats().free_slots, 2u);
}

TEST_F(StagingPoolTest, ACallbackMayFreeItsSlotsAtOnce) {
  StagingPool pool = make(2);
  auto held = take(pool, 2);
  int served = 0;
  for (int i = 0; i < 200; ++i) {
    pool.acquire(1 + i % 2, SlotUse::kTransit, [&served](std::vector<Slot> slots) { served += !slots.empty(); });
  }
  held.clear();
  EXPECT_EQ(served, 200);
  EXPECT_EQ(pool.stats().free_slots, 2u);
}

// One acquire from start to end. Slots are marked, so that two owners of one slot are seen.
struct Rendezvous {
  std::mutex mutex;
  std::condition_variable changed;
  int calls = 0;
  std::vector<Slot> slots;
};

std::vector<Slot> acquire_or_withdraw(StagingPool& pool, std::uint32_t count, SlotUse use, bool withdraw) {
  const auto meet = std::make_shared<Rendezvous>();
  const auto ticket = pool.acquire(count, use, [meet](std::vector<Slot> slots) {
    const std::lock_guard lock(meet->mutex);
    ++meet->calls;
    meet->slots = std::move(slots);
    meet->changed.notify_all();
  });
  if (withdraw) pool.withdraw(ticket);
  std::unique_lock lock(meet->mutex);
  EXPECT_TRUE(meet->changed.wait_until(lock, in(30), [&] { return meet->calls > 0; })) << "neither served nor ended";
  EXPECT_EQ(meet->calls, 1);
  return std::move(meet->slots);
}

TEST_F(StagingPoolTest, ManyThreads) {
  StagingPool pool = make(8);
  std::atomic<int> shared_slots{0};
  std::vector<std::thread> threads;
  for (std::uint32_t thread = 0; thread < 6; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      for (int round = 0; round < 400; ++round) {
        const auto use = random() % 2 == 0 ? SlotUse::kPrompt : SlotUse::kTransit;
        const std::uint32_t count = 1 + random() % 6;
        const auto slots = acquire_or_withdraw(pool, count, use, random() % 4 == 0);
        EXPECT_TRUE(slots.empty() || slots.size() == count);
        for (const Slot& slot : slots) std::memset(slot.get(), static_cast<int>(thread + 1), 64);
        std::this_thread::yield();
        for (const Slot& slot : slots) shared_slots += slot.get()[63] != static_cast<std::byte>(thread + 1);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(shared_slots, 0);
  EXPECT_EQ(pool.stats().free_slots, 8u);
  EXPECT_EQ(pool.stats().prompt_slots, 0u);
  EXPECT_EQ(pool.stats().waiting, 0u);
}

// --- prepared in chunks

class PreparedPoolTest : public StagingPoolTest {
 protected:
  static constexpr std::uint64_t kChunk = std::uint64_t{2} << 20;  // the smallest there is

  // Locks memory; where the machine's limit is lower, it is refused and still prepared.
  StagingOptions chunked(std::uint64_t bytes) {
    StagingOptions options;
    options.bytes = bytes;
    options.huge_pages = false;
    options.chunk_bytes = kChunk;
    return options;
  }
  static bool all_ready(const StagingPool& pool) {
    return eventually([&] { return pool.stats().ready_chunks == pool.stats().chunks; });
  }
  static void expect_consistent(const StagingPool& pool, const StagingOptions& options) {
    const StagingStats stats = pool.stats();
    EXPECT_LE(stats.ready_chunks, stats.chunks);
    EXPECT_LE(stats.free_slots, stats.slots);
    EXPECT_LE(stats.free_slots * pool.slot_bytes(), pool.ready_bytes());
    EXPECT_LE(stats.locked_bytes, stats.ready_chunks * options.chunk_bytes);
    EXPECT_GE(stats.prepare_s, 0);
    EXPECT_TRUE(options.lock_limit_bytes == 0 || stats.locked_bytes <= options.lock_limit_bytes);
  }
  static std::size_t threads() {
    std::size_t count = 0;
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) count += task.exists();
    return count;
  }
};

TEST_F(PreparedPoolTest, ChunksOfEverySizeMakeEverySlotAvailable) {
  const KvGeometry large(std::vector<std::uint64_t>(3, std::uint64_t{1} << 20), 16, "slots larger than a chunk");
  for (const KvGeometry& geometry : {geometry_, large}) {
    for (const std::uint64_t chunk : {std::uint64_t{1}, kChunk, 3 * kChunk, std::uint64_t{1} << 40}) {
      for (const std::uint32_t threads : {1u, 8u}) {
        for (const bool lazy : {false, true}) {
          StagingOptions options = chunked(std::uint64_t{14} << 20);
          options.chunk_bytes = chunk;
          options.prepare_threads = threads;
          options.lazy = lazy;
          StagingPool pool(geometry, options);
          const StagingStats opened = pool.stats();
          EXPECT_EQ(opened.slots, options.bytes / geometry.file_bytes());
          EXPECT_GE(opened.ready_chunks, 1u);
          EXPECT_TRUE(lazy || opened.ready_chunks == opened.chunks);
          Got got;
          pool.acquire(opened.slots, SlotUse::kTransit, into(got));
          ASSERT_TRUE(eventually([&] { return pool.stats().waiting == 0; }));
          ASSERT_TRUE(all_ready(pool));
          ASSERT_TRUE(eventually([&] { return got.calls == 1; }));
          std::set<std::byte*> starts;
          for (const Slot& slot : got.slots) {
            std::memset(slot.get(), 1, geometry.file_bytes());
            starts.insert(slot.get());
          }
          EXPECT_EQ(starts.size(), opened.slots);
          EXPECT_GE(pool.ready_bytes(), opened.slots * geometry.file_bytes());
          got.slots.clear();
          EXPECT_EQ(pool.stats().free_slots, opened.slots);
        }
      }
    }
  }
}

TEST_F(PreparedPoolTest, LazyOpeningWaitsForTheFirstChunkAndWaitersForTheirs) {
  StagingOptions options = chunked(std::uint64_t{256} << 20);
  options.lazy = true;
  options.prepare_threads = 1;
  StagingPool pool(geometry_, options);
  EXPECT_GE(pool.stats().ready_chunks, 1u);
  EXPECT_NE(pool.try_acquire(SlotUse::kTransit), nullptr) << "the first chunk's slots are there";
  std::atomic<int> calls{0};
  std::vector<Slot> all;
  pool.acquire(pool.stats().slots, SlotUse::kTransit, [&](std::vector<Slot> slots) {
    all = std::move(slots);
    ++calls;
  });
  while (pool.stats().ready_chunks < pool.stats().chunks) expect_consistent(pool, options);
  ASSERT_TRUE(eventually([&] { return calls == 1; }));
  EXPECT_EQ(all.size(), pool.stats().slots);
  expect_consistent(pool, options);
  const double prepared = pool.stats().prepare_s;
  EXPECT_GT(prepared, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  EXPECT_EQ(pool.stats().prepare_s, prepared) << "until the last chunk was ready, not until now";
}

TEST_F(PreparedPoolTest, TheFirstSlotsAreUsedFirst) {
  for (const bool lazy : {false, true}) {
    StagingOptions options = chunked(std::uint64_t{12} << 20);
    options.lazy = lazy;
    StagingPool pool(geometry_, options);
    ASSERT_TRUE(all_ready(pool));
    std::vector<Slot> slots;
    for (std::uint32_t i = 0; i < pool.stats().slots; ++i) {
      slots.push_back(pool.try_acquire(SlotUse::kTransit));
      ASSERT_NE(slots.back(), nullptr);
      EXPECT_EQ(slots.back().get(), pool.memory().data() + i * pool.slot_bytes());
    }
  }
}

TEST_F(PreparedPoolTest, GoesAwayWhileItIsPrepared) {
  const std::size_t before = threads();
  for (int round = 0; round < 30; ++round) {
    StagingOptions options = chunked(std::uint64_t{64} << 20);
    options.lazy = true;
    options.prepare_threads = 1 + static_cast<std::uint32_t>(round) % 8;
    Slot kept;
    {
      StagingPool pool(geometry_, options);
      if (round % 3 == 0) kept = pool.try_acquire(SlotUse::kTransit);
    }
    if (kept) std::memset(kept.get(), 1, geometry_.file_bytes());
  }
  EXPECT_TRUE(eventually([&] { return threads() == before; })) << threads() << " threads, " << before << " before";
}

// The waiter is served by the thread that prepares chunks, and the handle outside goes meanwhile: the thread holds the
// pool alone, and ends it.
TEST_F(PreparedPoolTest, TheLastHandleMayGoWhileAWaiterIsServed) {
  const std::size_t before = threads();
  for (std::uint32_t round = 0; round < 30; ++round) {
    StagingOptions options = chunked(std::uint64_t{64} << 20);
    options.lazy = true;
    options.prepare_threads = 1 + round % 2;
    auto pool = std::make_unique<StagingPool>(geometry_, options);
    std::atomic<bool> called{false}, dropped{false}, ended{false};
    const auto caller = std::this_thread::get_id();
    pool->acquire(pool->stats().slots / 2, SlotUse::kTransit, [&](std::vector<Slot> slots) {
      called = true;
      // At once, if so much is prepared already: then nobody waits for whom.
      if (std::this_thread::get_id() != caller) eventually([&] { return dropped.load(); });
      slots.clear();
      ended = true;
    });
    ASSERT_TRUE(eventually([&] { return called.load(); }));
    pool.reset();
    dropped = true;
    ASSERT_TRUE(eventually([&] { return ended.load(); }));
  }
  EXPECT_TRUE(eventually([&] { return threads() == before; })) << threads() << " threads, " << before << " before";
}

// acquire() promises one call: also where the pool goes before its memory was there.
TEST_F(PreparedPoolTest, AWaiterIsToldThoughThePoolGoesBeforeItsSlotsCame) {
  StagingOptions options = chunked(std::uint64_t{256} << 20);
  options.lazy = true;
  options.prepare_threads = 1;
  std::atomic<int> calls{0};
  {
    StagingPool pool(geometry_, options);
    pool.acquire(pool.stats().slots, SlotUse::kTransit, [&](std::vector<Slot>) { ++calls; });
  }
  EXPECT_TRUE(eventually([&] { return calls == 1; }, 2)) << "neither served nor ended";
}

TEST_F(PreparedPoolTest, LocksNoMoreThanTheLimit) {
  for (const std::uint64_t limit : {kChunk, 2 * kChunk, kChunk + 5, std::uint64_t{1} << 40}) {
    for (const std::uint32_t threads : {1u, 8u}) {
      StagingOptions options = chunked(3 * kChunk);
      options.lock_limit_bytes = limit;
      options.prepare_threads = threads;
      StagingPool pool(geometry_, options);
      expect_consistent(pool, options);
      const StagingStats stats = pool.stats();
      if (!stats.locked) GTEST_SKIP() << "mlock is refused";
      EXPECT_EQ(stats.locked_bytes, std::min(limit / kChunk, std::uint64_t{3}) * kChunk);
    }
  }
}

// "At most so much, the first part of the pool": also where that is less than a chunk.
TEST_F(PreparedPoolTest, ALimitBelowTheChunkStillLocksTheFirstPart) {
  StagingOptions options = chunked(4 * kChunk);
  options.chunk_bytes = StagingOptions{}.chunk_bytes;
  options.lock_limit_bytes = kChunk;
  StagingPool pool(geometry_, options);
  if (!pool.stats().locked) GTEST_SKIP() << "mlock is refused";
  EXPECT_EQ(pool.stats().locked_bytes, kChunk);
}

TEST_F(PreparedPoolTest, NothingIsLockedWhereItIsNotWanted) {
  StagingOptions options = chunked(4 * kChunk);
  options.lock_memory = false;
  options.lazy = true;
  StagingPool pool(geometry_, options);
  const StagingStats stats = pool.stats();
  EXPECT_FALSE(stats.locked);
  EXPECT_EQ(stats.locked_bytes, 0u);
  EXPECT_EQ(stats.ready_chunks, stats.chunks);
  EXPECT_EQ(stats.free_slots, stats.slots);
  EXPECT_GE(stats.prepare_s, 0);
  EXPECT_LT(stats.prepare_s, 1);
}

TEST_F(PreparedPoolTest, BadValuesAreNamed) {
  const auto refused = [&](auto change, const std::string& name) {
    StagingOptions options = chunked(4 * kChunk);
    change(options);
    try {
      StagingPool pool(geometry_, options);
      ADD_FAILURE() << name << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  };
  refused([](StagingOptions& o) { o.chunk_bytes = 0; }, "chunk");
  refused([](StagingOptions& o) { o.prepare_threads = 0; }, "prepare_threads");
  refused([](StagingOptions& o) { o.prepare_threads = 65; }, "prepare_threads");
  refused([](StagingOptions& o) { o.numa_node = -2; }, "numa_node");
}

TEST_F(PreparedPoolTest, ANodeThatIsNotThereIsAFallback) {
  StagingOptions options = chunked(4 * kChunk);
  for (const int node : {900, 5000, 1 << 30}) {
    options.numa_node = node;
    EXPECT_FALSE(StagingPool(geometry_, options).stats().numa_bound) << node;
  }
  options.numa_node = -1;
  EXPECT_FALSE(StagingPool(geometry_, options).stats().numa_bound);
}

TEST_F(PreparedPoolTest, SharedMemoryHasAnFdOfThatSizeThatCantShrink) {
  EXPECT_EQ(make(4).shared_fd(), -1);
  int fd = -1;
  {
    StagingOptions options = chunked(4 * kChunk);
    options.shared = true;
    StagingPool pool(geometry_, options);
    fd = pool.shared_fd();
    ASSERT_GE(fd, 0);
    struct stat info{};
    ASSERT_EQ(fstat(fd, &info), 0);
    EXPECT_GE(static_cast<std::uint64_t>(info.st_size), pool.memory().size());
    EXPECT_NE(ftruncate(fd, 0), 0) << "a peer that reads it must not be killed";
    pool.memory()[5] = std::byte{77};
    std::uint8_t seen = 0;
    ASSERT_EQ(pread(fd, &seen, 1, 5), 1);
    EXPECT_EQ(seen, 77);
  }
  EXPECT_EQ(fcntl(fd, F_GETFD), -1) << "closed with the pool";
}

}  // namespace
}  // namespace dualkv::testing
