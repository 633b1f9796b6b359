// The progress loop over epoll.
#include "base/progress.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <future>

namespace dualkv {

namespace {
int checked(int fd, const char* what) {
  if (fd < 0) throw Error(Code::kIo, what, errno);
  return fd;
}
}  // namespace

Progress::Progress(std::string name)
    : epoll_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      wake_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")) {
  watch(wake_.get(), EPOLLIN, [this](std::uint32_t) {
    eventfd_t count;
    eventfd_read(wake_.get(), &count);
  });
  thread_ = std::thread([this] { loop(); });
  pthread_setname_np(thread_.native_handle(), name.substr(0, 15).c_str());
}

Progress::~Progress() { stop(); }

bool Progress::post(Task task) {
  const std::lock_guard lock(mutex_);
  if (stopping_) return false;
  posted_.push_back(std::move(task));
  if (posted_.size() == 1) eventfd_write(wake_.get(), 1);
  return true;
}

void Progress::run(const Task& task) {
  if (on_thread()) return task();
  std::promise<void> done;
  if (post([&] {
        task();
        done.set_value();
      })) {
    done.get_future().wait();
  } else {
    stop();  // joins, so nobody else touches the state
    task();
  }
}

void Progress::watch(int fd, std::uint32_t events, FdHandler handler) {
  const std::uint64_t generation = ++generation_;
  watches_[fd] = {std::move(handler), generation};
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

void Progress::rewatch(int fd, std::uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event), "epoll_ctl");
}

void Progress::unwatch(int fd) {
  if (watches_.erase(fd) > 0) epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

Progress::TimerId Progress::at(Clock::time_point when, Task task) {
  const TimerId id = next_timer_++;
  timers_.emplace(std::pair(when, id), std::move(task));
  timer_times_.emplace(id, when);
  return id;
}

void Progress::cancel(TimerId timer) {
  const auto found = timer_times_.find(timer);
  if (found == timer_times_.end()) return;
  timers_.erase({found->second, timer});
  timer_times_.erase(found);
}

void Progress::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    eventfd_write(wake_.get(), 1);
  }
  if (thread_.joinable() && !on_thread()) thread_.join();
}

void Progress::run_posted() {
  std::vector<Task> tasks;
  {
    const std::lock_guard lock(mutex_);
    tasks.swap(posted_);
  }
  for (Task& task : tasks) task();
}

void Progress::run_timers() {
  const auto now = Clock::now();
  while (!timers_.empty() && timers_.begin()->first.first <= now) {
    auto node = timers_.extract(timers_.begin());
    timer_times_.erase(node.key().second);
    node.mapped()();
  }
}

int Progress::wait_ms() const {
  if (timers_.empty()) return -1;
  const auto left = timers_.begin()->first.first - Clock::now();
  if (left <= Clock::duration::zero()) return 0;
  // Rounded up: waking early would spin until the timer is due.
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left).count() + 1;
  return static_cast<int>(std::min<long>(ms, 1000));
}

void Progress::loop() {
  std::array<epoll_event, 64> events;
  for (;;) {
    run_posted();
    run_timers();
    {
      const std::lock_guard lock(mutex_);
      if (stopping_ && posted_.empty()) return;
    }
    const int count = epoll_wait(epoll_.get(), events.data(), events.size(), wait_ms());
    const std::uint64_t newest = generation_;
    for (int i = 0; i < count; ++i) {
      // A handler may have closed a later fd of this batch, and its number may be in use again.
      const auto found = watches_.find(events[i].data.fd);
      if (found == watches_.end() || found->second.generation > newest) continue;
      const FdHandler handler = found->second.handler;
      handler(events[i].events);
    }
  }
}

}  // namespace dualkv
