// simulate(): requests worked out by hand, storage as the bottleneck, and what must hold of every run.
#include "dualkv/sim.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <ostream>
#include <random>
#include <sstream>
#include <stdexcept>

#include "dualkv/status.h"

namespace dualkv {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Ten bytes a token: a hit of 1600 tokens is read in 16 s, and moves in 2 s; its 400 new tokens move in half a second.
SimOptions small(std::vector<SimTurn> session = {{2000, 1600, 11, 0}}, std::uint64_t agents = 1) {
  SimOptions out;
  out.model.layers = 4;
  out.model.tokens_per_block = 64;
  out.model.bytes_per_token = 10;
  out.model.compute.forward_s = 0.5;
  out.model.compute.token_s = 0.001;
  out.model.compute.context_s = 0.0001;
  out.model.compute.pair_s = 1.25e-6;
  out.model.compute.step_s = 0.01;
  out.model.compute.step_request_s = 0.002;
  out.model.compute.step_context_s = 1e-6;
  out.hardware.snic = 1000;
  out.hardware.cnic = 8000;
  out.hardware.dram = 1e6;
  out.hardware.decode_memory_tokens = 1e5;
  out.scheduler.short_queue_tokens = 10000;
  out.scheduler.full_tokens = 10000;
  out.workload.begins = {0, session.size()};
  out.workload.turns = std::move(session);
  out.workload.agents = agents;
  out.fetch_s = 0.05;
  return out;
}

// forward 0.5 + tokens 0.4 + context 0.2 + pairs 400 * 1800 * 1.25e-6 = 0.9
constexpr double kCompute = 2.0;
constexpr double kRead = 16.0;

void expect_near(double got, double wanted, const char* what) {
  EXPECT_NEAR(got, wanted, 1e-6 * std::max(1.0, std::abs(wanted))) << what;
}

SimRequest only(const SimResult& result) {
  EXPECT_EQ(result.requests.size(), 1u);
  return result.requests.empty() ? SimRequest() : result.requests.front();
}

// Ten steps of one request whose prompt and first token are 2001.
double ten_steps() {
  const double first = 0.01 + 0.002 + 1e-6 * 2001;
  return 10 * first + 1e-6 * 10 * 10 / 2;
}

class Chosen : public PathPolicy {
 public:
  explicit Chosen(std::function<Plan(const PlanRequest&)> plan) : plan_(std::move(plan)) {}
  std::string name() const override { return "chosen"; }
  Plan plan(const PlanRequest& request) override {
    ++calls;
    return plan_(request);
  }
  int calls = 0;

