// A GPU's caches: set-up, and what lands and departs.
#include "node/device_port.h"

#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "base/clock.h"
#include "node/node_state.h"
#include "storage/store_state.h"

namespace dualkv {

namespace {

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
      flags_(flags_of(device_, node.geometry().layers())) {}

GpuStats DevicePort::stats() const {
  GpuStats stats{device_->ordinal(), device_->name(), to_gpu_.stats(), from_gpu_.stats(), within_.stats(), {}};
  for (const auto& [ordinal, copier] : from_gpus_) stats.from_gpus += copier->stats();
  stats.bounce_bytes = landing_.memory().size() + departing_.memory().size();
  if (gds_) stats.gds_slots_bytes = gds_->bytes();
  stats.gds_bytes = gds_bytes_;
  if (nic_) {
    stats.rdma_slots_bytes = nic_->slots.memory()->memory().size();
    stats.rdma_by_dma_buf = nic_->registration->by_dma_buf();
  }
  stats.rdma_bytes = nic_bytes_;
  return stats;
}

void DevicePort::withdraw(std::uint64_t owner) {
  to_gpu_.withdraw(owner);
  within_.withdraw(owner);
}

void DevicePort::copy_in(const Extent& from, bool on_gpu, std::span<const Extent> to, std::uint64_t owner,
                         std::shared_ptr<void> keep, std::uint64_t checksum, Copier::Done done) {
  CudaCopier& copier = on_gpu ? within_ : to_gpu_;
  if (verify_ && copier.can_verify(to)) {
    return copier.copy_verified({&from, 1}, to, owner, std::move(keep), checksum, std::move(done));
  }
  copier.copy({&from, 1}, to, owner, std::move(keep), std::move(done));
}

GrantSink::Target Landing::target(std::uint64_t at, std::uint64_t bytes, Writer writer, std::span<Extent> out,
                                  bool& full) {
  Place& place = places_[at];
  if (place.state != State::kOpen) return {};
  // Kept, as another link of the peer may have been cleared to write there.
  if (place.on_gpu && writer == Writer::kCpu) left_.push_back(std::exchange(place, {}).piece);
  if (!place.piece && writer == Writer::kNic && port_.nic() != nullptr) {
    place.piece = port_.nic()->slots.take();
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

Departures::Departures(NodeState& node, DevicePort& port, LayerSender& sender, Locate locate, Failed failed)
    : node_(node),
      port_(port),
      sender_(sender),
      locate_(std::move(locate)),
      failed_(std::move(failed)),
      owner_(next_owner()) {}

Departures::~Departures() {
  node_.progress().cancel(retry_);
  port_.from_gpu().withdraw(owner_);
}

void Departures::add(std::uint32_t layer, std::uint32_t first, std::uint32_t count) {
  if (count > 0) queued_[layer].push_back({first, first + count});
}

void Departures::pump() {
  const std::uint64_t window = 2 * node_.options().write_window_bytes;
  while (!queued_.empty() && under_way_ < window) {
    auto& [layer, runs] = *queued_.begin();
    const BouncePool::Piece piece = port_.departing().take();
    if (!piece) {
      if (retry_ == 0) {
        retry_ = node_.progress().at(Clock::now() + to_duration(kRetry), [this] {
          retry_ = 0;
          pump();
        });
      }
      return;
    }
    const std::uint32_t index = runs.front().next;
    std::array<Extent, PagedKv::kMaxPlanes> from;
    const std::size_t count = locate_(layer, index, from);
    const Extent to{piece.get(), node_.geometry().layer_bytes(layer)};
    under_way_ += to.bytes;
    port_.from_gpu().copy(std::span(from).first(count), {&to, 1}, owner_, piece,
                          [this, layer = layer, index, piece](const Status& status) {
                            if (!status.ok()) return failed_(status);
                            sender_.add(layer, index, 1, piece);
                            send_later();
                          });
    if (++runs.front().next == runs.front().end) runs.pop_front();
    if (runs.empty()) queued_.erase(queued_.begin());
  }
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

void Departures::sent(std::uint32_t layer, std::size_t blocks) {
  under_way_ -= blocks * node_.geometry().layer_bytes(layer);
  pump();
}

}  // namespace dualkv
