// The path policies.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/require.h"
#include "base/text.h"
#include "dualkv/policy.h"
#include "dualkv/status.h"
#include "policy/sides.h"

namespace dualkv {

namespace {

Plan whole(const PlanRequest& request, const NodeView& view, Path path, std::string reason) {
  Plan plan = unread_plan(request);
  const auto count = static_cast<std::uint32_t>(request.keys.size());
  if (count > 0) plan.ranges.push_back({view.name, path, 0, count});
  plan.reason = std::move(reason);
  return plan;
}

std::string mib(std::uint64_t bytes) { return text(bytes >> 20, " MiB"); }

double hit_bytes(const PlanRequest& request) {
  return static_cast<double>(request.keys.size()) *
         static_cast<double>(std::max<std::uint64_t>(request.prefill.block_bytes, 1));
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

// Leaves those that are asked: helpers with less than `helper_bytes` go first, then those with the least, until few
// enough are left.
Shares choose(std::vector<Side>& sides, double bytes, std::uint32_t max_sides, double helper_bytes) {
  Shares out = share_out(sides, bytes);
  std::vector<double>& shares = out.bytes;
  while (sides.size() > 1) {
    auto gone = std::min_element(shares.begin(), shares.end());
    bool small = false;
    for (auto it = shares.begin(); it != shares.end(); ++it) {
      const bool helper = sides[static_cast<std::size_t>(it - shares.begin())].path() == Path::kHelper;
      if (!helper || *it >= helper_bytes || (small && *it >= *gone)) continue;
      gone = it;
      small = true;
    }
    const bool idle = *gone <= 0;
    if (!idle && !small && sides.size() <= max_sides) break;
    sides.erase(sides.begin() + (gone - shares.begin()));
    shares.erase(gone);
    if (!idle) out = share_out(sides, bytes);
  }
  return out;
}

// The side that is done first with so many bytes.
const Side* soonest(const std::vector<Side>& sides, double bytes) {
  return &*std::min_element(sides.begin(), sides.end(),
                            [&](const Side& a, const Side& b) { return a.seconds_for(bytes) < b.seconds_for(bytes); });
}

// A side that is done in this part of the time until the engine needs the hit: that time is an estimate.
constexpr double kEarly = 0.5;

// Its staging has no room for what is queued and for all of the hit.
bool lacks_room(const Side& side, std::size_t count) {
  const NodeView& view = side.view();
  return view.free_slots < count + view.read_queue_bytes / std::max<std::uint64_t>(view.block_bytes, 1);
}

// The side that has a hit early by itself, where staging is short; nullptr if there is none.
const Side* early_alone(const PlanRequest& request, const std::vector<Side>& own) {
  if (!request.prefill.compute_queue_s) return nullptr;
  const std::size_t count = request.keys.size();
  if (std::none_of(own.begin(), own.end(), [&](const Side& side) { return lacks_room(side, count); })) return nullptr;
  const double bytes = hit_bytes(request);
  const Side* first = soonest(own, bytes);
  return first->seconds_for(bytes) <= kEarly * *request.prefill.compute_queue_s ? first : nullptr;
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
  return whole(request, request.prefill, Path::kPrefill, "prefill_only: the prefill node reads everything");
}

Plan DecodeOnly::plan(const PlanRequest& request) {
  require(request.decode.has_value(), Code::kInvalidArgument, "decode_only: the request has no decode node");
  return whole(request, *request.decode, Path::kDecode, "decode_only: the decode node reads everything");
}

Plan RoundRobin::plan(const PlanRequest& request) {
  const std::vector<Side> sides = sides_of(request);
  if (credit_.size() > kMost) credit_.clear();  // names that come and go
  double sum = 0;
  const Side* chosen = nullptr;
  double most = 0;
  for (const Side& side : sides) {
    const double rate = side.read_rate();
    sum += rate;
    const double credit = credit_[side.view().name] += rate;
    if (chosen == nullptr || credit > most * (1 + 1e-9)) {
      chosen = &side;
      most = credit;
    }
  }
  credit_[chosen->view().name] -= sum;
  return whole(request, chosen->view(), chosen->path(),
               text("round_robin: it is the turn of '", chosen->view().name, "'"));
}

ShortestQueue::ShortestQueue(double margin) : margin_(margin) {
  require(margin >= 0 && margin < 1, Code::kInvalidArgument, "shortest_queue: margin = ", margin,
          ": must be in [0, 1)");
}

Plan ShortestQueue::plan(const PlanRequest& request) {
  const std::vector<Side> sides = sides_of(request);
  const double bytes = hit_bytes(request);
  const Side* best = soonest(sides, bytes);
  const auto last = std::find_if(sides.begin(), sides.end(), [&](const Side& s) { return s.view().name == last_; });
  if (last != sides.end()) {
    const double gain = last->seconds_for(bytes) - best->seconds_for(bytes);
    if (gain < margin_ * bytes / last->read_rate()) best = &*last;
  }
  last_ = best->view().name;
  std::string reason = text("shortest_queue: '", last_, "'; queues:");
  for (const Side& side : sides) {
    reason += text(" '", side.view().name, "' ", mib(side.view().read_queue_bytes));
    if (side.view().read_bandwidth > 0) reason += text(" at ", side.view().read_bandwidth / 1'000'000, " MB/s");
    if (&side != &sides.back()) reason += ",";
  }
  return whole(request, best->view(), best->path(), std::move(reason));
}

Split::Split(std::uint32_t max_sides, std::uint32_t helper_blocks, double helper_gain)
    : max_sides_(max_sides), helper_blocks_(helper_blocks), helper_gain_(helper_gain) {
  require(max_sides > 0, Code::kInvalidArgument, "split: max_sides must be at least 1");
  require(helper_gain >= 0 && helper_gain < 1, Code::kInvalidArgument, "split: helper_gain = ", helper_gain,
          ": must be in [0, 1)");
}

Plan Split::plan(const PlanRequest& request) {
  const auto count = static_cast<std::uint32_t>(request.keys.size());
  const double bytes = hit_bytes(request);
  const double least = helper_blocks_ * bytes / std::max(count, 1u);
  std::vector<Side> sides = sides_of(request);
  std::vector<Side> own(sides.begin(), sides.end() - static_cast<std::ptrdiff_t>(request.helpers.size()));
  if (const Side* side = early_alone(request, own)) {
    return whole(request, side->view(), side->path(),
                 text("split: not at all; '", side->view().name, "' has it early by itself, and staging is short"));
  }
  std::string reason = "split:";
  Shares chosen = choose(sides, bytes, max_sides_, least);
  if (sides.back().path() == Path::kHelper) {
    Shares without = choose(own, bytes, max_sides_, least);
    // To be there before the engine comes to it is no gain.
    const double needed = request.prefill.compute_queue_s.value_or(0);
    if (std::max(needed, chosen.seconds) > std::max(needed, without.seconds) * (1 - helper_gain_)) {
      reason += " helpers would gain too little;";
      sides = std::move(own);
      chosen = std::move(without);
    }
  }
  const std::vector<std::uint32_t> blocks = to_blocks(chosen.bytes, count);
  Plan plan = unread_plan(request);
  plan.reason = std::move(reason);
  std::uint32_t first = 0;
  for (std::size_t i = 0; i < sides.size(); ++i) {
    const NodeView& view = sides[i].view();
    plan.reason += text(" '", view.name, "' ", blocks[i], " blocks behind ", mib(view.read_queue_bytes), " at ",
                        view.read_bandwidth / 1'000'000, " MB/s;");
    if (blocks[i] == 0) continue;
    plan.ranges.push_back({view.name, sides[i].path(), first, blocks[i]});
    first += blocks[i];
  }
  return plan;
}

void check_plan(const Plan& plan) {
  const auto tiles = [](bool fine, const auto&... parts) { require(fine, Code::kInvalidArgument, "plan: ", parts...); };
  std::uint64_t next = 0;
  for (const PathRange& range : plan.ranges) {
    tiles(range.count > 0, "the range of '", range.node, "' at block ", range.first, " is empty");
    tiles(range.first == next, "the range of '", range.node, "' begins at block ", range.first, ", not at ", next,
          ": ranges must tile the hit in order");
    tiles(!range.node.empty(), "the range at block ", range.first, " names no node");
    next += range.count;
  }
  tiles(next == plan.keys.size(), "the ranges cover ", next, " of ", plan.keys.size(), " blocks");
}

}  // namespace dualkv
