// The public faces of a node: Node, Peer, Load, Incoming, Grant.
#include "dualkv/node.h"

#include <array>
#include <optional>

#include "base/text.h"
#include "memory/copier.h"
#include "memory/cuda_device.h"
#include "memory/region.h"
#include "node/load_task.h"
#include "node/node_state.h"
#include "node/serve_task.h"
#include "node/transfer_tasks.h"

namespace dualkv {

namespace {

// Runs `task` on the progress thread; what it throws is thrown here.
template <typename Task>
auto run(NodeState& node, Task task) {
  using Result = decltype(task());
  std::optional<Result> result;
  Status failure;
  node.progress().run([&] {
    try {
      if (node.closing()) throw Error(Code::kCancelled, "the node is closed");
      result.emplace(task());
    } catch (const Error& error) {
      failure = error.status();
    }
  });
  if (!failure.ok()) throw Error(failure);
  return std::move(*result);
}

// A handle whose last copy ends the task: synchronously, so that the caller's memory is free afterwards. Holds the
// node, which must outlive its tasks.
template <typename Task, typename End>
std::shared_ptr<Task> guard(std::shared_ptr<Task> task, End end) {
  Task* raw = task.get();
  auto node = task->node();
  return std::shared_ptr<Task>(raw, [task = std::move(task), node = std::move(node), end](Task*) mutable {
    node->progress().run([&] { end(*task); });
    task.reset();
  });
}

void check_layer(std::uint32_t layer, std::uint32_t layers) {
  if (layer >= layers) throw Error(Code::kInvalidArgument, text("layer ", layer, " of ", layers));
}

void check_publish(const LoadTask& load) {
  if (!load.publishes()) throw Error(Code::kInvalidArgument, "publish: the plan names no decode node");
  if (const std::uint32_t missing = load.blocks_missing(); missing > 0) {
    throw Error(Code::kInvalidArgument,
                text("publish: ", missing, " blocks of the prompt have no place yet; add_blocks() first"));
  }
}

const Status kDropped{Code::kCancelled, 0, "cancelled"};

}  // namespace

// --- Load

std::uint64_t Load::id() const { return task_->id(); }
std::uint32_t Load::layers() const { return task_->layers(); }
const std::shared_ptr<Milestones>& Load::milestones() const { return task_->milestones(); }

Status Load::wait(std::uint32_t layer, Clock::time_point until) const {
  check_layer(layer, layers());
  const auto begin = Clock::now();
  Status status = task_->milestones()->wait(layer, until);
  task_->note_wait(layer, begin, Clock::now());
  return status;
}

void Load::note_wait(std::uint32_t layer, Clock::time_point begin) const {
  check_layer(layer, layers());
  task_->note_wait(layer, begin, Clock::now());
}

void Load::add_blocks(std::span<const std::uint32_t> block_ids) {
  run(*task_->node(), [&] {
    task_->add_blocks(block_ids);
    return true;
  });
}

void Load::publish(std::uint32_t layer) {
  check_layer(layer, layers());
  check_publish(*task_);
  if (!task_->milestones()->reached(layer)) {
    const Status status = task_->milestones()->status();
    if (!status.ok()) throw Error(status);
    throw Error(Code::kInvalidArgument,
                text("publish: layer ", layer, " has not been loaded yet; wait(", layer, ") first"));
  }
  task_->node()->progress().post([task = task_, layer, now = Clock::now()] { task->publish(layer, now); });
}

void Load::wait_on_stream(std::uint32_t layer, void* stream) const {
  check_layer(layer, layers());
  task_->wait_on_stream(layer, stream);
}

void Load::open_gates(const LayerGates& gates, void* stream) { task_->open_gates(gates.state_, stream); }

std::uint32_t LayerGates::layers() const { return state_->layers(); }
void LayerGates::wait(std::uint32_t layer, void* stream) const {
  check_layer(layer, layers());
  state_->wait(layer, static_cast<cuda::Stream>(stream));
}
void LayerGates::publish(std::uint32_t layer, void* stream) const {
  check_layer(layer, layers());
  state_->publish(layer, static_cast<cuda::Stream>(stream));
}

void Load::publish(std::uint32_t layer, void* stream) {
  check_layer(layer, layers());
  check_publish(*task_);
  task_->publish_on_stream(layer, stream);
}

void Load::release(std::uint32_t layer) {
  check_layer(layer, layers());
  task_->node()->progress().post([task = task_, layer] { task->release(layer); });
}

void Load::cancel() {
  task_->node()->progress().run([this] { task_->fail(kDropped); });
}

Status Load::finish(Clock::time_point until) { return task_->milestones()->wait(layers(), until); }
LoadResult Load::result() const { return task_->result(); }
std::int64_t Load::failed_block() const { return task_->failed_block(); }

// --- Incoming

std::uint64_t Incoming::id() const { return task_->load(); }
std::uint32_t Incoming::block_count() const { return static_cast<std::uint32_t>(task_->slots().size()); }
const std::shared_ptr<Milestones>& Incoming::milestones() const { return task_->milestones(); }
Status Incoming::wait(Clock::time_point until) const { return task_->milestones()->wait(0, until); }

void Incoming::copy_to(const PagedKv& target, std::span<const std::uint32_t> block_ids,
                       std::optional<std::span<const std::uint32_t>> blocks) const {
  const std::vector<Slot> slots = task_->slots();
  const KvGeometry& geometry = task_->node()->geometry();
  if (slots.empty()) throw Error(Code::kInvalidArgument, "copy_to: the prompt is not complete, or was closed");
  if (const std::size_t wanted = blocks ? blocks->size() : slots.size(); block_ids.size() != wanted) {
    throw Error(Code::kInvalidArgument, text("copy_to: ", block_ids.size(), " block ids for ", wanted, " blocks"));
  }
  for (std::uint32_t block : blocks.value_or(std::span<const std::uint32_t>())) {
    if (block >= slots.size())
      throw Error(Code::kInvalidArgument, text("copy_to: block ", block, " of a prompt of ", slots.size(), " blocks"));
  }
  if (target.layers() != geometry.layers())
    throw Error(Code::kInvalidArgument, "copy_to: the cache has another number of layers");
  for (std::uint32_t id : block_ids) {
    if (id >= target.block_count())
      throw Error(Code::kInvalidArgument, text("copy_to: block id ", id, " of ", target.block_count(), " blocks"));
  }
  std::vector<CopyRun> runs;  // to a GPU
  for (std::size_t i = 0; i < block_ids.size(); ++i) {
    std::byte* slot = slots[blocks ? (*blocks)[i] : i].get();
    for (std::uint32_t layer = 0; layer < geometry.layers(); ++layer) {
      std::array<Extent, PagedKv::kMaxPlanes> extents;
      const auto places = std::span(extents).first(target.extents(layer, block_ids[i], extents));
      if (target.on_host()) {
        scatter(slot + geometry.layer_offset(layer), places);
      } else {
        const Extent from{slot + geometry.layer_offset(layer), geometry.layer_bytes(layer)};
        append_runs({&from, 1}, places, runs);
      }
    }
  }
  if (target.on_host()) return;
  task_->node()->prepare(target);
  CudaDevice::open(target.device())->copy_now(runs, HostSide::kFrom);
}

Operation Incoming::save(std::span<const Key> keys, std::uint32_t first_block, const Key& parent) const {
  const std::vector<Slot> slots = task_->slots();
  if (std::uint64_t{first_block} + keys.size() > slots.size()) {
    throw Error(Code::kInvalidArgument, text("save: blocks ", first_block, " + ", keys.size(), " of ", slots.size()));
  }
  return task_->node()->store().save_slots(keys, std::span(slots).subspan(first_block, keys.size()), parent);
}

void Incoming::close() {
  task_->node()->progress().run([this] { task_->close(); });
}

// --- Grant

std::uint64_t Grant::id() const { return task_->id(); }
const std::shared_ptr<Milestones>& Grant::milestones() const { return task_->milestones(); }

Status Grant::wait(std::uint32_t layer, Clock::time_point until) const {
  check_layer(layer, task_->milestones()->count());
  return task_->milestones()->wait(layer, until);
}

void Grant::revoke() {
  task_->node()->progress().run([this] { task_->end({Code::kCancelled, 0, "the grant was revoked"}); });
}

// --- Peer

bool Peer::connected() const { return node_->connected(name_); }
NodeView Peer::view() const { return node_->view_of(name_); }

Operation Peer::send_layers(SendRequest request) const {
  if (!request.source) throw Error(Code::kInvalidArgument, "send_layers: no source");
  node_->prepare(*request.source);
  const auto task = run(*node_, [&] { return SendTask::begin(*node_, name_, std::move(request)); });
  Operation operation = task->operation();
  operation.attach(guard(task, [](SendTask& send) { send.end(kDropped); }));
  return operation;
}

// --- Node

Operation Node::copy(CopyRequest request) {
  if (!request.from || !request.to) throw Error(Code::kInvalidArgument, "copy: no KV cache given");
  state_->prepare(*request.from, *request.to);
  const auto task = run(*state_, [&] { return CopyTask::begin(*state_, std::move(request)); });
  Operation operation = task->operation();
  operation.attach(guard(task, [](CopyTask& copy) { copy.end(kDropped); }));
  return operation;
}

Node::Node(const KvGeometry& geometry, NodeOptions options)
    : state_(std::make_shared<NodeState>(geometry, std::move(options))) {
  state_->start();
}

Node::~Node() { close(); }

const std::string& Node::name() const { return state_->name(); }
const KvGeometry& Node::geometry() const { return state_->geometry(); }
std::vector<std::string> Node::addresses() const { return state_->addresses(); }
Store& Node::store() { return state_->store(); }
StagingPool& Node::staging() { return state_->pool(); }
NodeView Node::view() const { return state_->view(); }
NodeStats Node::stats() const { return state_->stats(); }
void Node::close() { state_->close(); }

Peer Node::connect(const std::string& address, double timeout_s) {
  return Peer(state_, state_->connect(address, timeout_s));
}

Peer Node::peer(const std::string& name) {
  if (!state_->knows(name)) throw Error(Code::kNotFound, text("no node called '", name, "' has connected"));
  return Peer(state_, name);
}

std::shared_ptr<std::byte> Node::allocate(std::uint64_t bytes) {
  if (bytes == 0) throw Error(Code::kInvalidArgument, "allocate: 0 bytes");
  const StagingOptions& like = state_->options().staging;
  const auto region = std::make_shared<Region>(bytes, RegionOptions{like.huge_pages, like.numa_node, true});
  if (like.lock_memory) region->lock(0, region->mapped_bytes());
  const std::uint32_t id = run(*state_, [&] { return state_->share(region->memory(), region->shared_fd()); });
  return std::shared_ptr<std::byte>(region->memory().data(), [node = state_, region, id](std::byte*) {
    node->progress().run([&] { node->unshare(id); });
  });
}

void Node::prepare(const PagedKv& cache) { state_->prepare(cache); }
LayerGates Node::layer_gates(int gpu) {
  return LayerGates(
      std::make_shared<GateState>(state_->shared_progress(), CudaDevice::open(gpu), state_->geometry().layers()));
}

Load Node::load(LoadRequest request) {
  if (request.into) state_->prepare(*request.into);
  auto task = run(*state_, [&] { return LoadTask::begin(*state_, std::move(request)); });
  return Load(guard(std::move(task), [](LoadTask& load) { load.fail(kDropped); }));
}

Incoming Node::incoming(std::uint64_t load_id, double deadline_s) {
  auto task = run(*state_, [&] {
    auto incoming = state_->incoming(load_id, Clock::now() + seconds(deadline_s));
    if (!incoming->claim())
      throw Error(Code::kInvalidArgument, text("incoming: load ", load_id, " has been claimed already"));
    return incoming;
  });
  return Incoming(guard(std::move(task), [](IncomingTask& incoming) { incoming.close(); }));
}

Grant Node::grant(const std::string& peer, std::shared_ptr<const PagedKv> into, std::vector<std::uint32_t> block_ids,
                  double deadline_s) {
  if (!into) throw Error(Code::kInvalidArgument, "grant: no KV cache given (into)");
  state_->prepare(*into);
  auto task =
      run(*state_, [&] { return GrantTask::begin(*state_, peer, std::move(into), std::move(block_ids), deadline_s); });
  return Grant(
      guard(std::move(task), [](GrantTask& grant) { grant.end({Code::kCancelled, 0, "the grant was dropped"}); }));
}

}  // namespace dualkv
