// The cost model of path policies: measured rates, queues, links and staging of each side.
#include "policy/sides.h"

#include <algorithm>
#include <limits>

namespace dualkv {

namespace {

// A link that was measured while something held it up is not believed to be slower than this part of the reads.
constexpr double kSlowestLink = 1.0 / 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kBisections = 60;  // beyond the precision of a double's ratio of times

// What each side has by `seconds` if it keeps to its room; if that is too little for all, its room is filled first.
class Supply {
 public:
  Supply(const std::vector<Side>& sides, double bytes) : sides_(sides) {
    double room = 0;
    for (const Side& side : sides) room += side.room_bytes();
    crowded_ = room < bytes;
  }
  bool crowded() const { return crowded_; }
  double of(const Side& side, double seconds) const {
    const double room = side.room_bytes(), bytes = side.bytes_by(seconds);
    return crowded_ ? std::max(room, bytes) : std::min(room, bytes);
  }
  double total(double seconds) const {
    double sum = 0;
    for (const Side& side : sides_) sum += of(side, seconds);
    return sum;
  }
  // Enough for so many bytes.
  double late(double bytes) const {
    double one = kInfinity, all = 0;
    for (const Side& side : sides_) {
      if (crowded_ || side.room_bytes() >= bytes) one = std::min(one, side.seconds_for(bytes));
      all = std::max(all, side.seconds_for(std::min(side.room_bytes(), bytes)));
    }
    return one < kInfinity ? one : all;
  }

 private:
  const std::vector<Side>& sides_;
  bool crowded_ = false;
};

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

double Side::room_bytes() const {
  // Every node with staging can hold some prompt; without that, it has not said.
  if (view_->prompt_slots == 0) return kInfinity;
  return static_cast<double>(view_->free_slots) * static_cast<double>(view_->block_bytes);
}

std::vector<double> Side::turns() const {
  std::vector<double> out{seconds_for(0)};
  // Where read_rate * t - read_queue = link_rate * t - link_queue.
  if (link_rate_ > 0 && link_rate_ != read_rate_) {
    out.push_back((read_queue_ - link_queue_) / (read_rate_ - link_rate_));
  }
  if (room_bytes() < kInfinity) out.push_back(seconds_for(room_bytes()));
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
  const Supply supply(sides, bytes);
  double early = 0, late = supply.late(bytes);
  for (int i = 0; i < kBisections && late - early > late * 1e-12; ++i) {
    const double middle = early + (late - early) / 2;
    (supply.total(middle) < bytes ? early : late) = middle;
  }
  Shares out;
  out.seconds = late;
  for (const Side& side : sides) {
    out.bytes.push_back(supply.of(side, late));
    // A room that had to be filled may take longer.
    if (supply.crowded() && out.bytes.back() > 0)
      out.seconds = std::max(out.seconds, side.seconds_for(out.bytes.back()));
  }
  return out;
}

std::vector<double> turning_points(const std::vector<Side>& sides, double bytes, double seconds) {
  std::vector<double> times{seconds};
  for (const Side& side : sides) {
    for (const double time : side.turns()) times.push_back(time);
  }
  std::vector<double> out;
  for (const double most : {0.0, bytes}) {  // as long as there is room for all, and if there is none
    const Supply supply(sides, most);
    if (most > 0 && !supply.crowded()) break;
    for (const double time : times) {
      if (time >= 0) out.push_back(std::min(bytes, supply.total(time)));
    }
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
