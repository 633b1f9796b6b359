// Addresses of nodes: tcp://host:port, rdma://host:port, shm:///path.sock, loopback://name.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>

#include "base/fd.h"

namespace dualkv {

// rdma: control and what can't go by RDMA travel over TCP to the same address.
enum class Scheme : std::uint8_t { kTcp, kShm, kLoopback, kRdma };
const char* to_string(Scheme scheme);
inline bool over_tcp(Scheme scheme) { return scheme == Scheme::kTcp || scheme == Scheme::kRdma; }

// Resolved, so that connecting does not block.
struct Address {
  Scheme scheme = Scheme::kTcp;
  std::string text;           // as given
  std::string name;           // loopback only
  std::string path;           // shm only, of any length
  sockaddr_storage socket{};  // tcp and rdma; its family, shm too
  socklen_t socket_bytes = 0;
  bool this_host = false;  // can't be reached from, or does not lead to, another host
};

// Throws Error(kInvalidArgument) for a malformed address, Error(kNotFound) for an unknown host. May block on DNS.
Address resolve(const std::string& text, bool for_listening);

// What bind() and connect() take. The kernel's paths are short: a longer one goes by a descriptor of its folder, which
// is open as long as this is there.
class SocketName {
 public:
  explicit SocketName(const Address& address);
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&socket_); }
  socklen_t bytes() const { return bytes_; }

 private:
  Fd folder_;
  sockaddr_storage socket_;
  socklen_t bytes_;
};

}  // namespace dualkv
