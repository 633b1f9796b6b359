// Checksums for AVX2.
#include "base/checksum_kernel.h"

#if defined(__x86_64__)

namespace dualkv {
const ChecksumKernel kAvx2Kernel{hash_run, hash_extents, copy_run};
}

#endif
