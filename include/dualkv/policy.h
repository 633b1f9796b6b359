// Path policies: which node's storage NIC reads which blocks of a hit. Pure functions over values (RoundRobin counts
// its calls): no clock, no thread, no I/O.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
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
  // A prefill node: seconds that its engine will compute before it needs this hit, the request's own new tokens
  // included, as the engine says; none = it does not say, and its hits are never recomputed.
  std::optional<double> compute_queue_s;

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

// Which path reads what. `ranges` tile `keys` in order. A value.
struct Plan {
  std::vector<Key> keys;  // of the blocks that are loaded, one each
  std::vector<PathRange> ranges;
  std::string prefill;               // the node that loads
  std::string decode;                // the node the KV is published to; empty = nobody
  std::vector<std::string> helpers;  // others that may be asked when a side fails
  std::string reason;                // why, for people
  // Blocks of the hit behind `keys` that the engine computes again, since that is sooner than loading them: its prefill
  // begins behind keys.size() blocks. Only Recompute plans any.
  std::uint32_t recompute_blocks = 0;
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
  // Must return ranges that tile the plan's keys: the request's, or the first of them. Throws Error(kInvalidArgument)
  // when the request lacks a side that the policy needs.
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

// Whole requests by turns: prefill, decode, then each helper (paper 7.7's baseline). Turns are in proportion to
// measured rates (smooth weighted round robin), so alike where nodes are alike.
class RoundRobin : public PathPolicy {
 public:
  std::string name() const override { return "round_robin"; }
  Plan plan(const PlanRequest& request) override;

 private:
  std::unordered_map<std::string, double> credit_;  // of nodes seen, at most kMost
  static constexpr std::size_t kMost = 4096;
};

// Whole requests to the side that would have read them first (paper 6.1: the shorter read queue), by its queue, its
// measured rate and its link. The side that was taken last is left only for one that is sooner by `margin` of the
// request's own reading time, so that noise does not make loads swing; equals go to the prefill node, whose blocks
// cross no network.
class ShortestQueue : public PathPolicy {
 public:
  // Throws Error(kInvalidArgument) unless 0 <= margin < 1.
  explicit ShortestQueue(double margin = 0.1);
  std::string name() const override { return "shortest_queue"; }
  Plan plan(const PlanRequest& request) override;

 private:
  double margin_;
  std::string last_;
};

// One request over all sides, so that they finish at the same instant given their queues, measured rates and links;
// with helpers, over their storage NICs too. Beyond the paper, which leaves splitting to future work (6.1). A part that
// is read waits in staging for the others: where prefill or decode node lacks staging for the whole hit, one that
// either has in half the time until the engine needs it (NodeView::compute_queue_s) is read by that one.
class Split : public PathPolicy {
 public:
  // At most `max_sides` read: those with the largest shares. Helpers with less than `helper_blocks` are left
  // out: a message and a link for nothing. So are all of them unless the hit is there sooner by `helper_gain` of the
  // time it takes without: what comes before the engine needs it (NodeView::compute_queue_s) fills staging in which
  // others' reads wait, and behind long queues everywhere nobody is idle.
  // Throws Error(kInvalidArgument) for max_sides = 0, and unless 0 <= helper_gain < 1.
  explicit Split(std::uint32_t max_sides = 4, std::uint32_t helper_blocks = 4, double helper_gain = 0.1);
  std::string name() const override { return "split"; }
  Plan plan(const PlanRequest& request) override;

 private:
  std::uint32_t max_sides_;
  std::uint32_t helper_blocks_;
  double helper_gain_;
};

// How fast an engine prefills, from what it was seen to do: base + so much a token + so much a pair of a new token and
// a token before it. Later observations count more. Not thread-safe.
class PrefillRate {
 public:
  PrefillRate();
  ~PrefillRate();
  PrefillRate(PrefillRate&&) noexcept;
  PrefillRate& operator=(PrefillRate&&) noexcept;

  // `seconds` that computing `tokens` new tokens behind `cached` ones took, waits left out. Values that can't be are
  // ignored.
  void observe(std::uint64_t cached, std::uint64_t tokens, double seconds);
  // Some prefills were seen: a fit of a few is noise.
  bool known() const { return observations_ >= kEnough; }
  // What `tokens` more take behind `cached` ones in a forward pass that is made anyway. 0 while not known.
  double seconds(std::uint64_t cached, std::uint64_t tokens) const;

 private:
  struct Samples;
  static constexpr std::uint64_t kEnough = 16;

  std::unique_ptr<Samples> samples_;
  std::uint64_t observations_ = 0;
};

// Plans with another policy, but leaves the hit's last blocks to the engine where computing them again is sooner than
// loading them: storage brings the first blocks while the engine is busy with what it has, and the boundary is where
// both are done, if all sides load. Needs NodeView::compute_queue_s of the prefill node and 16 observed prefills; else
// it plans like the other policy, as it does where computing a block takes longer than reading it behind no queue: that
// would help one request, and delay all that wait for the engine. What it gains must be at least `margin` of the time.
// Not thread-safe.
class Recompute : public PathPolicy {
 public:
  // Throws Error(kInvalidArgument) for no policy, or unless 0 <= margin < 1.
  explicit Recompute(std::shared_ptr<PathPolicy> inner, double margin = 0.1);
  std::string name() const override { return "recompute"; }
  Plan plan(const PlanRequest& request) override;
  // See PrefillRate::observe; engines call it after each prefill.
  void observe(std::uint64_t cached, std::uint64_t tokens, double seconds) { rate_.observe(cached, tokens, seconds); }

 private:
  std::shared_ptr<PathPolicy> inner_;
  double margin_;
  PrefillRate rate_;
};

// Throws Error(kInvalidArgument), naming the rule, unless the plan's ranges tile its keys in order.
void check_plan(const Plan& plan);

}  // namespace dualkv
