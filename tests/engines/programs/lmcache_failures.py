"""One process: damage, storage that never answers, no memory, and what is refused, in LMCache's remote backend."""

import asyncio
import time

from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache_parts import ARGUMENTS, Engine, finish, key_of
from outcome import code_of

from dualkv.integrations.lmcache import DualKVAdapter

options = ARGUMENTS["options"]
silent = options | {"store_options": {"faults": {"drop_rate": 1.0}}}
result = {}


def held(engine):
    return engine.cpu.memory_allocator.pin_allocator.total_allocated_size


def until(condition, timeout_s=5):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


# One chunk of six is damaged.
engine = Engine(options)
result["damaged"] = [engine.get(i) for i in range(6)]
result["exists"] = [engine.backend.contains(key_of(i)) for i in range(6)]
result["corrupt"] = engine.connector.stats()["corrupt"]
for i in range(6):
    engine.put(i)
result["healed"] = [engine.get(i) for i in range(6)]

# All memory is taken: a miss, at once.
chunks = []
while (
    memory := engine.cpu.allocate(engine.metadata.get_shapes(), engine.metadata.get_dtypes(), busy_loop=False)
) is not None:
    chunks.append(memory)
result["full_pool"] = [len(chunks) > 10, held(engine) > 0, engine.get(0)]
for memory in chunks:
    memory.ref_count_down()
result["freed_pool"] = [held(engine), engine.get(0)]
engine.close()

# Storage that never answers a read.
engine = Engine(silent | {"deadline_s": 0.5})
began = time.monotonic()
result["silent"] = engine.get(0)
result["silent_s"] = time.monotonic() - began
result["silent_stats"] = engine.connector.stats()
result["silent_held"] = held(engine)
engine.close()

# A get that LMCache gives up on, and one that is in progress when the connector is closed.
engine = Engine(silent)
loop = engine.loop.get_loop()
given_up = asyncio.run_coroutine_threadsafe(engine.connector.get(key_of(0)), loop)
result["reading"] = until(lambda: held(engine) > 0)
given_up.cancel()
result["given_up"] = until(lambda: held(engine) == 0)
reading = asyncio.run_coroutine_threadsafe(engine.connector.get(key_of(0)), loop)
result["reading_again"] = until(lambda: held(engine) > 0)
began = time.monotonic()
engine.close()
result["closed_while_reading"] = [reading.result(5) if not reading.cancelled() else "cancelled", held(engine)]
result["close_s"] = time.monotonic() - began


def refused(given, **config):
    engine = Engine(given, **config)
    found = code_of(
        CreateConnector, "plugin://dualkv", None, engine.cpu, engine.config, engine.metadata, plugin_name="dualkv"
    )
    return [*(found or [None, None]), engine.backend.connection is None]


result["refused"] = {
    "option": refused(options | {"stagin": "1MiB"}),
    "store_option": refused(options | {"store_options": {"qouta": 1}}),
    "no_store": refused({}),
    "no_url": refused({"store": "/tmp/kv"}),
    "deadline": refused(options | {"deadline_s": 0}),
    "layerwise": refused(options, use_layerwise=True),
    "serde": refused(options, remote_serde="kivi"),
    "nothing": refused(options, save_unfull_chunk=True),
}
result["named"] = [
    Engine(options, plugin="dualkv.fast").get(0),
    Engine(options | {"fast.store": "of the plug-in dualkv.fast"}).get(0),
]
adapter = DualKVAdapter()
names = ("plugin://dualkv", "plugin://dualkv.fast", "plugin://dualkv2", "redis://dualkv")
result["parsed"] = [adapter.can_parse(url) for url in names]
finish(result)
