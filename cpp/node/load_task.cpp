// The load state machine: plan -> ask and read -> deliver -> publish -> finish; and failover between sources.
#include "node/load_task.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "base/hash.h"
#include "base/require.h"
#include "base/text.h"
#include "memory/copier.h"
#include "storage/block_format.h"

namespace dualkv {

namespace {

constexpr std::size_t kMaxSources = 32;              // bits of Block::tried
constexpr std::size_t kMaxBlocksPerMessage = 65536;  // 37 bytes each: well within a message's 4 MiB

std::uint32_t layers_per_read(const LoadRequest& request, std::uint32_t layers) {
  const std::uint32_t window = request.window_layers;
  // Half a window, so that one half is read while the other is computed.
  const std::uint32_t most = window == 0 || window >= layers ? layers : std::max(1u, window / 2);
  return request.layers_per_read == 0 ? most : std::min(request.layers_per_read, most);
}

}  // namespace

std::shared_ptr<LoadTask> LoadTask::begin(NodeState& node, LoadRequest request) {
  std::shared_ptr<LoadTask> task(new LoadTask(node, std::move(request)));
  task->check_request();
  node.know(task->request_.into);
  task->port_ = node.port(*task->request_.into);
  if (task->port_ != nullptr) {
    task->device_ = CudaDevice::open(task->request_.into->device());
    task->landing_.emplace(*task->port_, task->owner_);
    task->flags_ = task->port_->take_flags();
    require(task->flags_ != nullptr, Code::kNoSpace, "load: no pinned memory for the flags that a GPU waits for");
    task->flag_ = *reinterpret_cast<const std::uint32_t*>(task->flags_.get()) + 1;
  }
  const Plan& plan = task->request_.plan;
  task->add_source(node.name(), Path::kPrefill, true);
  if (!plan.decode.empty()) {
    task->add_source(plan.decode, Path::kDecode, true);
    task->decode_source_ = 1;
  }
  for (const PathRange& range : plan.ranges) task->add_source(range.node, range.path, true);
  for (const std::string& helper : plan.helpers) task->add_source(helper, Path::kHelper, false);
  node.add_load(task->id_, task);
  node.add_task(task);
  task->open_sources();
  return task;
}

LoadTask::LoadTask(NodeState& node, LoadRequest request)
    : node_(node),
      request_(std::move(request)),
      id_(request_.load_id != 0 ? request_.load_id : random_u64() >> 1),
      block_ids_(request_.block_ids),
      prompt_blocks_(request_.prompt_blocks != 0 ? request_.prompt_blocks
                                                 : static_cast<std::uint32_t>(block_ids_.size())),
      blocks_missing_(prompt_blocks_ - std::min(prompt_blocks_, static_cast<std::uint32_t>(block_ids_.size()))),
      layers_(node.geometry().layers()),
      hit_(static_cast<std::uint32_t>(request_.plan.keys.size())),
      started_(Clock::now()),
      deadline_(started_ + seconds(request_.deadline_s)),
      milestones_(std::make_shared<Milestones>(layers_ + 1)) {
  blocks_.resize(hit_);
  for (Block& block : blocks_) block.layers_left = layers_;
  found_.resize(std::size_t{layers_} * hit_);
  from_decode_.resize(std::size_t{layers_} * hit_);
  checksums_.resize(std::size_t{layers_} * hit_);
  layer_left_.assign(layers_, hit_);
  published_.resize(layers_);
  const std::uint32_t window = request_.window_layers;
  credit_ = window == 0 ? layers_ : std::min(window, layers_);
  per_read_ = layers_per_read(request_, layers_);
  result_.reason = request_.plan.reason;
  layer_publish_pending_.resize(layers_);
  result_.started_s = std::chrono::duration<double>(started_.time_since_epoch()).count();
  for (auto* times : {&result_.layer_ready_s, &result_.layer_wait_begin_s, &result_.layer_wait_end_s,
                      &result_.layer_published_s, &result_.layer_publish_done_s}) {
    times->resize(layers_);
  }
}

LoadTask::~LoadTask() = default;

void LoadTask::check_request() const {
  const auto invalid = Code::kInvalidArgument;
  check_plan(request_.plan);
  require(request_.into != nullptr, invalid, "load: no KV cache given (into)");
  require(request_.into->layers() == layers_, invalid, "load: the KV cache has another number of layers");
  require(request_.layers_per_read <= layers_, invalid, "load: layers_per_read ", request_.layers_per_read,
          ": the model has ", layers_, " layers");
  require(request_.deadline_s > 0 && request_.deadline_s <= 86400, invalid, "load: deadline ", request_.deadline_s,
          " s: must be more than 0 and at most a day");
  require(block_ids_.size() >= hit_, invalid, "load: ", block_ids_.size(), " block ids for a hit of ", hit_, " blocks");
  check_places(block_ids_);
  require(!node_.has_load(id_), invalid, "load: a load of id ", id_, " is in progress");
  require(request_.plan.prefill.empty() || request_.plan.prefill == node_.name(), invalid, "load: the plan is for '",
          request_.plan.prefill, "', this node is '", node_.name(), "'");
  require(request_.plan.decode != node_.name(), invalid, "load: the decode node is this node; leave it empty");
  require(node_.active_loads() < node_.options().max_loads, Code::kNoSpace, "load: ", node_.active_loads(),
          " loads in progress; raise `max_loads` or finish some");
}

// `ids`: all of the load's.
void LoadTask::check_places(std::vector<std::uint32_t> ids) const {
  const auto invalid = Code::kInvalidArgument;
  require(ids.size() <= prompt_blocks_, invalid, "load: ", ids.size(), " block ids for a prompt of ", prompt_blocks_,
          " blocks");
  std::sort(ids.begin(), ids.end());
  require(ids.empty() || ids.back() < request_.into->block_count(), invalid, "load: block id ",
          ids.empty() ? 0 : ids.back(), " of ", request_.into->block_count(), " blocks");
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  require(twice == ids.end(), invalid, "load: block id ", twice == ids.end() ? 0 : *twice, " is given twice");
}

void LoadTask::add_blocks(std::span<const std::uint32_t> more) {
  std::vector<std::uint32_t> ids = block_ids_;
  ids.insert(ids.end(), more.begin(), more.end());
  check_places(ids);
  block_ids_ = std::move(ids);
  blocks_missing_ = prompt_blocks_ - static_cast<std::uint32_t>(block_ids_.size());
}

void LoadTask::add_source(const std::string& name, Path path, bool required) {
  for (const auto& source : sources_) {
    if (source->name == name) return;
  }
  std::shared_ptr<Link> link;
  if (!sources_.empty()) {
    link = node_.find_link(name);
    if (!link && !required) return;
    require(link != nullptr, Code::kPeerLost, "load: node '", name, "' of the plan is not connected");
  }
  require(sources_.size() < kMaxSources, Code::kInvalidArgument, "load: more than ", kMaxSources, " nodes in a plan");
  if (path == Path::kDecode) {
    const std::uint32_t most = node_.view_of(name).prompt_slots;
    require(most == 0 || prompt_blocks_ <= most, Code::kNoSpace, "load: the prompt has ", prompt_blocks_,
            " blocks, the staging of '", name, "' can hold ", most, "; raise its `staging`");
  }
  auto source = std::make_unique<Source>();
  source->load = this;
  source->index = sources_.size();
  source->name = name;
  source->path = path;
  source->link = std::move(link);
  source->result.node = name;
  source->result.path = path;
  source->result.layer_first_s.resize(layers_);
  source->result.layer_done_s.resize(layers_);
  sources_.push_back(std::move(source));
}

void LoadTask::open_sources() {
  const std::weak_ptr<LoadTask> weak = weak_from_this();
  timer_ = node_.progress().at(deadline_, [weak] {
    const auto self = weak.lock();
    if (!self) return;
    self->timer_ = 0;
    self->fail({Code::kTimeout, 0,
                text("load: not complete after its deadline of ", self->request_.deadline_s, " s; ",
                     self->layers_ready_, " of ", self->layers_, " layers were ready")});
  });
  std::vector<std::vector<std::uint32_t>> shares(sources_.size());
  for (const PathRange& range : request_.plan.ranges) {
    const auto source =
        std::find_if(sources_.begin(), sources_.end(), [&](const auto& s) { return s->name == range.node; });
    for (std::uint32_t i = range.first; i < range.first + range.count; ++i) {
      blocks_[i].source = static_cast<std::uint16_t>((*source)->index);
      blocks_[i].tried = 1u << (*source)->index;
      shares[(*source)->index].push_back(i);
    }
  }
  reads_ = std::make_unique<BlockReads>(
      node_.storage(), per_read_, credit_,
      [weak](std::uint32_t block, LayerRange layers, ReadResult result) {
        if (const auto self = weak.lock()) self->on_read(block, layers, std::move(result));
      },
      port_ != nullptr ? port_->gds() : nullptr);
  for (std::size_t i = 1; i < sources_.size(); ++i) open_source(*sources_[i], shares[i]);
  for (std::uint32_t block : shares[0]) read_here(block);
  reads_->pump();
  if (hit_ == 0) {
    for (std::uint32_t layer = 0; layer < layers_; ++layer) layer_ready(layer);
  }
  maybe_finish();
}

void LoadTask::open_source(Source& source, const std::vector<std::uint32_t>& blocks) {
  source.grant = node_.grants().add(source, source.name);
  OpenLoad open;
  open.load = id_;
  open.decode = source.index == decode_source_;
  open.time_left_us = microseconds_until(deadline_);
  open.prompt_blocks = prompt_blocks_;
  open.layers_per_read = per_read_;
  open.credit_layers = credit_;
  open.grant = source.grant;
  node_.send(*source.link, open);
  ask(source, blocks);
}

void LoadTask::ask(Source& source, const std::vector<std::uint32_t>& blocks) {
  if (blocks.empty()) return;
  const std::uint64_t bytes = blocks.size() * node_.geometry().block_bytes();
  source.asked_bytes += bytes;
  node_.add_asked(source.name, static_cast<std::int64_t>(bytes));
  for (std::size_t first = 0; first < blocks.size(); first += kMaxBlocksPerMessage) {
    ReadBlocks message{id_, {}};
    const std::size_t last = std::min(first + kMaxBlocksPerMessage, blocks.size());
    for (std::size_t i = first; i < last; ++i) message.blocks.push_back({blocks[i], request_.plan.keys[blocks[i]]});
    node_.send(*source.link, message);
  }
}

void LoadTask::read_here(std::uint32_t block) { reads_->add(block, request_.plan.keys[block]); }

void LoadTask::on_read(std::uint32_t block, LayerRange layers, ReadResult result) {
  if (ended_) return;
  if (!result.outcome.ok()) {
    // What is stored may be right all the same.
    if (result.gpu_slot && result.outcome.code != Code::kNotFound) return read_again(block, layers.first);
    blocks_[block].corrupt_in_storage |= result.outcome.code == Code::kCorrupt;
    if (blocks_[block].source == 0) {
      take_over(0, {block}, {result.outcome.code, result.outcome.os_errno, result.reason});
    }
    return;
  }
  const KvGeometry& geometry = node_.geometry();
  const std::span<const std::byte> trailer(result.slot.get() + geometry.payload_bytes(), geometry.trailer_bytes());
  for (std::uint32_t layer = layers.first; layer < layers.first + layers.count && !ended_; ++layer) {
    if (!wanted(0, layer, block)) continue;
    const std::uint64_t checksum = trailer_checksum(trailer, layer);
    if (result.gpu_slot) {
      check_in_gpu(result.gpu_slot, layer, block, checksum);
      continue;
    }
    if (copier() != nullptr) {
      copy_in(*sources_[0], result.slot.get() + geometry.layer_offset(layer), /*on_gpu=*/false, result.slot, layer,
              block, checksum);
      continue;
    }
    std::array<Extent, PagedKv::kMaxPlanes> target;
    const std::size_t count = request_.into->extents(layer, block_ids_[block], target);
    scatter(result.slot.get() + geometry.layer_offset(layer), std::span<const Extent>(target).first(count));
    deliver(*sources_[0], layer, block, checksum);
  }
}

// Before it is copied on, so that what is wrong never is in the cache, where another may have brought what is right.
void LoadTask::check_in_gpu(const FreePieces::Piece& slot, std::uint32_t layer, std::uint32_t block,
                            std::uint64_t checksum) {
  const Extent where{slot.get() + node_.geometry().layer_offset(layer), node_.geometry().layer_bytes(layer)};
  port_->within().verify({&where, 1}, owner_, slot, checksum,
                         [weak = weak_from_this(), slot, where, layer, block, checksum](const Status& status) {
                           const auto self = weak.lock();
                           if (!self || !self->wanted(0, layer, block)) return;
                           if (status.code == Code::kCorrupt) return self->read_again(block, layer);
                           if (!status.ok()) return self->fail(status);
                           self->port_->add_gds_bytes(self->node_.geometry().layer_bytes(layer));
                           self->copy_in(*self->sources_[0], where.data, /*on_gpu=*/true, slot, layer, block, checksum);
                         });
}

void LoadTask::read_again(std::uint32_t block, std::uint32_t layer) {
  if (blocks_[block].source == 0 && reads_->read_again(block, layer)) node_.on_fallback("gds_read_failed");
}

Copier* LoadTask::copier() const {
  if (port_ != nullptr) return &port_->in();
  return node_.copier();
}

// Once for each Layer Block: a copy that came late would fall on a later layer, where layers share their memory.
void LoadTask::copy_in(Source& from, std::byte* bytes, bool on_gpu, const std::shared_ptr<void>& keep,
                       std::uint32_t layer, std::uint32_t block, std::uint64_t checksum) {
  std::array<Extent, PagedKv::kMaxPlanes> places;
  const std::size_t count = request_.into->extents(layer, block_ids_[block], places);
  const auto target = std::span<const Extent>(places).first(count);
  const Extent source{bytes, node_.geometry().layer_bytes(layer)};
  const auto done = [weak = weak_from_this(), &from, layer, block, checksum](const Status& status) {
    const auto self = weak.lock();
    if (!self || self->ended_) return;
    if (!status.ok()) return self->fail(status);
    self->deliver(from, layer, block, checksum);
  };
  found_[slot_of(layer, block)] = true;
  if (port_ == nullptr) return node_.copier()->copy({&source, 1}, target, owner_, keep, done);
  port_->copy_in(source, on_gpu, target, owner_, keep, checksum, done);
}

bool LoadTask::wanted(std::size_t source, std::uint32_t layer, std::uint32_t block) const {
  return !ended_ && block < hit_ && layer < credit_ && blocks_[block].source == source &&
         !found_[slot_of(layer, block)];
}

bool LoadTask::all_found(std::uint32_t block) const {
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    if (!found_[slot_of(layer, block)]) return false;
  }
  return true;
}

