// Finding and opening ports, and their events.
#include "rdma/rail.h"

#include <fcntl.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/text.h"
#include "dualkv/status.h"
#include "rdma/queue_pair.h"

namespace dualkv {

namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

[[noreturn]] void fail(const std::string& what) { throw Error(Code::kUnsupported, "rdma: " + what, errno); }

void set_nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

struct Wanted {
  std::string device;
  std::uint8_t port = 0;  // 0 = all of them
};

Wanted parse(const std::string& given) {
  const std::size_t colon = given.find(':');
  Wanted wanted{given.substr(0, colon), 0};
  if (colon == std::string::npos) return wanted;
  const int port = std::atoi(given.c_str() + colon + 1);
  if (port < 1 || port > 255) {
    throw Error(Code::kInvalidArgument, text("rdma: device '", given, "': give a name, or name:port as in mlx5_0:1"));
  }
  wanted.port = static_cast<std::uint8_t>(port);
  return wanted;
}

}  // namespace

std::vector<std::unique_ptr<Rail>> Rail::open_all(const RdmaOptions& options, const DevicePlace& near,
                                                  Progress& progress,
                                                  std::function<void(const std::string&)> on_fault) {
  std::string why;
  Verbs* verbs = dualkv::verbs(&why);
  if (verbs == nullptr) throw Error(Code::kUnsupported, "rdma: " + why + ", or use tcp://");
  int count = 0;
  ibv_device** list = verbs->get_device_list(&count);
  const std::unique_ptr<ibv_device*, void (*)(ibv_device**)> owner(list, verbs->free_device_list);
  const auto open_ports = [&](ibv_device* device, std::uint8_t port, std::vector<std::unique_ptr<Rail>>& rails) {
    // A device has few ports; the first that does not exist ends the search.
    for (int i = port == 0 ? 1 : port; i <= (port == 0 ? 255 : port); ++i) {
      try {
        rails.emplace_back(new Rail(*verbs, progress, device, static_cast<std::uint8_t>(i), options.gid_index));
      } catch (const Error&) {
        if (port != 0) throw;
        return;
      }
      if (i >= rails.back()->device().phys_port_cnt) return;
    }
  };
  std::vector<std::unique_ptr<Rail>> rails;
  for (const std::string& given : options.devices) {
    const Wanted wanted = parse(given);
    const auto device = std::find_if(list, list + count,
                                     [&](ibv_device* each) { return wanted.device == verbs->get_device_name(each); });
    if (device == list + count) {
      errno = 0;
      fail(text("no device '", wanted.device, "'; `ibv_devices` lists those of this machine"));
    }
    open_ports(*device, wanted.port == 0 ? 1 : wanted.port, rails);
    if (rails.back()->attributes().state != IBV_PORT_ACTIVE) {
      errno = 0;
      fail(text("port ", rails.back()->name(), " is not active; is its network up?"));
    }
  }
  if (options.devices.empty()) {
    for (int i = 0; i < count; ++i) open_ports(list[i], 0, rails);
    std::erase_if(rails, [](const auto& rail) { return rail->attributes().state != IBV_PORT_ACTIVE; });
    std::vector<DevicePlace> places;
    for (const auto& rail : rails) places.push_back(rail->place());
    std::vector<std::unique_ptr<Rail>> chosen;
    for (const std::size_t index : nearest(near, places)) chosen.push_back(std::move(rails[index]));
    rails = std::move(chosen);
  }
  if (rails.empty()) {
    errno = 0;
    fail("no active port; `ibv_devinfo` shows those of this machine. Or use tcp://");
  }
  for (const auto& rail : rails) rail->watch(on_fault);
  return rails;
}

