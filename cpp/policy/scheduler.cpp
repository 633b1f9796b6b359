// The inter-engine scheduler (paper 6.1, Algorithm 1): queues, accounting of what was assigned and not yet reported.
#include "dualkv/scheduler.h"

#include <algorithm>
#include <unordered_map>

#include "base/require.h"
#include "policy/request_queue.h"

namespace dualkv {

namespace scheduling {

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
  bool reported = false;
  // As reported, and not reported yet.
  std::uint64_t reported_tokens = 0, pending_tokens = 0;
  std::uint64_t reported_requests = 0, pending_requests = 0;
  std::uint64_t reported_free = 0;
  std::uint64_t seen = 0;
  std::uint64_t last_number = 0;
  std::uint64_t born = 0;        // numbers up to this one were given before it joined: to an engine of its name, may be
  std::vector<Pending> pending;  // by number, all beyond `seen`
  std::vector<Request*> holds;

  std::uint64_t tokens() const { return reported_tokens + pending_tokens; }
  std::uint64_t requests() const { return reported_requests + pending_requests; }
  std::uint64_t free() const { return reported_free - std::min(reported_free, pending_tokens); }
};

struct Group {
  std::string name;
  EngineRole role = EngineRole::kPrefill;
  std::vector<Engine*> engines;  // in the order of joining
  std::uint64_t tokens = 0;      // of all of them
  RequestQueue queue;            // decode: dealt to this group
};

}  // namespace scheduling

namespace {

using scheduling::Engine, scheduling::Group, scheduling::Node, scheduling::Pending, scheduling::Request,
    scheduling::RequestQueue, scheduling::Side;

void add_pending(Engine& engine, const Pending& entry) {
  engine.pending.push_back(entry);
  engine.pending_tokens += entry.tokens;
  engine.pending_requests += entry.tokens > 0;
  engine.group->tokens += entry.tokens;
  engine.node->pending_reads += entry.read_tokens;
}

void drop_pending(Engine& engine, const Pending& entry) {
  engine.pending_tokens -= entry.tokens;
  engine.pending_requests -= entry.tokens > 0;
  engine.group->tokens -= entry.tokens;
  engine.node->pending_reads -= entry.read_tokens;
}

void forget_pending(Engine& engine, std::uint64_t request) {
  std::erase_if(engine.pending, [&](const Pending& entry) {
    if (entry.request != request) return false;
    drop_pending(engine, entry);
    return true;
  });
}

void take_report(Engine& engine, const EngineReport& report) {
  engine.group->tokens += report.tokens - engine.reported_tokens;
  engine.reported = true;
  engine.reported_tokens = report.tokens;
  engine.reported_requests = report.requests;
  engine.reported_free = report.free_tokens;
  engine.seen = report.seen;
  engine.node->reported_queue = report.read_queue_tokens;
  auto unseen = engine.pending.begin();
  for (; unseen != engine.pending.end() && unseen->number <= report.seen; ++unseen) drop_pending(engine, *unseen);
  engine.pending.erase(engine.pending.begin(), unseen);
}

Side& side_of(Request& request, const Engine& engine) {
  return request.prefill.engine == &engine ? request.prefill : request.decode;
}

void unassign(Request& request, Side& side) {
  if (side.engine == nullptr) return;
  Engine& engine = *side.engine;
  if (side.number > engine.seen) forget_pending(engine, request.id);
  Request* last = engine.holds.back();
  engine.holds[side.held_at] = last;
  side_of(*last, engine).held_at = side.held_at;
  engine.holds.pop_back();
  side = {};
}

void leave_queue(Request& request) {
  if (request.queue != nullptr) request.queue->erase(request);
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
    require(found != engines.end(), Code::kNotFound, "scheduler: no engine called '", name, "'");
    return found->second;
  }
  Group& home(const std::string& name, EngineRole role);
  void remove(Group& group);
  void fetch_prefill(Group& group, Fetched& out);
  void deal();
  void fetch_decode(Group& group, Fetched& out);
  std::uint64_t next_number(Engine& engine);
  void assign(Request& request, Side Request::* side, Engine& engine, const Reason& reason, Fetched& out);
  void place(Request& request, Fetched& out);
  void erase(std::uint64_t id);

