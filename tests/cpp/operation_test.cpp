// Milestones and Notifier: what ends, how it ends, and who is told.
#include "dualkv/operation.h"

#include <poll.h>

#include <algorithm>
#include <atomic>

#include "support.h"

namespace dualkv::testing {
namespace {

bool readable(const Notifier& notifier) {
  pollfd fd{notifier.fd(), POLLIN, 0};
  return poll(&fd, 1, 0) == 1;
}

Status failure(Code code, const char* message = "why") { return {code, 0, message}; }

TEST(Milestones, BeginUnreached) {
  const Milestones milestones(3);
  EXPECT_EQ(milestones.count(), 3u);
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_FALSE(milestones.reached(i) || milestones.ended(i));
  EXPECT_TRUE(milestones.status().ok());
}

TEST(Milestones, AreReachedOneByOneInAnyOrder) {
  Milestones milestones(3);
  milestones.reach(2);
  EXPECT_TRUE(milestones.reached(2));
  EXPECT_FALSE(milestones.reached(0) || milestones.reached(1));
  EXPECT_TRUE(milestones.wait(2, in(0)).ok());
  milestones.reach(2);  // again
  milestones.reach(0);
  EXPECT_FALSE(milestones.ended(1));
}

TEST(Milestones, AFailureEndsWhatWasNotReachedAndNothingElse) {
  Milestones milestones(3);
  milestones.reach(1);
  milestones.fail({Code::kIo, 5, "first"});
  EXPECT_TRUE(milestones.wait(1, in(0)).ok());
  EXPECT_TRUE(milestones.reached(1));
  for (const std::uint32_t i : {0u, 2u}) {
    EXPECT_FALSE(milestones.reached(i));
    EXPECT_TRUE(milestones.ended(i));
    EXPECT_EQ(milestones.wait(i, Clock::time_point::max()).code, Code::kIo);
  }
  EXPECT_EQ(milestones.status().os_errno, 5);
}

TEST(Milestones, TheFirstFailureIsKept) {
  Milestones milestones(1);
  milestones.fail(failure(Code::kCorrupt, "first"));
  milestones.fail(failure(Code::kIo, "second"));
  EXPECT_EQ(milestones.status().code, Code::kCorrupt);
  EXPECT_EQ(milestones.status().message, "first");
}

TEST(Milestones, NothingIsReachedAfterAFailure) {
  Milestones milestones(2);
  milestones.fail(failure(Code::kCancelled));
  milestones.reach(0);
  EXPECT_FALSE(milestones.reached(0));
  EXPECT_EQ(milestones.wait(0, in(0)).code, Code::kCancelled);
}

TEST(Milestones, AFailureAfterTheEndIsIgnored) {
  Milestones milestones(2);
  milestones.reach(0);
  milestones.reach(1);
  milestones.fail(failure(Code::kTimeout));
  EXPECT_TRUE(milestones.status().ok());
  EXPECT_TRUE(milestones.wait(0, in(0)).ok());
  EXPECT_TRUE(milestones.wait(1, in(0)).ok());
}

TEST(Milestones, AWaitThatTimesOutChangesNothing) {
  Milestones milestones(1);
  EXPECT_EQ(milestones.wait(0, in(-1)).code, Code::kTimeout);
  EXPECT_EQ(milestones.wait(0, in(0.01)).code, Code::kTimeout);
  EXPECT_FALSE(milestones.ended(0));
  EXPECT_TRUE(milestones.status().ok());
  milestones.reach(0);
  EXPECT_TRUE(milestones.wait(0, in(-1)).ok()) << "what is reached needs no waiting";
}

TEST(Milestones, AnotherThreadWakesTheWaiters) {
  Milestones milestones(2);
  std::atomic<int> ok{0}, failed{0};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] { ok += milestones.wait(0, in(20)).ok(); });
    waiters.emplace_back([&] { failed += milestones.wait(1, Clock::time_point::max()).code == Code::kPeerLost; });
  }
  milestones.reach(0);
  milestones.fail(failure(Code::kPeerLost));
  for (auto& waiter : waiters) waiter.join();
  EXPECT_EQ(ok, 4);
  EXPECT_EQ(failed, 4);
}

TEST(Milestones, NotifyTellsOnceWhenReached) {
  Milestones milestones(2);
  const auto notifier = std::make_shared<Notifier>();
  milestones.notify(0, notifier, 70);
  milestones.notify(1, notifier, 71);
  EXPECT_FALSE(readable(*notifier));
  milestones.reach(0);
  EXPECT_TRUE(readable(*notifier));
  EXPECT_EQ(notifier->drain(), std::vector<std::uint64_t>{70});
  milestones.reach(0);
  EXPECT_FALSE(readable(*notifier));
  milestones.reach(1);
  EXPECT_EQ(notifier->drain(), std::vector<std::uint64_t>{71});
}

