// The 3FS backend beside the conformance suite: what 3FS refuses, reads that fail or never end. On a stand-in of 3FS's
// library.
#include "store_support.h"

namespace dualkv::testing {
namespace {

class UsrbioReaderTest : public StoreTestBase, public ::testing::Test {
 protected:
  void SetUp() override {
    Store writer = open(plain());
    save_all(writer);
  }
  StoreOptions usrbio() const {
    StoreOptions options = plain();
    options.backend = "usrbio";
    return options;
  }
  template <typename Call>
  Call call(const char* name) const {
    return reinterpret_cast<Call>(dlsym(library_, name));
  }
  int registered() const { return call<int (*)()>("stand_in_registered")(); }
  void hang(int reads) const { call<void (*)(int)>("stand_in_hang")(reads); }
  void fail(int reads) const { call<void (*)(int)>("stand_in_fail_reads")(reads); }

  void* library_ = find_usrbio();
};

TEST_F(UsrbioReaderTest, ADirectoryOnNo3fsIsRefused) {
  StoreOptions options = usrbio();
  options.root = root_.path() + "/not-3fs";
  try {
    open(options);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("is on no mounted 3FS"), std::string::npos) << error.what();
  }
}

TEST_F(UsrbioReaderTest, IsUsedOnlyWhereItWasAskedFor) {
  EXPECT_NE(open(plain()).stats().backend, "usrbio");
  EXPECT_EQ(open(usrbio()).stats().backend, "usrbio");
}

TEST_F(UsrbioReaderTest, FailedReadsAreErrorsAndTheNextAreRight) {
  Store store = open(usrbio());
  fail(1);
  EXPECT_EQ(read_one(store, keys_[2]).code, Code::kIo);
  EXPECT_TRUE(all_free());
  const auto into = slots(1);
  ASSERT_TRUE(store.read({&keys_[3], 1}, into, all_layers(), in(10)).wait(in(10)).ok());
  EXPECT_TRUE(slot_holds(into[0], 3, all_layers()));
  EXPECT_EQ(registered(), 0) << "files stay registered";
}

TEST_F(UsrbioReaderTest, ReadsThatNeverEndHoldUpNoCloseAndWriteNothing) {
  auto into = slots(2);
  for (const Slot& slot : into) std::memset(slot.get(), 0xee, geometry_.file_bytes());
  auto began = Clock::now();
  {
    Store store = open(usrbio());
    hang(1);
    const Operation hung = store.read({&keys_[4], 1}, {into.data(), 1}, all_layers(), in(0.2));
    EXPECT_EQ(hung.wait(in(5)).code, Code::kTimeout);
    EXPECT_TRUE(store.read({&keys_[5], 1}, {into.data() + 1, 1}, all_layers(), in(5)).wait(in(5)).ok());
    EXPECT_TRUE(slot_holds(into[1], 5, all_layers()));
    began = Clock::now();
  }
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(5)) << "closing waited for it";
  EXPECT_EQ(registered(), 0);
  for (std::uint64_t at = 0; at < geometry_.file_bytes(); ++at) {
    ASSERT_EQ(into[0].get()[at], std::byte{0xee}) << "a read that did not end wrote";
  }
}

}  // namespace
}  // namespace dualkv::testing
