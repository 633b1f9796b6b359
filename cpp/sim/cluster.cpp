// The life of a simulated request: engines, reads, forward passes, hand-over, decode.
#include "sim/cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>

#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv::sim {

namespace {

constexpr std::uint32_t kKindBits = 3;
constexpr double kByteSlack = 1e-6;  // of sums of doubles, relative

std::uint32_t blocks_of(std::uint32_t tokens, std::uint32_t per_block) { return (tokens + per_block - 1) / per_block; }

void require(bool fine, const std::string& what) {
  if (!fine) throw std::logic_error("simulator: " + what);
}

}  // namespace

Cluster::Cluster(const SimOptions& options)
    : options_(options), attention_(0, options.model.compute.pair_s, options.model.compute.context_s) {
  build();
}

void Cluster::build() {
  const SimHardware& hw = options_.hardware;
  const std::uint32_t per_node = hw.engines_per_node;
  for (std::uint32_t i = 0; i < hw.prefill_nodes + hw.decode_nodes; ++i) {
    Node node;
    node.prefill = i < hw.prefill_nodes;
    node.snic = net_.add_link(hw.snic);
    node.dram = net_.add_link(hw.dram);
    node.name = node.prefill ? text("prefill-", i) : text("decode-", i - hw.prefill_nodes);
    node_of_[node.name] = i;
    nodes_.push_back(std::move(node));
    for (std::uint32_t k = 0; k < per_node; ++k) {
      const double high = hw.cnic * hw.high_share;
      cnics_.push_back({net_.add_link(hw.cnic, high), net_.add_link(hw.cnic, high), i});
    }
  }
  prefills_.resize(std::size_t{hw.prefill_nodes} * per_node);
  decodes_.assign(std::size_t{hw.decode_nodes} * per_node, Decode(options_.model.compute));
  const std::uint32_t step = hw.engines_per_prefill_group;
  const auto engines = static_cast<std::uint32_t>(prefills_.size());
  for (std::uint32_t first = 0; first < engines; first += step) {
    groups_.push_back({});
    groups_.back().first = first;
    groups_.back().last = std::min(engines, first + step);
  }
  if (options_.scheduled) {
    scheduler_ = std::make_unique<Scheduler>(options_.scheduler);
    for (std::uint32_t n = 0; n < nodes_.size(); ++n) {
      const bool prefill = nodes_[n].prefill;
      const std::uint32_t first = (prefill ? n : n - hw.prefill_nodes) * per_node;
      fetch_groups_.push_back({nodes_[n].name, prefill, first, first + per_node});
      for (std::uint32_t e = first; e < first + per_node; ++e) {
        std::string& name = prefill ? prefills_[e].name : decodes_[e].name;
        name = text(prefill ? "p" : "d", e);
        scheduler_->join(name, prefill ? EngineRole::kPrefill : EngineRole::kDecode, nodes_[n].name, nodes_[n].name);
      }
    }
  }
}

