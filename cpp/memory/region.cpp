// mmap with huge pages where allowed, mlock where allowed.
#include "memory/region.h"

#include <sys/mman.h>

#include <cerrno>

#include "base/text.h"

namespace dualkv {

namespace {
constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;
}

Region::Region(std::uint64_t bytes, const StagingOptions& options) : bytes_(bytes) {
  mapped_ = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const int protection = PROT_READ | PROT_WRITE;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  void* mapping = MAP_FAILED;
  if (options.huge_pages) {
    mapping = mmap(nullptr, mapped_, protection, flags | MAP_HUGETLB, -1, 0);
    if (mapping != MAP_FAILED) pages_ = Pages::kHuge;
  }
  if (mapping == MAP_FAILED) mapping = mmap(nullptr, mapped_, protection, flags, -1, 0);
  if (mapping == MAP_FAILED) {
    throw Error(Code::kNoSpace, text("staging: mmap of ", mapped_, " bytes refused; make `staging` smaller"), errno);
  }
  data_ = static_cast<std::byte*>(mapping);
  if (options.huge_pages && pages_ == Pages::kSmall && madvise(data_, mapped_, MADV_HUGEPAGE) == 0) {
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
