// The progress thread: order of tasks, timers, descriptors, and its end.
#include "base/progress.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>

#include <atomic>

#include "support.h"

namespace dualkv::testing {
namespace {

Fd event() { return Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)); }

TEST(Progress, RunsTasksInOrderOnItsThread) {
  Progress progress("test");
  std::vector<int> ran;
  for (int i = 0; i < 200; ++i) {
    EXPECT_TRUE(progress.post([&, i] {
      EXPECT_TRUE(progress.on_thread());
      ran.push_back(i);
    }));
  }
  progress.run([] {});
  ASSERT_EQ(ran.size(), 200u);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(ran[static_cast<std::size_t>(i)], i);
  EXPECT_FALSE(progress.on_thread());
}

TEST(Progress, KeepsEachThreadsOrder) {
  Progress progress("test");
  std::vector<int> last(4, -1);
  std::vector<std::thread> threads;
  for (std::size_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 300; ++i) {
        progress.post([&, thread, i] {
          EXPECT_EQ(last[thread], i - 1);
          last[thread] = i;
        });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  progress.run([] {});
  EXPECT_EQ(last, std::vector<int>(4, 299));
}

TEST(Progress, ATaskMayPostAndRun) {
  Progress progress("test");
  std::string order;
  progress.run([&] {
    progress.post([&] { order += "b"; });
    progress.run([&] { order += "a"; });  // in place: waiting for itself would never end
  });
  progress.run([] {});
  EXPECT_EQ(order, "ab");
}

TEST(Progress, TimersFireInOrderOfTime) {
  Progress progress("test");
  std::string order;
  std::atomic<bool> done{false};
  progress.run([&] {
    const auto now = Clock::now();
    const auto ms = [](int n) { return std::chrono::milliseconds(n); };
    progress.at(now + ms(30), [&] { order += "d", done = true; });
    progress.at(now + ms(10), [&] { order += "b"; });
    progress.at(now + ms(20), [&] { order += "c"; });
    progress.at(now - ms(10), [&] { order += "a"; });
  });
  ASSERT_TRUE(eventually([&] { return done.load(); }));
  EXPECT_EQ(order, "abcd");
}

TEST(Progress, TimersOfOneInstantFireAsTheyWereSet) {
  Progress progress("test");
  std::string order;
  std::atomic<bool> done{false};
  progress.run([&] {
    const auto when = in(0.01);
    for (const char c : {'a', 'b', 'c'}) progress.at(when, [&order, c] { order += c; });
    progress.at(when, [&] { done = true; });
  });
  ASSERT_TRUE(eventually([&] { return done.load(); }));
  EXPECT_EQ(order, "abc");
}

TEST(Progress, ACancelledTimerNeverFires) {
  Progress progress("test");
  std::string order;
  std::atomic<bool> done{false};
  progress.run([&] {
    const auto when = in(0.01);
    const auto first = progress.at(when, [&] { order += "x"; });
    progress.cancel(first);
    progress.cancel(first);
    progress.cancel(12345);
    auto later = std::make_shared<Progress::TimerId>(0);
    progress.at(when, [&, later] {
      order += "a";
      progress.cancel(*later);  // due at the same instant
    });
    *later = progress.at(when, [&] { order += "y"; });
    progress.at(when + std::chrono::milliseconds(5), [&] { done = true; });
  });
  ASSERT_TRUE(eventually([&] { return done.load(); }));
  EXPECT_EQ(order, "a");
}

TEST(Progress, ATimerMaySetItselfAgainAndCancelItself) {
  Progress progress("test");
  int fired = 0;
  std::atomic<bool> done{false};
  std::function<void()> again;
  Progress::TimerId id = 0;
  again = [&] {
    progress.cancel(id);  // it has fired: nothing to do
    if (++fired == 5) {
      done = true;
    } else {
      id = progress.at(Clock::now(), again);
    }
  };
  progress.run([&] { id = progress.at(Clock::now(), again); });
  ASSERT_TRUE(eventually([&] { return done.load(); }));
  EXPECT_EQ(fired, 5);
}

TEST(Progress, CallsTheHandlerOfAReadyDescriptor) {
  Progress progress("test");
  const Fd fd = event();
  std::atomic<int> called{0};
  progress.run([&] {
    progress.watch(fd.get(), EPOLLIN, [&](std::uint32_t events) {
      EXPECT_TRUE(events & EPOLLIN);
      eventfd_t count;
      eventfd_read(fd.get(), &count);
      ++called;
    });
  });
  for (int i = 1; i <= 3; ++i) {
    eventfd_write(fd.get(), 1);
    ASSERT_TRUE(eventually([&] { return called == i; }));
  }
  progress.run([&] {
    progress.unwatch(fd.get());
    progress.unwatch(fd.get());
  });
  eventfd_write(fd.get(), 1);
  progress.run([] {});
  EXPECT_EQ(called, 3);
}

TEST(Progress, AHandlerMayUnwatchItselfAndItsNeighbour) {
  Progress progress("test");
  const Fd first = event(), second = event();
  int called = 0;
  progress.run([&] {
    const auto once = [&](std::uint32_t) {
      ++called;
      progress.unwatch(first.get());
      progress.unwatch(second.get());
    };
    progress.watch(first.get(), EPOLLIN, once);
    progress.watch(second.get(), EPOLLIN, once);
    eventfd_write(first.get(), 1);  // both are ready in the same batch
    eventfd_write(second.get(), 1);
  });
  for (int i = 0; i < 20; ++i) progress.run([] {});
  const Fd third = event();
  std::atomic<bool> seen{false};
  progress.run([&] {
    progress.watch(third.get(), EPOLLIN, [&](std::uint32_t) {
      progress.unwatch(third.get());
      seen = true;
    });
    eventfd_write(third.get(), 1);
  });
  ASSERT_TRUE(eventually([&] { return seen.load(); }));
  EXPECT_EQ(called, 1);
}

TEST(Progress, RewatchChangesTheEvents) {
  Progress progress("test");
  const Fd fd = event();
  std::atomic<int> writable{0};
  progress.run([&] {
    progress.watch(fd.get(), EPOLLIN, [&](std::uint32_t events) {
      if (events & EPOLLOUT) ++writable;
      progress.rewatch(fd.get(), EPOLLIN);
    });
  });
  EXPECT_EQ(writable, 0);
  progress.run([&] { progress.rewatch(fd.get(), EPOLLOUT); });
  ASSERT_TRUE(eventually([&] { return writable == 1; }));
  progress.run([] {});
  EXPECT_EQ(writable, 1);
}

TEST(Progress, StopRunsWhatWasPostedAndRefusesTheRest) {
  Progress progress("test");
  std::atomic<int> ran{0};
  for (int i = 0; i < 50; ++i) progress.post([&] { ++ran; });
  progress.stop();
  EXPECT_EQ(ran, 50);
  EXPECT_FALSE(progress.post([&] { ++ran; }));
  EXPECT_EQ(ran, 50);
  int in_place = 0;
  progress.run([&] { ++in_place; });
  EXPECT_EQ(in_place, 1);
  progress.stop();
}

TEST(Progress, StopDropsTimersThatAreNotDue) {
  auto held = std::make_shared<int>();
  int fired = 0;
  {
    Progress progress("test");
    progress.run([&, held] { progress.at(in(3600), [&fired, held] { ++fired; }); });
  }
  EXPECT_EQ(fired, 0);
  EXPECT_EQ(held.use_count(), 1) << "what a dropped timer held is let go";
}

TEST(Progress, StopFromItsOwnThreadIsSafe) {
  Progress progress("test");
  progress.run([&] { progress.stop(); });
  EXPECT_TRUE(eventually([&] { return !progress.post([] {}); }));
}

TEST(Progress, ManyLivesWithPostersRacingTheStop) {
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> accepted{0}, ran{0};
    Progress progress("test");
    std::thread poster([&] {
      for (int i = 0; i < 100; ++i) accepted += progress.post([&] { ++ran; });
    });
    progress.stop();
    poster.join();
    EXPECT_EQ(ran, accepted) << "an accepted task runs, a refused one does not";
  }
}

