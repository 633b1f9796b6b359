// The engine scheduler and the batch selector.
#include "dualkv/scheduler.h"

#include "bindings.h"

namespace dualkv::bindings {

namespace {

using Batches = std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>>;

std::vector<Prefill> to_prefills(const std::vector<std::pair<std::uint64_t, std::uint64_t>>& pairs) {
  std::vector<Prefill> out;
  out.reserve(pairs.size());
  for (const auto& [cached, tokens] : pairs) out.push_back({cached, tokens});
  return out;
}

py::dict to_dict(const SchedulerStats& s) {
  py::dict out;
  out["engines"] = s.engines;
  out["waiting_prefill"] = s.waiting_prefill;
  out["waiting_decode"] = s.waiting_decode;
  out["requests"] = s.requests;
  out["reports_stale"] = s.reports_stale;
  return out;
}

}  // namespace

void register_scheduler(py::module_& m) {
  py::class_<EngineReport>(m, "EngineReport")
      .def(py::init([](std::string engine, std::uint32_t requests, std::uint64_t tokens,
                       std::uint64_t read_queue_tokens, std::uint64_t free_tokens, std::uint64_t seen) {
             return EngineReport{std::move(engine), requests, tokens, read_queue_tokens, free_tokens, seen};
           }),
           py::arg("engine"), py::kw_only(), py::arg("requests") = 0, py::arg("tokens") = 0,
           py::arg("read_queue_tokens") = 0, py::arg("free_tokens") = 0, py::arg("seen") = 0)
      .def_readonly("engine", &EngineReport::engine)
      .def_readonly("requests", &EngineReport::requests)
      .def_readonly("tokens", &EngineReport::tokens)
      .def_readonly("read_queue_tokens", &EngineReport::read_queue_tokens)
      .def_readonly("free_tokens", &EngineReport::free_tokens)
      .def_readonly("seen", &EngineReport::seen);

  py::class_<Assignment>(m, "Assignment")
      .def_readonly("request", &Assignment::request)
      .def_readonly("engine", &Assignment::engine)
      .def_readonly("number", &Assignment::number)
      .def_property_readonly("reason", [](const Assignment& a) { return a.reason.text(); });

  py::class_<Placement>(m, "Placement")
      .def_readonly("request", &Placement::request)
      .def_readonly("prefill", &Placement::prefill)
      .def_readonly("decode", &Placement::decode)
      .def_readonly("read", &Placement::read)
      .def_readonly("number", &Placement::number)
      .def_property_readonly("reason", [](const Placement& p) { return p.reason.text(); });

  py::class_<Fetched>(m, "Fetched")
      .def_readonly("assignments", &Fetched::assignments)
      .def_readonly("placements", &Fetched::placements)
      .def_readonly("refused", &Fetched::refused);

  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](std::uint64_t short_queue_tokens, std::uint64_t full_tokens, double even_slack,
                       std::uint32_t max_waiting) {
             return Scheduler({short_queue_tokens, full_tokens, even_slack, max_waiting});
           }),
           py::kw_only(), py::arg("short_queue_tokens"), py::arg("full_tokens"), py::arg("even_slack") = 1.05,
           py::arg("max_waiting") = 1u << 20)
      .def(
          "_join",
          [](Scheduler& s, const std::string& engine, bool prefill, const std::string& group, const std::string& node) {
            s.join(engine, prefill ? EngineRole::kPrefill : EngineRole::kDecode, group, node);
          })
      .def("leave", &Scheduler::leave, py::arg("engine"))
      .def("submit", &Scheduler::submit, py::arg("request"), py::arg("tokens"), py::arg("hit_tokens") = 0)
      .def(
          "fetch",
          [](Scheduler& s, const std::string& group, const std::vector<EngineReport>& reports) {
            return s.fetch(group, reports);
          },
          py::arg("group"), py::arg("reports") = std::vector<EngineReport>())
      .def("prefilled", &Scheduler::prefilled, py::arg("request"))
      .def("finished", &Scheduler::finished, py::arg("request"))
      .def("stats", [](const Scheduler& s) { return to_dict(s.stats()); });

  py::class_<AttentionModel>(m, "AttentionModel")
      .def(py::init<double, double, double>(), py::arg("base_s"), py::arg("s_per_operation"),
           py::arg("s_per_context") = 0.0)
      .def_static(
          "fit",
          [](const Batches& batches, const std::vector<double>& seconds) {
            std::vector<std::vector<Prefill>> samples;
            samples.reserve(batches.size());
            for (const auto& batch : batches) samples.push_back(to_prefills(batch));
            return AttentionModel(samples, seconds);
          },
          py::arg("batches"), py::arg("seconds"))
      .def_property_readonly("base_s", &AttentionModel::base_s)
      .def_property_readonly("s_per_operation", &AttentionModel::s_per_operation)
      .def_property_readonly("s_per_context", &AttentionModel::s_per_context)
      .def("seconds",
           [](const AttentionModel& model, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& batch) {
             return model.seconds(to_prefills(batch));
           });

  m.def("select_batch",
        [](const AttentionModel& model, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& waiting,
           double quota_s) { return select_batch(model, to_prefills(waiting), quota_s); });
}

}  // namespace dualkv::bindings
