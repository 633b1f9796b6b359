// The inter-engine scheduler (paper 6.1, Algorithm 1): queues, accounting of what was assigned and not yet reported.
#include "dualkv/scheduler.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {

struct Request;

struct Node {
  std::uint64_t reported_queue = 0;  // tokens
  std::uint64_t pending_reads = 0;   // asked for since
  std::uint32_t engines = 0;

  std::uint64_t queue() const { return reported_queue + pending_reads; }
};

// Told to an engine, and not in its report yet.
struct Pending {
  std::uint64_t number;
  std::uint64_t request;
  std::uint64_t tokens;       // 0: a placement
  std::uint64_t read_tokens;  // 0: an assignment
};

struct Group;

struct Engine {
  std::string name;
  Group* group = nullptr;
  Node* node = nullptr;
  std::string node_name;
  EngineReport report;
  std::deque<Pending> pending;
  std::uint64_t pending_tokens = 0;
  std::uint32_t pending_requests = 0;
  std::uint64_t last_number = 0;
  std::unordered_set<std::uint64_t> holds;

  std::uint64_t tokens() const { return report.tokens + pending_tokens; }
  std::uint64_t requests() const { return std::uint64_t{report.requests} + pending_requests; }
  std::uint64_t free() const { return report.free_tokens - std::min(report.free_tokens, pending_tokens); }
};

// Requests in the order of their submission: one that returns takes its old place.
using Queue = std::map<std::uint64_t, Request*>;

struct Group {
  std::string name;
  EngineRole role = EngineRole::kPrefill;
  std::vector<Engine*> engines;  // in the order of joining
  Queue queue;                   // decode: dealt to this group
  std::uint64_t queued_tokens = 0;
};

struct Request {
  std::uint64_t id = 0;
  std::uint64_t order = 0;
  std::uint64_t tokens = 0;
  std::uint64_t hit_tokens = 0;
  Engine* prefill = nullptr;
  Engine* decode = nullptr;
  Group* dealt_to = nullptr;
};

void require(bool fine, Code code, const std::string& message) {
  if (!fine) throw Error(code, message);
}

void add_pending(Engine& engine, const Pending& entry) {
  engine.pending.push_back(entry);
  engine.pending_tokens += entry.tokens;
  engine.pending_requests += entry.tokens > 0;
  engine.node->pending_reads += entry.read_tokens;
}

void drop_pending(Engine& engine, const Pending& entry) {
  engine.pending_tokens -= entry.tokens;
  engine.pending_requests -= entry.tokens > 0;
  engine.node->pending_reads -= entry.read_tokens;
}

void forget_pending(Engine& engine, std::uint64_t request) {
  std::erase_if(engine.pending, [&](const Pending& entry) {
    if (entry.request != request) return false;
    drop_pending(engine, entry);
    return true;
  });
}

// The first of the smallest; null if none is able.
template <typename Able, typename Cost>
Engine* least(const std::vector<Engine*>& engines, Able able, Cost cost) {
  Engine* best = nullptr;
  for (Engine* engine : engines) {
    if (able(*engine) && (best == nullptr || cost(*engine) < cost(*best))) best = engine;
  }
  return best;
}

}  // namespace

struct Scheduler::State {
  explicit State(const SchedulerOptions& given) : options(given) {}

  Engine& engine(const std::string& name) {
    const auto found = engines.find(name);
    require(found != engines.end(), Code::kNotFound, text("scheduler: no engine called '", name, "'"));
    return found->second;
  }
  void take_reports(std::span<const EngineReport> reports);
  void fetch_prefill(Group& group, Fetched& out);
  void deal();
  void fetch_decode(Group& group, Fetched& out);
  void assign(Request& request, Engine& engine, std::string reason, Fetched& out);
  void place(Request& request, Fetched& out);
  void unassign(Request& request, Engine*& side);
  void erase(std::uint64_t id);
  void leave_queues(Request& request);

  SchedulerOptions options;
  std::unordered_map<std::string, Engine> engines;
  std::unordered_map<std::string, Node> nodes;
  std::map<std::string, Group> groups;
  std::unordered_map<std::uint64_t, Request> requests;
  Queue waiting_prefill;
  Queue waiting_decode;  // have a prefill engine, and are not dealt to a group yet
  std::uint64_t submitted = 0;
  std::uint64_t stale = 0;
};

