// The block store: Full Blocks as files under a root that any number of nodes may share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dualkv/geometry.h"
#include "dualkv/keys.h"
#include "dualkv/operation.h"
#include "dualkv/paged_kv.h"
#include "dualkv/staging.h"

namespace dualkv {

// Faults the store injects into its own reads, for tests of what stands above it. Seeded, so a run can be repeated.
struct ReadFaults {
  std::uint64_t seed = 0;
  double error_rate = 0;    // completion with EIO
  double short_rate = 0;    // completion with fewer bytes than asked
  double corrupt_rate = 0;  // one bit of the slot flipped after the read
  double drop_rate = 0;     // no completion until close
  double delay_rate = 0;    // completion late by delay_s
  double delay_s = 0;
  bool any() const { return error_rate > 0 || short_rate > 0 || corrupt_rate > 0 || drop_rate > 0 || delay_rate > 0; }
};

struct StoreOptions {
  std::string root;                          // directory; created if its parent exists
  std::string backend = "auto";              // "auto": uring where the kernel allows it, else pread; "usrbio": 3FS
  std::string direct = "auto";               // O_DIRECT "on", "off" or "auto": where the file system allows it
  std::uint32_t depth = 0;                   // blocks being read at once; 0 = 8 MiB of them, 32 to 128
  std::uint64_t read_limit_bytes_per_s = 0;  // token bucket standing in for a storage NIC; 0 = none
  std::uint64_t quota_bytes = 0;             // of this namespace; 0 = none
  double in_use_grace_s = 60;                // blocks used this recently, by any node, are never evicted
  double forget_s = 60;                      // how long a block whose read failed is not advertised again
  bool durable = true;                       // fdatasync before publish
  std::uint32_t save_queue = 256;            // blocks save() accepts ahead of the writer; more wait
  bool fail_on_fallback = false;             // make every fallback an Error instead of a counter
  ReadFaults faults;
};

struct StoreStats {
  std::string backend;  // what is really in use
  bool direct = false;
  std::uint32_t depth = 0;
  bool registered = false;  // staging is registered with the ring, as it becomes ready
  std::uint32_t registered_buffers = 0;
  std::uint64_t registered_bytes = 0;
  double register_s = 0;  // what registering took so far
  std::uint32_t alignment = 0;
  std::uint64_t blocks_read = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t read_errors = 0;
  std::uint64_t blocks_corrupt = 0;
  std::uint64_t blocks_saved = 0;
  std::uint64_t bytes_saved = 0;
  std::uint64_t save_errors = 0;
  std::uint64_t blocks_evicted = 0;
  std::uint64_t read_queue_bytes = 0;  // accepted and not yet read
  std::uint64_t read_bandwidth = 0;    // bytes/s while busy, moving average; 0 = not measured yet
  std::map<std::string, std::uint64_t> fallbacks;
};

struct LayerRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};

struct VerifyReport {
  std::uint64_t blocks = 0;
  std::vector<std::string> bad;  // "key hex: reason"
};

class StoreState;

// A handle; copies share the store. Thread-safe.
class Store {
 public:
  // Opens or creates the namespace directory. Throws Error naming the root and the cure when it can't be written
  // or is on a file system that refuses what `options` insist on. Reads go through `pool`.
  Store(const KvGeometry& geometry, const StoreOptions& options, const StagingPool& pool);
  explicit Store(std::shared_ptr<StoreState> state);

  const KvGeometry& geometry() const;
  const StagingPool& pool() const;

  // Longest stored prefix of `keys`, in blocks: O(log n) existence checks, since stored prefixes are closed.
  // Blocks whose read failed lately count as missing. Marks the hit as used. Blocking: one lookup each.
  std::size_t match(std::span<const Key> keys);
  bool contains(const Key& key);

  // Reads `layers` of each block into the slot beside it and verifies their checksums. Done when all are; fails
  // with the first bad block's name. A slot must be one of pool(): bytes land at geometry().layer_offset().
  Operation read(std::span<const Key> keys, std::span<const Slot> slots, LayerRange layers, Clock::time_point deadline);

  // Saves blocks block_ids[i] of `source` under keys[i]. The source is copied before the call returns (it waits for
  // staging, up to the deadline), so the caller may reuse it at once; the Operation ends when the files are
  // published. parent: the key before keys[0] in its chain (empty at the start). Blocks already stored are skipped.
  Operation save(std::span<const Key> keys, const PagedKv& source, std::span<const std::uint32_t> block_ids,
                 const Key& parent, Clock::time_point deadline);
  // The same from slots that hold Full Blocks already (no copy).
  Operation save_slots(std::span<const Key> keys, std::span<const Slot> slots, const Key& parent);

  // Removes one block. False if it was not there. Blocks that continue it become unreachable.
  bool remove(const Key& key);
  // Moves a block aside as <key>.corrupt, so that every node sees a miss and the next save heals it.
  bool quarantine(const Key& key);
  // Reads and checks every block of the namespace. Blocking.
  VerifyReport verify();
  // Evicts by last use until the namespace fits `quota_bytes`: children before parents, never a block in use.
  // One collector per root at a time: returns nullopt if another holds the lease. Blocking.
  std::optional<std::uint64_t> collect(std::uint64_t quota_bytes);
  StoreStats stats() const;

  StoreState& state() const { return *state_; }

 private:
  std::shared_ptr<StoreState> state_;
};

}  // namespace dualkv
