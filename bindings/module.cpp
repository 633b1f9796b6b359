// The extension module: a list of subjects.
#include "bindings.h"

PYBIND11_MODULE(_dualkv, m) {
  m.doc() = "C++ core of dualkv; use the dualkv package.";
  dualkv::bindings::register_values(m);
  dualkv::bindings::register_storage(m);
  dualkv::bindings::register_policy(m);
  dualkv::bindings::register_scheduler(m);
  dualkv::bindings::register_node(m);
  dualkv::bindings::register_limits(m);
  dualkv::bindings::register_sim(m);
  dualkv::bindings::register_gpu(m);
}