SimResult Cluster::run() {
  const SimWorkload& load = options_.workload;
  agents_.resize(load.agents);
  std::mt19937_64 random(load.seed);
  const std::size_t sessions = load.begins.size() - 1;
  double start = 0;
  for (std::uint32_t i = 0; i < agents_.size(); ++i) {
    Agent& agent = agents_[i];
    agent.next_turn = load.begins[i % sessions];
    agent.last_turn = load.begins[i % sessions + 1];
    if (load.agents_per_s > 0) {
      // (0, 1]: 53 random bits, the same on every platform.
      const double u = (static_cast<double>(random() >> 11) + 1) * 0x1p-53;
      start += -std::log(u) / load.agents_per_s;
    }
    agent.started = start;
    events_.add(start, EventKind::kArrive, i);
  }
  // Groups of a role fetch at even distances: whoever comes behind a pause finds all that has gathered in it.
  for (std::uint32_t g = 0; g < fetch_groups_.size(); ++g) {
    const SimHardware& hw = options_.hardware;
    const double place =
        fetch_groups_[g].prefill ? (g + 0.5) / hw.prefill_nodes : (g - hw.prefill_nodes + 0.25) / hw.decode_nodes;
    events_.add(options_.fetch_s * place, EventKind::kFetch, g);
  }
  events_.add(options_.window_s, EventKind::kWindow, 0);
  while (agents_done_ < agents_.size()) {
    const double flow_end = net_.next_end();
    const double event_time = events_.empty() ? FlowNet::kNever : events_.next_time();
    now_ = std::min(flow_end, event_time);
    if (load.end_s > 0 && now_ > load.end_s) {
      now_ = load.end_s;
      break;
    }
    require(events_.work() || net_.flows() > 0 || scheduling_ > 0, "nothing is due, and requests are on their way");
    ++result_.events;
    if (flow_end <= event_time) {
      flow_ended(net_.finish_next());
      continue;
    }
    const Event event = events_.take();
    switch (event.kind) {
      case EventKind::kArrive: arrive(event.subject); break;
      case EventKind::kFetch:
        fetch(fetch_groups_[event.subject]);
        events_.add(now_ + options_.fetch_s, EventKind::kFetch, event.subject);
        break;
      case EventKind::kPlace: placed(event.subject, Path::kPrefill); break;
      case EventKind::kForward: forward_computed(event.subject); break;
      case EventKind::kDecode:
        if (event.version == decodes_[event.subject].version) decoded(event.subject);
        break;
      case EventKind::kWindow: window(); break;
    }
  }
  result_.seconds = now_;
  check_end();
  for (Node& node : nodes_) {
    result_.snic_bytes.push_back(net_.carried(node.snic, now_));
    result_.read_bytes += result_.snic_bytes.back();
  }
  return std::move(result_);
}

// --- A request begins

void Cluster::arrive(std::uint32_t index) {
  Agent& agent = agents_[index];
  agent.turn = &options_.workload.turns[agent.next_turn++];
  agent.record = {};
  agent.record.agent = index;
  agent.record.turn = agent.number++;
  agent.record.arrival_s = now_;
  agent.parts.clear();
  agent.reads_left = agent.moving = 0;
  agent.published = 0;
  agent.computed = false;
  const std::uint64_t turn = arrived_++;
  agent.request = arrived_;
  if (scheduler_) {
    scheduler_->submit(agent.request, agent.tokens(), agent.turn->hit_tokens);
    agent_of_[agent.request] = index;
    ++scheduling_;
    return;
  }
  agent.prefill = static_cast<std::uint32_t>(turn % prefills_.size());
  agent.decode = static_cast<std::uint32_t>(turn % decodes_.size());
  // As long as a scheduled request waits for its two fetches on average.
  events_.add(now_ + options_.fetch_s, EventKind::kPlace, index);
}

