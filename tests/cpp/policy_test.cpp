// Path policies: tables of who reads what, and the promise of Split - all who read finish together.
#include "dualkv/policy.h"

#include <cmath>

#include "support.h"

namespace dualkv::testing {
namespace {

constexpr std::uint64_t kBlock = 1 << 20;

NodeView node(const std::string& name, std::uint64_t queue_blocks = 0, std::uint64_t bandwidth = 0) {
  NodeView v;
  v.name = name;
  v.block_bytes = kBlock;
  v.tokens_per_block = 64;
  v.read_queue_bytes = queue_blocks * kBlock;
  v.read_bandwidth = bandwidth;
  return v;
}

PlanRequest request(std::uint32_t hit, NodeView prefill, std::optional<NodeView> decode = {},
                    std::vector<NodeView> helpers = {}) {
  PlanRequest out;
  out.keys = test_keys(small_geometry(), hit);
  out.prefill = std::move(prefill);
  out.decode = std::move(decode);
  out.helpers = std::move(helpers);
  return out;
}

// "name:path:first+count ..." after the checks every plan must pass.
std::string run(PathPolicy& policy, const PlanRequest& request) {
  const Plan plan = policy.plan(request);
  EXPECT_NO_THROW(check_plan(plan)) << policy.name();
  EXPECT_EQ(plan.keys, request.keys);
  EXPECT_EQ(plan.prefill, request.prefill.name);
  EXPECT_EQ(plan.decode, request.decode ? request.decode->name : "");
  EXPECT_EQ(plan.helpers.size(), request.helpers.size());
  EXPECT_NE(plan.reason.find(policy.name()), std::string::npos) << plan.reason;
  std::string out;
  for (const PathRange& range : plan.ranges) {
    if (!out.empty()) out += " ";
    out += range.node + ":" + std::string(to_string(range.path)) + ":" + std::to_string(range.first) + "+" +
           std::to_string(range.count);
  }
  return out;
}

TEST(Policy, ViewCountsQueuedTokens) {
  EXPECT_EQ(node("p", 3).read_queue_tokens(), 192u);
  EXPECT_EQ(NodeView().read_queue_tokens(), 0u);
}

TEST(Policy, PrefillOnlyAndDecodeOnly) {
  PrefillOnly prefill;
  DecodeOnly decode;
  EXPECT_EQ(run(prefill, request(10, node("p", 99), node("d"))), "p:pe_path:0+10");
  EXPECT_EQ(run(prefill, request(10, node("p"))), "p:pe_path:0+10");
  EXPECT_EQ(run(decode, request(10, node("p"), node("d", 99))), "d:de_path:0+10");
  EXPECT_EQ(code_of([&] { decode.plan(request(10, node("p"))); }), Code::kInvalidArgument);
}

TEST(Policy, AnEmptyHitIsAnEmptyPlan) {
  PrefillOnly prefill;
  DecodeOnly decode;
  RoundRobin turns;
  ShortestQueue shortest;
  Split split;
  for (PathPolicy* policy : std::initializer_list<PathPolicy*>{&prefill, &decode, &turns, &shortest, &split}) {
    EXPECT_EQ(run(*policy, request(0, node("p", 1, 5), node("d", 2, 6), {node("h")})), "") << policy->name();
  }
}

TEST(Policy, RoundRobinTakesTurns) {
  RoundRobin policy;
  const auto both = request(4, node("p"), node("d"), {node("h1"), node("h2")});
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(run(policy, both), "p:pe_path:0+4");
    EXPECT_EQ(run(policy, both), "d:de_path:0+4");
    EXPECT_EQ(run(policy, both), "h1:helper_path:0+4");
    EXPECT_EQ(run(policy, both), "h2:helper_path:0+4");
  }
  RoundRobin alone;
  EXPECT_EQ(run(alone, request(4, node("p"))), "p:pe_path:0+4");
  EXPECT_EQ(run(alone, request(4, node("p"))), "p:pe_path:0+4");
}

TEST(Policy, ShortestQueue) {
  ShortestQueue policy;
  struct Row {
    std::uint64_t p_queue, p_rate, d_queue, d_rate, h_queue, h_rate;
    const char* wanted;
  };
  const Row rows[] = {
      {5, 0, 4, 0, 9, 0, "d:de_path:0+7"},      // the shorter queue
      {4, 0, 5, 0, 9, 0, "p:pe_path:0+7"},      //
      {5, 0, 5, 0, 4, 0, "h:helper_path:0+7"},  //
      {5, 0, 5, 0, 5, 0, "p:pe_path:0+7"},      // all equal: no network
      {5, 10, 5, 11, 5, 0, "d:de_path:0+7"},    // equal queues: the faster
      {5, 10, 5, 10, 5, 0, "p:pe_path:0+7"},    // equal queues and rates
      {5, 1000, 4, 1, 9, 0, "d:de_path:0+7"},   // the queue counts before the rate
      {0, 0, 0, 0, 0, 1, "h:helper_path:0+7"},  //
  };
  for (const Row& row : rows) {
    EXPECT_EQ(run(policy, request(7, node("p", row.p_queue, row.p_rate), node("d", row.d_queue, row.d_rate),
                                  {node("h", row.h_queue, row.h_rate)})),
              row.wanted);
  }
  EXPECT_EQ(run(policy, request(7, node("p", 1 << 20))), "p:pe_path:0+7");
}

TEST(Policy, SplitTable) {
  Split policy;
  EXPECT_EQ(run(policy, request(10, node("p"), node("d"))), "p:pe_path:0+5 d:de_path:5+5");
  EXPECT_EQ(run(policy, request(10, node("p"))), "p:pe_path:0+10");
  EXPECT_EQ(run(policy, request(8, node("p", 0, 300), node("d", 0, 100))), "p:pe_path:0+6 d:de_path:6+2");
  EXPECT_EQ(run(policy, request(10, node("p", 4, 100), node("d", 0, 100))), "p:pe_path:0+3 d:de_path:3+7");
  EXPECT_EQ(run(policy, request(10, node("p", 10, 100), node("d", 0, 100))), "d:de_path:0+10");
  EXPECT_EQ(run(policy, request(10, node("p", 0, 100), node("d", 1000, 100))), "p:pe_path:0+10");
  EXPECT_EQ(run(policy, request(9, node("p"), node("d"), {node("h")})),
            "p:pe_path:0+3 d:de_path:3+3 h:helper_path:6+3");
  EXPECT_EQ(run(policy, request(9, node("p"), {}, {node("h1", 100), node("h2")})), "p:pe_path:0+5 h2:helper_path:5+4");
  // A side not measured yet is taken to be as fast as the others on average.
  EXPECT_EQ(run(policy, request(10, node("p", 0, 500), node("d", 0, 0))), "p:pe_path:0+5 d:de_path:5+5");
}

TEST(Policy, SplitCountsTheLinkOfARelayedByte) {
  Split policy;
  NodeView decode = node("d", 0, 400);
  decode.link_bandwidth = 100;
  EXPECT_EQ(run(policy, request(10, node("p", 0, 400), decode)), "p:pe_path:0+8 d:de_path:8+2");
  decode.link_bandwidth = 4000;  // faster than the storage: no matter
  EXPECT_EQ(run(policy, request(10, node("p", 0, 400), decode)), "p:pe_path:0+5 d:de_path:5+5");
}

// When the sides would all run dry, by bisection: an independent way to the same instant.
double finish_time(const std::vector<NodeView>& sides, double blocks) {
  double low = 0, high = 1e18;
  for (int i = 0; i < 300; ++i) {
    const double middle = (low + high) / 2;
    double done = 0;
    for (const NodeView& v : sides) {
      const double queue = static_cast<double>(v.read_queue_bytes) / kBlock;
      done += std::max(0.0, middle * static_cast<double>(v.read_bandwidth) - queue);
    }
    (done < blocks ? low : high) = middle;
  }
  return high;
}

TEST(Policy, SplitFinishesEverywhereAtOnce) {
  std::mt19937 random(11);
  Split policy;
  for (int round = 0; round < 400; ++round) {
    std::vector<NodeView> sides;
    const std::size_t count = 1 + random() % 6;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t queue = random() % 3 == 0 ? 0 : random() % (1u << (random() % 12));
      sides.push_back(node("n" + std::to_string(i), queue, 1 + random() % (1u << (1 + random() % 12))));
    }
    PlanRequest wanted = request(random() % 200, sides[0]);
    if (count > 1) wanted.decode = sides[1];
    for (std::size_t i = 2; i < count; ++i) wanted.helpers.push_back(sides[i]);
    const Plan plan = policy.plan(wanted);
    ASSERT_NO_THROW(check_plan(plan));
    const double finish = finish_time(sides, static_cast<double>(wanted.keys.size()));
    for (const NodeView& side : sides) {
      double blocks = 0;
      for (const PathRange& range : plan.ranges) blocks += range.node == side.name ? range.count : 0;
      const double queue = static_cast<double>(side.read_queue_bytes) / kBlock;
      const double ideal = finish * static_cast<double>(side.read_bandwidth) - queue;
      if (ideal <= 0) {
        EXPECT_EQ(blocks, 0) << "round " << round << ": the queue of " << side.name << " is too long";
      } else {
        EXPECT_LE(std::abs(blocks - ideal), 1 + 1e-6) << "round " << round << " " << plan.reason;
      }
    }
  }
}

