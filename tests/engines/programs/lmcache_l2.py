"""One process: the L2 adapter, made by LMCache's factory, driven as its controllers drive it."""

import argparse
import json
import select
import threading
import time

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd
from lmcache_parts import ARGUMENTS, content, finish
from outcome import code_of

SHAPE = (2, 4, 16, 64)
LAYOUT = {0: MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[torch.float32])}


def make(options):
    spec = {
        "type": "plugin",
        "module_path": "dualkv.integrations.lmcache",
        "class_name": "DualKVL2Adapter",
        "adapter_params": options,
    }
    (config,) = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)])).adapters
    return create_l2_adapter(config)


def key_of(index, **changes):
    return ObjectKey(**({"chunk_hash": bytes([index]) * 32, "model_name": "org/model", "kv_rank": 0} | changes))


def object_of(index=None, shape=SHAPE, dtype=torch.float32):
    """A memory object with chunk ``index``, or with zeros."""
    data = torch.zeros(shape, dtype=dtype) if index is None else content(index, shape).to(dtype)
    flat = data.view(-1)
    metadata = MemoryObjMetadata(
        shape=torch.Size(shape),
        dtype=dtype,
        address=flat.data_ptr(),
        phy_size=flat.numel() * flat.element_size(),
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(flat, metadata, parent_allocator=None)


class Driver:
    """Submits a task, waits for its event, and notes which of the three events came."""

    def __init__(self, adapter):
        self.adapter = adapter
        self.events = {
            "store": adapter.get_store_event_fd(),
            "lookup": adapter.get_lookup_and_lock_event_fd(),
            "load": adapter.get_load_event_fd(),
        }
        self.poll = select.poll()
        for event in self.events.values():
            self.poll.register(event, select.POLLIN)

    def ready(self, timeout_s=20):
        """Names of the events that came first, taken back."""
        fds = [fd for fd, _ in self.poll.poll(timeout_s * 1000)]
        for fd in fds:
            consume_fd(fd)
        return [name for name, fd in self.events.items() if fd in fds]

    def store(self, pairs):
        task = self.adapter.submit_store_task([key for key, _ in pairs], [memory for _, memory in pairs])
        came = self.ready()
        done = self.adapter.pop_completed_store_tasks()
        return [came, list(done) == [task], int(done[task]), self.adapter.pop_completed_store_tasks() == {}]

    def lookup(self, keys, layouts=LAYOUT):
        task = self.adapter.submit_lookup_and_lock_task(keys, layouts)
        came = self.ready()
        found = self.adapter.query_lookup_and_lock_result(task)
        again = self.adapter.query_lookup_and_lock_result(task)
        self.adapter.submit_unlock(keys)
        return [came, [found.test(i) for i in range(len(keys))], again is None]

    def load(self, keys, objects):
        task = self.adapter.submit_load_task(keys, objects)
        came = self.ready()
        loaded = self.adapter.query_load_result(task)
        again = self.adapter.query_load_result(task)
        return [came, [loaded.test(i) for i in range(len(keys))], again is None]


class Listener(L2AdapterListener):
    def __init__(self):
        self.seen = {"stored": 0, "accessed": 0, "deleted": 0}

    def on_l2_keys_stored(self, keys, sizes):
        self.seen["stored"] += len(keys)

    def on_l2_keys_accessed(self, keys):
        self.seen["accessed"] += len(keys)

    def on_l2_keys_deleted(self, keys):
        self.seen["deleted"] += len(keys)


options = ARGUMENTS["options"]
phase = ARGUMENTS["phase"]
result = {}
if phase == "write":
    adapter, listener = make(options), Listener()
    adapter.register_listener(listener)
    driver = Driver(adapter)
    result["distinct"] = len(set(driver.events.values()))
    result["before"] = driver.lookup([key_of(0), key_of(1)])
    result["stored"] = driver.store([(key_of(i), object_of(i)) for i in range(4)])
    result["stored_again"] = driver.store([(key_of(i), object_of(i)) for i in range(5)])  # one of them is new
    result["unknown_task"] = [adapter.query_load_result(999), adapter.query_lookup_and_lock_result(999)]

    # What makes two objects different: model, rank, group, salt, type, size.
    others = {
        "model": key_of(0, model_name="other"),
        "rank": key_of(0, kv_rank=1),
        "group": key_of(0, object_group_id=1),
        "salt": key_of(0, cache_salt="a user"),
    }
    layouts = LAYOUT | {1: LAYOUT[0]}
    result["others"] = {name: driver.lookup([key], layouts)[1] for name, key in others.items()}
    for name, desc in {
        "type": MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[torch.int32]),
        "size": MemoryLayoutDesc(shapes=[torch.Size((2, 4, 16, 128))], dtypes=[torch.float32]),
    }.items():
        result["others"][name] = driver.lookup([key_of(0)], {0: desc})[1]
    result["no_layout"] = driver.lookup([key_of(0), key_of(9)], {})[1]
    driver.store([(key_of(0), object_of(0, dtype=torch.float16))])
    half = object_of(dtype=torch.float16)
    result["half"] = [driver.load([key_of(0)], [half])[1], torch.equal(half.tensor, content(0).half())]

    # Many tasks, a few threads.
    threads = threading.active_count()
    tasks = [adapter.submit_lookup_and_lock_task([key_of(0)], LAYOUT) for _ in range(300)]
    deadline = time.monotonic() + 20
    left = set(tasks)
    while left and time.monotonic() < deadline:
        left -= {task for task in left if adapter.query_lookup_and_lock_result(task) is not None}
    result["many"] = [len(left), threading.active_count() - threads]
    driver.ready(0)

    adapter.delete([key_of(3), key_of(8)])
    result["deleted"] = driver.lookup([key_of(2), key_of(3)])[1]
    result["listener"] = listener.seen
    result["usage"] = adapter.get_usage().total_bytes_used
    result["status"] = adapter.report_status()
    adapter.close()
    adapter.close()
    result["closed"] = [
        code_of(adapter.submit_load_task, [key_of(0)], [object_of()]),
        adapter.report_status()["is_healthy"],
    ]

