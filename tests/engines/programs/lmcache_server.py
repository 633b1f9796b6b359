"""One process: the storage of LMCache's MP server, L1 and controllers included, with dualkv as its L2."""

import argparse
import json
import time

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache_parts import ARGUMENTS, content, finish

SHAPE = (2, 4, 16, 64)
LAYOUT = MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[torch.bfloat16])
CHUNKS = 8

spec = {
    "type": "plugin",
    "module_path": "dualkv.integrations.lmcache",
    "class_name": "DualKVL2Adapter",
    "adapter_params": ARGUMENTS["options"],
}
server = StorageManager(
    StorageManagerConfig(
        l1_manager_config=L1ManagerConfig(memory_config=L1MemoryManagerConfig(size_in_bytes=16 << 20, use_lazy=False)),
        eviction_config=EvictionConfig(eviction_policy="LRU"),
        l2_adapter_config=parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)])),
    )
)
((_, adapter),) = server.l2_adapters()
keys = [ObjectKey(chunk_hash=bytes([i]) * 32, model_name="org/model", kv_rank=0) for i in range(CHUNKS)]
result = {}
if ARGUMENTS["phase"] == "write":
    objects = server.reserve_write(keys, LAYOUT)
    for i, key in enumerate(keys):
        objects[key].tensor.copy_(content(i, SHAPE).bfloat16())
    server.finish_write(keys)
    deadline = time.monotonic() + 30
    while adapter.report_status()["stored"] < CHUNKS and time.monotonic() < deadline:
        time.sleep(0.01)
else:
    group = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=LAYOUT)
    handle = server.submit_prefetch_task(PrefetchTaskSpec(key_groups=[group]))
    result["ended"] = server.wait_prefetch_status(handle, 30)
    hits = server.query_prefetch_status(handle)
    result["from_l1"], result["from_l2"] = hits.l1_hit_count, hits.l2_hit_count
    found = [key for i, key in enumerate(keys) if hits.hit_cells[0].test(i)]
    if found:
        with server.read_prefetched_results(found) as objects:
            result["right"] = [
                torch.equal(memory.tensor, content(i, SHAPE).bfloat16()) for i, memory in enumerate(objects)
            ]
        server.finish_read_prefetched(found)
result["status"] = adapter.report_status()
result["healthy"] = server.report_status()["is_healthy"]
server.close()
result["closed"] = adapter.report_status()["is_healthy"]
finish(result)
