// Addresses of nodes: tcp://host:port, shm:///path.sock, loopback://name.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>

namespace dualkv {

enum class Scheme : std::uint8_t { kTcp, kShm, kLoopback };
const char* to_string(Scheme scheme);

// Resolved, so that connecting does not block.
struct Address {
  Scheme scheme = Scheme::kTcp;
  std::string text;           // as given
  std::string name;           // loopback only
  sockaddr_storage socket{};  // tcp and shm
  socklen_t socket_bytes = 0;
  bool this_host = false;  // can't be reached from, or does not lead to, another host
};

// Throws Error(kInvalidArgument) for a malformed address, Error(kNotFound) for an unknown host. May block on DNS.
Address resolve(const std::string& text, bool for_listening);

}  // namespace dualkv
