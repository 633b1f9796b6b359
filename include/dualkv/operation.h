// Handles on work in progress: wait with a deadline, poll, or be told through an eventfd.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "dualkv/status.h"

namespace dualkv {

using Clock = std::chrono::steady_clock;

// A queue of tokens with an eventfd that is readable while the queue is not empty. One serves all handles of a
// node, so an event loop watches one fd. Thread-safe.
class Notifier {
 public:
  Notifier();
  ~Notifier();
  Notifier(const Notifier&) = delete;
  Notifier& operator=(const Notifier&) = delete;

  int fd() const { return fd_; }
  void push(std::uint64_t token);
  // Takes every token pushed since the last drain.
  std::vector<std::uint64_t> drain();

 private:
  int fd_;
  std::mutex mutex_;
  std::vector<std::uint64_t> tokens_;
};

// A fixed number of milestones, each reached once, or the whole failed: the state behind Load, Incoming and
// Operation. After a failure every milestone not yet reached counts as failed. Thread-safe.
class Milestones {
 public:
  explicit Milestones(std::uint32_t count);

  std::uint32_t count() const { return count_; }
  void reach(std::uint32_t milestone);
  // The first failure is kept; later ones, and failures after everything was reached, are ignored.
  void fail(Status status);

  bool reached(std::uint32_t milestone) const;
  bool ended(std::uint32_t milestone) const;  // reached or failed
  Status status() const;
  // Blocks until the milestone is reached, the whole failed, or `until`: the Status is ok, the failure, or
  // kTimeout (which leaves the operation as it is).
  Status wait(std::uint32_t milestone, Clock::time_point until) const;
  // Pushes `token` once, when the milestone has ended; at once if it already has.
  void notify(std::uint32_t milestone, std::shared_ptr<Notifier> notifier, std::uint64_t token);

 private:
  struct Subscription {
    std::uint32_t milestone;
    std::shared_ptr<Notifier> notifier;
    std::uint64_t token;
  };
  bool ended_locked(std::uint32_t milestone) const;
  void announce_locked();

  const std::uint32_t count_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<bool> reached_;
  std::uint32_t reached_count_ = 0;
  Status failure_;
  std::vector<Subscription> subscriptions_;
};

// A handle on one asynchronous call. Copies share the same state. Dropping it does not cancel the work, unless the
// call says so.
class Operation {
 public:
  Operation() : state_(std::make_shared<Milestones>(1)) {}

  bool done() const { return state_->ended(0); }
  Status status() const { return state_->status(); }
  Status wait(Clock::time_point until) const { return state_->wait(0, until); }
  const std::shared_ptr<Milestones>& milestones() const { return state_; }
  // `guard` is released with the last copy of this handle.
  void attach(std::shared_ptr<void> guard) { guard_ = std::move(guard); }

 private:
  std::shared_ptr<Milestones> state_;
  std::shared_ptr<void> guard_;
};

}  // namespace dualkv
