// Staging pool and store.
#include "bindings.h"

namespace dualkv::bindings {

namespace {

// Slots that were asked for, and the place in line until they came.
struct Acquisition {
  StagingPool pool;
  std::shared_ptr<Milestones> milestones = std::make_shared<Milestones>(1);
  std::shared_ptr<std::vector<Slot>> slots = std::make_shared<std::vector<Slot>>();
  std::uint64_t ticket = 0;

  explicit Acquisition(const StagingPool& from) : pool(from) {}
  ~Acquisition() { pool.withdraw(ticket); }
};

struct PySlot {
  Slot slot;
  std::uint64_t bytes;
};

std::unique_ptr<Acquisition> acquire(const StagingPool& pool, std::uint32_t count) {
  auto request = std::make_unique<Acquisition>(pool);
  request->ticket = request->pool.acquire(
      count, SlotUse::kTransit, [milestones = request->milestones, out = request->slots](std::vector<Slot> slots) {
        if (slots.empty()) return milestones->fail({Code::kCancelled, 0, "staging: the request was withdrawn"});
        *out = std::move(slots);
        milestones->reach(0);
      });
  return request;
}

std::vector<Slot> to_slots(const std::vector<PySlot>& slots) {
  std::vector<Slot> out;
  for (const PySlot& slot : slots) out.push_back(slot.slot);
  return out;
}

}  // namespace

py::dict to_dict(const StagingStats& s) {
  py::dict out;
  out["slots"] = s.slots;
  out["free_slots"] = s.free_slots;
  out["prompt_limit"] = s.prompt_limit;
  out["prompt_slots"] = s.prompt_slots;
  out["waiting"] = s.waiting;
  out["locked"] = s.locked;
  out["pages"] = s.pages;
  out["chunks"] = s.chunks;
  out["ready_chunks"] = s.ready_chunks;
  out["locked_bytes"] = s.locked_bytes;
  out["prepare_s"] = s.prepare_s;
  out["numa_bound"] = s.numa_bound;
  return out;
}

py::dict to_dict(const StoreStats& s) {
  py::dict out;
  out["backend"] = s.backend;
  out["direct"] = s.direct;
  out["depth"] = s.depth;
  out["registered"] = s.registered;
  out["registered_buffers"] = s.registered_buffers;
  out["registered_bytes"] = s.registered_bytes;
  out["register_s"] = s.register_s;
  out["alignment"] = s.alignment;
  out["blocks_read"] = s.blocks_read;
  out["bytes_read"] = s.bytes_read;
  out["read_errors"] = s.read_errors;
  out["blocks_corrupt"] = s.blocks_corrupt;
  out["blocks_saved"] = s.blocks_saved;
  out["bytes_saved"] = s.bytes_saved;
  out["save_errors"] = s.save_errors;
  out["blocks_evicted"] = s.blocks_evicted;
  out["read_queue_bytes"] = s.read_queue_bytes;
  out["read_bandwidth"] = s.read_bandwidth;
  out["fallbacks"] = s.fallbacks;
  return out;
}

StoreOptions to_store_options(const py::dict& d) {
  StoreOptions o;
  field(d, "root", o.root);
  field(d, "backend", o.backend);
  field(d, "direct", o.direct);
  field(d, "depth", o.depth);
  field(d, "read_limit", o.read_limit_bytes_per_s);
  field(d, "quota", o.quota_bytes);
  field(d, "in_use_grace_s", o.in_use_grace_s);
  field(d, "forget_s", o.forget_s);
  field(d, "durable", o.durable);
  field(d, "save_queue", o.save_queue);
  field(d, "fail_on_fallback", o.fail_on_fallback);
  if (d.contains("faults")) {
    const py::dict f = d["faults"];
    field(f, "seed", o.faults.seed);
    field(f, "error_rate", o.faults.error_rate);
    field(f, "short_rate", o.faults.short_rate);
    field(f, "corrupt_rate", o.faults.corrupt_rate);
    field(f, "drop_rate", o.faults.drop_rate);
    field(f, "delay_rate", o.faults.delay_rate);
    field(f, "delay_s", o.faults.delay_s);
  }
  return o;
}

StagingOptions to_staging_options(const py::dict& d) {
  StagingOptions o;
  field(d, "bytes", o.bytes);
  field(d, "transit_share", o.transit_share);
  field(d, "lock_memory", o.lock_memory);
  field(d, "huge_pages", o.huge_pages);
  field(d, "shared", o.shared);
  field(d, "chunk", o.chunk_bytes);
  field(d, "prepare_threads", o.prepare_threads);
  field(d, "lazy", o.lazy);
  field(d, "lock_limit", o.lock_limit_bytes);
  field(d, "numa_node", o.numa_node);
  return o;
}

void register_storage(py::module_& m) {
  py::class_<PySlot>(m, "Slot", py::buffer_protocol())
      .def_buffer([](PySlot& s) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(s.slot.get()), static_cast<py::ssize_t>(s.bytes));
      })
      .def_readonly("nbytes", &PySlot::bytes);

  py::class_<Acquisition>(m, "Acquisition")
      .def_property_readonly("milestones", [](const Acquisition& a) { return a.milestones; })
      .def("withdraw", [](Acquisition& a) { a.pool.withdraw(a.ticket); })
      .def("slots", [](const Acquisition& a) {
        if (!a.milestones->reached(0))
          throw Error(Code::kInvalidArgument, "staging: the slots have not come yet; wait first");
        std::vector<PySlot> out;
        for (const Slot& slot : *a.slots) out.push_back({slot, a.pool.slot_bytes()});
        a.slots->clear();
        return out;
      });

  py::class_<StagingPool>(m, "StagingPool")
      .def(py::init([](const KvGeometry& geometry, const py::dict& options) {
        const StagingOptions o = to_staging_options(options);
        const py::gil_scoped_release release;
        return std::make_unique<StagingPool>(geometry, o);
      }))
      .def_property_readonly("slot_bytes", &StagingPool::slot_bytes)
      .def("acquire", &acquire)
      .def("stats", [](const StagingPool& p) { return to_dict(p.stats()); });

  py::class_<Store>(m, "Store", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const KvGeometry& geometry, const py::dict& options, const StagingPool& pool) {
        const StoreOptions o = to_store_options(options);
        const py::gil_scoped_release release;
        return std::make_unique<Store>(geometry, o, pool);
      }))
      .def_property_readonly("geometry", &Store::geometry)
      .def_property_readonly("pool", &Store::pool)
      .def("match",
           [](Store& s, const std::vector<py::bytes>& keys) {
             const std::vector<Key> wanted = to_keys(keys);
             const py::gil_scoped_release release;
             return s.match(wanted);
           })
      .def("contains",
           [](Store& s, const py::bytes& key) {
             const Key name = to_key(key);
             const py::gil_scoped_release release;
             return s.contains(name);
           })
      .def("read",
           [](Store& s, const std::vector<py::bytes>& keys, const std::vector<PySlot>& slots, std::uint32_t first,
              std::uint32_t count,
              double deadline_s) { return s.read(to_keys(keys), to_slots(slots), {first, count}, until(deadline_s)); })
      .def("save",
           [](Store& s, const std::vector<py::bytes>& keys, const Cache& source, const Ids& ids,
              const py::bytes& parent, double deadline_s) {
             const std::vector<Key> names = to_keys(keys);
             const std::vector<std::uint32_t> blocks = to_ids(ids);
             const Key before = to_parent(parent);
             const py::gil_scoped_release release;
             return s.save(names, *source.kv, blocks, before, until(deadline_s));
           })
      .def("save_slots",
           [](Store& s, const std::vector<py::bytes>& keys, const std::vector<PySlot>& slots, const py::bytes& parent) {
             const std::vector<Key> names = to_keys(keys);
             const std::vector<Slot> images = to_slots(slots);
             const Key before = to_parent(parent);
             const py::gil_scoped_release release;
             return s.save_slots(names, images, before);
           })
      .def("remove",
           [](Store& s, const py::bytes& key) {
             const Key name = to_key(key);
             const py::gil_scoped_release release;
             return s.remove(name);
           })
      .def("quarantine",
           [](Store& s, const py::bytes& key) {
             const Key name = to_key(key);
             const py::gil_scoped_release release;
             return s.quarantine(name);
           })
      .def("verify",
           [](Store& s) {
             VerifyReport report;
             {
               const py::gil_scoped_release release;
               report = s.verify();
             }
             return py::make_tuple(report.blocks, report.bad);
           })
      .def("collect",
           [](Store& s, std::uint64_t quota) {
             const py::gil_scoped_release release;
             return s.collect(quota);
           })
      .def("stats", [](const Store& s) { return to_dict(s.stats()); });
}

}  // namespace dualkv::bindings
