// Bounded reading and writing of little-endian fields, for frames and messages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace dualkv {

class ByteWriter {
 public:
  template <typename T>
  void put(const T& value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    const auto* begin = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), begin, begin + sizeof(T));
  }
  void put_bytes(std::span<const std::byte> bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }
  // Length (16 bits), then the bytes.
  void put_string(const std::string& value) {
    put(static_cast<std::uint16_t>(value.size()));
    put_bytes(std::as_bytes(std::span(value)));
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

// Reads what is there; anything beyond the end yields zeros and makes ok() false, so callers check once.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  T get() {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    T value{};
    const auto raw = get_bytes(sizeof(T));
    if (raw.size() == sizeof(T)) std::memcpy(&value, raw.data(), sizeof(T));
    return value;
  }
  // Empty if fewer are left.
  std::span<const std::byte> get_bytes(std::size_t count) {
    if (count > bytes_.size()) {
      fail();
      return {};
    }
    const auto taken = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return taken;
  }
  std::string get_string(std::size_t most) {
    const auto size = get<std::uint16_t>();
    if (size > most) fail();
    const auto raw = get_bytes(size);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }
  // What was read makes no sense.
  void fail() {
    ok_ = false;
    bytes_ = {};
  }
  std::size_t left() const { return bytes_.size(); }
  bool ok() const { return ok_; }
  // Everything was there and nothing is left over.
  bool complete() const { return ok_ && bytes_.empty(); }

 private:
  std::span<const std::byte> bytes_;
  bool ok_ = true;
};

}  // namespace dualkv
