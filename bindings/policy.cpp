// Views, plans and path policies, which Python code may subclass.
#include "bindings.h"

namespace dualkv::bindings {

namespace {

// Lets C++ call a policy written in Python, whatever class it derives from. What it raises reaches the caller as it is.
template <typename Base>
class PyPolicy : public Base, public py::trampoline_self_life_support {
 public:
  using Base::Base;
  std::string name() const override {
    if constexpr (std::is_abstract_v<Base>) {
      PYBIND11_OVERRIDE_PURE(std::string, Base, name);
    } else {
      return Base::name();
    }
  }
  Plan plan(const PlanRequest& request) override {
    const py::gil_scoped_acquire acquire;
    const py::function override = py::get_override(static_cast<const Base*>(this), "plan");
    if (!override) {
      if constexpr (std::is_abstract_v<Base>) {
        throw Error(Code::kInvalidArgument, "policy: plan() is not implemented");
      } else {
        return Base::plan(request);
      }
    }
    py::object decode = py::none();
    if (request.decode) decode = py::cast(*request.decode);
    const py::object result = override(to_bytes(request.keys), py::arg("prefill") = request.prefill,
                                       py::arg("decode") = decode, py::arg("helpers") = request.helpers);
    if (!py::isinstance<Plan>(result)) throw Error(Code::kInvalidArgument, "policy: plan() must return a dualkv.Plan");
    return result.cast<Plan>();
  }
};

// plan() as Python calls it: of this class, so that an override may call it.
template <typename Policy>
Plan call(Policy& policy, const std::vector<py::bytes>& keys, const NodeView& prefill,
          const std::optional<NodeView>& decode, const std::vector<NodeView>& helpers) {
  const PlanRequest request{to_keys(keys), prefill, decode, helpers};
  if constexpr (std::is_abstract_v<Policy>) {
    return policy.plan(request);
  } else {
    return policy.Policy::plan(request);
  }
}

template <typename Policy, typename... Bases>
py::class_<Policy, Bases..., PyPolicy<Policy>, py::smart_holder> policy_class(py::module_& m, const char* name) {
  py::class_<Policy, Bases..., PyPolicy<Policy>, py::smart_holder> out(m, name);
  out.def("plan", &call<Policy>, py::arg("keys"), py::kw_only(), py::arg("prefill"), py::arg("decode") = py::none(),
          py::arg("helpers") = std::vector<NodeView>());
  return out;
}

}  // namespace

void register_policy(py::module_& m) {
  py::enum_<Path>(m, "Path")
      .value("PREFILL", Path::kPrefill)
      .value("DECODE", Path::kDecode)
      .value("HELPER", Path::kHelper);

  py::class_<NodeView>(m, "NodeView")
      .def(py::init([](std::string name, std::uint64_t block_bytes, std::uint32_t tokens_per_block,
                       std::uint64_t read_queue_bytes, std::uint64_t read_bandwidth, std::uint64_t link_bandwidth,
                       std::pair<std::uint64_t, std::uint64_t> lane_bytes, std::uint32_t free_slots,
                       std::uint32_t prompt_slots, std::optional<double> compute_queue_s) {
             NodeView view;
             view.name = std::move(name);
             view.block_bytes = block_bytes;
             view.tokens_per_block = tokens_per_block;
             view.read_queue_bytes = read_queue_bytes;
             view.read_bandwidth = read_bandwidth;
             view.link_bandwidth = link_bandwidth;
             view.lane_bytes[0] = lane_bytes.first;
             view.lane_bytes[1] = lane_bytes.second;
             view.free_slots = free_slots;
             view.prompt_slots = prompt_slots;
             view.compute_queue_s = compute_queue_s;
             return view;
           }),
           py::kw_only(), py::arg("name"), py::arg("block_bytes") = 0, py::arg("tokens_per_block") = 0,
           py::arg("read_queue_bytes") = 0, py::arg("read_bandwidth") = 0, py::arg("link_bandwidth") = 0,
           py::arg("lane_bytes") = std::pair<std::uint64_t, std::uint64_t>{0, 0}, py::arg("free_slots") = 0,
           py::arg("prompt_slots") = 0, py::arg("compute_queue_s") = py::none())
      .def_readonly("name", &NodeView::name)
      .def_readonly("block_bytes", &NodeView::block_bytes)
      .def_readonly("tokens_per_block", &NodeView::tokens_per_block)
      .def_readonly("read_queue_bytes", &NodeView::read_queue_bytes)
      .def_property_readonly("read_queue_tokens", &NodeView::read_queue_tokens)
      .def_readonly("read_bandwidth", &NodeView::read_bandwidth)
      .def_readonly("link_bandwidth", &NodeView::link_bandwidth)
      .def_readonly("free_slots", &NodeView::free_slots)
      .def_readonly("prompt_slots", &NodeView::prompt_slots)
      .def_readonly("compute_queue_s", &NodeView::compute_queue_s)
      .def_property_readonly("lane_bytes",
                             [](const NodeView& v) { return py::make_tuple(v.lane_bytes[0], v.lane_bytes[1]); });

  py::class_<PathRange>(m, "PathRange")
      .def(py::init<std::string, Path, std::uint32_t, std::uint32_t>(), py::arg("node"), py::arg("path"),
           py::arg("first"), py::arg("count"))
      .def_readonly("node", &PathRange::node)
      .def_readonly("path", &PathRange::path)
      .def_readonly("first", &PathRange::first)
      .def_readonly("count", &PathRange::count)
      .def("__repr__", [](const PathRange& r) {
        return "PathRange(node='" + r.node + "', path=" + std::string(to_string(r.path)) +
               ", first=" + std::to_string(r.first) + ", count=" + std::to_string(r.count) + ")";
      });

  py::class_<Plan>(m, "Plan")
      .def(py::init([](const std::vector<py::bytes>& keys, std::vector<PathRange> ranges, std::string prefill,
                       std::string decode, std::vector<std::string> helpers, std::string reason,
                       std::uint32_t recompute_blocks) {
             Plan plan{to_keys(keys),      std::move(ranges), std::move(prefill), std::move(decode),
                       std::move(helpers), std::move(reason), recompute_blocks};
             check_plan(plan);
             return plan;
           }),
           py::kw_only(), py::arg("keys"), py::arg("ranges"), py::arg("prefill") = "", py::arg("decode") = "",
           py::arg("helpers") = std::vector<std::string>(), py::arg("reason") = "", py::arg("recompute_blocks") = 0)
      .def_property_readonly("keys", [](const Plan& p) { return to_bytes(p.keys); })
      .def_readonly("ranges", &Plan::ranges)
      .def_readonly("prefill", &Plan::prefill)
      .def_readonly("decode", &Plan::decode)
      .def_readonly("helpers", &Plan::helpers)
      .def_readonly("reason", &Plan::reason)
      .def_readonly("recompute_blocks", &Plan::recompute_blocks);

  policy_class<PathPolicy>(m, "PathPolicy").def(py::init<>()).def_property_readonly("name", &PathPolicy::name);
  policy_class<PrefillOnly, PathPolicy>(m, "PrefillOnly").def(py::init<>());
  policy_class<DecodeOnly, PathPolicy>(m, "DecodeOnly").def(py::init<>());
  policy_class<RoundRobin, PathPolicy>(m, "RoundRobin").def(py::init<>());
  policy_class<ShortestQueue, PathPolicy>(m, "ShortestQueue")
      .def(py::init<double>(), py::kw_only(), py::arg("margin") = 0.1);
  policy_class<Split, PathPolicy>(m, "Split")
      .def(py::init<std::uint32_t, std::uint32_t, double>(), py::kw_only(), py::arg("max_sides") = 4,
           py::arg("helper_blocks") = 4, py::arg("helper_gain") = 0.1);
  policy_class<Recompute, PathPolicy>(m, "Recompute")
      .def(py::init<std::shared_ptr<PathPolicy>, double>(), py::arg("inner"), py::kw_only(), py::arg("margin") = 0.1)
      .def("observe", &Recompute::observe, py::arg("cached"), py::arg("tokens"), py::arg("seconds"));
}

}  // namespace dualkv::bindings