 private:
  std::function<Plan(const PlanRequest&)> plan_;
};

std::shared_ptr<Chosen> chosen(std::function<Plan(const PlanRequest&)> plan) {
  return std::make_shared<Chosen>(std::move(plan));
}

// The first `count` blocks of the hit by one node.
Plan by(const PlanRequest& request, const std::string& node, Path path, std::size_t count) {
  Plan out;
  out.keys.assign(request.keys.begin(), request.keys.begin() + static_cast<std::ptrdiff_t>(count));
  if (count > 0) out.ranges.push_back({node, path, 0, static_cast<std::uint32_t>(count)});
  return out;
}

// --- One request, by hand

TEST(Sim, OracleWaitsAndComputes) {
  SimOptions options = small();
  options.free_loads = true;
  const SimResult result = simulate(options);
  const SimRequest request = only(result);
  expect_near(request.arrival_s, 0, "arrival");
  expect_near(request.scheduling_s, 0.05, "scheduling");
  expect_near(request.reading_s, 0, "reading");
  expect_near(request.queueing_s, 0, "queueing");
  expect_near(request.prefill_s, kCompute, "prefill");
  expect_near(request.ttft_s(), 0.05 + kCompute, "time to the first token");
  expect_near(request.decode_s, ten_steps(), "decode");
  expect_near(request.second_s, 1.5 * (0.01 + 0.002 + 1e-6 * 2001), "half a step on average, and one");
  EXPECT_EQ(request.output_tokens, 11);
  expect_near(result.seconds, 0.05 + kCompute + ten_steps(), "until the last answer");
  ASSERT_EQ(result.agent_seconds.size(), 1u);
  expect_near(result.agent_seconds[0], result.seconds, "the agent");
  EXPECT_EQ(result.hit_bytes, 16000);
  EXPECT_EQ(result.read_bytes, 0);
  EXPECT_EQ(result.relayed_bytes, 0);
  EXPECT_EQ(result.published_bytes, 0);
}

TEST(Sim, BasicLoadsThenComputesThenPublishes) {
  SimOptions options = small();
  options.layerwise = false;
  options.model.compute.copy_call_s = 0.001;  // 25 blocks of 4 layers: 0.1 s, in which nothing is computed
  const SimResult result = simulate(options);
  const SimRequest request = only(result);
  expect_near(request.reading_s, kRead, "reading");
  expect_near(request.queueing_s, 2, "loading");
  expect_near(request.prefill_s, kCompute + 0.1, "prefill");
  expect_near(request.ttft_s(), 0.05 + kRead + 2 + kCompute + 0.1, "time to the first token");
  expect_near(request.decode_s, 2.5 + 2.5 + ten_steps(), "publish, copy in, decode");
  EXPECT_EQ(result.read_bytes, 16000);
  EXPECT_EQ(result.relayed_bytes, 0);
  EXPECT_EQ(result.published_bytes, 20000);
}

struct LayerCase {
  const char* name;
  double forward_s, prefill_s, publish_left_s;
};
void PrintTo(const LayerCase& one, std::ostream* out) { *out << one.name; }

// The hit goes in and out of the prefill engine's CNIC. In: 16000 bytes beside 20000 that are published, 4000 bytes/s
// each, 4 s. Out: 16000 by then, the other 4000 in another half second.
class Layerwise : public ::testing::TestWithParam<LayerCase> {};

TEST_P(Layerwise, TheSlowerSetsThePace) {
  SimOptions options = small();
  options.model.compute.forward_s = GetParam().forward_s;
  const SimResult result = simulate(options);
  const SimRequest request = only(result);
  expect_near(request.scheduling_s, 0.05, "scheduling");
  expect_near(request.reading_s, kRead, "reading");
  expect_near(request.queueing_s, 0, "queueing");
  expect_near(request.prefill_s, GetParam().prefill_s, "prefill");
  expect_near(request.decode_s, GetParam().publish_left_s + 2.5 + ten_steps(), "publish, copy in, decode");
  EXPECT_EQ(result.hit_bytes, 16000);
  EXPECT_EQ(result.snic_bytes, (std::vector<double>{16000, 0}));
  EXPECT_EQ(result.relayed_bytes, 0);
  EXPECT_EQ(result.published_bytes, 20000);
}

INSTANTIATE_TEST_SUITE_P(Cases, Layerwise,
                         // compute: forward + 1.5 s
                         ::testing::Values(LayerCase{"LoadsAreSlower", 0.1, 4 + 1.6 / 4, 0.1},
                                           LayerCase{"ComputeIsSlower", 4.5, 6 + 4.0 / 4, 0},
                                           LayerCase{"ComputeEndsWithLoads", 2.5, 4 + 4.0 / 4, 0}),
                         [](const auto& info) { return info.param.name; });

TEST(Sim, DecodePathCrossesTwoNics) {
  SimOptions options = small();
  options.policy = std::make_shared<DecodeOnly>();
  const SimResult result = simulate(options);
  const SimRequest request = only(result);
  expect_near(request.reading_s, kRead, "reading");
  expect_near(request.prefill_s, kCompute + kCompute / 4, "2 s of loads beside as much compute");
  expect_near(request.decode_s, 2.5 + ten_steps(), "what is published has arrived");
  EXPECT_EQ(result.snic_bytes, (std::vector<double>{0, 16000}));
  EXPECT_EQ(result.relayed_bytes, 16000);
  EXPECT_EQ(result.published_bytes, 4000) << "the decode node has the hit";
}

TEST(Sim, AHelperIsNeitherEnd) {
  SimOptions options = small();
  options.hardware.decode_nodes = 2;
  options.helpers = 1;
  options.policy = chosen([](const PlanRequest& request) {
    EXPECT_EQ(request.helpers.size(), 1u);
    return by(request, request.helpers.at(0).name, Path::kHelper, request.keys.size());
  });
  const SimResult result = simulate(options);
  expect_near(only(result).reading_s, kRead, "reading");
  expect_near(only(result).prefill_s, kCompute + kCompute / 4, "2 s of loads beside as much compute");
  EXPECT_EQ(result.snic_bytes, (std::vector<double>{0, 0, 16000}));
  EXPECT_EQ(result.relayed_bytes, 16000);
  EXPECT_EQ(result.published_bytes, 20000) << "the decode node needs the hit as well";
}

TEST(Sim, BothSidesReadAtOnce) {
  SimOptions options = small({{2000, 1536, 11, 0}});  // 24 blocks
  options.policy = std::make_shared<Split>();
  const SimResult result = simulate(options);
  expect_near(only(result).reading_s, 7.68, "half of it each");
  EXPECT_EQ(result.snic_bytes, (std::vector<double>{7680, 7680}));
  EXPECT_EQ(result.relayed_bytes, 7680);
  EXPECT_EQ(result.published_bytes, 4640 + 7680);
}

TEST(Sim, NarrowMemoryAndHighTraffic) {
  SimOptions options = small();
  options.hardware.dram = 500;
  expect_near(only(simulate(options)).reading_s, 32, "as fast as memory");
  options = small();
  options.hardware.high_share = 0.75;  // 2000 bytes/s are left to KV
  const SimRequest request = only(simulate(options));
  expect_near(request.reading_s, kRead, "storage is apart");
  expect_near(request.prefill_s, 16 + kCompute / 4, "1000 bytes/s for the loads");
}

TEST(Sim, NoHit) {
  for (const bool layerwise : {true, false}) {
    SimOptions options = small({{1000, 0, 11, 0}});
    options.layerwise = layerwise;
    options.policy = chosen([](const PlanRequest&) -> Plan { throw std::logic_error("nothing is to be planned"); });
    const SimResult result = simulate(options);
    expect_near(only(result).reading_s, 0, "reading");
    expect_near(only(result).prefill_s, 0.5 + 1 + 0.1 + 1.25e-6 * 1000 * 500, "prefill");
    EXPECT_EQ(result.read_bytes, 0);
    EXPECT_EQ(result.hit_bytes, 0);
    EXPECT_EQ(result.published_bytes, 10000);
  }
}

TEST(Sim, OneTokenIsNotDecoded) {
  for (const bool layerwise : {true, false}) {
    for (const bool scheduled : {true, false}) {
      SimOptions options = small({{2000, 1600, 1, 0}, {2100, 1700, 1, 0}, {2200, 1800, 2, 0}}, 2);
      options.layerwise = layerwise;
      options.scheduled = scheduled;
      options.model.compute.forward_s = 0.01;  // publishing takes longer
      const SimResult result = simulate(options);
      ASSERT_EQ(result.requests.size(), 6u);
      for (const SimRequest& request : result.requests) {
        if (request.output_tokens > 1) continue;
        EXPECT_EQ(request.second_s, 0);
        EXPECT_EQ(request.decode_s, 0) << "the first token is the last";
      }
    }
  }
}

TEST(Sim, ChunksOfAPrompt) {
  SimOptions options = small();
  options.free_loads = true;
  options.batch_tokens = 150;  // 150, 150, 100
  double wanted = 0;
  for (const auto& [cached, tokens] : {std::pair{1600.0, 150.0}, {1750.0, 150.0}, {1900.0, 100.0}}) {
    wanted += 0.5 + 0.001 * tokens + 0.0001 * (cached + tokens) + 1.25e-6 * tokens * (cached + tokens / 2);
  }
  expect_near(only(simulate(options)).prefill_s, wanted, "three passes");

  // Loads are beside the first pass only: 16000 bytes while 16000 + 1500 are published.
  options.free_loads = false;
  options.model.compute.forward_s = 10;
  const SimResult result = simulate(options);
  expect_near(only(result).prefill_s, wanted + 3 * 9.5 + 4.0 / 4, "three passes, and a layer of loads");
  EXPECT_EQ(result.published_bytes, 20000);
}

TEST(Sim, ABatchByItsAttention) {
  SimOptions options = small({{400, 0, 2, 0}});
  options.scheduled = true;
  options.free_loads = true;
  options.model.compute.context_s = 0;
  options.attention_quota_s = 0.0101;
  // As many tokens as fit the quota, pass by pass.
  int passes = 0;
  for (std::uint32_t cached = 0; cached < 400; ++passes) {
    std::uint32_t tokens = 0;
    while (cached + tokens < 400 && 1.25e-6 * (tokens + 1) * (cached + (tokens + 1) / 2.0) <= 0.0101) ++tokens;
    cached += tokens;
  }
  EXPECT_GT(passes, 5);
  expect_near(only(simulate(options)).prefill_s, passes * 0.5 + 0.4 + 1.25e-6 * 400 * 200, "passes");
  options.attention_quota_s = 1e-9;  // less than a token's: computed all the same
  expect_near(only(simulate(options)).prefill_s, 0.5 + 0.4 + 1.25e-6 * 400 * 200, "one pass");
}

TEST(Sim, AScheduledRequestWaitsForItsTwoFetches) {
  SimOptions options = small();
  options.scheduled = true;
  const SimRequest request = only(simulate(options));
  // Every 50 ms, the prefill group from 25 ms on, the decode group from 12.5 ms on: too early the first time.
  expect_near(request.scheduling_s, 0.0625, "scheduling");
  expect_near(request.reading_s, kRead, "reading");
}

// --- Several requests, by hand

TEST(Sim, EnginesOfAGroupStepTogether) {
  SimOptions options = small({{1000, 600, 2, 0}, {1000, 600, 2, 0}, {1000, 600, 2, 0}}, 3);
  options.workload.begins = {0, 1, 2, 3};
  options.workload.turns[2] = {2000, 1400, 2, 0};
  options.free_loads = true;
  options.hardware.engines_per_node = 2;
  options.hardware.engines_per_prefill_group = 2;
  std::map<std::uint32_t, SimRequest> of;
  for (const SimRequest& request : simulate(options).requests) of[request.agent] = request;
  ASSERT_EQ(of.size(), 3u);
  const auto attention = [](double cached, double n) { return 0.0001 * (cached + n) + 1.25e-6 * n * (cached + n / 2); };
  // The first has the group to itself, then the second on its engine and the third on the first's.
  const double one = 0.5 + 0.001 * 400 / 2 + attention(600, 400);
  const double two = 0.5 + 0.001 * (400 + 600) / 2 + attention(1400, 600);
  expect_near(of[0].prefill_s, one, "alone");
  expect_near(of[1].queueing_s, one, "behind the first");
  expect_near(of[1].prefill_s, two, "as slow as the third");
  expect_near(of[2].queueing_s, one, "behind the first");
  expect_near(of[2].prefill_s, two, "with the second");
}

TEST(Sim, ABatchOfAtMostSoManyRequests) {
  SimOptions options = small({{100, 0, 2, 0}}, 5);
  options.free_loads = true;
  const double extra = 0.1 + 0.0001 * 100 + 1.25e-6 * 100 * 50;
  for (const auto& [most, passes] : {std::pair{0u, std::vector<int>{1, 4}}, {2u, {1, 2, 2}}, {1u, {1, 1, 1, 1, 1}}}) {
    options.batch_requests = most;
    std::vector<double> wanted;
    double at = 0.05;
    for (const int count : passes) {
      at += 0.5 + count * extra;
      wanted.insert(wanted.end(), static_cast<std::size_t>(count), at);
    }
    std::map<std::uint32_t, double> got;
    for (const SimRequest& request : simulate(options).requests) got[request.agent] = request.ttft_s();
    ASSERT_EQ(got.size(), 5u);
    for (std::uint32_t i = 0; i < 5; ++i) expect_near(got[i], wanted[i], "in the order of coming");
  }
}

TEST(Sim, StorageReadsOneAfterTheOther) {
  SimOptions options = small({{2000, 1600, 2, 0}}, 3);
  options.workload.begins = {0, 1};
  std::map<std::uint32_t, double> reading;
  for (const SimRequest& request : simulate(options).requests) reading[request.agent] = request.reading_s;
  for (std::uint32_t i = 0; i < 3; ++i) expect_near(reading[i], kRead * (i + 1), "first come first served");
}

struct StagingCase {
  const char* name;
  double staging;
  bool decode_reads;
  double second_s;  // reading of the second
};
void PrintTo(const StagingCase& one, std::ostream* out) { *out << one.name; }

class Staging : public ::testing::TestWithParam<StagingCase> {};

TEST_P(Staging, IsHeldUntilTheHitIsTaken) {
  SimOptions options = small({{2000, 1600, 2, 0}}, 2);
  options.hardware.staging = GetParam().staging;
  if (GetParam().decode_reads) options.policy = std::make_shared<DecodeOnly>();
  options.workload.end_s = 1000;
  std::map<std::uint32_t, double> reading;
  for (const SimRequest& request : simulate(options).requests) reading[request.agent] = request.reading_s;
  ASSERT_EQ(reading.size(), 2u);
  expect_near(reading[0], kRead, "the first");
  expect_near(reading[1], GetParam().second_s, "the second");
}

// A pass takes 4 + 2/4 s where the prefill node read, 2 + 2/4 where the decode node did; there it is copied in in 2.5.
INSTANTIATE_TEST_SUITE_P(Cases, Staging,
                         ::testing::Values(StagingCase{"WithoutEnd", 0, false, 32},
                                           StagingCase{"Two", 32000, false, 32},
                                           StagingCase{"NotQuiteTwo", 31999, false, 16 + 4.5 + 16},
                                           StagingCase{"One", 16000, false, 16 + 4.5 + 16},
                                           StagingCase{"LessThanOne", 100, false, 16 + 4.5 + 16},
                                           StagingCase{"DecodeWithoutEnd", 0, true, 32},
                                           StagingCase{"DecodeOne", 20000, true, 16 + 2.5 + 2.5 + 16},
                                           StagingCase{"DecodeLessThanOne", 1, true, 16 + 2.5 + 2.5 + 16}),
                         [](const auto& info) { return info.param.name; });

TEST(Sim, DecodeMemoryIsWaitedFor) {
  SimOptions options = small({{1000, 600, 201, 0}}, 2);
  options.free_loads = true;
  options.hardware.decode_memory_tokens = 1201;
  std::map<std::uint32_t, SimRequest> of;
  for (const SimRequest& request : simulate(options).requests) of[request.agent] = request;
  const double steps = 200 * (0.012 + 1e-6 * 1001) + 1e-6 * 200 * 200 / 2;
  const double first = 0.05 + of[0].prefill_s;
  expect_near(of[0].decode_s, steps, "at once");
  // The second's first token is out a pass later; then it waits for the first to leave.
  const double second = of[1].ttft_s();
  expect_near(of[1].decode_s, std::max(0.0, first + steps - second) + steps, "alone");
  ASSERT_GT(first + steps, second) << "or nothing is waited for";
}

TEST(Sim, ThinkTimesAndSessionsInTurn) {
  SimOptions options = small({{500, 100, 3, 0}, {600, 500, 3, 2.5f}, {700, 600, 2, 7}, {900, 0, 1, 4}}, 5);
  options.workload.begins = {0, 3, 4};  // agents 0, 2, 4 have three turns, the others one
  const SimResult result = simulate(options);
  std::map<std::uint32_t, std::vector<SimRequest>> of;
  for (const SimRequest& request : result.requests) of[request.agent].push_back(request);
  ASSERT_EQ(of.size(), 5u);
  for (const auto& [agent, requests] : of) {
    ASSERT_EQ(requests.size(), agent % 2 == 0 ? 3u : 1u);
    double ready = 0;
    for (std::uint32_t turn = 0; turn < requests.size(); ++turn) {
      EXPECT_EQ(requests[turn].turn, turn);
      if (turn > 0) ready += options.workload.turns[turn].think_s;
      EXPECT_NEAR(requests[turn].arrival_s, ready, 1e-4);
      ready = requests[turn].arrival_s + requests[turn].ttft_s() + requests[turn].decode_s;
    }
  }
}

TEST(Sim, PoissonArrivals) {
  SimOptions options = small({{100, 64, 1, 0}}, 4000);
  options.free_loads = true;
  options.workload.agents_per_s = 20;
  options.model.compute.forward_s = 0.01;
  options.model.compute.token_s = 0;
  std::vector<double> at;
  for (const SimRequest& request : simulate(options).requests) at.push_back(request.arrival_s);
  ASSERT_EQ(at.size(), 4000u);
  std::sort(at.begin(), at.end());
  double sum = 0, squares = 0, before = 0;
  for (const double one : at) {
    sum += one - before;
    squares += (one - before) * (one - before);
    before = one;
  }
  const double mean = sum / 4000;
  EXPECT_NEAR(mean, 0.05, 0.05 * 4 / std::sqrt(4000.0));
  EXPECT_NEAR(std::sqrt(squares / 4000 - mean * mean) / mean, 1, 0.1) << "of an exponential, as wide as its mean";
}

// --- Where it stops

TEST(Sim, StopsAtTheEnd) {
  SimOptions options = small();
  options.workload.end_s = 5.25;  // while it is read
  options.window_s = 2;
  const SimResult result = simulate(options);
  EXPECT_TRUE(result.requests.empty());
  EXPECT_TRUE(result.agent_seconds.empty());
  EXPECT_DOUBLE_EQ(result.seconds, 5.25);
  EXPECT_NEAR(result.read_bytes, 5200, 1e-6);
  EXPECT_EQ(result.hit_bytes, 0) << "its load has not ended";
  ASSERT_EQ(result.windows.size(), 2u);
  EXPECT_EQ(result.windows[1].running, 1u);
  EXPECT_NEAR(result.windows[0].prefill_snic, 1.95 / 2, 1e-6);
  EXPECT_NEAR(result.windows[1].prefill_snic, 1, 1e-6);
  EXPECT_NEAR(result.windows[1].snic_max, 1, 1e-6);
  EXPECT_EQ(result.windows[1].decode_snic, 0);

  options.workload.end_s = 1000;  // after the last answer
  const SimResult whole = simulate(options);
  EXPECT_EQ(whole.requests.size(), 1u);
  EXPECT_LT(whole.seconds, 100);
  EXPECT_EQ(whole.hit_bytes, 16000);
}

// --- Storage as the bottleneck

// Long hits, little compute; wide networks.
SimOptions storage_bound(std::uint32_t decode_nodes) {
  SimOptions options = small({{6400, 6336, 20, 0}, {6500, 6400, 20, 0}, {6600, 6464, 20, 0}}, 40);
  options.model.bytes_per_token = 1000;
  options.hardware.decode_nodes = decode_nodes;
  options.hardware.snic = 1e6;
  options.hardware.cnic = 1e9;
  options.hardware.dram = 1e10;
  options.hardware.decode_memory_tokens = 1e6;
  options.model.compute = {};
  options.model.compute.forward_s = 1e-3;
  options.model.compute.step_s = 1e-3;
  options.helpers = decode_nodes - 1;
  return options;
}

TEST(Sim, ThroughputGrowsWithTheStorageNicsThatRead) {
  for (const std::uint32_t decode_nodes : {1u, 2u}) {
    SimOptions options = storage_bound(decode_nodes);
    options.policy = std::make_shared<PrefillOnly>();
    const SimResult basic = simulate(options);
    EXPECT_NEAR(basic.seconds, basic.hit_bytes / 1e6, 0.02 * basic.seconds) << "one SNIC, always busy";
    for (const auto& policy : std::initializer_list<std::shared_ptr<PathPolicy>>{
             std::make_shared<ShortestQueue>(), std::make_shared<Split>(), std::make_shared<RoundRobin>()}) {
      options.policy = policy;
      const SimResult dual = simulate(options);
      const double sides = 1.0 + decode_nodes;
      EXPECT_GT(basic.seconds / dual.seconds, 0.93 * sides) << policy->name();
      EXPECT_LT(basic.seconds / dual.seconds, 1.02 * sides) << policy->name();
      EXPECT_DOUBLE_EQ(dual.hit_bytes, basic.hit_bytes);
      for (const double bytes : dual.snic_bytes) {
        EXPECT_NEAR(bytes, dual.hit_bytes / sides, 0.07 * dual.hit_bytes) << policy->name();
      }
    }
  }
  SimOptions options = storage_bound(1);
  options.policy = std::make_shared<PrefillOnly>();
  const double basic = simulate(options).seconds;
  options.policy = nullptr;
  options.scheduled = true;
  options.scheduler = {.short_queue_tokens = 3000, .full_tokens = 100000};
  EXPECT_GT(basic / simulate(options).seconds, 1.85) << "the scheduler chooses the shorter queue";
}

// --- What must hold of every run

std::string dump(const SimResult& result) {
  std::ostringstream out;
  out << std::hexfloat << result.seconds << ' ' << result.hit_bytes << ' ' << result.read_bytes << ' '
      << result.relayed_bytes << ' ' << result.published_bytes << ' ' << result.recomputed_bytes << ' ' << result.events
      << '\n';
  for (const SimRequest& r : result.requests) {
    out << r.agent << ' ' << r.turn << ' ' << r.arrival_s << ' ' << r.scheduling_s << ' ' << r.reading_s << ' '
        << r.queueing_s << ' ' << r.prefill_s << ' ' << r.second_s << ' ' << r.decode_s << ' ' << r.output_tokens
        << '\n';
  }
  for (const float one : result.agent_seconds) out << one << '\n';
  for (const double one : result.snic_bytes) out << one << '\n';
  for (const SimWindow& w : result.windows) {
    out << w.prefill_snic << ' ' << w.decode_snic << ' ' << w.snic_max << ' ' << w.cnic << ' ' << w.attention_ratio
        << ' ' << w.running << ' ' << w.prompt_tokens << '\n';
  }
  return out.str();
}

// Sessions that grow turn by turn, on a cluster of any shape, in any mode.
SimOptions random_options(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](std::uint32_t n) { return static_cast<std::uint32_t>(random() % n); };
  SimOptions options = small();
  options.model.layers = 1 + below(8);
  options.model.bytes_per_token = below(2) ? 10 : 10.1;
  options.model.compute.copy_call_s = 1e-5;
  options.hardware.prefill_nodes = 1 + below(3);
  options.hardware.decode_nodes = 1 + below(3);
  options.hardware.engines_per_node = 1 + below(3);
  options.hardware.engines_per_prefill_group = 1 + below(4);
  options.hardware.snic = 5000 + below(100000);
  options.hardware.cnic = 5000 + below(100000);
  options.hardware.dram = 10000 + below(200000);
  options.hardware.high_share = below(2) * 0.3;
  options.hardware.staging = below(2) ? 0 : 1 + below(40000);
  SimWorkload& load = options.workload;
  load.turns.clear();
  load.begins = {0};
  std::uint32_t largest = 0;
  for (std::uint32_t session = 0; session < 1 + below(4); ++session) {
    std::uint32_t context = 0;
    for (std::uint32_t turn = 0; turn < 1 + below(5); ++turn) {
      const std::uint32_t hit = below(5) == 0 ? 0 : context;
      const std::uint32_t input = context + 1 + below(600), output = 1 + below(4) * below(20);
      load.turns.push_back({input, hit, output, below(2) * 0.1f * static_cast<float>(below(10))});
      context = input + output;
      largest = std::max(largest, context);
    }
    load.begins.push_back(load.turns.size());
  }
  load.agents = 1 + below(20);
  load.agents_per_s = below(2) * 2.0;
  load.seed = seed;
  options.hardware.decode_memory_tokens = largest + (below(2) ? 0 : 3000);
  options.layerwise = below(3) > 0;
  options.free_loads = below(8) == 0;
  options.scheduled = below(2) == 0;
  options.scheduler.short_queue_tokens = 1 + below(5000);
  options.scheduler.full_tokens = 1 + below(5000);
  options.helpers = below(3);
  options.batch_tokens = below(2) ? 8192 : 1 + below(500);
  options.batch_requests = below(2) * (1 + below(3));
  options.attention_quota_s = below(2) ? 0.3 : 1e-3 + 1e-4 * below(1000);
  options.window_s = 0.5 + below(5);
  switch (below(6)) {
    case 0: options.policy = nullptr; break;
    case 1: options.policy = std::make_shared<PrefillOnly>(); break;
    case 2: options.policy = std::make_shared<DecodeOnly>(); break;
    case 3: options.policy = std::make_shared<ShortestQueue>(); break;
    case 4: options.policy = std::make_shared<Split>(4, 1); break;
    case 5: {
      const auto recompute = std::make_shared<Recompute>(std::make_shared<Split>(3, 1), 0);
      const SimCompute& c = options.model.compute;
      for (std::uint32_t n = 100; n <= 1000; n += 100) recompute->observe(n, n, c.token_s * n + c.pair_s * n * n * 1.5);
      options.policy = recompute;
      break;
    }
  }
  // Should it never end by itself, the test does.
  load.end_s = 1e5;
  return options;
}

