// Batches of a prefill engine by attention time (paper 6.2).
#include "base/text.h"
#include "dualkv/scheduler.h"
#include "dualkv/status.h"
#include "policy/least_squares.h"

namespace dualkv {

double AttentionModel::operations(const Prefill& prefill) {
  const auto tokens = static_cast<double>(prefill.tokens);
  return tokens * (static_cast<double>(prefill.cached) + tokens / 2);
}

double AttentionModel::seconds(std::span<const Prefill> batch) const {
  double sum = base_s_;
  for (const Prefill& prefill : batch) sum += cost_s(prefill);
  return sum;
}

AttentionModel::AttentionModel(std::span<const std::vector<Prefill>> batches, std::span<const double> seconds) {
  if (batches.size() != seconds.size() || batches.size() < 2) {
    throw Error(Code::kInvalidArgument, text("attention model: ", batches.size(), " batches and ", seconds.size(),
                                             " times; at least two of each are needed"));
  }
  LeastSquares samples;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    double work = 0, context = 0;
    for (const Prefill& prefill : batches[i]) {
      work += operations(prefill);
      context += static_cast<double>(prefill.cached) + static_cast<double>(prefill.tokens);
    }
    samples.add(work, context, seconds[i]);
  }
  LeastSquares::Fit fit;
  if (!samples.solve(fit)) {
    throw Error(Code::kInvalidArgument, "attention model: all batches have the same work; measure different ones");
  }
  base_s_ = fit.base;
  s_per_operation_ = fit.first;
  s_per_context_ = fit.second;
}

std::vector<std::uint64_t> select_batch(const AttentionModel& model, std::span<const Prefill> waiting, double quota_s) {
  std::vector<std::uint64_t> chosen;
  double used = model.base_s();
  for (const Prefill& prefill : waiting) {
    const auto fits = [&](std::uint64_t tokens) { return used + model.cost_s({prefill.cached, tokens}) <= quota_s; };
    if (fits(prefill.tokens)) {
      chosen.push_back(prefill.tokens);
      used += model.cost_s(prefill);
      continue;
    }
    std::uint64_t most = 0, beyond = prefill.tokens;  // most fits, beyond does not
    while (beyond - most > 1) {
      const std::uint64_t half = most + (beyond - most) / 2;
      (fits(half) ? most : beyond) = half;
    }
    if (most > 0) chosen.push_back(most);
    break;
  }
  return chosen;
}

}  // namespace dualkv
