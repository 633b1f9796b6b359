// The conformance suite of every way to read: backend x O_DIRECT x limit. pread without O_DIRECT is the oracle.
#include "store_support.h"

namespace dualkv::testing {
namespace {

struct Way {
  const char* backend;
  const char* direct;
  std::uint64_t limit;
};

void PrintTo(const Way& way, std::ostream* out) {
  *out << way.backend << " direct=" << way.direct << " limit=" << way.limit;
}

class StoreConformance : public StoreTestBase, public ::testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    Store writer = open(plain());
    save_all(writer);
    find_usrbio();
    StoreOptions options = plain();
    options.backend = GetParam().backend;
    options.direct = GetParam().direct;
    options.read_limit_bytes_per_s = GetParam().limit;
    try {
      store_ = open(options);
    } catch (const Error& error) {
      if (error.code() != Code::kUnsupported) throw;
      GTEST_SKIP() << error.what();
    }
    EXPECT_EQ(store_->stats().backend, GetParam().backend);
    EXPECT_EQ(store_->stats().direct, std::string(GetParam().direct) == "on");
    before_ = files();
  }

  // A read of `key` fails so, and leaves everything else as it was: files, slots, other blocks.
  void expect_bad(const Key& key, Code code, LayerRange layers, const std::string& about) {
    const Bytes disk = read_file(file_of(key));
    const Status status = read_one(*store_, key, layers);
    EXPECT_EQ(status.code, code) << about << ": " << status.message;
    EXPECT_NE(status.message.find(key.hex()), std::string::npos) << about << ": " << status.message;
    EXPECT_TRUE(all_free()) << about;
    EXPECT_TRUE(read_file(file_of(key)) == disk) << about;
  }
  void expect_good(const Key& key, std::uint32_t block, LayerRange layers, const std::string& about) {
    const auto into = slots(1);
    const Status status = store_->read({&key, 1}, into, layers, in(20)).wait(in(20));
    EXPECT_TRUE(status.ok()) << about << ": " << status.message;
    EXPECT_TRUE(slot_holds(into[0], block, layers)) << about;
  }
  // Writes a changed copy of block `block`'s file, runs the check, and puts it back.
  template <typename Change, typename Check>
  void with(std::uint32_t block, Change change, Check check) {
    Bytes bytes = before_[file_of(keys_[block])];
    change(bytes);
    write_file(file_of(keys_[block]), bytes);
    check();
    write_file(file_of(keys_[block]), before_[file_of(keys_[block])]);
  }

  std::optional<Store> store_;
  std::map<std::string, Bytes> before_;
};

TEST_P(StoreConformance, WholeBlocksAreWhatWasSaved) {
  {
    const auto into = slots(kBlocks);
    const Status status = store_->read(keys_, into, all_layers(), in(20)).wait(in(20));
    ASSERT_TRUE(status.ok()) << status.message;
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(slot_holds(into[i], i, all_layers())) << i;
  }
  EXPECT_TRUE(all_free());
  EXPECT_EQ(store_->stats().blocks_read, kBlocks);
  EXPECT_EQ(store_->stats().read_errors, 0u);
  EXPECT_EQ(store_->stats().read_queue_bytes, 0u);
  EXPECT_TRUE(files() == before_);
}

TEST_P(StoreConformance, EveryLayerRangeIsWhatTheOracleReads) {
  Store oracle = open(plain());
  for (std::uint32_t first = 0; first < geometry_.layers(); ++first) {
    for (std::uint32_t count = 1; first + count <= geometry_.layers(); ++count) {
      const auto mine = slots(1), theirs = slots(1);
      const LayerRange layers{first, count};
      ASSERT_TRUE(store_->read({&keys_[3], 1}, mine, layers, in(20)).wait(in(20)).ok()) << first << "+" << count;
      ASSERT_TRUE(oracle.read({&keys_[3], 1}, theirs, layers, in(20)).wait(in(20)).ok());
      EXPECT_TRUE(slot_holds(mine[0], 3, layers)) << first << "+" << count;
      const std::uint64_t at = geometry_.layer_offset(first), end = geometry_.layer_offset(first + count);
      EXPECT_EQ(std::memcmp(mine[0].get() + at, theirs[0].get() + at, end - at), 0);
    }
  }
}

TEST_P(StoreConformance, NothingIsAsked) { EXPECT_TRUE(store_->read({}, {}, all_layers(), in(1)).wait(in(5)).ok()); }

