// Checksums for every CPU of the architecture.
#include "base/checksum_kernel.h"

namespace dualkv {
const ChecksumKernel kBaselineKernel{hash_run, hash_extents, copy_run};
}
