// Opening libhf3fs_api_shared.
#include "shim/usrbio.h"

#include <dlfcn.h>

#include <optional>
#include <type_traits>

namespace dualkv::usrbio {

namespace {

struct Loaded {
  std::optional<Library> library;
  std::string why;
};

Loaded load() {
  void* handle = dlopen("libhf3fs_api_shared.so", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return {{}, std::string(dlerror()) + "; install 3FS's client, or add where it is to LD_LIBRARY_PATH"};
  }
  Library l{};
  std::string missing;
  const auto find = [&](auto& entry, const char* name) {
    entry = reinterpret_cast<std::remove_reference_t<decltype(entry)>>(dlsym(handle, name));
    if (entry == nullptr && missing.empty()) missing = name;
  };
  find(l.extract_mount_point, "hf3fs_extract_mount_point");
  find(l.iov_create, "hf3fs_iovcreate");
  find(l.iov_destroy, "hf3fs_iovdestroy");
  find(l.ior_create, "hf3fs_iorcreate4");
  find(l.ior_destroy, "hf3fs_iordestroy");
  find(l.reg_fd, "hf3fs_reg_fd");
  find(l.dereg_fd, "hf3fs_dereg_fd");
  find(l.prep_io, "hf3fs_prep_io");
  find(l.submit, "hf3fs_submit_ios");
  find(l.wait, "hf3fs_wait_for_ios");
  if (!missing.empty()) return {{}, "libhf3fs_api_shared.so has no " + missing + "; install a newer 3FS"};
  return {l, {}};
}

}  // namespace

const Library* library(std::string* why) {
  static const Loaded loaded = load();
  if (why != nullptr) *why = loaded.why;
  return loaded.library ? &*loaded.library : nullptr;
}

}  // namespace dualkv::usrbio
