// What the binding files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "dualkv/keys.h"
#include "dualkv/node.h"
#include "dualkv/operation.h"
#include "dualkv/paged_kv.h"

namespace py = pybind11;

namespace dualkv::bindings {

using Ids = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;

using Checksums = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

inline Key to_key(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return Key(std::as_bytes(std::span(view)));
}
inline Key to_parent(const py::bytes& bytes) { return std::string_view(bytes).empty() ? Key() : to_key(bytes); }
inline py::bytes to_bytes(const Key& key) {
  return {reinterpret_cast<const char*>(key.bytes().data()), key.bytes().size()};
}
inline std::vector<Key> to_keys(const std::vector<py::bytes>& keys) {
  std::vector<Key> out;
  out.reserve(keys.size());
  for (const py::bytes& key : keys) out.push_back(to_key(key));
  return out;
}
inline std::vector<py::bytes> to_bytes(const std::vector<Key>& keys) {
  std::vector<py::bytes> out;
  out.reserve(keys.size());
  for (const Key& key : keys) out.push_back(to_bytes(key));
  return out;
}
inline std::vector<std::uint32_t> to_ids(const Ids& ids) {
  if (ids.ndim() != 1) throw Error(Code::kInvalidArgument, "block ids must be one-dimensional");
  return {ids.data(), ids.data() + ids.size()};
}
// None waits for ever.
inline Clock::time_point until(std::optional<double> timeout_s) {
  if (!timeout_s) return Clock::time_point::max();
  // More would overflow the clock; three years are as good as for ever.
  constexpr double kLongestSeconds = 1e8;
  if (!(*timeout_s < kLongestSeconds)) timeout_s = kLongestSeconds;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(*timeout_s));
}
inline void raise_if_failed(const Status& status) {
  if (!status.ok()) throw Error(status);
}

inline constexpr GpuCopy kGpuCopies[] = {GpuCopy::kAuto, GpuCopy::kMemcpy, GpuCopy::kBatch, GpuCopy::kKernel};
// By the names of the option gpu_copy.
inline GpuCopy to_gpu_copy(const std::string& name) {
  for (const GpuCopy engine : kGpuCopies) {
    if (name == to_string(engine)) return engine;
  }
  throw Error(Code::kInvalidArgument, "gpu_copy = '" + name + "': must be 'auto', 'memcpy', 'batch' or 'kernel'");
}

// The engine's memory, described once, with the Python objects that own it.
struct Cache {
  std::shared_ptr<const PagedKv> kv;
  py::object owners;
};

// Reads one entry of an options dict, if it is there.
template <typename T>
void field(const py::dict& options, const char* name, T& out) {
  if (!options.contains(name)) return;
  try {
    out = options[name].cast<T>();
  } catch (const py::cast_error&) {
    throw Error(Code::kInvalidArgument, std::string("option ") + name + " = " +
                                            py::repr(options[name]).cast<std::string>() +
                                            ": wrong type, or out of range");
  }
}

// Unknown names have been refused by the Python side.
StoreOptions to_store_options(const py::dict& options);
StagingOptions to_staging_options(const py::dict& options);
py::dict to_dict(const StoreStats& stats);
py::dict to_dict(const StagingStats& stats);

void register_values(py::module_& m);
void register_storage(py::module_& m);
void register_policy(py::module_& m);
void register_scheduler(py::module_& m);
void register_node(py::module_& m);
void register_limits(py::module_& m);
void register_sim(py::module_& m);
void register_gpu(py::module_& m);

}  // namespace dualkv::bindings
