// Lanes: HIGH carries the model's own traffic, LOW carries KV.
#pragma once

#include <cstdint>

namespace dualkv {

enum class Lane : std::uint8_t { kLow = 0, kHigh = 1 };
constexpr int kLaneCount = 2;

}  // namespace dualkv
