// Path policies: tables of who reads what, and the promise of Split - all who read finish together.
#include "dualkv/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

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
  v.free_slots = 1000;
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

TEST(Policy, RoundRobinFollowsRates) {
  RoundRobin policy;
  const auto uneven = request(4, node("p", 0, 300), node("d", 0, 100), {node("h", 0, 200)});
  for (int round = 0; round < 10; ++round) {
    std::map<std::string, int> turns;
    for (int i = 0; i < 6; ++i) ++turns[policy.plan(uneven).ranges.at(0).node];
    EXPECT_EQ(turns, (std::map<std::string, int>{{"p", 3}, {"d", 1}, {"h", 2}})) << "round " << round;
  }
  // Smooth: the slow one's turn is not behind all turns of the fast one, and queues are of no matter.
  RoundRobin two;
  std::string order;
  for (int i = 0; i < 8; ++i) order += two.plan(request(4, node("p", 99, 300), node("d", 0, 100))).ranges.at(0).node;
  EXPECT_EQ(order, "ppdpppdp");
  // A node that is not measured is one of the average.
  RoundRobin unmeasured;
  std::map<std::string, int> turns;
  for (int i = 0; i < 60; ++i) {
    ++turns[unmeasured.plan(request(4, node("p", 0, 300), node("d"), {node("h", 0, 100)})).ranges.at(0).node];
  }
  EXPECT_EQ(turns, (std::map<std::string, int>{{"p", 30}, {"d", 20}, {"h", 10}}));
}

TEST(Policy, ShortestQueue) {
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
      {5, 1000, 4, 1, 9, 0, "p:pe_path:0+7"},   // a shorter queue takes longer where reads are slow
      {14, 30, 0, 10, 99, 0, "p:pe_path:0+7"},  // 21 / 30 and 7 / 10: equal
      {15, 30, 0, 10, 99, 0, "d:de_path:0+7"},  // 22 / 30
      {0, 0, 0, 0, 0, 1, "p:pe_path:0+7"},      // not measured: like the others
      {9, 0, 0, 20, 0, 40, "h:helper_path:0+7"},
  };
  for (const Row& row : rows) {
    ShortestQueue policy;
    EXPECT_EQ(
        run(policy, request(7, node("p", row.p_queue, row.p_rate * kBlock), node("d", row.d_queue, row.d_rate * kBlock),
                            {node("h", row.h_queue, row.h_rate * kBlock)})),
        row.wanted);
  }
  ShortestQueue policy;
  EXPECT_EQ(run(policy, request(7, node("p", 1 << 20))), "p:pe_path:0+7");
}

TEST(Policy, ShortestQueueCountsLinks) {
  NodeView decode = node("d", 0, 10 * kBlock);
  decode.link_bandwidth = 5 * kBlock;  // 10 blocks: 2 s
  ShortestQueue by_link;
  EXPECT_EQ(run(by_link, request(10, node("p", 9, 10 * kBlock), decode)), "p:pe_path:0+10");  // 1.9 s
  ShortestQueue by_queue;
  EXPECT_EQ(run(by_queue, request(10, node("p", 11, 10 * kBlock), decode)), "d:de_path:0+10");  // 2.1 s
  decode.lane_bytes[static_cast<int>(Lane::kLow)] = kBlock;                                     // 2.4 s
  decode.lane_bytes[static_cast<int>(Lane::kHigh)] = kBlock;
  ShortestQueue behind;
  EXPECT_EQ(run(behind, request(10, node("p", 13, 10 * kBlock), decode)), "p:pe_path:0+10");  // 2.3 s
}

