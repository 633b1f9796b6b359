// Grants: which peer may write which Layer Blocks of this node, and the receiving half of a write.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "dualkv/geometry.h"
#include "dualkv/paged_kv.h"
#include "transport/peer_memory.h"
#include "transport/wire.h"

namespace dualkv {

// Who puts a Layer Block in its place.
enum class Writer : std::uint8_t { kCpu, kNic };

// Decides where blocks of a grant go. Implemented by loads; called on the progress thread.
class GrantSink {
 public:
  struct Target {
    std::size_t extents = 0;
    bool on_gpu = false;  // for a NIC only: where no CPU may look
  };
  enum class Check : std::uint8_t { kWrong, kRight, kOnGpu };  // kOnGpu: for the sink to check

  virtual ~GrantSink() = default;
  // Extents of a Layer Block; none if it is not wanted (there already, or taken back): its bytes are discarded.
  virtual Target target(std::uint32_t layer, std::uint32_t block, Writer writer, std::span<Extent> out) = 0;
  // The bytes are in place. The block has no target from now on, unless they are wrong.
  virtual void arrived(const std::string& peer, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
                       Check check) = 0;
};

// A link whose peer writes without asking this CPU for every byte: what it was allowed goes on until it is fenced.
class DirectWrites {
 public:
  virtual ~DirectWrites() = default;
  // When this returns, nothing that was allowed for the grant (for these of its blocks; none given: for all of it) is
  // written any more.
  virtual void fence(std::uint64_t grant, std::span<const std::uint32_t> blocks) = 0;
};

// Progress thread only. A sink must be removed before it dies.
class GrantTable {
 public:
  explicit GrantTable(const KvGeometry& geometry) : geometry_(geometry) {}

  // Returns the new grant's unguessable id. Only `peer` may use it.
  std::uint64_t add(GrantSink& sink, const std::string& peer);
  // Nothing is written for the grant any more when this returns.
  void remove(std::uint64_t grant);
  // Nor for these blocks: another will bring them.
  void fence(std::uint64_t grant, std::span<const std::uint32_t> blocks);
  // `writes` must be removed before it dies.
  void add(DirectWrites& writes) { direct_.push_back(&writes); }
  void remove(DirectWrites& writes) { std::erase(direct_, &writes); }
  // Null if there is no such grant for this peer.
  GrantSink* find(std::uint64_t grant, const std::string& peer) const;
  const KvGeometry& geometry() const { return geometry_; }

 private:
  struct Entry {
    GrantSink* sink;
    std::string peer;
  };
  const KvGeometry geometry_;
  std::unordered_map<std::uint64_t, Entry> grants_;
  std::vector<DirectWrites*> direct_;
};

// A write being received: says where the next bytes go, and checks them at the end. Targets are looked up again for
// every piece, so a grant that is revoked in the middle stops receiving at once.
class InboundWrite {
 public:
  static constexpr std::size_t kMaxPieces = 64;

  InboundWrite(GrantTable& grants, std::string peer, WriteHeader header, Writer writer = Writer::kCpu);

  const WriteHeader& header() const { return header_; }
  std::uint64_t bytes_left() const { return left_; }
  // Where the next bytes go, in order; at most kMaxPieces pieces of the bytes left.
  std::size_t next(std::span<iovec> out);
  void advance(std::uint64_t bytes);
  // The bytes still missing can't be had: they count as wrong.
  void give_up() { failed_ = true; }
  // All at once, from memory that this process has mapped: copies and verifies in one pass, and hands over.
  Outcome copy_from(const PeerMemory& memory);
  // Verifies and hands over; what only a GPU can verify, its sink will. kRefused if the grant does not allow this peer,
  // kCorrupt if a block was wrong.
  Outcome finish();

 private:
  // Hands over each block that is wanted; `sum` gives the checksum of what is in its place.
  template <typename Sum>
  Outcome hand_over(Sum sum);
  std::uint64_t copy_block(const PeerMemory& memory, const WriteEntry& entry, std::span<const Extent> target) const;

  GrantTable& grants_;
  const std::string peer_;
  const WriteHeader header_;
  const Writer writer_;
  const std::uint64_t layer_bytes_;
  std::uint64_t left_;
  bool failed_ = false;
};

}  // namespace dualkv