GrantSink::Target LoadTask::Source::target(std::uint32_t layer, std::uint32_t block, Writer writer,
                                           std::span<Extent> out) {
  if (!load->wanted(index, layer, block)) return {};
  if (!load->landing_) return {load->request_.into->extents(layer, load->block_ids_[block], out)};
  bool full = false;
  const Target target =
      load->landing_->target(load->slot_of(layer, block), load->node_.geometry().layer_bytes(layer), writer, out, full);
  // This very write is refused; another brings the block, this node itself if it may, whose reads land in the staging.
  if (full) {
    load->node_.progress().post([weak = load->weak_from_this(), index = index, block] {
      const auto self = weak.lock();
      if (!self || self->ended_) return;
      self->node_.on_fallback("gpu_bounce_full");
      self->take_over(index, {block},
                      {Code::kNoSpace, 0, "no pinned memory is left for what peers send to a GPU; raise `gpu_bounce`"});
    });
  }
  return target;
}

void LoadTask::Source::arrived(const std::string&, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum,
                               Check check) {
  const auto keep = load->shared_from_this();
  if (load->ended_) return;
  if (check == Check::kWrong) return arrived_wrong(layer, block);
  if (load->landing_) return load->land(*this, layer, block, checksum);
  load->deliver(*this, layer, block, checksum);
}

