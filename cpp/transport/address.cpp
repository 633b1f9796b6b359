// Parsing and resolving addresses.
#include "transport/address.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <cstddef>
#include <cstring>
#include <memory>

#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

namespace {

[[noreturn]] void malformed(const std::string& text, const std::string& why) {
  throw Error(Code::kInvalidArgument,
              dualkv::text("address '", text, "': ", why,
                           "; give tcp://host:port, rdma://host:port, shm:///path.sock or loopback://name"));
}

bool is_this_host(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in&>(address).sin_addr.s_addr) >> 24) == 127;
  }
  const in6_addr& six = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(&six)) return six.s6_addr[12] == 127;
  return IN6_IS_ADDR_LOOPBACK(&six);
}

void resolve_tcp(const std::string& rest, bool for_listening, Address* address) {
  const std::size_t colon = rest.rfind(':');
  if (colon == std::string::npos || colon == 0) malformed(address->text, "host or port is missing");
  std::string host = rest.substr(0, colon);
  const std::string port = rest.substr(colon + 1);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  if (port.empty() || port.size() > 5 || port.find_first_not_of("0123456789") != std::string::npos ||
      std::stoi(port) > 65535 || (!for_listening && std::stoi(port) == 0)) {
    malformed(address->text, text("port '", port, "' must be 1 to 65535"));
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = for_listening ? AI_PASSIVE : 0;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) throw Error(Code::kNotFound, text("address '", address->text, "': ", gai_strerror(error)));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  std::memcpy(&address->socket, found->ai_addr, found->ai_addrlen);
  address->socket_bytes = found->ai_addrlen;
  address->this_host = is_this_host(address->socket);
}

// Of the file's name, in a folder that goes by a descriptor: /proc/self/fd/1234567890/name.
constexpr std::size_t kMostNameBytes = 80;

void resolve_shm(const std::string& path, Address* address) {
  if (path.empty() || path.front() != '/') malformed(address->text, "the path must be absolute");
  const std::size_t name_bytes = path.size() - path.rfind('/') - 1;
  if (name_bytes > kMostNameBytes) {
    malformed(address->text, text("the file's name has ", name_bytes, " bytes, at most ", kMostNameBytes));
  }
  address->path = path;
  address->socket.ss_family = AF_UNIX;
  address->this_host = true;
}

}  // namespace

const char* to_string(Scheme scheme) {
  switch (scheme) {
    case Scheme::kTcp: return "tcp";
    case Scheme::kShm: return "shm";
    case Scheme::kLoopback: return "loopback";
    case Scheme::kRdma: return "rdma";
  }
  return "unknown";
}

Address resolve(const std::string& text, bool for_listening) {
  Address address;
  address.text = text;
  const std::size_t at = text.find("://");
  if (at == std::string::npos) malformed(text, "no scheme");
  const std::string scheme = text.substr(0, at), rest = text.substr(at + 3);
  if (scheme == "tcp" || scheme == "rdma") {
    if (scheme == "rdma") address.scheme = Scheme::kRdma;
    resolve_tcp(rest, for_listening, &address);
  } else if (scheme == "shm") {
    address.scheme = Scheme::kShm;
    resolve_shm(rest, &address);
  } else if (scheme == "loopback") {
    if (rest.empty()) malformed(text, "no name");
    address.scheme = Scheme::kLoopback;
    address.name = rest;
    address.this_host = true;
  } else {
    malformed(text, dualkv::text("unknown scheme '", scheme, "'"));
  }
  return address;
}

SocketName::SocketName(const Address& address) : socket_(address.socket), bytes_(address.socket_bytes) {
  if (address.scheme != Scheme::kShm) return;
  auto& unix_address = reinterpret_cast<sockaddr_un&>(socket_);
  std::string path = address.path;
  if (path.size() >= sizeof(unix_address.sun_path)) {
    const std::size_t slash = path.rfind('/');
    // A folder that is not there gives a path that is not there.
    folder_ = Fd(open(path.substr(0, slash).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    path = text("/proc/self/fd/", folder_.get(), path.substr(slash));
  }
  std::memcpy(unix_address.sun_path, path.c_str(), path.size() + 1);
  bytes_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + 1);
}

}  // namespace dualkv
