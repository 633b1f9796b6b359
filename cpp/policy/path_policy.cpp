// The path policies.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/text.h"
#include "dualkv/policy.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {

struct Side {
  const NodeView* view;
  Path path;
};

// Prefill first, then decode, then helpers: the order blocks are given out in.
std::vector<Side> sides_of(const PlanRequest& request) {
  std::vector<Side> sides{{&request.prefill, Path::kPrefill}};
  if (request.decode) sides.push_back({&*request.decode, Path::kDecode});
  for (const NodeView& helper : request.helpers) sides.push_back({&helper, Path::kHelper});
  return sides;
}

Plan empty_plan(const PlanRequest& request) {
  Plan plan;
  plan.keys = request.keys;
  plan.prefill = request.prefill.name;
  if (request.decode) plan.decode = request.decode->name;
  for (const NodeView& helper : request.helpers) plan.helpers.push_back(helper.name);
  return plan;
}

Plan whole(const PlanRequest& request, const Side& side, std::string reason) {
  Plan plan = empty_plan(request);
  const auto count = static_cast<std::uint32_t>(request.keys.size());
  if (count > 0) plan.ranges.push_back({side.view->name, side.path, 0, count});
  plan.reason = std::move(reason);
  return plan;
}

std::string mib(std::uint64_t bytes) { return text(bytes >> 20, " MiB"); }

// Measured rates where there are some. A side not measured yet is taken to be as fast as the others on average; with
// no measurement at all, all are equal, and only their ratios matter.
std::vector<double> rates_of(const std::vector<Side>& sides) {
  double sum = 0;
  int measured = 0;
  for (const Side& side : sides) {
    if (side.view->read_bandwidth == 0) continue;
    sum += static_cast<double>(side.view->read_bandwidth);
    ++measured;
  }
  const double guess = measured > 0 ? sum / measured : 1;
  std::vector<double> rates;
  for (const Side& side : sides) {
    double rate = side.view->read_bandwidth > 0 ? static_cast<double>(side.view->read_bandwidth) : guess;
    // A relayed byte also crosses the link; the slower of the two counts.
    const double link = static_cast<double>(side.view->link_bandwidth);
    if (side.path != Path::kPrefill && link > 0) rate = std::min(rate, std::max(link, rate / 16));
    rates.push_back(rate);
  }
  return rates;
}

// Blocks for each side so that all that read anything finish at one time T: x_i = rate_i * T - queue_i, for the
// smallest set of sides with x_i > 0 (water-filling over the times at which the queues run dry).
std::vector<double> level(const std::vector<double>& queues, const std::vector<double>& rates, double total) {
  std::vector<std::size_t> order(queues.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return queues[a] / rates[a] < queues[b] / rates[b]; });
  double rate_sum = 0, queue_sum = 0, finish = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    rate_sum += rates[order[i]];
    queue_sum += queues[order[i]];
    finish = (total + queue_sum) / rate_sum;
    if (i + 1 == order.size() || finish <= queues[order[i + 1]] / rates[order[i + 1]]) break;
  }
  std::vector<double> shares;
  for (std::size_t i = 0; i < queues.size(); ++i) shares.push_back(std::max(0.0, rates[i] * finish - queues[i]));
  return shares;
}

// Whole blocks that add up to `count`: floors, then the largest remainders.
std::vector<std::uint32_t> to_blocks(const std::vector<double>& shares, std::uint32_t count) {
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::vector<std::uint32_t> blocks;
  std::vector<std::pair<double, std::size_t>> remainders;
  std::uint32_t given = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const double exact = sum > 0 ? shares[i] / sum * count : (i == 0 ? count : 0);
    blocks.push_back(std::min(count - given, static_cast<std::uint32_t>(std::floor(exact))));
    given += blocks.back();
    remainders.push_back({blocks.back() - exact, i});
  }
  std::stable_sort(remainders.begin(), remainders.end(), [](auto& a, auto& b) { return a.first < b.first; });
  for (std::size_t i = 0; given < count; ++i, ++given) ++blocks[remainders[i % remainders.size()].second];
  return blocks;
}

}  // namespace

std::string_view to_string(Path path) {
  switch (path) {
    case Path::kPrefill: return "pe_path";
    case Path::kDecode: return "de_path";
    case Path::kHelper: return "helper_path";
  }
  return "unknown";
}

Plan PrefillOnly::plan(const PlanRequest& request) {
  return whole(request, {&request.prefill, Path::kPrefill}, "prefill_only: the prefill node reads everything");
}

Plan DecodeOnly::plan(const PlanRequest& request) {
  if (!request.decode) throw Error(Code::kInvalidArgument, "decode_only: the request has no decode node");
  return whole(request, {&*request.decode, Path::kDecode}, "decode_only: the decode node reads everything");
}

Plan RoundRobin::plan(const PlanRequest& request) {
  const std::vector<Side> sides = sides_of(request);
  const Side& side = sides[turn_++ % sides.size()];
  return whole(request, side, text("round_robin: it is the turn of '", side.view->name, "'"));
}

Plan ShortestQueue::plan(const PlanRequest& request) {
  const std::vector<Side> sides = sides_of(request);
  const auto best = std::min_element(sides.begin(), sides.end(), [](const Side& a, const Side& b) {
    if (a.view->read_queue_bytes != b.view->read_queue_bytes) {
      return a.view->read_queue_bytes < b.view->read_queue_bytes;
    }
    return a.view->read_bandwidth > b.view->read_bandwidth;
  });
  std::string reason = text("shortest_queue: '", best->view->name, "'; queues:");
  for (const Side& side : sides) reason += text(" '", side.view->name, "' ", mib(side.view->read_queue_bytes));
  return whole(request, *best, std::move(reason));
}

Plan Split::plan(const PlanRequest& request) {
  const std::vector<Side> sides = sides_of(request);
  const std::vector<double> rates = rates_of(sides);
  const double block = static_cast<double>(std::max<std::uint64_t>(request.prefill.block_bytes, 1));
  std::vector<double> queues;
  for (const Side& side : sides) queues.push_back(static_cast<double>(side.view->read_queue_bytes) / block);
  const auto count = static_cast<std::uint32_t>(request.keys.size());
  const auto blocks = to_blocks(level(queues, rates, count), count);

  Plan plan = empty_plan(request);
  plan.reason = "split:";
  std::uint32_t first = 0;
  for (std::size_t i = 0; i < sides.size(); ++i) {
    plan.reason +=
        text(" '", sides[i].view->name, "' ", blocks[i], " blocks behind ", mib(sides[i].view->read_queue_bytes),
             " at ", sides[i].view->read_bandwidth / 1'000'000, " MB/s;");
    if (blocks[i] == 0) continue;
    plan.ranges.push_back({sides[i].view->name, sides[i].path, first, blocks[i]});
    first += blocks[i];
  }
  return plan;
}

void check_plan(const Plan& plan) {
  const auto require = [](bool fine, const std::string& why) {
    if (!fine) throw Error(Code::kInvalidArgument, "plan: " + why);
  };
  std::uint64_t next = 0;
  for (const PathRange& range : plan.ranges) {
    require(range.count > 0, text("the range of '", range.node, "' at block ", range.first, " is empty"));
    require(range.first == next, text("the range of '", range.node, "' begins at block ", range.first, ", not at ",
                                      next, ": ranges must tile the hit in order"));
    require(!range.node.empty(), text("the range at block ", range.first, " names no node"));
    next += range.count;
  }
  require(next == plan.keys.size(), text("the ranges cover ", next, " of ", plan.keys.size(), " blocks"));
}

}  // namespace dualkv
