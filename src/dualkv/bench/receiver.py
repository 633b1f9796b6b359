"""The receiving side of the transfer benchmark: a node that grants, in this process or in one of its own."""

from typing import Any

import numpy as np

import dualkv
from dualkv.bench.blocks import Pattern, aligned_blocks, scattered
from dualkv.bench.measure import cpu_seconds
from dualkv.bench.processes import answer_calls

SOURCE_SEED, TARGET_SEED = 1, 2
DEADLINE_S = 60.0


def make_geometry(block_bytes: int) -> dualkv.KvGeometry:
    """One layer, so that a block is a Layer Block."""
    return dualkv.KvGeometry(layers=1, tokens_per_block=64, layer_bytes=block_bytes, namespace="bench/transfer")


def make_node(name: str, block_bytes: int, directory: str, listen: str | tuple[()], **options: Any) -> dualkv.Node:
    """A node that stores nothing: its staging is the least there can be."""
    geometry = make_geometry(block_bytes)
    return dualkv.Node(
        name, geometry, store=f"file://{directory}", staging=2 * geometry.file_bytes, listen=listen, **options
    )


class Receiver:
    """Each method is a call of the benchmark, and answers what JSON can carry."""

    def __init__(self) -> None:
        self._node: dualkv.Node | None = None
        self._grant: dualkv.Grant | None = None
        self._cpu_s = 0.0

    def open(self, directory: str, block_bytes: int, count: int, transport: str, options: dict[str, Any]) -> str:
        """Makes the node and a cache of ``count`` blocks; returns the address. ``directory`` is the caller's."""
        listen = {
            "tcp": "tcp://127.0.0.1:0",
            "rdma": "rdma://127.0.0.1:0",
            "shm": f"shm://{directory}/node.sock",
            "loopback": f"loopback://{directory}",
        }[transport]
        self._node = make_node("bench-receiver", block_bytes, directory, listen, **options)
        self._cache = aligned_blocks(count, block_bytes)
        self._cache[:] = 0xA5
        self._kv = dualkv.PagedKv(self._node.geometry, [self._cache])
        self._block_ids = np.array(scattered(count, TARGET_SEED), np.uint32)
        return self._node.addresses[0]

    def grant(self, peer: str) -> int:
        """A new grant of all blocks, in scattered order; CPU time counts from here."""
        assert self._node is not None
        self._grant = self._node.grant(peer, self._kv, self._block_ids, deadline_s=DEADLINE_S)
        self._cpu_s = cpu_seconds()
        return self._grant.id

    def finish(self) -> float:
        """CPU seconds of this process since :meth:`grant`; ends the grant."""
        used = cpu_seconds() - self._cpu_s
        assert self._grant is not None
        self._grant.wait(0, DEADLINE_S)
        self._grant = None
        return used

    def verify(self) -> int:
        """How many blocks are, byte for byte, what was sent to them."""
        count, block_bytes = self._cache.shape
        pattern = Pattern(block_bytes)
        sent = scattered(count, SOURCE_SEED)
        return sum(pattern.matches(sent[i], self._cache[target]) for i, target in enumerate(self._block_ids))

    def fallbacks(self) -> dict[str, int]:
        """Those of the node."""
        assert self._node is not None
        return dict(self._node.stats()["fallbacks"])

    def close(self) -> None:
        """Ends the node, then frees what it wrote to."""
        self._grant = None
        if self._node is not None:
            self._node.close()


def main() -> None:
    """Answers the calls on standard input until it ends."""
    receiver = Receiver()
    try:
        answer_calls(receiver)
    finally:
        receiver.close()


if __name__ == "__main__":
    main()