Scheduler::Scheduler(const SchedulerOptions& options) : state_(std::make_unique<State>(options)) {
  require(
      options.short_queue_tokens > 0 && options.full_tokens > 0, Code::kInvalidArgument,
      "scheduler: short_queue_tokens (alpha) and full_tokens (beta) must be measured and given: tokens a node reads "
      "in 3 s, tokens an engine computes in 5 s");
  require(options.even_slack >= 1, Code::kInvalidArgument,
          text("scheduler: even_slack = ", options.even_slack, ": must be at least 1"));
}

Scheduler::~Scheduler() = default;
Scheduler::Scheduler(Scheduler&&) noexcept = default;
Scheduler& Scheduler::operator=(Scheduler&&) noexcept = default;

void Scheduler::join(const std::string& name, EngineRole role, const std::string& group, const std::string& node) {
  State& s = *state_;
  require(!name.empty() && !group.empty() && !node.empty(), Code::kInvalidArgument,
          "scheduler: engine, group and node need names");
  require(!s.engines.contains(name), Code::kInvalidArgument, text("scheduler: '", name, "' has joined already"));
  const auto known = s.groups.find(group);
  require(known == s.groups.end() || known->second.role == role, Code::kInvalidArgument,
          text("scheduler: group '", group, "' is of the other role"));
  Group& home = s.groups[group];
  home.name = group;
  home.role = role;
  Engine& engine = s.engines[name];
  engine.name = name;
  engine.group = &home;
  engine.node = &s.nodes[node];
  engine.node_name = node;
  ++engine.node->engines;
  home.engines.push_back(&engine);
}

std::vector<std::uint64_t> Scheduler::leave(const std::string& name) {
  State& s = *state_;
  Engine& engine = s.engine(name);
  Group& group = *engine.group;
  std::vector<std::uint64_t> returned;
  const std::unordered_set<std::uint64_t> held = std::move(engine.holds);
  engine.holds.clear();
  for (std::uint64_t id : held) {
    Request& request = s.requests.at(id);
    s.leave_queues(request);
    if (request.prefill != nullptr) s.unassign(request, request.prefill);
    if (request.decode != nullptr) s.unassign(request, request.decode);
    s.waiting_prefill[request.order] = &request;
    returned.push_back(id);
  }
  std::sort(returned.begin(), returned.end(),
            [&](std::uint64_t a, std::uint64_t b) { return s.requests.at(a).order < s.requests.at(b).order; });
  while (!engine.pending.empty()) {
    drop_pending(engine, engine.pending.front());
    engine.pending.pop_front();
  }
  if (--engine.node->engines == 0) s.nodes.erase(engine.node_name);
  std::erase(group.engines, &engine);
  s.engines.erase(name);
  if (group.engines.empty()) {
    for (auto& [order, request] : group.queue) {
      request->dealt_to = nullptr;
      s.waiting_decode[order] = request;
    }
    s.groups.erase(s.groups.find(group.name));
  }
  return returned;
}

void Scheduler::submit(std::uint64_t id, std::uint64_t tokens, std::uint64_t hit_tokens) {
  State& s = *state_;
  require(tokens > 0 && hit_tokens <= tokens, Code::kInvalidArgument,
          text("scheduler: request ", id, " of ", tokens, " tokens with a hit of ", hit_tokens));
  require(!s.requests.contains(id), Code::kInvalidArgument, text("scheduler: request ", id, " is known already"));
  require(s.waiting_prefill.size() < s.options.max_waiting, Code::kNoSpace,
          text("scheduler: ", s.waiting_prefill.size(), " requests wait; raise max_waiting, or add engines"));
  Request& request = s.requests[id];
  request.id = id;
  request.order = ++s.submitted;
  request.tokens = tokens;
  request.hit_tokens = hit_tokens;
  s.waiting_prefill[request.order] = &request;
}

