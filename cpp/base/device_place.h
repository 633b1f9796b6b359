// Where a device is in the machine, and which of several are nearest to it.
#pragma once

#include <string>
#include <vector>

namespace dualkv {

// As the kernel tells it in sysfs.
struct DevicePlace {
  std::string path;    // resolved, its bridges in it: /sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0; "" = unknown
  int numa_node = -1;  // -1 = unknown, or the only one
};

// Of a device's folder, or a link to it, such as /sys/class/infiniband/mlx5_0/device.
DevicePlace place_of(const std::string& folder);

// Indices of those nearest to `to`: with the most bridges in common, and among those on its NUMA node, if any are. All
// of them where nothing is known.
std::vector<std::size_t> nearest(const DevicePlace& to, const std::vector<DevicePlace>& places);

}  // namespace dualkv