void Cluster::fetch(FetchGroup& group) {
  if (scheduling_ == 0) return;
  std::vector<EngineReport> reports(group.last - group.first);
  // A group is a node's engines.
  const Node& node = nodes_[cnics_[group.prefill ? group.first : decode_engine(group.first)].node];
  const auto queued = static_cast<std::uint64_t>(queued_bytes(node) / options_.model.bytes_per_token);
  for (std::uint32_t e = group.first; e < group.last; ++e) {
    EngineReport& report = reports[e - group.first];
    report.read_queue_tokens = queued;
    if (group.prefill) {
      const PrefillEngine& engine = prefills_[e];
      report.engine = engine.name;
      report.requests = engine.requests;
      report.tokens = engine.tokens;
      report.seen = engine.seen;
    } else {
      const Decode& engine = decodes_[e];
      report.engine = engine.name;
      report.requests = engine.requests;
      report.tokens = static_cast<std::uint64_t>(engine.tokens);
      report.free_tokens =
          static_cast<std::uint64_t>(std::max(0.0, options_.hardware.decode_memory_tokens - engine.tokens));
      report.seen = engine.seen;
    }
  }
  const auto index_of = [](const auto& name) {
    return static_cast<std::uint32_t>(std::stoul(std::string(name).substr(1)));
  };
  const Fetched got = scheduler_->fetch(group.name, reports);
  if (!got.refused.empty()) {
    throw Error(Code::kInvalidArgument,
                text("simulator: a request of ", agents_[agent_of_.at(got.refused.front().request)].turn->input_tokens,
                     " tokens does not fit a decode engine of ", options_.hardware.decode_memory_tokens,
                     "; raise decode_memory_tokens"));
  }
  for (const Assignment& one : got.assignments) {
    Agent& agent = agents_[agent_of_.at(one.request)];
    const std::uint32_t engine = index_of(one.engine);
    if (group.prefill) {
      agent.prefill = engine;
      prefills_[engine].seen = one.number;
      ++prefills_[engine].requests;
      prefills_[engine].tokens += agent.tokens();
    } else {
      agent.decode = engine;
      decodes_[engine].seen = one.number;
    }
  }
  for (const Placement& one : got.placements) {
    const std::uint32_t index = agent_of_.at(one.request);
    // The reader's node shows the read in its queue from now on.
    if (one.read == Path::kPrefill) {
      prefills_[agents_[index].prefill].seen = one.number;
    } else {
      decodes_[agents_[index].decode].seen = one.number;
    }
    --scheduling_;
    placed(index, one.read);
  }
}

void Cluster::placed(std::uint32_t index, Path read) {
  Agent& agent = agents_[index];
  Decode& decode = decodes_[agent.decode];
  ++decode.requests;
  decode.tokens += agent.tokens();
  agent.assigned = now_;
  agent.record.prefill = agent.prefill;
  agent.record.decode = agent.decode;
  agent.record.scheduling_s = static_cast<float>(now_ - agent.record.arrival_s);
  start_load(index, read);
}

double Cluster::work_s(const Agent& agent) const {
  const double n = agent.turn->input_tokens - agent.loaded;
  return options_.model.compute.token_s * n + options_.model.compute.attention_s(agent.loaded, n);
}

// --- Storage

NodeView Cluster::view(const Node& node) const {
  NodeView view;
  view.name = node.name;
  view.tokens_per_block = options_.model.tokens_per_block;
  view.block_bytes = static_cast<std::uint64_t>(tokens_to_bytes(view.tokens_per_block));
  view.read_queue_bytes = queued_bytes(node);
  view.read_bandwidth = static_cast<std::uint64_t>(options_.hardware.snic);
  const SimHardware& hw = options_.hardware;
  view.link_bandwidth = static_cast<std::uint64_t>(hw.cnic * (1 - hw.high_share) * hw.engines_per_node);
  constexpr double kMost = std::numeric_limits<std::uint32_t>::max();
  const double free =
      hw.staging > 0 ? std::max(0.0, hw.staging - node.staged) / tokens_to_bytes(view.tokens_per_block) : kMost;
  view.free_slots = static_cast<std::uint32_t>(std::min(kMost, free));
  return view;
}

void Cluster::start_load(std::uint32_t index, Path read) {
  Agent& agent = agents_[index];
  const std::uint32_t hit = agent.turn->hit_tokens;
  agent.loaded = hit;
  if (hit > 0 && !options_.free_loads) {
    const std::uint32_t blocks = blocks_of(hit, options_.model.tokens_per_block);
    if (options_.policy) {
      const std::uint32_t planned = plan_load(agent, blocks);
      if (planned < blocks) agent.loaded = planned * options_.model.tokens_per_block;
    } else {
      const std::uint32_t reader = read == Path::kPrefill ? agent.prefill : decode_engine(agent.decode);
      agent.parts.push_back({cnics_[reader].node, reader, tokens_to_bytes(hit)});
    }
    result_.recomputed_bytes += tokens_to_bytes(hit - agent.loaded);
  }
  agent.cached = agent.loaded;
  agent.work_s = work_s(agent);
  prefills_[agent.prefill].work_s += agent.work_s;
  agent.reads_left = static_cast<std::uint32_t>(agent.parts.size());
  if (agent.parts.empty()) {
    agent.read = now_;
    return loaded(index);
  }
  for (const Part& part : agent.parts) {
    Node& node = nodes_[part.node];
    node.queue.push_back({index, part.bytes});
    node.queued_bytes += part.bytes;
    planned_bytes_ += part.bytes;
    read_next(part.node);
  }
}