Fetched Scheduler::fetch(const std::string& name, std::span<const EngineReport> reports) {
  State& s = *state_;
  const auto found = s.groups.find(name);
  require(found != s.groups.end(), Code::kNotFound, text("scheduler: no group called '", name, "'"));
  for (const EngineReport& report : reports) {
    const Engine& engine = s.engine(report.engine);
    require(engine.group == &found->second, Code::kInvalidArgument,
            text("scheduler: '", report.engine, "' is not of group '", name, "'"));
    require(report.seen <= engine.last_number, Code::kInvalidArgument,
            text("scheduler: '", report.engine, "' has seen ", report.seen, " of ", engine.last_number, " messages"));
  }
  s.take_reports(reports);
  Fetched out;
  if (found->second.role == EngineRole::kPrefill) {
    s.fetch_prefill(found->second, out);
  } else {
    s.deal();
    s.fetch_decode(found->second, out);
  }
  return out;
}

void Scheduler::State::take_reports(std::span<const EngineReport> reports) {
  for (const EngineReport& report : reports) {
    Engine& engine = this->engine(report.engine);
    if (report.seen < engine.report.seen) {
      ++stale;
      continue;
    }
    engine.report = report;
    engine.node->reported_queue = report.read_queue_tokens;
    while (!engine.pending.empty() && engine.pending.front().number <= report.seen) {
      drop_pending(engine, engine.pending.front());
      engine.pending.pop_front();
    }
  }
}

// Algorithm 1. An engine whose node's read queue is short comes first: its storage NIC would soon idle.
void Scheduler::State::fetch_prefill(Group& group, Fetched& out) {
  const auto tokens = [](const Engine& e) { return e.tokens(); };
  const auto able = [&](const Engine& e) { return e.tokens() <= options.full_tokens; };
  const auto is_short = [&](const Engine& e) { return able(e) && e.node->queue() <= options.short_queue_tokens; };
  while (!waiting_prefill.empty()) {
    Engine* engine = least(group.engines, is_short, tokens);
    std::string why = "its node's read queue is short; fewest tokens of such: ";
    if (engine == nullptr) {
      engine = least(group.engines, able, tokens);
      why = "no read queue is short; fewest tokens: ";
    }
    if (engine == nullptr) return;  // all are full
    Request& request = *waiting_prefill.begin()->second;
    waiting_prefill.erase(waiting_prefill.begin());
    request.prefill = engine;
    assign(request, *engine, why + std::to_string(engine->tokens()), out);
    waiting_decode[request.order] = &request;
  }
}

// Every request without a decode engine goes to the group with the fewest tokens, those dealt to it included.
void Scheduler::State::deal() {
  if (waiting_decode.empty()) return;
  std::vector<std::pair<std::uint64_t, Group*>> loads;
  for (auto& [name, group] : groups) {
    if (group.role != EngineRole::kDecode) continue;
    std::uint64_t tokens = group.queued_tokens;
    for (const Engine* engine : group.engines) tokens += engine->tokens();
    loads.emplace_back(tokens, &group);
  }
  // A heap with the least loaded group on top; of equal ones the first by name.
  const auto more = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second->name > b.second->name;
  };
  std::make_heap(loads.begin(), loads.end(), more);
  for (auto& [order, request] : waiting_decode) {
    std::pop_heap(loads.begin(), loads.end(), more);
    auto& [tokens, group] = loads.back();
    group->queue[order] = request;
    group->queued_tokens += request->tokens;
    request->dealt_to = group;
    tokens += request->tokens;
    std::push_heap(loads.begin(), loads.end(), more);
  }
  waiting_decode.clear();
}

