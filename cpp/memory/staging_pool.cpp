// StagingPool: memory prepared chunk by chunk, a free list, two FIFOs of waiters, and slots that return themselves.
#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <thread>

#include "base/text.h"
#include "dualkv/staging.h"
#include "memory/region.h"

namespace dualkv {

class StagingState : public std::enable_shared_from_this<StagingState> {
 public:
  StagingState(const KvGeometry& geometry, const StagingOptions& options)
      : slot_bytes_(geometry.file_bytes()),
        slots_(slot_count(geometry, options)),
        prompt_limit_(slots_ - std::clamp<std::uint32_t>(static_cast<std::uint32_t>(slots_ * options.transit_share), 1,
                                                         slots_ - 1)),
        options_(options),
        region_(slot_bytes_ * slots_, {options.huge_pages, options.numa_node, options.shared}),
        chunk_bytes_(chunk_size(options)),
        chunk_ready_((region_.mapped_bytes() + chunk_bytes_ - 1) / chunk_bytes_) {
    free_.reserve(slots_);
  }

  // Once, after construction.
  void prepare() {
    // Nothing to prepare: memory that is not locked is touched when it is used.
    if (!options_.lock_memory) return all_ready();
    prepare_next();
    const auto threads = std::min<std::size_t>(options_.prepare_threads, chunk_ready_.size() - 1);
    for (std::size_t i = 0; i < threads; ++i) {
      threads_.emplace_back([this] {
        while (prepare_next()) {
        }
      });
    }
    if (options_.lazy) return;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  ~StagingState() {
    next_chunk_ = chunk_ready_.size();
    for (std::thread& thread : threads_) {
      // The last handle may have been one that serve() handed to a waiter on the thread itself.
      if (thread.get_id() == std::this_thread::get_id()) {
        thread.detach();
      } else {
        thread.join();
      }
    }
    for (auto& queue : waiting_) {
      for (Waiter& waiter : queue) waiter.done({});
    }
  }

  Slot try_acquire(SlotUse use) {
    const std::lock_guard lock(mutex_);
    if (!waiting_[index(use)].empty() || !fits(1, use)) return nullptr;
    return take(use);
  }

  std::uint64_t acquire(std::uint32_t count, SlotUse use, StagingPool::Acquired done) {
    check_possible(count, use);
    std::vector<Slot> slots;
    std::uint64_t ticket;
    {
      const std::lock_guard lock(mutex_);
      ticket = ++last_ticket_;
      if (!waiting_[index(use)].empty() || !fits(count, use)) {
        waiting_[index(use)].push_back({ticket, count, std::move(done)});
        return ticket;
      }
      for (std::uint32_t i = 0; i < count; ++i) slots.push_back(take(use));
    }
    done(std::move(slots));
    return ticket;
  }

  void withdraw(std::uint64_t ticket) {
    StagingPool::Acquired done;
    {
      const std::lock_guard lock(mutex_);
      for (auto& queue : waiting_) {
        const auto found = std::find_if(queue.begin(), queue.end(), [&](auto& w) { return w.ticket == ticket; });
        if (found == queue.end()) continue;
        done = std::move(found->done);
        queue.erase(found);
        break;
      }
    }
    if (done) done({});
    serve();  // whoever stood behind it may fit
  }

  void on_free(std::function<void()> listener) {
    const std::lock_guard lock(mutex_);
    listener_ = std::move(listener);
  }

  StagingStats stats() const {
    const std::lock_guard lock(mutex_);
    static constexpr const char* kPages[] = {"small", "transparent huge", "huge"};
    return {slots_,
            static_cast<std::uint32_t>(free_.size()),
            prompt_limit_,
            prompt_slots_,
            static_cast<std::uint32_t>(waiting_[0].size() + waiting_[1].size()),
            options_.lock_memory && !lock_refused_,
            kPages[static_cast<int>(region_.pages())],
            static_cast<std::uint32_t>(chunk_ready_.size()),
            ready_chunks_,
            locked_bytes_,
            ready_chunks_ == chunk_ready_.size() ? prepare_s_ : seconds_since_start(),
            options_.numa_node >= 0 && region_.bound()};
  }

  std::uint64_t slot_bytes() const { return slot_bytes_; }
  std::uint64_t ready_bytes() const { return ready_bytes_; }
  const Region& region() const { return region_; }

 private:
  struct Waiter {
    std::uint64_t ticket;
    std::uint32_t count;
    StagingPool::Acquired done;
  };

  static int index(SlotUse use) { return static_cast<int>(use); }

  static std::uint32_t slot_count(const KvGeometry& geometry, const StagingOptions& options) {
    const std::uint64_t count = options.bytes / geometry.file_bytes();
    if (count < 2) {
      throw Error(Code::kInvalidArgument, text("staging = ", options.bytes, " bytes holds ", count, " slots of ",
                                               geometry.file_bytes(), " bytes: at least 2 are needed"));
    }
    if (!(options.transit_share >= 0 && options.transit_share <= 1)) {  // also NaN
      throw Error(Code::kInvalidArgument, text("transit_share = ", options.transit_share, ": must be 0 to 1"));
    }
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(count, 1u << 24));
  }

