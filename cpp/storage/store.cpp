// Store: opening with probes, and the public calls.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "base/hash.h"
#include "base/text.h"
#include "memory/copier.h"
#include "memory/cuda_device.h"
#include "storage/store_state.h"

namespace dualkv {

namespace {

void require(bool fine, const std::string& message) {
  if (!fine) throw Error(Code::kInvalidArgument, message);
}

void check_options(const StoreOptions& options) {
  const bool known = options.backend == "auto" || options.backend == "uring" || options.backend == "pread" ||
                     options.backend == "usrbio";
  require(known, text("store: backend '", options.backend, "': must be auto, uring, pread or usrbio"));
  require(options.direct == "auto" || options.direct == "on" || options.direct == "off",
          text("store: direct '", options.direct, "': must be auto, on or off"));
  require(options.depth <= 4096, text("store: depth ", options.depth, ": must be 0 (automatic) to 4096"));
  require(options.save_queue >= 1, "store: save_queue must be at least 1");
  require(options.in_use_grace_s >= 0 && options.forget_s >= 0, "store: in_use_grace_s and forget_s can't be negative");
  const ReadFaults& faults = options.faults;
  for (double rate : {faults.error_rate, faults.short_rate, faults.corrupt_rate, faults.drop_rate, faults.delay_rate}) {
    require(rate >= 0 && rate <= 1, text("store: fault rate ", rate, ": must be 0 to 1"));
  }
  require(faults.delay_s >= 0, "store: delay_s can't be negative");
}

void check_pool(const KvGeometry& geometry, const StagingPool& pool) {
  require(pool.slot_bytes() == geometry.file_bytes(),
          text("store: the staging pool's slots have ", pool.slot_bytes(), " bytes, blocks have ",
               geometry.file_bytes(), "; make both from one geometry"));
}

// Many small reads at once can be merged on their way to the device; many large ones only wait for each other.
StoreOptions with_depth(const KvGeometry& geometry, StoreOptions options) {
  constexpr std::uint64_t kBytesInFlight = std::uint64_t{8} << 20;
  if (options.depth == 0) {
    options.depth =
        static_cast<std::uint32_t>(std::clamp<std::uint64_t>(kBytesInFlight / geometry.block_bytes(), 32, 128));
  }
  return options;
}

// Writes and reads back one page with O_DIRECT: what the file system really does, not what open() says.
bool probe_direct(int directory_fd, std::uint32_t* alignment) {
  const std::string name = text("tmp/probe-", getpid(), "-", random_u64());
  const Fd fd(openat(directory_fd, name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0666));
  if (!fd.valid()) return false;
  unlinkat(directory_fd, name.c_str(), 0);
  const std::unique_ptr<void, decltype(&std::free)> page(
      std::aligned_alloc(KvGeometry::kPageBytes, KvGeometry::kPageBytes), &std::free);
  std::memset(page.get(), 7, KvGeometry::kPageBytes);
  const auto bytes = static_cast<ssize_t>(KvGeometry::kPageBytes);
  if (pwrite(fd.get(), page.get(), KvGeometry::kPageBytes, 0) != bytes) return false;
  if (pread(fd.get(), page.get(), KvGeometry::kPageBytes, 0) != bytes) return false;
  *alignment = KvGeometry::kPageBytes;
#ifdef STATX_DIOALIGN
  struct statx info;
  if (statx(fd.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && info.stx_dio_offset_align != 0) {
    *alignment = info.stx_dio_offset_align;
  }
#endif
  return *alignment <= KvGeometry::kPageBytes;
}

}  // namespace

std::uint64_t next_owner() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

StoreState::StoreState(const KvGeometry& geometry, const StoreOptions& options, const StagingPool& pool,
                       std::shared_ptr<Progress> progress, bool reads_to_gpus)
    : geometry_((check_options(options), check_pool(geometry, pool), geometry)),
      options_(with_depth(geometry, options)),
      pool_(pool),
      progress_(std::move(progress)),
      fallbacks_(options.fail_on_fallback),
      directory_(geometry, options) {
  access_ = {directory_.fd(), false, 1};
  if (options.direct != "off") {
    access_.direct = probe_direct(directory_.fd(), &access_.alignment);
    if (!access_.direct && options.direct == "on") {
      throw Error(Code::kUnsupported, text("store: '", options.root, "' refuses O_DIRECT; use direct='auto'"));
    }
    if (!access_.direct) fallbacks_.count("no_direct", text("'", options.root, "' refuses O_DIRECT"));
  }
  auto reader = make_reader(reads_to_gpus);
  progress_->run(
      [&] { reads_ = std::make_shared<ReadQueue>(*progress_, geometry_, directory_, pool_, std::move(reader)); });
  writer_ = std::make_unique<BlockWriter>(geometry_, options_, access_, directory_);
}

std::unique_ptr<BlockReader> StoreState::make_reader(bool reads_to_gpus) {
  std::unique_ptr<BlockReader> reader;
  if (options_.backend == "usrbio") {
    reader = make_usrbio_reader(geometry_, access_, options_.depth);
    backend_ = "usrbio";
  }
  if (options_.backend == "auto" || options_.backend == "uring") {
    try {
      reader = make_uring_reader(geometry_, access_, pool_, options_.depth, registration_);
      backend_ = "uring";
      if (registration_->refused) fallbacks_.count("uring_buffers_not_registered", "memlock limit or kernel");
    } catch (const Error& error) {
      if (options_.backend == "uring") throw;
      fallbacks_.count("no_uring", error.what());
    }
  }
  if (!reader) {
    reader = make_pread_reader(geometry_, access_, options_.depth);
    backend_ = "pread";
  }
  if (reads_to_gpus) reader = make_cufile_reader(std::move(reader), geometry_, access_, options_.depth);
  if (options_.read_limit_bytes_per_s > 0) {
    reader = make_limited_reader(std::move(reader), geometry_, options_.read_limit_bytes_per_s);
  }
  if (options_.faults.any()) reader = make_faulty_reader(std::move(reader), geometry_, options_.faults);
  return reader;
}

void StoreState::listen() {
  const std::weak_ptr<ReadQueue> queue = reads_;
  const std::weak_ptr<Progress> progress = progress_;
  pool_.on_free([queue, progress] {
    const auto thread = progress.lock();
    if (!thread) return;
    thread->post([queue] {
      if (const auto alive = queue.lock()) alive->pump();
    });
  });
}

void StoreState::close() {
  closed_ = true;
  pool_.on_free(nullptr);
  progress_->run([this] {
    if (reads_) reads_->close();
  });
}

StoreState::~StoreState() {
  close();
  progress_->run([this] { reads_.reset(); });
}

StoreStats StoreState::stats() const {
  StoreStats stats;
  stats.backend = backend_;
  stats.direct = access_.direct;
  stats.depth = options_.depth;
  stats.registered = backend_ == "uring" && !registration_->refused;
  stats.registered_buffers = registration_->buffers;
  stats.registered_bytes = registration_->bytes;
  stats.register_s = static_cast<double>(registration_->ns) / 1e9;
  stats.alignment = access_.alignment;
  const ReadCounters reads = reads_->counters();
  stats.blocks_read = reads.blocks;
  stats.bytes_read = reads.bytes;
  stats.read_errors = reads.errors;
  stats.blocks_corrupt = reads.corrupt;
  stats.read_queue_bytes = reads.queue_bytes;
  stats.read_bandwidth = reads.bandwidth.bytes_per_s(Clock::now());
  const SaveCounters saves = writer_->counters();
  stats.blocks_saved = saves.blocks;
  stats.bytes_saved = saves.bytes;
  stats.save_errors = saves.errors;
  stats.blocks_evicted = saves.evicted;
  stats.fallbacks = fallbacks_.counts();
  return stats;
}

constexpr auto kSpin = std::chrono::microseconds(50);  // as a node's by default

// A store of its own has a progress thread of its own, which ends with it (and not on itself).
static std::shared_ptr<StoreState> open_alone(const KvGeometry& geometry, const StoreOptions& options,
                                              const StagingPool& pool) {
  const auto progress = std::make_shared<Progress>("dualkv-store", kSpin);
  auto* state = new StoreState(geometry, options, pool, progress);
  return std::shared_ptr<StoreState>(state, [progress](StoreState* ended) {
    delete ended;
    progress->stop();
  });
}

Store::Store(const KvGeometry& geometry, const StoreOptions& options, const StagingPool& pool)
    : Store(open_alone(geometry, options, pool)) {}

Store::Store(std::shared_ptr<StoreState> state) : state_(std::move(state)) { state_->listen(); }

const KvGeometry& Store::geometry() const { return state_->geometry(); }
const StagingPool& Store::pool() const { return state_->pool(); }

std::size_t Store::match(std::span<const Key> keys) {
  const std::size_t hit = state_->directory().match(keys);
  state_->writer().touch({keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(hit)});
  return hit;
}

bool Store::contains(const Key& key) { return state_->directory().contains(key); }
bool Store::remove(const Key& key) { return state_->directory().remove(key); }
bool Store::quarantine(const Key& key) { return state_->directory().quarantine(key); }
StoreStats Store::stats() const { return state_->stats(); }

std::optional<std::uint64_t> Store::collect(std::uint64_t quota_bytes) {
  return state_->directory().collect(quota_bytes);
}

namespace {

// One public read: counts down its blocks on the progress thread.
struct ReadCall {
  std::uint64_t owner = next_owner();
  std::size_t left = 0;
  Operation operation;
  Progress::TimerId deadline = 0;
};

void check_open(const StoreState& store) {
  if (store.closed()) throw Error(Code::kCancelled, "the store is closed");
}

void check_slots(const StagingPool& pool, std::span<const Slot> slots) {
  const auto memory = pool.memory();
  for (const Slot& slot : slots) {
    const bool inside = slot && slot.get() >= memory.data() && slot.get() < memory.data() + memory.size();
    require(inside, "store: a slot is not of this store's staging pool");
  }
}

void finish_one(StoreState& store, const std::shared_ptr<ReadCall>& call, const Key& key, const ReadResult& result) {
  if (result.outcome.ok() && --call->left > 0) return;
  store.progress().cancel(call->deadline);
  if (result.outcome.ok()) return call->operation.milestones()->reach(0);
  store.reads().cancel(call->owner);
  if (result.outcome.code != Code::kCancelled) store.directory().forget(key);
  call->operation.milestones()->fail(
      {result.outcome.code, result.outcome.os_errno, text("block ", key.hex(), ": ", result.reason)});
}

}  // namespace

Operation Store::read(std::span<const Key> keys, std::span<const Slot> slots, LayerRange layers,
                      Clock::time_point deadline) {
  check_open(*state_);
  require(keys.size() == slots.size(), text("store: ", keys.size(), " keys and ", slots.size(), " slots"));
  require(layers.count >= 1 && std::uint64_t{layers.first} + layers.count <= geometry().layers(),
          text("store: layers ", layers.first, " + ", layers.count, " of ", geometry().layers()));
  check_slots(pool(), slots);
  auto call = std::make_shared<ReadCall>();
  call->left = keys.size();
  if (keys.empty()) {
    call->operation.milestones()->reach(0);
    return call->operation;
  }
  std::vector<ReadJob> jobs;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    StoreState* store = state_.get();  // outlives its queue, which holds the callback
    jobs.push_back({call->owner, keys[i], layers, slots[i], nullptr,
                    [store, call, key = keys[i]](ReadResult result) { finish_one(*store, call, key, result); }});
  }
  // Raw: the last handle's end waits in line behind this task, and must not happen on the progress thread.
  StoreState* raw = state_.get();
  const bool posted = state_->progress().post([store = raw, call, deadline, jobs = std::move(jobs)]() mutable {
    call->deadline = store->progress().at(deadline, [state = store, call] {
      state->reads().cancel(call->owner);
      call->operation.milestones()->fail(
          {Code::kTimeout, 0, text("read: ", call->left, " blocks not read by the deadline")});
    });
    for (ReadJob& job : jobs) store->reads().submit(std::move(job));
    store->reads().pump();
  });
  if (!posted) call->operation.milestones()->fail({Code::kCancelled, 0, "the store is closed"});
  return call->operation;
}

namespace {

// A slot for a save, waiting in line up to the deadline. Null if none came.
Slot wait_for_slot(StagingPool pool, Clock::time_point deadline) {
  struct Waiting {
    std::mutex mutex;
    std::condition_variable changed;
    bool served = false;
    Slot slot;
  };
  const auto waiting = std::make_shared<Waiting>();
  const std::uint64_t ticket = pool.acquire(1, SlotUse::kTransit, [waiting](std::vector<Slot> slots) {
    const std::lock_guard lock(waiting->mutex);
    if (!slots.empty()) waiting->slot = std::move(slots[0]);
    waiting->served = true;
    waiting->changed.notify_all();
  });
  std::unique_lock lock(waiting->mutex);
  if (!waiting->changed.wait_until(lock, deadline, [&] { return waiting->served; })) {
    lock.unlock();
    pool.withdraw(ticket);
    lock.lock();  // withdraw() has called back, or the slot came just then
  }
  return std::move(waiting->slot);
}

Operation ended_with(Status status) {
  Operation operation;
  operation.milestones()->fail(std::move(status));
  return operation;
}

// Throws Error(kIo) if it is in a GPU's memory, and that fails.
void gather_block(const KvGeometry& geometry, const PagedKv& source, std::uint32_t block_id, std::byte* image) {
  std::vector<CopyRun> runs;  // by a GPU
  for (std::uint32_t layer = 0; layer < geometry.layers(); ++layer) {
    std::array<Extent, PagedKv::kMaxPlanes> extents;
    const auto from = std::span(extents).first(source.extents(layer, block_id, extents));
    if (source.on_host()) {
      gather(from, image + geometry.layer_offset(layer));
    } else {
      const Extent to{image + geometry.layer_offset(layer), geometry.layer_bytes(layer)};
      append_runs(from, {&to, 1}, runs);
    }
  }
  if (!source.on_host()) CudaDevice::open(source.device())->copy_now(runs, HostSide::kTo);
}

}  // namespace

Operation Store::save(std::span<const Key> keys, const PagedKv& source, std::span<const std::uint32_t> block_ids,
                      const Key& parent, Clock::time_point deadline) {
  check_open(*state_);
  require(keys.size() == block_ids.size(), text("save: ", keys.size(), " keys and ", block_ids.size(), " block ids"));
  require(source.layers() == geometry().layers(), "save: the cache has another number of layers");
  for (std::uint32_t id : block_ids) {
    require(id < source.block_count(), text("save: block id ", id, " of ", source.block_count(), " blocks"));
  }
  // One job a block, each slot freed as soon as its file is written: a long save never drains the pool.
  const auto call = std::make_shared<SaveCall>();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (state_->directory().good(keys[i])) continue;
    const Slot slot = wait_for_slot(pool(), deadline);
    if (!slot) return ended_with({Code::kTimeout, 0, "save: no staging slot became free by the deadline"});
    try {
      gather_block(geometry(), source, block_ids[i], slot.get());
    } catch (const Error& error) {
      return ended_with(error.status());
    }
    const TrailerInfo info{keys[i], i == 0 ? parent : keys[i - 1]};
    if (!state_->writer().submit({info, slot, call}, deadline)) {
      return ended_with(
          {Code::kTimeout, 0, "save: storage writes are too slow: the save queue was full until the deadline"});
    }
  }
  call->submitted();
  return call->operation;
}

