// Creating, connecting, posting and polling.
#include "rdma/queue_pair.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {

constexpr int kPollBatch = 32;
constexpr int kPollRounds = 16;  // then others get their turn
constexpr std::uint32_t kInlineBytes = 128;
constexpr std::uint32_t kSequenceMask = 0xffffff;
constexpr std::uint64_t kReceive = ~std::uint64_t{0};  // wr_id; sends have the number of requests they retire

[[noreturn]] void fail_with(const std::string& what, int error) { throw Error(Code::kIo, "rdma: " + what, error); }

ibv_mtu mtu_of(std::uint32_t bytes, ibv_mtu port) {
  if (bytes == 0) return port;
  ibv_mtu mtu = IBV_MTU_256;
  for (std::uint32_t size = 256; size * 2 <= bytes && mtu < IBV_MTU_4096; size *= 2) {
    mtu = static_cast<ibv_mtu>(mtu + 1);
  }
  return std::min(mtu, port);
}

}  // namespace

std::shared_ptr<QueuePair> QueuePair::create(Rail& rail, const RdmaOptions& options, Events& events) {
  std::shared_ptr<QueuePair> pair(new QueuePair(rail, options, events));
  pair->create_pair(options);
  return pair;
}

QueuePair::QueuePair(Rail& rail, const RdmaOptions& options, Events& events)
    : rail_(rail), events_(events), depth_(options.send_depth), receives_(options.receive_depth) {
  for (std::size_t i = 0; i < receives_.size(); ++i) receives_[i].wr_id = kReceive;
  requests_.resize(depth_);
}

