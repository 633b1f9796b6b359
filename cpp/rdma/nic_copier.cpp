// Loop-back writes: queueing, completion and what the CPU takes over.
#include "rdma/nic_copier.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/clock.h"

namespace dualkv {

namespace {
constexpr std::size_t kMostPerDoorbell = 128;  // so that the first copies of many are told before the last are done
constexpr double kFirstPause = 0.05, kLongestPause = 2.0;
}  // namespace

NicCopier::NicCopier(Progress& progress, RdmaDomain& domain, const LaneMark& mark,
                     std::function<void(const std::string&)> note)
    : progress_(progress), domain_(domain), mark_(mark), note_(std::move(note)) {
  stats_.engine = CopyEngine::kNic;
  stats_.rail = domain_.rails().front()->name();
  pending_ = WriteChain(domain_.rails().front()->attributes().max_msg_sz);
  connect();
}

NicCopier::~NicCopier() {
  progress_.cancel(timer_);
  progress_.cancel(watch_);
  if (pair_) pair_->close();
}

void NicCopier::connect() {
  try {
    pair_ = QueuePair::create(*domain_.rails().front(), domain_.options(), *this);
  } catch (const Error&) {
    return connect_later();
  }
  pair_->connect(pair_->address(), mark_, domain_.options(), domain_.worker(), [this](const Status& status) {
    up_ = status.ok();
    if (up_) return;
    pair_->close();
    pair_.reset();
    connect_later();
  });
}

void NicCopier::connect_later() {
  if (timer_ != 0) return;
  const auto pause = to_duration(pause_s_);
  pause_s_ = std::clamp(pause_s_ * 2, kFirstPause, kLongestPause);
  timer_ = progress_.at(Clock::now() + pause, [this] {
    timer_ = 0;
    connect();
  });
}

void NicCopier::copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                     std::shared_ptr<void> keep, Done done) {
  begin({{Extents(from), Extents(to), owner, std::move(keep), std::move(done)}, {}});
}

void NicCopier::copy_or_fail(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                             std::shared_ptr<void> keep, Done done) {
  begin({{Extents(from), Extents(to), owner, std::move(keep), std::move(done)}, {}, /*only_by_nic=*/true});
}

void NicCopier::begin(Job job) {
  if (enqueue(job)) {
    if (jobs_.empty()) progress_at_ = Clock::now();
    jobs_.push_back(std::move(job));
    if (watch_ == 0) watch();
    return flush_later();
  }
  give_up(job);
  job.done(job.status);
}

bool NicCopier::enqueue(Job& job) {
  if (!up_) return false;
  const auto registered = [&](const Extent& extent) -> const RdmaRegistration* {
    for (const auto& registration : job.held) {
      if (registration->covers(extent.data, extent.bytes)) return registration.get();
    }
    auto found = domain_.registrations().find(extent.data, extent.bytes);
    if (!found) return nullptr;
    job.held.push_back(std::move(found));
    return job.held.back().get();
  };
  std::array<LocalExtent, PagedKv::kMaxPlanes> from;
  std::array<RemoteExtent, PagedKv::kMaxPlanes> to;
  std::size_t read = 0, written = 0;
  for (const Extent& extent : job.from.span()) {
    const RdmaRegistration* registration = registered(extent);
    if (registration == nullptr) return false;
    from[read++] = {extent.data, extent.bytes, registration->local_key(0)};
  }
  for (const Extent& extent : job.to.span()) {
    const RdmaRegistration* registration = registered(extent);
    if (registration == nullptr) return false;
    to[written++] = {reinterpret_cast<std::uint64_t>(extent.data), extent.bytes, registration->remote_key(0)};
  }
  pending_.append(std::span(from).first(read), std::span(to).first(written));
  job.last = pair_->work_requests() + pending_.writes().size() - posted_;
  return true;
}

void NicCopier::give_up(Job& job) {
  if (job.only_by_nic) {
    job.status = {Code::kUnsupported, 0, "the NIC's queue pair is not up, or the memory is not registered"};
    return;
  }
  note_("copy_by_cpu");
  dualkv::copy(job.from.span(), job.to.span());
  stats_.bytes_by_cpu += job.from.bytes();
}

// Gathers what one turn of the loop asks for.
void NicCopier::flush_later() {
  if (std::exchange(flushing_, true)) return;
  progress_.post([this, alive = std::weak_ptr(alive_)] {
    if (alive.expired()) return;
    flushing_ = false;
    flush();
  });
}

void NicCopier::flush() {
  if (!up_) return;
  std::vector<RdmaWrite>& writes = pending_.writes();
  while (posted_ < writes.size()) {
    const std::size_t most = std::min(kMostPerDoorbell, writes.size() - posted_);
    const std::size_t count = pair_->post(std::span(writes).subspan(posted_, most));
    if (count == 0) return;
    posted_ += count;
    ++stats_.doorbells;
  }
  writes.clear();
  posted_ = 0;
}

void NicCopier::on_room(QueuePair& pair) {
  progress_at_ = Clock::now();
  pause_s_ = 0;
  const std::uint64_t left = pair.retired();
  while (!jobs_.empty() && jobs_.front().last <= left) {
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    stats_.bytes_by_nic += job.from.bytes();
    job.done({});
    if (pair_.get() != &pair) return;  // withdrawn meanwhile
  }
  flush();
}

void NicCopier::on_failed(QueuePair& pair, const std::string&) {
  if (pair_.get() == &pair) reset(0);
}

void NicCopier::reset(std::uint64_t except) {
  up_ = false;
  if (pair_) pair_->close();
  pair_.reset();
  pending_.writes().clear();
  posted_ = 0;
  for (Job& job : std::exchange(jobs_, {})) {
    if (job.owner == except) continue;
    give_up(job);
    finish_later(std::move(job));
  }
  connect_later();
}

// Not from within the call of somebody else, who may be in the middle of ending.
void NicCopier::finish_later(Job job) {
  finished_.push_back(std::move(job));
  progress_.post([this, alive = std::weak_ptr(alive_)] {
    if (alive.expired() || finished_.empty()) return;
    const Job job = std::move(finished_.front());
    finished_.pop_front();
    job.done(job.status);
  });
}

void NicCopier::withdraw(std::uint64_t owner) {
  std::erase_if(finished_, [&](const Job& job) { return job.owner == owner; });
  if (std::any_of(jobs_.begin(), jobs_.end(), [&](const Job& job) { return job.owner == owner; })) reset(owner);
}

void NicCopier::watch() {
  const double stall_s = domain_.options().stall_s;
  watch_ = progress_.at(Clock::now() + to_duration(stall_s / 4), [this, stall_s] {
    watch_ = 0;
    if (jobs_.empty()) return;
    if (Clock::now() - progress_at_ >= to_duration(stall_s)) reset(0);
    if (!jobs_.empty()) watch();
  });
}

CopyStats NicCopier::stats() const { return stats_; }

}  // namespace dualkv