TEST_P(StoreConformance, BadCallsAreRefusedWithNothingRead) {
  const auto into = slots(2);
  const auto refused = [&](std::span<const Key> keys, std::span<const Slot> to, LayerRange layers) {
    return code_of([&] { store_->read(keys, to, layers, in(5)); });
  };
  const std::span<const Key> keys(keys_.data(), 2);
  EXPECT_EQ(refused(keys.first(1), into, all_layers()), Code::kInvalidArgument);
  EXPECT_EQ(refused(keys, into, {0, 0}), Code::kInvalidArgument);
  EXPECT_EQ(refused(keys, into, {0, geometry_.layers() + 1}), Code::kInvalidArgument);
  EXPECT_EQ(refused(keys, into, {geometry_.layers(), 1}), Code::kInvalidArgument);
  EXPECT_EQ(refused(keys, into, {1, ~0u}), Code::kInvalidArgument);
  const std::vector<Slot> foreign = {Slot(new std::byte[1], std::default_delete<std::byte[]>()), into[0]};
  EXPECT_EQ(refused(keys, foreign, all_layers()), Code::kInvalidArgument);
  EXPECT_EQ(refused(keys, std::vector<Slot>{into[0], nullptr}, all_layers()), Code::kInvalidArgument);
  EXPECT_EQ(store_->stats().blocks_read, 0u);
  for (const Slot& slot : into) EXPECT_EQ(slot.get()[0], std::byte{0xee}) << "the slots are untouched";
}

TEST_P(StoreConformance, MissingBlocks) {
  std::filesystem::remove(file_of(keys_[4]));
  EXPECT_FALSE(store_->contains(keys_[4]));
  expect_bad(keys_[4], Code::kNotFound, all_layers(), "missing");
  expect_good(keys_[5], 5, all_layers(), "its neighbour");
  EXPECT_EQ(store_->match(keys_), 4u) << "a block whose read failed is missing";
}

TEST_P(StoreConformance, OneBadBlockFailsTheWholeReadByName) {
  std::filesystem::remove(file_of(keys_[7]));
  {
    const auto into = slots(kBlocks);
    const Status status = store_->read(keys_, into, all_layers(), in(20)).wait(in(20));
    EXPECT_EQ(status.code, Code::kNotFound);
    EXPECT_NE(status.message.find(keys_[7].hex()), std::string::npos) << status.message;
  }
  EXPECT_TRUE(all_free());
  EXPECT_EQ(store_->stats().read_queue_bytes, 0u);
}

TEST_P(StoreConformance, EveryTruncationIsCorruptAndNoHit) {
  const std::uint64_t whole = geometry_.file_bytes();
  std::vector<std::uint64_t> cuts = {0, 1};
  for (std::uint64_t page = KvGeometry::kPageBytes; page <= whole; page += KvGeometry::kPageBytes) {
    for (const std::int64_t off : {-513, -512, -1, 0, 1, 512, 1000}) {
      const std::uint64_t cut = page + static_cast<std::uint64_t>(off);
      if (cut < whole) cuts.push_back(cut);
    }
  }
  for (const std::uint64_t cut : cuts) {
    const std::string about = "cut to " + std::to_string(cut);
    with(
        2, [&](Bytes& bytes) { bytes.resize(cut); },
        [&] {
          EXPECT_FALSE(store_->contains(keys_[2])) << about;
          expect_bad(keys_[2], Code::kCorrupt, all_layers(), about);
          expect_bad(keys_[2], Code::kCorrupt, {1, 1}, about + ", one layer");
        });
  }
  EXPECT_EQ(store_->match(std::span(keys_).first(3)), 2u) << "a block that failed is not advertised";
  EXPECT_TRUE(files() == before_);
}

TEST_P(StoreConformance, ABitFlippedInALayerIsSeenByReadsOfThatLayer) {
  for (std::uint32_t layer = 0; layer < geometry_.layers(); ++layer) {
    const std::uint64_t begin = geometry_.layer_offset(layer), end = geometry_.layer_offset(layer + 1);
    for (const std::uint64_t at : {begin, (begin + end) / 2, end - 1}) {
      const std::string about = "flip at " + std::to_string(at);
      with(
          6, [&](Bytes& bytes) { bytes[at] ^= std::byte{0x10}; },
          [&] {
            expect_bad(keys_[6], Code::kCorrupt, all_layers(), about);
            expect_bad(keys_[6], Code::kCorrupt, {layer, 1}, about);
            for (std::uint32_t other = 0; other < geometry_.layers(); ++other) {
              if (other != layer) expect_good(keys_[6], 6, {other, 1}, about + ", another layer");
            }
          });
    }
  }
}

