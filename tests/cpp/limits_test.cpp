// The limit loops move the bytes they claim, and fail without leaving anything behind.
#include "dualkv/limits.h"

#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <future>

#include "base/fd.h"
#include "support.h"

namespace dualkv::limits {

namespace {

using testing::code_of;

constexpr std::uint64_t kBlock = 64 << 10;

std::size_t open_fds() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

// A file of `blocks` blocks, and reads of each of them.
FileReads file_reads(const std::filesystem::path& folder, std::uint64_t blocks) {
  FileReads reads{(folder / "blocks").string(), kBlock, {}, 4, false};
  std::ofstream(reads.path) << std::string(blocks * kBlock, 'x');
  for (std::uint64_t i = 0; i < blocks; ++i) reads.offsets.push_back(i * kBlock);
  return reads;
}

// Connected stream sockets, both ends in the same order.
struct Streams {
  explicit Streams(int count) {
    for (int i = 0; i < count; ++i) {
      std::array<int, 2> pair{};
      EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
      source_fds.push_back(pair[0]);
      target_fds.push_back(pair[1]);
      for (const int fd : pair) owned.emplace_back(fd);
    }
  }
  std::vector<int> source_fds;
  std::vector<int> target_fds;
  std::vector<Fd> owned;
};

}  // namespace

TEST(ReadFile, ReadsEveryOffsetOnce) {
  const testing::TempDir folder;
  const FileReads reads = file_reads(folder.path(), 17);
  const std::size_t fds = open_fds();
  const Code code = code_of([&] {
    const Sample sample = read_file(reads);
    EXPECT_EQ(sample.bytes, 17 * kBlock);
    EXPECT_EQ(sample.latencies_us.size(), 17U);
    EXPECT_GT(sample.seconds, 0);
    for (const double latency : sample.latencies_us) EXPECT_LE(latency, sample.seconds * 1e6);
  });
  EXPECT_EQ(open_fds(), fds);
  if (code == Code::kUnsupported) GTEST_SKIP() << "no io_uring here";
  EXPECT_EQ(code, Code::kOk);
}

TEST(ReadFile, AShortReadAnywhereIsAnErrorThatNamesItsOffset) {
  const testing::TempDir folder;
  for (const std::size_t at : {0, 5, 16}) {
    FileReads reads = file_reads(folder.path(), 17);
    reads.offsets[at] = 17 * kBlock - 1;
    const std::size_t fds = open_fds();
    try {
      read_file(reads);
      FAIL() << "no error";
    } catch (const Error& error) {
      if (error.code() == Code::kUnsupported) GTEST_SKIP() << error.what();
      EXPECT_EQ(error.code(), Code::kIo);
      EXPECT_NE(std::string(error.what()).find(std::to_string(17 * kBlock - 1)), std::string::npos) << error.what();
    }
    EXPECT_EQ(open_fds(), fds);
  }
}

TEST(CopyArena, CopiesEachBlockToTheTargetBesideItAndNothingElse) {
  constexpr std::uint64_t kSmall = 1000;  // blocks that share pages
  CopyArena arena(5 * kSmall, false);
  const Sample sample = arena.run({kSmall, {4 * kSmall, 0}, {kSmall, 3 * kSmall}});
  EXPECT_EQ(sample.bytes, 2 * kSmall);
  std::vector<std::byte> expected(5 * kSmall);
  std::copy_n(arena.source().data() + 4 * kSmall, kSmall, expected.data() + kSmall);
  std::copy_n(arena.source().data(), kSmall, expected.data() + 3 * kSmall);
  EXPECT_TRUE(std::ranges::equal(arena.target(), expected));
}

TEST(CopyArena, RefusesBlocksOutsideBeforeItCopiesAny) {
  CopyArena arena(4096, true);
  EXPECT_EQ(code_of([&] { arena.run({1024, {1024, 1024}, {0, 3073}}); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { arena.run({1024, {~std::uint64_t{0}, 0}, {0, 0}}); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { arena.run({8192, {0}, {0}}); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { arena.run({1024, {0}, {}}); }), Code::kInvalidArgument);
  EXPECT_TRUE(std::ranges::all_of(arena.target(), [](std::byte byte) { return byte == std::byte{}; }));
}

TEST(ChecksumMemory, CountsWholeBlocks) {
  EXPECT_EQ(checksum_memory(10 * kBlock + 1, kBlock).bytes, 10 * kBlock);
  EXPECT_EQ(code_of([] { checksum_memory(kBlock, kBlock + 1); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([] { checksum_memory(0, 0); }), Code::kInvalidArgument);
}

TEST(SocketLimit, EveryByteArrivesInItsPlace) {
  constexpr std::uint64_t kBytes = (1 << 20) + 2;  // three streams share it unevenly
  const Streams streams(3);
  SocketLimit source(6 << 20);
  SocketLimit target(6 << 20);
  for (std::size_t i = 0; i < source.memory().size(); ++i) source.memory()[i] = std::byte(i * 31 >> 3);
  auto received = std::async([&] { return target.receive(streams.target_fds, kBytes, 10'000); });
  EXPECT_EQ(source.send(streams.source_fds, kBytes, 30'000).bytes, kBytes);
  EXPECT_EQ(received.get().bytes, kBytes);
  std::uint64_t same = 0;
  for (std::size_t part = 0; part < 3; ++part) {
    const std::size_t at = part * (2 << 20);
    const auto sent = source.memory().subspan(at, 2 << 20);
    same += static_cast<std::uint64_t>(std::ranges::mismatch(sent, target.memory().subspan(at, 2 << 20)).in1 -
                                       sent.begin());
  }
  EXPECT_GE(same, kBytes);
}

TEST(SocketLimit, CyclesThroughMemorySmallerThanTheTransfer) {
  const Streams streams(2);
  SocketLimit source(8192);
  SocketLimit target(8192);
  std::ranges::fill(source.memory(), std::byte{7});
  auto received = std::async([&] { return target.receive(streams.target_fds, 100'001, 1 << 20); });
  EXPECT_EQ(source.send(streams.source_fds, 100'001, 1 << 20).bytes, 100'001U);
  received.get();
  EXPECT_TRUE(std::ranges::equal(source.memory(), target.memory()));
}

TEST(SocketLimit, OneLostStreamEndsThemAll) {
  Streams streams(3);
  SocketLimit source(3 << 20);
  streams.owned[3].reset();  // the other side of the second
  EXPECT_EQ(code_of([&] { source.send(streams.source_fds, 64 << 20, 1 << 20); }), Code::kPeerLost);
  // What was sent before may still be read; after it each stream ends.
  SocketLimit target(3 << 20);
  streams.target_fds[1] = streams.target_fds[2];
  EXPECT_EQ(code_of([&] { target.receive(streams.target_fds, 64 << 20, 1 << 20); }), Code::kPeerLost);
}

TEST(SocketLimit, ASocketsOwnTimeoutIsAnError) {
  const Streams streams(1);
  const timeval soon{0, 10'000};
  ASSERT_EQ(setsockopt(streams.target_fds[0], SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon)), 0);
  SocketLimit target(1 << 20);
  EXPECT_EQ(code_of([&] { target.receive(streams.target_fds, 1, 1); }), Code::kTimeout);
}

TEST(SocketLimit, RefusesEmptyTransfers) {
  const Streams streams(2);
  SocketLimit small(8191);
  SocketLimit enough(8192);
  EXPECT_EQ(code_of([&] { small.send(streams.source_fds, 1, 1); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { enough.send({}, 1, 1); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { enough.send(streams.source_fds, 0, 1); }), Code::kInvalidArgument);
  EXPECT_EQ(code_of([&] { enough.send(streams.source_fds, 1, 0); }), Code::kInvalidArgument);
  // The sockets were left alone.
  auto received = std::async([&] { return enough.receive(streams.target_fds, 1, 1); });
  SocketLimit source(8192);
  EXPECT_EQ(source.send(streams.source_fds, 1, 1).bytes, 1U);
  EXPECT_EQ(received.get().bytes, 1U);
}

}  // namespace dualkv::limits
