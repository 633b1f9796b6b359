// RDMA: what an operator can set and see of queue pairs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dualkv/lane.h"

namespace dualkv {

struct RdmaOptions {
  // "mlx5_0" or "mlx5_0:2" (port 2). Empty: every active port, those nearest to `gpu`, or of the staging memory's NUMA
  // node, if it has any. Queue pairs go over them in turn, so that both sides of a link should list their rails in the
  // same order.
  std::vector<std::string> devices;
  // CUDA device whose NICs are used: behind the same PCIe switch, else the same host bridge, else of its NUMA node. For
  // nodes of one GPU. -1: none.
  int gpu = -1;
  int gid_index = -1;     // -1: the port's RoCE v2 entry with an IPv4 address, else with a global IPv6 one
  std::uint32_t mtu = 0;  // of the path in bytes, 256 to 4096; 0 = what both ports have
  int timeout = 14;       // a packet is sent again after 4.096 us * 2^timeout without an answer
  int retries = 7;        // then the queue pair has failed
  int rnr_retries = 7;    // the same where the receiver has no receive posted; 7 = for ever
  // A queue pair whose writes get nowhere for this long has failed, whatever its driver says: some never tell.
  double stall_s = 2.0;
  // Work requests that wait in a queue pair, and writes with immediate data that may be under way to this node on it.
  std::uint32_t send_depth = 1024;
  std::uint32_t receive_depth = 256;
  std::uint64_t registered_bytes = 0;  // most memory registered at once, the least recently used goes; 0 = no limit
  bool relaxed_ordering = true;        // of the NIC's PCIe writes, where the driver offers it
  bool on_demand_paging = false;       // registered memory is not pinned, where the device offers it
};

// Of one link. Counters since it was made.
struct RdmaStats {
  std::uint32_t queue_pairs = 0;  // of both lanes
  std::uint32_t queue_pairs_up = 0;
  std::uint64_t bytes_written[kLaneCount] = {0, 0};
  std::uint64_t batches = 0;         // frames of Layer Blocks written by RDMA
  std::uint64_t work_requests = 0;   // posted
  std::uint64_t doorbells = 0;       // calls that posted them
  std::uint64_t inline_batches = 0;  // sent over TCP: no queue pair was up, or memory was not registered
  std::uint64_t failures = 0;        // queue pairs that failed
  std::uint64_t fences = 0;          // queue pairs ended so that memory taken back is not written or read any more
  std::uint64_t rebuilds = 0;        // queue pairs that came up again
  std::string last_failure;
  // What the queue pairs say of themselves (ibv_query_qp); -1 = none is up.
  int service_level[kLaneCount] = {-1, -1};
  int traffic_class[kLaneCount] = {-1, -1};
  std::vector<std::string> rails;  // "rxe0:1", in the order of queue pairs
};

}  // namespace dualkv