TEST(Policy, ShortestQueueStaysUnlessItGains) {
  // A request of 10 blocks takes 1 s; a margin of 0.1 is one block of queue.
  const auto chosen = [](ShortestQueue& policy, std::uint64_t p, std::uint64_t d) {
    return policy.plan(request(10, node("p", p, 10 * kBlock), node("d", d, 10 * kBlock))).ranges.at(0).node;
  };
  ShortestQueue policy(0.25);  // two and a half blocks
  EXPECT_EQ(chosen(policy, 5, 4), "d") << "nothing was taken before";
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(chosen(policy, 5, 5 + i % 3), "d") << "noise";
    EXPECT_EQ(chosen(policy, 5 + i % 3, 5), "d");
  }
  EXPECT_EQ(chosen(policy, 5, 8), "p") << "sooner by 0.3 of a request";
  EXPECT_EQ(chosen(policy, 7, 5), "p");
  EXPECT_EQ(chosen(policy, 8, 5), "d");
  ShortestQueue eager(0);
  EXPECT_EQ(chosen(eager, 5, 4), "d");
  EXPECT_EQ(chosen(eager, 5, 5), "p") << "equals go to the prefill node";
  EXPECT_EQ(chosen(eager, 5, 4), "d");
  // The side taken last may be gone.
  EXPECT_EQ(eager.plan(request(10, node("p", 99))).ranges.at(0).node, "p");
  for (const double wrong : {-0.1, 1.0, std::nan("")}) {
    EXPECT_EQ(code_of([&] { ShortestQueue refused(wrong); }), Code::kInvalidArgument) << wrong;
  }
}

