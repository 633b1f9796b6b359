"""A node in a process of its own that reads for the one that is measured: its decode node, or a helper."""

import os
import pathlib
import resource
from typing import Any

import dualkv
from dualkv.bench.caches import PatternCache
from dualkv.bench.measure import cpu_seconds
from dualkv.bench.processes import answer_calls

DEADLINE_S = 60.0


def resident_bytes() -> int:
    """Of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def open_fds() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


def listen_address(transport: str, directory: str) -> str:
    """Where a node of this machine listens."""
    return "tcp://127.0.0.1:0" if transport == "tcp" else f"shm://{directory}/node.sock"


class SecondNode:
    """Each method is a call of the benchmark, and answers what JSON can carry."""

    def __init__(self) -> None:
        self._node: dualkv.Node | None = None

    def open(self, name: str, geometry: dict[str, Any], **options: Any) -> str:
        """Makes the node; returns its address."""
        self._node = dualkv.Node(name, dualkv.KvGeometry(**geometry), **options)
        return self._node.addresses[0]

    def receive(self, load_id: int, numbers: list[int]) -> int:
        """Waits for the hand-over of a load and frees it; how many bytes of blocks ``numbers`` arrived wrong."""
        assert self._node is not None
        with self._node.incoming(load_id, DEADLINE_S) as incoming:
            incoming.wait(DEADLINE_S)
            if not numbers:
                return 0
            cache = PatternCache(self._node.geometry, len(numbers))
            incoming.copy_to(cache.kv, range(len(numbers)))
            return cache.wrong_bytes(numbers)

    def usage(self) -> dict[str, Any]:
        """``{cpu_s, rss_bytes, fds, fallbacks}`` of the process and its node."""
        assert self._node is not None
        fallbacks = dict(self._node.stats()["fallbacks"])
        return {"cpu_s": cpu_seconds(), "rss_bytes": resident_bytes(), "fds": open_fds(), "fallbacks": fallbacks}

    def close(self) -> None:
        """Ends the node."""
        if self._node is not None:
            self._node.close()


def main() -> None:
    """Answers the calls on standard input until it ends."""
    second = SecondNode()
    try:
        answer_calls(second)
    finally:
        second.close()


if __name__ == "__main__":
    main()
