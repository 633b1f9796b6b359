// Which NICs are near to what.
#include "base/device_place.h"

#include <fstream>

#include "support.h"

namespace dualkv::testing {
namespace {

using Indices = std::vector<std::size_t>;

TEST(DevicePlace, SharedBridgesComeFirstThenTheNumaNode) {
  const std::string root = "/sys/devices/pci0000:3a/";
  const DevicePlace gpu{root + "0000:3a:01.0/0000:3b:00.0/0000:3c:04.0/0000:3e:00.0", 0};
  const DevicePlace same_switch{root + "0000:3a:01.0/0000:3b:00.0/0000:3c:08.0/0000:3d:00.0", 0};
  const DevicePlace second_port{root + "0000:3a:01.0/0000:3b:00.0/0000:3c:08.0/0000:3d:00.1", 0};
  const DevicePlace same_host_bridge{root + "0000:3a:02.0/0000:40:00.0", 0};
  const DevicePlace same_node{"/sys/devices/pci0000:5d/0000:5d:01.0/0000:5e:00.0", 0};
  const DevicePlace far{"/sys/devices/pci0000:ae/0000:ae:01.0/0000:af:00.0", 1};
  const DevicePlace unknown{};

  EXPECT_EQ(nearest(gpu, {far, same_switch, same_host_bridge, second_port, same_node}), (Indices{1, 3}));
  EXPECT_EQ(nearest(gpu, {far, same_host_bridge, same_node}), (Indices{1}));
  EXPECT_EQ(nearest(gpu, {far, same_node, unknown}), (Indices{1}));
  EXPECT_EQ(nearest(gpu, {far, unknown}), (Indices{0})) << "in the same machine is more than unknown";
  EXPECT_EQ(nearest(gpu, {unknown, unknown}), (Indices{0, 1}));
  EXPECT_EQ(nearest(gpu, {}), Indices{});
}

TEST(DevicePlace, MemoryHasANumaNodeOnly) {
  const DevicePlace one{"/sys/devices/pci0000:3a/0000:3b:00.0", 0}, other{"/sys/devices/pci0000:ae/0000:af:00.0", 1};
  EXPECT_EQ(nearest({"", 1}, {one, other}), (Indices{1}));
  EXPECT_EQ(nearest({"", 7}, {one, other}), (Indices{0, 1})) << "none is there";
  EXPECT_EQ(nearest({"", -1}, {one, other}), (Indices{0, 1})) << "it may be anywhere";
}

TEST(DevicePlace, IsReadFromSysfs) {
  const TempDir root;
  const std::string device = root.path() + "/pci0000:3a/0000:3b:00.0";
  std::filesystem::create_directories(device);
  std::ofstream(device + "/numa_node") << "1\n";
  std::filesystem::create_symlink(device, root.path() + "/link");
  const DevicePlace place = place_of(root.path() + "/link");
  EXPECT_EQ(place.path, std::filesystem::canonical(device));
  EXPECT_EQ(place.numa_node, 1);
  const DevicePlace none = place_of(root.path() + "/no-such");
  EXPECT_EQ(none.path, "");
  EXPECT_EQ(none.numa_node, -1);
}

}  // namespace
}  // namespace dualkv::testing
