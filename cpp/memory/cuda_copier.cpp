// Batches of copies: filling, submission, completion, failure.
#include "memory/cuda_copier.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/hash.h"
#include "base/keep_for_ever.h"
#include "base/text.h"

namespace dualkv {

namespace {
constexpr std::size_t kRuns = 4096;                            // of a batch
constexpr std::size_t kSums = 1024;                            // Layer Blocks of a batch that are verified
constexpr std::uint64_t kBatchBytes = std::uint64_t{8} << 20;  // so that the first blocks are told before the last
constexpr std::size_t kUnderWay = 4;                           // batches: the stream never runs dry between two
constexpr double kWatch = 0.25;                                // s
constexpr double kWithdraw = 1.0;                              // s
}  // namespace

CudaCopier::Batch::Batch(const std::shared_ptr<CudaDevice>& device, std::shared_ptr<Progress> loop)
    : progress(std::move(loop)),
      list(device, kRuns * sizeof(CopyRun), device->numa_node()),
      sums(device, kSums * sizeof(ChecksumRuns), device->numa_node()),
      lanes(device, kSums * kChecksumLanes * sizeof(std::uint64_t), device->numa_node()) {}

CudaCopier::CudaCopier(std::shared_ptr<Progress> progress, std::shared_ptr<CudaDevice> device, HostSide host,
                       GpuCopy engine, std::function<void(const std::string&)> note, std::shared_ptr<CudaDevice> other)
    : progress_(std::move(progress)),
      device_(std::move(device)),
      host_(host),
      engine_(engine),
      note_(std::move(note)),
      other_(std::move(other)),
      stream_(device_->new_stream(/*low_priority=*/true)) {
  for (std::size_t i = 0; i < kUnderWay; ++i) free_.push_back(std::make_shared<Batch>(device_, progress_));
}

CudaCopier::~CudaCopier() {
  if (watch_ != 0) progress_->cancel(watch_);
  queue_.clear();
  for (const auto& batch : under_way_) {
    for (Job& job : batch->jobs) job.done = nullptr;
  }
  // A batch that is still under way keeps its memory: the driver holds it.
  if (wait_idle(kWithdraw)) device_->end_stream(stream_);
}

void CudaCopier::copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                      std::shared_ptr<void> keep, Done done) {
  add(from, to, owner, std::move(keep), {}, nullptr, std::move(done));
}

void CudaCopier::copy_verified(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                               std::shared_ptr<void> keep, std::uint64_t checksum, Done done) {
  add(from, to, owner, std::move(keep), checksum, nullptr, std::move(done));
}

void CudaCopier::copy_summed(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                             std::shared_ptr<void> keep, std::uint64_t& sum, Done done) {
  add(from, to, owner, std::move(keep), {}, &sum, std::move(done));
}

void CudaCopier::verify(std::span<const Extent> memory, std::uint64_t owner, std::shared_ptr<void> keep,
                        std::uint64_t checksum, Done done) {
  add({}, memory, owner, std::move(keep), checksum, nullptr, std::move(done));
}

void CudaCopier::add(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                     std::shared_ptr<void> keep, std::optional<std::uint64_t> checksum, std::uint64_t* sum, Done done) {
  queue_.push_back({{Extents(from), Extents(to), owner, std::move(keep), std::move(done)}, checksum, sum});
  flush_later();
}

// Gathers what one turn of the loop asks for.
void CudaCopier::flush_later() {
  if (std::exchange(flushing_, true)) return;
  progress_->post([this, alive = std::weak_ptr(alive_)] {
    if (alive.expired()) return;
    flushing_ = false;
    flush();
  });
}

void CudaCopier::flush() {
  if (!failed_.ok()) {
    std::vector<Job> jobs(std::make_move_iterator(queue_.begin()), std::make_move_iterator(queue_.end()));
    queue_.clear();
    return finish(jobs, failed_);
  }
  try {
    if (std::exchange(nics_wrote_, false)) device_->settle_nic_writes();
  } catch (const Error& error) {
    return fail(error.status(), wait_idle(kWithdraw));
  }
  while (!queue_.empty() && !free_.empty()) {
    const auto batch = take_batch();
    fill(*batch);
    submit(batch);
    if (!failed_.ok()) return;
  }
}

std::shared_ptr<CudaCopier::Batch> CudaCopier::take_batch() {
  auto batch = std::move(free_.back());
  free_.pop_back();
  return batch;
}

void CudaCopier::fill(Batch& batch) {
  runs_.clear();
  std::uint64_t bytes = 0;
  std::size_t sums = 0;
  while (!queue_.empty() && bytes < kBatchBytes && sums < kSums && runs_.size() + 2 * PagedKv::kMaxPlanes <= kRuns) {
    Job& job = queue_.front();
    append_runs(job.from.span(), job.to.span(), runs_);
    bytes += job.to.bytes();
    sums += job.summed();
    batch.jobs.push_back(std::move(job));
    queue_.pop_front();
  }
  std::copy(runs_.begin(), runs_.end(), reinterpret_cast<CopyRun*>(batch.list.data()));
}

void CudaCopier::enqueue(std::span<const CopyRun> runs) {
  GpuCopy engine = GpuCopy::kMemcpy;
  if (other_) {
    device_->enqueue_from(*other_, stream_, runs);
  } else {
    engine = device_->enqueue(stream_, runs, host_, engine_);
    if (engine_ != GpuCopy::kAuto && engine != engine_) note_("gpu_copy_engine");
  }
  ++stats_.batches[static_cast<std::size_t>(engine)];
  stats_.runs += runs.size();
}

