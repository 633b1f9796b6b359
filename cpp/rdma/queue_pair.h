// QueuePair: a reliable connection that carries chains of one-sided writes.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/worker.h"
#include "dualkv/rdma.h"
#include "dualkv/status.h"
#include "rdma/rail.h"

namespace dualkv {

// What the other side needs to connect to a queue pair. A value.
struct QueuePairAddress {
  std::uint32_t number = 0;
  std::uint32_t packet_sequence = 0;
  std::uint16_t lid = 0;
  std::uint8_t mtu = 0;  // enum ibv_mtu
  bool ethernet = false;
  std::array<std::uint8_t, 16> gid{};
};

// How the fabric tells a lane's packets: the service level (InfiniBand, and 802.1p on Ethernet) and the traffic class
// (RoCE v2: the IP header's DSCP and ECN bits).
struct LaneMark {
  std::uint8_t service_level = 0;
  std::uint8_t traffic_class = 0;
};

// Bytes of this node that go to one run of the other's memory.
struct RdmaWrite {
  static constexpr std::uint32_t kMaxPieces = 4;
  std::array<ibv_sge, kMaxPieces> pieces{};
  std::uint32_t count = 0;  // 0: no bytes, only the immediate data
  std::uint64_t remote = 0;
  std::uint32_t remote_key = 0;
  bool immediate = false;  // tells the other side, once the bytes of this and all earlier writes are in place
  std::uint32_t data = 0;
};

// Owns the queue pair and a completion queue of its own, as long as all that can be outstanding: it can't overrun.
// Progress thread only.
class QueuePair : public std::enable_shared_from_this<QueuePair> {
 public:
  // Called from completions; may end the queue pair.
  class Events {
   public:
    virtual ~Events() = default;
    virtual void on_room(QueuePair& pair) = 0;  // writes have left the queue
    virtual void on_immediate(QueuePair& pair, std::uint32_t data) = 0;
    virtual void on_failed(QueuePair& pair, const std::string& why) = 0;  // once
  };

  // `rail` and `events` must outlive the queue pair's open time. Throws Error.
  static std::shared_ptr<QueuePair> create(Rail& rail, const RdmaOptions& options, Events& events);
  ~QueuePair() { close(); }
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  const QueuePairAddress& address() const { return address_; }
  Rail& rail() const { return rail_; }
  // Finding the way to the peer may take the kernel seconds (it asks for its hardware address), so the worker does it.
  // `done` is called on the progress thread, unless the queue pair was closed meanwhile.
  void connect(const QueuePairAddress& remote, const LaneMark& mark, const RdmaOptions& options, Worker& worker,
               std::function<void(const Status&)> done);
  bool connected() const { return connected_; }
  // Work requests that can be posted now.
  std::uint32_t room() const { return handles_ ? depth_ - used_ : 0; }
  // As many as there is room for, in order, as one chain with one doorbell. Only the last one makes a completion.
  // Returns how many were posted; 0 also if the queue pair has failed, which on_failed() tells later.
  std::size_t post(std::span<const RdmaWrite> writes);
  std::uint64_t doorbells() const { return doorbells_; }
  std::uint64_t work_requests() const { return work_requests_; }
  // Of them, those that are known to have left.
  std::uint64_t retired() const { return work_requests_ - used_; }
  // Looks for completions now, so that retired() is up to date; events follow later, not from within this call.
  void look();
  // As the device says it (ibv_query_qp).
  LaneMark query() const;
  // When this returns nothing is read from or written to this node's memory any more. No events follow. Idempotent.
  void close();

  // The rail has an event of this completion queue.
  static void on_event(ibv_cq* completions, void* context);

 private:
  // What the driver knows. Outlives the queue pair while the worker connects it; nothing can reach this node's memory
  // through it then, as nothing was cleared for it.
  struct Handles {
    explicit Handles(Verbs& verbs) : verbs(verbs) {}
    ~Handles();
    Verbs& verbs;
    std::weak_ptr<QueuePair> owner;
    ibv_cq* completions = nullptr;
    ibv_qp* pair = nullptr;
  };
  QueuePair(Rail& rail, const RdmaOptions& options, Events& events);
  void create_pair(const RdmaOptions& options);
  void receive(std::uint32_t count);
  void on_completions();
  void dispatch_later();
  bool collect();  // true if there may be more
  void dispatch();
  void fail(const std::string& why);

  Rail& rail_;
  Events& events_;
  std::shared_ptr<Handles> handles_;  // null: closed
  QueuePairAddress address_;
  bool connected_ = false;
  bool failed_ = false;
  std::uint32_t depth_ = 0;
  std::uint32_t used_ = 0;  // posted and not known to have left
  std::uint32_t max_inline_ = 0;
  std::uint64_t doorbells_ = 0;
  std::uint64_t work_requests_ = 0;
  // Collected and not told yet.
  std::vector<std::uint32_t> immediates_, telling_;
  bool has_room_ = false;
  std::string failure_;
  std::vector<ibv_send_wr> requests_;  // scratch of post()
  std::vector<ibv_recv_wr> receives_;  // a chain of no bytes each
};

}  // namespace dualkv
