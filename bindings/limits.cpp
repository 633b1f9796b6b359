// Limit loops, as the submodule `limits`.
#include "dualkv/limits.h"

#include "bindings.h"

namespace dualkv::bindings {

namespace {

using Offsets = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;
using Fds = std::vector<int>;

std::vector<std::uint64_t> to_offsets(const Offsets& offsets) {
  if (offsets.ndim() != 1) throw Error(Code::kInvalidArgument, "offsets must be one-dimensional");
  return {offsets.data(), offsets.data() + offsets.size()};
}

limits::Sample read_file(std::string path, std::uint64_t block_bytes, const Offsets& offsets, std::uint32_t depth,
                         bool direct, bool keep) {
  const limits::FileReads reads{std::move(path), block_bytes, to_offsets(offsets), depth, direct, keep};
  const py::gil_scoped_release release;
  return limits::read_file(reads);
}

limits::Sample copy(limits::CopyArena& arena, std::uint64_t block_bytes, const Offsets& sources,
                    const Offsets& targets) {
  const limits::BlockCopies copies{block_bytes, to_offsets(sources), to_offsets(targets)};
  const py::gil_scoped_release release;
  return arena.run(copies);
}

}  // namespace

void register_limits(py::module_& m) {
  py::module_ limits = m.def_submodule("limits", "What the hardware gives to a bare loop.");

  py::class_<limits::Sample>(limits, "Sample")
      .def_readonly("seconds", &limits::Sample::seconds)
      .def_readonly("cpu_s", &limits::Sample::cpu_s)
      .def_readonly("bytes", &limits::Sample::bytes)
      .def_readonly("latencies_us", &limits::Sample::latencies_us);

  limits.def("read_file", &read_file);
  limits.def("checksum_memory", &limits::checksum_memory, py::call_guard<py::gil_scoped_release>());

  py::class_<limits::CopyArena>(limits, "CopyArena")
      .def(py::init<std::uint64_t, bool>(), py::call_guard<py::gil_scoped_release>())
      .def("run", &copy);

  py::class_<limits::GpuSample>(limits, "GpuSample")
      .def_readonly("sample", &limits::GpuSample::sample)
      .def_readonly("submit_s", &limits::GpuSample::submit_s);
  py::class_<limits::GpuArena>(limits, "GpuArena")
      .def(py::init([](int gpu, bool to_gpu, std::uint64_t block_bytes, std::uint64_t count) {
             return std::make_unique<limits::GpuArena>(limits::GpuCopies{gpu, to_gpu, block_bytes, count});
           }),
           py::call_guard<py::gil_scoped_release>())
      .def("run",
           [](limits::GpuArena& a, const std::string& engine) {
             const GpuCopy by = to_gpu_copy(engine);
             const py::gil_scoped_release release;
             return a.run(by);
           })
      .def("run_verified",
           [](limits::GpuArena& a, const std::string& engine) {
             const GpuCopy by = to_gpu_copy(engine);
             const py::gil_scoped_release release;
             return a.run_verified(by);
           })
      .def_property_readonly("memory",
                             [](const limits::GpuArena& a) { return reinterpret_cast<std::uintptr_t>(a.memory()); })
      .def("one_copy", &limits::GpuArena::one_copy, py::call_guard<py::gil_scoped_release>())
      .def("moves_the_right_bytes", [](limits::GpuArena& a, const std::string& engine) {
        const GpuCopy by = to_gpu_copy(engine);
        const py::gil_scoped_release release;
        return a.moves_the_right_bytes(by);
      });

  py::class_<limits::SocketLimit>(limits, "SocketLimit")
      .def(py::init<std::uint64_t>(), py::call_guard<py::gil_scoped_release>())
      .def(
          "send",
          [](limits::SocketLimit& s, const Fds& fds, std::uint64_t bytes, std::uint64_t chunk_bytes) {
            return s.send(fds, bytes, chunk_bytes);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "receive",
          [](limits::SocketLimit& s, const Fds& fds, std::uint64_t bytes, std::uint64_t chunk_bytes) {
            return s.receive(fds, bytes, chunk_bytes);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualkv::bindings
