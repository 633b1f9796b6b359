// What the shims share: a library opened at run time, so that machines without it run the same build.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace dualkv {

// Never closed.
class SharedLibrary {
 public:
  explicit SharedLibrary(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) error_ = dlerror();
  }

  // Why it could not be opened; empty if it could.
  const std::string& error() const { return error_; }
  // The first call that find() did not find; empty if all were there.
  const std::string& missing() const { return missing_; }

  // Null, and missing(), if the library does not have it.
  template <typename Entry>
  void find(Entry& entry, const char* name) {
    set(entry, name, dlsym(handle_, name));
  }
  template <typename Entry>
  void find(Entry& entry, const char* name, const char* version) {
    set(entry, name, dlvsym(handle_, name, version));
  }

 private:
  template <typename Entry>
  void set(Entry& entry, const char* name, void* found) {
    entry = reinterpret_cast<Entry>(found);
    if (entry == nullptr && missing_.empty()) missing_ = name;
  }

  void* handle_;
  std::string error_;
  std::string missing_;
};

// Its calls, or why there are none.
template <typename Calls>
struct Loaded {
  std::optional<Calls> calls;
  std::string why;

  Calls* get(std::string* reason) {
    if (reason != nullptr) *reason = why;
    return calls ? &*calls : nullptr;
  }
};

}  // namespace dualkv