void CudaCopier::submit(const std::shared_ptr<Batch>& batch) {
  under_way_.push_back(batch);
  try {
    const CudaDevice::Current current(*device_);
    const std::span runs(reinterpret_cast<const CopyRun*>(batch->list.data()), runs_.size());
    if (!runs.empty()) enqueue(runs);
    const auto sums = reinterpret_cast<ChecksumRuns*>(batch->sums.data());
    std::size_t count = 0;
    for (const Job& job : batch->jobs) {
      if (job.summed()) sums[count++] = checksum_runs(job.to.span());
    }
    if (count > 0) {
      device_->enqueue_checksums(stream_, std::span(sums, count),
                                 reinterpret_cast<std::uint64_t*>(batch->lanes.data()));
    }
    batch->arrived = [this, alive = std::weak_ptr(alive_), weak = std::weak_ptr(batch)] {
      const auto done = weak.lock();
      if (!alive.expired() && done) on_batch(done);
    };
    batch->self = batch;
    const cuda::Result result = device_->driver().launch_host_func(stream_, on_driver_done, batch.get());
    if (result != cuda::kSuccess) batch->self.reset();
    cuda_check(result, "the end of copies by a GPU (cuLaunchHostFunc)");
  } catch (const Error& error) {
    return fail(error.status(), wait_idle(kWithdraw));
  }
  if (watch_ == 0) watch();
}

// On a thread of the driver, which must not call it: not even to give memory back, so the batch leaves this thread
// whole.
void CudaCopier::on_driver_done(void* data) {
  auto* batch = static_cast<Batch*>(data);
  const auto progress = batch->progress;
  const bool posted = progress->post([batch] {
    const auto mine = std::move(batch->self);
    mine->arrived();
  });
  if (!posted) keep_for_ever(std::move(batch->self));
}

void CudaCopier::on_batch(const std::shared_ptr<Batch>& batch) {
  std::erase(under_way_, batch);
  std::vector<Job> jobs = std::move(batch->jobs);
  batch->jobs.clear();
  const auto* lanes = reinterpret_cast<const std::uint64_t*>(batch->lanes.data());
  std::vector<std::uint64_t> sums;
  for (const Job& job : jobs) {
    if (!job.summed()) continue;
    sums.push_back(
        checksum_of_lanes(std::span<const std::uint64_t, kChecksumLanes>(lanes, kChecksumLanes), job.to.bytes()));
    lanes += kChecksumLanes;
  }
  free_.push_back(batch);
  flush();
  auto sum = sums.begin();
  finishing_ = &jobs;
  for (Job& job : jobs) {
    Status status;
    const std::uint64_t is = job.summed() ? *sum++ : 0;
    if (job.checksum) {
      ++stats_.verified;
      if (is != *job.checksum) {
        status = {Code::kCorrupt, 0, text("GPU ", device_->ordinal(), ": what was copied there has another checksum")};
      }
    }
    stats_.bytes += job.from.bytes();
    if (const Done done = std::exchange(job.done, nullptr)) {
      if (job.sum != nullptr) *job.sum = is;
      done(status);
    }
  }
  finishing_ = nullptr;
}

void CudaCopier::finish(std::vector<Job>& jobs, const Status& why) {
  finishing_ = &jobs;
  for (Job& job : jobs) {
    if (const Done done = std::exchange(job.done, nullptr)) done(why);
  }
  finishing_ = nullptr;
}

void CudaCopier::fail(const Status& why, bool over) {
  if (!failed_.ok()) return;
  failed_ = why;
  note_("gpu_failed");
  for (const auto& batch : std::exchange(under_way_, {})) {
    for (Job& job : batch->jobs) {
      queue_.push_back(job);  // told with those that wait
      job.done = nullptr;
    }
    // What it reads and writes may be in use as long as the process lives.
    if (!over) keep_for_ever(batch);
  }
  flush_later();
}

void CudaCopier::withdraw(std::uint64_t owner) {
  std::erase_if(queue_, [&](const Job& job) { return job.owner == owner; });
  if (finishing_ != nullptr) {
    for (Job& job : *finishing_) {
      if (job.owner == owner) job.done = nullptr;
    }
  }
  bool waits = false;
  for (const auto& batch : under_way_) {
    for (Job& job : batch->jobs) {
      if (job.owner != owner) continue;
      job.done = nullptr;
      waits = true;
    }
  }
  if (waits && !wait_idle(kWithdraw)) {
    fail({Code::kIo, 0, text("GPU ", device_->ordinal(), ": copies did not end within ", kWithdraw, " s")}, false);
  }
}

bool CudaCopier::wait_idle(double limit_s) const {
  const auto until = Clock::now() + to_duration(limit_s);
  while (device_->query(stream_) == cuda::kNotReady) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

// The driver calls nobody back for what a failed device did not do.
void CudaCopier::watch() {
  watch_ = progress_->at(Clock::now() + to_duration(kWatch), [this] {
    watch_ = 0;
    if (under_way_.empty()) return;
    const cuda::Result result = device_->query(stream_);
    if (result == cuda::kSuccess || result == cuda::kNotReady) return watch();
    try {
      cuda_check(result, "copies by a GPU");
    } catch (const Error& error) {
      fail(error.status(), true);
    }
  });
}

}  // namespace dualkv
