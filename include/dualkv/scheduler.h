// Scheduler: which prefill and which decode engine a request gets, and on which side its KV is read (paper 6.1).
// Deterministic, without clock, thread or I/O: everything it knows it was told.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dualkv/policy.h"

namespace dualkv {

enum class EngineRole : std::uint8_t { kPrefill, kDecode };

struct SchedulerOptions {
  // A node's read queue is short up to here: tokens it reads in 3 s (A.4).
  std::uint64_t short_queue_tokens = 0;  // alpha
  // A prefill engine gets nothing beyond this: tokens it computes in 5 s (A.4).
  std::uint64_t full_tokens = 0;  // beta
  // A decode engine is high beyond this many times the mean.
  double even_slack = 1.05;
  std::uint32_t max_waiting = 1u << 20;  // submit() refuses more
};

// What an engine says of itself with each fetch of its group. May be late, repeated or missing.
struct EngineReport {
  std::string engine;
  std::uint32_t requests = 0;           // unfinished ones it has (seq_e)
  std::uint64_t tokens = 0;             // of those (tok_e)
  std::uint64_t read_queue_tokens = 0;  // of its node (read_q)
  std::uint64_t free_tokens = 0;        // decode engines: tokens of KV that still fit its memory
  std::uint64_t seen = 0;               // Assignment::number of the last one that these figures include; 0 = none
};

// Why this engine, this reading side, this refusal. Made for every request, so only figures; the sentence when asked.
struct Reason {
  enum class Kind : std::uint8_t {
    kNone,
    kShortQueue,    // a prefill engine whose node reads little: its tokens
    kNoShortQueue,  // a prefill engine, all nodes read much: its tokens
    kNearMean,      // a decode engine within reach of the mean: its requests
    kAboveMean,     // a decode engine, all with memory are above the mean: its tokens
    kReadQueues,    // the reading side: the prefill node's queue, the decode node's
    kTooLarge,      // a refusal: the request's tokens, the largest engine's memory
  };

  Kind kind = Kind::kNone;
  std::uint64_t first = 0, second = 0;
  std::string group{};  // of a refusal, else empty

  std::string text() const;
  bool operator==(const Reason&) const = default;
};

// Names in answers are copies: good after the engine, or the scheduler, is gone.
struct Assignment {
  std::uint64_t request = 0;
  std::string engine;
  std::uint64_t number = 0;  // rises for each engine, also from one life under its name to the next; EngineReport::seen
  Reason reason;
};

// Both engines of a request, and who reads: the side whose node has the shorter read queue. Told to both.
struct Placement {
  std::uint64_t request = 0;
  std::string prefill, decode;  // engines
  Path read = Path::kPrefill;
  std::uint64_t number = 0;  // of the engine that reads, in one sequence with its assignments
  Reason reason;
};

struct Fetched {
  std::vector<Assignment> assignments;  // to engines of the group that fetched
  std::vector<Placement> placements;    // requests that have both engines now: of decode groups' fetches
  // Too large for every engine of the group, even an empty one: forgotten, for their prefill engines to drop as well.
  std::vector<Assignment> refused;
};

struct SchedulerStats {
  std::uint32_t engines = 0;
  std::uint64_t waiting_prefill = 0;  // requests without a prefill engine
  std::uint64_t waiting_decode = 0;   // requests with a prefill engine and no decode engine
  std::uint64_t requests = 0;         // known: not finished, not cancelled
  std::uint64_t reports_stale = 0;    // ignored: an earlier state than one known, or of an earlier life
};

// Engines form groups of one role (say, those of a node); the group's leader fetches for all of them whenever it likes.
// Requests wait in one queue for a prefill engine, first come first served. Those that have one are dealt to the groups
// of decode engines when one of these fetches, and wait there for memory. In this order, and with both engines given
// back when one is lost, no request holds an engine's memory while it waits for an engine that is full of requests
// waiting for memory. Not thread-safe. A request costs a look at each engine of its two groups; a fetch of a decode
// group, one at every decode group; a request that returns from a lost engine, a walk past others on their way.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();
  Scheduler(Scheduler&&) noexcept;
  Scheduler& operator=(Scheduler&&) noexcept;

  // Throws Error(kInvalidArgument) for a name that is taken, or a group of the other role.
  void join(const std::string& engine, EngineRole role, const std::string& group, const std::string& node);
  // The engine is gone, and what it had of its requests' KV: they wait again where they stood, for both engines; those
  // that were prefilled there are with their decode engine, and go on. Returns them, so that the other engine can be
  // told to drop them. Throws Error(kNotFound).
  std::vector<std::uint64_t> leave(const std::string& engine);

  // A request of `tokens` tokens, of which `hit_tokens` are read from storage. Throws Error(kInvalidArgument) for an id
  // that is known, Error(kNoSpace) when too many wait.
  void submit(std::uint64_t request, std::uint64_t tokens, std::uint64_t hit_tokens);
  // The group's engines say how they are, and get work. Throws Error(kNotFound) for an unknown group or engine, with
  // nothing changed.
  Fetched fetch(const std::string& group, std::span<const EngineReport> reports);
  // Prefill is over: its engine may leave without harm to the request. Unknown ids are ignored.
  void prefilled(std::uint64_t request);
  // It has ended, in whatever way. Unknown ids are ignored: it may have ended twice.
  void finished(std::uint64_t request);

  SchedulerStats stats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// --- Within a prefill engine (paper 6.2)

// Cached tokens, and tokens to compute behind them.
struct Prefill {
  std::uint64_t cached = 0;
  std::uint64_t tokens = 0;
};

// Time of the attention of a batch, fitted from measurements: base, so much for each token of context (its KV is read
// once a prefill), and so much for each operation, of which a prefill has tokens * (cached + tokens / 2).
class AttentionModel {
 public:
  // Fits by least squares; at least two batches of different work. What the batches can't tell apart goes to the
  // operations, and nothing costs less than nothing. Throws Error(kInvalidArgument).
  AttentionModel(std::span<const std::vector<Prefill>> batches, std::span<const double> seconds);
  AttentionModel(double base_s, double s_per_operation, double s_per_context = 0)
      : base_s_(base_s), s_per_operation_(s_per_operation), s_per_context_(s_per_context) {}

  static double operations(const Prefill& prefill);
  // Of one prefill, without the base.
  double cost_s(const Prefill& prefill) const {
    return s_per_operation_ * operations(prefill) +
           s_per_context_ * (static_cast<double>(prefill.cached) + static_cast<double>(prefill.tokens));
  }
  double seconds(std::span<const Prefill> batch) const;
  double base_s() const { return base_s_; }
  double s_per_operation() const { return s_per_operation_; }
  double s_per_context() const { return s_per_context_; }

 private:
  double base_s_;
  double s_per_operation_;
  double s_per_context_ = 0;
};

// Fills a batch in order up to `quota_s` of attention (A.4: 0.3 s). Returns how many tokens of each of the first
// requests are computed now; the last may be a part of its own, a chunk, found by bisection.
std::vector<std::uint64_t> select_batch(const AttentionModel& model, std::span<const Prefill> waiting, double quota_s);

}  // namespace dualkv