// How many of the blocks are loaded; the parts that do it.
std::uint32_t Cluster::plan_load(Agent& agent, std::uint32_t blocks) {
  const std::uint32_t home = cnics_[agent.prefill].node, away = decode_cnic(agent.decode).node;
  PlanRequest request;
  // Which blocks is of no matter to a policy; one byte makes a key.
  request.keys.assign(blocks, Key(std::as_bytes(std::span("k", 1))));
  request.prefill = view(nodes_[home]);
  request.prefill.compute_queue_s = prefills_[agent.prefill].work_s + work_s(agent);
  request.decode = view(nodes_[away]);
  if (options_.helpers > 0) {
    std::vector<std::uint32_t> others;
    for (std::uint32_t n = 0; n < nodes_.size(); ++n) {
      if (n != home && n != away) others.push_back(n);
    }
    const auto shorter = [&](std::uint32_t a, std::uint32_t b) {
      return std::pair(nodes_[a].queued_bytes, a) < std::pair(nodes_[b].queued_bytes, b);
    };
    const std::size_t most = std::min<std::size_t>(options_.helpers, others.size());
    std::partial_sort(others.begin(), others.begin() + static_cast<std::ptrdiff_t>(most), others.end(), shorter);
    for (std::size_t i = 0; i < most; ++i) request.helpers.push_back(view(nodes_[others[i]]));
  }
  const Plan plan = options_.policy->plan(request);
  check_plan(plan);
  const auto planned = static_cast<std::uint32_t>(plan.keys.size());
  if (planned > blocks) {
    throw Error(Code::kInvalidArgument, text("simulator: the policy plans ", planned, " blocks of a hit of ", blocks));
  }
  // The hit may end within its last block.
  const double share =
      planned < blocks ? options_.model.tokens_per_block : static_cast<double>(agent.turn->hit_tokens) / blocks;
  for (const PathRange& range : plan.ranges) {
    const auto found = node_of_.find(range.node);
    if (found == node_of_.end()) {
      throw Error(Code::kInvalidArgument,
                  text("simulator: the policy names '", range.node, "', which is no node of the cluster"));
    }
    const std::uint32_t node = found->second;
    std::uint32_t engine = agent.prefill;
    if (node == away) {
      engine = decode_engine(agent.decode);
    } else if (node != home) {
      engine =
          node * options_.hardware.engines_per_node + nodes_[node].next_engine++ % options_.hardware.engines_per_node;
    }
    agent.parts.push_back({node, engine, tokens_to_bytes(share * range.count)});
  }
  return planned;
}

// First come first served, as long as staging has room; a hit larger than all of it is read once it is empty.
void Cluster::read_next(std::uint32_t index) {
  Node& node = nodes_[index];
  if (node.reading || node.queue.empty()) return;
  const double bytes = node.queue.front().bytes, room = options_.hardware.staging;
  const double slack = kByteSlack * (bytes + room);  // sums of doubles leave a trace behind
  if (room > 0 && node.staged > slack && node.staged + bytes > room + slack) return;
  node.reading = true;
  node.staged += bytes;
  flow(bytes, FlowKind::kRead, index, {{node.snic, 1}, {node.dram, 1}});
}

void Cluster::unstage(std::uint32_t index, double bytes) {
  nodes_[index].staged = std::max(0.0, nodes_[index].staged - bytes);
  read_next(index);
}

