// The two steps of a copy between the host and a GPU by the NIC.
#include "rdma/gpu_nic_copier.h"

#include <utility>

namespace dualkv {

void GpuNicCopier::begin(Job job) {
  const FreePieces::Piece slot = slots_.take();
  if (!slot) return not_by_nic(job);
  const auto shared = std::make_shared<Job>(std::move(job));
  host_ == HostSide::kFrom ? bring(shared, slot) : fetch(shared, slot);
}

void GpuNicCopier::bring(const std::shared_ptr<Job>& job, const FreePieces::Piece& slot) {
  const Extent there{slot.get(), job->from.bytes()};
  nic_.copy_or_fail(job->from.span(), {&there, 1}, job->owner, job->keep, [this, job, slot, there](const Status& is) {
    if (!is.ok()) return not_by_nic(*job);
    within_.settle_nic_writes();
    if (!job->checksum) return copy_on(*job, slot);
    within_.verify({&there, 1}, job->owner, slot, *job->checksum,
                   [this, job, slot](const Status& right) { right.ok() ? copy_on(*job, slot) : not_by_nic(*job); });
  });
}

void GpuNicCopier::copy_on(const Job& job, const FreePieces::Piece& slot) {
  const Extent there{slot.get(), job.from.bytes()};
  bytes_ += there.bytes;
  by(within_, {&there, 1}, slot, job);
}

void GpuNicCopier::fetch(const std::shared_ptr<Job>& job, const FreePieces::Piece& slot) {
  const Extent there{slot.get(), job->from.bytes()};
  within_.copy(job->from.span(), {&there, 1}, job->owner, slot, [this, job, slot, there](const Status& is) {
    if (!is.ok()) return job->done(is);
    nic_.copy_or_fail({&there, 1}, job->to.span(), job->owner, slot, [this, job, there](const Status& brought) {
      if (!brought.ok()) return not_by_nic(*job);
      bytes_ += there.bytes;
      job->done({});
    });
  });
}

void GpuNicCopier::by(CudaCopier& copier, std::span<const Extent> from, std::shared_ptr<void> keep, const Job& job) {
  if (job.verify) {
    return copier.copy_verified(from, job.to.span(), job.owner, std::move(keep), *job.checksum, job.done);
  }
  copier.copy(from, job.to.span(), job.owner, std::move(keep), job.done);
}

void GpuNicCopier::not_by_nic(const Job& job) {
  note_("copy_by_gpu");
  by(by_gpu_, job.from.span(), job.keep, job);
}

void GpuNicCopier::withdraw(std::uint64_t owner) {
  nic_.withdraw(owner);
  within_.withdraw(owner);
  by_gpu_.withdraw(owner);
}

}  // namespace dualkv