void QueuePair::create_pair(const RdmaOptions& options) {
  Verbs& verbs = rail_.verbs();
  handles_ = std::make_shared<Handles>(verbs);
  handles_->owner = weak_from_this();
  const int entries = static_cast<int>(options.send_depth + options.receive_depth + 1);
  handles_->completions = verbs.create_cq(rail_.context(), entries, handles_.get(), rail_.channel(), 0);
  if (handles_->completions == nullptr)
    fail_with(text("no completion queue of ", entries, " entries on ", rail_.name()), errno);
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = handles_->completions;
  init.qp_type = IBV_QPT_RC;
  init.cap.max_send_wr = options.send_depth;
  init.cap.max_recv_wr = options.receive_depth;
  init.cap.max_send_sge = RdmaWrite::kMaxPieces;
  init.cap.max_recv_sge = 1;
  init.cap.max_inline_data = kInlineBytes;
  handles_->pair = verbs.create_qp(rail_.domain(), &init);
  if (handles_->pair == nullptr) {
    init.cap.max_inline_data = 0;
    handles_->pair = verbs.create_qp(rail_.domain(), &init);
  }
  if (handles_->pair == nullptr) {
    fail_with(text("no queue pair with ", options.send_depth, " send and ", options.receive_depth,
                   " receive requests on ", rail_.name(), "; raise the memlock limit or lower the depths"),
              errno);
  }
  max_inline_ = init.cap.max_inline_data;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = rail_.port();
  attributes.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
  const int error = verbs.modify_qp(handles_->pair, &attributes,
                                    IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (error != 0) fail_with("queue pair to INIT", error);
  receive(options.receive_depth);
  if (!failure_.empty()) fail_with(text("no receives on ", rail_.name()), 0);
  verbs.req_notify_cq(handles_->completions, 0);
  address_.number = handles_->pair->qp_num;
  address_.packet_sequence = static_cast<std::uint32_t>(random_u64()) & kSequenceMask;
  address_.lid = rail_.attributes().lid;
  address_.mtu = static_cast<std::uint8_t>(mtu_of(options.mtu, rail_.attributes().active_mtu));
  address_.ethernet = rail_.ethernet();
  std::copy(std::begin(rail_.gid().raw), std::end(rail_.gid().raw), address_.gid.begin());
}

void QueuePair::connect(const QueuePairAddress& remote, const LaneMark& mark, const RdmaOptions& options,
                        Worker& worker, std::function<void(const Status&)> done) {
  ibv_qp_attr ready{};
  ready.qp_state = IBV_QPS_RTR;
  ready.path_mtu = static_cast<ibv_mtu>(std::clamp<int>(std::min(remote.mtu, address_.mtu), IBV_MTU_256, IBV_MTU_4096));
  ready.dest_qp_num = remote.number;
  ready.rq_psn = remote.packet_sequence & kSequenceMask;
  ready.max_dest_rd_atomic = 1;
  ready.min_rnr_timer = 12;  // 0.64 ms
  ready.ah_attr.port_num = rail_.port();
  ready.ah_attr.sl = mark.service_level;
  ready.ah_attr.dlid = remote.lid;
  // A global header carries the traffic class; InfiniBand needs it between subnets only.
  ready.ah_attr.is_global =
      address_.ethernet || !std::equal(remote.gid.begin(), remote.gid.begin() + 8, address_.gid.begin());
  std::copy(remote.gid.begin(), remote.gid.end(), std::begin(ready.ah_attr.grh.dgid.raw));
  ready.ah_attr.grh.sgid_index = rail_.gid_index();
  ready.ah_attr.grh.hop_limit = 64;
  ready.ah_attr.grh.traffic_class = mark.traffic_class;
  ibv_qp_attr send{};
  send.qp_state = IBV_QPS_RTS;
  send.timeout = static_cast<std::uint8_t>(options.timeout);
  send.retry_cnt = static_cast<std::uint8_t>(options.retries);
  send.rnr_retry = static_cast<std::uint8_t>(options.rnr_retries);
  send.sq_psn = address_.packet_sequence;
  send.max_rd_atomic = 1;
  worker.post([handles = handles_, ready, send, done = std::move(done), name = rail_.name(),
               same_kind = remote.ethernet == address_.ethernet, weak = weak_from_this(),
               &progress = rail_.progress()]() mutable {
    if (weak.expired()) return;  // closed meanwhile: nobody waits for it
    Status status;
    if (!same_kind) {
      status = {Code::kIo, 0, "one side's port is InfiniBand, the other's Ethernet; list rails in one order"};
    } else if (const int error =
                   handles->verbs.modify_qp(handles->pair, &ready,
                                            IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                                IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)) {
      status = {Code::kIo, error, text(name, " can't reach its peer: ", std::strerror(error))};
    } else if (const int error_sending =
                   handles->verbs.modify_qp(handles->pair, &send,
                                            IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                                IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC)) {
      status = {Code::kIo, error_sending, text(name, ": queue pair to RTS: ", std::strerror(error_sending))};
    }
    handles.reset();
    progress.post([weak = std::move(weak), status = std::move(status), done = std::move(done)] {
      const auto self = weak.lock();
      if (!self || !self->handles_) return;
      self->connected_ = status.ok();
      done(status);
    });
  });
}

void QueuePair::receive(std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) receives_[i].next = i + 1 < count ? &receives_[i + 1] : nullptr;
  ibv_recv_wr* bad = nullptr;
  if (count > 0 && rail_.verbs().post_recv(handles_->pair, receives_.data(), &bad) != 0)
    failure_ = "posting receives failed";
}

std::size_t QueuePair::post(std::span<const RdmaWrite> writes) {
  const std::size_t count = std::min<std::size_t>(room(), writes.size());
  if (count == 0 || failed_) return 0;
  for (std::size_t i = 0; i < count; ++i) {
    const RdmaWrite& write = writes[i];
    ibv_send_wr& request = requests_[i];
    request = {};
    request.next = i + 1 < count ? &requests_[i + 1] : nullptr;
    request.sg_list = const_cast<ibv_sge*>(write.pieces.data());
    request.num_sge = static_cast<int>(write.count);
    request.opcode = write.immediate ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
    request.imm_data = htobe32(write.data);
    request.wr.rdma.remote_addr = write.remote;
    request.wr.rdma.rkey = write.remote_key;
    std::uint64_t bytes = 0;
    for (std::uint32_t piece = 0; piece < write.count; ++piece) bytes += write.pieces[piece].length;
    if (bytes > 0 && bytes <= max_inline_) request.send_flags |= IBV_SEND_INLINE;
  }
  ibv_send_wr& last = requests_[count - 1];
  last.send_flags |= IBV_SEND_SIGNALED;
  last.wr_id = count;
  ibv_send_wr* bad = nullptr;
  const int error = rail_.verbs().post_send(handles_->pair, requests_.data(), &bad);
  used_ += static_cast<std::uint32_t>(count);
  ++doorbells_;
  work_requests_ += count;
  if (error == 0) return count;
  // Some may be on their way: the queue pair is of no more use. Told later, not in the middle of the caller's work.
  failed_ = true;
  rail_.progress().post([weak = weak_from_this(), why = text("posting writes failed: ", std::strerror(error))] {
    const auto self = weak.lock();
    if (self && self->handles_) self->events_.on_failed(*self, why);
  });
  return count;
}