  static std::uint64_t chunk_size(const StagingOptions& options) {
    if (options.chunk_bytes == 0 || options.prepare_threads == 0 || options.prepare_threads > 64) {
      throw Error(Code::kInvalidArgument, text("staging: chunk_bytes = ", options.chunk_bytes, ", prepare_threads = ",
                                               options.prepare_threads, ": must be more than 0, and 1 to 64"));
    }
    if (options.numa_node < -1) {
      throw Error(Code::kInvalidArgument, text("staging: numa_node = ", options.numa_node, ": must be -1 or more"));
    }
    constexpr std::uint64_t kPage = Region::kHugePageBytes;
    return (std::min(options.chunk_bytes, std::uint64_t{1} << 40) + kPage - 1) / kPage * kPage;
  }

  double seconds_since_start() const { return std::chrono::duration<double>(Clock::now() - started_).count(); }

  // False if there is no chunk left to prepare, or the pool is gone. Any thread.
  bool prepare_next() {
    const std::size_t chunk = next_chunk_++;
    if (chunk >= chunk_ready_.size()) return false;
    const std::uint64_t first = chunk * chunk_bytes_;
    const std::uint64_t bytes = std::min(chunk_bytes_, region_.mapped_bytes() - first);
    const std::uint64_t limit = options_.lock_limit_bytes == 0 ? region_.mapped_bytes() : options_.lock_limit_bytes;
    const std::uint64_t allowed = limit > first ? std::min(bytes, limit - first) : 0;
    const std::uint64_t wanted = allowed / Region::kHugePageBytes * Region::kHugePageBytes;
    const bool locked = wanted > 0 && region_.lock(first, wanted);
    {
      const std::lock_guard lock(mutex_);
      lock_refused_ |= wanted > 0 && !locked;
      locked_bytes_ += locked ? wanted : 0;
      chunk_ready_[chunk] = true;
      if (++ready_chunks_ == chunk_ready_.size()) prepare_s_ = seconds_since_start();
      std::size_t ready = ready_bytes_ / chunk_bytes_;
      while (ready < chunk_ready_.size() && chunk_ready_[ready]) ++ready;
      become_ready(std::min(ready * chunk_bytes_, region_.mapped_bytes()));
    }
    // The last handle may be gone already, or be this one: then nothing of `this` is left afterwards.
    const std::weak_ptr<StagingState> weak = weak_from_this();
    if (const auto self = weak.lock()) self->serve();
    return !weak.expired();
  }

  void all_ready() {
    const std::lock_guard lock(mutex_);
    ready_chunks_ = static_cast<std::uint32_t>(chunk_ready_.size());
    become_ready(region_.mapped_bytes());
  }

  // Puts the slots that lie wholly in the first `bytes` to use, the lowest to be taken first. With the lock.
  void become_ready(std::uint64_t bytes) {
    const auto end = static_cast<std::uint32_t>(std::min<std::uint64_t>(bytes / slot_bytes_, slots_));
    std::vector<std::byte*> fresh;
    for (std::uint32_t i = end; i-- > ready_slots_;) fresh.push_back(region_.memory().data() + i * slot_bytes_);
    free_.insert(free_.begin(), fresh.begin(), fresh.end());
    ready_slots_ = std::max(ready_slots_, end);
    ready_bytes_ = bytes;
  }