void LoadTask::Source::arrived_wrong(std::uint32_t layer, std::uint32_t block) {
  load->take_over(index, {block}, {Code::kCorrupt, 0, text("layer ", layer, " arrived with a wrong checksum")});
}

void LoadTask::land(Source& source, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum) {
  landing_->land(
      slot_of(layer, block), node_.geometry().layer_bytes(layer), checksum,
      [weak = weak_from_this(), &source, layer, block, checksum](const FreePieces::Piece& piece, bool on_gpu) {
        const auto self = weak.lock();
        if (!self || !self->wanted(source.index, layer, block)) return;
        self->copy_in(source, piece.get(), on_gpu, piece, layer, block, checksum);
      },
      [weak = weak_from_this(), &source, layer, block](const Status& why) {
        const auto self = weak.lock();
        if (!self || !self->wanted(source.index, layer, block)) return;
        if (why.code == Code::kCorrupt) return source.arrived_wrong(layer, block);
        self->fail(why);
      });
}

void LoadTask::deliver(Source& source, std::uint32_t layer, std::uint32_t block, std::uint64_t checksum) {
  const std::size_t at = slot_of(layer, block);
  found_[at] = true;
  from_decode_[at] = source.index != 0 && source.index == decode_source_;
  checksums_[at] = checksum;
  const std::uint64_t bytes = node_.geometry().layer_bytes(layer);
  if (source.link && source.asked_bytes >= bytes) {
    source.asked_bytes -= bytes;
    node_.add_asked(source.name, -static_cast<std::int64_t>(bytes));
  }
  PathResult& path = source.result;
  const double now = now_s();
  if (path.bytes == 0) path.first_s = now;
  if (path.layer_first_s[layer] == 0) path.layer_first_s[layer] = now;
  path.bytes += bytes;
  path.last_s = path.layer_done_s[layer] = now;
  if (--blocks_[block].layers_left == 0) ++path.blocks;
  if (--layer_left_[layer] == 0) layer_ready(layer);
  maybe_finish();
}