LaneMark QueuePair::query() const {
  ibv_qp_attr attributes{};
  ibv_qp_init_attr init{};
  if (!handles_ || rail_.verbs().query_qp(handles_->pair, &attributes, IBV_QP_AV, &init) != 0) return {};
  return {attributes.ah_attr.sl, attributes.ah_attr.grh.traffic_class};
}

void QueuePair::close() {
  connected_ = false;
  handles_.reset();
}

QueuePair::Handles::~Handles() {
  if (pair != nullptr && verbs.destroy_qp(pair) != 0) {
    // Refused: then at least it must not move bytes any more.
    ibv_qp_attr error{};
    error.qp_state = IBV_QPS_ERR;
    verbs.modify_qp(pair, &error, IBV_QP_STATE);
  }
  // Waits until its events have been acknowledged: whoever has one may still use this.
  if (completions != nullptr) verbs.destroy_cq(completions);
}

void QueuePair::on_event(ibv_cq* completions, void* context) {
  const auto& handles = *static_cast<Handles*>(context);
  const auto owner = handles.owner.lock();
  handles.verbs.ack_cq_events(completions, 1);
  if (owner) owner->on_completions();
}

void QueuePair::fail(const std::string& why) {
  if (std::exchange(failed_, true)) return;
  events_.on_failed(*this, why);
}

void QueuePair::on_completions() {
  const auto keep = shared_from_this();
  if (!handles_) return;
  // Asked for before polling: what comes after the last look makes another event.
  rail_.verbs().req_notify_cq(handles_->completions, 0);
  for (int round = 0; round < kPollRounds; ++round) {
    const bool more = collect();
    dispatch();
    if (!more || !handles_) return;
  }
  dispatch_later();
}

void QueuePair::dispatch_later() {
  rail_.progress().post([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->on_completions();
  });
}

void QueuePair::look() {
  if (!handles_) return;
  while (collect()) continue;
  if (!immediates_.empty() || has_room_ || !failure_.empty()) dispatch_later();
}

bool QueuePair::collect() {
  std::array<ibv_wc, kPollBatch> done;
  const int count = rail_.verbs().poll_cq(handles_->completions, kPollBatch, done.data());
  std::uint32_t received = 0;
  for (int i = 0; i < count && failure_.empty(); ++i) {
    const ibv_wc& each = done[static_cast<std::size_t>(i)];
    if (each.status != IBV_WC_SUCCESS) {
      failure_ = text(each.wr_id == kReceive ? "receive: " : "write: ", rail_.verbs().wc_status_str(each.status));
    } else if (each.wr_id == kReceive) {
      immediates_.push_back(be32toh(each.imm_data));
      ++received;
    } else {
      used_ -= static_cast<std::uint32_t>(each.wr_id);
      has_room_ = true;
    }
  }
  if (count < 0) failure_ = "polling completions failed";
  // Before they are told: whoever hears that a write is done may send the next one.
  if (failure_.empty()) receive(received);
  return count == kPollBatch && failure_.empty();
}

void QueuePair::dispatch() {
  telling_.swap(immediates_);
  for (const std::uint32_t data : telling_) {
    if (handles_) events_.on_immediate(*this, data);
  }
  telling_.clear();
  if (std::exchange(has_room_, false) && handles_) events_.on_room(*this);
  if (!failure_.empty() && handles_) fail(failure_);
}

}  // namespace dualkv
