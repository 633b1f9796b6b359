// The mutual challenge that opens every connection, as pure steps over bytes (docs/formats.md, "Handshake").
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/hash.h"
#include "dualkv/lane.h"

namespace dualkv {

constexpr std::size_t kMaxNameBytes = 128;

enum class ChannelRole : std::uint8_t { kLow = 0, kHigh = 1, kControl = 2 };

// Who opens this connection and what it is for. Both sides send one; the acceptor repeats the connector's role.
struct Hello {
  std::string name;
  std::uint64_t fingerprint = 0;  // of the geometry
  std::string geometry;           // for the other side's error message
  std::uint64_t session = 0;      // joins the channels of one link
  ChannelRole role = ChannelRole::kControl;
  std::uint8_t index = 0;
  std::uint8_t channels_per_lane = 1;
  Digest nonce{};
  std::uint64_t probe_address = 0;  // shm: where probe_value lies in this process
  std::uint64_t probe_value = 0;
};

std::vector<std::byte> encode_hello(const Hello& hello);
std::optional<Hello> decode_hello(std::span<const std::byte> body);

// What only a holder of the secret can compute over both hellos. `label` tells the directions apart, so that a
// proof can't be reflected.
Digest make_proof(const std::string& secret, const std::string& label, const Hello& connector, const Hello& acceptor);

constexpr const char* kAcceptorLabel = "dualkv acceptor v1";
constexpr const char* kConnectorLabel = "dualkv connector v1";

}  // namespace dualkv