void LoadTask::layer_ready(std::uint32_t layer) {
  ++layers_ready_;
  {
    const std::lock_guard lock(mutex_);
    result_.layer_ready_s[layer] = now_s();
  }
  raise_flag(layer);
  milestones_->reach(layer);
}

void LoadTask::raise_flag(std::uint32_t layer) {
  if (flags_) {
    auto* flags = reinterpret_cast<std::uint32_t*>(flags_.get());
    std::atomic_ref(flags[layer]).store(flag_, std::memory_order_release);
  }
  for (const auto& gates : gates_) gates->raise(*this, layer);
}

void LoadTask::wait_on_stream(std::uint32_t layer, void* stream) const {
  require(device_ != nullptr, Code::kInvalidArgument, "wait_on_stream: the cache is in host memory; use wait()");
  if (const Status status = milestones_->status(); !status.ok()) throw Error(status);
  const CudaDevice& device = *device_;
  const CudaDevice::Current current(device);
  const auto waiting = static_cast<cuda::Stream>(stream);
  device.check_not_captured(waiting, "wait_on_stream");
  if (milestones_->reached(layer)) return;
  cuda::DevicePtr address = 0;
  cuda_check(device.driver().mem_host_get_device_pointer(&address, flags_.get() + layer * sizeof(flag_), 0),
             "wait_on_stream (cuMemHostGetDevicePointer)");
  cuda_check(device.driver().stream_wait_value32(waiting, address, flag_, cuda::kWaitGeq),
             "wait_on_stream (cuStreamWaitValue32)");
}