TEST_P(StoreConformance, ABitFlippedInPaddingChangesNothing) {
  for (const std::uint64_t at : {geometry_.block_bytes(), geometry_.payload_bytes() - 1}) {
    with(
        6, [&](Bytes& bytes) { bytes[at] ^= std::byte{1}; },
        [&] { expect_good(keys_[6], 6, all_layers(), "flip at " + std::to_string(at)); });
  }
}

TEST_P(StoreConformance, ABitFlippedInTheTrailerIsCorrupt) {
  // Every byte of the fixed part and the layer entries, some of the zeros, and the seal.
  std::vector<std::uint64_t> at;
  for (std::uint64_t i = 0; i < 192 + 16 * geometry_.layers(); i += 3) at.push_back(i);
  for (std::uint64_t i = geometry_.trailer_bytes() - 9; i < geometry_.trailer_bytes(); ++i) at.push_back(i);
  at.push_back(2000);
  for (const std::uint64_t offset : at) {
    with(
        6, [&](Bytes& bytes) { bytes[geometry_.payload_bytes() + offset] ^= std::byte(1 << (offset % 8)); },
        [&] {
          const Status status = read_one(*store_, keys_[6], LayerRange{1, 1});
          EXPECT_EQ(status.code, Code::kCorrupt) << "trailer byte " << offset << " " << status.message;
        });
  }
  EXPECT_TRUE(all_free());
  EXPECT_EQ(store_->match(keys_), 6u);
  EXPECT_TRUE(files() == before_);
}

TEST_P(StoreConformance, ABlockUnderAnothersNameIsCorrupt) {
  with(
      6, [&](Bytes& bytes) { bytes = before_[file_of(keys_[5])]; },
      [&] { expect_bad(keys_[6], Code::kCorrupt, all_layers(), "another key"); });
}

TEST_P(StoreConformance, ABlockOfAnotherGeometryIsCorrupt) {
  // The same sizes and key, other tokens per block: only the fingerprint tells.
  std::vector<std::uint64_t> layers;
  for (std::uint32_t i = 0; i < geometry_.layers(); ++i) layers.push_back(geometry_.layer_bytes(i));
  const KvGeometry other(layers, 32, geometry_.namespace_name());
  ASSERT_EQ(other.file_bytes(), geometry_.file_bytes());
  TempDir elsewhere;
  {
    StoreOptions options = plain();
    options.root = elsewhere.path();
    StagingPool pool(other, staging(other, 2));
    Store store(other, options, pool);
    ASSERT_TRUE(store.save({&keys_[6], 1}, *source_.paged(), iota_ids(1, 6), {}, in(20)).wait(in(20)).ok());
  }
  Bytes theirs;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(elsewhere.path())) {
    if (entry.path().extension() == ".kv") theirs = read_file(entry.path());
  }
  ASSERT_EQ(theirs.size(), geometry_.file_bytes());
  with(
      6, [&](Bytes& bytes) { bytes = theirs; },
      [&] { expect_bad(keys_[6], Code::kCorrupt, all_layers(), "another geometry"); });
}

TEST_P(StoreConformance, ReadsFromManyThreads) {
  std::vector<std::thread> threads;
  for (std::uint32_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::uint32_t round = 0; round < 8; ++round) {
        const std::uint32_t block = (thread * 5 + round) % kBlocks;
        expect_good(keys_[block], block, {round % 4, 1}, "thread " + std::to_string(thread));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(all_free());
  EXPECT_EQ(store_->stats().blocks_read, 32u);
}

// A limit that costs a few milliseconds a test: it must change when, never what.
constexpr std::uint64_t kLimit = std::uint64_t{400} << 20;

INSTANTIATE_TEST_SUITE_P(Ways, StoreConformance,
                         ::testing::Values(Way{"pread", "off", 0}, Way{"pread", "on", 0}, Way{"pread", "off", kLimit},
                                           Way{"pread", "on", kLimit}, Way{"uring", "off", 0}, Way{"uring", "on", 0},
                                           Way{"uring", "off", kLimit}, Way{"uring", "on", kLimit},
                                           Way{"usrbio", "off", 0}, Way{"usrbio", "off", kLimit}),
                         [](const auto& info) {
                           return std::string(info.param.backend) + "_direct_" + info.param.direct +
                                  (info.param.limit > 0 ? "_limited" : "");
                         });

}  // namespace
}  // namespace dualkv::testing