void Cluster::read_done(std::uint32_t index) {
  Node& node = nodes_[index];
  const Read read = node.queue.front();
  node.queue.pop_front();
  node.queued_bytes = node.queue.empty() ? 0 : node.queued_bytes - read.bytes;
  node.reading = false;
  read_next(index);
  Agent& agent = agents_[read.agent];
  if (--agent.reads_left > 0) return;
  agent.read = now_;
  loaded(read.agent);
}

// All of the hit is in staging.
void Cluster::loaded(std::uint32_t index) {
  Agent& agent = agents_[index];
  agent.record.reading_s = static_cast<float>(now_ - agent.assigned);
  result_.hit_bytes += tokens_to_bytes(agent.loaded);
  if (!options_.layerwise && !agent.parts.empty()) {
    move_loads(agent, FlowKind::kLoad, index, agent.moving);
    return;
  }
  ready(index);
}

void Cluster::ready(std::uint32_t index) {
  const std::uint32_t engine = agents_[index].prefill;
  prefills_[engine].ready.push_back(index);
  try_forward(engine / options_.hardware.engines_per_prefill_group);
}

// --- Prefill

void Cluster::try_forward(std::uint32_t index) {
  PrefillGroup& group = groups_[index];
  if (group.running) return;
  group.batch.clear();
  for (std::uint32_t e = group.first; e < group.last; ++e) take_batch(group, e);
  if (group.batch.empty()) return;
  group.running = true;
  group.computed = false;
  group.moving = 0;
  group.began = now_;
  group.extra_s = 0;

  const SimCompute& compute = options_.model.compute;
  double tokens = 0, attention = 0, copies = 0, most_attention = 0, slowest = 0, sum = 0;
  std::uint32_t engine = group.first;
  const auto close = [&] {
    most_attention = std::max(most_attention, attention);
    slowest = std::max(slowest, attention + copies);
    sum += attention;
    attention = copies = 0;
  };
  for (const Item& item : group.batch) {
    Agent& agent = agents_[item.agent];
    if (item.engine != engine) close();
    engine = item.engine;
    const bool first = agent.cached == agent.loaded;
    if (first) {
      agent.begun = now_;
      agent.record.queueing_s = static_cast<float>(now_ - agent.read);
      if (!options_.free_loads && !options_.layerwise) {
        copies +=
            blocks_of(agent.loaded, options_.model.tokens_per_block) * options_.model.layers * compute.copy_call_s;
      }
    }
    tokens += item.tokens;
    attention += compute.attention_s(agent.cached, item.tokens);
    agent.cached += item.tokens;
    if (options_.free_loads || !options_.layerwise) continue;
    if (first) move_loads(agent, FlowKind::kPassLoad, index, group.moving);
    const std::uint32_t to_node = decode_cnic(agent.decode).node;
    double bytes = tokens_to_bytes(item.tokens);
    for (const Part& part : agent.parts) {
      if (first && part.node != to_node) bytes += part.bytes;
    }
    publish(item.agent, bytes);
  }
  close();
  const double engines = group.last - group.first;
  group.compute_s = compute.forward_s + compute.token_s * tokens / engines + slowest;
  if (sum > 0) {
    window_ratio_ += most_attention / (sum / engines);
    ++window_passes_;
  }
  events_.add(now_ + group.compute_s, EventKind::kForward, index);
}

// The batch of one engine: first come first served, up to the limits; the last may be a chunk.
void Cluster::take_batch(PrefillGroup& group, std::uint32_t engine) {
  std::deque<std::uint32_t>& queue = prefills_[engine].ready;
  std::uint64_t left = options_.batch_tokens;
  std::vector<Prefill> offered;
  for (std::size_t i = 0; i < queue.size() && left > 0; ++i) {
    if (options_.batch_requests > 0 && i >= options_.batch_requests) break;
    const Agent& agent = agents_[queue[i]];
    const std::uint64_t tokens = std::min<std::uint64_t>(left, agent.turn->input_tokens - agent.cached);
    offered.push_back({agent.cached, tokens});
    left -= tokens;
  }
  if (offered.empty()) return;
  std::vector<std::uint64_t> chosen;
  if (options_.scheduled) chosen = select_batch(attention_, offered, options_.attention_quota_s);
  if (chosen.empty()) {
    // Without a quota; or one below a single token's attention, which is computed all the same.
    const std::size_t count = options_.scheduled ? 1 : offered.size();
    for (std::size_t i = 0; i < count; ++i) chosen.push_back(offered[i].tokens);
  }
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    group.batch.push_back({queue[i], engine, static_cast<std::uint32_t>(chosen[i])});
  }
  // A chunk stays in front for its next one.
  const Agent& last = agents_[queue[chosen.size() - 1]];
  const bool whole = last.cached + chosen.back() == last.turn->input_tokens;
  queue.erase(queue.begin(), queue.begin() + static_cast<std::ptrdiff_t>(chosen.size() - (whole ? 0 : 1)));
}