void LoadTask::publish_on_stream(std::uint32_t layer, void* stream) {
  require(device_ != nullptr, Code::kInvalidArgument, "publish: the cache is in host memory; leave the stream out");
  struct Call {
    std::weak_ptr<LoadTask> task;
    std::shared_ptr<Progress> progress;
    std::uint32_t layer;
  };
  auto call = std::make_unique<Call>(weak_from_this(), node_.shared_progress(), layer);
  const auto reached = [](void* data) {
    const std::unique_ptr<Call> call(static_cast<Call*>(data));
    call->progress->post([task = call->task, layer = call->layer, now = Clock::now()] {
      if (const auto self = task.lock()) self->stream_reached(layer, now);
    });
  };
  const CudaDevice& device = *device_;
  const CudaDevice::Current current(device);
  device.check_not_captured(static_cast<cuda::Stream>(stream), "publish");
  cuda_check(device.driver().launch_host_func(static_cast<cuda::Stream>(stream), reached, call.get()),
             "publish (cuLaunchHostFunc)");
  call.release();
}

void LoadTask::stream_reached(std::uint32_t layer, Clock::time_point when) {
  if (ended_) return;
  if (!publishes()) return fail({Code::kInvalidArgument, 0, "publish: the plan names no decode node"});
  if (!milestones_->reached(layer)) {
    return fail({Code::kInvalidArgument, 0,
                 text("publish: the stream came to layer ", layer, ", which has not been loaded yet; wait_on_stream(",
                      layer, ") comes before it")});
  }
  publish(layer, when);
}

