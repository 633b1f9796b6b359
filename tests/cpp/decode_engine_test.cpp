// DecodeEngine: by hand, and random joins and leaves against an engine that keeps a book of each request.
#include "sim/decode_engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>

namespace dualkv::sim {
namespace {

SimCompute steps_of(double step_s, double request_s, double context_s) {
  SimCompute out;
  out.step_s = step_s;
  out.step_request_s = request_s;
  out.step_context_s = context_s;
  return out;
}

TEST(DecodeEngine, IsIdleAtFirst) {
  const DecodeEngine engine(steps_of(1, 0, 0));
  EXPECT_EQ(engine.batch(), 0u);
  EXPECT_EQ(engine.next_end(), std::numeric_limits<double>::infinity());
  EXPECT_EQ(engine.step_s(), 1);
}

TEST(DecodeEngine, OneAlone) {
  DecodeEngine engine(steps_of(0.5, 0.25, 0.001));
  engine.join(3, 7, 1000, 10);
  EXPECT_EQ(engine.batch(), 1u);
  EXPECT_DOUBLE_EQ(engine.step_s(), 1.75);
  // Ten steps of 1.75 s, and of half a ms more for each token that is there.
  const double end = 3 + 17.5 + 0.001 * 10 * 10 / 2;
  EXPECT_NEAR(engine.next_end(), end, 1e-9);
  EXPECT_EQ(engine.leave(end,
                         [](std::uint32_t agent) {
                           EXPECT_EQ(agent, 7u);
                           return 1010.0;
                         }),
            7u);
  EXPECT_EQ(engine.batch(), 0u);
  EXPECT_DOUBLE_EQ(engine.step_s(), 0.5);
  EXPECT_EQ(engine.next_end(), std::numeric_limits<double>::infinity());
  // Idle time counts for nobody.
  engine.join(100, 8, 1000, 10);
  EXPECT_NEAR(engine.next_end(), 100 + end - 3, 1e-9);
}

TEST(DecodeEngine, AJoinSlowsAllDown) {
  DecodeEngine engine(steps_of(1, 1, 0));
  engine.join(0, 1, 500, 10);  // 2 s a step
  EXPECT_NEAR(engine.next_end(), 20, 1e-9);
  engine.join(10, 2, 500, 3);  // 5 steps are done; 3 s a step from now on
  EXPECT_NEAR(engine.next_end(), 19, 1e-9);
  EXPECT_EQ(engine.leave(19, [](std::uint32_t) { return 503.0; }), 2u);
  EXPECT_NEAR(engine.next_end(), 19 + 2 * 2, 1e-9);
  EXPECT_EQ(engine.leave(23, [](std::uint32_t) { return 510.0; }), 1u);
}

TEST(DecodeEngine, EqualEndsLeaveInTheOrderOfAgents) {
  DecodeEngine engine(steps_of(1, 0, 0));
  for (const std::uint32_t agent : {5, 3, 9}) engine.join(0, agent, 10, 4);
  for (const std::uint32_t agent : {3, 5, 9}) {
    EXPECT_NEAR(engine.next_end(), 4, 1e-9);
    EXPECT_EQ(engine.leave(4, [](std::uint32_t) { return 14.0; }), agent);
  }
  EXPECT_EQ(engine.batch(), 0u);
}

TEST(DecodeEngine, StepsOneByOneAreHalfATokenApart) {
  // In whole steps: context grows after each. The engine lets it grow during the step: half a token of each more.
  DecodeEngine engine(steps_of(0.01, 0.001, 1e-5));
  double wanted = 0, context = 3 * 2000;
  for (std::uint32_t agent = 0; agent < 3; ++agent) engine.join(0, agent, 2000, 400);
  for (int step = 0; step < 400; ++step, context += 3) wanted += 0.01 + 3 * 0.001 + 1e-5 * (context + 1.5);
  EXPECT_NEAR(engine.next_end(), wanted, 1e-9 * wanted);
}

// A book of each request. Time goes by in small parts of a step, each as long as its contexts in its middle say.
class Oracle {
 public:
  struct Request {
    double context, left;
  };