Rail::Rail(Verbs& verbs, Progress& progress, ibv_device* device, std::uint8_t port, int gid_index)
    : verbs_(verbs), progress_(progress), port_(port) {
  const std::string device_name = verbs.get_device_name(device);
  name_ = text(device_name, ":", int{port});
  context_ = verbs.open_device(device);
  if (context_ == nullptr) fail(text("cannot open ", device_name));
  try {
    if (verbs.query_device(context_, &device_) != 0 || verbs.query_port(context_, port, &attributes_) != 0) {
      fail(text("cannot query port ", name_));
    }
    choose_gid(gid_index);
    domain_ = verbs.alloc_pd(context_);
    channel_ = domain_ != nullptr ? verbs.create_comp_channel(context_) : nullptr;
    if (channel_ == nullptr) fail(text("cannot set up ", name_));
  } catch (const Error&) {
    if (domain_ != nullptr) verbs.dealloc_pd(domain_);
    verbs.close_device(context_);
    throw;
  }
  place_ = place_of("/sys/class/infiniband/" + device_name + "/device");
}

Rail::~Rail() {
  if (watched_) {
    progress_.unwatch(channel_->fd);
    progress_.unwatch(context_->async_fd);
  }
  verbs_.destroy_comp_channel(channel_);
  verbs_.dealloc_pd(domain_);
  verbs_.close_device(context_);
}

// RoCE wants an entry of the version 2 (UDP), whose traffic class is the IP header's; routable ones first.
void Rail::choose_gid(int wanted) {
  const std::string device = name_.substr(0, name_.rfind(':'));
  int best = -1, best_rank = 0;
  for (int i = 0; i < attributes_.gid_tbl_len; ++i) {
    ibv_gid gid{};
    if (wanted >= 0 && i != wanted) continue;
    if (verbs_.query_gid(context_, port_, i, &gid) != 0) continue;
    if (std::all_of(std::begin(gid.raw), std::end(gid.raw), [](std::uint8_t byte) { return byte == 0; })) continue;
    const std::string type =
        first_line(text("/sys/class/infiniband/", device, "/ports/", int{port_}, "/gid_attrs/types/", i));
    const bool mapped = std::all_of(gid.raw, gid.raw + 10, [](std::uint8_t byte) { return byte == 0; });
    const bool link_local = gid.raw[0] == 0xfe && (gid.raw[1] & 0xc0) == 0x80;
    int rank = 1;
    if (ethernet()) rank = type != "RoCE v2" ? 1 : mapped ? 4 : link_local ? 2 : 3;
    if (rank <= best_rank) continue;
    best = i;
    best_rank = rank;
    gid_ = gid;
  }
  if (best < 0 || best > 255) {
    errno = 0;
    fail(wanted >= 0 ? text("port ", name_, " has no GID with index ", wanted) : text("port ", name_, " has no GID"));
  }
  gid_index_ = static_cast<std::uint8_t>(best);
}

void Rail::watch(std::function<void(const std::string&)> on_fault) {
  on_fault_ = std::move(on_fault);
  set_nonblocking(channel_->fd);
  set_nonblocking(context_->async_fd);
  progress_.watch(channel_->fd, EPOLLIN, [this](std::uint32_t) { on_completion_events(); });
  progress_.watch(context_->async_fd, EPOLLIN, [this](std::uint32_t) { on_async_events(); });
  watched_ = true;
}

void Rail::on_completion_events() {
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  // One at a time: a queue pair that ends while another's completions are handled takes its events along.
  if (verbs_.get_cq_event(channel_, &queue, &context) != 0) return;
  QueuePair::on_event(queue, context);
}

void Rail::on_async_events() {
  ibv_async_event event{};
  while (verbs_.get_async_event(context_, &event) == 0) {
    const ibv_event_type type = event.event_type;
    verbs_.ack_async_event(&event);
    // Failures of a queue pair show in its completions as well, and ports come back by themselves.
    if (type == IBV_EVENT_DEVICE_FATAL) on_fault_(text("device of ", name_, " failed"));
    if (type == IBV_EVENT_CQ_ERR) on_fault_(text("a completion queue of ", name_, " overran"));
  }
}

}  // namespace dualkv