void LoadTask::open_gates(const std::shared_ptr<GateState>& gates, void* stream) {
  require(device_ != nullptr, Code::kInvalidArgument, "open_gates: the cache is in host memory");
  require(gates->layers() == layers_, Code::kInvalidArgument, "open_gates: the gates are of another model");
  if (const Status status = milestones_->status(); !status.ok()) throw Error(status);
  const CudaDevice::Current current(*device_);
  device_->check_not_captured(static_cast<cuda::Stream>(stream), "open_gates");
  gates->open(shared_from_this(), static_cast<cuda::Stream>(stream));
}

void LoadTask::attach(const std::shared_ptr<GateState>& gates) {
  if (std::find(gates_.begin(), gates_.end(), gates) == gates_.end()) gates_.push_back(gates);
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    if (ended_ || milestones_->reached(layer)) gates->raise(*this, layer);
  }
}

void LoadTask::take_over(std::size_t from, const std::vector<std::uint32_t>& blocks, const Status& why) {
  // What it was allowed to write must not fall on what another brings.
  if (sources_[from]->link) node_.grants().fence(sources_[from]->grant, blocks);
  std::vector<std::vector<std::uint32_t>> shares(sources_.size());
  for (std::uint32_t block : blocks) {
    Block& state = blocks_[block];
    if (state.source != from || all_found(block)) continue;
    for (std::uint32_t layer = 0; landing_ && layer < layers_; ++layer) landing_->drop(slot_of(layer, block));
    const auto next = std::find_if(sources_.begin(), sources_.end(),
                                   [&](const auto& s) { return !s->lost && (state.tried >> s->index & 1) == 0; });
    if (next == sources_.end()) {
      {
        const std::lock_guard lock(mutex_);
        failed_block_ = block;
      }
      BlockDirectory& directory = node_.storage().directory();
      const bool unreadable = why.code == Code::kNotFound || why.code == Code::kCorrupt || why.code == Code::kIo;
      if (unreadable) directory.forget(request_.plan.keys[block]);
      // No side could read it right: out of the way, for every node, so that the next save heals it.
      if (state.corrupt_in_storage) directory.quarantine(request_.plan.keys[block]);
      return fail({why.code, why.os_errno,
                   text("load: block ", block, " (", request_.plan.keys[block].hex(), ") at '", sources_[from]->name,
                        "': ", why.message, "; no other node is left to read it")});
    }
    state.source = static_cast<std::uint16_t>((*next)->index);
    state.tried |= 1u << (*next)->index;
    shares[(*next)->index].push_back(block);
    const std::lock_guard lock(mutex_);
    ++result_.failovers;
  }
  for (std::uint32_t block : shares[0]) read_here(block);
  if (!shares[0].empty()) reads_->pump();
  for (std::size_t i = 1; i < shares.size(); ++i) ask(*sources_[i], shares[i]);
}

void LoadTask::source_lost(std::size_t index, const Status& why) {
  Source& source = *sources_[index];
  if (ended_ || source.lost) return;
  source.lost = true;
  std::vector<std::uint32_t> blocks;
  for (std::uint32_t i = 0; i < hit_; ++i) {
    if (blocks_[i].source == index && blocks_[i].layers_left > 0) blocks.push_back(i);
  }
  take_over(index, blocks, why);
}

