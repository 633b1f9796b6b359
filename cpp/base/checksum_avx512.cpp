// Checksums for AVX-512.
#include "base/checksum_kernel.h"

#if defined(__x86_64__)

namespace dualkv {
const ChecksumKernel kAvx512Kernel{hash_run, hash_extents, copy_run};
}

#endif
