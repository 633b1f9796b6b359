// Hellos and proofs: a proof is worth something only for its secret, its direction and its two hellos.
#include "transport/handshake.h"

#include <functional>
#include <set>

#include "support.h"

namespace dualkv::testing {
namespace {

Hello hello(const std::string& name) {
  Hello h;
  h.name = name;
  h.fingerprint = 123;
  h.geometry = "4 layers";
  h.session = 456;
  h.role = ChannelRole::kLow;
  h.index = 1;
  h.channels_per_lane = 4;
  h.nonce.fill(std::byte{9});
  h.probe_address = 789;
  h.probe_value = 1011;
  return h;
}

// One change of every field.
std::vector<std::function<void(Hello&)>> changes() {
  return {
      [](Hello& h) { h.name += "x"; },
      [](Hello& h) { ++h.fingerprint; },
      [](Hello& h) { h.geometry += "x"; },
      [](Hello& h) { ++h.session; },
      [](Hello& h) { h.role = ChannelRole::kHigh; },
      [](Hello& h) { ++h.index; },
      [](Hello& h) { ++h.channels_per_lane; },
      [](Hello& h) { h.nonce[31] ^= std::byte{1}; },
      [](Hello& h) { ++h.probe_address; },
      [](Hello& h) { ++h.probe_value; },
  };
}

TEST(Hello, RoundTrip) {
  const Hello sent = hello("node");
  const auto got = decode_hello(encode_hello(sent));
  ASSERT_TRUE(got);
  EXPECT_EQ(got->name, sent.name);
  EXPECT_EQ(got->fingerprint, sent.fingerprint);
  EXPECT_EQ(got->geometry, sent.geometry);
  EXPECT_EQ(got->session, sent.session);
  EXPECT_EQ(got->role, sent.role);
  EXPECT_EQ(got->index, sent.index);
  EXPECT_EQ(got->channels_per_lane, sent.channels_per_lane);
  EXPECT_EQ(got->nonce, sent.nonce);
  EXPECT_EQ(got->probe_address, sent.probe_address);
  EXPECT_EQ(got->probe_value, sent.probe_value);
}

TEST(Hello, EveryTruncationAndExtensionIsRefused) {
  auto bytes = encode_hello(hello("node"));
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode_hello(std::span(bytes).first(size))) << size;
  }
  bytes.push_back(std::byte{0});
  EXPECT_FALSE(decode_hello(bytes));
}

TEST(Hello, ValuesOutOfRangeAreRefused) {
  const auto ok = [](const std::function<void(Hello&)>& change) {
    Hello h = hello("node");
    change(h);
    return decode_hello(encode_hello(h)).has_value();
  };
  EXPECT_TRUE(ok([](Hello& h) { h.name = std::string(kMaxNameBytes, 'n'); }));
  EXPECT_FALSE(ok([](Hello& h) { h.name = std::string(kMaxNameBytes + 1, 'n'); }));
  EXPECT_FALSE(ok([](Hello& h) { h.name.clear(); }));
  EXPECT_FALSE(ok([](Hello& h) { h.role = static_cast<ChannelRole>(3); }));
  EXPECT_FALSE(ok([](Hello& h) { h.channels_per_lane = 0; }));
  EXPECT_FALSE(ok([](Hello& h) { h.channels_per_lane = 17; }));
  EXPECT_FALSE(ok([](Hello& h) { h.index = h.channels_per_lane; }));
  EXPECT_FALSE(ok([](Hello& h) { h.role = ChannelRole::kControl; })) << "there is one control channel: index 0";
  EXPECT_TRUE(ok([](Hello& h) {
    h.role = ChannelRole::kControl;
    h.index = 0;
  }));
}

TEST(Hello, WhatIsAcceptedIsWrittenBackTheSame) {
  auto bytes = encode_hello(hello("node"));
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto back = decode_hello(bytes);
    EXPECT_TRUE(!back || encode_hello(*back) == bytes) << bit;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

TEST(Hello, RandomBytesNeverCrash) {
  std::mt19937 random(6);
  for (int round = 0; round < 10'000; ++round) {
    std::vector<std::byte> bytes(random() % 150);
    for (auto& byte : bytes) byte = static_cast<std::byte>(random() % 4);
    decode_hello(bytes);
  }
}

TEST(Proof, IsAFunctionOfWhatBothSidesKnow) {
  const Hello a = hello("a"), b = hello("b");
  EXPECT_EQ(make_proof("secret", kAcceptorLabel, a, b), make_proof("secret", kAcceptorLabel, a, b));
  EXPECT_TRUE(equal(make_proof("secret", kAcceptorLabel, a, b), make_proof("secret", kAcceptorLabel, a, b)));
}

TEST(Proof, DiffersByEverythingThatGoesIn) {
  const Hello a = hello("a"), b = hello("b");
  std::set<Digest> proofs;
  std::size_t made = 0;
  const auto add = [&](const std::string& secret, const std::string& label, const Hello& first, const Hello& second) {
    proofs.insert(make_proof(secret, label, first, second));
    ++made;
  };
  for (const std::string& secret :
       {std::string("secret"), std::string("secreT"), std::string(), std::string("secret\0", 7), std::string(64, 's'),
        std::string(65, 's'), std::string(1000, 's')}) {
    add(secret, kAcceptorLabel, a, b);
  }
  add("secret", kConnectorLabel, a, b);
  add("secret", kAcceptorLabel, b, a);  // a reflected one
  for (const auto& change : changes()) {
    Hello changed = a;
    change(changed);
    add("secret", kAcceptorLabel, changed, b);
    changed = b;
    change(changed);
    add("secret", kAcceptorLabel, a, changed);
  }
  EXPECT_EQ(proofs.size(), made);
}

TEST(Proof, OneFlippedBitIsNotEqual) {
  const Digest proof = make_proof("secret", kAcceptorLabel, hello("a"), hello("b"));
  for (std::size_t bit = 0; bit < proof.size() * 8; ++bit) {
    Digest other = proof;
    other[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(equal(proof, other));
  }
}

}  // namespace
}  // namespace dualkv::testing