void LoadTask::on_opened(Link& link, const LoadOpened& message) {
  if (ended_ || decode_source_ == 0 || sources_[decode_source_]->link.get() != &link || publisher_) return;
  if (message.code != Code::kOk) return handover_failed({message.code, 0, message.why});
  const std::weak_ptr<LoadTask> weak = weak_from_this();
  publisher_ = make_sender(
      node_, *request_.into, sources_[decode_source_]->link, message.grant, Lane::kLow, *this,
      [weak](std::uint32_t layer, const std::vector<std::uint32_t>& blocks, Outcome outcome) {
        if (const auto self = weak.lock()) self->on_published(blocks, layer, outcome);
      },
      [weak](const Status& status) {
        if (const auto self = weak.lock()) self->fail(status);
      });
  for (std::uint32_t layer : std::exchange(publish_queue_, {})) publish_now(layer);
}

void LoadTask::on_blocks_failed(Link& link, const BlocksFailed& message) {
  for (const auto& source : sources_) {
    if (source->link.get() != &link) continue;
    std::vector<std::uint32_t> blocks = message.blocks;
    std::erase_if(blocks, [this](std::uint32_t block) { return block >= hit_; });
    for (std::uint32_t block : blocks) blocks_[block].corrupt_in_storage |= message.code == Code::kCorrupt;
    return take_over(source->index, blocks, {message.code, message.os_errno, message.why});
  }
}

void LoadTask::on_peer_closed(Link& link, const CloseLoad& message) {
  const Status why{message.code == Code::kOk ? Code::kCancelled : message.code, 0, message.why};
  for (std::size_t i = 1; i < sources_.size(); ++i) {
    if (sources_[i]->link.get() != &link) continue;
    source_lost(i, why);
    if (i == decode_source_) handover_failed(why);
  }
}

void LoadTask::on_link_closed(Link& link, const Status& why) {
  const auto keep = shared_from_this();
  for (std::size_t i = 1; i < sources_.size() && !ended_; ++i) {
    if (sources_[i]->link.get() != &link) continue;
    const Status lost{Code::kPeerLost, why.os_errno, text("node '", sources_[i]->name, "': ", why.message)};
    source_lost(i, lost);
    if (i == decode_source_) handover_failed(lost);
  }
}

// The node lives, its storage does not: others read for it, but it can still be handed the prompt.
void LoadTask::on_stalled(const std::string& name) {
  const auto keep = shared_from_this();
  for (std::size_t i = 0; i < sources_.size() && !ended_; ++i) {
    if (sources_[i]->name != name) continue;
    source_lost(
        i, {Code::kTimeout, 0, text("storage of '", name, "' finished no read for ", node_.options().stall_s, " s")});
  }
}

void LoadTask::publish(std::uint32_t layer, Clock::time_point when) {
  if (ended_ || published_[layer]) return;
  published_[layer] = true;
  {
    const std::lock_guard lock(mutex_);
    result_.layer_published_s[layer] = since_start_s(when);
  }
  if (publisher_) return publish_now(layer);
  publish_queue_.push_back(layer);
}

void LoadTask::publish_now(std::uint32_t layer) {
  // What the decode node read itself is in its staging already.
  const auto skipped = [&](std::uint32_t block) { return block < hit_ && from_decode_[slot_of(layer, block)]; };
  std::uint32_t count = 0;
  for (std::uint32_t first = 0; first < prompt_blocks_;) {
    std::uint32_t end = first;
    while (end < prompt_blocks_ && !skipped(end)) ++end;
    publisher_->add(layer, first, end - first);
    count += end - first;
    first = end + 1;
  }
  publish_pending_ += count;
  layer_publish_pending_[layer] = count;
  ++layers_published_;
  {
    const std::lock_guard lock(mutex_);
    result_.bytes_published += count * node_.geometry().layer_bytes(layer);
    if (count == 0) result_.layer_publish_done_s[layer] = now_s();
  }
  publisher_->pump();
  maybe_finish();
}

bool LoadTask::describe(std::uint32_t layer, std::uint32_t block, const std::shared_ptr<void>&, WriteBlock& out) {
  out.block = block;
  out.extents = static_cast<std::uint32_t>(request_.into->extents(layer, block_ids_[block], out.source));
  if (block >= hit_) return false;
  out.checksum = checksums_[slot_of(layer, block)];
  return true;
}