// From staging, wherever it is, to the prefill engine's memory.
void Cluster::move_loads(const Agent& agent, FlowKind kind, std::uint32_t owner, std::uint32_t& count) {
  const Cnic& to = cnics_[agent.prefill];
  for (const Part& part : agent.parts) {
    const Cnic& from = cnics_[part.engine];
    ++count;
    if (part.engine != agent.prefill) result_.relayed_bytes += part.bytes;
    flow(part.bytes, kind, owner, {{from.out, 1}, {to.in, 1}, {nodes_[from.node].dram, 1}});
  }
}

void Cluster::publish(std::uint32_t index, double bytes) {
  Agent& agent = agents_[index];
  const Cnic& to = decode_cnic(agent.decode);
  ++agent.moving;
  agent.published += bytes;
  nodes_[to.node].staged += bytes;
  result_.published_bytes += bytes;
  flow(bytes, FlowKind::kPublish, index, {{cnics_[agent.prefill].out, 1}, {to.in, 1}, {nodes_[to.node].dram, 1}});
}

// Layers overlap: the slower of compute and loads sets the pace, the other one shows for one layer only.
void Cluster::forward_computed(std::uint32_t index) {
  PrefillGroup& group = groups_[index];
  if (group.computed) return forward_done(index);
  group.computed = true;
  if (group.moving > 0) return;
  if (group.extra_s == 0) return forward_done(index);
  events_.add(now_ + group.extra_s, EventKind::kForward, index);
}

void Cluster::forward_loaded(std::uint32_t index) {
  PrefillGroup& group = groups_[index];
  if (--group.moving > 0) return;
  if (group.computed) {
    events_.add(now_ + group.compute_s / options_.model.layers, EventKind::kForward, index);
  } else {
    group.extra_s = (now_ - group.began) / options_.model.layers;
  }
}

void Cluster::forward_done(std::uint32_t index) {
  PrefillGroup& group = groups_[index];
  group.running = false;
  const std::vector<Item> done = std::move(group.batch);
  group.batch.clear();
  for (const Item& item : done) {
    const Agent& agent = agents_[item.agent];
    // Its first pass: loads are in the engine's memory.
    if (agent.cached - item.tokens == agent.loaded) loads_taken(agent);
    if (agent.cached == agent.turn->input_tokens) prefilled(item.agent);
  }
  try_forward(index);
}

// Parts that the decode node read stay there: they belong to the prompt that it is handed.
void Cluster::loads_taken(const Agent& agent) {
  const std::uint32_t home = decode_cnic(agent.decode).node;
  for (const Part& part : agent.parts) {
    if (part.node != home) unstage(part.node, part.bytes);
  }
}

