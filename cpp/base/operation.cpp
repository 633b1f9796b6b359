// Notifier and Milestones.
#include "dualkv/operation.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace dualkv {

Notifier::Notifier() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) throw Error(Code::kIo, "eventfd", errno);
}

Notifier::~Notifier() { ::close(fd_); }

void Notifier::push(std::uint64_t token) {
  const std::lock_guard lock(mutex_);
  tokens_.push_back(token);
  if (tokens_.size() == 1) eventfd_write(fd_, 1);
}

std::vector<std::uint64_t> Notifier::drain() {
  const std::lock_guard lock(mutex_);
  eventfd_t count;
  eventfd_read(fd_, &count);
  return std::exchange(tokens_, {});
}

Milestones::Milestones(std::uint32_t count) : count_(count), reached_(count, false) {}

bool Milestones::ended_locked(std::uint32_t milestone) const {
  if (milestone >= count_) {
    throw Error(Code::kInvalidArgument, "milestone " + std::to_string(milestone) + " of " + std::to_string(count_));
  }
  return reached_[milestone] || !failure_.ok();
}

void Milestones::announce_locked() {
  std::erase_if(subscriptions_, [&](Subscription& s) {
    if (!ended_locked(s.milestone)) return false;
    s.notifier->push(s.token);
    return true;
  });
  changed_.notify_all();
}

void Milestones::reach(std::uint32_t milestone) {
  const std::lock_guard lock(mutex_);
  if (ended_locked(milestone)) return;
  reached_[milestone] = true;
  ++reached_count_;
  announce_locked();
}

void Milestones::fail(Status status) {
  const std::lock_guard lock(mutex_);
  if (!failure_.ok() || reached_count_ == count_) return;
  failure_ = std::move(status);
  announce_locked();
}

bool Milestones::reached(std::uint32_t milestone) const {
  const std::lock_guard lock(mutex_);
  return ended_locked(milestone) && reached_[milestone];
}

bool Milestones::ended(std::uint32_t milestone) const {
  const std::lock_guard lock(mutex_);
  return ended_locked(milestone);
}

Status Milestones::status() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

Status Milestones::wait(std::uint32_t milestone, Clock::time_point until) const {
  std::unique_lock lock(mutex_);
  const auto ended = [&] { return ended_locked(milestone); };
  if (until == Clock::time_point::max()) {
    changed_.wait(lock, ended);
  } else if (!changed_.wait_until(lock, until, ended)) {
    return {Code::kTimeout, 0, "still in progress after the wait's time limit"};
  }
  return reached_[milestone] ? Status{} : failure_;
}

void Milestones::notify(std::uint32_t milestone, std::shared_ptr<Notifier> notifier, std::uint64_t token) {
  const std::lock_guard lock(mutex_);
  if (ended_locked(milestone)) {
    notifier->push(token);
  } else {
    subscriptions_.push_back({milestone, std::move(notifier), token});
  }
}

}  // namespace dualkv
