// Recompute: load the first blocks of a hit, compute the last ones, where that is sooner.
#include <algorithm>
#include <cmath>

#include "base/require.h"
#include "base/text.h"
#include "dualkv/policy.h"
#include "dualkv/scheduler.h"
#include "dualkv/status.h"
#include "policy/least_squares.h"
#include "policy/sides.h"

namespace dualkv {

namespace {

constexpr double kFade = 0.98;  // of an observation, at each later one: some fifty count

}  // namespace

struct PrefillRate::Samples {
  LeastSquares fit;
};

PrefillRate::PrefillRate() : samples_(std::make_unique<Samples>()) {}
PrefillRate::~PrefillRate() = default;
PrefillRate::PrefillRate(PrefillRate&&) noexcept = default;
PrefillRate& PrefillRate::operator=(PrefillRate&&) noexcept = default;

void PrefillRate::observe(std::uint64_t cached, std::uint64_t tokens, double seconds) {
  if (tokens == 0 || !(seconds > 0) || !std::isfinite(seconds)) return;
  samples_->fit.add(static_cast<double>(tokens), AttentionModel::operations({cached, tokens}), seconds, kFade);
  ++observations_;
}

double PrefillRate::seconds(std::uint64_t cached, std::uint64_t tokens) const {
  if (!known()) return 0;
  LeastSquares::Fit fit;
  // Prefills that were all alike, or whose times don't grow with what they computed, tell only what they took on
  // average: all of it is counted to the tokens.
  if (!samples_->fit.solve(fit) || fit.first + fit.second == 0) {
    fit = {0, samples_->fit.mean_y() / samples_->fit.mean_first(), 0};
  }
  return fit.first * static_cast<double>(tokens) + fit.second * AttentionModel::operations({cached, tokens});
}

Recompute::Recompute(std::shared_ptr<PathPolicy> inner, double margin) : inner_(std::move(inner)), margin_(margin) {
  require(inner_ != nullptr, Code::kInvalidArgument, "recompute: a policy is needed that plans what is loaded");
  require(margin >= 0 && margin < 1, Code::kInvalidArgument, "recompute: margin = ", margin, ": must be in [0, 1)");
}

Plan Recompute::plan(const PlanRequest& request) {
  const auto blocks = static_cast<std::uint32_t>(request.keys.size());
  const bool filled = request.prefill.block_bytes > 0 && request.prefill.tokens_per_block > 0;
  if (!filled || !request.prefill.compute_queue_s || !rate_.known() || blocks == 0) return inner_->plan(request);
  const std::vector<Side> sides = sides_of(request);
  const double block_bytes = static_cast<double>(request.prefill.block_bytes);
  const std::uint64_t per_block = request.prefill.tokens_per_block;
  double pace = 0;
  for (const Side& side : sides) pace += side.pace();
  // The last block is the dearest to compute.
  if (rate_.seconds((blocks - 1) * per_block, per_block) > block_bytes / pace) return inner_->plan(request);
  // Until prefill can begin with so many blocks loaded, and the others computed.
  const auto seconds = [&](std::uint32_t loaded) {
    const double load = loaded == 0 ? 0 : share_out(sides, loaded * block_bytes).seconds;
    return std::max(load, *request.prefill.compute_queue_s) +
           rate_.seconds(loaded * per_block, (blocks - loaded) * per_block);
  };
  const double all = seconds(blocks);
  std::uint32_t best = blocks;
  double least = all;
  const auto consider = [&](std::uint32_t loaded) {
    const double took = seconds(loaded);
    if (took < least || (took == least && loaded > best)) {
      least = took;
      best = loaded;
    }
  };
  // Between two turning points, loading grows evenly and computing shrinks ever faster: the best is beside one of them.
  consider(0);
  for (const double bytes : turning_points(sides, blocks * block_bytes, *request.prefill.compute_queue_s)) {
    const auto below = static_cast<std::uint32_t>(std::min(bytes / block_bytes, static_cast<double>(blocks)));
    consider(below);
    if (below < blocks) consider(below + 1);
  }
  if (best == blocks || least > all * (1 - margin_)) return inner_->plan(request);
  PlanRequest loaded = request;
  loaded.keys.resize(best);
  Plan plan = inner_->plan(loaded);
  plan.recompute_blocks = blocks - static_cast<std::uint32_t>(plan.keys.size());
  plan.reason = text("recompute: the last ", plan.recompute_blocks, " of ", blocks, " blocks, ",
                     std::lround(least * 1e3), " ms instead of ", std::lround(all * 1e3), "; ", plan.reason);
  return plan;
}

}  // namespace dualkv
