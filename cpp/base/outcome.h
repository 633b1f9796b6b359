// Outcome: how one unit of I/O ended, without an allocation.
#pragma once

#include "dualkv/status.h"

namespace dualkv {

struct Outcome {
  Code code = Code::kOk;
  int os_errno = 0;

  bool ok() const { return code == Code::kOk; }
};

}  // namespace dualkv
