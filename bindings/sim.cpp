// The simulator: options in as dicts and arrays, results out as arrays.
#include "dualkv/sim.h"

#include "bindings.h"

namespace dualkv::bindings {

namespace {

using Counts = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;
using Seconds = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Offsets = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

SimCompute to_compute(const py::dict& in) {
  SimCompute out;
  field(in, "forward_s", out.forward_s);
  field(in, "token_s", out.token_s);
  field(in, "context_s", out.context_s);
  field(in, "pair_s", out.pair_s);
  field(in, "step_s", out.step_s);
  field(in, "step_request_s", out.step_request_s);
  field(in, "step_context_s", out.step_context_s);
  field(in, "copy_call_s", out.copy_call_s);
  return out;
}

SimModel to_model(const py::dict& in) {
  SimModel out;
  field(in, "layers", out.layers);
  field(in, "tokens_per_block", out.tokens_per_block);
  field(in, "bytes_per_token", out.bytes_per_token);
  out.compute = to_compute(in["compute"]);
  return out;
}

SimHardware to_hardware(const py::dict& in) {
  SimHardware out;
  field(in, "prefill_nodes", out.prefill_nodes);
  field(in, "decode_nodes", out.decode_nodes);
  field(in, "engines_per_node", out.engines_per_node);
  field(in, "engines_per_prefill_group", out.engines_per_prefill_group);
  field(in, "snic", out.snic);
  field(in, "cnic", out.cnic);
  field(in, "dram", out.dram);
  field(in, "high_share", out.high_share);
  field(in, "decode_memory_tokens", out.decode_memory_tokens);
  field(in, "staging", out.staging);
  return out;
}

// turns [n, 3]: input, hit, output tokens; think_s [n]; begins [sessions + 1].
SimWorkload to_workload(const py::dict& in) {
  const auto turns = in["turns"].cast<Counts>();
  const auto think = in["think_s"].cast<Seconds>();
  const auto begins = in["begins"].cast<Offsets>();
  if (turns.ndim() != 2 || turns.shape(1) != 3 || think.ndim() != 1 || think.shape(0) != turns.shape(0) ||
      begins.ndim() != 1) {
    throw Error(Code::kInvalidArgument, "simulator: turns must be [n, 3], think_s [n], begins [sessions + 1]");
  }
  SimWorkload out;
  const auto counts = turns.unchecked<2>();
  const auto seconds = think.unchecked<1>();
  out.turns.reserve(static_cast<std::size_t>(turns.shape(0)));
  for (py::ssize_t i = 0; i < turns.shape(0); ++i) {
    out.turns.push_back({counts(i, 0), counts(i, 1), counts(i, 2), seconds(i)});
  }
  out.begins.assign(begins.data(), begins.data() + begins.size());
  field(in, "agents", out.agents);
  field(in, "agents_per_s", out.agents_per_s);
  field(in, "end_s", out.end_s);
  field(in, "seed", out.seed);
  return out;
}

SimOptions to_options(const py::dict& in) {
  SimOptions out;
  out.model = to_model(in["model"]);
  out.hardware = to_hardware(in["hardware"]);
  out.workload = to_workload(in["workload"]);
  field(in, "free_loads", out.free_loads);
  field(in, "layerwise", out.layerwise);
  if (in.contains("policy") && !in["policy"].is_none()) out.policy = in["policy"].cast<std::shared_ptr<PathPolicy>>();
  field(in, "helpers", out.helpers);
  field(in, "scheduled", out.scheduled);
  field(in, "short_queue_tokens", out.scheduler.short_queue_tokens);
  field(in, "full_tokens", out.scheduler.full_tokens);
  field(in, "max_waiting", out.scheduler.max_waiting);
  field(in, "fetch_s", out.fetch_s);
  field(in, "attention_quota_s", out.attention_quota_s);
  field(in, "batch_tokens", out.batch_tokens);
  field(in, "batch_requests", out.batch_requests);
  field(in, "window_s", out.window_s);
  return out;
}

template <typename Value, typename Rows, typename Get>
py::array_t<Value> column(const Rows& rows, Get get) {
  py::array_t<Value> out(static_cast<py::ssize_t>(rows.size()));
  Value* to = out.mutable_data();
  for (const auto& row : rows) *to++ = static_cast<Value>(get(row));
  return out;
}

py::dict to_dict(const std::vector<SimRequest>& rows) {
  py::dict out;
  const auto add = [&](const char* name, auto member) {
    out[name] = column<float>(rows, [&](const SimRequest& r) { return r.*member; });
  };
  out["agent"] = column<std::uint32_t>(rows, [](const SimRequest& r) { return r.agent; });
  out["turn"] = column<std::uint32_t>(rows, [](const SimRequest& r) { return r.turn; });
  out["prefill"] = column<std::uint32_t>(rows, [](const SimRequest& r) { return r.prefill; });
  out["decode"] = column<std::uint32_t>(rows, [](const SimRequest& r) { return r.decode; });
  out["arrival_s"] = column<double>(rows, [](const SimRequest& r) { return r.arrival_s; });
  add("scheduling_s", &SimRequest::scheduling_s);
  add("reading_s", &SimRequest::reading_s);
  add("queueing_s", &SimRequest::queueing_s);
  add("prefill_s", &SimRequest::prefill_s);
  add("second_s", &SimRequest::second_s);
  add("decode_s", &SimRequest::decode_s);
  add("output_tokens", &SimRequest::output_tokens);
  return out;
}

py::dict to_dict(const std::vector<SimWindow>& rows) {
  py::dict out;
  const auto add = [&](const char* name, auto member) {
    out[name] = column<double>(rows, [&](const SimWindow& w) { return static_cast<double>(w.*member); });
  };
  add("prefill_snic", &SimWindow::prefill_snic);
  add("decode_snic", &SimWindow::decode_snic);
  add("snic_max", &SimWindow::snic_max);
  add("cnic", &SimWindow::cnic);
  add("attention_ratio", &SimWindow::attention_ratio);
  add("running", &SimWindow::running);
  add("prompt_tokens", &SimWindow::prompt_tokens);
  return out;
}

}  // namespace

void register_sim(py::module_& m) {
  m.def(
      "simulate",
      [](const py::dict& options) {
        const SimOptions asked = to_options(options);
        SimResult result;
        {
          const py::gil_scoped_release release;
          result = simulate(asked);
        }
        py::dict out;
        out["seconds"] = result.seconds;
        out["requests"] = to_dict(result.requests);
        out["agent_seconds"] = column<float>(result.agent_seconds, [](float s) { return s; });
        out["windows"] = to_dict(result.windows);
        out["snic_bytes"] = column<double>(result.snic_bytes, [](double b) { return b; });
        out["hit_bytes"] = result.hit_bytes;
        out["read_bytes"] = result.read_bytes;
        out["relayed_bytes"] = result.relayed_bytes;
        out["published_bytes"] = result.published_bytes;
        out["recomputed_bytes"] = result.recomputed_bytes;
        out["events"] = result.events;
        return out;
      },
      py::arg("options"));
}

}  // namespace dualkv::bindings
