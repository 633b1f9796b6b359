// Control messages between nodes (docs/formats.md, "Messages"). Values; decoding never throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "dualkv/keys.h"
#include "dualkv/node.h"
#include "dualkv/policy.h"
#include "dualkv/status.h"

namespace dualkv {

// What the sender looks like now; sent every few milliseconds while it changes, else as a heartbeat.
struct ViewMessage {
  NodeView view;
};

// Prefill to another side: take part in a load.
struct OpenLoad {
  std::uint64_t load = 0;
  bool decode = false;             // hold the prompt and decode from it; else only help reading
  std::uint64_t time_left_us = 0;  // until the load's deadline
  std::uint32_t prompt_blocks = 0;
  std::uint32_t layers_per_read = 0;
  std::uint32_t credit_layers = 0;
  std::uint64_t grant = 0;  // to write into the prefill node's cache
};

// Decode to prefill: the prompt has its staging; publish into `grant`. Or it can't have it, and why.
struct LoadOpened {
  std::uint64_t load = 0;
  std::uint64_t grant = 0;
  Code code = Code::kOk;
  std::string why;
};

struct BlockToRead {
  std::uint32_t block = 0;  // index in the prompt
  Key key;
};

// Prefill to a side: read these and write them layer by layer.
struct ReadBlocks {
  std::uint64_t load = 0;
  std::vector<BlockToRead> blocks;
};

// Prefill to a side: layers [0, layers) may be written.
struct Credit {
  std::uint64_t load = 0;
  std::uint32_t layers = 0;
};

// A side to prefill: these can't be read here.
struct BlocksFailed {
  std::uint64_t load = 0;
  Code code = Code::kIo;
  std::int32_t os_errno = 0;
  std::string why;
  std::vector<std::uint32_t> blocks;
};

// Either way: the load is over for the sender.
struct CloseLoad {
  std::uint64_t load = 0;
  Code code = Code::kOk;
  std::string why;
};

// A side to prefill: all it was asked to read has been read (or has failed), and when. For timelines.
struct ReadReport {
  std::uint64_t load = 0;
  std::vector<ReadTimes> times;
};

using Message =
    std::variant<ViewMessage, OpenLoad, LoadOpened, ReadBlocks, Credit, BlocksFailed, CloseLoad, ReadReport>;

std::vector<std::byte> encode_message(const Message& message);
// Nullopt for anything encode_message would not have written.
std::optional<Message> decode_message(std::span<const std::byte> bytes);

}  // namespace dualkv
