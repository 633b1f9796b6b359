"""One engine as a process: JSON lines in on stdin, JSON lines out on stdout.

A request is ``{"id", "op", ...}``; the answer has the same ``id`` and a ``result`` or an ``error``. While a node is
up, ``{"event": "sample", ...}`` lines report what its storage NIC does.
"""

import asyncio
import dataclasses
import json
import os
import sys
import time
from typing import Any

import numpy as np

import dualkv
from dualkv.engines.compute import ModelledCompute, ModelledCosts, TorchCompute
from dualkv.engines.decode import DecodeEngine
from dualkv.engines.prefill import PrefillEngine
from dualkv.policy import POLICIES

_MAX_LINE_BYTES = 64 << 20
_SAMPLE_S = 0.1


def make_compute(config: dict[str, Any]) -> Any:
    """TorchCompute or ModelledCompute from ``{"engine": "torch"|"modelled", ...}``."""
    if config["engine"] == "modelled":
        return ModelledCompute(
            config["layers"],
            config["layer_bytes"],
            config["tokens_per_block"],
            config["block_count"],
            ModelledCosts(**config.get("costs", {})),
        )
    from dualkv.engines.models import ModelConfig

    device = config.get("device", "cpu")
    return TorchCompute(ModelConfig(**config["model"]), config["tokens_per_block"], config["block_count"], device)


class Worker:
    """Serves one engine. Each ``op`` is a method."""

    def __init__(self, role: str, compute: Any, out: Any) -> None:
        self.role = role
        self.compute = compute
        self._out = out
        self.node: dualkv.Node | None = None
        self.engine: Any = None
        self._sampler: asyncio.Task[None] | None = None

    def send(self, message: dict[str, Any]) -> None:
        """Writes one line."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    async def handle(self, request: dict[str, Any]) -> None:
        """Runs one request and answers it."""
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            answer["result"] = await getattr(self, "op_" + request["op"])(request)
        except dualkv.Error as error:
            answer["error"] = {"code": error.code, "message": str(error)}
        except Exception as error:
            answer["error"] = {"code": "bug", "message": f"{type(error).__name__}: {error}"}
        self.send(answer)

    async def op_open(self, request: dict[str, Any]) -> dict[str, Any]:
        """A new node and engine over ``root``; the old ones end."""
        await self.op_close(request)
        self.node = dualkv.Node(
            request["name"],
            self.compute.geometry,
            store="file://" + request["root"],
            staging=request["staging"],
            listen=request["listen"],
            store_options=request.get("store_options", {}),
            **request.get("node_options", {}),
        )
        kind = {"resident": request.get("resident", False), "deadline_s": request.get("deadline_s", 60)}
        if self.role == "prefill":
            policy = POLICIES[request.get("policy", "prefill_only")]()
            self.engine = PrefillEngine(self.node, self.compute, policy, **kind)
        else:
            self.engine = DecodeEngine(self.node, self.compute, **kind)
        self._sampler = asyncio.create_task(self._sample())
        return {"addresses": self.node.addresses}

    async def op_close(self, _: dict[str, Any]) -> None:
        """Ends the node."""
        if self._sampler is not None:
            self._sampler.cancel()
            self._sampler = None
        if self.node is not None:
            await asyncio.to_thread(self.node.close)
            self.node = None

    async def op_connect(self, request: dict[str, Any]) -> str:
        """Connects to a peer; its name."""
        assert self.node is not None
        return (await asyncio.to_thread(self.node.connect, request["address"])).name

    async def op_stats(self, _: dict[str, Any]) -> dict[str, Any]:
        """The node's counters."""
        assert self.node is not None
        return self.node.stats()

    async def op_populate(self, request: dict[str, Any]) -> int:
        """Computes a context from nothing and stores its blocks; how many."""
        assert self.node is not None
        tokens = np.asarray(request["tokens"], dtype=np.uint32)
        keys = dualkv.block_keys(tokens, self.compute.geometry)
        ids = await self.engine.blocks.take(-(-len(tokens) // self.compute.geometry.tokens_per_block))
        await asyncio.to_thread(self.compute.fill, tokens, ids)
        await self.node.save(keys, self.compute.kv, ids[: len(keys)], deadline_s=60)
        await self.engine.blocks.give_back(ids)
        return len(keys)

    async def op_prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """See PrefillEngine.prefill."""
        assert self.node is not None
        tokens = np.asarray(request["tokens"], dtype=np.uint32)
        decode = self.node.peer(request["decode"])
        helpers = [self.node.peer(name) for name in request.get("helpers", [])]
        done = await self.engine.prefill(tokens, decode, helpers)
        return {**dataclasses.asdict(done), "wrong_blocks": self.compute.wrong_blocks(tokens, [])}

    async def op_decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """See DecodeEngine.decode."""
        done = await self.engine.decode(
            request["load_id"],
            np.asarray(request["tokens"], dtype=np.uint32),
            request["first_token"],
            request["output_tokens"],
            hit_blocks=request["hit_blocks"],
            resident_blocks=request["resident_blocks"],
        )
        return dataclasses.asdict(done)

    async def op_check(self, request: dict[str, Any]) -> list[int]:
        """Wrong tokens per span of a conversation, by no-cache generation."""
        tokens = np.asarray(request["tokens"], dtype=np.int64)
        return await asyncio.to_thread(self.compute.wrong_tokens, tokens, request["spans"])

    async def _sample(self) -> None:
        assert self.node is not None
        while True:
            stats = self.node.store.stats()
            self.send(
                {
                    "event": "sample",
                    "t": time.time(),
                    "bytes_read": stats["bytes_read"],
                    "read_queue_bytes": stats["read_queue_bytes"],
                }
            )
            await asyncio.sleep(_SAMPLE_S)


async def serve(worker: Worker) -> None:
    """Reads requests until stdin ends; each runs on its own."""
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(worker.handle(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await worker.op_close({})


def main() -> None:
    """``python -m dualkv.engines.worker ROLE CONFIG_JSON``."""
    # Lines of ours go to the real stdout; whatever a library prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], make_compute(json.loads(sys.argv[2])), out)
    worker.send({"event": "ready", "pid": os.getpid()})
    asyncio.run(serve(worker))


if __name__ == "__main__":
    main()
