// Node, Peer, Load, Incoming, Grant.
#include "bindings.h"

namespace dualkv::bindings {

namespace {

// One namespace of loopback:// names for the process: module state, not a C++ static.
std::shared_ptr<LoopbackHub> hub_of(const py::module_& m) {
  return *m.attr("_loopback_hub").cast<py::capsule>().get_pointer<std::shared_ptr<LoopbackHub>>();
}

RdmaOptions to_rdma_options(const py::dict& d) {
  RdmaOptions o;
  field(d, "devices", o.devices);
  field(d, "gpu", o.gpu);
  field(d, "gid_index", o.gid_index);
  field(d, "mtu", o.mtu);
  field(d, "timeout", o.timeout);
  field(d, "retries", o.retries);
  field(d, "rnr_retries", o.rnr_retries);
  field(d, "stall_s", o.stall_s);
  field(d, "send_depth", o.send_depth);
  field(d, "receive_depth", o.receive_depth);
  field(d, "registered", o.registered_bytes);
  field(d, "relaxed_ordering", o.relaxed_ordering);
  field(d, "on_demand_paging", o.on_demand_paging);
  return o;
}

py::dict to_dict(const RdmaStats& s) {
  py::dict out;
  out["queue_pairs"] = s.queue_pairs;
  out["queue_pairs_up"] = s.queue_pairs_up;
  out["rails"] = s.rails;
  out["bytes_written_low"] = s.bytes_written[0];
  out["bytes_written_high"] = s.bytes_written[1];
  out["batches"] = s.batches;
  out["work_requests"] = s.work_requests;
  out["doorbells"] = s.doorbells;
  out["inline_batches"] = s.inline_batches;
  out["failures"] = s.failures;
  out["fences"] = s.fences;
  out["rebuilds"] = s.rebuilds;
  out["last_failure"] = s.last_failure;
  out["service_level_low"] = s.service_level[0];
  out["service_level_high"] = s.service_level[1];
  out["traffic_class_low"] = s.traffic_class[0];
  out["traffic_class_high"] = s.traffic_class[1];
  return out;
}

NodeOptions to_node_options(const py::dict& d) {
  NodeOptions o;
  field(d, "name", o.name);
  field(d, "listen", o.listen);
  field(d, "secret", o.secret);
  field(d, "connections_per_lane", o.connections_per_lane);
  field(d, "low_dscp", o.lanes[0].dscp);
  field(d, "low_so_priority", o.lanes[0].so_priority);
  field(d, "high_dscp", o.lanes[1].dscp);
  field(d, "high_so_priority", o.lanes[1].so_priority);
  field(d, "low_service_level", o.lanes[0].service_level);
  field(d, "high_service_level", o.lanes[1].service_level);
  field(d, "write_frame", o.write_frame_bytes);
  field(d, "write_window", o.write_window_bytes);
  field(d, "heartbeat_s", o.heartbeat_s);
  field(d, "peer_silence_s", o.peer_silence_s);
  field(d, "handshake_s", o.handshake_s);
  field(d, "reconnect_max_s", o.reconnect_max_s);
  field(d, "spin_us", o.spin_us);
  field(d, "stall_s", o.stall_s);
  field(d, "max_loads", o.max_loads);
  field(d, "max_peers", o.max_peers);
  std::string copy = "cpu";
  field(d, "copy", copy);
  if (copy != "cpu" && copy != "nic") {
    throw Error(Code::kInvalidArgument, "node: copy = '" + copy + "': must be 'cpu' or 'nic'");
  }
  o.copy = copy == "nic" ? CopyEngine::kNic : CopyEngine::kCpu;
  std::string gpu_copy = to_string(o.gpu.copy);
  field(d, "gpu_copy", gpu_copy);
  o.gpu.copy = to_gpu_copy(gpu_copy);
  field(d, "gpu_verify", o.gpu.verify);
  field(d, "gpu_bounce", o.gpu.bounce_bytes);
  field(d, "gpu_gds", o.gpu.gds_bytes);
  field(d, "gpu_rdma", o.gpu.rdma_bytes);
  return o;
}

py::dict to_dict(const GpuCopyStats& s) {
  py::dict batches;
  for (const GpuCopy engine : kGpuCopies) {
    if (engine != GpuCopy::kAuto) batches[to_string(engine)] = s.batches[static_cast<std::size_t>(engine)];
  }
  py::dict out;
  out["bytes"] = s.bytes;
  out["runs"] = s.runs;
  out["verified"] = s.verified;
  out["batches"] = batches;
  return out;
}

py::dict to_dict(const GpuStats& s) {
  py::dict out;
  out["gpu"] = s.ordinal;
  out["name"] = s.name;
  out["to_gpu"] = to_dict(s.to_gpu);
  out["from_gpu"] = to_dict(s.from_gpu);
  out["within"] = to_dict(s.within);
  out["from_gpus"] = to_dict(s.from_gpus);
  out["bounce_bytes"] = s.bounce_bytes;
  out["gds_slots_bytes"] = s.gds_slots_bytes;
  out["gds_bytes"] = s.gds_bytes;
  out["rdma_slots_bytes"] = s.rdma_slots_bytes;
  out["rdma_bytes"] = s.rdma_bytes;
  out["rdma_sent_bytes"] = s.rdma_sent_bytes;
  out["to_gpu_by_nic"] = s.to_gpu_by_nic;
  out["from_gpu_by_nic"] = s.from_gpu_by_nic;
  out["rdma_by_dma_buf"] = s.rdma_by_dma_buf;
  return out;
}

py::dict to_dict(const ReadTimes& t) {
  py::dict out;
  out["first_layer"] = t.layers.first;
  out["layers"] = t.layers.count;
  out["begin_s"] = t.begin_s;
  out["end_s"] = t.end_s;
  out["verify_s"] = t.verify_s;
  out["bytes"] = t.bytes;
  return out;
}

py::dict to_dict(const PathResult& p) {
  py::list reads;
  for (const ReadTimes& times : p.reads) reads.append(to_dict(times));
  py::dict out;
  out["node"] = p.node;
  out["path"] = std::string(to_string(p.path));
  out["blocks"] = p.blocks;
  out["bytes"] = p.bytes;
  out["first_s"] = p.first_s;
  out["last_s"] = p.last_s;
  out["layer_first_s"] = p.layer_first_s;
  out["layer_done_s"] = p.layer_done_s;
  out["reads"] = reads;
  return out;
}

py::dict to_dict(const LoadResult& r) {
  py::list paths;
  for (const PathResult& path : r.paths) paths.append(to_dict(path));
  py::dict out;
  out["reason"] = r.reason;
  out["started_s"] = r.started_s;
  out["paths"] = paths;
  out["layer_ready_s"] = r.layer_ready_s;
  out["layer_wait_begin_s"] = r.layer_wait_begin_s;
  out["layer_wait_end_s"] = r.layer_wait_end_s;
  out["layer_published_s"] = r.layer_published_s;
  out["layer_publish_done_s"] = r.layer_publish_done_s;
  out["bytes_published"] = r.bytes_published;
  out["failovers"] = r.failovers;
  out["seconds"] = r.seconds;
  return out;
}

py::dict to_dict(const NodeStats& s) {
  py::list links;
  for (const LinkStats& link : s.links) {
    py::dict one;
    one["peer"] = link.peer;
    one["transport"] = link.transport;
    one["connected"] = link.connected;
    one["bytes_sent_low"] = link.bytes_sent[0];
    one["bytes_sent_high"] = link.bytes_sent[1];
    one["bytes_received"] = link.bytes_received;
    one["writes_rejected"] = link.writes_rejected;
    one["writes_corrupt"] = link.writes_corrupt;
    if (link.transport == "rdma") one["rdma"] = to_dict(link.rdma);
    links.append(one);
  }
  py::dict copies;
  copies["engine"] = s.copies.engine == CopyEngine::kNic ? "nic" : "cpu";
  copies["rail"] = s.copies.rail;
  copies["bytes_by_nic"] = s.copies.bytes_by_nic;
  copies["bytes_by_cpu"] = s.copies.bytes_by_cpu;
  copies["doorbells"] = s.copies.doorbells;
  py::dict out;
  out["copies"] = copies;
  py::list gpus;
  for (const GpuStats& gpu : s.gpus) gpus.append(to_dict(gpu));
  out["gpus"] = gpus;
  out["store"] = bindings::to_dict(s.store);
  out["staging"] = bindings::to_dict(s.staging);
  out["links"] = links;
  out["loads_active"] = s.loads_active;
  out["loads_served"] = s.loads_served;
  out["loads_done"] = s.loads_done;
  out["loads_failed"] = s.loads_failed;
  out["failovers"] = s.failovers;
  out["connections_refused"] = s.connections_refused;
  out["frames_hostile"] = s.frames_hostile;
  out["fallbacks"] = s.fallbacks;
  return out;
}

}  // namespace

void register_node(py::module_& m) {
  m.attr("_loopback_hub") = py::capsule(new std::shared_ptr<LoopbackHub>(make_loopback_hub()),
                                        [](void* hub) { delete static_cast<std::shared_ptr<LoopbackHub>*>(hub); });

  py::class_<Load>(m, "Load", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("id", &Load::id)
      .def_property_readonly("layers", &Load::layers)
      .def_property_readonly("milestones", &Load::milestones)
      .def("wait",
           [](const Load& l, std::uint32_t layer, std::optional<double> timeout_s) {
             const py::gil_scoped_release release;
             raise_if_failed(l.wait(layer, until(timeout_s)));
           })
      .def("note_wait",
           [](const Load& l, std::uint32_t layer, double began_s) {
             const std::chrono::duration<double> began(began_s);
             l.note_wait(layer, Clock::time_point(std::chrono::duration_cast<Clock::duration>(began)));
           })
      .def("add_blocks",
           [](Load& l, const Ids& ids) {
             const std::vector<std::uint32_t> more = to_ids(ids);
             const py::gil_scoped_release release;
             l.add_blocks(more);
           })
      .def("publish", py::overload_cast<std::uint32_t>(&Load::publish))
      .def("publish_on_stream",
           [](Load& l, std::uint32_t layer, std::uint64_t stream) {
             const py::gil_scoped_release release;
             l.publish(layer, reinterpret_cast<void*>(stream));
           })
      .def("open_gates",
           [](Load& l, const LayerGates& gates, std::uint64_t stream) {
             const py::gil_scoped_release release;
             l.open_gates(gates, reinterpret_cast<void*>(stream));
           })
      .def("wait_on_stream",
           [](const Load& l, std::uint32_t layer, std::uint64_t stream) {
             const py::gil_scoped_release release;
             l.wait_on_stream(layer, reinterpret_cast<void*>(stream));
           })
      .def("release", &Load::release)
      .def("cancel", &Load::cancel, py::call_guard<py::gil_scoped_release>())
      .def("result", [](const Load& l) { return to_dict(l.result()); })
      .def_property_readonly("failed_block", &Load::failed_block);

  py::class_<LayerGates>(m, "LayerGates", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("layers", &LayerGates::layers)
      .def("wait",
           [](const LayerGates& g, std::uint32_t layer, std::uint64_t stream) {
             const py::gil_scoped_release release;
             g.wait(layer, reinterpret_cast<void*>(stream));
           })
      .def("publish", [](const LayerGates& g, std::uint32_t layer, std::uint64_t stream) {
        const py::gil_scoped_release release;
        g.publish(layer, reinterpret_cast<void*>(stream));
      });

  py::class_<Incoming>(m, "Incoming", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("id", &Incoming::id)
      .def_property_readonly("block_count", &Incoming::block_count)
      .def_property_readonly("milestones", &Incoming::milestones)
      .def("copy_to",
           [](const Incoming& i, const Cache& target, const Ids& ids, const std::optional<Ids>& blocks) {
             const std::vector<std::uint32_t> to = to_ids(ids);
             const std::vector<std::uint32_t> from = blocks ? to_ids(*blocks) : std::vector<std::uint32_t>();
             const py::gil_scoped_release release;
             if (!blocks) return i.copy_to(*target.kv, to);
             i.copy_to(*target.kv, to, std::span<const std::uint32_t>(from));
           })
      .def("save",
           [](const Incoming& i, const std::vector<py::bytes>& keys, std::uint32_t first_block,
              const py::bytes& parent) {
             const std::vector<Key> names = to_keys(keys);
             const Key before = to_parent(parent);
             const py::gil_scoped_release release;
             return i.save(names, first_block, before);
           })
      .def("close", &Incoming::close, py::call_guard<py::gil_scoped_release>());

  py::class_<Grant>(m, "Grant", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("id", &Grant::id)
      .def_property_readonly("milestones", &Grant::milestones)
      .def("revoke", &Grant::revoke, py::call_guard<py::gil_scoped_release>());

  py::class_<Peer>(m, "Peer", py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("name", &Peer::name)
      .def_property_readonly("connected", &Peer::connected)
      .def("view", &Peer::view)
      .def("send_layers", [](const Peer& p, std::uint64_t grant, const Cache& source, const Ids& ids,
                             std::uint32_t first_block, std::uint32_t first_layer, std::uint32_t layer_count, bool high,
                             double deadline_s, const Checksums& checksums) {
        SendRequest request{grant,
                            source.kv,
                            to_ids(ids),
                            first_block,
                            {first_layer, layer_count},
                            high ? Lane::kHigh : Lane::kLow,
                            deadline_s,
                            {checksums.data(), checksums.data() + checksums.size()}};
        const py::gil_scoped_release release;
        return p.send_layers(std::move(request));
      });

  py::class_<Node>(m, "Node", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([m](const KvGeometry& geometry, const py::dict& node, const py::dict& rdma, const py::dict& store,
                        const py::dict& staging) {
        NodeOptions options = to_node_options(node);
        options.rdma = to_rdma_options(rdma);
        options.store = to_store_options(store);
        options.staging = to_staging_options(staging);
        options.loopback = hub_of(m);
        const py::gil_scoped_release release;
        return std::make_unique<Node>(geometry, std::move(options));
      }))
      .def_property_readonly("name", &Node::name)
      .def_property_readonly("addresses", &Node::addresses)
      .def_property_readonly("store", [](Node& n) { return n.store(); })
      .def_property_readonly("staging", [](Node& n) { return n.staging(); })
      .def("connect", &Node::connect, py::call_guard<py::gil_scoped_release>())
      .def("peer", &Node::peer)
      .def("view",
           [](const Node& node, std::optional<double> compute_queue_s) {
             NodeView view = node.view();
             view.compute_queue_s = compute_queue_s;
             return view;
           })
      .def("load",
           [](Node& n, const Plan& plan, const Cache& into, const Ids& ids, std::uint32_t prompt_blocks,
              std::uint64_t load_id, double deadline_s, std::uint32_t window, std::uint32_t layers_per_read) {
             LoadRequest request{plan,   into.kv,         to_ids(ids),   deadline_s,
                                 window, layers_per_read, prompt_blocks, load_id};
             const py::gil_scoped_release release;
             return n.load(std::move(request));
           })
      .def("incoming", &Node::incoming, py::call_guard<py::gil_scoped_release>())
      .def("grant",
           [](Node& n, const std::string& peer, const Cache& into, const Ids& ids, double deadline_s) {
             std::vector<std::uint32_t> blocks = to_ids(ids);
             const py::gil_scoped_release release;
             return n.grant(peer, into.kv, std::move(blocks), deadline_s);
           })
      .def("copy",
           [](Node& n, const Cache& from, const Ids& from_ids, const Cache& to, const Ids& to_ids,
              std::uint32_t first_layer, std::uint32_t layer_count) {
             CopyRequest request{
                 from.kv, bindings::to_ids(from_ids), to.kv, bindings::to_ids(to_ids), {first_layer, layer_count}};
             const py::gil_scoped_release release;
             return n.copy(std::move(request));
           })
      .def("allocate",
           [](Node& n, std::uint64_t bytes) {
             std::shared_ptr<std::byte> memory;
             {
               const py::gil_scoped_release release;
               memory = n.allocate(bytes);
             }
             auto* raw = reinterpret_cast<std::uint8_t*>(memory.get());
             const py::capsule owner(new std::shared_ptr<std::byte>(std::move(memory)), [](void* held) {
               const py::gil_scoped_release release;
               delete static_cast<std::shared_ptr<std::byte>*>(held);
             });
             return py::array_t<std::uint8_t>({static_cast<py::ssize_t>(bytes)}, raw, owner);
           })
      .def("layer_gates", &Node::layer_gates, py::call_guard<py::gil_scoped_release>())
      .def("prepare",
           [](Node& n, const Cache& cache) {
             const py::gil_scoped_release release;
             n.prepare(*cache.kv);
           })
      .def("stats",
           [](const Node& n) {
             NodeStats stats;
             {
               const py::gil_scoped_release release;
               stats = n.stats();
             }
             return to_dict(stats);
           })
      .def("close", &Node::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace dualkv::bindings
