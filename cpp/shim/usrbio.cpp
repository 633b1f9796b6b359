// Opening libhf3fs_api_shared.
#include "shim/usrbio.h"

#include "shim/library.h"

namespace dualkv::usrbio {

namespace {

Loaded<Library> load() {
  SharedLibrary shared("libhf3fs_api_shared.so");
  if (!shared.error().empty()) {
    return {{}, shared.error() + "; install 3FS's client, or add where it is to LD_LIBRARY_PATH"};
  }
  Library l{};
  shared.find(l.extract_mount_point, "hf3fs_extract_mount_point");
  shared.find(l.iov_create, "hf3fs_iovcreate");
  shared.find(l.iov_destroy, "hf3fs_iovdestroy");
  shared.find(l.ior_create, "hf3fs_iorcreate4");
  shared.find(l.ior_destroy, "hf3fs_iordestroy");
  shared.find(l.reg_fd, "hf3fs_reg_fd");
  shared.find(l.dereg_fd, "hf3fs_dereg_fd");
  shared.find(l.prep_io, "hf3fs_prep_io");
  shared.find(l.submit, "hf3fs_submit_ios");
  shared.find(l.wait, "hf3fs_wait_for_ios");
  if (!shared.missing().empty())
    return {{}, "libhf3fs_api_shared.so has no " + shared.missing() + "; install a newer 3FS"};
  return {l, {}};
}

}  // namespace

const Library* library(std::string* why) {
  static Loaded<Library> loaded = load();
  return loaded.get(why);
}

}  // namespace dualkv::usrbio
