// Writing a block: a temporary file, its data on disk, then a rename. A reader sees all of it or nothing.
#include "storage/block_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "base/hash.h"
#include "base/text.h"

namespace dualkv {

namespace {

// Collect when this share of the quota has been written since the last time: scanning costs a stat a block.
constexpr std::uint64_t kCollectShare = 16;

int write_fully(int fd, const std::byte* data, std::uint64_t bytes) {
  std::uint64_t done = 0;
  while (done < bytes) {
    const ssize_t put = pwrite(fd, data + done, bytes - done, static_cast<off_t>(done));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno;
    if (put == 0) return ENOSPC;
    done += static_cast<std::uint64_t>(put);
  }
  return 0;
}

}  // namespace

BlockWriter::BlockWriter(const KvGeometry& geometry, const StoreOptions& options, const FileAccess& access,
                         BlockDirectory& directory)
    : geometry_(geometry), options_(options), access_(access), directory_(directory), thread_([this] { work(); }) {}

BlockWriter::~BlockWriter() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_all();
  thread_.join();
}

bool BlockWriter::submit(SaveJob job, Clock::time_point deadline) {
  {
    std::unique_lock lock(mutex_);
    if (!room_.wait_until(lock, deadline, [this] { return jobs_.size() < options_.save_queue; })) return false;
    enqueue(std::move(job));
  }
  wanted_.notify_one();
  return true;
}

void BlockWriter::submit(SaveJob job) {
  {
    const std::lock_guard lock(mutex_);
    enqueue(std::move(job));
  }
  wanted_.notify_one();
}

void BlockWriter::enqueue(SaveJob job) {
  job.call->accepted();
  // The parent of a block that waits to be saved must not be evicted meanwhile.
  if (!job.info.parent.empty()) directory_.pin(job.info.parent);
  jobs_.push_back(std::move(job));
}

void BlockWriter::touch(std::vector<Key> keys) {
  {
    const std::lock_guard lock(mutex_);
    if (keys.empty() || touches_.size() >= options_.save_queue) return;
    touches_.push_back(std::move(keys));
  }
  wanted_.notify_one();
}

SaveCounters BlockWriter::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

void BlockWriter::work() {
  for (;;) {
    SaveJob job;
    std::deque<std::vector<Key>> touches;
    {
      std::unique_lock lock(mutex_);
      wanted_.wait(lock, [this] { return stopping_ || !jobs_.empty() || !touches_.empty(); });
      if (jobs_.empty() && touches_.empty()) return;
      touches.swap(touches_);
      if (!jobs_.empty()) {
        job = std::move(jobs_.front());
        jobs_.pop_front();
        room_.notify_one();
      }
    }
    for (const std::vector<Key>& keys : touches) directory_.mark(keys);
    if (job.call) save(std::move(job));
  }
}

void BlockWriter::save(SaveJob job) {
  // After a failure the rest of the call is not saved: it could not be reached.
  const bool abandoned = job.call->operation.done();
  Status failure = abandoned ? Status{} : publish(job.info, job.slot.get());
  job.slot.reset();
  if (!job.info.parent.empty()) directory_.unpin(job.info.parent);
  if (abandoned) return;
  {
    const std::lock_guard lock(mutex_);
    counters_.errors += !failure.ok();
    counters_.blocks += failure.ok();
    counters_.bytes += failure.ok() ? geometry_.file_bytes() : 0;
  }
  if (!failure.ok()) return job.call->operation.milestones()->fail(std::move(failure));
  since_collect_ += geometry_.file_bytes();
  collect_if_due();
  job.call->published();
}

Status BlockWriter::publish(const TrailerInfo& info, std::byte* image) {
  write_trailer(geometry_, info, {image, geometry_.file_bytes()});
  char temp[64];
  std::snprintf(temp, sizeof(temp), "tmp/%016llx", static_cast<unsigned long long>(random_u64()));
  const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | (access_.direct ? O_DIRECT : 0);
  const std::string path = block_path(info.key);
  const auto fail = [&](const char* what, int error) {
    unlinkat(directory_.fd(), temp, 0);
    const Code code = error == ENOSPC || error == EDQUOT ? Code::kNoSpace : Code::kIo;
    return Status{code, error,
                  text("save of block ", info.key.hex(), " in '", directory_.path(), "': ", what,
                       code == Code::kNoSpace ? "; free space or set a quota" : "")};
  };
  const Fd fd(openat(directory_.fd(), temp, flags, 0666));
  if (!fd.valid()) return fail("cannot create a temporary file", errno);
  if (const int error = write_fully(fd.get(), image, geometry_.file_bytes()); error != 0) return fail("write", error);
  if (options_.durable && fdatasync(fd.get()) != 0) return fail("fdatasync", errno);
  if (renameat(directory_.fd(), temp, directory_.fd(), path.c_str()) != 0) return fail("rename", errno);
  directory_.learn(info.key);
  return {};
}

void BlockWriter::collect_if_due() {
  if (options_.quota_bytes == 0 || since_collect_ < options_.quota_bytes / kCollectShare) return;
  since_collect_ = 0;
  try {
    const auto evicted = directory_.collect(options_.quota_bytes);
    const std::lock_guard lock(mutex_);
    counters_.evicted += evicted.value_or(0);
  } catch (const Error&) {
    const std::lock_guard lock(mutex_);
    ++counters_.errors;
  }
}

}  // namespace dualkv
