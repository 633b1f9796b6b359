// The progress thread: one loop that runs posted tasks, timers and file descriptor handlers.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "dualkv/operation.h"

namespace dualkv {

// Owns the thread. post() may be called from any thread; everything else only on the progress thread, or before
// start(). Handlers must not throw and must not block.
class Progress {
 public:
  using Task = std::function<void()>;
  using FdHandler = std::function<void(std::uint32_t events)>;
  using TimerId = std::uint64_t;

  // `spin`: how long the thread looks for more work before it sleeps, when the last work came that soon; 0 = never.
  explicit Progress(std::string name, std::chrono::microseconds spin = std::chrono::microseconds(0));
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Runs `task` on the progress thread, after those posted before it. False, and the task is dropped, once the
  // thread has been told to stop.
  bool post(Task task);
  // Runs `task` there and waits for it. Runs it in place on the progress thread itself, or after the stop, one at a
  // time.
  void run(const Task& task);
  bool on_thread() const { return std::this_thread::get_id() == id_.load(std::memory_order_relaxed); }

  void watch(int fd, std::uint32_t events, FdHandler handler);
  void rewatch(int fd, std::uint32_t events);
  void unwatch(int fd);

  TimerId at(Clock::time_point when, Task task);
  void cancel(TimerId timer);

  // Runs what was posted, then ends the thread, which has ended when this returns (unless called on it). Idempotent,
  // also by several threads at once.
  void stop();

 private:
  void loop();
  void run_posted();
  void run_timers();
  int wait(epoll_event* events, int most);
  int sleep(epoll_event* events, int most);

  struct Watch {
    std::shared_ptr<const FdHandler> handler;  // shared: a handler may end its own watch
    std::uint64_t generation;
  };

  const Clock::duration spin_;
  bool busy_ = false;  // the last work came within spin_
  Fd epoll_;
  Fd wake_;
  std::mutex mutex_;
  std::vector<Task> posted_;
  bool stopping_ = false;  // guarded by mutex_
  std::map<int, Watch> watches_;
  std::uint64_t generation_ = 0;
  std::map<std::pair<Clock::time_point, TimerId>, Task> timers_;
  std::map<TimerId, Clock::time_point> timer_times_;
  TimerId next_timer_ = 1;
  std::atomic<std::thread::id> id_{};  // of thread_, once it runs
  std::recursive_mutex ending_;  // guards the end of thread_ (two joins at once may wait for ever), and tasks after it
  std::thread thread_;
};

}  // namespace dualkv
