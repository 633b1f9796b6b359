// LimitedReader: a token bucket in front of a reader, standing in for a storage NIC.
#include <deque>

#include "base/clock.h"
#include "storage/block_reader.h"

namespace dualkv {

namespace {

class LimitedReader : public BlockReader {
 public:
  LimitedReader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry, std::uint64_t bytes_per_s)
      : inner_(std::move(inner)), geometry_(geometry), seconds_per_byte_(1.0 / static_cast<double>(bytes_per_s)) {}

  bool try_submit(const ReadRequest& request) noexcept override {
    if (waiting_.size() >= kMaxWaiting) return false;
    waiting_.push_back(request);
    return true;
  }

  void flush() noexcept override { admit(); }

  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
    admit();
    return inner_->poll(out);
  }

  int event_fd() const override { return inner_->event_fd(); }
  void idle() noexcept override { inner_->idle(); }

  bool drain(Clock::time_point deadline) noexcept override { return inner_->drain(deadline); }

  std::optional<Clock::time_point> next_wake() const override {
    const auto inner = inner_->next_wake();
    // A full inner reader wakes us through its completions.
    if (waiting_.empty() || inner_full_) return inner;
    const auto mine = free_at_ - kBurst;
    return inner && *inner < mine ? *inner : mine;
  }

 private:
  // The bucket's size: how far ahead of the rate a burst may run. Long enough to hide the loop's millisecond timers.
  static constexpr auto kBurst = std::chrono::milliseconds(4);
  static constexpr std::size_t kMaxWaiting = 64;

  void admit() noexcept {
    const auto now = Clock::now();
    bool any = false;
    inner_full_ = false;
    while (!waiting_.empty() && free_at_ - kBurst <= now) {
      inner_full_ = !inner_->try_submit(waiting_.front());
      if (inner_full_) break;
      const FileRuns runs = file_runs(geometry_, waiting_.front().layers, waiting_.front().trailer);
      const auto cost = to_duration(static_cast<double>(runs.bytes()) * seconds_per_byte_);
      free_at_ = std::max(free_at_, now) + cost;
      waiting_.pop_front();
      any = true;
    }
    if (any) inner_->flush();
  }

  std::unique_ptr<BlockReader> inner_;
  const KvGeometry geometry_;
  const double seconds_per_byte_;
  std::deque<ReadRequest> waiting_;
  bool inner_full_ = false;
  Clock::time_point free_at_{};  // when everything admitted so far has been paid for
};

}  // namespace

std::unique_ptr<BlockReader> make_limited_reader(std::unique_ptr<BlockReader> inner, const KvGeometry& geometry,
                                                 std::uint64_t bytes_per_s) {
  return std::make_unique<LimitedReader>(std::move(inner), geometry, bytes_per_s);
}

}  // namespace dualkv