  SchedulerOptions options;
  std::unordered_map<std::string, Engine> engines;
  std::unordered_map<std::string, Node> nodes;
  std::unordered_map<std::string, Group> groups;
  std::vector<Group*> decode_groups;
  std::unordered_map<std::uint64_t, Request> requests;
  RequestQueue waiting_prefill;
  RequestQueue waiting_decode;  // have a prefill engine, and are not dealt to a group yet
  std::uint64_t submitted = 0;
  std::uint64_t stale = 0;
  std::uint64_t highest = 0;  // number that any engine was given
  // Of one call, kept for their memory.
  std::vector<Engine*> reporting;
  std::vector<std::pair<std::uint64_t, Group*>> loads;
};

Scheduler::Scheduler(const SchedulerOptions& options) : state_(std::make_unique<State>(options)) {
  require(
      options.short_queue_tokens > 0 && options.full_tokens > 0, Code::kInvalidArgument,
      "scheduler: short_queue_tokens (alpha) and full_tokens (beta) must be measured and given: tokens a node reads "
      "in 3 s, tokens an engine computes in 5 s");
  require(options.even_slack >= 1, Code::kInvalidArgument, "scheduler: even_slack = ", options.even_slack,
          ": must be at least 1");
}

Scheduler::~Scheduler() = default;
Scheduler::Scheduler(Scheduler&&) noexcept = default;
Scheduler& Scheduler::operator=(Scheduler&&) noexcept = default;

void Scheduler::join(const std::string& name, EngineRole role, const std::string& group, const std::string& node) {
  State& s = *state_;
  require(!name.empty() && !group.empty() && !node.empty(), Code::kInvalidArgument,
          "scheduler: engine, group and node need names");
  require(!s.engines.contains(name), Code::kInvalidArgument, "scheduler: '", name, "' has joined already");
  Group& home = s.home(group, role);
  Engine& engine = s.engines[name];
  engine.name = name;
  engine.group = &home;
  engine.node = &s.nodes[node];
  engine.node_name = node;
  engine.born = engine.last_number = s.highest;
  ++engine.node->engines;
  home.engines.push_back(&engine);
}

// Throws for a group of the other role.
Group& Scheduler::State::home(const std::string& name, EngineRole role) {
  const auto [found, added] = groups.try_emplace(name);
  Group& group = found->second;
  require(added || group.role == role, Code::kInvalidArgument, "scheduler: group '", name, "' is of the other role");
  if (!added) return group;
  group.name = name;
  group.role = role;
  if (role == EngineRole::kDecode) decode_groups.push_back(&group);
  return group;
}

std::vector<std::uint64_t> Scheduler::leave(const std::string& name) {
  State& s = *state_;
  Engine& engine = s.engine(name);
  Group& group = *engine.group;
  std::vector<Request*> held = engine.holds;
  std::sort(held.begin(), held.end(), [](const Request* a, const Request* b) { return a->order < b->order; });
  std::vector<std::uint64_t> returned;
  for (Request* request : held) {
    leave_queue(*request);
    unassign(*request, request->prefill);
    unassign(*request, request->decode);
    s.waiting_prefill.insert(*request);
    returned.push_back(request->id);
  }
  group.tokens -= engine.reported_tokens;
  if (--engine.node->engines == 0) s.nodes.erase(engine.node_name);
  std::erase(group.engines, &engine);
  s.engines.erase(name);
  if (group.engines.empty()) s.remove(group);
  return returned;
}

// What was dealt to it is dealt again.
void Scheduler::State::remove(Group& group) {
  while (Request* request = group.queue.front()) {
    group.queue.erase(*request);
    waiting_decode.insert(*request);
  }
  std::erase(decode_groups, &group);
  groups.erase(groups.find(group.name));
}

