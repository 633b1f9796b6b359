// simulate(): checks what it is asked, and runs a cluster.
#include <cmath>

#include "base/require.h"
#include "dualkv/sim.h"
#include "sim/cluster.h"

namespace dualkv {

namespace {

template <typename... Parts>
void allow(bool fine, const Parts&... parts) {
  require(fine, Code::kInvalidArgument, "simulator: ", parts...);
}

void positive(double value, const char* name) {
  allow(value > 0 && std::isfinite(value), name, " = ", value, ": must be more than 0");
}

void not_negative(double value, const char* name) {
  allow(value >= 0 && std::isfinite(value), name, " = ", value, ": must be 0 or more");
}

void check(const SimHardware& hw) {
  positive(hw.prefill_nodes, "prefill_nodes");
  positive(hw.decode_nodes, "decode_nodes");
  positive(hw.engines_per_node, "engines_per_node");
  positive(hw.engines_per_prefill_group, "engines_per_prefill_group");
  positive(hw.snic, "snic");
  positive(hw.cnic, "cnic");
  positive(hw.dram, "dram");
  positive(hw.decode_memory_tokens, "decode_memory_tokens");
  not_negative(hw.staging, "staging");
  allow(hw.high_share >= 0 && hw.high_share < 1, "high_share = ", hw.high_share, ": must be in [0, 1)");
}

void check(const SimModel& model) {
  positive(model.layers, "layers");
  positive(model.tokens_per_block, "tokens_per_block");
  positive(model.bytes_per_token, "bytes_per_token");
  const SimCompute& c = model.compute;
  for (const double value :
       {c.forward_s, c.token_s, c.context_s, c.pair_s, c.step_s, c.step_request_s, c.step_context_s, c.copy_call_s}) {
    not_negative(value, "a compute time");
  }
  allow(c.forward_s + c.token_s > 0, "prefill takes no time: give forward_s or token_s");
  allow(c.step_s + c.step_request_s > 0, "decode takes no time: give step_s or step_request_s");
}

void check(const SimWorkload& load, double memory_tokens) {
  allow(load.agents > 0 && load.agents < (1u << 29), "agents = ", load.agents, ": must be 1 to 2^29");
  not_negative(load.agents_per_s, "agents_per_s");
  not_negative(load.end_s, "end_s");
  allow(load.begins.size() > 1 && load.begins.front() == 0 && load.begins.back() == load.turns.size(),
        "begins must go from 0 to the number of turns, and there must be a session");
  for (std::size_t i = 1; i < load.begins.size(); ++i) {
    allow(load.begins[i] > load.begins[i - 1], "session ", i - 1, " has no turns");
  }
  for (const SimTurn& turn : load.turns) {
    allow(turn.input_tokens > 0 && turn.hit_tokens < turn.input_tokens && turn.output_tokens > 0, "a turn of ",
          turn.input_tokens, " input, ", turn.hit_tokens, " hit and ", turn.output_tokens,
          " output tokens: input must be more than hit, and output at least 1");
    not_negative(turn.think_s, "think_s");
    allow(static_cast<double>(turn.input_tokens) + turn.output_tokens <= memory_tokens, "a turn of ", turn.input_tokens,
          " + ", turn.output_tokens, " tokens does not fit decode_memory_tokens = ", memory_tokens);
  }
}

}  // namespace

SimResult simulate(const SimOptions& options) {
  check(options.hardware);
  check(options.model);
  check(options.workload, options.hardware.decode_memory_tokens);
  positive(options.batch_tokens, "batch_tokens");
  positive(options.fetch_s, "fetch_s");
  positive(options.window_s, "window_s");
  positive(options.attention_quota_s, "attention_quota_s");
  return sim::Cluster(options).run();
}

}  // namespace dualkv
