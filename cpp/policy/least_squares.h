// LeastSquares: y = base + a * first + b * second with no negative part, of samples that may fade.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

namespace dualkv {

class LeastSquares {
 public:
  // Earlier samples count for `fade` times what they did.
  void add(double first, double second, double y, double fade = 1) {
    const std::array<double, 3> sample{first, second, y};
    weight_ = weight_ * fade + 1;
    for (auto& row : spread_) {
      for (double& value : row) value *= fade;
    }
    // Welford's update, weighted: no difference of large sums.
    std::array<double, 3> before{};
    for (std::size_t i = 0; i < 3; ++i) {
      before[i] = sample[i] - mean_[i];
      mean_[i] += before[i] / weight_;
    }
    for (std::size_t i = 0; i < 3; ++i) {
      for (std::size_t k = 0; k < 3; ++k) spread_[i][k] += before[i] * (sample[k] - mean_[k]);
    }
  }

  struct Fit {
    double base = 0, first = 0, second = 0;
  };
  // What samples can't tell apart goes to `first`. False while `first` never varied.
  bool solve(Fit& out) const {
    const double ff = spread_[0][0], ss = spread_[1][1], fs = spread_[0][1], fy = spread_[0][2], sy = spread_[1][2];
    if (!(ff > 0) || !std::isfinite(fy)) return false;
    const double determinant = ff * ss - fs * fs;
    const bool apart = determinant > kCollinear * ff * ss;
    out.second = apart ? std::max(0.0, (ff * sy - fs * fy) / determinant) : 0;
    out.first = (fy - out.second * fs) / ff;
    if (out.first < 0) {
      out.first = 0;
      out.second = ss > 0 ? std::max(0.0, sy / ss) : 0;
    }
    out.base = std::max(0.0, mean_[2] - out.first * mean_[0] - out.second * mean_[1]);
    return true;
  }
  double mean_first() const { return mean_[0]; }
  double mean_y() const { return mean_[2]; }

 private:
  static constexpr double kCollinear = 1e-9;  // of a feature's variation that must be left beside the other

  double weight_ = 0;
  std::array<double, 3> mean_{};
  std::array<std::array<double, 3>, 3> spread_{};
};

}  // namespace dualkv
