// Opening libcufile.
#include "shim/cufile.h"

#include <dlfcn.h>

#include <optional>
#include <type_traits>

namespace dualkv::cufile {

namespace {

struct Loaded {
  std::optional<Library> library;
  std::string why;
};

Loaded load() {
  void* handle = dlopen("libcufile.so.0", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return {{},
            std::string(dlerror()) + "; install GPUDirect Storage (libcufile), or add where it is to LD_LIBRARY_PATH"};
  }
  Library l{};
  std::string missing;
  const auto find = [&](auto& entry, const char* name) {
    entry = reinterpret_cast<std::remove_reference_t<decltype(entry)>>(dlsym(handle, name));
    if (entry == nullptr && missing.empty()) missing = name;
  };
  find(l.driver_open, "cuFileDriverOpen");
  find(l.driver_get_properties, "cuFileDriverGetProperties");
  find(l.handle_register, "cuFileHandleRegister");
  find(l.handle_deregister, "cuFileHandleDeregister");
  find(l.buffer_register, "cuFileBufRegister");
  find(l.buffer_deregister, "cuFileBufDeregister");
  find(l.read, "cuFileRead");
  if (!missing.empty()) return {{}, "libcufile.so.0 has no " + missing + "; install a newer one"};
  Properties properties{};
  Result result = l.driver_open();
  if (result.error == kSuccess) result = l.driver_get_properties(&properties);
  if (result.error != kSuccess) {
    return {{}, "cuFileDriverOpen failed with " + std::to_string(result.error) + "; see `gdscheck -p` and cufile.log"};
  }
  l.compatibility =
      properties.major_version == 0 && properties.minor_version == 0 && (properties.status & kStatusNvmeP2p) == 0;
  return {l, {}};
}

}  // namespace

const Library* library(std::string* why) {
  static const Loaded loaded = load();
  if (why != nullptr) *why = loaded.why;
  return loaded.library ? &*loaded.library : nullptr;
}

}  // namespace dualkv::cufile