  void check_possible(std::uint32_t count, SlotUse use) const {
    const std::uint32_t most = use == SlotUse::kPrompt ? prompt_limit_ : slots_;
    if (count == 0 || count > most) {
      throw Error(Code::kInvalidArgument, text("staging: ", count, " slots wanted, this pool can give 1 to ", most,
                                               use == SlotUse::kPrompt ? " to prompts; raise `staging`" : ""));
    }
  }

  bool fits(std::uint32_t count, SlotUse use) const {
    if (count > free_.size()) return false;
    return use == SlotUse::kTransit || prompt_slots_ + count <= prompt_limit_;
  }

  Slot take(SlotUse use) {
    std::byte* data = free_.back();
    free_.pop_back();
    if (use == SlotUse::kPrompt) ++prompt_slots_;
    return Slot(data, [self = shared_from_this(), use](std::byte* slot) { self->give_back(slot, use); });
  }

  void give_back(std::byte* slot, SlotUse use) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(slot);
      if (use == SlotUse::kPrompt) --prompt_slots_;
    }
    serve();
  }

  // Hands free slots to waiters, transit first: transit slots come back by themselves. Callbacks run without the lock.
  void serve() {
    for (;;) {
      std::vector<Slot> slots;
      StagingPool::Acquired done;
      std::function<void()> listener;
      {
        const std::lock_guard lock(mutex_);
        for (SlotUse use : {SlotUse::kTransit, SlotUse::kPrompt}) {
          auto& queue = waiting_[index(use)];
          if (queue.empty() || !fits(queue.front().count, use)) continue;
          for (std::uint32_t i = 0; i < queue.front().count; ++i) slots.push_back(take(use));
          done = std::move(queue.front().done);
          queue.pop_front();
          break;
        }
        if (!done) listener = listener_;
      }
      if (!done) {
        if (listener) listener();
        return;
      }
      done(std::move(slots));
    }
  }

  const std::uint64_t slot_bytes_;
  const std::uint32_t slots_;
  const std::uint32_t prompt_limit_;
  const StagingOptions options_;
  const Clock::time_point started_ = Clock::now();
  Region region_;
  const std::uint64_t chunk_bytes_;
  std::atomic<std::size_t> next_chunk_{0};
  std::atomic<std::uint64_t> ready_bytes_{0};  // of the region, from its start
  std::vector<std::thread> threads_;           // that prepare chunks
  mutable std::mutex mutex_;
  std::vector<std::byte*> free_;
  std::deque<Waiter> waiting_[2];
  std::uint32_t prompt_slots_ = 0;
  std::uint64_t last_ticket_ = 0;
  std::vector<bool> chunk_ready_;
  std::uint32_t ready_chunks_ = 0;
  std::uint32_t ready_slots_ = 0;
  std::uint64_t locked_bytes_ = 0;
  bool lock_refused_ = false;
  double prepare_s_ = 0;
  std::function<void()> listener_;
};

StagingPool::StagingPool(const KvGeometry& geometry, const StagingOptions& options)
    : state_(std::make_shared<StagingState>(geometry, options)) {
  state_->prepare();
}

std::uint64_t StagingPool::slot_bytes() const { return state_->slot_bytes(); }
std::span<std::byte> StagingPool::memory() const { return state_->region().memory(); }
std::uint64_t StagingPool::ready_bytes() const { return state_->ready_bytes(); }
int StagingPool::shared_fd() const { return state_->region().shared_fd(); }
StagingStats StagingPool::stats() const { return state_->stats(); }
Slot StagingPool::try_acquire(SlotUse use) { return state_->try_acquire(use); }
std::uint64_t StagingPool::acquire(std::uint32_t count, SlotUse use, Acquired done) {
  return state_->acquire(count, use, std::move(done));
}
void StagingPool::withdraw(std::uint64_t ticket) { state_->withdraw(ticket); }
void StagingPool::on_free(std::function<void()> listener) { state_->on_free(std::move(listener)); }

}  // namespace dualkv