TEST(Sim, NothingIsLostInAnyRun) {
  for (unsigned seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const SimOptions options = random_options(seed);
    const SimWorkload& load = options.workload;
    SimResult result;
    ASSERT_NO_THROW(result = simulate(options));

    double hits = 0, inputs = 0, decoded_inputs = 0;
    std::size_t turns = 0;
    const double per_token = options.model.bytes_per_token;
    for (std::uint64_t agent = 0; agent < load.agents; ++agent) {
      const std::size_t session = agent % (load.begins.size() - 1);
      for (std::uint64_t i = load.begins[session]; i < load.begins[session + 1]; ++i, ++turns) {
        hits += load.turns[i].hit_tokens * per_token;
        inputs += load.turns[i].input_tokens * per_token;
        if (load.turns[i].output_tokens > 1) decoded_inputs += load.turns[i].input_tokens * per_token;
      }
    }
    ASSERT_EQ(result.requests.size(), turns) << "not all have ended by " << result.seconds;
    EXPECT_EQ(result.agent_seconds.size(), load.agents);
    const double slack = 1e-7 * std::max(1.0, inputs);
    EXPECT_NEAR(result.hit_bytes + result.recomputed_bytes, hits, slack);
    EXPECT_NEAR(result.read_bytes, options.free_loads ? 0 : result.hit_bytes, slack);
    EXPECT_NEAR(std::accumulate(result.snic_bytes.begin(), result.snic_bytes.end(), 0.0), result.read_bytes, slack);
    ASSERT_EQ(result.snic_bytes.size(), options.hardware.prefill_nodes + options.hardware.decode_nodes);
    if (options.free_loads) {
      EXPECT_EQ(result.relayed_bytes + result.published_bytes, 0);
    } else if (!options.layerwise) {
      EXPECT_NEAR(result.published_bytes, decoded_inputs, slack);
    } else if (options.helpers == 0) {
      EXPECT_NEAR(result.published_bytes + result.relayed_bytes, inputs, slack) << "every prompt has all its KV there";
    } else {
      EXPECT_GE(result.published_bytes + result.relayed_bytes, inputs - slack) << "what helpers read is sent twice";
    }

    std::map<std::uint32_t, std::uint32_t> next;
    std::map<std::uint32_t, double> ready;
    double last = 0;
    for (const SimRequest& request : result.requests) {
      EXPECT_EQ(request.turn, next[request.agent]++) << "agent " << request.agent;
      for (const float one : {request.scheduling_s, request.reading_s, request.queueing_s, request.prefill_s,
                              request.second_s, request.decode_s}) {
        EXPECT_GE(one, 0);
      }
      EXPECT_GT(request.prefill_s, 0);
      const std::size_t session = request.agent % (load.begins.size() - 1);
      const SimTurn& turn = load.turns[load.begins[session] + request.turn];
      EXPECT_EQ(request.output_tokens, turn.output_tokens);
      const double end = request.arrival_s + request.ttft_s() + request.decode_s;
      EXPECT_GE(request.arrival_s, ready[request.agent] + (request.turn > 0 ? turn.think_s : 0) - 1e-3);
      ready[request.agent] = end;
      last = std::max(last, end);
    }
    EXPECT_GE(result.seconds, last - 1e-4 * std::max(1.0, last));
    std::uint64_t prompt_tokens = 0;
    for (const SimWindow& window : result.windows) {
      for (const float one : {window.prefill_snic, window.decode_snic, window.snic_max, window.cnic}) {
        EXPECT_GE(one, 0);
        EXPECT_LE(one, 1 + 1e-4);
      }
      EXPECT_LE(window.running, load.agents);
      EXPECT_TRUE(window.attention_ratio == 0 || window.attention_ratio > 1 - 1e-4);
      prompt_tokens += window.prompt_tokens;
    }
    EXPECT_LE(static_cast<double>(prompt_tokens) * per_token, inputs + slack);
  }
}