void Scheduler::submit(std::uint64_t id, std::uint64_t tokens, std::uint64_t hit_tokens) {
  State& s = *state_;
  require(tokens > 0 && hit_tokens <= tokens, Code::kInvalidArgument, "scheduler: request ", id, " of ", tokens,
          " tokens with a hit of ", hit_tokens);
  require(!s.requests.contains(id), Code::kInvalidArgument, "scheduler: request ", id, " is known already");
  require(s.waiting_prefill.size() < s.options.max_waiting, Code::kNoSpace, "scheduler: ", s.waiting_prefill.size(),
          " requests wait; raise max_waiting, or add engines");
  Request& request = s.requests[id];
  request.id = id;
  request.order = ++s.submitted;
  request.tokens = tokens;
  request.hit_tokens = hit_tokens;
  s.waiting_prefill.insert(request);
}

Fetched Scheduler::fetch(const std::string& name, std::span<const EngineReport> reports) {
  State& s = *state_;
  const auto found = s.groups.find(name);
  require(found != s.groups.end(), Code::kNotFound, "scheduler: no group called '", name, "'");
  Group& group = found->second;
  s.reporting.clear();
  for (const EngineReport& report : reports) {
    Engine& engine = s.engine(report.engine);
    require(engine.group == &group, Code::kInvalidArgument, "scheduler: '", report.engine, "' is not of group '", name,
            "'");
    require(report.seen <= engine.last_number, Code::kInvalidArgument, "scheduler: '", report.engine, "' has seen ",
            report.seen, " of ", engine.last_number, " messages");
    s.reporting.push_back(&engine);
  }
  for (std::size_t i = 0; i < reports.size(); ++i) {
    Engine& engine = *s.reporting[i];
    const bool earlier_life = reports[i].seen > 0 && reports[i].seen <= engine.born;
    if (earlier_life || reports[i].seen < engine.seen) {
      ++s.stale;
    } else {
      take_report(engine, reports[i]);
    }
  }
  Fetched out;
  if (group.role == EngineRole::kPrefill) {
    s.fetch_prefill(group, out);
  } else {
    s.deal();
    s.fetch_decode(group, out);
  }
  return out;
}

// Algorithm 1. An engine whose node's read queue is short comes first: its storage NIC would soon idle.
void Scheduler::State::fetch_prefill(Group& group, Fetched& out) {
  const auto tokens = [](const Engine& e) { return e.tokens(); };
  const auto able = [&](const Engine& e) { return e.tokens() <= options.full_tokens; };
  const auto is_short = [&](const Engine& e) { return able(e) && e.node->queue() <= options.short_queue_tokens; };
  while (Request* request = waiting_prefill.front()) {
    Engine* engine = least(group.engines, is_short, tokens);
    Reason::Kind why = Reason::Kind::kShortQueue;
    if (engine == nullptr) {
      engine = least(group.engines, able, tokens);
      why = Reason::Kind::kNoShortQueue;
    }
    if (engine == nullptr) return;  // all are full
    waiting_prefill.erase(*request);
    assign(*request, &Request::prefill, *engine, {why, engine->tokens()}, out);
    waiting_decode.insert(*request);
  }
}

// Every request without a decode engine goes to the group with the fewest tokens, those dealt to it included.
void Scheduler::State::deal() {
  if (waiting_decode.empty()) return;
  loads.clear();
  for (Group* group : decode_groups) loads.emplace_back(group->tokens + group->queue.tokens(), group);
  // A heap with the least loaded group on top; of equal ones the first by name.
  const auto more = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second->name > b.second->name;
  };
  std::make_heap(loads.begin(), loads.end(), more);
  while (Request* request = waiting_decode.front()) {
    std::pop_heap(loads.begin(), loads.end(), more);
    auto& [tokens, group] = loads.back();
    waiting_decode.erase(*request);
    group->queue.insert(*request);
    tokens += request->tokens;
    std::push_heap(loads.begin(), loads.end(), more);
  }
}

