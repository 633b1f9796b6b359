// When a node's storage counts as standing still.
#include "node/pulse.h"

#include <gtest/gtest.h>

namespace dualkv {
namespace {

using std::chrono::milliseconds;

struct PulseTest : ::testing::Test {
  // A look after `ms` at a node that has finished `done` reads and has `queue` bytes to read.
  bool look(int ms, std::uint64_t done, std::int64_t queue) {
    now += milliseconds(ms);
    NodeView view;
    view.reads_done = done;
    view.read_queue_bytes = queue;
    return pulse.stalled(view, now, milliseconds(100), milliseconds(300));
  }
  Pulse pulse;
  Clock::time_point now = Clock::now();
};

TEST_F(PulseTest, ReadsThatWaitAndNeverEndAreSaidOnce) {
  look(0, 5, 10);
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(look(100, 5, 10)) << i;
  EXPECT_TRUE(look(100, 5, 10));
  for (int i = 0; i < 9; ++i) EXPECT_FALSE(look(100, 5, 10)) << "said already";
  EXPECT_FALSE(look(100, 6, 10));
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(look(100, 6, 10)) << i;
  EXPECT_TRUE(look(100, 6, 10)) << "it went on, and stands still again";
}

TEST_F(PulseTest, AReadThatEndsInTimeKeepsItAlive) {
  for (std::uint64_t done = 0; done < 20; ++done) {
    for (int i = 0; i < 3; ++i) EXPECT_FALSE(look(90, done, 10));
  }
}

TEST_F(PulseTest, NothingToReadIsNoStandstill) {
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(look(100, 5, 0));
  EXPECT_FALSE(look(100, 5, 10)) << "reads may have come just now";
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(look(100, 5, 10)) << i;
  EXPECT_TRUE(look(100, 5, 10));
}

TEST_F(PulseTest, TimeInWhichNobodyLookedCountsForOneHeartbeat) {
  look(0, 5, 10);
  EXPECT_FALSE(look(60'000, 5, 10));
  EXPECT_FALSE(look(60'000, 5, 10));
  EXPECT_FALSE(look(60'000, 5, 10));
  EXPECT_TRUE(look(60'000, 5, 10)) << "looked often enough";
}

}  // namespace
}  // namespace dualkv
