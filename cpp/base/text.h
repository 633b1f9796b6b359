// Builds messages from values (g++ 12 has no <format>).
#pragma once

#include <sstream>
#include <string>

namespace dualkv {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace dualkv