Operation Store::save_slots(std::span<const Key> keys, std::span<const Slot> slots, const Key& parent) {
  check_open(*state_);
  require(keys.size() == slots.size(), text("save: ", keys.size(), " keys and ", slots.size(), " slots"));
  check_slots(pool(), slots);
  const auto call = std::make_shared<SaveCall>();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (state_->directory().good(keys[i])) continue;
    const TrailerInfo info{keys[i], i == 0 ? parent : keys[i - 1]};
    state_->writer().submit({info, slots[i], call});
  }
  call->submitted();
  return call->operation;
}

VerifyReport Store::verify() {
  VerifyReport report;
  std::vector<std::byte> image(geometry().file_bytes());
  for (const Key& key : state_->directory().list()) {
    ++report.blocks;
    const Fd fd(openat(state_->directory().fd(), block_path(key).c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd.valid()) continue;  // removed meanwhile
    const ssize_t got = pread(fd.get(), image.data(), image.size(), 0);
    std::string reason = got < 0 ? std::strerror(errno) : "file is shorter than its geometry";
    if (got == static_cast<ssize_t>(image.size()))
      reason = check_image(geometry(), key, image, {0, geometry().layers()});
    if (!reason.empty()) report.bad.push_back(text(key.hex(), ": ", reason));
  }
  return report;
}

}  // namespace dualkv