void LoadTask::on_published(const std::vector<std::uint32_t>& blocks, std::uint32_t layer, Outcome outcome) {
  if (ended_) return;
  publish_pending_ -= blocks.size();
  layer_publish_pending_[layer] -= static_cast<std::uint32_t>(blocks.size());
  if (!outcome.ok()) {
    return handover_failed(
        {outcome.code, 0, text("'", sources_[decode_source_]->name, "' did not take layer ", layer, " of the new KV")});
  }
  if (layer_publish_pending_[layer] == 0) {
    const std::lock_guard lock(mutex_);
    result_.layer_publish_done_s[layer] = now_s();
  }
  maybe_finish();
}

void LoadTask::on_read_report(Link& link, const ReadReport& message) {
  for (const auto& source : sources_) {
    if (source->link.get() == &link) source->result.reads = message.times;
  }
}

void LoadTask::note_wait(std::uint32_t layer, Clock::time_point begin, Clock::time_point end) {
  const std::lock_guard lock(mutex_);
  if (result_.layer_wait_end_s[layer] != 0) return;
  result_.layer_wait_begin_s[layer] = since_start_s(begin);
  result_.layer_wait_end_s[layer] = since_start_s(end);
}

// Prefill goes on: its layers are still right. Only finish() fails.
void LoadTask::handover_failed(Status why) {
  if (ended_ || !handover_failure_.ok()) return;
  handover_failure_ = {why.code, why.os_errno, text("load: the KV was not handed over: ", why.message)};
  publisher_.reset();
  publish_queue_.clear();
  maybe_finish();
}

void LoadTask::release(std::uint32_t layer) {
  if (ended_ || layer != released_) return;
  ++released_;
  if (request_.window_layers == 0 || credit_ == layers_) return;
  ++credit_;
  reads_->credit(credit_);
  for (std::size_t i = 1; i < sources_.size(); ++i) {
    if (!sources_[i]->lost) node_.send(*sources_[i]->link, Credit{id_, credit_});
  }
}

void LoadTask::maybe_finish() {
  if (ended_ || layers_ready_ < layers_) return;
  if (!handover_failure_.ok()) return end(true, handover_failure_);
  if (publishes() && (layers_published_ < layers_ || publish_pending_ > 0)) return;
  end(false, {});
}

void LoadTask::fail(Status status) {
  if (!ended_) end(true, status);
}

void LoadTask::end(bool failed, const Status& why) {
  const auto keep = shared_from_this();
  ended_ = true;
  node_.progress().cancel(timer_);
  if (reads_) sources_[0]->result.reads = reads_->times(started_);
  reads_.reset();
  // No GPU waits for what will not come. First: a copy may be queued behind such a wait.
  for (std::uint32_t layer = 0; layer < layers_; ++layer) {
    if (!milestones_->reached(layer)) raise_flag(layer);
  }
  publisher_.reset();
  if (port_ != nullptr) {
    port_->withdraw(owner_);
  } else if (copier() != nullptr) {
    copier()->withdraw(owner_);
  }
  std::uint32_t failovers;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& source : sources_) result_.paths.push_back(source->result);
    result_.seconds = now_s();
    failovers = result_.failovers;
  }
  for (const auto& source : sources_) {
    if (!source->link) continue;
    node_.grants().remove(source->grant);
    node_.add_asked(source->name, -static_cast<std::int64_t>(source->asked_bytes));
    node_.send(*source->link, CloseLoad{id_, why.code, why.message});
    source->link.reset();
  }
  landing_.reset();  // nobody writes there any more
  node_.remove_load(id_, failed, failovers);
  if (failed) {
    milestones_->fail(why);
  } else {
    milestones_->reach(layers_);
  }
}

LoadResult LoadTask::result() const {
  const std::lock_guard lock(mutex_);
  return result_;
}

std::int64_t LoadTask::failed_block() const {
  const std::lock_guard lock(mutex_);
  return failed_block_;
}

double LoadTask::since_start_s(Clock::time_point when) const {
  return std::chrono::duration<double>(when - started_).count();
}

}  // namespace dualkv
