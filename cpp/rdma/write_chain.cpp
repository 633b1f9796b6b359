// Walking two lists of extents at once.
#include "rdma/write_chain.h"

#include <algorithm>

namespace dualkv {

void WriteChain::append(std::span<const LocalExtent> from, std::span<const RemoteExtent> to) {
  std::uint64_t read = 0, written = 0;  // of the first of each
  while (!from.empty() && !to.empty()) {
    const std::uint64_t run = std::min({from[0].bytes - read, to[0].bytes - written, largest_});
    const auto local = reinterpret_cast<std::uint64_t>(from[0].data + read);
    const std::uint64_t remote = to[0].address + written;
    const auto begin = [&] {
      writes_.emplace_back().remote = remote;
      writes_.back().remote_key = to[0].key;
      last_bytes_ = 0;
    };
    const bool follows = !writes_.empty() && writes_.back().remote + last_bytes_ == remote &&
                         writes_.back().remote_key == to[0].key && last_bytes_ + run <= largest_;
    if (!follows) begin();
    RdmaWrite* write = &writes_.back();
    ibv_sge* last = write->count > 0 ? &write->pieces[write->count - 1] : nullptr;
    if (last != nullptr && last->addr + last->length == local && last->lkey == from[0].key) {
      last->length += static_cast<std::uint32_t>(run);
    } else {
      if (write->count == RdmaWrite::kMaxPieces) {
        begin();
        write = &writes_.back();
      }
      write->pieces[write->count++] = {local, static_cast<std::uint32_t>(run), from[0].key};
    }
    last_bytes_ += run;
    read += run;
    written += run;
    if (read == from[0].bytes) {
      from = from.subspan(1);
      read = 0;
    }
    if (written == to[0].bytes) {
      to = to.subspan(1);
      written = 0;
    }
  }
}

}  // namespace dualkv