void Cluster::prefilled(std::uint32_t index) {
  Agent& agent = agents_[index];
  PrefillEngine& engine = prefills_[agent.prefill];
  engine.work_s = std::max(0.0, engine.work_s - agent.work_s);
  window_tokens_ += agent.turn->input_tokens;
  if (scheduler_) {
    --engine.requests;
    engine.tokens -= agent.tokens();
    scheduler_->prefilled(agent.request);
  }
  agent.first = now_;
  agent.record.prefill_s = static_cast<float>(now_ - agent.begun);
  agent.record.output_tokens = static_cast<float>(agent.turn->output_tokens);
  agent.computed = true;
  if (agent.turn->output_tokens < 2) {
    // Nobody decodes; what is still published goes nowhere.
    if (agent.moving == 0) finish(index);
    return;
  }
  if (options_.free_loads) return handed_over(index);
  if (!options_.layerwise) publish(index, tokens_to_bytes(agent.turn->input_tokens));
  if (agent.moving == 0) handed_over(index);
}

// --- Decode

// All of the prompt is in the decode node's staging; then in its engine's memory.
void Cluster::handed_over(std::uint32_t index) {
  Agent& agent = agents_[index];
  if (!options_.free_loads) {
    const Cnic& at = decode_cnic(agent.decode);
    ++agent.moving;
    flow(tokens_to_bytes(agent.turn->input_tokens), FlowKind::kCopyIn, index,
         {{at.out, 1}, {at.in, 1}, {nodes_[at.node].dram, 1}});
    return;
  }
  copied_in(index);
}

void Cluster::copied_in(std::uint32_t index) {
  const Agent& agent = agents_[index];
  decodes_[agent.decode].waiting.push_back(index);
  try_join(agent.decode);
}

// The decode node's staging is free of this prompt.
void Cluster::prompt_leaves(const Agent& agent) {
  const std::uint32_t home = decode_cnic(agent.decode).node;
  double bytes = agent.published;
  for (const Part& part : agent.parts) {
    if (part.node == home) bytes += part.bytes;
  }
  if (bytes > 0) unstage(home, bytes);
}

void Cluster::try_join(std::uint32_t index) {
  Decode& decode = decodes_[index];
  bool any = false;
  while (!decode.waiting.empty()) {
    const std::uint32_t next = decode.waiting.front();
    Agent& agent = agents_[next];
    const double need = agent.tokens();
    if (decode.held > 0 && decode.held + need > options_.hardware.decode_memory_tokens) break;
    decode.waiting.pop_front();
    decode.held += need;
    decode.engine.join(now_, next, agent.turn->input_tokens + 1.0, agent.turn->output_tokens - 1);
    // On average half a step passes until the next begins.
    agent.record.second_s = static_cast<float>(now_ - agent.first + 1.5 * decode.engine.step_s());
    any = true;
  }
  if (any) expect_end(index);
}

// The event that was due is void: the batch has changed.
void Cluster::expect_end(std::uint32_t index) {
  Decode& decode = decodes_[index];
  ++decode.version;
  if (decode.engine.batch() == 0) return;
  events_.add(decode.engine.next_end(), EventKind::kDecode, index, decode.version);
}

void Cluster::decoded(std::uint32_t index) {
  Decode& decode = decodes_[index];
  const std::uint32_t done =
      decode.engine.leave(now_, [&](std::uint32_t agent) { return static_cast<double>(agents_[agent].tokens()); });
  decode.held -= agents_[done].tokens();
  try_join(index);
  expect_end(index);
  finish(done);
}

void Cluster::finish(std::uint32_t index) {
  Agent& agent = agents_[index];
  if (agent.turn->output_tokens < 2) prompt_leaves(agent);
  Decode& decode = decodes_[agent.decode];
  --decode.requests;
  decode.tokens -= agent.tokens();
  if (scheduler_) {
    scheduler_->finished(agent.request);
    agent_of_.erase(agent.request);
  }
  agent.record.decode_s = agent.turn->output_tokens < 2 ? 0 : static_cast<float>(now_ - agent.first);
  result_.requests.push_back(agent.record);
  ++finished_;
  if (agent.next_turn < agent.last_turn) {
    events_.add(now_ + options_.workload.turns[agent.next_turn].think_s, EventKind::kArrive, index);
    return;
  }
  ++agents_done_;
  result_.agent_seconds.push_back(static_cast<float>(now_ - agent.started));
}

// --- Flows and accounts

