// TestLink: a link that keeps what it is given to write, and does with it as it is told.
#pragma once

#include <deque>
#include <set>

#include "transport/transport.h"

namespace dualkv::testing {

class TestLink : public Link {
 public:
  explicit TestLink(std::uint64_t window = UINT64_MAX) : window_(window) {}

  bool nic = false;
  std::deque<LayerWrite> writes;     // that nobody has looked at
  std::set<std::uint64_t> returned;  // and not answered

  const std::string& peer() const override { return peer_; }
  bool open() const override { return true; }
  void send(std::span<const std::byte>) override {}
  bool can_write(Lane, std::uint64_t bytes) const override { return used() == 0 || used() + bytes <= window_; }
  bool nic_writes(Lane) const override { return nic; }
  void write(LayerWrite write) override { writes.push_back(std::move(write)); }
  void write_again(LayerWrite write) override {
    if (returned.erase(write.id) > 0) writes.push_back(std::move(write));
  }
  void withdraw(std::uint64_t owner) override {
    std::erase_if(writes, [&](const LayerWrite& write) { return write.owner == owner; });
  }
  void close(Status) override {}
  LinkStats stats() const override { return {}; }
  Clock::time_point last_received() const override { return Clock::now(); }
  std::uint64_t lane_bytes(Lane) const override { return used(); }

 private:
  std::uint64_t used() const {
    std::uint64_t bytes = 0;
    for (const LayerWrite& write : writes) {
      for (const WriteBlock& block : write.blocks) {
        for (std::uint32_t i = 0; i < block.extents; ++i) bytes += block.source[i].bytes;
      }
    }
    return bytes;
  }

  const std::uint64_t window_;
  const std::string peer_ = "de";
};

}  // namespace dualkv::testing
