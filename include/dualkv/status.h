// Outcomes: the error codes of every call, the Error that set-up throws, the Status that operations end with.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dualkv {

enum class Code : std::uint8_t {
  kOk = 0,
  kInvalidArgument,  // the caller's values can't be served; nothing was changed
  kNotFound,         // no such block, peer, load
  kCorrupt,          // bytes arrived that are not the bytes that were saved
  kIo,               // the kernel reported an error; see os_errno
  kNoSpace,          // a pool, a quota or a disk is full
  kTimeout,          // the deadline passed
  kCancelled,        // the caller, or the other side, gave up
  kPeerLost,         // the connection to the peer ended, or the peer fell silent
  kRefused,          // the peer does not share the secret, the geometry or the grant
  kUnsupported,      // not built in, or not allowed on this machine
};

const char* to_string(Code code);

// How an operation ended. `message` says what, with which values, what the system said, and the likely cure.
struct Status {
  Code code = Code::kOk;
  int os_errno = 0;
  std::string message;

  bool ok() const { return code == Code::kOk; }
};

// Thrown by set-up calls and by waits on operations that failed. Never thrown from a worker thread.
class Error : public std::runtime_error {
 public:
  explicit Error(Status status);
  Error(Code code, const std::string& message, int os_errno = 0);

  Code code() const { return status_.code; }
  int os_errno() const { return status_.os_errno; }
  // What what() was made of.
  const Status& status() const { return status_; }

 private:
  Status status_;
};

}  // namespace dualkv
