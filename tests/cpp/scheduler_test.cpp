// Every rule of the scheduler as a case, and a random history in which no request is lost, starved or assigned twice.
#include "dualkv/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <tuple>

#include "dualkv/status.h"

namespace dualkv {
namespace {

constexpr std::uint64_t kAlpha = 1000;  // a read queue is short up to here
constexpr std::uint64_t kBeta = 500;    // an engine is full beyond

SchedulerOptions options() {
  SchedulerOptions out;
  out.short_queue_tokens = kAlpha;
  out.full_tokens = kBeta;
  return out;
}

EngineReport prefill(std::string engine, std::uint64_t tokens, std::uint64_t queue, std::uint64_t seen = 0) {
  EngineReport out;
  out.engine = std::move(engine);
  out.tokens = tokens;
  out.read_queue_tokens = queue;
  out.seen = seen;
  return out;
}

EngineReport decode(std::string engine, std::uint32_t requests, std::uint64_t tokens, std::uint64_t free,
                    std::uint64_t queue = 0, std::uint64_t seen = 0) {
  EngineReport out;
  out.engine = std::move(engine);
  out.requests = requests;
  out.tokens = tokens;
  out.free_tokens = free;
  out.read_queue_tokens = queue;
  out.seen = seen;
  return out;
}

template <typename Call>
Code code_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.status().code;
  }
  return Code::kOk;
}

std::vector<std::string> engines_of(const Fetched& fetched) {
  std::vector<std::string> out;
  for (const Assignment& one : fetched.assignments) out.push_back(one.engine);
  return out;
}

using Names = std::vector<std::string>;

// Prefill engines take what waits: as many as it needs.
void give_prefill(Scheduler& scheduler) {
  for (int i = 0; scheduler.stats().waiting_prefill > 0; ++i) {
    const std::string name = "any" + std::to_string(i);
    scheduler.join(name, EngineRole::kPrefill, name, name);
    ASSERT_FALSE(scheduler.fetch(name, {}).assignments.empty());
  }
}

// --- Algorithm 1, case by case: engines as reported, requests of 100 tokens, who gets them.

struct PrefillCase {
  const char* what;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> engines;  // tokens, its node's read queue
  int requests;
  std::vector<int> want;  // the engine of each, in the order of requests
};

class PrefillRules : public ::testing::TestWithParam<PrefillCase> {};

TEST_P(PrefillRules, GiveEachRequestItsEngine) {
  Scheduler scheduler(options());
  std::vector<EngineReport> reports;
  for (std::size_t i = 0; i < GetParam().engines.size(); ++i) {
    const std::string name = "e" + std::to_string(i);
    scheduler.join(name, EngineRole::kPrefill, "g", "node of " + name);
    reports.push_back(prefill(name, GetParam().engines[i].first, GetParam().engines[i].second));
  }
  for (int i = 0; i < GetParam().requests; ++i) scheduler.submit(i + 1, 100, 0);
  const Fetched fetched = scheduler.fetch("g", reports);
  Names want;
  for (int engine : GetParam().want) want.push_back("e" + std::to_string(engine));
  EXPECT_EQ(engines_of(fetched), want);
  for (std::size_t i = 0; i < fetched.assignments.size(); ++i) {
    EXPECT_EQ(fetched.assignments[i].request, i + 1) << "first come, first served";
    EXPECT_FALSE(fetched.assignments[i].reason.text().empty());
  }
  EXPECT_EQ(scheduler.stats().waiting_prefill, GetParam().requests - want.size());
}

