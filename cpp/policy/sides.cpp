// The cost model of path policies: measured rates, queues and links of each side.
#include "policy/sides.h"

#include <algorithm>
#include <limits>

namespace dualkv {

namespace {

// A link that was measured while something held it up is not believed to be slower than this part of the reads.
constexpr double kSlowestLink = 1.0 / 16;
constexpr int kBisections = 60;  // beyond the precision of a double's ratio of times

double total_by(const std::vector<Side>& sides, double seconds) {
  double sum = 0;
  for (const Side& side : sides) sum += side.bytes_by(seconds);
  return sum;
}

}  // namespace

double Side::bytes_by(double seconds) const {
  double bytes = read_rate_ * seconds - read_queue_;
  if (link_rate_ > 0) bytes = std::min(bytes, link_rate_ * seconds - link_queue_);
  return std::max(0.0, bytes);
}

double Side::seconds_for(double bytes) const {
  const double read = (read_queue_ + bytes) / read_rate_;
  return link_rate_ > 0 ? std::max(read, (link_queue_ + bytes) / link_rate_) : read;
}

double Side::pace() const { return link_rate_ > 0 ? std::min(read_rate_, link_rate_) : read_rate_; }

std::vector<double> Side::turns() const {
  std::vector<double> out{seconds_for(0)};
  // Where read_rate * t - read_queue = link_rate * t - link_queue.
  if (link_rate_ > 0 && link_rate_ != read_rate_) {
    out.push_back((read_queue_ - link_queue_) / (read_rate_ - link_rate_));
  }
  return out;
}

std::vector<Side> sides_of(const PlanRequest& request) {
  std::vector<Side> sides{{request.prefill, Path::kPrefill}};
  if (request.decode) sides.push_back({*request.decode, Path::kDecode});
  for (const NodeView& helper : request.helpers) sides.push_back({helper, Path::kHelper});
  double sum = 0;
  int measured = 0;
  for (const Side& side : sides) {
    if (side.view_->read_bandwidth == 0) continue;
    sum += static_cast<double>(side.view_->read_bandwidth);
    ++measured;
  }
  const double guess = measured > 0 ? sum / measured : 1;
  for (Side& side : sides) {
    const NodeView& view = *side.view_;
    side.read_rate_ = view.read_bandwidth > 0 ? static_cast<double>(view.read_bandwidth) : guess;
    side.read_queue_ = static_cast<double>(view.read_queue_bytes);
    if (side.path_ == Path::kPrefill || view.link_bandwidth == 0) continue;
    side.link_rate_ = std::max(static_cast<double>(view.link_bandwidth), side.read_rate_ * kSlowestLink);
    for (const std::uint64_t bytes : view.lane_bytes) side.link_queue_ += static_cast<double>(bytes);
  }
  return sides;
}

Shares share_out(const std::vector<Side>& sides, double bytes) {
  double early = 0, late = std::numeric_limits<double>::infinity();
  for (const Side& side : sides) late = std::min(late, side.seconds_for(bytes));
  for (int i = 0; i < kBisections && late - early > late * 1e-12; ++i) {
    const double middle = early + (late - early) / 2;
    (total_by(sides, middle) < bytes ? early : late) = middle;
  }
  Shares out;
  out.seconds = late;
  for (const Side& side : sides) out.bytes.push_back(side.bytes_by(late));
  return out;
}

std::vector<double> turning_points(const std::vector<Side>& sides, double bytes, double seconds) {
  std::vector<double> times{seconds};
  for (const Side& side : sides) {
    for (const double time : side.turns()) times.push_back(time);
  }
  std::vector<double> out;
  for (const double time : times) {
    if (time >= 0) out.push_back(std::min(bytes, total_by(sides, time)));
  }
  return out;
}

Plan unread_plan(const PlanRequest& request) {
  Plan plan;
  plan.keys = request.keys;
  plan.prefill = request.prefill.name;
  if (request.decode) plan.decode = request.decode->name;
  for (const NodeView& helper : request.helpers) plan.helpers.push_back(helper.name);
  return plan;
}

}  // namespace dualkv
