// Registering on demand, off the progress thread where it takes long.
#include "rdma/registrations.h"

#include <cerrno>

#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {
// Registered in place: some ten milliseconds at most.
constexpr std::uint64_t kAtOnceBytes = std::uint64_t{64} << 20;
constexpr auto kSweepPause = std::chrono::seconds(1);

constexpr int kAccess = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;

// Null, and errno, if it can't be.
ibv_mr* register_plain(const Rail& rail, std::span<std::byte> memory, int access, const RdmaOptions& options) {
  const Verbs& verbs = rail.verbs();
  // Drivers that know no relaxed ordering ignore it: it is one of the optional flags.
  if (options.relaxed_ordering && verbs.reg_mr_iova2 != nullptr) {
    return verbs.reg_mr_iova2(rail.domain(), memory.data(), memory.size(),
                              reinterpret_cast<std::uint64_t>(memory.data()),
                              static_cast<unsigned>(access) | IBV_ACCESS_RELAXED_ORDERING);
  }
  return verbs.reg_mr(rail.domain(), memory.data(), memory.size(), access);
}

std::shared_ptr<const RdmaRegistration> try_register(std::span<const std::unique_ptr<Rail>> rails,
                                                     std::span<std::byte> memory, const RdmaOptions& options) {
  try {
    return std::make_shared<RdmaRegistration>(rails, memory, options);
  } catch (const Error&) {
    return nullptr;
  }
}

}  // namespace

RdmaRegistration::RdmaRegistration(std::span<const std::unique_ptr<Rail>> rails, std::span<std::byte> memory,
                                   const RdmaOptions& options)
    : rails_(rails), memory_(memory) {
  int access = kAccess;
  if (options.on_demand_paging) access |= IBV_ACCESS_ON_DEMAND;
  register_all([&](Rail& rail) { return register_plain(rail, memory, access, options); });
}

RdmaRegistration::RdmaRegistration(std::span<const std::unique_ptr<Rail>> rails,
                                   const std::shared_ptr<const GpuMemory>& memory, const RdmaOptions& options)
    : rails_(rails), keep_(memory), memory_(memory->memory()), by_dma_buf_(true) {
  const Fd dma_buf = memory->dma_buf();
  register_all([&](Rail& rail) {
    const Verbs& verbs = rail.verbs();
    ibv_mr* region = nullptr;
    if (dma_buf.valid() && verbs.reg_dmabuf_mr != nullptr) {
      const int access = options.relaxed_ordering ? kAccess | IBV_ACCESS_RELAXED_ORDERING : kAccess;
      region = verbs.reg_dmabuf_mr(rail.domain(), 0, memory_.size(), reinterpret_cast<std::uint64_t>(memory_.data()),
                                   dma_buf.get(), access);
    }
    by_dma_buf_ = by_dma_buf_ && region != nullptr;
    return region != nullptr ? region : register_plain(rail, memory_, kAccess, options);
  });
}

template <typename Register>
void RdmaRegistration::register_all(Register one) {
  for (const auto& rail : rails_) {
    ibv_mr* region = one(*rail);
    if (region == nullptr) {
      const int error = errno;
      end();
      throw Error(Code::kNoSpace, text("rdma: cannot register ", memory_.size(), " bytes with ", rail->name()), error);
    }
    regions_.push_back(region);
  }
}

void RdmaRegistration::end() {
  for (std::size_t i = 0; i < regions_.size(); ++i) rails_[i]->verbs().dereg_mr(regions_[i]);
}

RdmaRegistration::~RdmaRegistration() { end(); }

Registrations::Registrations(Progress& progress, Worker& worker, const KnownMemory& known,
                             std::span<const std::unique_ptr<Rail>> rails, const RdmaOptions& options,
                             std::function<void(const std::string&)> note)
    : progress_(progress), worker_(worker), known_(known), rails_(rails), options_(options), note_(std::move(note)) {
  tick();
}

Registrations::~Registrations() { progress_.cancel(timer_); }

std::shared_ptr<const RdmaRegistration> Registrations::find(const std::byte* data, std::uint64_t bytes) {
  const KnownMemory::Range* range = known_.find(data, bytes);
  if (range == nullptr) return nullptr;
  Entry& entry = entries_[range->id];
  entry.used = ++uses_;
  if (entry.registration || entry.state != State::kNone) return entry.registration;
  return begin(*range);
}

void Registrations::add(std::span<std::byte> memory, std::shared_ptr<const RdmaRegistration> registration) {
  const KnownMemory::Range* range = known_.find(memory.data(), memory.size());
  if (range != nullptr) entries_[range->id].registration = std::move(registration);
}

void Registrations::sweep() {
  std::erase_if(entries_, [&](const auto& item) {
    if (item.second.state == State::kInWork || known_.knows(item.first)) return false;
    if (item.second.registration) registered_ -= item.second.bytes;
    return true;
  });
}

bool Registrations::make_room(std::uint64_t bytes) {
  if (options_.registered_bytes == 0) return true;
  if (bytes > options_.registered_bytes) return false;
  while (registered_ + bytes > options_.registered_bytes) {
    auto oldest = entries_.end();
    for (auto item = entries_.begin(); item != entries_.end(); ++item) {
      // Held by nobody else: no write is under way to or from it.
      if (!item->second.registration || item->second.registration.use_count() > 1) continue;
      if (oldest == entries_.end() || item->second.used < oldest->second.used) oldest = item;
    }
    if (oldest == entries_.end()) return false;
    registered_ -= oldest->second.bytes;
    oldest->second.registration.reset();
  }
  return true;
}

std::shared_ptr<const RdmaRegistration> Registrations::begin(const KnownMemory::Range& range) {
  sweep();
  if (!make_room(range.memory.size())) {
    note_("rdma_registration_budget");
    return nullptr;
  }
  Entry& entry = entries_[range.id];
  entry.bytes = range.memory.size();
  entry.state = State::kInWork;
  registered_ += entry.bytes;
  if (entry.bytes <= kAtOnceBytes) return settle(range.id, try_register(rails_, range.memory, options_));
  worker_.post([this, made = made_, rails = rails_, options = options_, &progress = progress_, id = range.id,
                memory = range.memory] {
    auto registration = try_register(rails, memory, options);
    {
      const std::lock_guard lock(made->mutex);
      made->registrations.emplace_back(id, std::move(registration));
    }
    progress.post([this, alive = std::weak_ptr(made)] {
      if (!alive.expired()) collect();
    });
  });
  return nullptr;
}

std::shared_ptr<const RdmaRegistration> Registrations::settle(std::uint64_t id,
                                                              std::shared_ptr<const RdmaRegistration> made) {
  Entry& entry = entries_[id];
  entry.state = State::kNone;
  entry.registration = std::move(made);
  if (!entry.registration) {
    entry.state = State::kRefused;  // not asked for again as long as the range lives
    registered_ -= entry.bytes;
    note_("rdma_not_registered");
  }
  return entry.registration;
}

void Registrations::collect() {
  decltype(made_->registrations) made;
  {
    const std::lock_guard lock(made_->mutex);
    made.swap(made_->registrations);
  }
  for (auto& [id, registration] : made) {
    if (known_.knows(id)) {
      settle(id, std::move(registration));
      continue;
    }
    // The range ended meanwhile: its pages may be others' now.
    registered_ -= entries_[id].bytes;
    entries_.erase(id);
  }
}

// Pinned pages stay with the process, also after they were freed: what has ended is let go of soon.
void Registrations::tick() {
  timer_ = progress_.at(Clock::now() + kSweepPause, [this] {
    sweep();
    tick();
  });
}

}  // namespace dualkv
