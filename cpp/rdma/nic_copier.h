// NicCopier: copies within this node, made by its NIC: a loop-back write on the LOW lane.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dualkv/node.h"
#include "dualkv/paged_kv.h"
#include "memory/copier.h"
#include "rdma/domain.h"
#include "rdma/queue_pair.h"
#include "rdma/write_chain.h"

namespace dualkv {

// A queue pair that is connected to itself. What it can't copy (memory that is not registered, a queue pair that is not
// up) the CPU copies at once, and that is counted. Progress thread only.
class NicCopier : public Copier, public QueuePair::Events {
 public:
  // `note` counts fallbacks. All must outlive it.
  NicCopier(Progress& progress, RdmaDomain& domain, const LaneMark& mark, std::function<void(const std::string&)> note);
  ~NicCopier() override;

  void copy(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner, std::shared_ptr<void> keep,
            Done done) override;
  // As copy(), of memory that the CPU can't reach: what the NIC can't copy, `done` says.
  void copy_or_fail(std::span<const Extent> from, std::span<const Extent> to, std::uint64_t owner,
                    std::shared_ptr<void> keep, Done done);
  void withdraw(std::uint64_t owner) override;
  CopyStats stats() const;

  void on_room(QueuePair& pair) override;
  void on_immediate(QueuePair&, std::uint32_t) override {}
  void on_failed(QueuePair& pair, const std::string& why) override;

 private:
  struct Job : CopyJob {
    std::vector<std::shared_ptr<const RdmaRegistration>> held;
    bool only_by_nic = false;
    std::uint64_t last = 0;  // it is copied when so many requests have left the queue pair
    Status status;           // once it is over
  };

  void connect();
  void connect_later();
  bool enqueue(Job& job);
  void begin(Job job);
  // The CPU copies it, if it may.
  void give_up(Job& job);
  void flush_later();
  void flush();
  // Ends the queue pair, and gives up what was under way, but for the owner's.
  void reset(std::uint64_t except);
  void finish_later(Job job);
  void watch();

  Progress& progress_;
  RdmaDomain& domain_;
  const LaneMark mark_;
  const std::function<void(const std::string&)> note_;
  std::shared_ptr<QueuePair> pair_;
  bool up_ = false;
  double pause_s_ = 0;
  Progress::TimerId timer_ = 0;  // of the next attempt to connect
  Progress::TimerId watch_ = 0;  // while copies are under way
  Clock::time_point progress_at_{};
  std::deque<Job> jobs_;      // in order
  std::deque<Job> finished_;  // given up, to be told
  WriteChain pending_;
  std::size_t posted_ = 0;  // of pending_
  bool flushing_ = false;
  CopyStats stats_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace dualkv