TEST(Sim, EqualOptionsGiveEqualResults) {
  for (unsigned seed = 1; seed <= 40; ++seed) {
    const std::string first = dump(simulate(random_options(seed)));
    EXPECT_EQ(first, dump(simulate(random_options(seed)))) << "seed " << seed;
  }
}

TEST(Sim, TheSeedIsOfArrivals) {
  SimOptions options = small({{2000, 1600, 11, 0}}, 10);
  const std::string together = dump(simulate(options));
  options.workload.seed = 2;
  EXPECT_EQ(dump(simulate(options)), together);
  options.workload.agents_per_s = 0.1;
  const std::string spread = dump(simulate(options));
  EXPECT_EQ(dump(simulate(options)), spread);
  options.workload.seed = 3;
  EXPECT_NE(dump(simulate(options)), spread);
}

TEST(Sim, StagingThatFitsNobodyStillServesAll) {
  // Blocks whose bytes are no round numbers: sums of them must not leave a trace that looks like something staged.
  SimOptions options = small({{1000, 601, 2, 0}, {1200, 835, 2, 0}, {1500, 1109, 2, 0}}, 9);
  options.model.bytes_per_token = 0.1;
  options.hardware.snic = 100;
  options.hardware.decode_nodes = 2;
  options.helpers = 1;
  options.policy = std::make_shared<Split>(3, 1);
  options.workload.end_s = 10000;
  for (const double staging : {1e-3, 1.0, 20.0, 50.0, 70.0}) {
    options.hardware.staging = staging;
    EXPECT_EQ(simulate(options).requests.size(), 27u) << "staging of " << staging << " bytes";
  }
}