TEST(Milestones, NotifyTellsOfFailures) {
  Milestones milestones(3);
  const auto notifier = std::make_shared<Notifier>();
  for (std::uint32_t i = 0; i < 3; ++i) milestones.notify(i, notifier, i);
  milestones.reach(1);
  EXPECT_EQ(notifier->drain(), std::vector<std::uint64_t>{1});
  milestones.fail(failure(Code::kIo));
  auto tokens = notifier->drain();
  std::sort(tokens.begin(), tokens.end());
  EXPECT_EQ(tokens, (std::vector<std::uint64_t>{0, 2}));
  milestones.fail(failure(Code::kIo));
  EXPECT_TRUE(notifier->drain().empty());
}

TEST(Milestones, NotifyAfterTheEndTellsAtOnce) {
  Milestones milestones(2);
  const auto notifier = std::make_shared<Notifier>();
  milestones.reach(0);
  milestones.notify(0, notifier, 5);
  EXPECT_EQ(notifier->drain(), std::vector<std::uint64_t>{5});
  milestones.fail(failure(Code::kIo));
  milestones.notify(1, notifier, 6);
  EXPECT_EQ(notifier->drain(), std::vector<std::uint64_t>{6});
}

TEST(Milestones, ANotifierLivesAsLongAsItIsNeeded) {
  Milestones milestones(1);
  auto notifier = std::make_shared<Notifier>();
  const std::weak_ptr<Notifier> watch = notifier;
  milestones.notify(0, std::move(notifier), 1);
  EXPECT_FALSE(watch.expired());
  milestones.reach(0);
  EXPECT_TRUE(watch.expired()) << "told, and let go";
}

TEST(Milestones, EachIsToldOnceUnderContention) {
  constexpr std::uint32_t kCount = 200;
  Milestones milestones(kCount);
  const auto notifier = std::make_shared<Notifier>();
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    for (std::uint32_t i = 0; i < kCount; ++i) milestones.notify(i, notifier, i);
  });
  for (std::uint32_t thread = 0; thread < 2; ++thread) {
    threads.emplace_back([&] {
      for (std::uint32_t i = 0; i < kCount / 2; ++i) milestones.reach(i);
    });
  }
  threads.emplace_back([&] { milestones.wait(kCount / 2 - 1, in(20)), milestones.fail(failure(Code::kIo)); });
  for (auto& thread : threads) thread.join();
  auto tokens = notifier->drain();
  std::sort(tokens.begin(), tokens.end());
  ASSERT_EQ(tokens.size(), kCount);
  for (std::uint32_t i = 0; i < kCount; ++i) EXPECT_EQ(tokens[i], i);
}

TEST(Notifier, IsReadableWhileItHoldsTokens) {
  Notifier notifier;
  EXPECT_FALSE(readable(notifier));
  EXPECT_TRUE(notifier.drain().empty()) << "draining nothing must not block";
  notifier.push(1);
  notifier.push(1);
  EXPECT_TRUE(readable(notifier));
  EXPECT_EQ(notifier.drain(), (std::vector<std::uint64_t>{1, 1}));
  EXPECT_FALSE(readable(notifier));
  notifier.push(2);
  EXPECT_TRUE(readable(notifier));
}

TEST(Notifier, LosesNothingBetweenThreads) {
  Notifier notifier;
  std::vector<std::thread> pushers;
  for (std::uint64_t thread = 0; thread < 4; ++thread) {
    pushers.emplace_back([&, thread] {
      for (std::uint64_t i = 0; i < 500; ++i) notifier.push(thread * 500 + i);
    });
  }
  std::vector<std::uint64_t> got;
  while (got.size() < 2000) {
    pollfd fd{notifier.fd(), POLLIN, 0};
    ASSERT_EQ(poll(&fd, 1, 20'000), 1) << "a push that woke nobody, after " << got.size();
    for (const std::uint64_t token : notifier.drain()) got.push_back(token);
  }
  for (auto& pusher : pushers) pusher.join();
  std::sort(got.begin(), got.end());
  for (std::uint64_t i = 0; i < 2000; ++i) ASSERT_EQ(got[i], i);
}

TEST(Operation, CopiesShareOneState) {
  const Operation first;
  const Operation second = first;
  EXPECT_FALSE(second.done());
  first.milestones()->reach(0);
  EXPECT_TRUE(second.done());
  EXPECT_TRUE(second.wait(in(0)).ok());
}

TEST(Operation, TheGuardGoesWithTheLastCopy) {
  const auto guard = std::make_shared<int>();
  const std::weak_ptr<int> watch = guard;
  {
    Operation first;
    first.attach(guard);
    const Operation second = first;
    first = Operation();
    EXPECT_EQ(guard.use_count(), 2);
  }
  EXPECT_EQ(guard.use_count(), 1);
}

}  // namespace
}  // namespace dualkv::testing
