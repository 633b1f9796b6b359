// Names of codes, and Error.
#include "dualkv/status.h"

#include <cstring>

#include "base/text.h"

namespace dualkv {

const char* to_string(Code code) {
  switch (code) {
    case Code::kOk: return "ok";
    case Code::kInvalidArgument: return "invalid_argument";
    case Code::kNotFound: return "not_found";
    case Code::kCorrupt: return "corrupt";
    case Code::kIo: return "io";
    case Code::kNoSpace: return "no_space";
    case Code::kTimeout: return "timeout";
    case Code::kCancelled: return "cancelled";
    case Code::kPeerLost: return "peer_lost";
    case Code::kRefused: return "refused";
    case Code::kUnsupported: return "unsupported";
  }
  return "unknown";
}

static std::string describe(const Status& status) {
  if (status.os_errno == 0) return text(to_string(status.code), ": ", status.message);
  return text(to_string(status.code), ": ", status.message, " (", std::strerror(status.os_errno), ", errno ",
              status.os_errno, ")");
}

Error::Error(Status status) : std::runtime_error(describe(status)), status_(std::move(status)) {}

Error::Error(Code code, const std::string& message, int os_errno) : Error(Status{code, os_errno, message}) {}

}  // namespace dualkv
