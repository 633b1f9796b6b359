// The read queue's loop: submit, poll, verify, report.
#include "storage/read_queue.h"

#include <sys/epoll.h>

#include <array>

#include "base/text.h"
#include "storage/block_format.h"

namespace dualkv {

namespace {

constexpr auto kDrainTime = std::chrono::seconds(5);

std::uint64_t job_bytes(const KvGeometry& geometry, LayerRange layers) {
  return geometry.layer_offset(layers.first + layers.count) - geometry.layer_offset(layers.first);
}

std::string explain(const ReadCompletion& completion) {
  switch (completion.outcome.code) {
    case Code::kNotFound: return "not stored";
    case Code::kCorrupt: return text("file is shorter than its geometry (", completion.bytes, " bytes read)");
    default: return "read failed";
  }
}

}  // namespace

ReadQueue::ReadQueue(Progress& progress, const KvGeometry& geometry, BlockDirectory& directory, StagingPool pool,
                     std::unique_ptr<BlockReader> reader)
    : progress_(progress),
      geometry_(geometry),
      directory_(directory),
      pool_(std::move(pool)),
      reader_(std::move(reader)) {
  progress_.watch(reader_->event_fd(), EPOLLIN, [this](std::uint32_t) { poll(); });
}

ReadQueue::~ReadQueue() { close(); }

void ReadQueue::close() {
  if (!reader_) return;
  progress_.unwatch(reader_->event_fd());
  progress_.cancel(wake_);
  std::vector<std::function<void(ReadResult)>> told;
  for (ReadJob& job : waiting_) told.push_back(std::move(job.done));
  for (auto& [id, running] : running_) {
    directory_.unpin(running.job.key);
    told.push_back(std::move(running.job.done));
  }
  waiting_.clear();
  if (!reader_->drain(Clock::now() + kDrainTime)) {
    // Storage does not answer, and the kernel may write to these slots whenever it does: they are never freed.
    new auto(std::move(running_));
    reader_.release();
  }
  running_.clear();
  reader_.reset();
  for (const auto& done : told) {
    if (done) done({{Code::kCancelled, 0}, "the store is closed", nullptr, nullptr});
  }
}

void ReadQueue::submit(ReadJob job) {
  if (!reader_) return;
  {
    const std::lock_guard lock(counters_mutex_);
    counters_.queue_bytes += job_bytes(geometry_, job.layers);
  }
  waiting_.push_back(std::move(job));
}

bool ReadQueue::start(ReadJob& job) {
  if (!job.slot) job.slot = pool_.try_acquire(SlotUse::kTransit);
  if (!job.slot) return false;
  const std::uint64_t id = next_id_;
  const bool with_trailer = !job.trailer || job.trailer->bytes.empty();
  FreePieces::Piece gpu_slot = job.gpu != nullptr ? job.gpu->take() : nullptr;
  if (!reader_->try_submit({id, block_path(job.key), job.layers, with_trailer, job.slot.get(), gpu_slot.get(),
                            gpu_slot ? &job.gpu->device() : nullptr})) {
    return false;
  }
  ++next_id_;
  directory_.pin(job.key);
  running_.emplace(id, Running{std::move(job), with_trailer, std::move(gpu_slot)});
  return true;
}

void ReadQueue::pump() {
  if (!reader_) return;
  bool any = false;
  while (!waiting_.empty() && start(waiting_.front())) {
    waiting_.pop_front();
    any = true;
  }
  if (any) {
    meter_.busy(Clock::now());
    reader_->flush();
  } else if (running_.empty()) {
    reader_->idle();
  }
  schedule_wake();
}

void ReadQueue::poll() {
  std::array<ReadCompletion, 32> completions;
  std::size_t count;
  do {
    count = reader_->poll(completions);
    // First the next reads, then the checksums of these: storage does not wait for them.
    pump();
    for (std::size_t i = 0; i < count && reader_; ++i) complete(completions[i]);
  } while (count == completions.size() && reader_);
  pump();
}

std::string ReadQueue::verify(const Running& running, std::byte* slot) {
  const ReadJob& job = running.job;
  const std::span<std::byte> image(slot, geometry_.file_bytes());
  const auto trailer = image.subspan(geometry_.payload_bytes());
  if (!running.with_trailer) std::copy(job.trailer->bytes.begin(), job.trailer->bytes.end(), trailer.begin());
  std::string wrong = running.gpu_slot ? check_trailer(geometry_, job.key, trailer)
                                       : check_image(geometry_, job.key, image, job.layers);
  if (wrong.empty() && running.with_trailer && job.trailer) job.trailer->bytes.assign(trailer.begin(), trailer.end());
  return wrong;
}

void ReadQueue::complete(const ReadCompletion& completion) {
  auto node = running_.extract(completion.id);
  Running& running = node.mapped();
  ReadJob& job = running.job;
  directory_.unpin(job.key);
  const std::uint64_t bytes = job_bytes(geometry_, job.layers);
  ReadResult result{completion.outcome, {}, std::move(job.slot), running.gpu_slot, {}};
  if (!result.outcome.ok()) {
    result.reason = explain(completion);
  } else if (job.done) {
    const auto begin = Clock::now();
    result.reason = verify(running, result.slot.get());
    result.verify_time = Clock::now() - begin;
    if (!result.reason.empty()) result.outcome = {Code::kCorrupt, 0};
  }
  meter_.add(bytes, Clock::now(), !waiting_.empty());
  if (waiting_.empty() && running_.empty()) meter_.idle();
  {
    const std::lock_guard lock(counters_mutex_);
    counters_.bandwidth = meter_.estimate();
    counters_.queue_bytes -= bytes;
    ++counters_.blocks;
    counters_.bytes += completion.bytes;
    counters_.errors += !result.outcome.ok();
    counters_.corrupt += result.outcome.code == Code::kCorrupt;
  }
  if (job.done) job.done(std::move(result));
}

void ReadQueue::cancel(std::uint64_t owner) {
  std::uint64_t dropped = 0;
  std::erase_if(waiting_, [&](const ReadJob& job) {
    if (job.owner != owner) return false;
    dropped += job_bytes(geometry_, job.layers);
    return true;
  });
  for (auto& [id, running] : running_) {
    if (running.job.owner == owner) running.job.done = nullptr;
  }
  const std::lock_guard lock(counters_mutex_);
  counters_.queue_bytes -= dropped;
}

void ReadQueue::schedule_wake() {
  const auto next = reader_->next_wake();
  if (wake_ != 0 && next && wake_at_ <= *next) return;
  progress_.cancel(wake_);
  wake_ = 0;
  if (!next) return;
  wake_at_ = *next;
  wake_ = progress_.at(*next, [this] {
    wake_ = 0;
    poll();
  });
}

ReadCounters ReadQueue::counters() const {
  const std::lock_guard lock(counters_mutex_);
  return counters_;
}

}  // namespace dualkv
