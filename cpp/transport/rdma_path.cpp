// Queue pairs of a link: making them, asking, clearing, posting, and fencing.
#include "transport/rdma_path.h"

#include <algorithm>

#include "base/clock.h"
#include "base/text.h"

namespace dualkv {

namespace {

constexpr double kFirstPause = 0.05;
constexpr double kLongestPause = 2.0;
constexpr double kAnswerTimeout = 5.0;  // the peer's kernel may look long for the way here
constexpr double kSettled = 1.0;        // up for so long: the next failure is a new one
constexpr std::uint32_t kProbe = 0;     // immediate data of the write that shows that a queue pair works

}  // namespace

RdmaPath::RdmaPath(Progress& progress, GrantTable& grants, RdmaDomain& domain, const TransportOptions& options,
                   std::string peer, Host& host)
    : progress_(progress),
      grants_(grants),
      domain_(domain),
      options_(options),
      peer_(std::move(peer)),
      host_(host),
      places_(std::size_t{kLaneCount} * options.channels_per_lane) {
  grants_.add(*this);
  stats_.queue_pairs = static_cast<std::uint32_t>(places_.size());
  for (std::size_t i = 0; i < places_.size(); ++i) stats_.rails.push_back(domain_.rails()[rail_of(i)]->name());
}

RdmaPath::~RdmaPath() { close(); }

void RdmaPath::start(bool leads) {
  leads_ = leads;
  if (!leads_ || closed_) return;
  for (std::size_t i = 0; i < places_.size(); ++i) offer(i);
}

void RdmaPath::close() {
  if (std::exchange(closed_, true)) return;
  grants_.remove(*this);
  progress_.cancel(watch_);
  for (Place& place : places_) {
    progress_.cancel(place.timer);
    end_pair(place);
    place.state = State::kDown;
    place.open.clear();
  }
  outgoing_.clear();
}

// --- queue pairs come and go

void RdmaPath::end_pair(Place& place) {
  if (!place.pair) return;
  stats_.doorbells += place.pair->doorbells();
  stats_.work_requests += place.pair->work_requests();
  place.pair->close();
  place.pair.reset();
}

std::size_t RdmaPath::place_of(const QueuePair& pair) const {
  const auto found =
      std::find_if(places_.begin(), places_.end(), [&](const Place& p) { return p.pair.get() == &pair; });
  return static_cast<std::size_t>(found - places_.begin());
}

void RdmaPath::tell_step(std::size_t at, RdmaSetup::Step step) {
  const Place& place = places_[at];
  RdmaSetup setup;
  setup.step = step;
  setup.pair = static_cast<std::uint32_t>(at);
  setup.epoch = place.epoch;
  if (place.pair) {
    const QueuePairAddress& address = place.pair->address();
    setup.number = address.number;
    setup.packet_sequence = address.packet_sequence;
    setup.lid = address.lid;
    setup.mtu = address.mtu;
    setup.ethernet = address.ethernet;
    setup.gid = address.gid;
  }
  host_.tell(FrameType::kRdmaSetup, encode_rdma_setup(setup));
}

void RdmaPath::connect(std::size_t at, const RdmaSetup& remote) {
  const LaneOptions& lane = options_.lanes[static_cast<int>(lane_of(at))];
  const LaneMark mark{static_cast<std::uint8_t>(lane.service_level), static_cast<std::uint8_t>(lane.dscp << 2)};
  places_[at].state = State::kConnecting;
  // The queue pair is closed before this path ends, and then nobody calls back.
  places_[at].pair->connect(
      {remote.number, remote.packet_sequence, remote.lid, remote.mtu, remote.ethernet, remote.gid}, mark,
      domain_.options(), domain_.worker(), [this, at](const Status& status) {
        if (!status.ok()) return failed(at, status.message);
        Place& place = places_[at];
        place.state = State::kProbing;
        if (!leads_) return tell_step(at, RdmaSetup::Step::kAnswer);
        RdmaWrite probe;
        probe.immediate = true;
        probe.data = kProbe;
        place.timer = progress_.at(Clock::now() + to_duration(domain_.options().stall_s), [this, at] {
          places_[at].timer = 0;
          failed(at, text(domain_.rails()[rail_of(at)]->name(), ": a write that tried the way got no answer"));
        });
        place.pair->post({&probe, 1});
      });
}

void RdmaPath::offer(std::size_t at) {
  Place& place = places_[at];
  ++place.epoch;
  try {
    place.pair = QueuePair::create(*domain_.rails()[rail_of(at)], domain_.options(), *this);
  } catch (const Error& error) {
    stats_.last_failure = error.status().message;
    return offer_later(at);
  }
  place.state = State::kOffered;
  tell_step(at, RdmaSetup::Step::kOffer);
  place.timer = progress_.at(Clock::now() + to_duration(kAnswerTimeout), [this, at] {
    places_[at].timer = 0;
    failed(at, "the peer did not answer the offer of a queue pair");
  });
}

void RdmaPath::offer_later(std::size_t at) {
  Place& place = places_[at];
  if (closed_ || !leads_ || place.timer != 0) return;
  const auto pause = to_duration(place.pause_s);
  place.pause_s = std::clamp(place.pause_s * 2, kFirstPause, kLongestPause);
  place.timer = progress_.at(Clock::now() + pause, [this, at] {
    places_[at].timer = 0;
    offer(at);
  });
}

void RdmaPath::set_up(std::size_t at) {
  Place& place = places_[at];
  progress_.cancel(std::exchange(place.timer, 0));
  place.state = State::kUp;
  place.up_since = Clock::now();
  stats_.rebuilds += std::exchange(place.was_up, true);
}

bool RdmaPath::on_setup(std::span<const std::byte> body) {
  const auto setup = decode_rdma_setup(body);
  if (!setup || setup->pair >= places_.size()) return false;
  const std::size_t at = setup->pair;
  Place& place = places_[at];
  switch (setup->step) {
    case RdmaSetup::Step::kDown:
      if (setup->epoch == place.epoch && place.state != State::kDown) take_down(at, false);
      return true;
    case RdmaSetup::Step::kOffer:
      if (leads_) return false;
      if (setup->epoch <= place.epoch) return true;
      if (place.state != State::kDown) take_down(at, false);
      place.epoch = setup->epoch;
      try {
        place.pair = QueuePair::create(*domain_.rails()[rail_of(at)], domain_.options(), *this);
      } catch (const Error& error) {
        stats_.last_failure = error.status().message;
        tell_step(at, RdmaSetup::Step::kDown);
        return true;
      }
      connect(at, *setup);
      return true;
    case RdmaSetup::Step::kAnswer:
      if (!leads_) return false;
      if (setup->epoch != place.epoch || place.state != State::kOffered) return true;
      progress_.cancel(std::exchange(place.timer, 0));
      connect(at, *setup);
      return true;
    case RdmaSetup::Step::kUp:
      if (leads_) return false;
      if (setup->epoch == place.epoch && place.state == State::kProbing) set_up(at);
      return true;
  }
  return false;
}

void RdmaPath::take_down(std::size_t at, bool tell_peer) {
  Place& place = places_[at];
  progress_.cancel(std::exchange(place.timer, 0));
  if (place.state == State::kUp && Clock::now() - place.up_since > to_duration(kSettled)) place.pause_s = 0;
  place.state = State::kDown;
  end_pair(place);
  place.open.clear();
  place.ready.clear();
  place.asked_bytes = 0;
  if (tell_peer) tell_step(at, RdmaSetup::Step::kDown);
  std::vector<std::uint64_t> ids;
  for (const auto& [id, out] : outgoing_) {
    if (out.place == at) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  for (const std::uint64_t id : ids) {
    // Answered, and now not read any more; told when whoever took the queue pair down is through with it.
    if (outgoing_.at(id).answer) {
      answered_.push_back(id);
      continue;
    }
    not_by_nic(id);
  }
  if (!answered_.empty()) {
    progress_.post([this, alive = std::weak_ptr(alive_)] {
      if (alive.expired()) return;
      for (const std::uint64_t id : std::exchange(answered_, {})) finish(id);
    });
  }
  offer_later(at);
}

void RdmaPath::not_by_nic(std::uint64_t id) {
  stats_.inline_batches += !outgoing_.at(id).write->nic_only;
  outgoing_.erase(id);
  host_.send_inline(id);
}

void RdmaPath::failed(std::size_t at, const std::string& why) {
  ++stats_.failures;
  stats_.last_failure = why;
  take_down(at, true);
}

void RdmaPath::on_failed(QueuePair& pair, const std::string& why) {
  const std::size_t at = place_of(pair);
  if (at == places_.size()) return;
  failed(at, text(pair.rail().name(), ": ", why));
}

template <typename Match>
void RdmaPath::fence_where(Match match) {
  for (std::size_t at = 0; at < places_.size(); ++at) {
    const auto& open = places_[at].open;
    if (std::none_of(open.begin(), open.end(), [&](const auto& item) { return match(item.second); })) continue;
    ++stats_.fences;
    take_down(at, true);
  }
}

void RdmaPath::fence(std::uint64_t grant, std::span<const std::uint32_t> blocks) {
  fence_where([&](const Open& open) {
    if (open.grant != grant) return false;
    return blocks.empty() || std::any_of(blocks.begin(), blocks.end(), [&](std::uint32_t block) {
             return std::binary_search(open.blocks.begin(), open.blocks.end(), block);
           });
  });
}

void RdmaPath::before_inline(const WriteHeader& header) {
  fence_where([&](const Open& open) {
    return open.grant == header.grant && open.inbound->header().layer == header.layer &&
           std::any_of(header.entries.begin(), header.entries.end(), [&](const WriteEntry& entry) {
             return std::binary_search(open.blocks.begin(), open.blocks.end(), entry.block);
           });
  });
}

// --- to the peer

const RdmaRegistration* RdmaPath::hold(const Extent& extent, Held& held) {
  // Whoever calls keeps the memory alive meanwhile, so what covers it now still does.
  for (const auto& registration : held) {
    if (registration->covers(extent.data, extent.bytes)) return registration.get();
  }
  auto registration = domain_.registrations().find(extent.data, extent.bytes);
  if (!registration) return nullptr;
  held.push_back(std::move(registration));
  return held.back().get();
}

bool RdmaPath::up(Lane lane) const {
  const auto first = places_.begin() + static_cast<std::ptrdiff_t>(lane) * options_.channels_per_lane;
  return std::any_of(first, first + options_.channels_per_lane,
                     [](const Place& place) { return place.state == State::kUp; });
}

bool RdmaPath::write(const LayerWrite& write) {
  std::size_t best = places_.size();
  const std::size_t first = static_cast<std::size_t>(write.lane) * options_.channels_per_lane;
  for (std::size_t at = first; at < first + options_.channels_per_lane; ++at) {
    if (places_[at].state != State::kUp) continue;
    if (best == places_.size() || places_[at].asked_bytes < places_[best].asked_bytes) best = at;
  }
  Outgoing out;
  out.write = &write;
  out.place = best;
  WriteAsk ask{static_cast<std::uint32_t>(best), 0, {write.id, write.grant, write.layer, 0, 0, {}}};
  bool registered = best < places_.size();
  for (const WriteBlock& block : write.blocks) {
    if (!registered) break;
    ask.write.entries.push_back({block.block, block.checksum, {}});
    for (std::uint32_t i = 0; i < block.extents; ++i) {
      registered = registered && hold(block.source[i], out.held) != nullptr;
      out.bytes += block.source[i].bytes;
    }
  }
  if (!registered) {
    stats_.inline_batches += !write.nic_only;
    return false;
  }
  ask.epoch = places_[best].epoch;
  out.chain = WriteChain(domain_.rails()[rail_of(best)]->attributes().max_msg_sz);
  out.chain.reserve(write.blocks.size());
  if (places_[best].asked_bytes == 0) places_[best].progress_at = Clock::now();
  places_[best].asked_bytes += out.bytes;
  if (watch_ == 0) watch();
  outgoing_.emplace(write.id, std::move(out));
  host_.tell(write.lane, FrameType::kWriteAsk, encode_write_ask(ask));
  return true;
}

bool RdmaPath::on_clear(std::span<const std::byte> body) {
  const auto clear = decode_write_clear(body);
  if (!clear) return false;
  const auto found = outgoing_.find(clear->id);
  if (found == outgoing_.end()) return true;  // withdrawn, or sent inline meanwhile
  Outgoing& out = found->second;
  if (!out.chain.writes().empty()) return false;
  Place& place = places_[out.place];
  if (clear->entries.empty()) {
    place.asked_bytes -= out.bytes;
    not_by_nic(clear->id);
    return true;
  }
  if (clear->immediate == kProbe || !build_chain(out, *clear)) return false;
  place.ready.push_back(clear->id);
  place.progress_at = Clock::now();
  pump(out.place);
  return true;
}

// Pairs the write's memory with the addresses it was cleared to.
bool RdmaPath::build_chain(Outgoing& out, const WriteClear& clear) {
  const LayerWrite& write = *out.write;
  if (clear.entries.size() != write.blocks.size()) return false;
  const std::size_t rail = rail_of(out.place);
  for (std::size_t i = 0; i < write.blocks.size(); ++i) {
    const WriteBlock& block = write.blocks[i];
    const WriteClear::Entry& entry = clear.entries[i];
    if (entry.count == 0) continue;
    std::array<LocalExtent, PagedKv::kMaxPlanes> from;
    std::uint64_t bytes = 0;
    for (std::uint32_t k = 0; k < block.extents; ++k) {
      const Extent& source = block.source[k];
      from[k] = {source.data, source.bytes, hold(source, out.held)->local_key(rail)};
      bytes += source.bytes;
    }
    const auto to = std::span(entry.extents).first(entry.count);
    std::uint64_t allowed = 0;
    for (const RemoteExtent& extent : to) {
      if (extent.bytes == 0 || extent.bytes > bytes) return false;
      allowed += extent.bytes;
    }
    if (allowed != bytes) return false;
    out.chain.append(std::span(from).first(block.extents), to);
    out.wanted += bytes;
  }
  auto& writes = out.chain.writes();
  if (writes.empty()) return false;  // nothing wanted is not cleared
  writes.back().immediate = true;
  writes.back().data = clear.immediate;
  return true;
}

// As much as fits, of all that is cleared, with one doorbell.
void RdmaPath::pump(std::size_t at) {
  Place& place = places_[at];
  if (!place.pair || place.ready.empty()) return;
  std::size_t room = place.pair->room();
  batch_.clear();
  while (!place.ready.empty() && room > 0) {
    Outgoing& out = outgoing_.at(place.ready.front());
    const std::vector<RdmaWrite>& writes = out.chain.writes();
    const std::size_t count = std::min(room, writes.size() - out.posted);
    const auto first = writes.begin() + static_cast<std::ptrdiff_t>(out.posted);
    batch_.insert(batch_.end(), first, first + static_cast<std::ptrdiff_t>(count));
    out.posted += count;
    room -= count;
    if (out.posted < writes.size()) break;
    out.last = place.pair->work_requests() + batch_.size();
    ++stats_.batches;
    stats_.bytes_written[static_cast<int>(out.write->lane)] += out.wanted;
    place.ready.pop_front();
  }
  if (!batch_.empty()) place.pair->post(batch_);
}

void RdmaPath::on_room(QueuePair& pair) {
  const std::size_t at = place_of(pair);
  if (at == places_.size()) return;
  places_[at].progress_at = Clock::now();
  if (places_[at].state == State::kProbing && leads_) {
    set_up(at);
    tell_step(at, RdmaSetup::Step::kUp);
  }
  std::vector<std::uint64_t> ids;
  for (const auto& [id, out] : outgoing_) {
    if (out.place == at && out.answer && has_left(out)) ids.push_back(id);
  }
  for (const std::uint64_t id : ids) finish(id);
  pump(at);
}

bool RdmaPath::has_left(const Outgoing& out) const {
  const auto& pair = places_[out.place].pair;
  return posted_all(out) && (!pair || pair->retired() >= out.last);
}

void RdmaPath::watch() {
  const double stall_s = domain_.options().stall_s;
  watch_ = progress_.at(Clock::now() + to_duration(stall_s / 4), [this, stall_s] {
    watch_ = 0;
    for (std::size_t at = 0; at < places_.size(); ++at) {
      if (places_[at].asked_bytes == 0 || Clock::now() - places_[at].progress_at < to_duration(stall_s)) continue;
      failed(at, text(domain_.rails()[rail_of(at)]->name(), ": no progress for ", stall_s, " s"));
    }
    if (!outgoing_.empty()) watch();
  });
}

bool RdmaPath::on_done(std::uint64_t id, Outcome outcome) {
  Outgoing& out = outgoing_.at(id);
  places_[out.place].progress_at = Clock::now();
  // An answer to what was not sent can only be that it is refused, or not wanted, before it was cleared.
  if (!out.chain.writes().empty() && !posted_all(out)) return false;
  if (out.answer) return false;
  out.answer = outcome;
  // The peer has it all, yet the NIC may want to read it again until it has heard so itself.
  if (out.chain.writes().empty() || has_left(out)) finish(id);
  return true;
}

void RdmaPath::finish(std::uint64_t id) {
  const auto node = outgoing_.extract(id);
  if (node.empty()) return;
  const Outgoing& out = node.mapped();
  Place& place = places_[out.place];
  place.asked_bytes -= std::min(place.asked_bytes, out.bytes);
  host_.finish(id, *out.answer);
}

bool RdmaPath::withdraw(std::uint64_t id) {
  const auto found = outgoing_.find(id);
  if (found == outgoing_.end()) return false;
  const std::size_t at = found->second.place;
  // The end of a load may overtake the completion of its last write.
  if (places_[at].pair && found->second.posted > 0) places_[at].pair->look();
  const bool left = has_left(found->second);
  const bool posted = found->second.posted > 0;
  places_[at].asked_bytes -= std::min(places_[at].asked_bytes, found->second.bytes);
  std::erase(places_[at].ready, id);
  const Lane lane = found->second.write->lane;
  outgoing_.erase(found);
  if (left) return true;
  if (posted) {
    // The NIC may be reading it at this moment.
    ++stats_.fences;
    take_down(at, true);
  } else {
    host_.tell(lane, FrameType::kWriteDrop, encode_write_drop(id));
  }
  return true;
}

// --- from the peer

bool RdmaPath::is_open(std::uint64_t grant, std::uint32_t layer, std::uint32_t block) const {
  for (const Place& place : places_) {
    for (const auto& [immediate, open] : place.open) {
      if (open.grant != grant || open.inbound->header().layer != layer) continue;
      if (block < open.blocks.front() || block > open.blocks.back()) continue;
      if (std::binary_search(open.blocks.begin(), open.blocks.end(), block)) return true;
    }
  }
  return false;
}

void RdmaPath::refuse_to_clear(Lane lane, std::uint64_t id) {
  host_.tell(lane, FrameType::kWriteClear, encode_write_clear({id, 0, {}}));
}

bool RdmaPath::on_ask(Lane lane, std::span<const std::byte> body) {
  auto ask = decode_write_ask(body, grants_.geometry());
  if (!ask || ask->pair >= places_.size() || lane_of(ask->pair) != lane) return false;
  Place& place = places_[ask->pair];
  const WriteHeader& wanted = ask->write;
  GrantSink* sink = grants_.find(wanted.grant, peer_);
  if (sink == nullptr) {
    InboundWrite refused(grants_, peer_, wanted);
    host_.written(lane, refused, refused.finish());
    return true;
  }
  // One receive is kept for the probe.
  const bool usable = place.pair && place.pair->connected() && ask->epoch == place.epoch &&
                      place.open.size() + 1 < domain_.options().receive_depth;
  if (!usable) {
    refuse_to_clear(lane, wanted.id);
    return true;
  }
  WriteClear clear{wanted.id, 0, std::vector<WriteClear::Entry>(wanted.entries.size())};
  WriteHeader taken{wanted.id, wanted.grant, wanted.layer, 0, 0, {}};
  Open open{wanted.grant, {}, nullptr, {}};
  const std::size_t rail = rail_of(ask->pair);
  for (std::size_t i = 0; i < wanted.entries.size(); ++i) {
    const WriteEntry& entry = wanted.entries[i];
    std::array<Extent, PagedKv::kMaxPlanes> target;
    const std::size_t count = sink->target(wanted.layer, entry.block, Writer::kNic, target).extents;
    if (count == 0) continue;
    if (is_open(wanted.grant, wanted.layer, entry.block)) {
      refuse_to_clear(lane, wanted.id);
      return true;
    }
    clear.entries[i].count = static_cast<std::uint32_t>(count);
    for (std::size_t k = 0; k < count; ++k) {
      const RdmaRegistration* registration = hold(target[k], open.held);
      if (registration == nullptr) {
        refuse_to_clear(lane, wanted.id);
        return true;
      }
      clear.entries[i].extents[k] = {reinterpret_cast<std::uint64_t>(target[k].data), target[k].bytes,
                                     registration->remote_key(rail)};
    }
    taken.entries.push_back(entry);
    open.blocks.push_back(entry.block);
  }
  // Looking for room may have ended the grant, or the queue pair for another's sake.
  if (grants_.find(wanted.grant, peer_) != sink || !place.pair || ask->epoch != place.epoch) {
    refuse_to_clear(lane, wanted.id);
    return true;
  }
  open.inbound = std::make_unique<InboundWrite>(grants_, peer_, std::move(taken), Writer::kNic);
  if (open.blocks.empty()) {  // nothing of it is wanted any more
    host_.written(lane, *open.inbound, open.inbound->finish());
    return true;
  }
  std::sort(open.blocks.begin(), open.blocks.end());
  do {
    ++place.last_immediate;
  } while (place.last_immediate == kProbe || place.open.contains(place.last_immediate));
  clear.immediate = place.last_immediate;
  place.open.emplace(clear.immediate, std::move(open));
  host_.tell(lane, FrameType::kWriteClear, encode_write_clear(clear));
  return true;
}

void RdmaPath::on_immediate(QueuePair& pair, std::uint32_t data) {
  const std::size_t at = place_of(pair);
  if (at == places_.size() || data == kProbe) return;
  auto node = places_[at].open.extract(data);
  if (node.empty()) return host_.hostile();
  const InboundWrite& write = *node.mapped().inbound;
  host_.written(lane_of(at), write, node.mapped().inbound->finish());
}

bool RdmaPath::on_drop(std::span<const std::byte> body) {
  const auto id = decode_write_drop(body);
  if (!id) return false;
  for (Place& place : places_) {
    std::erase_if(place.open, [&](const auto& item) { return item.second.inbound->header().id == *id; });
  }
  return true;
}

RdmaStats RdmaPath::stats() const {
  RdmaStats stats = stats_;
  for (std::size_t at = 0; at < places_.size(); ++at) {
    const Place& place = places_[at];
    if (!place.pair) continue;
    stats.doorbells += place.pair->doorbells();
    stats.work_requests += place.pair->work_requests();
    if (place.state != State::kUp) continue;
    ++stats.queue_pairs_up;
    const LaneMark mark = place.pair->query();
    stats.service_level[static_cast<int>(lane_of(at))] = mark.service_level;
    stats.traffic_class[static_cast<int>(lane_of(at))] = mark.traffic_class;
  }
  return stats;
}

}  // namespace dualkv