TEST(Sim, ScheduledEnginesWithMemoryForOneRequest) {
  SimOptions options = small({{1000, 600, 24, 0}, {1000, 700, 24, 0}}, 12);
  options.scheduled = true;
  options.hardware.prefill_nodes = 2;
  options.hardware.decode_nodes = 2;
  options.hardware.decode_memory_tokens = 1024;
  options.workload.end_s = 10000;
  for (const std::uint64_t full : {std::uint64_t{1}, std::uint64_t{1024}, std::uint64_t{100000}}) {
    options.scheduler = {.short_queue_tokens = 1000, .full_tokens = full};
    const SimResult result = simulate(options);
    EXPECT_EQ(result.requests.size(), 24u) << "full at " << full;
    EXPECT_LT(result.seconds, 10000);
  }
}

// --- Policies

TEST(Sim, WhatAPolicyLeavesOutIsComputed) {
  for (const std::size_t loaded : {0u, 10u, 24u}) {
    SimOptions options = small();  // 25 blocks
    options.policy = chosen([&](const PlanRequest& request) {
      EXPECT_EQ(request.keys.size(), 25u);
      return by(request, request.prefill.name, Path::kPrefill, loaded);
    });
    options.model.compute.forward_s = 100;  // beside it, loads show for a layer
    const double cached = 64.0 * static_cast<double>(loaded), n = 2000 - cached;
    const SimResult result = simulate(options);
    expect_near(only(result).reading_s, cached * 10 / 1000, "reading");
    // The loads share the CNIC with what is published, which is more.
    const double loads = cached * 10 / 4000;
    expect_near(only(result).prefill_s, 100 + 0.001 * n + 0.0001 * 2000 + 1.25e-6 * n * (cached + n / 2) + loads / 4,
                "prefill");
    EXPECT_DOUBLE_EQ(result.hit_bytes, cached * 10);
    EXPECT_DOUBLE_EQ(result.recomputed_bytes, 16000 - cached * 10);
    EXPECT_DOUBLE_EQ(result.read_bytes, cached * 10);
    EXPECT_DOUBLE_EQ(result.published_bytes, 20000);
  }
}

