// Hello messages and proofs.
#include "transport/handshake.h"

#include <algorithm>

#include "base/bytes.h"

namespace dualkv {

std::vector<std::byte> encode_hello(const Hello& hello) {
  ByteWriter out;
  out.put_string(hello.name);
  out.put(hello.fingerprint);
  out.put_string(hello.geometry.substr(0, 512));
  out.put(hello.session);
  out.put(hello.role);
  out.put(hello.index);
  out.put(hello.channels_per_lane);
  out.put_bytes(hello.nonce);
  out.put(hello.probe_address);
  out.put(hello.probe_value);
  return out.take();
}

std::optional<Hello> decode_hello(std::span<const std::byte> body) {
  ByteReader in(body);
  Hello hello;
  hello.name = in.get_string(kMaxNameBytes);
  hello.fingerprint = in.get<std::uint64_t>();
  hello.geometry = in.get_string(512);
  hello.session = in.get<std::uint64_t>();
  hello.role = in.get<ChannelRole>();
  hello.index = in.get<std::uint8_t>();
  hello.channels_per_lane = in.get<std::uint8_t>();
  const auto nonce = in.get_bytes(hello.nonce.size());
  if (nonce.size() == hello.nonce.size()) std::copy(nonce.begin(), nonce.end(), hello.nonce.begin());
  hello.probe_address = in.get<std::uint64_t>();
  hello.probe_value = in.get<std::uint64_t>();
  const bool valid = in.complete() && !hello.name.empty() && hello.role <= ChannelRole::kControl &&
                     hello.channels_per_lane >= 1 && hello.channels_per_lane <= 16 &&
                     hello.index < (hello.role == ChannelRole::kControl ? 1 : hello.channels_per_lane);
  if (!valid) return std::nullopt;
  return hello;
}

Digest make_proof(const std::string& secret, const std::string& label, const Hello& connector, const Hello& acceptor) {
  // The secret may be of any length: BLAKE2b keys are at most 64 bytes, so it is hashed first.
  const Digest key = blake2b({}, std::as_bytes(std::span(secret)), {});
  ByteWriter said;
  said.put_string(label);
  const auto first = encode_hello(connector), second = encode_hello(acceptor);
  said.put(static_cast<std::uint32_t>(first.size()));
  said.put_bytes(first);
  said.put_bytes(second);
  return blake2b(key, said.take(), {});
}

}  // namespace dualkv
