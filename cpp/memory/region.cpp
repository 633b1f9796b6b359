// mmap with huge pages where allowed, mlock where allowed.
#include "memory/region.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <fstream>
#include <string>

#include "base/text.h"

namespace dualkv {

namespace {

constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

// madvise() succeeds also where transparent huge pages are switched off.
bool transparent_huge_pages_off(bool shared) {
  std::ifstream file(shared ? "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
                            : "/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return modes.find("[never]") != std::string::npos || modes.find("[deny]") != std::string::npos;
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
  // All of it: a lock that ended within a huge page would split the mapping there, and the ring describes memory of
  // mixed page sizes to the device page by page.
  if (options.lock_memory) locked_ = mlock(data_, mapped_) == 0;
}

Region::~Region() { munmap(data_, mapped_); }

}  // namespace dualkv
