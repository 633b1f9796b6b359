"""One side of a released peer, in the peer's own Python: calls are JSON lines on standard input, answers on output.

Started as ``PYTHON peer_runner.py nixl-xfer|nixl-posix|mooncake``. Needs numpy and the peer, nothing of dualkv: it may
run where dualkv is not installed. What the peer prints goes to standard error.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import mmap
import os
import random
import resource
import socket
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

_HUGE = 2 << 20
_STEP = 0x9E3779B97F4A7C15
_TIMEOUT_S = 60
_SOURCE_SEED, _TARGET_SEED = 1, 2


def aligned_blocks(count: int, block_bytes: int) -> Any:
    """As dualkv.bench.blocks.aligned_blocks."""
    area = mmap.mmap(-1, count * block_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(area, np.uint8)
    start = -data.ctypes.data % _HUGE
    return data[start : start + count * block_bytes].reshape(count, block_bytes)


def pattern(block_bytes: int) -> Callable[[int], Any]:
    """As dualkv.bench.blocks.Pattern: the bytes of block ``i``."""
    words = np.random.default_rng(block_bytes).integers(0, 2**64, block_bytes // 8, dtype=np.uint64)
    return lambda i: (words ^ np.uint64((i + 1) * _STEP % 2**64)).view(np.uint8)


def scattered(count: int, seed: int) -> list[int]:
    """As dualkv.bench.blocks.scattered."""
    out = list(range(count))
    random.Random(seed).shuffle(out)
    return out


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def nixl_api() -> Any:
    """The module, whichever CUDA version the wheel is named after."""
    names = ("nixl", "nixl_cu13", "nixl_cu12")
    found = [name for name in names if importlib.util.find_spec(name)]
    if not found:
        raise ImportError(f"none of {', '.join(names)} is installed")
    return importlib.import_module(f"{found[0]}._api")


def version_of(*distributions: str) -> str:
    """The first one that is installed, with its version."""
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return "unknown version"


class Runner:
    """What the runners share: blocks in memory, as dualkv's benchmark has them."""

    def __init__(self) -> None:
        self.count = self.block_bytes = 0
        self.cpu_began = 0.0

    def cpu(self) -> float:
        """CPU seconds of this process so far."""
        return cpu_seconds()

    def allocate(self, block_bytes: int, count: int, sends: bool) -> None:
        """The sender's blocks hold their pattern, the receiver's something else."""
        self.count, self.block_bytes = count, block_bytes
        self.blocks = aligned_blocks(count, block_bytes)
        self.blocks[:] = 0xA5
        if sends:
            content = pattern(block_bytes)
            for i in range(count):
                self.blocks[i] = content(i)
        self.address = self.blocks.ctypes.data

    def verify(self) -> int:
        """How many blocks are what was sent to them."""
        content, sent, targets = pattern(self.block_bytes), *self.orders()
        return sum(bool((self.blocks[b] == content(a)).all()) for a, b in zip(sent, targets, strict=True))

    def orders(self) -> tuple[list[int], list[int]]:
        """The blocks, and where each goes to."""
        return scattered(self.count, _SOURCE_SEED), scattered(self.count, _TARGET_SEED)

    def answer(self, began: float, posting: float, posted: float, done: float, cpu: float) -> dict[str, Any]:
        """A run; moments in seconds."""
        return {
            "seconds": done - posting,
            "bytes": self.count * self.block_bytes,
            "prepare_s": posting - began,
            "post_s": posted - posting,
            "cpu_s": cpu,
        }


class Nixl(Runner):
    """An agent; transfers are prepared, posted and polled to their end."""

    agent: Any

    def version(self) -> str:
        """Imports the peer."""
        nixl_api()
        return version_of("nixl", "nixl-cu13", "nixl-cu12")

    def transfer(
        self, began: float, operation: str, local: Any, remote: Any, name: str, *more: bytes
    ) -> dict[str, Any]:
        """Prepares, posts and polls."""
        handle = self.agent.initialize_xfer(operation, local, remote, name, *more)
        cpu = cpu_seconds()
        posting = time.perf_counter()
        state = self.agent.transfer(handle)
        posted = time.perf_counter()
        while state != "DONE":
            if state == "ERR" or time.perf_counter() - posting > _TIMEOUT_S:
                raise RuntimeError(f"the transfer ended with {state}")
            state = self.agent.check_xfer_state(handle)
        done = time.perf_counter()
        cpu = cpu_seconds() - cpu
        self.agent.release_xfer_handle(handle)
        return self.answer(began, posting, posted, done, cpu)