TEST(Sim, APolicySeesQueuesAndRates) {
  SimOptions options = small({{2000, 1600, 2, 0}}, 2);
  options.hardware.engines_per_node = 2;
  options.hardware.high_share = 0.25;
  int seen = 0;
  options.policy = chosen([&](const PlanRequest& request) {
    EXPECT_EQ(request.prefill.name, "prefill-0");
    EXPECT_EQ(request.decode.value().name, "decode-0");
    EXPECT_TRUE(request.helpers.empty());
    EXPECT_EQ(request.prefill.read_bandwidth, 1000u);
    EXPECT_EQ(request.decode->link_bandwidth, 2u * 6000);
    EXPECT_EQ(request.prefill.tokens_per_block, 64u);
    EXPECT_EQ(request.prefill.block_bytes, 640u);
    EXPECT_EQ(request.prefill.read_queue_bytes, seen == 0 ? 0u : 16000u);
    EXPECT_EQ(request.decode->read_queue_bytes, 0u);
    // Its own tokens; the first computes on another engine.
    EXPECT_NEAR(request.prefill.compute_queue_s.value(), 0.4 + 0.2 + 0.9, 1e-9);
    ++seen;
    return by(request, request.prefill.name, Path::kPrefill, request.keys.size());
  });
  simulate(options);
  EXPECT_EQ(seen, 2);
}

