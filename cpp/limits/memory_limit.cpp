// What one thread copies and checksums.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "base/hash.h"
#include "base/text.h"
#include "limits/faulted_memory.h"
#include "limits/meter.h"

namespace dualkv::limits {

namespace {

void fill_counting(std::span<std::byte> memory) {
  for (std::uint64_t at = 0; at + sizeof(at) <= memory.size(); at += sizeof(at)) {
    const std::uint64_t word = at / sizeof(at);
    std::memcpy(memory.data() + at, &word, sizeof(word));
  }
}

void require_inside(std::span<const std::uint64_t> offsets, std::uint64_t block_bytes, std::uint64_t bytes) {
  for (const std::uint64_t offset : offsets) {
    if (block_bytes > bytes || offset > bytes - block_bytes) {
      throw Error(Code::kInvalidArgument,
                  text("copy: a block of ", block_bytes, " bytes at ", offset, " is outside of ", bytes, " bytes"));
    }
  }
}

void require_valid(const BlockCopies& copies, std::uint64_t bytes) {
  if (copies.block_bytes == 0 || copies.source_offsets.empty() ||
      copies.source_offsets.size() != copies.target_offsets.size()) {
    throw Error(Code::kInvalidArgument,
                text("copy: block_bytes = ", copies.block_bytes, ", ", copies.source_offsets.size(), " sources, ",
                     copies.target_offsets.size(), " targets: give at least one byte, and one target a source"));
  }
  require_inside(copies.source_offsets, copies.block_bytes, bytes);
  require_inside(copies.target_offsets, copies.block_bytes, bytes);
}

// A fixed seed: every run walks the same way.
std::vector<std::uint64_t> scattered_offsets(std::uint64_t bytes, std::uint64_t block_bytes) {
  std::vector<std::uint64_t> offsets(bytes / block_bytes);
  for (std::uint64_t i = 0; i < offsets.size(); ++i) offsets[i] = i * block_bytes;
  std::shuffle(offsets.begin(), offsets.end(), std::mt19937_64(1));
  return offsets;
}

}  // namespace

CopyArena::CopyArena(std::uint64_t bytes, bool huge_pages)
    : source_(std::make_unique<FaultedMemory>(bytes, huge_pages)),
      target_(std::make_unique<FaultedMemory>(bytes, huge_pages)) {
  fill_counting(source_->bytes());
}

CopyArena::~CopyArena() = default;

std::span<const std::byte> CopyArena::source() const { return source_->bytes(); }
std::span<const std::byte> CopyArena::target() const { return target_->bytes(); }

Sample CopyArena::run(const BlockCopies& copies) {
  require_valid(copies, source_->bytes().size());
  const std::byte* source = source_->bytes().data();
  std::byte* target = target_->bytes().data();
  const std::size_t count = copies.source_offsets.size();
  const Meter meter(CLOCK_THREAD_CPUTIME_ID);
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(target + copies.target_offsets[i], source + copies.source_offsets[i], copies.block_bytes);
  }
  return meter.stop(count * copies.block_bytes);
}

Sample checksum_memory(std::uint64_t bytes, std::uint64_t block_bytes) {
  if (block_bytes == 0 || block_bytes > bytes) {
    throw Error(Code::kInvalidArgument,
                text("checksum: block_bytes = ", block_bytes, " of ", bytes, " bytes: must be 1 to bytes"));
  }
  const FaultedMemory memory(bytes, /*huge_pages=*/true);
  fill_counting(memory.bytes());
  const std::vector<std::uint64_t> offsets = scattered_offsets(bytes, block_bytes);
  std::uint64_t sum = 0;
  const Meter meter(CLOCK_THREAD_CPUTIME_ID);
  for (const std::uint64_t offset : offsets) {
    const Extent block{memory.bytes().data() + offset, block_bytes};
    sum ^= checksum(std::span(&block, 1));
  }
  const Sample sample = meter.stop(offsets.size() * block_bytes);
  // The result is used, so that no optimizer may leave the work out.
  const volatile std::uint64_t used = sum;
  static_cast<void>(used);
  return sample;
}

}  // namespace dualkv::limits