void Scheduler::State::fetch_decode(Group& group, Fetched& out) {
  std::uint64_t free = 0, capacity = 0;
  bool all_reported = true;
  for (const Engine* engine : group.engines) {
    all_reported &= engine->reported;
    free += engine->free();
    capacity = std::max(capacity, engine->free() + engine->tokens());
  }
  // As much of the queue as would fit, were memory not in pieces.
  std::uint64_t fitting = 0;
  for (const Request* request = group.queue.front(); request != nullptr; request = request->next) {
    if (fitting + request->tokens > free) break;
    fitting += request->tokens;
  }
  const double even =
      options.even_slack * static_cast<double>(fitting + group.tokens) / static_cast<double>(group.engines.size());
  while (Request* request = group.queue.front()) {
    const auto fits = [&](const Engine& e) { return e.free() >= request->tokens; };
    const auto normal = [&](const Engine& e) {
      return fits(e) && static_cast<double>(e.tokens() + request->tokens) <= even;
    };
    Engine* engine = least(group.engines, normal, [](const Engine& e) { return e.requests(); });
    Reason why;
    if (engine != nullptr) {
      why = {Reason::Kind::kNearMean, engine->requests()};
    } else {
      engine = least(group.engines, fits, [](const Engine& e) { return e.tokens(); });
      if (engine != nullptr) why = {Reason::Kind::kAboveMean, engine->tokens()};
    }
    const bool never = engine == nullptr && all_reported && request->tokens > capacity;
    if (engine == nullptr && !never) return;  // memory will be free
    if (never) {
      out.refused.push_back({request->id, "", 0, {Reason::Kind::kTooLarge, request->tokens, capacity, group.name}});
      erase(request->id);
      continue;
    }
    group.queue.erase(*request);
    assign(*request, &Request::decode, *engine, why, out);
    place(*request, out);
  }
}

std::uint64_t Scheduler::State::next_number(Engine& engine) {
  highest = std::max(highest, ++engine.last_number);
  return engine.last_number;
}

void Scheduler::State::assign(Request& request, Side Request::* side, Engine& engine, const Reason& reason,
                              Fetched& out) {
  const std::uint64_t number = next_number(engine);
  add_pending(engine, {number, request.id, request.tokens, 0});
  request.*side = {&engine, engine.holds.size(), number};
  engine.holds.push_back(&request);
  out.assignments.push_back({request.id, engine.name, number, reason});
}

// The side whose node has the shorter read queue; the prefill side if they are equal: nothing crosses the network.
void Scheduler::State::place(Request& request, Fetched& out) {
  const Engine& prefill = *request.prefill.engine;
  const Engine& decode = *request.decode.engine;
  const Reason why{Reason::Kind::kReadQueues, prefill.node->queue(), decode.node->queue()};
  const Path read = why.second < why.first ? Path::kDecode : Path::kPrefill;
  Side& reader = read == Path::kDecode ? request.decode : request.prefill;
  reader.number = next_number(*reader.engine);
  add_pending(*reader.engine, {reader.number, request.id, 0, request.hit_tokens});
  out.placements.push_back({request.id, prefill.name, decode.name, read, reader.number, why});
}

void Scheduler::State::erase(std::uint64_t id) {
  const auto found = requests.find(id);
  if (found == requests.end()) return;
  Request& request = found->second;
  leave_queue(request);
  unassign(request, request.prefill);
  unassign(request, request.decode);
  requests.erase(found);
}

void Scheduler::prefilled(std::uint64_t id) {
  const auto found = state_->requests.find(id);
  if (found == state_->requests.end() || found->second.decode.engine == nullptr) return;
  unassign(found->second, found->second.prefill);
}

void Scheduler::finished(std::uint64_t id) { state_->erase(id); }

SchedulerStats Scheduler::stats() const {
  const State& s = *state_;
  SchedulerStats stats;
  stats.engines = static_cast<std::uint32_t>(s.engines.size());
  stats.waiting_prefill = s.waiting_prefill.size();
  stats.waiting_decode = s.waiting_decode.size();
  for (const Group* group : s.decode_groups) stats.waiting_decode += group->queue.size();
  stats.requests = s.requests.size();
  stats.reports_stale = s.stale;
  return stats;
}

}  // namespace dualkv
