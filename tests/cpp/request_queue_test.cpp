// The queue keeps the order of submission, wherever requests come back in: beside a map, over random histories.
#include "policy/request_queue.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <vector>

namespace dualkv::scheduling {
namespace {

class RequestQueueHistory : public ::testing::TestWithParam<std::uint32_t> {};

TEST_P(RequestQueueHistory, IsAsAMapByOrder) {
  std::mt19937 noise(GetParam());
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(noise); };
  std::deque<Request> all;
  std::vector<Request*> out;
  RequestQueue queue;
  std::map<std::uint64_t, Request*> oracle;
  const auto insert = [&](Request& request) {
    queue.insert(request);
    oracle[request.order] = &request;
  };
  const auto erase = [&](Request& request) {
    queue.erase(request);
    oracle.erase(request.order);
    out.push_back(&request);
  };
  for (int step = 0; step < 3000; ++step) {
    const std::size_t what = below(10);
    if (what < 3) {
      Request& request = all.emplace_back();
      request.order = all.size();
      request.tokens = 1 + below(100);
      insert(request);
    } else if (what < 6 && !oracle.empty()) {
      erase(*oracle.begin()->second);
    } else if (what < 7 && !oracle.empty()) {
      erase(*std::next(oracle.begin(), static_cast<std::ptrdiff_t>(below(oracle.size())))->second);
    } else if (!out.empty()) {
      const std::size_t i = below(out.size());
      std::swap(out[i], out.back());
      insert(*out.back());
      out.pop_back();
    }
    ASSERT_EQ(queue.size(), oracle.size()) << step;
    std::uint64_t tokens = 0;
    const Request* request = queue.front();
    const Request* previous = nullptr;
    for (const auto& [order, want] : oracle) {
      ASSERT_EQ(request, want) << step;
      ASSERT_EQ(request->previous, previous) << step;
      ASSERT_EQ(request->queue, &queue) << step;
      tokens += want->tokens;
      previous = request;
      request = request->next;
    }
    ASSERT_EQ(request, nullptr) << step;
    ASSERT_EQ(queue.tokens(), tokens) << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RequestQueueHistory, ::testing::Range(1u, 9u));

}  // namespace
}  // namespace dualkv::scheduling
