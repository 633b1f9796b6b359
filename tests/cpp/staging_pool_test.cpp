// StagingPool: fairness, the prompts' share, withdrawal, and memory that outlives the handle.
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

}  // namespace
}  // namespace dualkv::testing
