// Walking two lists of extents at once.
#include "rdma/write_chain.h"

#include "memory/copier.h"

namespace dualkv {

void WriteChain::append(std::span<const LocalExtent> from, std::span<const RemoteExtent> to) {
  const auto add = [this](const LocalExtent& source, std::uint64_t read, const RemoteExtent& target,
                          std::uint64_t written, std::uint64_t run) {
    const auto local = reinterpret_cast<std::uint64_t>(source.data + read);
    const std::uint64_t remote = target.address + written;
    const auto begin = [&] {
      writes_.emplace_back().remote = remote;
      writes_.back().remote_key = target.key;
      last_bytes_ = 0;
    };
    const bool follows = !writes_.empty() && writes_.back().remote + last_bytes_ == remote &&
                         writes_.back().remote_key == target.key && last_bytes_ + run <= largest_;
    if (!follows) begin();
    RdmaWrite* write = &writes_.back();
    ibv_sge* last = write->count > 0 ? &write->pieces[write->count - 1] : nullptr;
    if (last != nullptr && last->addr + last->length == local && last->lkey == source.key) {
      last->length += static_cast<std::uint32_t>(run);
    } else {
      if (write->count == RdmaWrite::kMaxPieces) {
        begin();
        write = &writes_.back();
      }
      write->pieces[write->count++] = {local, static_cast<std::uint32_t>(run), source.key};
    }
    last_bytes_ += run;
  };
  for_each_run(from, to, add, largest_);
}

}  // namespace dualkv
