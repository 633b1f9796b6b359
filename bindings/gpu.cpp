// GPUs, and the memory that DLPack describes.
#include "dualkv/gpu.h"

#include "bindings.h"

namespace dualkv::bindings {

namespace {

// DLPack's ABI, version 0: DLManagedTensor, as `__dlpack__()` hands it out to who asks for no version.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in items; null: contiguous
  std::uint64_t byte_offset;
};

// (pointer, shape, strides in bytes, bytes of an item). The tensor stays its producer's as long as the capsule, which
// is not consumed, lives.
py::tuple dlpack_view(const py::capsule& capsule) {
  const auto* tensor = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  const std::int64_t item = (tensor->type_bits * tensor->type_lanes + 7) / 8;
  std::vector<std::int64_t> shape(tensor->shape, tensor->shape + tensor->ndim), strides(shape.size());
  std::int64_t contiguous = item;
  for (std::size_t i = shape.size(); i-- > 0; contiguous *= shape[i]) {
    strides[i] = tensor->strides != nullptr ? tensor->strides[i] * item : contiguous;
  }
  return py::make_tuple(reinterpret_cast<std::uint64_t>(tensor->data) + tensor->byte_offset, py::tuple(py::cast(shape)),
                        strides, item);
}

}  // namespace

void register_gpu(py::module_& m) {
  m.def("gpus", [] {
    std::vector<GpuInfo> found;
    {
      const py::gil_scoped_release release;
      found = gpus();
    }
    py::list out;
    for (const GpuInfo& gpu : found) {
      out.append(py::make_tuple(gpu.ordinal, gpu.name, gpu.driver_version, gpu.no_batch, gpu.no_kernel));
    }
    return out;
  });
  m.def("gpu_of", [](std::uint64_t pointer) { return gpu_of(reinterpret_cast<const void*>(pointer)); });
  m.def("dlpack_view", &dlpack_view);
}

}  // namespace dualkv::bindings