TEST(Policy, SplitOfExtremeViews) {
  Split policy;
  NodeView far = node("p");
  far.read_queue_bytes = ~std::uint64_t{0};
  far.read_bandwidth = 1;
  EXPECT_EQ(run(policy, request(5, far, node("d", 0, 1))), "d:de_path:0+5");
  far.read_bandwidth = ~std::uint64_t{0};
  far.read_queue_bytes = 0;
  EXPECT_EQ(run(policy, request(5, far, node("d", 0, 1))), "p:pe_path:0+5");
  far.block_bytes = 0;  // a view that was never filled
  EXPECT_NO_THROW(check_plan(policy.plan(request(5, far, node("d", 3, 1)))));
}

TEST(Policy, CheckPlanRefusesWhatDoesNotTile) {
  const auto checked = [](std::vector<PathRange> ranges) {
    Plan plan;
    plan.keys = test_keys(small_geometry(), 10);
    plan.ranges = std::move(ranges);
    return code_of([&] { check_plan(plan); });
  };
  constexpr Path kPe = Path::kPrefill;
  EXPECT_EQ(checked({{"a", kPe, 0, 10}}), Code::kOk);
  EXPECT_EQ(checked({{"a", kPe, 0, 4}, {"b", kPe, 4, 6}}), Code::kOk);
  EXPECT_EQ(checked({{"a", kPe, 0, 4}, {"a", kPe, 4, 6}}), Code::kOk);
  EXPECT_EQ(checked({}), Code::kInvalidArgument);
  EXPECT_EQ(checked({{"a", kPe, 0, 9}}), Code::kInvalidArgument) << "a block nobody reads";
  EXPECT_EQ(checked({{"a", kPe, 0, 11}}), Code::kInvalidArgument) << "beyond the hit";
  EXPECT_EQ(checked({{"a", kPe, 1, 9}}), Code::kInvalidArgument);
  EXPECT_EQ(checked({{"a", kPe, 0, 4}, {"b", kPe, 5, 5}}), Code::kInvalidArgument) << "a gap";
  EXPECT_EQ(checked({{"a", kPe, 0, 5}, {"b", kPe, 4, 6}}), Code::kInvalidArgument) << "an overlap";
  EXPECT_EQ(checked({{"b", kPe, 4, 6}, {"a", kPe, 0, 4}}), Code::kInvalidArgument) << "out of order";
  EXPECT_EQ(checked({{"a", kPe, 0, 10}, {"b", kPe, 10, 0}}), Code::kInvalidArgument) << "an empty range";
  EXPECT_EQ(checked({{"", kPe, 0, 10}}), Code::kInvalidArgument) << "nobody";
  EXPECT_EQ(checked({{"a", kPe, 0, 5}, {"b", kPe, 5, ~0u - 4}, {"c", kPe, 0, 10}}), Code::kInvalidArgument)
      << "counts that overflow";
}

}  // namespace
}  // namespace dualkv::testing