// As when a garbage collector drops handles on one thread while another closes their node.
TEST(Progress, StopsByManyThreadsAtOnceAllReturnAndNothingRunsBesideAnother) {
  for (int round = 0; round < 300; ++round) {
    Progress progress("test");
    int ran = 0;  // on the progress thread, or after it, one at a time: no lock needed
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        if (i % 2 == 0) progress.stop();
        progress.run([&] { progress.run([&] { ++ran; }); });
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(ran, 4);
  }
}

// Nothing but the task itself knows of the next one: without it the thread would sleep on.
TEST(Progress, WhatAHandlerPostsRunsWithoutAWakeUp) {
  for (const int spin_us : {0, 50}) {
    Progress progress("test", std::chrono::microseconds(spin_us));
    const Fd fd = event();
    std::atomic<int> from_task{0}, from_timer{0}, from_handler{0};
    std::function<void()> again = [&] {
      if (++from_task < 1000) progress.post(again);
    };
    progress.post([&] {
      progress.post(again);
      progress.at(in(0.001), [&] { progress.post([&] { ++from_timer; }); });
      progress.watch(fd.get(), EPOLLIN, [&](std::uint32_t) {
        progress.unwatch(fd.get());
        progress.post([&] { ++from_handler; });
      });
      eventfd_write(fd.get(), 1);
    });
    EXPECT_TRUE(eventually([&] { return from_task == 1000; })) << from_task << " of 1000, spin " << spin_us;
    EXPECT_TRUE(eventually([&] { return from_timer == 1; })) << "spin " << spin_us;
    EXPECT_TRUE(eventually([&] { return from_handler == 1; })) << "spin " << spin_us;
  }
}