void Scheduler::State::fetch_decode(Group& group, Fetched& out) {
  std::uint64_t free = 0, tokens = 0, capacity = 0;
  bool all_reported = true;
  for (const Engine* engine : group.engines) {
    all_reported &= !engine->report.engine.empty();
    free += engine->free();
    tokens += engine->tokens();
    capacity = std::max(capacity, engine->free() + engine->tokens());
  }
  // As much of the queue as would fit, were memory not in pieces.
  std::uint64_t fitting = 0;
  for (const auto& [order, request] : group.queue) {
    if (fitting + request->tokens > free) break;
    fitting += request->tokens;
  }
  const double even =
      options.even_slack * static_cast<double>(fitting + tokens) / static_cast<double>(group.engines.size());
  while (!group.queue.empty()) {
    Request& request = *group.queue.begin()->second;
    const auto fits = [&](const Engine& e) { return e.free() >= request.tokens; };
    const auto normal = [&](const Engine& e) {
      return fits(e) && static_cast<double>(e.tokens() + request.tokens) <= even;
    };
    Engine* engine = least(group.engines, normal, [](const Engine& e) { return e.requests(); });
    std::string why;
    if (engine != nullptr) {
      why = "within reach of the mean; fewest requests of such: " + std::to_string(engine->requests());
    } else {
      engine = least(group.engines, fits, [](const Engine& e) { return e.tokens(); });
      if (engine != nullptr) why = "all are above the mean; fewest tokens: " + std::to_string(engine->tokens());
    }
    const bool never = engine == nullptr && all_reported && request.tokens > capacity;
    if (engine == nullptr && !never) return;  // memory will be free
    group.queue.erase(group.queue.begin());
    group.queued_tokens -= request.tokens;
    request.dealt_to = nullptr;
    if (never) {
      out.refused.push_back({request.id, "", 0,
                             text("needs ", request.tokens, " tokens of memory; the largest engine of '", group.name,
                                  "' has ", capacity, " in all")});
      erase(request.id);
      continue;
    }
    request.decode = engine;
    assign(request, *engine, std::move(why), out);
    place(request, out);
  }
}

void Scheduler::State::assign(Request& request, Engine& engine, std::string reason, Fetched& out) {
  const std::uint64_t number = ++engine.last_number;
  add_pending(engine, {number, request.id, request.tokens, 0});
  engine.holds.insert(request.id);
  out.assignments.push_back({request.id, engine.name, number, std::move(reason)});
}

// The side whose node has the shorter read queue; the prefill side if they are equal: nothing crosses the network.
void Scheduler::State::place(Request& request, Fetched& out) {
  const std::uint64_t prefill = request.prefill->node->queue(), decode = request.decode->node->queue();
  const bool there = decode < prefill;
  Engine& reader = there ? *request.decode : *request.prefill;
  const std::uint64_t number = ++reader.last_number;
  add_pending(reader, {number, request.id, 0, request.hit_tokens});
  out.placements.push_back(
      {request.id, request.prefill->name, request.decode->name, there ? Path::kDecode : Path::kPrefill, number,
       "read queues in tokens: prefill " + std::to_string(prefill) + ", decode " + std::to_string(decode)});
}

void Scheduler::State::unassign(Request& request, Engine*& side) {
  forget_pending(*side, request.id);
  side->holds.erase(request.id);
  side = nullptr;
}

void Scheduler::State::leave_queues(Request& request) {
  waiting_prefill.erase(request.order);
  waiting_decode.erase(request.order);
  if (request.dealt_to == nullptr) return;
  request.dealt_to->queue.erase(request.order);
  request.dealt_to->queued_tokens -= request.tokens;
  request.dealt_to = nullptr;
}

void Scheduler::State::erase(std::uint64_t id) {
  const auto found = requests.find(id);
  if (found == requests.end()) return;
  Request& request = found->second;
  leave_queues(request);
  if (request.prefill != nullptr) unassign(request, request.prefill);
  if (request.decode != nullptr) unassign(request, request.decode);
  requests.erase(found);
}

void Scheduler::prefilled(std::uint64_t id) {
  const auto found = state_->requests.find(id);
  if (found == state_->requests.end() || found->second.prefill == nullptr || found->second.decode == nullptr) return;
  state_->unassign(found->second, found->second.prefill);
}

void Scheduler::finished(std::uint64_t id) { state_->erase(id); }

SchedulerStats Scheduler::stats() const {
  const State& s = *state_;
  SchedulerStats stats;
  stats.engines = static_cast<std::uint32_t>(s.engines.size());
  stats.waiting_prefill = s.waiting_prefill.size();
  stats.waiting_decode = s.waiting_decode.size();
  for (const auto& [name, group] : s.groups) stats.waiting_decode += group.queue.size();
  stats.requests = s.requests.size();
  stats.reports_stale = s.stale;
  return stats;
}

}  // namespace dualkv