TEST(Sim, HelpersAreTheShortestQueues) {
  SimOptions options = small({{2000, 1600, 2, 0}}, 3);
  options.hardware.decode_nodes = 4;
  options.helpers = 2;
  std::vector<std::vector<std::string>> seen;
  options.policy = chosen([&](const PlanRequest& request) {
    seen.emplace_back();
    for (const NodeView& helper : request.helpers) seen.back().push_back(helper.name);
    return by(request, request.helpers.front().name, Path::kHelper, request.keys.size());
  });
  simulate(options);
  // Decode nodes by turns: 0, 1, 2. The first is read by decode-1, the second by decode-0.
  using Names = std::vector<std::string>;
  EXPECT_EQ(seen, (std::vector<Names>{{"decode-1", "decode-2"}, {"decode-0", "decode-2"}, {"decode-3", "decode-0"}}));
}

template <typename Exception>
std::string refusal(const SimOptions& options) {
  try {
    simulate(options);
  } catch (const Exception& error) {
    return error.what();
  }
  return "";
}

TEST(Sim, ErrorsOfAPolicyPassThrough) {
  SimOptions options = small();
  options.policy = chosen([](const PlanRequest&) -> Plan { throw std::out_of_range("the policy's own"); });
  EXPECT_EQ(refusal<std::out_of_range>(options), "the policy's own");

  options.policy = chosen([](const PlanRequest& request) { return by(request, "nowhere-7", Path::kHelper, 3); });
  EXPECT_NE(refusal<Error>(options).find("nowhere-7"), std::string::npos) << refusal<Error>(options);

  options.policy = chosen([](const PlanRequest& request) {
    Plan plan = by(request, request.prefill.name, Path::kPrefill, 5);
    plan.ranges[0].count = 4;
    return plan;
  });
  EXPECT_NE(refusal<Error>(options).find("4 of 5"), std::string::npos) << refusal<Error>(options);

  options.policy = chosen([](const PlanRequest& request) {
    Plan plan = by(request, request.prefill.name, Path::kPrefill, 25);
    plan.keys.push_back(plan.keys.front());
    plan.ranges[0].count = 26;
    return plan;
  });
  EXPECT_NE(refusal<Error>(options).find("26 blocks of a hit of 25"), std::string::npos) << refusal<Error>(options);
}

