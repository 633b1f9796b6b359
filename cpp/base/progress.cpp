// The progress loop over epoll.
#include "base/progress.h"

#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

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
constexpr int kPauses = 16;  // between two looks, about a microsecond: the core's other thread gets on meanwhile

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

}  // namespace

Progress::Progress(std::string name, std::chrono::microseconds spin)
    : spin_(spin),
      epoll_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
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
  if (posted_.size() == 1 && !on_thread()) eventfd_write(wake_.get(), 1);
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
    const std::lock_guard lock(ending_);
    stop();  // joins, so nobody else touches the state
    task();
  }
}

void Progress::watch(int fd, std::uint32_t events, FdHandler handler) {
  const std::uint64_t generation = ++generation_;
  watches_[fd] = {std::make_shared<const FdHandler>(std::move(handler)), generation};
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
  if (on_thread()) return;
  const std::lock_guard lock(ending_);
  if (thread_.joinable()) thread_.join();
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

// Blocks until something happens or the next timer is due.
int Progress::sleep(epoll_event* events, int most) {
  using std::chrono::nanoseconds;
  timespec limit{};
  if (!timers_.empty()) {
    const auto left = std::max(timers_.begin()->first.first - Clock::now(), Clock::duration::zero());
    const auto ns = std::chrono::duration_cast<nanoseconds>(left).count();
    limit = {ns / 1'000'000'000, ns % 1'000'000'000};
  }
#ifdef SYS_epoll_pwait2
  static_assert(sizeof(timespec) == 16, "the call takes 64-bit times");
  const long count = syscall(SYS_epoll_pwait2, epoll_.get(), events, most, timers_.empty() ? nullptr : &limit, nullptr,
                             std::size_t{0});
  if (count >= 0 || errno != ENOSYS) return static_cast<int>(count);
#endif
  // Older kernels count milliseconds. Rounded up: waking early would spin until the timer is due.
  const long ms = limit.tv_sec * 1000 + limit.tv_nsec / 1'000'000 + (limit.tv_nsec % 1'000'000 != 0);
  return epoll_wait(epoll_.get(), events, most, timers_.empty() ? -1 : static_cast<int>(std::min(ms, 60'000L)));
}

// While work follows work within spin_, waking up from sleep would cost more than looking for it. One spin without
// work ends that, so an idle thread never spins, and a busy one at most spin_ longer than its work.
int Progress::wait(epoll_event* events, int most) {
  if (spin_ == Clock::duration::zero()) return sleep(events, most);
  const auto start = Clock::now();
  auto until = start + spin_;
  if (!timers_.empty()) until = std::min(until, timers_.begin()->first.first);
  while (busy_) {
    const int count = epoll_wait(epoll_.get(), events, most, 0);
    if (count != 0) return count;
    for (int i = 0; i < kPauses; ++i) pause_core();
    sched_yield();  // to whoever else wants the core
    busy_ = Clock::now() < until;
  }
  const int count = sleep(events, most);
  busy_ = Clock::now() - start < spin_;
  return count;
}

void Progress::loop() {
  id_ = std::this_thread::get_id();
  std::array<epoll_event, 64> events;
  for (;;) {
    run_posted();
    run_timers();
    bool more = false;  // posted by what just ran
    {
      const std::lock_guard lock(mutex_);
      more = !posted_.empty();
      if (stopping_ && !more) {
        id_ = std::thread::id();  // the next thread of the process may be given the same one
        return;
      }
    }
    const int most = events.size();
    const int count = more ? epoll_wait(epoll_.get(), events.data(), most, 0) : wait(events.data(), most);
    const std::uint64_t newest = generation_;
    for (int i = 0; i < count; ++i) {
      // A handler may have closed a later fd of this batch, and its number may be in use again.
      const auto found = watches_.find(events[i].data.fd);
      if (found == watches_.end() || found->second.generation > newest) continue;
      const auto handler = found->second.handler;
      (*handler)(events[i].events);
    }
  }
}

}  // namespace dualkv
