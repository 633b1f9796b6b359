// Rail: one port of an RDMA device, open.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/device_place.h"
#include "base/progress.h"
#include "dualkv/rdma.h"
#include "shim/verbs.h"

namespace dualkv {

// Owns the device's context, a protection domain and the completion channel of its queue pairs, whose events it hands
// to them. Progress thread only.
class Rail {
 public:
  // The ports that the options ask for, in order; if they name none, those nearest to `near`. `on_fault` hears of what
  // befalls a whole device. Throws Error: kUnsupported without verbs or without such a port.
  static std::vector<std::unique_ptr<Rail>> open_all(const RdmaOptions& options, const DevicePlace& near,
                                                     Progress& progress,
                                                     std::function<void(const std::string&)> on_fault);
  ~Rail();
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  const std::string& name() const { return name_; }  // "rxe0:1"
  Verbs& verbs() const { return verbs_; }
  Progress& progress() const { return progress_; }
  ibv_context* context() const { return context_; }
  ibv_pd* domain() const { return domain_; }
  ibv_comp_channel* channel() const { return channel_; }
  std::uint8_t port() const { return port_; }
  const ibv_port_attr& attributes() const { return attributes_; }
  const ibv_device_attr& device() const { return device_; }
  std::uint8_t gid_index() const { return gid_index_; }
  const ibv_gid& gid() const { return gid_; }
  bool ethernet() const { return attributes_.link_layer == IBV_LINK_LAYER_ETHERNET; }
  const DevicePlace& place() const { return place_; }

 private:
  Rail(Verbs& verbs, Progress& progress, ibv_device* device, std::uint8_t port, int gid_index);
  void choose_gid(int wanted);
  void watch(std::function<void(const std::string&)> on_fault);
  void on_completion_events();
  void on_async_events();

  Verbs& verbs_;
  Progress& progress_;
  std::string name_;
  ibv_context* context_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_comp_channel* channel_ = nullptr;
  const std::uint8_t port_;
  ibv_port_attr attributes_{};
  ibv_device_attr device_{};
  std::uint8_t gid_index_ = 0;
  ibv_gid gid_{};
  DevicePlace place_;
  bool watched_ = false;
  std::function<void(const std::string&)> on_fault_;
};

}  // namespace dualkv
