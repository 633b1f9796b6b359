// Simulator: a cluster of prefill and decode engines, its NICs and its storage, in discrete events, driven by the same
// path policies and the same scheduler as a real one. Deterministic: equal options give equal results.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dualkv/policy.h"
#include "dualkv/scheduler.h"

namespace dualkv {

// Seconds that an engine computes. Fitted to measurements; docs/simulator.md lists where each comes from.
struct SimCompute {
  // A forward pass of prefill. Engines of a group step together (expert parallelism): the tokens are spread over all of
  // them, attention takes as long as on the slowest.
  double forward_s = 0;  // whatever is in it
  double token_s = 0;    // a new token
  double context_s = 0;  // a token of context, once a request
  double pair_s = 0;     // a new token and a token before it
  // A step of decode: one token for every request of the engine.
  double step_s = 0;
  double step_request_s = 0;
  double step_context_s = 0;  // a token of context
  // Without layer-wise prefill: the call that copies one Layer Block to the GPU, during which nothing is computed
  // there.
  double copy_call_s = 0;

  // Attention of n new tokens after `cached`.
  double attention_s(double cached, double n) const { return context_s * (cached + n) + pair_s * n * (cached + n / 2); }
};

struct SimModel {
  std::uint32_t layers = 1;
  std::uint32_t tokens_per_block = 64;
  double bytes_per_token = 0;  // of KV, all layers
  SimCompute compute;
};

// All nodes are alike. Rates in bytes/s, of one direction.
struct SimHardware {
  std::uint32_t prefill_nodes = 1;
  std::uint32_t decode_nodes = 1;
  std::uint32_t engines_per_node = 1;
  std::uint32_t engines_per_prefill_group = 1;  // that step together; of one node or of several
  double snic = 0;                              // of a node, reads
  double cnic = 0;                              // of an engine
  double dram = 0;                              // of a node, reads and writes together
  double high_share = 0;                        // of each CNIC direction that the model's own traffic takes, first
  double decode_memory_tokens = 0;              // of KV that fit a decode engine
  // Bytes of a node's staging: what it reads is there until the forward pass that takes it is over, prompts of a decode
  // node until they are in its engine's memory. Reads wait while it is full. 0: without end.
  double staging = 0;
};

// One turn of an agent: a request.
struct SimTurn {
  std::uint32_t input_tokens = 0;
  std::uint32_t hit_tokens = 0;  // of those, stored
  std::uint32_t output_tokens = 0;
  float think_s = 0;  // from the answer before to this request
};

// Agents replay sessions: agent i replays session i modulo their number, each turn after the answer to the one before.
struct SimWorkload {
  std::vector<SimTurn> turns;         // of all sessions, one behind the other
  std::vector<std::uint64_t> begins;  // of each session, and the end of the last
  std::uint64_t agents = 0;
  double agents_per_s = 0;  // Poisson arrivals; 0: all start together
  double end_s = 0;         // stop here; 0: when all agents are done
  std::uint64_t seed = 1;
};

struct SimOptions {
  SimModel model;
  SimHardware hardware;
  SimWorkload workload;

  // How hits are loaded.
  bool free_loads = false;             // they cost nothing, nor do transfers (the paper's Oracle)
  bool layerwise = true;               // transfers run beside the compute of a forward pass, layer by layer
  std::shared_ptr<PathPolicy> policy;  // who reads; null: the scheduler's choice, or the prefill node without one
  std::uint32_t helpers = 0;           // idle nodes offered to the policy, those with the shortest queues
  bool scheduled = false;              // engines by Scheduler and batches by attention time; false: by turns
  SchedulerOptions scheduler;          // where scheduled
  double fetch_s = 0.05;               // between fetches of a group
  double attention_quota_s = 0.3;      // of a batch, where scheduled (paper A.4)
  std::uint32_t batch_tokens = 8192;   // new tokens of an engine in a forward pass, at most
  std::uint32_t batch_requests = 0;    // and requests; 0 = any
  double window_s = 1;                 // of the utilisation curves
};

// One request, as it went. Times in seconds; durations unless named otherwise.
struct SimRequest {
  std::uint32_t agent = 0;
  std::uint32_t turn = 0;
  std::uint32_t prefill = 0, decode = 0;  // engines, of each role from 0 on
  double arrival_s = 0;                   // since the start
  float scheduling_s = 0;                 // until it had its engines
  float reading_s = 0;                    // until the hit was in staging
  float queueing_s = 0;                   // until its first forward pass
  float prefill_s = 0;                    // until its first token
  float second_s = 0;                     // from the first to the second token
  float decode_s = 0;                     // from the first to the last token
  float output_tokens = 0;

  float ttft_s() const { return scheduling_s + reading_s + queueing_s + prefill_s; }
};

// Over one window.
struct SimWindow {
  float prefill_snic = 0;     // mean utilisation of prefill nodes' SNICs
  float decode_snic = 0;      // and of decode nodes'
  float snic_max = 0;         // of the busiest of all
  float cnic = 0;             // mean of both directions of all engines
  float attention_ratio = 0;  // slowest over mean attention of a forward pass, mean of the window's passes; 0: none
  std::uint32_t running = 0;  // requests on their way
  std::uint64_t prompt_tokens = 0;  // of prompts that were prefilled
};

struct SimResult {
  double seconds = 0;  // JCT offline: until the last answer
  std::vector<SimRequest> requests;
  std::vector<float> agent_seconds;  // of each agent that is done, in the order of finishing
  std::vector<SimWindow> windows;
  std::vector<double> snic_bytes;  // of each node, prefill nodes first
  double hit_bytes = 0;            // of requests whose load has ended, oracle's too
  double read_bytes = 0;           // by all SNICs
  double relayed_bytes = 0;        // from a decode or helper node to a prefill engine
  double published_bytes = 0;      // from prefill to decode engines
  double recomputed_bytes = 0;     // of hits that were computed again instead
  std::uint64_t events = 0;
};

// Throws Error(kInvalidArgument) for values that can't be; a policy's errors pass through. Bytes and requests are
// counted on both sides of every hand-over; a difference is a bug, and throws std::logic_error.
SimResult simulate(const SimOptions& options);

}  // namespace dualkv
