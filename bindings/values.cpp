// Errors, geometry, keys, paged caches, waiting.
#include "bindings.h"

namespace dualkv::bindings {

namespace {

// dualkv.errors.Error(message, code, os_errno), so that Python code can look at the code.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object type = py::module_::import("dualkv.errors").attr("Error");
    const py::object value = type(error.status().message, to_string(error.code()), error.os_errno());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

using Tokens = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;
using Planes = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

// planes: [layers, planes, 3] of pointer, block stride, bytes. A plane of 0 bytes is absent.
Cache make_cache(const KvGeometry& geometry, const Planes& planes, std::uint32_t block_count, int device,
                 py::object owners) {
  if (planes.ndim() != 3 || planes.shape(2) != 3) {
    throw Error(Code::kInvalidArgument, "planes must have the shape [layers, planes, 3]");
  }
  const auto view = planes.unchecked<3>();
  std::vector<std::vector<Plane>> layers(static_cast<std::size_t>(view.shape(0)));
  for (py::ssize_t i = 0; i < view.shape(0); ++i) {
    for (py::ssize_t j = 0; j < view.shape(1); ++j) {
      if (view(i, j, 2) == 0) continue;
      layers[static_cast<std::size_t>(i)].push_back(
          {reinterpret_cast<std::byte*>(view(i, j, 0)), view(i, j, 1), view(i, j, 2)});
    }
  }
  return {std::make_shared<PagedKv>(geometry, std::move(layers), block_count, device), std::move(owners)};
}

std::uint64_t checksum_of(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.shape[i] > 1 && info.strides[i] != expected)
      throw Error(Code::kInvalidArgument, "checksum: the buffer must be contiguous");
    expected *= info.shape[i];
  }
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(info.ptr),
                                         static_cast<std::size_t>(info.size * info.itemsize));
  const py::gil_scoped_release release;
  return checksum(bytes);
}

}  // namespace

void register_values(py::module_& m) {
  py::register_exception_translator(&translate);

  py::class_<KvGeometry>(m, "KvGeometry")
      .def(py::init<std::vector<std::uint64_t>, std::uint32_t, std::string>(), py::arg("layer_bytes"),
           py::arg("tokens_per_block"), py::arg("namespace_name"))
      .def_property_readonly("layers", &KvGeometry::layers)
      .def_property_readonly("tokens_per_block", &KvGeometry::tokens_per_block)
      .def_property_readonly("namespace", &KvGeometry::namespace_name)
      .def_property_readonly("block_bytes", &KvGeometry::block_bytes)
      .def_property_readonly("file_bytes", &KvGeometry::file_bytes)
      .def_property_readonly("fingerprint", &KvGeometry::fingerprint)
      .def("layer_bytes",
           [](const KvGeometry& g, std::uint32_t layer) {
             if (layer >= g.layers())
               throw Error(Code::kInvalidArgument,
                           "layer " + std::to_string(layer) + " of " + std::to_string(g.layers()));
             return g.layer_bytes(layer);
           })
      .def("layer_offset",
           [](const KvGeometry& g, std::uint32_t layer) {
             if (layer > g.layers())
               throw Error(Code::kInvalidArgument,
                           "layer " + std::to_string(layer) + " of " + std::to_string(g.layers()));
             return g.layer_offset(layer);
           })
      .def("__eq__", [](const KvGeometry& a, const KvGeometry& b) { return a == b; })
      .def("__str__", &KvGeometry::describe);

  m.def("block_keys", [](const Tokens& tokens, const KvGeometry& geometry, const py::bytes& parent) {
    if (tokens.ndim() != 1) throw Error(Code::kInvalidArgument, "tokens must be one-dimensional");
    const std::span<const std::uint32_t> view(tokens.data(), static_cast<std::size_t>(tokens.size()));
    const Key before = to_parent(parent);
    std::vector<Key> keys;
    {
      const py::gil_scoped_release release;
      keys = block_keys(view, geometry, before);
    }
    return to_bytes(keys);
  });
  m.def("checksum", &checksum_of);

  py::class_<Cache>(m, "PagedKv")
      .def(py::init(&make_cache))
      .def_property_readonly("block_count", [](const Cache& c) { return c.kv->block_count(); })
      .def_property_readonly("layers", [](const Cache& c) { return c.kv->layers(); })
      .def_property_readonly("_device", [](const Cache& c) { return c.kv->device(); })
      .def("_checksums", [](const Cache& c, const Ids& ids, std::uint32_t first_layer, std::uint32_t layer_count) {
        const std::vector<std::uint32_t> blocks = to_ids(ids);
        std::vector<std::uint64_t> out;
        {
          const py::gil_scoped_release release;
          out = checksums(*c.kv, blocks, first_layer, layer_count);
        }
        return Checksums(static_cast<py::ssize_t>(out.size()), out.data());
      });

  py::class_<Notifier, std::shared_ptr<Notifier>>(m, "Notifier")
      .def(py::init<>())
      .def("fileno", &Notifier::fd)
      .def("drain", &Notifier::drain);

  py::class_<Milestones, std::shared_ptr<Milestones>>(m, "Milestones")
      .def(py::init<std::uint32_t>())
      .def_property_readonly("count", &Milestones::count)
      .def("reached", &Milestones::reached)
      .def("ended", &Milestones::ended)
      .def("reach", &Milestones::reach)
      .def("raise_if_failed",
           [](const Milestones& self, std::uint32_t milestone) {
             if (!self.reached(milestone)) raise_if_failed(self.status());
           })
      .def("wait",
           [](const Milestones& self, std::uint32_t milestone, std::optional<double> timeout_s) {
             const py::gil_scoped_release release;
             raise_if_failed(self.wait(milestone, until(timeout_s)));
           })
      .def("notify", &Milestones::notify);

  py::class_<Operation>(m, "Operation", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("milestones", &Operation::milestones);
}

}  // namespace dualkv::bindings
