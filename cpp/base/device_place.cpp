// Paths of sysfs, compared.
#include "base/device_place.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <utility>

namespace dualkv {

namespace {

// Folders that both paths begin with.
std::size_t in_common(const std::string& a, const std::string& b) {
  const std::filesystem::path first(a), second(b);
  const auto ends = std::mismatch(first.begin(), first.end(), second.begin(), second.end());
  return static_cast<std::size_t>(std::distance(first.begin(), ends.first));
}

}  // namespace

DevicePlace place_of(const std::string& folder) {
  DevicePlace place;
  std::error_code missing;
  const auto path = std::filesystem::canonical(folder, missing);
  if (missing) return place;
  place.path = path;
  std::ifstream(path / "numa_node") >> place.numa_node;
  return place;
}

std::vector<std::size_t> nearest(const DevicePlace& to, const std::vector<DevicePlace>& places) {
  using Nearness = std::pair<std::size_t, bool>;
  const auto nearness = [&](const DevicePlace& place) {
    return Nearness(in_common(to.path, place.path), to.numa_node >= 0 && place.numa_node == to.numa_node);
  };
  Nearness best{0, false};
  for (const DevicePlace& place : places) best = std::max(best, nearness(place));
  std::vector<std::size_t> out;
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (nearness(places[i]) == best) out.push_back(i);
  }
  return out;
}

}  // namespace dualkv