if phase == "read":  # 0, 1, 2 and 4 are stored, and one of them is damaged
    adapter = make(options)
    driver = Driver(adapter)
    keys = [key_of(i) for i in (0, 1, 2, 3, 4)]
    result["looked_up"] = driver.lookup(keys)
    objects = [object_of() for _ in keys]
    result["loaded"] = driver.load(keys, objects)
    result["right"] = [torch.equal(memory.tensor, content(i)) for i, memory in enumerate(objects)]
    result["untouched"] = [bool((memory.tensor == 0).all()) for memory in objects]
    result["looked_up_next"] = driver.lookup(keys)[1]
    result["corrupt"] = adapter.report_status()["corrupt"]
    result["healed"] = driver.store([(key, object_of(i)) for i, key in enumerate(keys)])
    result["loaded_next"] = driver.load(keys, objects)[1]
    result["right_next"] = [torch.equal(memory.tensor, content(i)) for i, memory in enumerate(objects)]
    adapter.close()

    # Storage that never answers a read: misses by the deadline, and a close that does not wait for it.
    silent = options | {"store_options": {"faults": {"drop_rate": 1.0}}}
    adapter = make(silent | {"deadline_s": 0.5})
    began = time.monotonic()
    result["silent"] = Driver(adapter).load(keys, objects)[1]
    result["silent_s"] = time.monotonic() - began
    adapter.close()
    adapter = make(silent)
    empty = [object_of() for _ in keys]
    task = adapter.submit_load_task(keys, empty)
    result["in_progress"] = adapter.query_load_result(task)
    time.sleep(0.3)
    began = time.monotonic()
    adapter.close()
    result["close_s"] = time.monotonic() - began
    result["closed_untouched"] = all(bool((memory.tensor == 0).all()) for memory in empty)

    # Objects that the store can't hold: tasks end all the same.
    adapter = make(options | {"staging": "8KiB"})
    driver = Driver(adapter)
    result["no_room"] = [
        driver.lookup(keys)[1],
        driver.load(keys, empty)[1],
        driver.store([(keys[0], empty[0])])[2],
        adapter.report_status()["is_healthy"],
    ]
    adapter.close()
    result["refused"] = {
        "option": code_of(make, options | {"stagin": "1MiB"}),
        "store_option": code_of(make, options | {"store_options": {"qouta": 1}}),
        "no_store": code_of(make, {}),
        "no_parent": code_of(make, {"store": "file:///no/such/place"}),
        "deadline": code_of(make, options | {"deadline_s": "soon"}),
    }
finish(result)
