// A GPU's caches: set-up, and what lands and departs.
#include "node/device_port.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "base/clock.h"
#include "node/node_state.h"
#include "storage/store_state.h"

namespace dualkv {

namespace {

constexpr double kPinned = 1.0;                               // s by pinned memory, once a NIC took nothing
constexpr double kRetry = 0.002;                              // s, where other tasks have all of the pinned memory
constexpr std::uint64_t kFlagBytes = std::uint64_t{4} << 20;  // flags of some 16,000 loads of 64 layers

// One for all nodes, for ever: a stream may come to its wait when the node has long gone.
std::shared_ptr<BouncePool> flags_of(const std::shared_ptr<CudaDevice>& device, std::uint32_t layers) {
  static std::mutex mutex;
  static auto* pools = new std::map<std::pair<int, std::uint32_t>, std::shared_ptr<BouncePool>>;
  const std::lock_guard lock(mutex);
  auto& pool = (*pools)[{device->ordinal(), layers}];
  if (!pool)
    pool = std::make_shared<BouncePool>(device, layers * sizeof(std::uint32_t), kFlagBytes, device->numa_node());
  return pool;
}

// Of a write: one that came back must fit into pinned memory, beside others.
std::uint32_t most_blocks(const BouncePool& departing) {
  return static_cast<std::uint32_t>(std::clamp<std::uint64_t>(departing.count() / 4, 1, kMaxWriteBlocks));
}

}  // namespace

DevicePort::DevicePort(NodeState& node, std::shared_ptr<CudaDevice> device, std::unique_ptr<GpuStaging> gds,
                       std::unique_ptr<NicSlots> nic)
    : device_(std::move(device)),
      verify_(node.options().gpu.verify),
      gds_(std::move(gds)),
      nic_(std::move(nic)),
      to_gpu_(node.shared_progress(), device_, HostSide::kFrom, node.options().gpu.copy, node.counter()),
      from_gpu_(node.shared_progress(), device_, HostSide::kTo, node.options().gpu.copy, node.counter()),
      within_(node.shared_progress(), device_, HostSide::kNone, node.options().gpu.copy, node.counter()),
      landing_(device_, largest_layer_bytes(node.geometry()), node.options().gpu.bounce_bytes, device_->numa_node()),
      departing_(device_, largest_layer_bytes(node.geometry()), node.options().gpu.bounce_bytes, device_->numa_node()),
      flags_(flags_of(device_, node.geometry().layers())) {
  if (!nic_) return;
  leaving_.emplace(node.shared_progress(), device_, HostSide::kNone, node.options().gpu.copy, node.counter());
  if (node.copier() == nullptr) return;
  nic_in_.emplace(*node.copier(), nic_->landing.slots, within_, to_gpu_, HostSide::kFrom, node.counter());
  nic_out_.emplace(*node.copier(), nic_->departing.slots, within_, from_gpu_, HostSide::kTo, node.counter());
}

GpuStats DevicePort::stats() const {
  GpuStats stats{device_->ordinal(), device_->name(), to_gpu_.stats(), from_gpu_.stats(), within_.stats(), {}};
  if (leaving_) stats.within += leaving_->stats();
  for (const auto& [ordinal, copier] : from_others_) stats.from_gpus += copier->stats();
  stats.bounce_bytes = landing_.memory().size() + departing_.memory().size();
  if (gds_) stats.gds_slots_bytes = gds_->bytes();
  stats.gds_bytes = gds_bytes_;
  if (nic_) {
    stats.rdma_slots_bytes =
        nic_->landing.slots.memory()->memory().size() + nic_->departing.slots.memory()->memory().size();
    stats.rdma_by_dma_buf = nic_->landing.registration->by_dma_buf();
  }
  stats.rdma_bytes = nic_bytes_;
  stats.rdma_sent_bytes = nic_sent_bytes_;
  if (nic_in_) stats.to_gpu_by_nic = nic_in_->bytes();
  if (nic_out_) stats.from_gpu_by_nic = nic_out_->bytes();
  return stats;
}

void DevicePort::withdraw(std::uint64_t owner) {
  in().withdraw(owner);
  within_.withdraw(owner);
}

void DevicePort::copy_in(const Extent& from, bool on_gpu, std::span<const Extent> to, std::uint64_t owner,
                         std::shared_ptr<void> keep, std::uint64_t checksum, Copier::Done done) {
  const bool verify = verify_ && to_gpu_.can_verify(to);
  if (nic_in_ && !on_gpu) {
    return nic_in_->copy_right({&from, 1}, to, owner, std::move(keep), checksum, verify, std::move(done));
  }
  CudaCopier& copier = on_gpu ? within_ : to_gpu_;
  if (verify) return copier.copy_verified({&from, 1}, to, owner, std::move(keep), checksum, std::move(done));
  copier.copy({&from, 1}, to, owner, std::move(keep), std::move(done));
}

GrantSink::Target Landing::target(std::uint64_t at, std::uint64_t bytes, Writer writer, std::span<Extent> out,
                                  bool& full) {
  Place& place = places_[at];
  if (place.state != State::kOpen) return {};
  // Kept, as another link of the peer may have been cleared to write there.
  if (place.on_gpu && writer == Writer::kCpu) left_.push_back(std::exchange(place, {}).piece);
  if (!place.piece && writer == Writer::kNic && port_.nic() != nullptr) {
    place.piece = port_.nic()->landing.slots.take();
    place.on_gpu = place.piece != nullptr;
  }
  if (!place.piece) place.piece = port_.landing().take();
  if (!place.piece) {
    full = true;
    place.state = State::kRefused;  // also when it is asked again: the bytes have gone
    return {};
  }
  out[0] = {place.piece.get(), bytes};
  return {1, place.on_gpu};
}

void Landing::land(std::uint64_t at, std::uint64_t bytes, std::uint64_t checksum, Right right, Wrong wrong) {
  Place& place = places_[at];
  const FreePieces::Piece piece = std::move(place.piece);
  if (!place.on_gpu) {
    place.state = State::kRight;
    return right(piece, /*on_gpu=*/false);
  }
  place.state = State::kLooking;
  place.look = ++looks_;
  const Extent from{piece.get(), bytes};
  port_.within().settle_nic_writes();
  port_.within().verify({&from, 1}, owner_, piece, checksum,
                        [this, at, bytes, look = place.look, piece, right = std::move(right),
                         wrong = std::move(wrong)](const Status& is) {
                          const auto found = places_.find(at);
                          if (found == places_.end() || found->second.look != look)
                            return;  // dropped; another brings it, or has
                          if (!is.ok()) {
                            places_.erase(found);
                            return wrong(is);
                          }
                          found->second.state = State::kRight;
                          port_.add_nic_bytes(bytes);
                          right(piece, /*on_gpu=*/true);
                        });
}

void Landing::drop(std::uint64_t at) {
  const auto found = places_.find(at);
  if (found != places_.end() && found->second.state != State::kRight) places_.erase(found);
}

Departures::Departures(NodeState& node, DevicePort& port, const std::shared_ptr<Link>& link, std::uint64_t grant,
                       Lane lane, BlockSource& source, Sent sent, Failed failed)
    : node_(node),
      port_(port),
      source_(source),
      sent_(std::move(sent)),
      failed_(std::move(failed)),
      lane_(lane),
      owner_(next_owner()),
      sender_(
          node.sends(), link, grant, lane, *this,
          [this](std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome) {
            on_sent(layer, blocks, outcome);
          },
          most_blocks(port.departing())) {}

Departures::~Departures() {
  node_.progress().cancel(retry_);
  for (auto& [write, again] : again_) stop_waiting(again);
  port_.from_gpu().withdraw(owner_);
  if (port_.leaving() != nullptr) port_.leaving()->withdraw(owner_);
}

void Departures::add(std::uint32_t layer, std::uint32_t first, std::uint32_t count) {
  if (count > 0) queued_[layer].push_back({first, first + count});
}

void Departures::pump() {
  for (auto& [write, again] : again_) {
    if (!take_again(write, again)) return pump_later();
  }
  const std::uint64_t window = 2 * node_.options().write_window_bytes;
  while (!queued_.empty() && under_way_ < window) {
    FreePieces::Piece piece;
    const bool by_nic = port_.nic() != nullptr && link().nic_writes(lane_) && Clock::now() >= pinned_until_;
    if (by_nic) piece = port_.nic()->departing.slots.take();
    const bool on_gpu = piece != nullptr;
    if (!piece && port_.returned() == 0) piece = port_.departing().take();
    if (!piece) return pump_later();
    auto& [layer, runs] = *queued_.begin();
    take(layer, runs.front().next, piece, on_gpu);
    if (++runs.front().next == runs.front().end) runs.pop_front();
    if (runs.empty()) queued_.erase(queued_.begin());
  }
}

void Departures::pump_later() {
  if (retry_ != 0) return;
  retry_ = node_.progress().at(Clock::now() + to_duration(kRetry), [this] {
    retry_ = 0;
    pump();
  });
}

void Departures::take(std::uint32_t layer, std::uint32_t index, const FreePieces::Piece& piece, bool on_gpu) {
  WriteBlock block;
  const bool known = source_.describe(layer, index, nullptr, block);
  const auto from = std::span<const Extent>(block.source).first(block.extents);
  const Extent to{piece.get(), node_.geometry().layer_bytes(layer)};
  Leaving& leaving = leaving_[key(layer, block.block)] = {index, piece, on_gpu, known || on_gpu, block.checksum};
  under_way_ += to.bytes;
  const auto taken = [this, layer, number = block.block, on_gpu](const Status& status) {
    if (!status.ok()) return Failed(failed_)(status);
    sender_.add(layer, number, 1, nullptr, on_gpu);
    send_later();
  };
  if (!on_gpu) return port_.from_gpu().copy(from, {&to, 1}, owner_, piece, taken);
  if (known) return port_.leaving()->copy(from, {&to, 1}, owner_, piece, taken);
  port_.leaving()->copy_summed(from, {&to, 1}, owner_, piece, leaving.checksum, taken);
}

// What one batch brought goes in as few frames as may be.
void Departures::send_later() {
  if (std::exchange(sending_, true)) return;
  node_.progress().post([this, alive = std::weak_ptr(alive_)] {
    if (alive.expired()) return;
    sending_ = false;
    sender_.pump();
  });
}

bool Departures::describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>&, WriteBlock& out) {
  Leaving& leaving = leaving_.at(key(layer, block));
  out.block = block;
  out.checksum = leaving.checksum;
  out.source[0] = {leaving.piece.get(), node_.geometry().layer_bytes(layer)};
  out.extents = 1;
  out.keep = std::move(leaving.piece);
  return leaving.summed;
}

