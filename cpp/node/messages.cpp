// Encoding and decoding of control messages: a type byte, then fixed fields in order.
#include "node/messages.h"

#include <algorithm>
#include <cmath>

#include "base/bytes.h"

namespace dualkv {

namespace {

constexpr std::size_t kMaxTextBytes = 1024;

void put(ByteWriter& out, const ViewMessage& m) {
  const NodeView& v = m.view;
  out.put_string(v.name);
  out.put(v.block_bytes);
  out.put(v.tokens_per_block);
  out.put(v.read_queue_bytes);
  out.put(v.read_bandwidth);
  out.put(v.link_bandwidth);
  for (std::uint64_t bytes : v.lane_bytes) out.put(bytes);
  out.put(v.free_slots);
  out.put(v.prompt_slots);
  out.put(v.reads_done);
}

void get(ByteReader& in, ViewMessage& m) {
  NodeView& v = m.view;
  v.name = in.get_string(kMaxTextBytes);
  v.block_bytes = in.get<std::uint64_t>();
  v.tokens_per_block = in.get<std::uint32_t>();
  v.read_queue_bytes = in.get<std::uint64_t>();
  v.read_bandwidth = in.get<std::uint64_t>();
  v.link_bandwidth = in.get<std::uint64_t>();
  for (std::uint64_t& bytes : v.lane_bytes) bytes = in.get<std::uint64_t>();
  v.free_slots = in.get<std::uint32_t>();
  v.prompt_slots = in.get<std::uint32_t>();
  v.reads_done = in.get<std::uint64_t>();
}

void put(ByteWriter& out, const OpenLoad& m) {
  out.put(m.load);
  out.put(static_cast<std::uint8_t>(m.decode));
  out.put(m.time_left_us);
  out.put(m.prompt_blocks);
  out.put(m.layers_per_read);
  out.put(m.credit_layers);
  out.put(m.grant);
}

void get(ByteReader& in, OpenLoad& m) {
  m.load = in.get<std::uint64_t>();
  const auto decode = in.get<std::uint8_t>();
  if (decode > 1) in.fail();
  m.decode = decode == 1;
  m.time_left_us = in.get<std::uint64_t>();
  m.prompt_blocks = in.get<std::uint32_t>();
  m.layers_per_read = in.get<std::uint32_t>();
  m.credit_layers = in.get<std::uint32_t>();
  m.grant = in.get<std::uint64_t>();
}

void put_why(ByteWriter& out, Code code, const std::string& why) {
  out.put(code);
  out.put_string(why.substr(0, kMaxTextBytes));
}

void get_why(ByteReader& in, Code& code, std::string& why) {
  const auto number = in.get<std::uint8_t>();
  if (number > static_cast<std::uint8_t>(Code::kUnsupported)) return in.fail();
  code = static_cast<Code>(number);
  why = in.get_string(kMaxTextBytes);
}

void put(ByteWriter& out, const LoadOpened& m) {
  out.put(m.load);
  out.put(m.grant);
  put_why(out, m.code, m.why);
}

void get(ByteReader& in, LoadOpened& m) {
  m.load = in.get<std::uint64_t>();
  m.grant = in.get<std::uint64_t>();
  get_why(in, m.code, m.why);
}

void put(ByteWriter& out, const ReadBlocks& m) {
  out.put(m.load);
  for (const BlockToRead& block : m.blocks) {
    out.put(block.block);
    out.put(static_cast<std::uint8_t>(block.key.bytes().size()));
    out.put_bytes(block.key.bytes());
  }
}

void get(ByteReader& in, ReadBlocks& m) {
  m.load = in.get<std::uint64_t>();
  while (in.ok() && in.left() > 0) {
    BlockToRead block;
    block.block = in.get<std::uint32_t>();
    const auto size = in.get<std::uint8_t>();
    const auto key = in.get_bytes(size);
    if (key.empty() || key.size() > Key::kMaxBytes) return in.fail();
    block.key = Key(key);
    m.blocks.push_back(block);
  }
}

void put(ByteWriter& out, const Credit& m) {
  out.put(m.load);
  out.put(m.layers);
}

void get(ByteReader& in, Credit& m) {
  m.load = in.get<std::uint64_t>();
  m.layers = in.get<std::uint32_t>();
}

void put(ByteWriter& out, const BlocksFailed& m) {
  out.put(m.load);
  out.put(m.os_errno);
  put_why(out, m.code, m.why);
  for (std::uint32_t block : m.blocks) out.put(block);
}

void get(ByteReader& in, BlocksFailed& m) {
  m.load = in.get<std::uint64_t>();
  m.os_errno = in.get<std::int32_t>();
  get_why(in, m.code, m.why);
  while (in.ok() && in.left() > 0) m.blocks.push_back(in.get<std::uint32_t>());
}

void put(ByteWriter& out, const CloseLoad& m) {
  out.put(m.load);
  put_why(out, m.code, m.why);
}

void get(ByteReader& in, CloseLoad& m) {
  m.load = in.get<std::uint64_t>();
  get_why(in, m.code, m.why);
}

constexpr std::uint64_t kLongestUs = 86'400'000'000;  // no load takes more than a day

void put_seconds(ByteWriter& out, double seconds) {
  out.put(std::min(static_cast<std::uint64_t>(std::llround(std::max(seconds, 0.0) * 1e6)), kLongestUs));
}

double get_seconds(ByteReader& in) {
  const auto us = in.get<std::uint64_t>();
  if (us > kLongestUs) in.fail();
  return static_cast<double>(us) / 1e6;
}

void put(ByteWriter& out, const ReadReport& m) {
  out.put(m.load);
  for (const ReadTimes& times : m.times) {
    out.put(times.layers.first);
    out.put(times.layers.count);
    put_seconds(out, times.begin_s);
    put_seconds(out, times.end_s);
    put_seconds(out, times.verify_s);
    out.put(times.bytes);
  }
}

void get(ByteReader& in, ReadReport& m) {
  m.load = in.get<std::uint64_t>();
  while (in.ok() && in.left() > 0) {
    ReadTimes times;
    times.layers.first = in.get<std::uint32_t>();
    times.layers.count = in.get<std::uint32_t>();
    times.begin_s = get_seconds(in);
    times.end_s = get_seconds(in);
    times.verify_s = get_seconds(in);
    times.bytes = in.get<std::uint64_t>();
    m.times.push_back(times);
  }
}

// The type byte is the alternative's index.
template <std::size_t I = 0>
std::optional<Message> decode_as(std::size_t type, ByteReader& in) {
  if constexpr (I == std::variant_size_v<Message>) {
    return std::nullopt;
  } else {
    if (type != I) return decode_as<I + 1>(type, in);
    std::variant_alternative_t<I, Message> message;
    get(in, message);
    if (!in.complete()) return std::nullopt;
    return message;
  }
}

}  // namespace

std::vector<std::byte> encode_message(const Message& message) {
  ByteWriter out;
  out.put(static_cast<std::uint8_t>(message.index()));
  std::visit([&](const auto& m) { put(out, m); }, message);
  return out.take();
}

std::optional<Message> decode_message(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  const auto type = in.get<std::uint8_t>();
  if (!in.ok()) return std::nullopt;
  return decode_as(type, in);
}

}  // namespace dualkv
