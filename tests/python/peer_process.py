"""A node in a process of its own, for tests that kill it. Commands and answers are JSON lines."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from support import HostCache, layer_block, make_geometry, make_keys, plan

import dualkv

POLICIES = {"prefill_only": dualkv.PrefillOnly, "decode_only": dualkv.DecodeOnly, "split": dualkv.Split}


class PeerProcess:
    """Each command is a method; what it returns is the answer."""

    def __init__(self) -> None:
        self.geometry = make_geometry()
        self.node: dualkv.Node | None = None
        self.load_handle: dualkv.Load | None = None
        self.incoming_handle: dualkv.Incoming | None = None
        self.cache: HostCache | None = None
        self.sends: list[dualkv.Operation] = []

    def open(self, name: str, slots: int = 64, **options: Any) -> list[str]:
        self.node = dualkv.Node(name, self.geometry, staging=slots * self.geometry.file_bytes, **options)
        return self.node.addresses

    def connect(self, address: str) -> str:
        assert self.node is not None
        return self.node.connect(address).name

    def load(self, decode: str, policy: str, hit: int, prompt: int, deadline_s: float) -> int:
        """Starts a load of ``hit`` stored blocks; the rest of the prompt is block ``i`` called ``i + 1``."""
        assert self.node is not None
        keys = make_keys(self.geometry, prompt)[:hit]
        self.cache = HostCache(self.geometry, prompt)
        for block in range(hit, prompt):
            self.cache.fill(block, block + 1)
        chosen = plan(POLICIES[policy](), keys, self.node, self.node.peer(decode))
        self.load_handle = self.node.load(
            chosen, into=self.cache.kv, block_ids=np.arange(prompt), deadline_s=deadline_s
        )
        return self.load_handle.id

    def publish(self, layers: int) -> None:
        assert self.load_handle is not None
        for layer in range(layers):
            self.load_handle.wait(layer, 10)
            self.load_handle.publish(layer)

    def finish(self) -> None:
        assert self.load_handle is not None
        self.load_handle.finish(10)

    def send_allocated(self, peer: str, grants: list[int], blocks: int) -> None:
        """Begins to send blocks ``i`` called ``i + 1``, from memory that the peer maps, to one grant after another."""
        assert self.node is not None
        sizes = [self.geometry.layer_bytes(layer) for layer in range(self.geometry.layers)]
        arrays = [self.node.allocate(blocks * size).reshape(blocks, size) for size in sizes]
        for block in range(blocks):
            for layer, array in enumerate(arrays):
                array[block] = layer_block(block + 1, layer, sizes[layer])
        cache = dualkv.PagedKv(self.geometry, arrays)
        self.sends = [self.node.peer(peer).send_layers(grant, cache, np.arange(blocks)) for grant in grants]

    def incoming(self, load_id: int) -> None:
        assert self.node is not None
        self.incoming_handle = self.node.incoming(load_id)

    def handed_over(self, prompt: int) -> bool:
        """Whether the prompt arrived, every byte of it."""
        assert self.incoming_handle is not None
        cache = HostCache(self.geometry, prompt)
        self.incoming_handle.wait(10)
        self.incoming_handle.copy_to(cache.kv, np.arange(prompt))
        self.incoming_handle.close()
        return all(cache.holds(block, block + 1) for block in range(prompt))

    def stats(self) -> dict[str, Any]:
        assert self.node is not None
        return self.node.stats()


def main() -> None:
    peer = PeerProcess()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(peer, request.pop("op"))(**request)}
        except dualkv.Error as error:
            answer = {"error": error.code, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
