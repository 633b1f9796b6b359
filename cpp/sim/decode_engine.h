// DecodeEngine: continuous batching, as a clock of steps that slows down as its batch and its contexts grow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <vector>

#include "dualkv/sim.h"

namespace dualkv::sim {

// Every step gives each request of the batch one token, and makes each context one token longer. Between a join and a
// leave nothing else changes, so v steps take a*v + b*v*v/2 seconds: no event a step.
class DecodeEngine {
 public:
  explicit DecodeEngine(const SimCompute& compute) : compute_(compute) {}

  // Tokens to come: `steps` > 0.
  void join(double now, std::uint32_t agent, double context, std::uint32_t steps) {
    advance(now);
    ++batch_;
    context_ += context;
    ends_.push({steps_ + steps, agent});
  }
  // When the next request has its last token.
  double next_end() const {
    if (ends_.empty()) return std::numeric_limits<double>::infinity();
    const double steps = std::max(0.0, ends_.top().steps - steps_);
    return since_ + step_s() * steps + growth() * steps * steps / 2;
  }
  // That request leaves; `context` as it joined, and what it added.
  std::uint32_t leave(double now, const std::function<double(std::uint32_t)>& context) {
    const End end = ends_.top();
    since_ = now;
    context_ += batch_ * (end.steps - steps_);
    steps_ = end.steps;
    ends_.pop();
    --batch_;
    context_ = batch_ == 0 ? 0 : context_ - context(end.agent);
    return end.agent;
  }
  // Of the step that would begin now.
  double step_s() const {
    return compute_.step_s + compute_.step_request_s * batch_ + compute_.step_context_s * context_;
  }
  std::uint32_t batch() const { return batch_; }

 private:
  struct End {
    double steps;
    std::uint32_t agent;
    bool operator>(const End& other) const { return steps != other.steps ? steps > other.steps : agent > other.agent; }
  };

  double growth() const { return compute_.step_context_s * batch_; }
  void advance(double now) {
    const double a = step_s(), b = growth(), t = now - since_;
    since_ = now;
    if (batch_ == 0) return;
    // The stable root of b*v*v/2 + a*v = t.
    const double steps = 2 * t / (a + std::sqrt(a * a + 2 * b * t));
    steps_ += steps;
    context_ += batch_ * steps;
  }

  SimCompute compute_;
  std::priority_queue<End, std::vector<End>, std::greater<>> ends_;
  double steps_ = 0;  // since the start
  double since_ = 0;
  double context_ = 0;  // of the batch
  std::uint32_t batch_ = 0;
};

}  // namespace dualkv::sim