void Departures::on_sent(std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome) {
  const std::uint64_t bytes = node_.geometry().layer_bytes(layer);
  for (const std::uint32_t block : blocks) {
    const auto gone = leaving_.extract(key(layer, block));
    under_way_ -= bytes;
    if (gone.mapped().on_gpu && outcome.ok()) port_.add_nic_sent_bytes(bytes);
  }
  // The peer had it all the same.
  const auto again = std::find_if(again_.begin(), again_.end(), [&](const auto& item) {
    return item.second.layer == layer && item.second.blocks == blocks;
  });
  if (again != again_.end()) {
    stop_waiting(again->second);
    again_.erase(again);
  }
  const auto alive = std::weak_ptr(alive_);
  const Sent sent = sent_;
  sent(layer, blocks, outcome);
  if (!alive.expired()) pump();
}

// From pinned memory, and what follows too for a while: what ails the NIC may ail it again, and each try costs a copy
// and a round trip.
void Departures::on_returned(std::uint64_t write, std::uint32_t layer, const std::vector<std::uint32_t>& blocks) {
  node_.on_fallback("gpu_rdma_returned");
  pinned_until_ = Clock::now() + to_duration(kPinned);
  again_.emplace(write, Again{layer, blocks, blocks.size()});
  ++port_.returned();
  pump();
}