TEST(Progress, ATaskThatPostsItselfForEverStarvesNobody) {
  const Fd fd = event();
  std::atomic<bool> stop{false}, timer{false}, handler{false}, posted{false};
  std::function<void()> again;  // outlives the thread that copies it
  Progress progress("test");
  again = [&] {
    if (!stop) progress.post(again);
  };
  progress.post([&] {
    progress.watch(fd.get(), EPOLLIN, [&](std::uint32_t) {
      progress.unwatch(fd.get());
      handler = true;
    });
    progress.at(in(0.01), [&] { timer = true; });
    again();
  });
  eventfd_write(fd.get(), 1);
  progress.post([&] { posted = true; });
  EXPECT_TRUE(eventually([&] { return timer && handler && posted; })) << timer << handler << posted;
  stop = true;
}

TEST(Progress, TimersAreNeverEarlyAndSeldomLate) {
  for (const int spin_us : {0, 50, 1000}) {
    Progress progress("test", std::chrono::microseconds(spin_us));
    std::vector<Clock::time_point> due, fired;
    std::atomic<bool> done{false};
    progress.run([&] {
      const auto now = Clock::now();
      for (int i = 0; i < 40; ++i) {
        due.push_back(now + std::chrono::microseconds(700 * i + 13));
        progress.at(due.back(), [&] { fired.push_back(Clock::now()); });
      }
      progress.at(due.back(), [&] { done = true; });
    });
    ASSERT_TRUE(eventually([&] { return done.load(); }));
    std::size_t late = 0;
    for (std::size_t i = 0; i < due.size(); ++i) {
      EXPECT_GE(fired[i], due[i]) << "timer " << i << " of " << due.size() << ", spin " << spin_us;
      late += fired[i] - due[i] > std::chrono::milliseconds(5);
    }
    EXPECT_LT(late, due.size() / 2) << "most of them within a few milliseconds, spin " << spin_us;
  }
}

double cpu_seconds(Progress& progress) {
  timespec used{};
  progress.run([&] { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used); });
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) / 1e9;
}

// With a timer like a node's.
TEST(Progress, AnIdleThreadThatMaySpinSleeps) {
  Progress progress("test", std::chrono::microseconds(1000));
  std::function<void()> tick = [&] { progress.at(in(0.02), tick); };
  progress.run(tick);
  for (int i = 0; i < 1000; ++i) progress.run([] {});  // it has been busy, and may spin
  const double before = cpu_seconds(progress);
  std::this_thread::sleep_for(std::chrono::seconds(1));
  EXPECT_LT(cpu_seconds(progress) - before, 0.02) << "CPU seconds in a second of nothing to do";
}

TEST(Progress, HandlersOfOneBatchMayCloseAndReuseEachOthersDescriptors) {
  for (int round = 0; round < 50; ++round) {
    Progress progress("test", std::chrono::microseconds(50));
    std::vector<std::unique_ptr<Fd>> fds;
    std::atomic<int> stale{0}, fresh{0};
    progress.run([&] {
      std::vector<int> numbers;
      for (int i = 0; i < 8; ++i) {
        fds.push_back(std::make_unique<Fd>(event()));
        numbers.push_back(fds.back()->get());
      }
      const auto close_all = [&](std::uint32_t) {
        if (++stale > 1) return;  // only the first of the batch may run
        for (auto& fd : fds) progress.unwatch(fd->get());
        for (auto& fd : fds) fd->reset();
        for (auto& fd : fds) {
          *fd = event();  // the same numbers, other descriptors: nothing has happened on them
          progress.watch(fd->get(), EPOLLIN, [&](std::uint32_t) { ++fresh; });
        }
      };
      for (int number : numbers) {
        progress.watch(number, EPOLLIN, close_all);
        eventfd_write(number, 1);
      }
    });
    ASSERT_TRUE(eventually([&] { return stale > 0; }));
    for (int i = 0; i < 10; ++i) progress.run([] {});
    EXPECT_EQ(stale, 1);
    EXPECT_EQ(fresh, 0) << "an event of the closed descriptor reached the new one of that number";
    progress.run([&] {
      for (auto& fd : fds) progress.unwatch(fd->get());
    });
  }
}

}  // namespace
}  // namespace dualkv::testing
