// Path policies: which node's storage NIC reads which blocks of a hit. Pure functions over values (RoundRobin counts
// its calls): no clock, no thread, no I/O.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dualkv/keys.h"
#include "dualkv/lane.h"

namespace dualkv {

// What a policy knows of a node. A node reports it to its peers every few milliseconds, so it may be a little old.
struct NodeView {
  std::string name;
  std::uint64_t block_bytes = 0;  // of one Full Block
  std::uint32_t tokens_per_block = 0;
  std::uint64_t read_queue_bytes = 0;             // accepted for reading and not yet read
  std::uint64_t read_bandwidth = 0;               // bytes/s while busy, moving average; 0 = not measured yet
  std::uint64_t link_bandwidth = 0;               // bytes/s towards the viewer, moving average; 0 = not measured yet
  std::uint64_t lane_bytes[kLaneCount] = {0, 0};  // in flight on the node's links
  std::uint32_t free_slots = 0;                   // staging slots nobody holds
  std::uint32_t prompt_slots = 0;                 // most blocks of one prompt its staging can hold
  std::uint64_t reads_done = 0;                   // blocks read since the node started; shows that it makes progress

  std::uint64_t read_queue_tokens() const {
    return block_bytes == 0 ? 0 : read_queue_bytes / block_bytes * tokens_per_block;
  }
};

enum class Path : std::uint8_t { kPrefill, kDecode, kHelper };
std::string_view to_string(Path path);

// Blocks [first, first + count) of the hit, read by `node`.
struct PathRange {
  std::string node;
  Path path = Path::kPrefill;
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};

// Which path reads what. `ranges` tile the hit in order. A value.
struct Plan {
  std::vector<Key> keys;  // of the hit, one a block
  std::vector<PathRange> ranges;
  std::string prefill;               // the node that loads
  std::string decode;                // the node the KV is published to; empty = nobody
  std::vector<std::string> helpers;  // others that may be asked when a side fails
  std::string reason;                // why, for people
};

struct PlanRequest {
  std::vector<Key> keys;
  NodeView prefill;
  std::optional<NodeView> decode;
  std::vector<NodeView> helpers;
};

// Base of every policy, also of those written in Python.
class PathPolicy {
 public:
  virtual ~PathPolicy() = default;
  virtual std::string name() const = 0;
  // Must return ranges that tile [0, keys.size()). Throws Error(kInvalidArgument) when the request lacks a side
  // that the policy needs.
  virtual Plan plan(const PlanRequest& request) = 0;
};

// Everything through the prefill node: what engines do today (the paper's Basic).
class PrefillOnly : public PathPolicy {
 public:
  std::string name() const override { return "prefill_only"; }
  Plan plan(const PlanRequest& request) override;
};

// Everything through the decode node.
class DecodeOnly : public PathPolicy {
 public:
  std::string name() const override { return "decode_only"; }
  Plan plan(const PlanRequest& request) override;
};

// Whole requests by turns: prefill, decode, then each helper (paper 7.7's baseline).
class RoundRobin : public PathPolicy {
 public:
  std::string name() const override { return "round_robin"; }
  Plan plan(const PlanRequest& request) override;

 private:
  std::uint64_t turn_ = 0;
};

// Whole requests to the side with the shorter read queue (paper 6.1). Equal queues go to the side with the higher
// measured bandwidth, then to the prefill node, whose blocks cross no network.
class ShortestQueue : public PathPolicy {
 public:
  std::string name() const override { return "shortest_queue"; }
  Plan plan(const PlanRequest& request) override;
};

// One request over all sides, so that they finish at the same instant given their queues and measured rates; with
// helpers, over their storage NICs too. Beyond the paper, which leaves splitting to future work (6.1).
class Split : public PathPolicy {
 public:
  std::string name() const override { return "split"; }
  Plan plan(const PlanRequest& request) override;
};

// Throws Error(kInvalidArgument), naming the rule, unless the plan's ranges tile its keys in order.
void check_plan(const Plan& plan);

}  // namespace dualkv
