// DevicePort: what a node needs for the caches in one GPU's memory. Landing, Departures: Layer Blocks on their way
// between such a cache and peers.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "dualkv/gpu.h"
#include "memory/bounce_pool.h"
#include "memory/cuda_copier.h"
#include "memory/gpu_slots.h"
#include "memory/gpu_staging.h"
#include "node/layer_sender.h"
#include "rdma/domain.h"
#include "rdma/gpu_nic_copier.h"
#include "transport/grants.h"

namespace dualkv {

class NodeState;

// Slots in a GPU's memory, registered with the node's NICs: that peers' NICs write to, and that its own read. Apart, so
// that what comes never waits for what goes.
struct NicSlots {
  struct Side {
    GpuSlots slots;
    std::shared_ptr<const RdmaRegistration> registration;
  };
  std::shared_ptr<RdmaDomain> domain;  // ends after what is registered there
  Side landing, departing;
};

// Made on any thread, used on the progress thread.
class DevicePort {
 public:
  // `gds`: null if storage reads come to the host's memory. `nic`: null if what peers write, and what they are sent,
  // goes by it. Throws Error.
  DevicePort(NodeState& node, std::shared_ptr<CudaDevice> device, std::unique_ptr<GpuStaging> gds,
             std::unique_ptr<NicSlots> nic);

  CudaDevice& device() { return *device_; }
  CudaCopier& from_gpu() { return from_gpu_; }
  // Between the host and a cache, as NodeOptions::copy says: by the GPU itself or the NIC.
  Copier& in() { return nic_in_ ? static_cast<Copier&>(*nic_in_) : to_gpu_; }
  Copier& out() { return nic_out_ ? static_cast<Copier&>(*nic_out_) : from_gpu_; }
  CudaCopier& within() { return within_; }
  // From another GPU's memory; null until there is one.
  CudaCopier* from_other(int ordinal) const {
    const auto found = from_others_.find(ordinal);
    return found == from_others_.end() ? nullptr : found->second.get();
  }
  void add_from_other(int ordinal, std::unique_ptr<CudaCopier> copier) { from_others_[ordinal] = std::move(copier); }
  bool verify() const { return verify_; }
  GpuStaging* gds() { return gds_.get(); }
  void add_gds_bytes(std::uint64_t bytes) { gds_bytes_ += bytes; }
  NicSlots* nic() { return nic_.get(); }
  void add_nic_bytes(std::uint64_t bytes) { nic_bytes_ += bytes; }
  void add_nic_sent_bytes(std::uint64_t bytes) { nic_sent_bytes_ += bytes; }
  std::uint64_t nic_sent_bytes() const { return nic_sent_bytes_; }
  // A Layer Block that is right to its place in a cache, from the host or, `on_gpu`, from this GPU's memory. Summed up
  // there once more with GpuOptions::verify. The rest as CudaCopier::copy.
  void copy_in(const Extent& from, bool on_gpu, std::span<const Extent> to, std::uint64_t owner,
               std::shared_ptr<void> keep, std::uint64_t checksum, Copier::Done done);
  // See CudaCopier::withdraw: of all that is on its way to a cache.
  void withdraw(std::uint64_t owner);
  // Apart, so that what comes never waits for what goes.
  BouncePool& landing() { return landing_; }
  BouncePool& departing() { return departing_; }
  // From a cache to the slots that NICs read; null without nic().
  CudaCopier* leaving() { return leaving_ ? &*leaving_ : nullptr; }
  // Writes that no NIC made, and that wait for pinned memory: nothing else gets any of departing() until they have it.
  std::uint32_t& returned() { return returned_; }
  // For a load: a flag a layer, of equal values, that GPUs wait for one more of. They only grow, so that a GPU which
  // comes late, when another load has them, does not wait for that one.
  BouncePool::Piece take_flags() { return flags_->take(); }
  GpuStats stats() const;

 private:
  const std::shared_ptr<CudaDevice> device_;
  const bool verify_;
  const std::unique_ptr<GpuStaging> gds_;
  std::uint64_t gds_bytes_ = 0;
  const std::unique_ptr<NicSlots> nic_;
  std::uint64_t nic_bytes_ = 0, nic_sent_bytes_ = 0;
  std::uint32_t returned_ = 0;
  CudaCopier to_gpu_, from_gpu_, within_;
  std::optional<CudaCopier> leaving_;
  std::map<int, std::unique_ptr<CudaCopier>> from_others_;  // by ordinal
  std::optional<GpuNicCopier> nic_in_, nic_out_;
  BouncePool landing_, departing_;
  const std::shared_ptr<BouncePool> flags_;
};

// What peers write for a cache of a GPU: it lands in pinned memory, or, where their NIC can write there, in slots of
// the GPU, and its owner copies it on once it was found right. `at` names a Layer Block. Progress thread only.
class Landing {
 public:
  // The Layer Block is in `piece`, on the GPU perhaps, and right.
  using Right = std::function<void(const FreePieces::Piece& piece, bool on_gpu)>;
  // kCorrupt: it is not, and may come again. Else the GPU has failed.
  using Wrong = std::function<void(const Status& why)>;