// --- Refusals

struct Refused {
  const char* named;
  const char* value;  // as the message says it
  std::function<void(SimOptions&)> change;
};
void PrintTo(const Refused& one, std::ostream* out) { *out << one.named << " " << one.value; }

class Refusals : public ::testing::TestWithParam<Refused> {};

TEST_P(Refusals, NameTheValueAndDoNothing) {
  SimOptions options = small();
  const auto policy = chosen([](const PlanRequest& request) {
    return by(request, request.prefill.name, Path::kPrefill, request.keys.size());
  });
  options.policy = policy;
  EXPECT_NO_THROW(simulate(options));
  EXPECT_EQ(policy->calls, 1);
  GetParam().change(options);
  try {
    simulate(options);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kInvalidArgument);
    const std::string message = error.what();
    EXPECT_NE(message.find(GetParam().named), std::string::npos) << message;
    EXPECT_NE(message.find(GetParam().value), std::string::npos) << message;
  }
  EXPECT_EQ(policy->calls, 1);
}

INSTANTIATE_TEST_SUITE_P(
    Values, Refusals,
    ::testing::Values(
        Refused{"prefill_nodes", "0", [](SimOptions& o) { o.hardware.prefill_nodes = 0; }},
        Refused{"decode_nodes", "0", [](SimOptions& o) { o.hardware.decode_nodes = 0; }},
        Refused{"engines_per_node", "0", [](SimOptions& o) { o.hardware.engines_per_node = 0; }},
        Refused{"engines_per_prefill_group", "0", [](SimOptions& o) { o.hardware.engines_per_prefill_group = 0; }},
        Refused{"snic", "0", [](SimOptions& o) { o.hardware.snic = 0; }},
        Refused{"snic", "-3", [](SimOptions& o) { o.hardware.snic = -3; }},
        Refused{"snic", "nan", [](SimOptions& o) { o.hardware.snic = kNaN; }},
        Refused{"cnic", "inf", [](SimOptions& o) { o.hardware.cnic = kInfinity; }},
        Refused{"dram", "0", [](SimOptions& o) { o.hardware.dram = 0; }},
        Refused{"high_share", "1", [](SimOptions& o) { o.hardware.high_share = 1; }},
        Refused{"high_share", "-0.1", [](SimOptions& o) { o.hardware.high_share = -0.1; }},
        Refused{"high_share", "nan", [](SimOptions& o) { o.hardware.high_share = kNaN; }},
        Refused{"staging", "-1", [](SimOptions& o) { o.hardware.staging = -1; }},
        Refused{"staging", "inf", [](SimOptions& o) { o.hardware.staging = kInfinity; }},
        Refused{"decode_memory_tokens", "0", [](SimOptions& o) { o.hardware.decode_memory_tokens = 0; }},
        Refused{"decode_memory_tokens", "2010", [](SimOptions& o) { o.hardware.decode_memory_tokens = 2010; }},
        Refused{"layers", "0", [](SimOptions& o) { o.model.layers = 0; }},
        Refused{"tokens_per_block", "0", [](SimOptions& o) { o.model.tokens_per_block = 0; }},
        Refused{"bytes_per_token", "0", [](SimOptions& o) { o.model.bytes_per_token = 0; }},
        Refused{"compute", "-1", [](SimOptions& o) { o.model.compute.token_s = -1; }},
        Refused{"compute", "inf", [](SimOptions& o) { o.model.compute.step_s = kInfinity; }},
        Refused{"forward_s", "no time", [](SimOptions& o) { o.model.compute.forward_s = o.model.compute.token_s = 0; }},
        Refused{"step_s", "no time",
                [](SimOptions& o) { o.model.compute.step_s = o.model.compute.step_request_s = 0; }},
        Refused{"agents", "0", [](SimOptions& o) { o.workload.agents = 0; }},
        Refused{"agents", "1073741824", [](SimOptions& o) { o.workload.agents = 1u << 30; }},
        Refused{"agents_per_s", "-1", [](SimOptions& o) { o.workload.agents_per_s = -1; }},
        Refused{"end_s", "-5", [](SimOptions& o) { o.workload.end_s = -5; }},
        Refused{"end_s", "nan", [](SimOptions& o) { o.workload.end_s = kNaN; }},
        Refused{"begins", "session", [](SimOptions& o) { o.workload.begins = {}; }},
        Refused{"begins", "session", [](SimOptions& o) { o.workload.begins = {0}; }},
        Refused{"begins", "turns", [](SimOptions& o) { o.workload.begins = {0, 2}; }},
        Refused{"begins", "turns", [](SimOptions& o) { o.workload.begins = {1, 1}; }},
        Refused{"session 0", "no turns", [](SimOptions& o) { o.workload.begins = {0, 0, 1}; }},
        Refused{"input", "2000 input, 2000 hit", [](SimOptions& o) { o.workload.turns[0].hit_tokens = 2000; }},
        Refused{"output", "0 output", [](SimOptions& o) { o.workload.turns[0].output_tokens = 0; }},
        Refused{"think", "-1", [](SimOptions& o) { o.workload.turns[0].think_s = -1; }},
        Refused{"think", "nan", [](SimOptions& o) { o.workload.turns[0].think_s = std::nanf(""); }},
        Refused{"think", "inf",
                [](SimOptions& o) { o.workload.turns[0].think_s = std::numeric_limits<float>::infinity(); }},
        Refused{"batch_tokens", "0", [](SimOptions& o) { o.batch_tokens = 0; }},
        Refused{"fetch_s", "0", [](SimOptions& o) { o.fetch_s = 0; }},
        Refused{"window_s", "0", [](SimOptions& o) { o.window_s = 0; }},
        Refused{"attention_quota_s", "-1", [](SimOptions& o) { o.attention_quota_s = -1; }}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

}  // namespace
}  // namespace dualkv
