// Grant look-up and the placement and verification of received Layer Blocks.
#include "transport/grants.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/hash.h"

namespace dualkv {

namespace {

// Bytes nobody wants are read into here. Its content is never looked at; one per thread, so no two readers share it.
std::span<std::byte> discard_area() {
  thread_local std::array<std::byte, 64 * 1024> area;
  return area;
}

using Extents = std::array<Extent, PagedKv::kMaxPlanes>;

}  // namespace

std::uint64_t GrantTable::add(GrantSink& sink, const std::string& peer) {
  const std::uint64_t grant = random_u64();
  grants_[grant] = {&sink, peer};
  return grant;
}

void GrantTable::remove(std::uint64_t grant) {
  grants_.erase(grant);
  fence(grant, {});
}

void GrantTable::fence(std::uint64_t grant, std::span<const std::uint32_t> blocks) {
  for (DirectWrites* writes : direct_) writes->fence(grant, blocks);
}

GrantSink* GrantTable::find(std::uint64_t grant, const std::string& peer) const {
  const auto found = grants_.find(grant);
  return found != grants_.end() && found->second.peer == peer ? found->second.sink : nullptr;
}

InboundWrite::InboundWrite(GrantTable& grants, std::string peer, WriteHeader header, Writer writer)
    : grants_(grants),
      peer_(std::move(peer)),
      header_(std::move(header)),
      writer_(writer),
      layer_bytes_(grants.geometry().layer_bytes(header_.layer)),
      left_(layer_bytes_ * header_.entries.size()) {}

std::size_t InboundWrite::next(std::span<iovec> out) {
  GrantSink* sink = grants_.find(header_.grant, peer_);
  const std::uint64_t total = layer_bytes_ * header_.entries.size();
  std::uint64_t at = total - left_;
  std::size_t pieces = 0;
  while (at < total && pieces + PagedKv::kMaxPlanes <= out.size()) {
    const std::uint32_t block = header_.entries[at / layer_bytes_].block;
    std::uint64_t skip = at % layer_bytes_;
    Extents extents;
    const std::size_t count = sink ? sink->target(header_.layer, block, writer_, extents).extents : 0;
    if (count == 0) {
      const std::uint64_t bytes = std::min<std::uint64_t>(layer_bytes_ - skip, discard_area().size());
      out[pieces++] = {discard_area().data(), bytes};
      at += bytes;
      continue;
    }
    for (const Extent& extent : std::span(extents).first(count)) {
      const std::uint64_t passed = std::min(skip, extent.bytes);
      skip -= passed;
      if (passed == extent.bytes) continue;
      out[pieces++] = {extent.data + passed, extent.bytes - passed};
      at += extent.bytes - passed;
    }
  }
  return pieces;
}

void InboundWrite::advance(std::uint64_t bytes) { left_ -= bytes; }

template <typename Sum>
Outcome InboundWrite::hand_over(Sum sum) {
  if (grants_.find(header_.grant, peer_) == nullptr) return {Code::kRefused, 0};
  Outcome outcome;
  bool skipped = false;
  for (const WriteEntry& entry : header_.entries) {
    // Looked up again for each block: handing over one may end the load and its grant.
    GrantSink* sink = grants_.find(header_.grant, peer_);
    Extents extents;
    const auto target = sink ? sink->target(header_.layer, entry.block, writer_, extents) : GrantSink::Target{};
    skipped |= target.extents == 0;
    if (target.extents == 0) continue;
    auto check = GrantSink::Check::kOnGpu;
    if (!target.on_gpu) {
      const bool right = sum(entry, std::span<const Extent>(extents).first(target.extents)) == entry.checksum;
      check = right ? GrantSink::Check::kRight : GrantSink::Check::kWrong;
    }
    if (check == GrantSink::Check::kWrong) outcome = {Code::kCorrupt, 0};
    sink->arrived(peer_, header_.layer, entry.block, entry.checksum, check);
  }
  // Not wanted any more is fine; not wanted because the grant ended meanwhile must not look like a delivery.
  if (outcome.ok() && skipped && grants_.find(header_.grant, peer_) == nullptr) return {Code::kRefused, 0};
  return outcome;
}

Outcome InboundWrite::finish() {
  return hand_over([this](const WriteEntry& entry, std::span<const Extent> target) {
    return failed_ ? ~entry.checksum : checksum(target);
  });
}

Outcome InboundWrite::copy_from(const PeerMemory& memory) {
  left_ = 0;
  return hand_over(
      [&](const WriteEntry& entry, std::span<const Extent> target) { return copy_block(memory, entry, target); });
}

std::uint64_t InboundWrite::copy_block(const PeerMemory& memory, const WriteEntry& entry,
                                       std::span<const Extent> target) const {
  const auto find = [&](const Extent& extent) {
    return memory.find(header_.region, reinterpret_cast<std::uint64_t>(extent.data), extent.bytes);
  };
  std::array<const std::byte*, PagedKv::kMaxPlanes> sources;
  for (std::uint32_t i = 0; i < header_.extents; ++i) {
    sources[i] = find(entry.source[i]);
    if (sources[i] == nullptr) return ~entry.checksum;  // not in the region it is said to be in
  }
  if (header_.extents == 1) return copy_checksum({sources[0], entry.source[0].bytes}, target);
  std::span<const Extent> rest = target;
  std::uint64_t used = 0;  // of rest.front()
  for (std::uint32_t i = 0; i < header_.extents; ++i) {
    for (std::uint64_t done = 0; done < entry.source[i].bytes;) {
      const std::uint64_t bytes = std::min(entry.source[i].bytes - done, rest.front().bytes - used);
      std::memcpy(rest.front().data + used, sources[i] + done, bytes);
      done += bytes;
      used += bytes;
      if (used < rest.front().bytes) continue;
      rest = rest.subspan(1);
      used = 0;
    }
  }
  return checksum(target);
}

}  // namespace dualkv
