// Cluster: requests on their way through storage, prefill and decode. Wires flows, engines, policies and the scheduler.
#pragma once

#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "dualkv/sim.h"
#include "sim/decode_engine.h"
#include "sim/events.h"
#include "sim/flow_net.h"

namespace dualkv::sim {

class Cluster {
 public:
  explicit Cluster(const SimOptions& options);
  SimResult run();

 private:
  // A part of a hit, read by one node.
  struct Part {
    std::uint32_t node = 0;
    std::uint32_t engine = 0;  // whose CNIC relays it; of the prefill side: the prefill engine's
    double bytes = 0;
  };
  // Each agent has one request at a time.
  struct Agent {
    std::uint64_t next_turn = 0;  // in SimWorkload::turns
    std::uint64_t last_turn = 0;  // its session's end
    std::uint32_t number = 0;     // of the turn, in its session
    double started = 0;

    std::uint64_t request = 0;
    const SimTurn* turn = nullptr;
    std::uint32_t prefill = 0, decode = 0;  // engines
    std::vector<Part> parts;
    std::uint32_t reads_left = 0;
    double published = 0;      // bytes, in the decode node's staging
    std::uint32_t cached = 0;  // tokens: loaded, or computed by earlier chunks
    std::uint32_t loaded = 0;  // tokens of the hit that are loaded
    std::uint32_t moving = 0;  // flows of its KV that end before it can go on
    double work_s = 0;         // what its prefill engine will compute for it
    bool computed = false;
    SimRequest record;
    double assigned = 0, read = 0, begun = 0, first = 0;

    std::uint32_t tokens() const { return turn->input_tokens + turn->output_tokens; }
  };
  struct Read {
    std::uint32_t agent;
    double bytes;
  };
  struct Node {
    LinkId snic, dram;
    std::string name;
    std::deque<Read> queue;
    double queued_bytes = 0;
    double staged = 0;     // bytes in its staging, the read under way included
    bool reading = false;  // the front of the queue
    bool prefill = false;
    std::uint32_t next_engine = 0;  // whose CNIC helps next
    double sampled = 0;             // bytes the SNIC had carried at the last window
  };
  // Links of an engine's CNIC; of prefill engines first, then of decode engines.
  struct Cnic {
    LinkId in, out;
    std::uint32_t node;
    double sampled = 0;
  };
  struct PrefillEngine {
    std::string name;
    std::deque<std::uint32_t> ready;
    std::uint32_t requests = 0;  // assigned and not prefilled
    std::uint64_t tokens = 0;
    double work_s = 0;
    std::uint64_t seen = 0;
  };
  struct Item {
    std::uint32_t agent, engine;
    std::uint32_t tokens;
  };
  // Engines that step together.
  struct PrefillGroup {
    std::uint32_t first = 0, last = 0;  // engines [first, last)
    std::vector<Item> batch;
    bool running = false;
    std::uint32_t moving = 0;  // loads of the pass in flight
    double began = 0, compute_s = 0;
    double extra_s = 0;     // what loads add to the compute that hid them
    bool computed = false;  // but for the loads
  };
  struct Decode {
    explicit Decode(const SimCompute& compute) : engine(compute) {}
    std::string name;
    DecodeEngine engine;
    std::deque<std::uint32_t> waiting;  // for memory
    std::uint32_t requests = 0;
    double tokens = 0;  // assigned
    double held = 0;    // in memory
    std::uint64_t seen = 0;
    std::uint32_t version = 0;
  };
  struct FetchGroup {
    std::string name;
    bool prefill;
    std::uint32_t first, last;  // engines
  };
  enum class FlowKind : std::uint8_t { kRead, kPassLoad, kLoad, kPublish, kCopyIn };

  void build();
  void arrive(std::uint32_t agent);
  void fetch(FetchGroup& group);
  void placed(std::uint32_t agent, Path read);
  void start_load(std::uint32_t agent, Path read);
  std::uint32_t plan_load(Agent& agent, std::uint32_t blocks);
  void read_next(std::uint32_t node);
  void unstage(std::uint32_t node, double bytes);
  void read_done(std::uint32_t node);
  void loaded(std::uint32_t agent);
  void ready(std::uint32_t agent);
  void try_forward(std::uint32_t group);
  void take_batch(PrefillGroup& group, std::uint32_t engine);
  void move_loads(const Agent& agent, FlowKind kind, std::uint32_t owner, std::uint32_t& count);
  void publish(std::uint32_t agent, double bytes);
  void forward_computed(std::uint32_t group);
  void forward_loaded(std::uint32_t group);
  void forward_done(std::uint32_t group);
  void prefilled(std::uint32_t agent);
  void handed_over(std::uint32_t agent);
  void loads_taken(const Agent& agent);
  void copied_in(std::uint32_t agent);
  void prompt_leaves(const Agent& agent);
  void try_join(std::uint32_t decode);
  void expect_end(std::uint32_t decode);
  void decoded(std::uint32_t decode);
  void finish(std::uint32_t agent);
  void flow_ended(std::uint64_t owner);
  void window();
  void check_end();

  void flow(double bytes, FlowKind kind, std::uint32_t owner, std::initializer_list<Hop> hops);
  std::uint64_t queued_bytes(const Node& node) const {
    return static_cast<std::uint64_t>(std::max(0.0, node.queued_bytes));
  }
  NodeView view(const Node& node) const;
  double tokens_to_bytes(double tokens) const { return tokens * options_.model.bytes_per_token; }
  double work_s(const Agent& agent) const;
  // Among all engines, as cnics_ has them.
  std::uint32_t decode_engine(std::uint32_t decode) const {
    return static_cast<std::uint32_t>(prefills_.size()) + decode;
  }
  Cnic& decode_cnic(std::uint32_t decode) { return cnics_[decode_engine(decode)]; }

  const SimOptions& options_;
  FlowNet net_;
  EventQueue events_;
  double now_ = 0;
  std::vector<Node> nodes_;  // prefill nodes first
  std::vector<Cnic> cnics_;
  std::vector<PrefillEngine> prefills_;
  std::vector<PrefillGroup> groups_;
  std::vector<Decode> decodes_;
  std::vector<Agent> agents_;
  std::vector<FetchGroup> fetch_groups_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unordered_map<std::uint64_t, std::uint32_t> agent_of_;  // of requests that the scheduler has
  std::unordered_map<std::string, std::uint32_t> node_of_;
  std::uint64_t scheduling_ = 0;  // requests without both engines
  AttentionModel attention_;
  std::uint64_t arrived_ = 0, finished_ = 0, agents_done_ = 0;
  double planned_bytes_ = 0;  // to be read
  double window_ratio_ = 0;
  std::uint32_t window_passes_ = 0;
  std::uint64_t window_tokens_ = 0;
  SimResult result_;
};

}  // namespace dualkv::sim