void Departures::stop_waiting(Again& again) {
  if (std::exchange(again.waits, false)) --port_.returned();
}

bool Departures::take_again(std::uint64_t write, Again& again) {
  if (!again.waits) return true;
  std::vector<FreePieces::Piece> pieces;
  for (std::size_t i = 0; i < again.blocks.size(); ++i) {
    pieces.push_back(port_.departing().take());
    if (!pieces.back()) return false;
  }
  stop_waiting(again);
  for (std::size_t i = 0; i < again.blocks.size(); ++i) {
    Leaving& leaving = leaving_.at(key(again.layer, again.blocks[i]));
    leaving.piece = pieces[i];
    WriteBlock block;
    source_.describe(again.layer, leaving.index, nullptr, block);
    const Extent to{pieces[i].get(), node_.geometry().layer_bytes(again.layer)};
    port_.from_gpu().copy(std::span<const Extent>(block.source).first(block.extents), {&to, 1}, owner_, pieces[i],
                          [this, write](const Status& status) {
                            if (!status.ok()) return Failed(failed_)(status);
                            taken_again(write);
                          });
  }
  return true;
}

void Departures::taken_again(std::uint64_t write) {
  const auto found = again_.find(write);
  if (found == again_.end() || --found->second.left > 0) return;
  const Again again = std::move(found->second);
  again_.erase(found);
  for (const std::uint32_t block : again.blocks) leaving_.at(key(again.layer, block)).on_gpu = false;
  sender_.write_again(write, again.layer, again.blocks);
}

std::unique_ptr<BlockSender> make_sender(NodeState& node, const PagedKv& cache, const std::shared_ptr<Link>& link,
                                         std::uint64_t grant, Lane lane, BlockSource& source, BlockSender::Sent sent,
                                         Departures::Failed failed) {
  if (DevicePort* port = node.port(cache)) {
    return std::make_unique<Departures>(node, *port, link, grant, lane, source, std::move(sent), std::move(failed));
  }
  return std::make_unique<LayerSender>(node.sends(), link, grant, lane, source, std::move(sent));
}

}  // namespace dualkv
