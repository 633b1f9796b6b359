// Checksums: every kernel gives XXH3's result; copying and checking in one pass copies every byte.
#include "base/hash.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "base/checksum_kernel.h"
#include "dualkv/keys.h"

namespace dualkv {
namespace {

std::vector<std::byte> noise(std::size_t bytes) {
  std::vector<std::byte> out(bytes);
  std::mt19937_64 random(bytes + 1);
  for (std::byte& byte : out) byte = static_cast<std::byte>(random());
  return out;
}

std::vector<const ChecksumKernel*> kernels_of_this_cpu() {
  std::vector<const ChecksumKernel*> kernels{&kBaselineKernel};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Kernel);
  if (__builtin_cpu_supports("avx512f")) kernels.push_back(&kAvx512Kernel);
#endif
  return kernels;
}

const std::size_t kSizes[] = {0,    1,    3,    16,   17,   128,  129,   240,   241,   512,    1023,   1024,
                              1025, 1087, 1088, 1089, 2048, 2049, 41984, 65536, 65537, 100003, 1 << 20};

TEST(Hash, KernelsAgreeWithXxh3OnEverySize) {
  for (std::size_t size : kSizes) {
    const auto data = noise(size);
    const std::uint64_t expected = XXH3_64bits(data.data(), size);
    for (const ChecksumKernel* kernel : kernels_of_this_cpu()) {
      EXPECT_EQ(kernel->hash(data.data(), size), expected) << size;
    }
    EXPECT_EQ(checksum(data), expected) << size;
  }
}

// The target in pieces of these sizes, at an odd address or an aligned one; the bytes around it must stay.
void check_copy(const std::vector<std::byte>& source, std::vector<std::size_t> pieces, std::size_t misalign) {
  constexpr auto kGuard = std::byte{0x5a};
  const std::uint64_t expected = XXH3_64bits(source.data(), source.size());
  for (const ChecksumKernel* kernel : kernels_of_this_cpu()) {
    constexpr std::size_t kGap = 64;
    std::vector<std::byte> memory(source.size() + (pieces.size() + 2) * (kGap + 64) + misalign, kGuard);
    std::byte* at = memory.data() + misalign;
    at += (64 - reinterpret_cast<std::uintptr_t>(at) % 64) % 64 + misalign;
    std::vector<Extent> target;
    for (std::size_t bytes : pieces) {
      target.push_back({at, bytes});
      at += bytes + kGap;
    }
    EXPECT_EQ(kernel->copy(source.data(), source.size(), target.data()), expected);
    std::size_t done = 0, touched = 0;
    for (const Extent& extent : target) {
      EXPECT_EQ(std::memcmp(extent.data, source.data() + done, extent.bytes), 0);
      done += extent.bytes;
    }
    for (std::byte byte : memory) touched += byte != kGuard;
    std::size_t expected_touched = 0;
    for (std::byte byte : source) expected_touched += byte != kGuard;
    EXPECT_EQ(touched, expected_touched);
  }
}

TEST(Hash, CopyIsWholeAndCheckedForEverySizeAndAlignment) {
  for (std::size_t size : kSizes) {
    if (size == 0) continue;
    for (std::size_t misalign : {0, 1, 32}) check_copy(noise(size), {size}, misalign);
  }
}

TEST(Hash, CopyScattersOverPlanes) {
  check_copy(noise(8192), {4096, 4096}, 0);
  check_copy(noise(8192), {1000, 3000, 4192}, 0);
  check_copy(noise(5000), {1, 1023, 2048, 1928}, 3);
}

TEST(Hash, ExtentsHashAsTheirConcatenation) {
  auto data = noise(70000);
  const Extent extents[] = {{data.data(), 1000}, {data.data() + 1000, 60000}, {data.data() + 61000, 9000}};
  for (const ChecksumKernel* kernel : kernels_of_this_cpu()) {
    EXPECT_EQ(kernel->hash_extents(extents, 3), XXH3_64bits(data.data(), data.size()));
  }
}

TEST(Hash, OneFlippedBitChangesTheChecksumOfACopy) {
  auto data = noise(65536);
  std::vector<std::byte> out(data.size());
  const Extent target[] = {{out.data(), out.size()}};
  const std::uint64_t before = copy_checksum(data, target);
  data[40000] ^= std::byte{1};
  EXPECT_NE(copy_checksum(data, target), before);
}

// The source is another process's memory: whoever withdraws a send reuses it at once, in the middle of a copy too. The
// checksum then speaks of the bytes that were copied, not of those that were there a moment before.
TEST(Hash, TheChecksumIsOfTheBytesThatWereCopied) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the race is the test";
#endif
  for (const std::size_t size : {512, 4096, 5000, 16384}) {
    for (const std::size_t misalign : {0, 1}) {
      auto source = noise(size);
      std::vector<std::byte> out(size + 64 + misalign);
      std::byte* at = out.data() + (64 - reinterpret_cast<std::uintptr_t>(out.data()) % 64) % 64 + misalign;
      const Extent target[] = {{at, size}};
      std::atomic<bool> stop{false};
      std::thread writer([&] {
        std::atomic_ref<std::byte> changing(source[size / 2]);
        for (std::uint8_t i = 0; !stop.load(std::memory_order_relaxed); ++i) changing.store(std::byte{i});
      });
      int wrong = 0;
      for (int round = 0; round < 20000; ++round) wrong += copy_checksum(source, target) != XXH3_64bits(at, size);
      stop = true;
      writer.join();
      EXPECT_EQ(wrong, 0) << size << " bytes" << (misalign ? ", not aligned" : "");
    }
  }
}

}  // namespace
}  // namespace dualkv