void Cluster::flow(double bytes, FlowKind kind, std::uint32_t owner, std::initializer_list<Hop> hops) {
  std::array<Hop, FlowNet::kMaxHops> path{};
  std::copy(hops.begin(), hops.end(), path.begin());
  net_.start(now_, bytes, (std::uint64_t{owner} << kKindBits) | static_cast<std::uint64_t>(kind), path, hops.size());
}

void Cluster::flow_ended(std::uint64_t owner) {
  const auto index = static_cast<std::uint32_t>(owner >> kKindBits);
  switch (static_cast<FlowKind>(owner & ((1u << kKindBits) - 1))) {
    case FlowKind::kRead: return read_done(index);
    case FlowKind::kPassLoad: return forward_loaded(index);
    case FlowKind::kLoad:
      if (--agents_[index].moving == 0) ready(index);
      return;
    case FlowKind::kPublish: {
      Agent& agent = agents_[index];
      if (--agent.moving > 0 || !agent.computed) return;
      if (agent.turn->output_tokens < 2) return finish(index);
      return handed_over(index);
    }
    case FlowKind::kCopyIn: {
      --agents_[index].moving;
      prompt_leaves(agents_[index]);
      return copied_in(index);
    }
  }
}

void Cluster::window() {
  SimWindow window;
  const SimHardware& hw = options_.hardware;
  const double full = hw.snic * options_.window_s;
  for (Node& node : nodes_) {
    const double carried = net_.carried(node.snic, now_);
    const auto used = static_cast<float>((carried - node.sampled) / full);
    node.sampled = carried;
    (node.prefill ? window.prefill_snic : window.decode_snic) +=
        used / static_cast<float>(node.prefill ? hw.prefill_nodes : hw.decode_nodes);
    window.snic_max = std::max(window.snic_max, used);
  }
  double moved = 0;
  for (Cnic& cnic : cnics_) {
    const double carried = net_.carried(cnic.in, now_) + net_.carried(cnic.out, now_);
    moved += carried - cnic.sampled;
    cnic.sampled = carried;
  }
  window.cnic = static_cast<float>(moved / (2 * hw.cnic * options_.window_s * static_cast<double>(cnics_.size())));
  window.attention_ratio = window_passes_ == 0 ? 0 : static_cast<float>(window_ratio_ / window_passes_);
  window.running = static_cast<std::uint32_t>(arrived_ - finished_);
  window.prompt_tokens = window_tokens_;
  window_ratio_ = 0;
  window_passes_ = 0;
  window_tokens_ = 0;
  result_.windows.push_back(window);
  events_.add(now_ + options_.window_s, EventKind::kWindow, 0);
}

// Nothing was lost on the way, and nothing is left behind.
void Cluster::check_end() {
  double queued = 0, carried = 0;
  for (const Node& node : nodes_) {
    for (const Read& read : node.queue) queued += read.bytes;
    carried += net_.carried(node.snic, now_);
  }
  const bool all_done = agents_done_ == agents_.size();
  require(!all_done || (queued == 0 && net_.flows() == 0), "flows or reads are left though all agents are done");
  const double least = planned_bytes_ - queued, slack = kByteSlack * std::max(1.0, planned_bytes_);
  require(carried >= least - slack && carried <= planned_bytes_ + slack,
          text(planned_bytes_, " bytes were to be read, ", queued, " of them are left, and ", carried, " were"));
  require(result_.requests.size() == finished_ && finished_ <= arrived_, "requests were lost");
  if (!all_done) return;
  require(arrived_ == finished_, text(arrived_, " requests came, ", finished_, " ended"));
  for (const Decode& decode : decodes_) {
    require(decode.requests == 0 && decode.engine.batch() == 0 && decode.waiting.empty(),
            "a decode engine has requests");
  }
  for (const PrefillEngine& engine : prefills_) require(engine.ready.empty(), "a prefill engine has requests");
  if (scheduler_) require(scheduler_->stats().requests == 0, "the scheduler has requests");
}

}  // namespace dualkv::sim
