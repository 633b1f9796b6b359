// Batches of a prefill engine by attention time (paper 6.2).
#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "dualkv/scheduler.h"
#include "dualkv/status.h"

namespace dualkv {

double AttentionModel::operations(const Prefill& prefill) {
  const auto tokens = static_cast<double>(prefill.tokens);
  return tokens * (static_cast<double>(prefill.cached) + tokens / 2);
}

AttentionModel::AttentionModel(std::span<const std::vector<Prefill>> batches, std::span<const double> seconds) {
  if (batches.size() != seconds.size() || batches.size() < 2) {
    throw Error(Code::kInvalidArgument, text("attention model: ", batches.size(), " batches and ", seconds.size(),
                                             " times; at least two of each are needed"));
  }
  const auto count = static_cast<double>(batches.size());
  std::vector<double> work;
  double mean_work = 0, mean_seconds = 0;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    double sum = 0;
    for (const Prefill& prefill : batches[i]) sum += operations(prefill);
    work.push_back(sum);
    mean_work += sum / count;
    mean_seconds += seconds[i] / count;
  }
  double covariance = 0, variance = 0;
  for (std::size_t i = 0; i < work.size(); ++i) {
    covariance += (work[i] - mean_work) * (seconds[i] - mean_seconds);
    variance += (work[i] - mean_work) * (work[i] - mean_work);
  }
  if (!(variance > 0) || !std::isfinite(covariance)) {
    throw Error(Code::kInvalidArgument, "attention model: all batches have the same work; measure different ones");
  }
  // Neither more work nor a batch at all can cost less than nothing; noise may say so.
  s_per_operation_ = std::max(0.0, covariance / variance);
  base_s_ = std::max(0.0, mean_seconds - s_per_operation_ * mean_work);
}

std::vector<std::uint64_t> select_batch(const AttentionModel& model, std::span<const Prefill> waiting, double quota_s) {
  std::vector<std::uint64_t> chosen;
  double work = 0;
  for (const Prefill& prefill : waiting) {
    const auto fits = [&](std::uint64_t tokens) {
      return model.seconds(work + AttentionModel::operations({prefill.cached, tokens})) <= quota_s;
    };
    if (fits(prefill.tokens)) {
      chosen.push_back(prefill.tokens);
      work += AttentionModel::operations(prefill);
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