TEST(Policy, SplitTable) {
  Split policy;
  EXPECT_EQ(run(policy, request(10, node("p"), node("d"))), "p:pe_path:0+5 d:de_path:5+5");
  EXPECT_EQ(run(policy, request(10, node("p"))), "p:pe_path:0+10");
  EXPECT_EQ(run(policy, request(8, node("p", 0, 300), node("d", 0, 100))), "p:pe_path:0+6 d:de_path:6+2");
  EXPECT_EQ(run(policy, request(10, node("p", 4, 100), node("d", 0, 100))), "p:pe_path:0+3 d:de_path:3+7");
  EXPECT_EQ(run(policy, request(10, node("p", 10, 100), node("d", 0, 100))), "d:de_path:0+10");
  EXPECT_EQ(run(policy, request(10, node("p", 0, 100), node("d", 1000, 100))), "p:pe_path:0+10");
  EXPECT_EQ(run(policy, request(12, node("p"), node("d"), {node("h")})),
            "p:pe_path:0+4 d:de_path:4+4 h:helper_path:8+4");
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

TEST(Policy, SplitByHand) {
  Split policy(4, 0);
  // 4 t - 8, 2 t and t blocks: 20 at 4 s.
  EXPECT_EQ(run(policy, request(20, node("p", 8, 4 * kBlock), node("d", 0, 2 * kBlock), {node("h", 0, kBlock)})),
            "p:pe_path:0+8 d:de_path:8+8 h:helper_path:16+4");
  // 4 t by p; d waits for a link of 2 blocks/s behind 4 blocks of both lanes: 2 t - 4. 20 at 4 s.
  NodeView decode = node("d", 0, 4 * kBlock);
  decode.link_bandwidth = 2 * kBlock;
  decode.lane_bytes[static_cast<int>(Lane::kLow)] = 3 * kBlock;
  decode.lane_bytes[static_cast<int>(Lane::kHigh)] = kBlock;
  EXPECT_EQ(run(policy, request(20, node("p", 0, 4 * kBlock), decode)), "p:pe_path:0+16 d:de_path:16+4");
  // Its reads are what it waits for: 4 t - 12, and 5 t - 4 would be more. 20 at 4 s.
  decode.read_queue_bytes = 12 * kBlock;
  decode.link_bandwidth = 5 * kBlock;
  EXPECT_EQ(run(policy, request(20, node("p", 0, 4 * kBlock), decode)), "p:pe_path:0+16 d:de_path:16+4");
  // What the prefill node reads crosses no link.
  NodeView prefill = node("p", 0, 4 * kBlock);
  prefill.link_bandwidth = kBlock;
  prefill.lane_bytes[0] = 100 * kBlock;
  EXPECT_EQ(run(policy, request(20, prefill, node("d", 0, 4 * kBlock))), "p:pe_path:0+10 d:de_path:10+10");
}

TEST(Policy, SplitDoesNotLeaveAFastSideForRoomElsewhere) {
  // 100 free slots, which come back as fast as it reads, against a node ten times slower with room for all.
  Split policy(4, 0);
  NodeView fast = node("p", 0, 10 * kBlock), slow = node("d", 0, kBlock);
  fast.prompt_slots = slow.prompt_slots = 2000;
  fast.free_slots = 100;
  slow.free_slots = 2000;
  EXPECT_EQ(run(policy, request(1100, fast, slow)), "p:pe_path:0+1000 d:de_path:1000+100");
  fast.free_slots = 0;
  EXPECT_EQ(run(policy, request(1100, fast, slow)), "p:pe_path:0+1000 d:de_path:1000+100");
}

TEST(Policy, SplitOverAtMostSoManySides) {
  const auto wide =
      request(30, node("p", 0, 10), node("d", 0, 1), {node("h1", 0, 3), node("h2", 0, 20), node("h3", 0, 2)});
  Split one(1), two(2), three(3, 0), all(5, 0);
  EXPECT_EQ(run(one, wide), "h2:helper_path:0+30");
  EXPECT_EQ(run(two, wide), "p:pe_path:0+10 h2:helper_path:10+20");
  EXPECT_EQ(run(three, request(33, wide.prefill, wide.decode, wide.helpers)),
            "p:pe_path:0+10 h1:helper_path:10+3 h2:helper_path:13+20");
  EXPECT_EQ(run(all, request(36, wide.prefill, wide.decode, wide.helpers)),
            "p:pe_path:0+10 d:de_path:10+1 h1:helper_path:11+3 h2:helper_path:14+20 h3:helper_path:34+2");
  EXPECT_EQ(code_of([] { Split none(0); }), Code::kInvalidArgument);
}

TEST(Policy, SplitAsksNoHelperForLittle) {
  Split policy(4, 4);
  const NodeView p = node("p", 0, 8), d = node("d", 0, 8);
  EXPECT_EQ(run(policy, request(20, p, d, {node("h", 0, 4)})), "p:pe_path:0+8 d:de_path:8+8 h:helper_path:16+4");
  EXPECT_EQ(run(policy, request(20, p, d, {node("h", 0, 3)})), "p:pe_path:0+10 d:de_path:10+10");
  // Not even if the decode node has less: it needs no further message.
  EXPECT_EQ(run(policy, request(22, node("p", 0, 18), node("d", 0, 1), {node("h", 0, 3)})),
            "p:pe_path:0+21 d:de_path:21+1");
  Split any(4, 0);
  EXPECT_EQ(run(any, request(22, node("p", 0, 18), node("d", 0, 1), {node("h", 0, 3)})),
            "p:pe_path:0+18 d:de_path:18+1 h:helper_path:19+3");
}

TEST(Policy, SplitAsksNoHelperWhereAllAreBusy) {
  Split policy(4, 0), always(4, 0, 0), half(4, 0, 0.5);
  const auto busy = [](std::uint64_t queue) {
    return request(30, node("p", queue, kBlock), node("d", queue, kBlock), {node("h", queue, kBlock)});
  };
  // 10 s with, 15 s without; behind a queue of 34 s, 44 and 49.
  EXPECT_EQ(run(policy, busy(0)), "p:pe_path:0+10 d:de_path:10+10 h:helper_path:20+10");
  EXPECT_EQ(run(policy, busy(34)), "p:pe_path:0+10 d:de_path:10+10 h:helper_path:20+10");
  EXPECT_EQ(run(policy, busy(36)), "p:pe_path:0+15 d:de_path:15+15");
  EXPECT_EQ(run(always, busy(1000)), "p:pe_path:0+10 d:de_path:10+10 h:helper_path:20+10");
  EXPECT_EQ(run(half, busy(0)), "p:pe_path:0+15 d:de_path:15+15");
  EXPECT_NE(half.plan(busy(0)).reason.find("helpers would gain too little"), std::string::npos);
  EXPECT_EQ(half.plan(busy(0)).helpers, std::vector<std::string>{"h"}) << "who may be asked when a side fails";
  EXPECT_EQ(code_of([] { Split wrong(4, 4, 1); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([] { Split wrong(4, 4, -0.1); }), Code::kInvalidArgument);
}

TEST(Policy, SplitCountsOnlyTheHelpersThatItAsks) {
  Split policy(4), always(4, 4, 0);
  // Ten helpers would take 10 s of 50; the two that may be asked only 2.4 s.
  std::vector<NodeView> helpers;
  for (int i = 0; i < 10; ++i) helpers.push_back(node("h" + std::to_string(i), 0, kBlock / 2));
  const PlanRequest slow = request(1000, node("p", 0, 10 * kBlock), node("d", 0, 10 * kBlock), helpers);
  EXPECT_EQ(run(policy, slow), "p:pe_path:0+500 d:de_path:500+500");
  EXPECT_EQ(always.plan(slow).ranges.size(), 4u);
}

TEST(Policy, SplitAsksNoHelperForAHitThatIsEarlyAnyway) {
  Split policy(4, 0);
  PlanRequest early = request(30, node("p", 0, kBlock), node("d", 0, kBlock), {node("h", 0, kBlock)});
  // There after 10 s with, after 15 s without: when the engine comes to it, the gain is 1 s of 15, or 2 of 15.
  early.prefill.compute_queue_s = 14;
  EXPECT_EQ(run(policy, early), "p:pe_path:0+15 d:de_path:15+15");
  early.prefill.compute_queue_s = 13;
  EXPECT_EQ(run(policy, early), "p:pe_path:0+10 d:de_path:10+10 h:helper_path:20+10");
  early.prefill.compute_queue_s = 100;
  EXPECT_EQ(run(policy, early), "p:pe_path:0+15 d:de_path:15+15");
}

TEST(Policy, SplitLeavesAnEarlyHitToOneSideWhereStagingIsShort) {
  Split policy(4, 0);
  PlanRequest early = request(30, node("p", 10, kBlock), node("d", 0, kBlock));
  // d alone is done after 30 s; p's staging has no room for the 10 blocks before it and these 30.
  early.prefill.compute_queue_s = 60;
  early.prefill.free_slots = 39;
  EXPECT_EQ(run(policy, early), "d:de_path:0+30");
  const std::string split = "p:pe_path:0+10 d:de_path:10+20";
  early.prefill.free_slots = 40;
  EXPECT_EQ(run(policy, early), split) << "staging has room";
  early.decode->free_slots = 29;
  EXPECT_EQ(run(policy, early), "d:de_path:0+30") << "decode's has not";
  early.prefill.compute_queue_s = 59;
  EXPECT_EQ(run(policy, early), split) << "in half the time";
  early.prefill.compute_queue_s.reset();
  EXPECT_EQ(run(policy, early), split) << "nobody said when";
  early.prefill.compute_queue_s = 80;
  early.decode.reset();
  early.prefill.free_slots = 0;
  early.helpers = {node("h", 0, kBlock)};
  EXPECT_EQ(run(policy, early), "p:pe_path:0+30") << "helpers are not asked for it either";
}

// Blocks that a side has done by then.
double reads_by(const NodeView& view, bool relays, double seconds) {
  const auto blocks = [](std::uint64_t bytes) { return static_cast<double>(bytes) / kBlock; };
  double out = seconds * blocks(view.read_bandwidth) - blocks(view.read_queue_bytes);
  if (relays && view.link_bandwidth > 0) {
    const double ahead = blocks(view.lane_bytes[0]) + blocks(view.lane_bytes[1]);
    out = std::min(out, seconds * blocks(view.link_bandwidth) - ahead);
  }
  return std::max(0.0, out);
}

// The least time for which a condition holds, by bisection.
template <typename Condition>
double first_time(Condition condition) {
  double low = 0, high = 1e18;
  for (int i = 0; i < 300; ++i) {
    const double middle = low + (high - low) / 2;
    (condition(middle) ? high : low) = middle;
  }
  return high;
}

// When the sides would all run dry: an independent way to the same instant. The first crosses no link.
struct Ideal {
  double seconds = 0;
  std::vector<double> blocks;
};
Ideal ideal_of(const std::vector<NodeView>& sides, double blocks) {
  Ideal out;
  out.seconds = first_time([&](double seconds) {
    double sum = 0;
    for (std::size_t i = 0; i < sides.size(); ++i) sum += reads_by(sides[i], i > 0, seconds);
    return sum >= blocks;
  });
  for (std::size_t i = 0; i < sides.size(); ++i) out.blocks.push_back(reads_by(sides[i], i > 0, out.seconds));
  return out;
}

// Nodes with queues and links of any size.
std::vector<NodeView> random_sides(std::mt19937& random, std::size_t count) {
  std::vector<NodeView> sides;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t queue = random() % 3 == 0 ? 0 : random() % (1u << (random() % 12));
    sides.push_back(node("n" + std::to_string(i), queue, (1 + random() % (1u << (1 + random() % 12))) * 1000));
    NodeView& side = sides.back();
    if (random() % 2 == 0) side.link_bandwidth = side.read_bandwidth / 8 * (1 + random() % 64);
    if (random() % 2 == 0) side.lane_bytes[random() % 2] = random() % 20 * kBlock;
  }
  return sides;
}

PlanRequest request_of(const std::vector<NodeView>& sides, std::uint32_t hit) {
  PlanRequest out = request(hit, sides[0]);
  if (sides.size() > 1) out.decode = sides[1];
  for (std::size_t i = 2; i < sides.size(); ++i) out.helpers.push_back(sides[i]);
  return out;
}

TEST(Policy, SplitFinishesEverywhereAtOnce) {
  std::mt19937 random(11);
  Split policy(6, 0, 0);
  for (int round = 0; round < 400; ++round) {
    const std::uint32_t hit = random() % 200;
    const std::vector<NodeView> sides = random_sides(random, 1 + random() % 6);
    const PlanRequest wanted = request_of(sides, hit);
    const Plan plan = policy.plan(wanted);
    ASSERT_NO_THROW(check_plan(plan));
    const Ideal ideal = ideal_of(sides, hit);
    for (std::size_t i = 0; i < sides.size(); ++i) {
      double blocks = 0;
      for (const PathRange& range : plan.ranges) blocks += range.node == sides[i].name ? range.count : 0;
      EXPECT_LE(std::abs(blocks - ideal.blocks[i]), 1 + 1e-6) << "round " << round << " " << plan.reason;
      if (ideal.blocks[i] > 0) continue;
      EXPECT_EQ(blocks, 0) << "round " << round << ": the queue of " << sides[i].name << " is too long";
    }
  }
}

TEST(Policy, SplitTilesWithinItsLimits) {
  std::mt19937 random(12);
  for (int round = 0; round < 1000; ++round) {
    const std::uint32_t hit = random() % 100, most = 1 + random() % 5, least = random() % 10;
    const std::vector<NodeView> sides = random_sides(random, 1 + random() % 7);
    Split policy(most, least);
    const Plan plan = policy.plan(request_of(sides, hit));
    ASSERT_NO_THROW(check_plan(plan)) << plan.reason;
    ASSERT_EQ(plan.keys.size(), hit);
    ASSERT_EQ(plan.recompute_blocks, 0u);
    EXPECT_LE(plan.ranges.size(), most) << plan.reason;
    if (plan.ranges.size() < 2) continue;
    for (const PathRange& range : plan.ranges) {
      if (range.path != Path::kHelper) continue;
      EXPECT_GE(range.count + 1, least) << "but for rounding: " << plan.reason;
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

// --- Recompute

// Computing a block of 64 tokens takes `block_s`, and `pair_s` a pair; half a second whatever is computed.
void teach(Recompute& policy, double block_s, double pair_s = 0) {
  for (const std::uint64_t cached : {0, 500, 2000, 100, 4000, 1000}) {
    for (const std::uint64_t tokens : {64, 640, 200}) {
      const auto n = static_cast<double>(tokens);
      policy.observe(cached, tokens, 0.5 + block_s / 64 * n + pair_s * n * (static_cast<double>(cached) + n / 2));
    }
  }
}

NodeView busy(NodeView view, double seconds) {
  view.compute_queue_s = seconds;
  return view;
}

TEST(Policy, RecomputeNeedsToKnow) {
  const auto inner = std::make_shared<Split>();
  Recompute policy(inner);
  EXPECT_EQ(policy.name(), "recompute");
  // Reads that take for ever, and an idle engine.
  const NodeView slow = node("p", 10000, kBlock / 100);
  const auto blind = [&](const NodeView& prefill) {
    const Plan got = policy.plan(request(20, prefill)), wanted = inner->plan(request(20, prefill));
    EXPECT_EQ(got.keys, wanted.keys);
    EXPECT_EQ(got.recompute_blocks, 0u);
    EXPECT_EQ(got.reason, wanted.reason);
  };
  blind(busy(slow, 0));  // nothing was observed
  policy.observe(0, 0, 1);
  policy.observe(0, 100, -1);
  policy.observe(0, 100, std::nan(""));
  blind(busy(slow, 0));  // nor now
  teach(policy, 1);
  blind(slow);  // the engine does not say
  NodeView unfilled = busy(slow, 0);
  unfilled.tokens_per_block = 0;
  blind(unfilled);
  unfilled = busy(slow, 0);
  unfilled.block_bytes = 0;
  blind(unfilled);
  EXPECT_EQ(policy.plan(request(20, busy(slow, 0))).recompute_blocks, 20u);
  const Plan empty = policy.plan(request(0, busy(slow, 0)));
  EXPECT_TRUE(empty.ranges.empty());
  EXPECT_EQ(empty.recompute_blocks, 0u);

  EXPECT_EQ(code_of([] { Recompute refused(nullptr); }), Code::kInvalidArgument);
  for (const double wrong : {-0.1, 1.0, std::nan("")}) {
    EXPECT_EQ(code_of([&] { Recompute refused(inner, wrong); }), Code::kInvalidArgument) << wrong;
  }
}

TEST(Policy, RecomputeByHand) {
  struct Row {
    const char* what;
    double blocks_per_s, queue_s, margin;
    std::uint64_t queued;
    std::uint32_t loaded;  // of 20, of which each is computed in 1 s
  };
  const Row rows[] = {
      {"storage is faster, and the engine idle", 4, 0, 0.1, 0, 20},
      {"storage is slower, and the engine idle", 0.25, 0, 0.1, 0, 0},
      {"until the engine is free, 5 blocks are there", 0.25, 20, 0.1, 0, 5},
      {"and 6 are not worth waiting for", 0.25, 22.5, 0.1, 0, 5},
      {"2 blocks, behind 3 others", 0.25, 20, 0.1, 3, 2},
      {"nothing, behind 5 others", 0.25, 20, 0.1, 5, 0},
      {"all are there", 0.25, 80, 0.1, 0, 20},
      {"nearly all, and the rest is not worth it", 0.25, 76, 0.1, 0, 20},
      {"nearly all, and the rest is worth it", 0.25, 76, 0.01, 0, 19},
      {"20 s are not better enough than 21", 20 / 21.0, 0, 0.1, 0, 20},
      {"20 s are better enough than 21", 20 / 21.0, 0, 0.04, 0, 0},
      {"but for its queue, storage is faster: others wait for the engine as well", 4, 0, 0.1, 100, 20},
      {"and if it is slower, its queue counts too", 0.9, 0, 0.1, 100, 0},
  };
  for (const Row& row : rows) {
    Recompute policy(std::make_shared<PrefillOnly>(), row.margin);
    teach(policy, 1);
    const auto rate = static_cast<std::uint64_t>(row.blocks_per_s * static_cast<double>(kBlock));
    const PlanRequest wanted = request(20, busy(node("p", row.queued, rate), row.queue_s));
    const Plan plan = policy.plan(wanted);
    EXPECT_EQ(plan.keys.size(), row.loaded) << row.what << ": " << plan.reason;
    EXPECT_EQ(plan.recompute_blocks, 20 - row.loaded) << row.what;
    ASSERT_NO_THROW(check_plan(plan)) << row.what;
    EXPECT_TRUE(std::equal(plan.keys.begin(), plan.keys.end(), wanted.keys.begin())) << "the first of them";
    EXPECT_EQ(plan.prefill, "p");
    EXPECT_EQ(plan.reason.find("recompute") != std::string::npos, row.loaded < 20) << plan.reason;
  }
}

TEST(Policy, RecomputeLoadsAsTheOtherPolicyPlans) {
  Recompute policy(std::make_shared<Split>(4, 0));
  teach(policy, 0.5);
  // 12 s: 6 blocks of p, 3 of d, 3 of h; the other 12 take 6 s to compute, and another 12 to load.
  const auto wanted =
      request(24, busy(node("p", 0, kBlock / 2), 12), node("d", 0, kBlock / 4), {node("h", 0, kBlock / 4)});
  const Plan plan = policy.plan(wanted);
  EXPECT_EQ(plan.recompute_blocks, 12u);
  ASSERT_NO_THROW(check_plan(plan));
  ASSERT_EQ(plan.ranges.size(), 3u);
  EXPECT_EQ(plan.ranges[0].count, 6u);
  EXPECT_EQ(plan.ranges[1].count, 3u);
  EXPECT_EQ(plan.ranges[2].count, 3u);
  EXPECT_EQ(plan.decode, "d");
  EXPECT_EQ(plan.helpers, std::vector<std::string>{"h"});
}

// Among all boundaries, by trying each.
TEST(Policy, RecomputeFindsTheBestBoundary) {
  std::mt19937 random(13);
  int in_part = 0;
  for (int round = 0; round < 1000; ++round) {
    const std::uint32_t hit = 1 + random() % 100;
    const std::vector<NodeView> sides = random_sides(random, 1 + random() % 4);
    const double all_s = ideal_of(sides, hit).seconds;
    // From far less than reading takes to twice that; of it, up to as much again for attention to what is before.
    const double block_s = all_s / hit * (0.2 + random() % 100 / 50.0), pair_s = random() % 2 * block_s / 64 / 64 / hit;
    const double last_s = block_s + pair_s * 64 * (64.0 * (hit - 1) + 32);
    double pace = 0;
    for (std::size_t i = 0; i < sides.size(); ++i) {
      const double link = static_cast<double>(sides[i].link_bandwidth),
                   read = static_cast<double>(sides[i].read_bandwidth);
      pace += i > 0 && link > 0 ? std::min(link, read) : read;
    }
    const bool allowed = last_s < kBlock / pace;
    if (std::abs(last_s * pace / kBlock - 1) < 1e-6) continue;  // either is right
    Recompute policy(std::make_shared<Split>(8, 0), 0);
    teach(policy, block_s, pair_s);
    PlanRequest wanted = request_of(sides, hit);
    const double queue_s = random() % 3 * all_s * (random() % 100 / 150.0);
    wanted.prefill.compute_queue_s = queue_s;
    const auto seconds = [&](std::uint32_t loaded) {
      const double n = 64.0 * (hit - loaded), cached = 64.0 * loaded;
      return std::max(loaded == 0 ? 0 : ideal_of(sides, loaded).seconds, queue_s) + block_s / 64 * n +
             pair_s * n * (cached + n / 2);
    };
    double best = seconds(hit);
    for (std::uint32_t k = 0; k < hit && allowed; ++k) best = std::min(best, seconds(k));
    const Plan plan = policy.plan(wanted);
    ASSERT_NO_THROW(check_plan(plan));
    ASSERT_EQ(plan.keys.size() + plan.recompute_blocks, hit);
    EXPECT_TRUE(allowed || plan.recompute_blocks == 0) << "a block takes longer to compute than to read";
    const double got = seconds(static_cast<std::uint32_t>(plan.keys.size()));
    EXPECT_LE(got, best * (1 + 1e-6)) << "round " << round << ": " << plan.keys.size() << " of " << hit << " loaded";
    in_part += plan.recompute_blocks > 0 && !plan.keys.empty();
  }
  EXPECT_GT(in_part, 30) << "or nothing is proven";
}

TEST(Policy, PrefillRateLearns) {
  PrefillRate rate;
  EXPECT_FALSE(rate.known());
  EXPECT_EQ(rate.seconds(0, 100), 0);
  rate.observe(0, 0, 1);
  rate.observe(0, 10, 0);
  rate.observe(0, 10, -1);
  rate.observe(0, 10, std::numeric_limits<double>::infinity());
  rate.observe(0, 10, std::nan(""));
  EXPECT_FALSE(rate.known()) << "values that can't be";
  // All alike: only the average is known.
  for (int i = 0; i < 15; ++i) rate.observe(500, 100, 2);
  EXPECT_FALSE(rate.known()) << "a fit of a few is noise";
  rate.observe(500, 100, 2);
  EXPECT_TRUE(rate.known());
  EXPECT_NEAR(rate.seconds(500, 50), 1, 1e-9);
  // Noise that has longer prefills take less: they are not free, then.
  PrefillRate noisy;
  for (int i = 0; i < 20; ++i) noisy.observe(0, 100 + i, 2 - i * 0.01);
  EXPECT_NEAR(noisy.seconds(0, 100), 1.9 * 100 / 109.5, 0.1);

  std::mt19937 random(3);
  const auto observe = [&](PrefillRate& to, double token_s, double pair_s) {
    const double cached = random() % 10000, n = 1 + random() % 3000;
    to.observe(static_cast<std::uint64_t>(cached), static_cast<std::uint64_t>(n),
               0.3 + token_s * n + pair_s * n * (cached + n / 2));
  };
  PrefillRate fitted;
  for (int i = 0; i < 50; ++i) observe(fitted, 1e-4, 2e-8);
  EXPECT_NEAR(fitted.seconds(0, 1000), 0.1 + 2e-8 * 1000 * 500, 1e-6) << "the base is paid anyway";
  EXPECT_NEAR(fitted.seconds(8000, 1000), 0.1 + 2e-8 * 1000 * 8500, 1e-6);
  EXPECT_EQ(fitted.seconds(8000, 0), 0);
  // Twice as slow from now on.
  for (int i = 0; i < 300; ++i) observe(fitted, 2e-4, 4e-8);
  EXPECT_NEAR(fitted.seconds(8000, 1000) / (0.2 + 4e-8 * 1000 * 8500), 1, 0.05);
  EXPECT_NEAR(fitted.seconds(0, 100) / (0.02 + 4e-8 * 100 * 50), 1, 0.05);
  PrefillRate moved = std::move(fitted);
  EXPECT_NEAR(moved.seconds(8000, 1000) / (0.2 + 4e-8 * 1000 * 8500), 1, 0.05);
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
