"""What the Python tests share: caches with recognisable bytes, waiting, counting file descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dualkv

LONG_S = 20  # "does not hang": far above what anything here takes
LAYER_BYTES = (3000, 4096, 1001, 8192, 777)  # odd sizes: nothing is aligned by luck
UNTOUCHED = 0xA5


def make_geometry(layer_bytes: tuple[int, ...] = LAYER_BYTES, namespace: str = "test/fp8") -> dualkv.KvGeometry:
    return dualkv.KvGeometry(tokens_per_block=4, layer_bytes=layer_bytes, namespace=namespace)


def make_keys(geometry: dualkv.KvGeometry, blocks: int, seed: int = 0) -> list[bytes]:
    tokens = np.random.default_rng(seed).integers(0, 2**32, blocks * geometry.tokens_per_block, dtype=np.uint32)
    return dualkv.block_keys(tokens, geometry)


def layer_block(tag: int, layer: int, size: int) -> np.ndarray[Any, Any]:
    """The bytes of a layer of the block called ``tag``."""
    return np.random.default_rng((tag, layer)).integers(0, 256, size, dtype=np.uint8)


class HostCache:
    """A paged cache whose every byte is either the pattern of a block or ``UNTOUCHED``."""

    def __init__(self, geometry: dualkv.KvGeometry, blocks: int) -> None:
        self.geometry = geometry
        self.blocks = blocks
        sizes = [geometry.layer_bytes(i) for i in range(geometry.layers)]
        self.arrays = [np.full((blocks, size), UNTOUCHED, np.uint8) for size in sizes]
        self.kv = dualkv.PagedKv(geometry, self.arrays)

    def fill(self, block: int, tag: int) -> None:
        for layer, array in enumerate(self.arrays):
            array[block] = layer_block(tag, layer, array.shape[1])

    def layer_is(self, layer: int, block: int, tag: int) -> bool:
        return bool((self.arrays[layer][block] == layer_block(tag, layer, self.arrays[layer].shape[1])).all())

    def holds(self, block: int, tag: int) -> bool:
        return all(self.layer_is(layer, block, tag) for layer in range(self.geometry.layers))

    def untouched(self, block: int) -> bool:
        return all(bool((array[block] == UNTOUCHED).all()) for array in self.arrays)

    def only_right_bytes(self, tags: dict[int, int]) -> bool:
        """Each Layer Block is whole and right, or was never written; blocks without a tag were never written."""
        for layer, array in enumerate(self.arrays):
            for block in range(self.blocks):
                if bool((array[block] == UNTOUCHED).all()):
                    continue
                if block not in tags or not self.layer_is(layer, block, tags[block]):
                    return False
        return True


def filled(geometry: dualkv.KvGeometry, blocks: int, first_tag: int = 1) -> HostCache:
    """Block ``i`` is called ``first_tag + i``."""
    cache = HostCache(geometry, blocks)
    for block in range(blocks):
        cache.fill(block, first_tag + block)
    return cache


def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def all_free(node: dualkv.Node) -> bool:
    stats = node.stats()
    staging = stats["staging"]
    reserved = staging["slots"] - staging["free_slots"] + staging["waiting"]
    return reserved == 0 and stats["loads_active"] == stats["loads_served"] == 0


def assert_all_free(nodes: Iterable[dualkv.Node]) -> None:
    for node in nodes:
        if not eventually(lambda node=node: all_free(node)):  # type: ignore[misc]
            stats = node.stats()
            raise AssertionError(
                f"{node.name} holds staging: {stats['staging']}, {stats['loads_active']} loads, "
                f"{stats['loads_served']} served"
            )


def error_of(call: Callable[[], Any]) -> dualkv.Error | None:
    try:
        call()
    except dualkv.Error as error:
        return error.with_traceback(None)  # its frames would keep the call's objects alive
    return None


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def block_path(root: Path, geometry: dualkv.KvGeometry, key: bytes) -> Path:
    namespace = f"{dualkv.checksum(geometry.namespace.encode()):016x}"
    return root / namespace / key.hex()[:2] / f"{key.hex()}.kv"


def tree(root: Path) -> dict[str, bytes]:
    """Every stored block's bytes, by file name."""
    return {path.name: path.read_bytes() for path in root.rglob("*.kv")}


def plan(
    policy: dualkv.PathPolicy, keys: list[bytes], node: dualkv.Node, decode: dualkv.Peer | None = None
) -> dualkv.Plan:
    return policy.plan(keys, prefill=node.view(), decode=decode.view() if decode else None)


RDMA_DEVICES = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def listen_at(scheme: str, tmp_path: Path, name: str) -> str:
    """An address of the scheme that nobody else has."""
    return {
        "tcp": "tcp://127.0.0.1:0",
        "rdma": "rdma://127.0.0.1:0",
        "shm": f"shm://{tmp_path}/{name}.sock",
        "loopback": f"loopback://{tmp_path}/{name}",
    }[scheme]


class Child:
    """A node in another process (peer_process.py); ``prefix``: of its command, such as that of a testbed's node."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).with_name("peer_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, op: str, **arguments: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise dualkv.Error(answer["message"], answer["error"])
        return answer["result"]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(LONG_S)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LONG_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
