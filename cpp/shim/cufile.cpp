// Opening libcufile.
#include "shim/cufile.h"

#include "shim/library.h"

namespace dualkv::cufile {

namespace {

Loaded<Library> load() {
  SharedLibrary shared("libcufile.so.0");
  if (!shared.error().empty()) {
    return {{}, shared.error() + "; install GPUDirect Storage (libcufile), or add where it is to LD_LIBRARY_PATH"};
  }
  Library l{};
  shared.find(l.driver_open, "cuFileDriverOpen");
  shared.find(l.driver_get_properties, "cuFileDriverGetProperties");
  shared.find(l.handle_register, "cuFileHandleRegister");
  shared.find(l.handle_deregister, "cuFileHandleDeregister");
  shared.find(l.buffer_register, "cuFileBufRegister");
  shared.find(l.buffer_deregister, "cuFileBufDeregister");
  shared.find(l.read, "cuFileRead");
  if (!shared.missing().empty()) return {{}, "libcufile.so.0 has no " + shared.missing() + "; install a newer one"};
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
  static Loaded<Library> loaded = load();
  return loaded.get(why);
}

}  // namespace dualkv::cufile
