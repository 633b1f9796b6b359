// Fuzz target: every decoder that sees bytes from a peer or from a shared file system. It must never crash, read out
// of bounds, or accept what the encoders would not have written.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "node/messages.h"
#include "storage/block_format.h"
#include "transport/handshake.h"
#include "transport/wire.h"

namespace {

using dualkv::FrameHeader;
using dualkv::FrameType;
using dualkv::KvGeometry;
using Bytes = std::span<const std::byte>;

void require(bool fine) {
  if (!fine) std::abort();
}

const KvGeometry& geometry() {
  static const KvGeometry shape({700, 900, 1100}, 16, "fuzz");
  return shape;
}

bool same(const std::vector<std::byte>& written, Bytes read) {
  return std::equal(written.begin(), written.end(), read.begin(), read.end());
}

void try_frame(Bytes in) {
  if (in.size() < FrameHeader::kBytes) return;
  const auto header = dualkv::decode_header(in.first<FrameHeader::kBytes>());
  if (!header) return;
  require(header->body_bytes <= dualkv::max_body_bytes(header->type));
  const Bytes rest = in.subspan(FrameHeader::kBytes);
  dualkv::body_is_right(*header, rest.first(std::min<std::size_t>(rest.size(), header->body_bytes)));
}

void try_writes(Bytes in) {
  for (const FrameType type : {FrameType::kWrite, FrameType::kWriteRef}) {
    const auto write = dualkv::decode_write(in, type, geometry());
    if (!write) continue;
    require(write->layer < geometry().layers() && write->entries.size() <= dualkv::kMaxWriteBlocks);
    require(same(dualkv::encode_write(*write), in));
  }
  if (const auto regions = dualkv::decode_regions(in)) require(same(dualkv::encode_regions(*regions), in));
  if (const auto done = dualkv::decode_write_done(in)) require(same(dualkv::encode_write_done(*done), in));
}

void try_rdma(Bytes in) {
  if (const auto setup = dualkv::decode_rdma_setup(in)) require(same(dualkv::encode_rdma_setup(*setup), in));
  if (const auto ask = dualkv::decode_write_ask(in, geometry())) require(same(dualkv::encode_write_ask(*ask), in));
  if (const auto clear = dualkv::decode_write_clear(in)) require(same(dualkv::encode_write_clear(*clear), in));
  if (const auto id = dualkv::decode_write_drop(in)) require(same(dualkv::encode_write_drop(*id), in));
}

void try_messages(Bytes in) {
  if (const auto hello = dualkv::decode_hello(in)) require(same(dualkv::encode_hello(*hello), in));
  if (const auto message = dualkv::decode_message(in)) require(same(dualkv::encode_message(*message), in));
}

// As a block file: the input, cut or padded to the size every reader checks first; trailer first, since that is what
// a fuzzer changes with effect.
void try_block(Bytes in) {
  std::vector<std::byte> image(geometry().file_bytes());
  const auto trailer = std::span(image).subspan(geometry().payload_bytes());
  const std::size_t head = std::min(in.size(), trailer.size());
  std::copy_n(in.begin(), head, trailer.begin());
  const std::size_t rest = std::min<std::size_t>(in.size() - head, geometry().payload_bytes());
  std::copy_n(in.begin() + static_cast<std::ptrdiff_t>(head), rest, image.begin());
  dualkv::TrailerInfo info;
  if (!dualkv::read_trailer(trailer, &info)) return;
  dualkv::check_image(geometry(), info.key, image, {0, geometry().layers()});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Bytes in = std::as_bytes(std::span(data, size));
  try_frame(in);
  try_writes(in);
  try_rdma(in);
  try_messages(in);
  try_block(in);
  dualkv::TrailerInfo info;
  dualkv::read_trailer(in, &info);
  return 0;
}