  Landing(DevicePort& port, std::uint64_t owner) : port_(port), owner_(owner) {}

  // Where the Layer Block is to be written; nowhere if it is here already, be it to be looked at yet, or no memory is
  // left (`full` is then set).
  GrantSink::Target target(std::uint64_t at, std::uint64_t bytes, Writer writer, std::span<Extent> out, bool& full);
  // It is there, and right unless it is on the GPU, which then looks. One of both is called, perhaps at once; neither
  // once it was dropped, or the owner's copies were withdrawn.
  void land(std::uint64_t at, std::uint64_t bytes, std::uint64_t checksum, Right right, Wrong wrong);
  // Nobody writes it there any more: another will bring it, by another way perhaps. Nothing for what was found right.
  void drop(std::uint64_t at);

 private:
  enum class State : std::uint8_t { kOpen, kRefused, kLooking, kRight };
  struct Place {
    FreePieces::Piece piece;  // while open
    bool on_gpu = false;
    State state = State::kOpen;
    std::uint64_t look = 0;  // which one it is that decides
  };

  DevicePort& port_;
  const std::uint64_t owner_;
  std::unordered_map<std::uint64_t, Place> places_;
  std::uint64_t looks_ = 0;
  std::vector<FreePieces::Piece> left_;  // slots whose write came another way in the end
};

// What goes to a peer from a cache of a GPU: brought to slots of the GPU that its NICs read, summed up there, or else
// to pinned memory; lowest layer first, and no more than a window at a time. Progress thread only.
class Departures : public BlockSender, private BlockSource {
 public:
  using Failed = std::function<void(const Status&)>;

  // `source` says where in the cache Layer Blocks are, and must outlive this. `failed`: the GPU has.
  Departures(NodeState& node, DevicePort& port, const std::shared_ptr<Link>& link, std::uint64_t grant, Lane lane,
             BlockSource& source, Sent sent, Failed failed);
  ~Departures() override;

  void add(std::uint32_t layer, std::uint32_t first, std::uint32_t count) override;
  void pump() override;
  Link& link() const override { return sender_.link(); }

 private:
  struct Run {
    std::uint32_t next;
    std::uint32_t end;
  };
  // A Layer Block that was taken from the cache, until the peer has it.
  struct Leaving {
    std::uint32_t index;
    FreePieces::Piece piece;  // until it is sent
    bool on_gpu;
    bool summed;
    std::uint64_t checksum;
  };
  // A write that no NIC made, whose blocks are taken anew: all at once, so that no two wait for each other's memory.
  struct Again {
    std::uint32_t layer;
    std::vector<std::uint32_t> blocks;
    std::size_t left;  // to come to pinned memory
    bool waits = true;
  };
  static std::uint64_t key(std::uint32_t layer, std::uint32_t block) { return std::uint64_t{layer} << 32 | block; }

  bool describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>& keep, WriteBlock& out) override;
  void on_returned(std::uint64_t write, std::uint32_t layer, const std::vector<std::uint32_t>& blocks) override;
  void on_sent(std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome);
  void take(std::uint32_t layer, std::uint32_t index, const FreePieces::Piece& to, bool on_gpu);
  // False if there is no memory for all of it now.
  bool take_again(std::uint64_t write, Again& again);
  void stop_waiting(Again& again);
  void taken_again(std::uint64_t write);
  void pump_later();
  void send_later();

  NodeState& node_;
  DevicePort& port_;
  BlockSource& source_;
  const Sent sent_;
  const Failed failed_;
  const Lane lane_;
  const std::uint64_t owner_;
  std::map<std::uint32_t, std::deque<Run>> queued_;
  std::unordered_map<std::uint64_t, Leaving> leaving_;  // by key()
  std::uint64_t under_way_ = 0;                         // bytes of them
  std::map<std::uint64_t, Again> again_;                // by the write's id
  Clock::time_point pinned_until_{};                    // as no NIC took what only a NIC can read
  Progress::TimerId retry_ = 0;
  bool sending_ = false;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  LayerSender sender_;  // of what was taken
};

// For what `source` describes in `cache`, which was prepared.
std::unique_ptr<BlockSender> make_sender(NodeState& node, const PagedKv& cache, const std::shared_ptr<Link>& link,
                                         std::uint64_t grant, Lane lane, BlockSource& source, BlockSender::Sent sent,
                                         Departures::Failed failed);

}  // namespace dualkv
