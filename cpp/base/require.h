// require(): refuses what can't be.
#pragma once

#include "base/text.h"
#include "dualkv/status.h"

namespace dualkv {

// Throws Error(code) unless fine. The message is made of `parts` only when it is needed.
template <typename... Parts>
void require(bool fine, Code code, const Parts&... parts) {
  if (!fine) throw Error(code, text(parts...));
}

}  // namespace dualkv
