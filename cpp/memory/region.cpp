// mmap, mbind and mlock, where allowed.
#include "memory/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <string>

#include "base/text.h"

namespace dualkv {

namespace {

// madvise() succeeds also where transparent huge pages are switched off.
bool transparent_huge_pages_off(bool shared) {
  std::ifstream file(shared ? "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
                            : "/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return modes.find("[never]") != std::string::npos || modes.find("[deny]") != std::string::npos;
}

// Without libnuma, which would be a dependency for one call.
bool bind_to(void* data, std::uint64_t bytes, int node) {
  constexpr int kPreferred = 1, kMove = 2;  // MPOL_PREFERRED, MPOL_MF_MOVE
  constexpr unsigned long kBits = 1024;
  if (node >= static_cast<int>(kBits)) return false;
  unsigned long mask[kBits / (8 * sizeof(unsigned long))] = {};
  mask[node / (8 * sizeof(unsigned long))] = 1UL << (node % (8 * sizeof(unsigned long)));
  return syscall(SYS_mbind, data, bytes, kPreferred, mask, kBits, kMove) == 0;
}

}  // namespace

bool Region::map(bool huge, bool shared) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB : 0);
  if (shared) {
    fd_ = Fd(memfd_create("dualkv", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0u)));
    if (!fd_.valid() || ftruncate(fd_.get(), static_cast<off_t>(mapped_)) != 0) return false;
    flags = MAP_SHARED;
  }
  void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, fd_.get(), 0);
  if (mapping == MAP_FAILED) return false;
  data_ = static_cast<std::byte*>(mapping);
  // A file that can't shrink can't take pages away from those who map it.
  if (shared) fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  return true;
}

Region::Region(std::uint64_t bytes, const RegionOptions& options) : bytes_(bytes) {
  mapped_ = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  if (options.huge_pages && map(/*huge=*/true, options.shared)) {
    pages_ = Pages::kHuge;
  } else if (!map(/*huge=*/false, options.shared)) {
    throw Error(Code::kNoSpace, text("mmap of ", mapped_, " bytes of memory refused; ask for less"), errno);
  }
  if (options.huge_pages && pages_ == Pages::kSmall && madvise(data_, mapped_, MADV_HUGEPAGE) == 0 &&
      !transparent_huge_pages_off(options.shared)) {
    pages_ = Pages::kTransparentHuge;
  }
  // A fork must not turn DMA targets into copy-on-write pages.
  madvise(data_, mapped_, MADV_DONTFORK);
  bound_ = options.numa_node < 0 || bind_to(data_, mapped_, options.numa_node);
}

bool Region::lock(std::uint64_t first, std::uint64_t bytes) { return mlock(data_ + first, bytes) == 0; }

Region::~Region() { munmap(data_, mapped_); }

}  // namespace dualkv