class NixlMemory(Nixl):
    """Memory of one process to that of another, over UCX; UCX_TLS says how."""

    def open(self, block_bytes: int, count: int, sends: bool) -> dict[str, Any]:
        """What the other side's :meth:`connect` needs."""
        api = nixl_api()
        self.allocate(block_bytes, count, sends)
        config = api.nixl_agent_config(True, False, 0, backends=["UCX"])
        self.agent = api.nixl_agent("sender" if sends else "receiver", config)
        self.agent.register_memory([(self.address, count * block_bytes, 0, "")], "DRAM")
        return {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(), "address": self.address}

    def connect(self, metadata: str, address: int) -> None:
        """To what :meth:`open` of the other side returned."""
        self.name = self.agent.add_remote_agent(base64.b64decode(metadata))
        self.remote = address

    def run(self) -> dict[str, Any]:
        """One timed transfer of all blocks."""
        began = time.perf_counter()
        sources, targets = self.orders()
        size = self.block_bytes
        local = self.agent.get_xfer_descs([(self.address + i * size, size, 0) for i in sources], "DRAM")
        remote = self.agent.get_xfer_descs([(self.remote + i * size, size, 0) for i in targets], "DRAM")
        return self.transfer(began, "WRITE", local, remote, self.name, b"done")


class NixlPosix(Nixl):
    """Blocks of a file to memory, with the POSIX plugin's io_uring."""

    def open(self, path: str, block_bytes: int, count: int, direct: bool) -> None:
        """Registers the file and the memory."""
        api = nixl_api()
        self.allocate(block_bytes, count, sends=False)
        self.agent = api.nixl_agent("reader", api.nixl_agent_config(backends=[]))
        engine = {"use_uring": "true", "use_aio": "false", "use_posix_aio": "false"}
        self.agent.create_backend("POSIX", engine)
        self.fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        self.agent.register_memory([(self.address, count * block_bytes, 0, "m")], "DRAM")
        self.agent.register_memory([(0, os.fstat(self.fd).st_size, self.fd, "f")], "FILE")

    def run(self) -> dict[str, Any]:
        """One timed transfer of all blocks."""
        began = time.perf_counter()
        size = self.block_bytes
        order = scattered(self.count, _SOURCE_SEED)
        local = self.agent.get_xfer_descs([(self.address + i * size, size, 0) for i in range(self.count)], "DRAM")
        file = self.agent.get_xfer_descs([(i * size, size, self.fd) for i in order], "FILE")
        return self.transfer(began, "READ", local, file, "reader")

    def orders(self) -> tuple[list[int], list[int]]:
        return scattered(self.count, _SOURCE_SEED), list(range(self.count))


class Mooncake(Runner):
    """Memory of one process to that of another, over TCP."""

    def version(self) -> str:
        """Imports the peer."""
        importlib.import_module("mooncake.engine")
        return version_of("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")

    def open(self, block_bytes: int, count: int, sends: bool) -> dict[str, Any]:
        """What the other side's :meth:`connect` needs."""
        self.allocate(block_bytes, count, sends)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.engine = importlib.import_module("mooncake.engine").TransferEngine()
        self.check("initialize", self.engine.initialize(f"127.0.0.1:{port}", "P2PHANDSHAKE", "tcp", ""))
        self.check("register_memory", self.engine.register_memory(self.address, count * block_bytes))
        return {"segment": f"127.0.0.1:{self.engine.get_rpc_port()}", "address": self.address}

    def check(self, call: str, code: int) -> None:
        """Raises for anything but 0."""
        if code != 0:
            raise RuntimeError(f"{call} returned {code}")

    def connect(self, segment: str, address: int) -> None:
        """To what :meth:`open` of the other side returned."""
        self.segment = segment
        self.remote = address

    def run(self) -> dict[str, Any]:
        """One timed transfer of all blocks."""
        began = time.perf_counter()
        sources, targets = self.orders()
        size = self.block_bytes
        local = [self.address + i * size for i in sources]
        remote = [self.remote + i * size for i in targets]
        sizes = [size] * self.count
        cpu = cpu_seconds()
        posting = time.perf_counter()
        code = self.engine.batch_transfer_sync_write(self.segment, local, remote, sizes)
        done = time.perf_counter()
        cpu = cpu_seconds() - cpu
        self.check("batch_transfer_sync_write", code)
        # One call that blocks to the end: there is no post apart from it.
        return {**self.answer(began, posting, posting, done, cpu), "post_s": None}


RUNNERS: dict[str, Callable[[], Any]] = {"nixl-xfer": NixlMemory, "nixl-posix": NixlPosix, "mooncake": Mooncake}


def main() -> None:
    """Answers calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = RUNNERS[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(runner, request.pop("op"))(**request)}
        except Exception as error:  # whatever the peer raises is this side's answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # The peers' threads may outlive, and crash, an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()