  explicit Oracle(const SimCompute& compute) : compute_(compute) {}
  void join(std::uint32_t agent, double context, double steps) { requests_[agent] = {context, steps}; }
  void leave(std::uint32_t agent) { requests_.erase(agent); }
  double context(std::uint32_t agent) const { return requests_.at(agent).context; }
  double left(std::uint32_t agent) const { return requests_.at(agent).left; }
  std::size_t batch() const { return requests_.size(); }
  double step_s(double ahead = 0) const {
    double sum = compute_.step_s;
    for (const auto& [agent, one] : requests_) {
      sum += compute_.step_request_s + compute_.step_context_s * (one.context + ahead);
    }
    return sum;
  }
  // The first to end, and when.
  double next_end(double now) const {
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [agent, one] : requests_) least = std::min(least, one.left);
    return requests_.empty() ? least : now + seconds_of(std::max(0.0, least));
  }
  void advance(double seconds) {
    if (requests_.empty()) return;
    double low = 0, high = 1e9;
    for (int i = 0; i < 200; ++i) {
      const double middle = low + (high - low) / 2;
      (seconds_of(middle) < seconds ? low : high) = middle;
    }
    for (auto& [agent, one] : requests_) {
      one.context += high;
      one.left -= high;
    }
  }

 private:
  // The step's seconds are linear in what is ahead, so the midpoints of any parts give the same sum.
  double seconds_of(double steps) const {
    double sum = 0;
    constexpr int kParts = 7;
    for (int i = 0; i < kParts; ++i) sum += steps / kParts * step_s(steps * (i + 0.5) / kParts);
    return sum;
  }

  SimCompute compute_;
  std::map<std::uint32_t, Request> requests_;
};

class DecodeHistory : public ::testing::TestWithParam<unsigned> {};

TEST_P(DecodeHistory, EndsWhenTheBookSays) {
  std::mt19937 random(GetParam());
  const auto unit = [&] { return static_cast<double>(random()) / 4294967296.0; };
  SimCompute compute = steps_of(0.02 * unit(), 0.002 * unit(), 1e-6 * unit());
  if (GetParam() % 4 == 0) compute.step_context_s = 0;
  if (GetParam() % 4 == 1) compute.step_request_s = 0;
  DecodeEngine engine(compute);
  Oracle oracle(compute);
  double now = 0;
  std::uint32_t next_agent = 0;
  for (int i = 0; i < 300; ++i) {
    ASSERT_EQ(engine.batch(), oracle.batch());
    const double end = oracle.next_end(now);
    if (oracle.batch() > 0) {
      ASSERT_NEAR(engine.next_end(), end, 1e-9 * end) << "after " << i << " changes";
    }
    if (oracle.batch() == 0 || (oracle.batch() < 40 && random() % 2 == 0)) {
      const double at = oracle.batch() == 0 ? now + unit() : now + (end - now) * (random() % 3 == 0 ? 0 : unit());
      oracle.advance(at - now);
      now = at;
      const double context = random() % 100000;
      const std::uint32_t steps = 1 + random() % (1u << (random() % 12));
      oracle.join(next_agent, context, steps);
      engine.join(now, next_agent++, context, steps);
      ASSERT_NEAR(engine.step_s(), oracle.step_s(), 1e-9 * oracle.step_s());
      continue;
    }
    oracle.advance(engine.next_end() - now);
    now = engine.next_end();
    const std::uint32_t agent = engine.leave(now, [&](std::uint32_t who) { return std::round(oracle.context(who)); });
    ASSERT_NEAR(oracle.left(agent), 0, 1e-5) << "agent " << agent;
    oracle.leave(agent);
    ASSERT_NEAR(engine.step_s(), oracle.step_s(), 1e-9 * oracle.step_s());
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, DecodeHistory, ::testing::Range(1u, 41u));

}  // namespace
}  // namespace dualkv::sim
