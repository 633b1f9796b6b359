"""What the programs have in common: LMCache's own parts, small, around a dualkv store."""

import json
import os
import sys
import time

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.check.utils import EventLoopManager
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

ARGUMENTS = json.loads(sys.argv[1])
CHUNK = 16


def key_of(index, **changes):
    known = {
        "model_name": "org/model",
        "world_size": 1,
        "worker_id": 0,
        "chunk_hash": 1000 + index,
        "dtype": torch.float32,
    }
    return CacheEngineKey(**(known | changes))


def content(index, shape=(2, 4, CHUNK, 64)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(index))


class Engine:
    """An engine's side of LMCache: its remote backend with dualkv's plug-in, CPU memory and event loop."""

    def __init__(self, options, *, plugin="dualkv", mla=False, cpu_gib=0.01, **config):
        given = {"module_path": "dualkv.integrations.lmcache", "class_name": "DualKVAdapter", **options}
        self.config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK,
            local_cpu=False,
            max_local_cpu_size=cpu_gib,
            remote_storage_plugins=[plugin],
            extra_config={f"remote_storage_plugin.{plugin}.{name}": value for name, value in given.items()},
            **config,
        )
        self.metadata = LMCacheMetadata(
            model_name="org/model",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.float32,
            kv_shape=(4, 1 if mla else 2, CHUNK, 1 if mla else 2, 32),
            use_mla=mla,
            chunk_size=CHUNK,
        )
        self.fmt = MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD
        self.cpu = LocalCPUBackend(config=self.config, metadata=self.metadata, dst_device="cpu")
        self.loop = EventLoopManager()
        self.loop.start()
        self.backend = RemoteBackend(
            self.config, self.metadata, self.loop.get_loop(), self.cpu, dst_device="cpu", plugin_name=plugin
        )
        self.connector = self.backend.connection and self.backend.connection.getWrappedConnector()

    def chunk(self, index, tokens=CHUNK):
        shape = self.metadata.get_shapes(tokens)[0]
        memory = self.cpu.allocate([shape], [torch.float32], self.fmt, busy_loop=False)
        memory.tensor.copy_(content(index, shape))
        return memory

    def put(self, index, tokens=CHUNK):
        """Blocks until the chunk is stored; how many references are left on its memory, ours among them."""
        memory = self.chunk(index, tokens)
        self.backend.batched_submit_put_task([key_of(index)], [memory])
        deadline = time.monotonic() + 20
        while self.backend.exists_in_put_tasks(key_of(index)) and time.monotonic() < deadline:
            time.sleep(0.001)
        references = memory.get_ref_count()
        memory.ref_count_down()
        return references

    def get(self, index):
        """True if every byte is right, None for a miss."""
        memory = self.backend.get_blocking(key_of(index))
        if memory is None:
            return None
        same = torch.equal(memory.tensor, content(index, memory.tensor.shape))
        memory.ref_count_down()
        return same

    def close(self):
        self.backend.close()
        self.loop.stop()


def finish(result):
    """Ends the process: LMCache leaves threads behind that would keep it."""
    with open(os.environ["RESULT"], "w", encoding="utf-8") as file:
        json.dump(result, file)
    sys.stdout.flush()
    os._exit(0)
