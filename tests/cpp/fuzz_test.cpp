// Runs the fuzz target over mutations of valid inputs, the same ones every time.
#include "node/messages.h"
#include "storage/block_format.h"
#include "support.h"
#include "transport/handshake.h"
#include "transport/wire.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace dualkv::testing {
namespace {

using Bytes = std::vector<std::byte>;

Bytes valid_trailer() {
  const KvGeometry geometry({700, 900, 1100}, 16, "fuzz");  // the target's
  const auto keys = test_keys(geometry, 2);
  Bytes image(geometry.file_bytes());
  write_trailer(geometry, {keys[1], keys[0]}, image);
  return Bytes(image.begin() + static_cast<std::ptrdiff_t>(geometry.payload_bytes()), image.end());
}

Bytes valid_write(std::uint32_t extents) {
  WriteHeader write{1, 2, 1, extents, extents == 0 ? 0u : 5u, std::vector<WriteEntry>(3)};
  for (WriteEntry& entry : write.entries) {
    if (extents > 0) entry.source[0] = {nullptr, extents == 1 ? 900u : 400u};
    if (extents > 1) entry.source[1] = {nullptr, 500};
  }
  return encode_write(write);
}

std::vector<Bytes> seeds() {
  Hello hello;
  hello.name = "node";
  const auto keys = test_keys(small_geometry(), 2);
  std::vector<Bytes> out = {
      {},
      valid_trailer(),
      valid_write(0),
      valid_write(1),
      valid_write(2),
      encode_write_done({9, Code::kIo}),
      encode_rdma_setup({RdmaSetup::Step::kOffer, 1, 2, 3, 4, 5, 5, true, {}}),
      encode_write_ask({1, 2, {3, 4, 1, 0, 0, std::vector<WriteEntry>(2)}}),
      encode_write_clear({1, 2, {{1, {{{4096, 900, 7}}}}, {}, {2, {{{4096, 400, 7}, {8192, 500, 8}}}}}}),
      encode_write_drop(5),
      encode_hello(hello),
      encode_message(ViewMessage{}),
      encode_message(OpenLoad{1, true, 2, 3, 4, 5, 6}),
      encode_message(LoadOpened{1, 2, Code::kRefused, "no"}),
      encode_message(ReadBlocks{1, {{0, keys[0]}, {1, keys[1]}}}),
      encode_message(Credit{1, 2}),
      encode_message(BlocksFailed{1, Code::kIo, 5, "bad", {1, 2}}),
      encode_message(CloseLoad{1, Code::kCancelled, "over"}),
  };
  for (const FrameType type : {FrameType::kHello, FrameType::kMessage, FrameType::kWriteDone}) {
    out.push_back(encode_frame(type, Bytes(16, std::byte{3})));
  }
  return out;
}

// One to four small damages.
void mutate(Bytes& bytes, std::mt19937& random) {
  for (std::uint32_t i = 1 + random() % 4; i > 0; --i) {
    const std::size_t at = bytes.empty() ? 0 : random() % bytes.size();
    switch (bytes.empty() ? 4 : random() % 6) {
      case 0: bytes[at] ^= std::byte{1} << (random() % 8); break;
      case 1: bytes[at] = static_cast<std::byte>(random()); break;
      case 2: bytes.resize(at); break;
      case 3: bytes[at] = std::byte{0xff}; break;
      case 4: bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), random() % 9, std::byte(random())); break;
      default: bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at)); break;
    }
  }
}

void feed(const Bytes& bytes) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

TEST(Fuzz, DecodersSurviveMutatedInput) {
  std::mt19937 random(2024);
  const std::vector<Bytes> all = seeds();
  for (const Bytes& seed : all) feed(seed);
  for (int round = 0; round < 20'000; ++round) {
    Bytes bytes = all[random() % all.size()];
    mutate(bytes, random);
    feed(bytes);
  }
}

}  // namespace
}  // namespace dualkv::testing