INSTANTIATE_TEST_SUITE_P(
    Algorithm1, PrefillRules,
    ::testing::Values(
        PrefillCase{"nothing waits", {{0, 0}}, 0, {}},
        PrefillCase{"one engine takes until it is full", {{0, 0}}, 9, {0, 0, 0, 0, 0, 0}},
        PrefillCase{"fewest tokens", {{300, 0}, {100, 0}, {200, 0}}, 1, {1}},
        PrefillCase{"a tie goes to the one that joined first", {{50, 0}, {50, 0}}, 2, {0, 1}},
        PrefillCase{"what was assigned counts at once", {{0, 0}, {150, 0}}, 4, {0, 0, 1, 0}},
        PrefillCase{"short queues first, whatever the tokens", {{0, kAlpha + 1}, {400, kAlpha}}, 2, {1, 1}},
        PrefillCase{"long queues when nothing else is able", {{0, kAlpha + 1}, {kBeta + 1, 0}}, 2, {0, 0}},
        PrefillCase{"exactly beta is able", {{kBeta, 0}}, 2, {0}},
        PrefillCase{"all full: nothing", {{kBeta + 1, 0}, {kBeta + 1, 5000}}, 3, {}}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

// --- Decode engines of a group, case by case: engines as reported, requests by size, who gets them.

struct DecodeCase {
  const char* what;
  struct Reported {
    std::uint32_t requests;
    std::uint64_t tokens, free;
  };
  std::vector<Reported> engines;
  std::vector<std::uint64_t> requests;  // tokens of each
  std::vector<int> want;                // the engine of each that got one, in order
  std::uint64_t refused = 0;
};

class DecodeRules : public ::testing::TestWithParam<DecodeCase> {};

TEST_P(DecodeRules, GiveEachRequestItsEngine) {
  Scheduler scheduler(options());
  std::vector<EngineReport> reports;
  for (const DecodeCase::Reported& one : GetParam().engines) {
    const std::string name = "e" + std::to_string(reports.size());
    scheduler.join(name, EngineRole::kDecode, "g", "n");
    reports.push_back(decode(name, one.requests, one.tokens, one.free));
  }
  std::uint64_t id = 0;
  for (std::uint64_t tokens : GetParam().requests) scheduler.submit(++id, tokens, 0);
  give_prefill(scheduler);
  const Fetched fetched = scheduler.fetch("g", reports);
  Names want;
  for (int engine : GetParam().want) want.push_back("e" + std::to_string(engine));
  EXPECT_EQ(engines_of(fetched), want);
  EXPECT_EQ(fetched.placements.size(), want.size());
  EXPECT_EQ(fetched.refused.size(), GetParam().refused);
  EXPECT_EQ(scheduler.stats().waiting_decode, id - want.size() - GetParam().refused);
}

INSTANTIATE_TEST_SUITE_P(
    TwoPhases, DecodeRules,
    ::testing::Values(
        DecodeCase{"nothing waits", {{0, 0, 1000}}, {}, {}},
        DecodeCase{"exactly the memory it needs", {{3, 300, 100}}, {100}, {0}},
        DecodeCase{"a token less: it waits", {{3, 300, 99}}, {100}, {}},
        DecodeCase{"memory in pieces is not enough", {{1, 100, 60}, {1, 100, 60}}, {100}, {}},
        DecodeCase{"memory decides before requests do", {{9, 300, 100}, {0, 300, 99}}, {100}, {0}},
        DecodeCase{"fewest requests, whatever the tokens", {{5, 0, 1000}, {2, 50, 1000}, {9, 400, 1000}}, {100}, {1}},
        DecodeCase{"a tie goes to the one that joined first", {{2, 100, 1000}, {2, 100, 1000}}, {10}, {0}},
        DecodeCase{"exactly 1.05 of the mean, 1,050, is within", {{5, 950, 1000}, {2, 950, 1000}}, {100}, {1}},
        DecodeCase{"1,051 is above", {{5, 949, 1000}, {2, 951, 1000}}, {100}, {0}},
        DecodeCase{
            "all above: fewest tokens, whatever the requests", {{0, 900, 150}, {9, 800, 150}, {0, 0, 99}}, {100}, {1}},
        DecodeCase{"all above, a tie: joined first", {{9, 800, 150}, {0, 800, 150}, {0, 0, 99}}, {100}, {0}},
        DecodeCase{"what was assigned counts at once", {{0, 1000, 1000}, {1, 1000, 1000}}, {100, 100, 100}, {0, 0, 1}},
        DecodeCase{"assigned memory is gone at once", {{0, 0, 250}}, {100, 100, 100}, {0, 0}},
        DecodeCase{"nobody overtakes the head", {{1, 500, 50}}, {100, 10}, {}},
        DecodeCase{"as large as the largest engine: it waits", {{1, 100, 400}, {1, 100, 300}}, {500}, {}},
        DecodeCase{"larger than any: refused, and the next goes on", {{1, 100, 400}, {1, 0, 300}}, {501, 10}, {0}, 1}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

TEST(Scheduler, DecodeRequestsGoToTheGroupWithFewestTokensAndCountThere) {
  Scheduler scheduler(options());
  for (const char* group : {"a", "b"}) {
    scheduler.join(std::string(group) + "0", EngineRole::kDecode, group, group);
  }
  // "a" has said that it is full; "b" said nothing yet.
  scheduler.fetch("a", std::vector{decode("a0", 1, 250, 0)});
  for (int i = 1; i <= 5; ++i) scheduler.submit(i, 100, 0);
  give_prefill(scheduler);
  // Dealt: b b b (0, 100, 200), then 300 against 250: a, then b again at 350 against 300.
  const Fetched b = scheduler.fetch("b", std::vector{decode("b0", 0, 0, 10'000)});
  EXPECT_EQ(b.assignments.size(), 4u);
  EXPECT_EQ(scheduler.stats().waiting_decode, 1u);
  const Fetched a = scheduler.fetch("a", std::vector{decode("a0", 1, 250, 100)});
  ASSERT_EQ(a.assignments.size(), 1u);
  EXPECT_EQ(a.assignments[0].request, 4u);
}

TEST(Scheduler, DecodeEnginesWithinTheMeanShareByRequestsTheOthersByTokens) {
  Scheduler scheduler(options());
  for (const char* name : {"x", "y", "z"}) scheduler.join(name, EngineRole::kDecode, "g", "n");
  scheduler.submit(1, 100, 0);
  give_prefill(scheduler);
  // 1.05 * (100 + 600) / 3 = 245 is the bound. y and z would be at 250: all are high, and y was there first.
  Fetched got = scheduler.fetch(
      "g", std::vector{decode("x", 0, 300, 1000), decode("y", 5, 150, 1000), decode("z", 2, 150, 1000)});
  EXPECT_EQ(engines_of(got), Names{"y"});
  // A little more on x, and y and z are within: fewest requests.
  Scheduler even(options());
  for (const char* name : {"x", "y", "z"}) even.join(name, EngineRole::kDecode, "g", "n");
  even.submit(1, 100, 0);
  give_prefill(even);
  got = even.fetch("g", std::vector{decode("x", 0, 350, 1000), decode("y", 5, 150, 1000), decode("z", 2, 150, 1000)});
  EXPECT_EQ(engines_of(got), Names{"z"});
  // Nobody within the mean has memory for it: fewest tokens among those that do.
  Scheduler tight(options());
  for (const char* name : {"x", "y", "z"}) tight.join(name, EngineRole::kDecode, "g", "n");
  tight.submit(1, 100, 0);
  give_prefill(tight);
  got = tight.fetch("g", std::vector{decode("x", 0, 900, 150), decode("y", 9, 800, 150), decode("z", 0, 0, 99)});
  EXPECT_EQ(engines_of(got), Names{"y"});
}

TEST(Scheduler, DecodeWaitsForMemoryAndRefusesWhatNeverFits) {
  Scheduler scheduler(options());
  scheduler.join("x", EngineRole::kDecode, "g", "n");
  scheduler.submit(1, 100, 0);
  scheduler.submit(2, 1000, 0);
  scheduler.submit(3, 50, 0);
  give_prefill(scheduler);
  Fetched got = scheduler.fetch("g", std::vector{decode("x", 3, 450, 50)});
  EXPECT_TRUE(got.assignments.empty()) << "the head waits: 100 of 500 will be free";
  EXPECT_TRUE(got.refused.empty());
  got = scheduler.fetch("g", std::vector{decode("x", 0, 0, 500)});
  EXPECT_EQ(engines_of(got), (Names{"x", "x"}));
  ASSERT_EQ(got.refused.size(), 1u);
  EXPECT_EQ(got.refused[0].request, 2u);
  EXPECT_NE(got.refused[0].reason.text().find("1000"), std::string::npos);
  EXPECT_EQ(scheduler.stats().requests, 2u);
  EXPECT_EQ(scheduler.stats().waiting_prefill + scheduler.stats().waiting_decode, 0u);
}

TEST(Scheduler, TheSideWithTheShorterReadQueueReads) {
  const auto read_side = [](std::uint64_t pe_queue, std::uint64_t de_queue) {
    Scheduler scheduler(options());
    scheduler.join("p", EngineRole::kPrefill, "P", "pn");
    scheduler.join("d", EngineRole::kDecode, "D", "dn");
    scheduler.submit(1, 100, 80);
    EXPECT_TRUE(scheduler.fetch("P", std::vector{prefill("p", 0, pe_queue)}).placements.empty());
    const Fetched got = scheduler.fetch("D", std::vector{decode("d", 0, 0, 1000, de_queue)});
    EXPECT_EQ(got.placements.size(), 1u);
    return got.placements.at(0).read;
  };
  EXPECT_EQ(read_side(10, 20), Path::kPrefill);
  EXPECT_EQ(read_side(20, 10), Path::kDecode);
  EXPECT_EQ(read_side(10, 10), Path::kPrefill) << "nothing crosses the network";
}

TEST(Scheduler, WhatWasAskedOfANodeCountsUntilItsEngineHasReportedIt) {
  Scheduler scheduler(options());
  scheduler.join("p", EngineRole::kPrefill, "P", "pn");
  scheduler.join("d", EngineRole::kDecode, "D", "dn");
  for (int i = 1; i <= 4; ++i) scheduler.submit(i, 100, 80);
  scheduler.fetch("P", std::vector{prefill("p", 0, 0)});
  Fetched got = scheduler.fetch("D", std::vector{decode("d", 0, 0, 1000, 0)});
  std::vector<Path> reads;
  for (const Placement& one : got.placements) reads.push_back(one.read);
  EXPECT_EQ(reads, (std::vector{Path::kPrefill, Path::kDecode, Path::kPrefill, Path::kDecode}));
  // The prefill engine had four requests and two placements of its own; its report includes all of it.
  EXPECT_EQ(got.placements[2].number, 6u);
  scheduler.submit(5, 100, 80);
  scheduler.fetch("P", std::vector{prefill("p", 400, 90, 6)});
  got = scheduler.fetch("D", std::vector{decode("d", 0, 0, 1000, 0, 0)});
  ASSERT_EQ(got.placements.size(), 1u);
  EXPECT_EQ(got.placements[0].read, Path::kPrefill) << "90 reported there, 160 asked for and not reported here";
}

TEST(Scheduler, StaleReportsAreIgnoredAndImpossibleOnesRefused) {
  Scheduler scheduler(options());
  scheduler.join("p", EngineRole::kPrefill, "P", "pn");
  scheduler.submit(1, 300, 0);
  scheduler.fetch("P", {});
  EXPECT_EQ(code_of([&] { scheduler.fetch("P", std::vector{prefill("p", 0, 0, 2)}); }), Code::kInvalidArgument);
  scheduler.fetch("P", std::vector{prefill("p", kBeta + 1, 0, 1)});
  scheduler.submit(2, 100, 0);
  EXPECT_TRUE(scheduler.fetch("P", std::vector{prefill("p", 0, 0, 0)}).assignments.empty())
      << "an earlier state does not make a full engine able";
  EXPECT_EQ(scheduler.stats().reports_stale, 1u);
  EXPECT_EQ(scheduler.fetch("P", std::vector{prefill("p", 0, 0, 1)}).assignments.size(), 1u);
}

TEST(Scheduler, ReportsOfAnEarlierLifeAreIgnored) {
  Scheduler scheduler(options());
  const auto join = [&] { scheduler.join("p", EngineRole::kPrefill, "P", "pn"); };
  join();
  for (int i = 1; i <= 3; ++i) scheduler.submit(i, 100, 0);
  ASSERT_EQ(scheduler.fetch("P", {}).assignments.size(), 3u);
  EXPECT_EQ(scheduler.leave("p").size(), 3u);
  for (int i = 1; i <= 3; ++i) scheduler.finished(i);
  join();
  const EngineReport late = prefill("p", kBeta + 1, 0, 3);
  scheduler.submit(4, 100, 0);
  Fetched got = scheduler.fetch("P", std::vector{late});
  EXPECT_EQ(scheduler.stats().reports_stale, 1u);
  ASSERT_EQ(got.assignments.size(), 1u) << "the engine that is there now has nothing to do";
  EXPECT_GT(got.assignments[0].number, 3u);
  // Nor does it make the engine have seen what it has not, whatever it got since.
  for (int i = 5; i <= 8; ++i) scheduler.submit(i, kBeta / 4, 0);
  EXPECT_EQ(scheduler.fetch("P", std::vector{late}).assignments.size(), 4u);
  scheduler.submit(9, 100, 0);
  EXPECT_TRUE(scheduler.fetch("P", std::vector{late}).assignments.empty()) << "it is full of what it has not seen";
  EXPECT_EQ(scheduler.stats().reports_stale, 3u);
  EXPECT_EQ(scheduler.fetch("P", std::vector{prefill("p", 0, 0, got.assignments[0].number + 4)}).assignments.size(),
            1u);
}

TEST(Scheduler, RefusesWhatMakesNoSense) {
  Scheduler scheduler(options());
  scheduler.join("p", EngineRole::kPrefill, "P", "n");
  const auto code = [&](auto call) { return code_of(call); };
  EXPECT_EQ(code([&] { scheduler.join("p", EngineRole::kPrefill, "P", "n"); }), Code::kInvalidArgument);
  EXPECT_EQ(code([&] { scheduler.join("d", EngineRole::kDecode, "P", "n"); }), Code::kInvalidArgument);
  EXPECT_EQ(code([&] { scheduler.join("", EngineRole::kDecode, "D", "n"); }), Code::kInvalidArgument);
  EXPECT_EQ(code([&] { scheduler.leave("nobody"); }), Code::kNotFound);
  EXPECT_EQ(code([&] { scheduler.fetch("nobody", {}); }), Code::kNotFound);
  EXPECT_EQ(code([&] { scheduler.fetch("P", std::vector{prefill("nobody", 0, 0)}); }), Code::kNotFound);
  EXPECT_EQ(code([&] { scheduler.submit(1, 0, 0); }), Code::kInvalidArgument);
  EXPECT_EQ(code([&] { scheduler.submit(1, 10, 11); }), Code::kInvalidArgument);
  scheduler.submit(1, 10, 10);
  EXPECT_EQ(code([&] { scheduler.submit(1, 10, 10); }), Code::kInvalidArgument);
  EXPECT_EQ(code([] { Scheduler({}); }), Code::kInvalidArgument);
  SchedulerOptions small = options();
  small.max_waiting = 1;
  Scheduler full(small);
  full.submit(1, 10, 0);
  EXPECT_EQ(code([&] { full.submit(2, 10, 0); }), Code::kNoSpace);
  EXPECT_EQ(full.stats().requests, 1u);
  EXPECT_EQ(scheduler.stats().engines, 1u);
}

TEST(Scheduler, RequestsOfAnEngineThatLeavesTakeTheirOldPlace) {
  Scheduler scheduler(options());
  scheduler.join("p0", EngineRole::kPrefill, "P", "n0");
  scheduler.join("d0", EngineRole::kDecode, "D", "n1");
  for (int i = 1; i <= 3; ++i) scheduler.submit(i, 100, 50);
  EXPECT_EQ(scheduler.stats().waiting_decode, 0u) << "first a prefill engine";
  scheduler.fetch("P", {});
  EXPECT_EQ(scheduler.stats().waiting_decode, 3u);
  EXPECT_EQ(scheduler.fetch("D", std::vector{decode("d0", 0, 0, 1000)}).placements.size(), 3u);
  scheduler.prefilled(1);
  scheduler.submit(4, 100, 50);
  EXPECT_EQ(scheduler.leave("p0"), (std::vector<std::uint64_t>{2, 3})) << "1 has been prefilled";
  scheduler.join("p1", EngineRole::kPrefill, "P", "n0");
  const Fetched got = scheduler.fetch("P", {});
  ASSERT_EQ(got.assignments.size(), 3u);
  EXPECT_EQ(got.assignments[0].request, 2u);
  EXPECT_EQ(got.assignments[2].request, 4u);
  EXPECT_EQ(scheduler.stats().waiting_decode, 3u);
  // What the decode engine had of 1 is gone with it.
  EXPECT_EQ(scheduler.leave("d0"), (std::vector<std::uint64_t>{1}));
  EXPECT_EQ(scheduler.stats().waiting_prefill, 1u);
  EXPECT_EQ(scheduler.stats().waiting_decode, 3u);
}

TEST(Scheduler, GroupsWithEquallyManyTokensAreDealtToByName) {
  Scheduler scheduler(options());
  for (const char* group : {"b", "c", "a"}) scheduler.join(group, EngineRole::kDecode, group, group);
  for (int i = 1; i <= 4; ++i) scheduler.submit(i, 100, 0);
  give_prefill(scheduler);
  const auto requests_of = [&](const char* group) {
    std::vector<std::uint64_t> out;
    const Fetched got = scheduler.fetch(group, std::vector{decode(group, 0, 0, 1000)});
    for (const Assignment& one : got.assignments) out.push_back(one.request);
    return out;
  };
  EXPECT_EQ(requests_of("c"), (std::vector<std::uint64_t>{3}));
  EXPECT_EQ(requests_of("b"), (std::vector<std::uint64_t>{2}));
  EXPECT_EQ(requests_of("a"), (std::vector<std::uint64_t>{1, 4}));
}

TEST(Scheduler, WhatWasDealtToAGroupThatEmptiesIsDealtAgain) {
  Scheduler scheduler(options());
  for (const char* group : {"a", "b"}) scheduler.join(group, EngineRole::kDecode, group, group);
  for (int i = 1; i <= 4; ++i) scheduler.submit(i, 100, 0);
  give_prefill(scheduler);
  EXPECT_TRUE(scheduler.fetch("a", {}).assignments.empty()) << "no report, no memory";
  EXPECT_TRUE(scheduler.leave("b").empty()) << "2 and 4 wait there, and are nobody's yet";
  EXPECT_EQ(scheduler.stats().waiting_decode, 4u);
  EXPECT_EQ(code_of([&] { scheduler.fetch("b", {}); }), Code::kNotFound);
  std::vector<std::uint64_t> got;
  const Fetched fetched = scheduler.fetch("a", std::vector{decode("a", 0, 0, 1000)});
  for (const Assignment& one : fetched.assignments) got.push_back(one.request);
  EXPECT_EQ(got, (std::vector<std::uint64_t>{1, 2, 3, 4})) << "in their order";
  // The name is free for a group of the other role.
  scheduler.join("b", EngineRole::kPrefill, "b", "b");
}

TEST(Scheduler, NothingIsRefusedBeforeAllEnginesOfTheGroupHaveReported) {
  Scheduler scheduler(options());
  for (const char* name : {"x", "y"}) scheduler.join(name, EngineRole::kDecode, "g", "n");
  scheduler.submit(1, 1000, 0);
  give_prefill(scheduler);
  EXPECT_TRUE(scheduler.fetch("g", std::vector{decode("x", 0, 0, 500)}).refused.empty()) << "y may be large enough";
  const Fetched got = scheduler.fetch("g", std::vector{decode("y", 0, 0, 600)});
  ASSERT_EQ(got.refused.size(), 1u);
  EXPECT_EQ(got.refused[0].reason, (Reason{Reason::Kind::kTooLarge, 1000, 600, "g"}));
  EXPECT_EQ(got.refused[0].reason.text(), "needs 1000 tokens of memory; the largest engine of 'g' has 600 in all");
}

TEST(Scheduler, OverloadWaitsInOrderAndIsTakenUpWhereItStood) {
  SchedulerOptions few = options();
  few.max_waiting = 3;
  Scheduler scheduler(few);
  scheduler.join("p", EngineRole::kPrefill, "P", "n");
  for (int i = 1; i <= 3; ++i) scheduler.submit(i, 400, 0);
  EXPECT_TRUE(scheduler.fetch("P", std::vector{prefill("p", kBeta + 1, 0)}).assignments.empty());
  EXPECT_EQ(code_of([&] { scheduler.submit(4, 400, 0); }), Code::kNoSpace);
  EXPECT_EQ(scheduler.stats().requests, 3u) << "4 left nothing behind";
  EXPECT_EQ(scheduler.fetch("P", std::vector{prefill("p", 200, 0)}).assignments.size(), 1u);
  scheduler.submit(4, 400, 0);
  scheduler.leave("p");
  EXPECT_EQ(scheduler.stats().waiting_prefill, 4u) << "one that returns is never too many";
  EXPECT_EQ(code_of([&] { scheduler.submit(5, 400, 0); }), Code::kNoSpace);
}

// The sentences, from what made them.
TEST(Scheduler, SaysWhy) {
  Scheduler scheduler(options());
  scheduler.join("p", EngineRole::kPrefill, "P", "pn");
  for (const char* name : {"x", "y"}) scheduler.join(name, EngineRole::kDecode, "D", "dn");
  scheduler.submit(1, 100, 70);
  EXPECT_EQ(scheduler.fetch("P", std::vector{prefill("p", 30, kAlpha)}).assignments.at(0).reason.text(),
            "its node's read queue is short; fewest tokens of such: 30");
  scheduler.submit(2, 100, 70);
  EXPECT_EQ(scheduler.fetch("P", std::vector{prefill("p", 130, kAlpha + 1, 1)}).assignments.at(0).reason.text(),
            "no read queue is short; fewest tokens: 130");
  const Fetched got = scheduler.fetch("D", std::vector{decode("x", 4, 0, 1000, 20), decode("y", 3, 600, 1000, 20)});
  ASSERT_EQ(got.assignments.size(), 2u);
  EXPECT_EQ(got.assignments[0].reason.text(), "within reach of the mean; fewest requests of such: 4");
  EXPECT_EQ(got.placements[0].reason.text(), "read queues in tokens: prefill 1001, decode 20");
  EXPECT_EQ(got.placements[1].reason.text(), "read queues in tokens: prefill 1001, decode 90");
  scheduler.submit(3, 900, 0);
  scheduler.fetch("P", std::vector{prefill("p", 0, 0, 2)});
  const Fetched above = scheduler.fetch("D", std::vector{decode("x", 4, 0, 800, 20), decode("y", 3, 9000, 950, 20)});
  EXPECT_EQ(above.assignments.at(0).reason.text(), "all are above the mean; fewest tokens: 9000");
  EXPECT_EQ(Reason().text(), "");
}

// Prefill engines full of requests that wait for memory, which requests hold that wait for a prefill engine: never.
TEST(Scheduler, NobodyHoldsMemoryWhileItWaitsForAPrefillEngine) {
  Scheduler scheduler(options());
  scheduler.join("p", EngineRole::kPrefill, "P", "n0");
  scheduler.join("d", EngineRole::kDecode, "D", "n1");
  for (int i = 1; i <= 20; ++i) scheduler.submit(i, 100, 0);
  EXPECT_TRUE(scheduler.fetch("D", std::vector{decode("d", 0, 0, 1000)}).assignments.empty());
  EXPECT_EQ(scheduler.fetch("P", {}).assignments.size(), 6u);
  EXPECT_EQ(scheduler.fetch("D", std::vector{decode("d", 0, 0, 1000)}).assignments.size(), 6u);
}

// --- A random history

struct World {
  struct Side {
    std::string group, node;
    std::map<std::uint64_t, std::uint64_t> holds;  // request -> tokens
    std::uint64_t seen = 0;
  };
  static constexpr std::uint64_t kMemory = 3000;

  explicit World(std::uint32_t seed) : noise(seed), scheduler(options()) {}

  std::uint64_t below(std::uint64_t n) { return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(noise); }

  EngineReport report(const std::string& name, const Side& side) {
    EngineReport out;
    out.engine = name;
    out.requests = static_cast<std::uint32_t>(side.holds.size());
    for (const auto& [id, tokens] : side.holds) out.tokens += tokens;
    out.read_queue_tokens = below(2000);
    out.free_tokens = kMemory - std::min(kMemory, out.tokens);
    out.seen = side.seen;
    return out;
  }

  void drop(std::uint64_t id) {
    for (auto& [name, side] : sides) side.holds.erase(id);
  }

  std::mt19937 noise;
  Scheduler scheduler;
  std::map<std::string, Side> sides;
  std::map<std::uint64_t, std::uint64_t> alive;  // request -> tokens
  std::map<std::uint64_t, std::set<std::string>> given;
};

class SchedulerHistory : public ::testing::TestWithParam<std::uint32_t> {};

TEST_P(SchedulerHistory, LosesNothingAssignsNothingTwiceAndEndsWithNothing) {
  World w(GetParam());
  std::uint64_t next_request = 0, next_engine = 0;
  std::deque<std::pair<std::string, EngineReport>> late;
  std::multimap<bool, std::pair<std::string, std::string>> left;  // engines and their groups, by whether they prefill
  const auto join = [&] {
    const bool pe = w.below(2) == 0;
    std::string name = (pe ? "p" : "d") + std::to_string(++next_engine),
                group = (pe ? "P" : "D") + std::to_string(w.below(3));
    if (const auto back = left.find(pe); back != left.end() && w.below(2) == 0) {  // under the name it had
      std::tie(name, group) = back->second;
      left.erase(back);
    }
    World::Side side{group, "n" + std::to_string(w.below(4)), {}, 0};
    w.scheduler.join(name, pe ? EngineRole::kPrefill : EngineRole::kDecode, group, side.node);
    w.sides[name] = side;
  };
  std::set<std::uint64_t> prefilled;
  const auto leave = [&](const std::string& name) {
    for (std::uint64_t id : w.scheduler.leave(name)) {
      ASSERT_TRUE(w.alive.contains(id));
      w.given[id].clear();
      w.drop(id);
      prefilled.erase(id);
    }
    left.emplace(name[0] == 'p', std::pair(name, w.sides[name].group));
    w.sides.erase(name);
  };
  const auto fetch = [&](const std::string& group) {
    std::vector<EngineReport> reports;
    for (auto& [name, side] : w.sides) {
      if (side.group != group || w.below(10) == 0) continue;  // missing
      const EngineReport now = w.report(name, side);
      if (w.below(10) == 0) {
        late.emplace_back(group, now);  // comes later, stale by then
      } else {
        reports.push_back(now);
      }
    }
    if (!late.empty() && late.front().first == group && w.sides.contains(late.front().second.engine)) {
      reports.push_back(late.front().second);
    }
    if (!late.empty() && late.front().first == group) late.pop_front();
    const Fetched got = w.scheduler.fetch(group, reports);
    std::uint64_t before = 0;
    for (const Assignment& one : got.assignments) {
      ASSERT_TRUE(w.alive.contains(one.request));
      ASSERT_GT(one.request, before) << "overtaken";
      before = one.request;
      for (const std::string& engine : w.given[one.request]) {
        ASSERT_NE(engine[0], one.engine[0]) << "request " << one.request << " has two engines of one role";
      }
      World::Side& side = w.sides.at(one.engine);
      ASSERT_EQ(side.group, group);
      w.given[one.request].insert(one.engine);
      side.holds[one.request] = w.alive[one.request];
      side.seen = std::max(side.seen, one.number);
    }
    for (const Placement& one : got.placements) {
      ASSERT_EQ(w.given[one.request], (std::set{one.prefill, one.decode}));
      World::Side& reader = w.sides.at(one.read == Path::kDecode ? one.decode : one.prefill);
      reader.seen = std::max(reader.seen, one.number);
    }
    for (const Assignment& one : got.refused) {
      w.drop(one.request);
      w.given.erase(one.request);
      w.alive.erase(one.request);
    }
  };
  const auto groups = [&] {
    std::set<std::string> out;
    for (const auto& [name, side] : w.sides) out.insert(side.group);
    return out;
  };
  const auto prefill_of = [&](std::uint64_t id) {
    w.scheduler.prefilled(id);
    prefilled.insert(id);
    for (auto& [name, side] : w.sides) {
      if (name[0] == 'p' && side.holds.erase(id) > 0) w.given[id].erase(name);
    }
  };
  const auto work = [&] {
    std::vector<std::uint64_t> done;
    for (const auto& [id, tokens] : w.alive) {
      if (w.given[id].size() == 2 && w.below(2) == 0) {
        prefill_of(id);
      } else if (prefilled.contains(id) && w.given[id].size() == 1 && w.below(2) == 0) {
        done.push_back(id);
      }
    }
    for (std::uint64_t id : done) {
      w.scheduler.finished(id);
      w.scheduler.finished(id);  // told twice
      w.drop(id);
      w.alive.erase(id);
      w.given.erase(id);
    }
  };
  // Whoever has no engine waits for that engine, and nobody else does.
  const auto check_queues = [&](int step) {
    std::uint64_t for_prefill = 0, for_decode = 0;
    for (const auto& [id, tokens] : w.alive) {
      const std::set<std::string>& has = w.given[id];
      for_prefill += has.empty();
      for_decode += has.size() == 1 && (*has.begin())[0] == 'p';
    }
    ASSERT_EQ(w.scheduler.stats().waiting_prefill, for_prefill) << step;
    ASSERT_EQ(w.scheduler.stats().waiting_decode, for_decode) << step;
  };
  for (int i = 0; i < 6; ++i) join();
  for (int step = 0; step < 4000; ++step) {
    const std::uint64_t what = w.below(100);
    if (what < 35) {
      const std::uint64_t tokens = 1 + w.below(w.below(20) == 0 ? 5000 : 400);
      w.scheduler.submit(++next_request, tokens, w.below(tokens + 1));
      w.alive[next_request] = tokens;
    } else if (what < 40) {
      join();
    } else if (what < 44 && w.sides.size() > 1) {
      auto chosen = w.sides.begin();
      std::advance(chosen, w.below(w.sides.size()));
      leave(std::string(chosen->first));
    } else if (what < 80 && !groups().empty()) {
      const std::set<std::string> all = groups();
      auto chosen = all.begin();
      std::advance(chosen, w.below(all.size()));
      fetch(*chosen);
    } else if (what < 84 && !w.alive.empty()) {
      auto chosen = w.alive.begin();
      std::advance(chosen, w.below(w.alive.size()));
      const std::uint64_t id = chosen->first;
      w.scheduler.finished(id);  // cancelled
      w.drop(id);
      w.given.erase(id);
      w.alive.erase(id);
    } else {
      work();
    }
    ASSERT_EQ(w.scheduler.stats().requests, w.alive.size()) << step;
    check_queues(step);
  }
  // Left alone with working engines, everything ends: nobody starves.
  w.scheduler.join("p-last", EngineRole::kPrefill, "P0", "n0");
  w.sides["p-last"] = {"P0", "n0", {}, 0};
  w.scheduler.join("d-last", EngineRole::kDecode, "D0", "n0");
  w.sides["d-last"] = {"D0", "n0", {}, 0};
  late.clear();
  for (int round = 0; round < 5000 && !w.alive.empty(); ++round) {
    for (const std::string& group : groups()) fetch(group);
    work();
  }
  EXPECT_TRUE(w.alive.empty()) << w.alive.size() << " never ended; waiting " << w.scheduler.stats().waiting_prefill
                               << " and " << w.scheduler.stats().waiting_decode;
  EXPECT_EQ(w.scheduler.stats().requests, 0u);
  EXPECT_EQ(w.scheduler.stats().waiting_prefill + w.scheduler.stats().waiting_decode, 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, SchedulerHistory, ::testing::Range(1u, 41u));

// --- Batches

TEST(Batch, FitsTimeOfAttentionFromMeasurements) {
  const std::vector<std::vector<Prefill>> batches = {{{0, 100}}, {{1000, 100}, {0, 200}}, {{5000, 50}}};
  std::vector<double> seconds;
  for (const auto& batch : batches) {
    double work = 0;
    for (const Prefill& one : batch) work += AttentionModel::operations(one);
    seconds.push_back(0.002 + 3e-9 * work);
  }
  const AttentionModel model(batches, seconds);
  EXPECT_NEAR(model.base_s(), 0.002, 1e-9);
  EXPECT_NEAR(model.s_per_operation(), 3e-9, 1e-15);
  EXPECT_EQ(code_of([&] { AttentionModel(std::span(batches).first(1), std::span(seconds).first(1)); }),
            Code::kInvalidArgument);
  const std::vector<std::vector<Prefill>> same = {{{0, 100}}, {{0, 100}}};
  EXPECT_EQ(code_of([&] { AttentionModel(same, std::span(seconds).first(2)); }), Code::kInvalidArgument);
}

TEST(Batch, FitsContextsToo) {
  std::mt19937 random(5);
  std::vector<std::vector<Prefill>> batches;
  std::vector<double> seconds;
  for (int i = 0; i < 30; ++i) {
    batches.emplace_back();
    double work = 0, context = 0;
    for (std::uint32_t k = 0; k < 1 + random() % 4; ++k) {
      batches.back().push_back({random() % 50000, 1 + random() % 4000});
      work += AttentionModel::operations(batches.back().back());
      context += static_cast<double>(batches.back().back().cached + batches.back().back().tokens);
    }
    seconds.push_back(0.002 + 3e-9 * work + 4e-7 * context);
  }
  const AttentionModel model(batches, seconds);
  EXPECT_NEAR(model.base_s(), 0.002, 1e-6);
  EXPECT_NEAR(model.s_per_operation(), 3e-9, 1e-14);
  EXPECT_NEAR(model.s_per_context(), 4e-7, 1e-11);
  EXPECT_NEAR(model.seconds(batches[3]), seconds[3], 1e-9);
  EXPECT_NEAR(model.cost_s({1000, 100}), 3e-9 * 100 * 1050 + 4e-7 * 1100, 1e-9) << "one, without the base";

  // Without a term for contexts in the times, there is none in the fit.
  for (std::size_t i = 0; i < batches.size(); ++i) {
    seconds[i] = 0.002;
    for (const Prefill& one : batches[i]) seconds[i] += 3e-9 * AttentionModel::operations(one);
  }
  const AttentionModel plain(batches, seconds);
  EXPECT_NEAR(plain.s_per_operation(), 3e-9, 1e-14);
  EXPECT_NEAR(plain.s_per_context(), 0, 1e-11);
}

TEST(Batch, WhatBatchesCannotTellApartIsOperations) {
  // One, two or three alike: operations and contexts grow together.
  const std::vector<std::vector<Prefill>> batches = {
      {{900, 100}}, {{900, 100}, {900, 100}}, {{900, 100}, {900, 100}, {900, 100}}};
  const AttentionModel model(batches, std::vector<double>{0.3, 0.5, 0.7});
  EXPECT_EQ(model.s_per_context(), 0);
  EXPECT_NEAR(model.s_per_operation(), 0.2 / (100 * 950), 1e-12);
  EXPECT_NEAR(model.base_s(), 0.1, 1e-9);
  EXPECT_NEAR(model.seconds(batches[1]), 0.5, 1e-9);
  // Two batches: a line.
  const std::vector<double> seconds = {0.3, 0.5};
  const AttentionModel two{std::span(batches).first(2), seconds};
  EXPECT_NEAR(two.seconds(batches[2]), 0.7, 1e-9);
}

TEST(Batch, NothingCostsLessThanNothing) {
  const std::vector<std::vector<Prefill>> batches = {{{0, 100}}, {{5000, 10}}, {{0, 400}}, {{9000, 500}}, {{20000, 1}}};
  const std::vector<std::vector<double>> times = {
      {5, 4, 3, 2, 1}, {1, 1, 1, 1, 1}, {0, 0, 0, 9, 0}, {0, 5, 0, 0, 5}, {1, 0, 1, 0, 0}};
  for (const std::vector<double>& seconds : times) {
    const AttentionModel model(batches, seconds);
    EXPECT_GE(model.base_s(), 0);
    EXPECT_GE(model.s_per_operation(), 0);
    EXPECT_GE(model.s_per_context(), 0);
    for (const auto& batch : batches) EXPECT_GE(model.seconds(batch), 0);
  }
}

TEST(Batch, ChunksCountTheirContext) {
  // 1 ms a thousand tokens of context, 1 us a token behind 1000.
  const AttentionModel model(0, 1e-9, 1e-6);
  const std::vector<Prefill> waiting = {{1000, 100}, {3000, 500}};
  const double first = 1100e-6 + 100 * 1050e-9;
  EXPECT_TRUE(select_batch(model, waiting, 1e-3).empty()) << "its context alone is too much";
  for (const double left : {3.1e-3, 3.5e-3, 4.0e-3}) {
    const auto chosen = select_batch(model, waiting, first + left);
    ASSERT_EQ(chosen.size(), 2u) << left;
    EXPECT_EQ(chosen[0], 100u);
    EXPECT_LE(model.cost_s({3000, chosen[1]}), left + 1e-12);
    EXPECT_GT(model.cost_s({3000, chosen[1] + 1}), left);
  }
  EXPECT_EQ(select_batch(model, waiting, first + 3e-3), (std::vector<std::uint64_t>{100})) << "nothing of the second";
}

TEST(Batch, TakesRequestsInOrderAndTheLastInPart) {
  const AttentionModel model(0, 1e-6);
  const std::vector<Prefill> waiting = {{0, 100}, {1000, 50}, {0, 2000}, {0, 1}};
  using Chosen = std::vector<std::uint64_t>;
  // 5,000 and 51,250 operations; of the third 2,000^2 / 2 in all.
  EXPECT_EQ(select_batch(model, waiting, 10), (Chosen{100, 50, 2000, 1}));
  EXPECT_EQ(select_batch(model, waiting, 0.005), (Chosen{100})) << "exactly the quota";
  const Chosen part = select_batch(model, waiting, 0.1);
  ASSERT_EQ(part.size(), 3u) << "and nothing behind the chunk";
  const double used = 5000 + 51250;
  EXPECT_LE(used + AttentionModel::operations({0, part[2]}), 0.1 / 1e-6);
  EXPECT_GT(used + AttentionModel::operations({0, part[2] + 1}), 0.1 / 1e-6) << "no larger chunk fits";
  EXPECT_TRUE(select_batch(model, waiting, 0).empty());
  EXPECT_TRUE(select_batch(model, {}, 1).empty());
  EXPECT_TRUE(select_batch(AttentionModel(1, 1e-6), waiting, 0.5).empty()) << "a batch alone takes longer";
}

}  // namespace
}  // namespace dualkv
