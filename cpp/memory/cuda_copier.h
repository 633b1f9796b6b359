// CudaCopier: copies between the host and one GPU, within it, or to it from another, gathered into batches.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/progress.h"
#include "dualkv/gpu.h"
#include "memory/copier.h"
#include "memory/cuda_device.h"

namespace dualkv {

// What one turn of the progress thread asks for becomes one batch on a stream of its own, at the least priority. The
// driver calls back when a batch is done; nothing polls, but for a slow watch of devices that have failed.
class CudaCopier : public Copier {
 public:
  // `note` counts fallbacks. `other`: whose memory it copies from; null with HostSide::kNone: the device's own. Throws
  // Error. Any thread.
  CudaCopier(std::shared_ptr<Progress> progress, std::shared_ptr<CudaDevice> device, HostSide host, GpuCopy engine,
             std::function<void(const std::string&)> note, std::shared_ptr<CudaDevice> other = nullptr);
  ~CudaCopier() override;

  void copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner, std::shared_ptr<void> keep,
            Done done) override;
  // Also sums up what is in `to` afterwards, on the device: `done` gets kCorrupt unless it comes to `checksum`. Only
  // where can_verify().
  void copy_verified(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                     std::shared_ptr<void> keep, std::uint64_t checksum, Done done);
  // Also sums up what is in `to` afterwards, as copy_verified(), and leaves it in `sum` just before `done`.
  void copy_summed(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                   std::shared_ptr<void> keep, std::uint64_t& sum, Done done);
  // Only sums up what is in the device's memory already; the rest as copy_verified().
  void verify(std::span<const Extent> memory, std::uint64_t owner, std::shared_ptr<void> keep, std::uint64_t checksum,
              Done done);
  // What NICs have announced by now is what all that is asked for from now on finds.
  void settle_nic_writes() { nics_wrote_ = true; }
  bool can_verify(std::span<const Extent> to) const { return device_->can_sum(checksum_runs(to)); }
  // Waits for the batches that the owner has copies in, a second at most: a device that takes longer has failed.
  void withdraw(std::uint64_t owner) override;

  CudaDevice& device() const { return *device_; }
  GpuCopyStats stats() const { return stats_; }

 private:
  // `done` is null once it is withdrawn; nothing is copied from no extents.
  struct Job : CopyJob {
    std::optional<std::uint64_t> checksum;  // that it must come to
    std::uint64_t* sum = nullptr;           // to leave it in
    bool summed() const { return checksum || sum != nullptr; }
  };
  // Held by the driver, too, while it is under way.
  struct Batch {
    Batch(const std::shared_ptr<CudaDevice>& device, std::shared_ptr<Progress> progress);

    const std::shared_ptr<Progress> progress;
    const PinnedMemory list;   // of CopyRun
    const PinnedMemory sums;   // of ChecksumRuns
    const PinnedMemory lanes;  // what they came to
    std::vector<Job> jobs;
    std::function<void()> arrived;  // on the progress thread
    std::shared_ptr<Batch> self;    // while the driver will call
  };

  void add(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner, std::shared_ptr<void> keep,
           std::optional<std::uint64_t> checksum, std::uint64_t* sum, Done done);
  void flush_later();
  void flush();
  std::shared_ptr<Batch> take_batch();
  void fill(Batch& batch);
  void submit(const std::shared_ptr<Batch>& batch);
  void enqueue(std::span<const CopyRun> runs);
  static void on_driver_done(void* batch);
  void on_batch(const std::shared_ptr<Batch>& batch);
  void finish(std::vector<Job>& jobs, const Status& why);
  // The device is of no use any more. `over`: it writes and reads nothing any more.
  void fail(const Status& why, bool over);
  void watch();
  // Until the stream is idle, or has failed; false if it takes longer.
  bool wait_idle(double seconds) const;

  const std::shared_ptr<Progress> progress_;
  const std::shared_ptr<CudaDevice> device_;
  const HostSide host_;
  const GpuCopy engine_;
  const std::function<void(const std::string&)> note_;
  const std::shared_ptr<CudaDevice> other_;
  cuda::Stream stream_ = nullptr;
  std::deque<Job> queue_;
  std::vector<std::shared_ptr<Batch>> free_;
  std::deque<std::shared_ptr<Batch>> under_way_;  // in the stream's order
  std::vector<CopyRun> runs_;                     // of the batch that is being filled
  std::vector<Job>* finishing_ = nullptr;         // being told, perhaps to those who withdraw others of them
  bool flushing_ = false;
  bool nics_wrote_ = false;  // to the device's memory, and it was not told
  Status failed_;
  Progress::TimerId watch_ = 0;
  GpuCopyStats stats_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace dualkv
