// Requests of the scheduler, and its queues of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dualkv::scheduling {

struct Engine;
class RequestQueue;

// One of the two engines of a request.
struct Side {
  Engine* engine = nullptr;
  std::size_t held_at = 0;   // among what the engine holds
  std::uint64_t number = 0;  // the last message to the engine about this request
};

struct Request {
  std::uint64_t id = 0;
  std::uint64_t order = 0;
  std::uint64_t tokens = 0;
  std::uint64_t hit_tokens = 0;
  Side prefill, decode;
  RequestQueue* queue = nullptr;  // it waits there
  Request* previous = nullptr;    // in that queue
  Request* next = nullptr;
};

// Requests in the order of their submission: one that returns takes its old place. A list through the requests, which
// must outlive their stay; nearly all of them go in at the end and out at the front. Those that return come in runs,
// so each looks for its place from that of the one before.
class RequestQueue {
 public:
  RequestQueue() = default;
  RequestQueue(const RequestQueue&) = delete;
  RequestQueue& operator=(const RequestQueue&) = delete;

  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }
  std::uint64_t tokens() const { return tokens_; }
  Request* front() const { return front_; }

  void insert(Request& request) {
    Request* before = place_of(request.order);
    Request* after = before == nullptr ? front_ : before->next;
    request.queue = this;
    request.previous = before;
    request.next = after;
    (before == nullptr ? front_ : before->next) = &request;
    (after == nullptr ? back_ : after->previous) = &request;
    near_ = &request;
    ++size_;
    tokens_ += request.tokens;
  }

  void erase(Request& request) {
    if (near_ == &request) near_ = request.previous;
    (request.previous == nullptr ? front_ : request.previous->next) = request.next;
    (request.next == nullptr ? back_ : request.next->previous) = request.previous;
    request.queue = nullptr;
    request.previous = request.next = nullptr;
    --size_;
    tokens_ -= request.tokens;
  }

 private:
  // The last request submitted before `order`; null: none.
  Request* place_of(std::uint64_t order) const {
    if (back_ == nullptr || back_->order < order) return back_;
    Request* before = near_;
    while (before != nullptr && before->order > order) before = before->previous;
    for (Request* after = before == nullptr ? front_ : before->next; after->order < order; after = after->next) {
      before = after;  // the back one ends this: it came later
    }
    return before;
  }

  Request* front_ = nullptr;
  Request* back_ = nullptr;
  Request* near_ = nullptr;  // the last one put in, or the one before it
  std::size_t size_ = 0;
  std::uint64_t tokens_ = 0;
};

}  // namespace dualkv::scheduling
