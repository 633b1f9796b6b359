// What is due when: a queue of events, in the order of their times, then of their making.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

namespace dualkv::sim {

enum class EventKind : std::uint8_t { kArrive, kFetch, kPlace, kForward, kDecode, kWindow };

struct Event {
  double time = 0;
  std::uint64_t order = 0;
  EventKind kind = EventKind::kArrive;
  std::uint32_t subject = 0;
  std::uint32_t version = 0;  // of the subject; an event of an older one is void

  bool operator>(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
};

class EventQueue {
 public:
  void add(double time, EventKind kind, std::uint32_t subject, std::uint32_t version = 0) {
    events_.push({time, ++order_, kind, subject, version});
    work_ += !periodic(kind);
  }
  bool empty() const { return events_.empty(); }
  // Any that does not just come again and again.
  bool work() const { return work_ > 0; }
  double next_time() const { return events_.top().time; }
  Event take() {
    const Event event = events_.top();
    events_.pop();
    work_ -= !periodic(event.kind);
    return event;
  }

 private:
  static bool periodic(EventKind kind) { return kind == EventKind::kFetch || kind == EventKind::kWindow; }

  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::uint64_t order_ = 0, work_ = 0;
};

}  // namespace dualkv::sim
