"""``dualkv bench transfer``: a cache's blocks to another node's, verified there, against bare sockets or memcpy."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import dualkv
from dualkv.bench import limits, machine
from dualkv.bench.blocks import Bytes, Pattern, aligned_blocks, check_block_bytes, count_of, scattered
from dualkv.bench.measure import (
    LIMIT,
    OURS,
    Contender,
    Peers,
    Run,
    Stage,
    Start,
    as_run,
    checksum_gbps,
    cpu_seconds,
    interleave,
    rows_of,
    start_optional,
    steps_of,
)
from dualkv.bench.perftest import WriteBandwidth
from dualkv.bench.processes import JsonProcess
from dualkv.bench.receiver import DEADLINE_S, SOURCE_SEED, TARGET_SEED, Receiver, make_node
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.errors import Error, invalid

TRANSPORTS = ("tcp", "shm", "loopback", "rdma")
_WITH_CONNECTIONS = ("tcp", "rdma")
MEMORIES = ("shared", "private")
CHECKSUMS = ("known", "made")
_MEMCPY = "memcpy of the same scattered blocks, one thread, huge pages, nothing verified"


@dataclass(frozen=True)
class TransferOptions:
    """What to measure. Sizes in bytes; every combination is a case, ``connections`` being tcp's and rdma's only.

    ``rdma_devices``: the sender's and the receiver's; none: the machine's first and last.
    """

    transport: tuple[str, ...] = TRANSPORTS[:3]
    block_bytes: tuple[int, ...] = (64 << 10, 256 << 10, 1 << 20)
    total: int = 512 << 20
    count: int | None = None  # blocks, instead of total
    connections: tuple[int, ...] = (1, 2, 4)
    memory: tuple[str, ...] = MEMORIES  # of the source, shm only
    checksums: tuple[str, ...] = CHECKSUMS
    rdma_devices: tuple[str, ...] = ()
    repeats: int = 7
    warmup: int = 1

    def cases(self) -> list["TransferCase"]:
        """In the order they are measured."""
        return [
            TransferCase(
                transport,
                size,
                count_of(size, self.total, self.count),
                checksums,
                connections,
                memory,
                self._devices() if transport == "rdma" else None,
            )
            for transport in self.transport
            for memory in (self.memory if transport == "shm" else (None,))
            for size in self.block_bytes
            for connections in (self.connections if transport in _WITH_CONNECTIONS else (None,))
            for checksums in self.checksums
        ]

    def _devices(self) -> tuple[str, str]:
        found = self.rdma_devices or tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*")))
        if not found:
            raise Error("--transport rdma: this machine has no RDMA device", "unsupported")
        return found[0], found[-1]

    def check(self) -> None:
        """Raises Error before anything is touched."""
        check_block_bytes(self.block_bytes, 8)
        unknown = [transport for transport in self.transport if transport not in TRANSPORTS]
        if unknown:
            raise invalid(f"--transport {', '.join(unknown)}: must be {', '.join(TRANSPORTS)}")
        for name, given, known in (("memory", self.memory, MEMORIES), ("checksums", self.checksums, CHECKSUMS)):
            if not set(given) <= set(known):
                raise invalid(f"--{name} {', '.join(given)}: must be {', '.join(known)}")
        if not all(1 <= connections <= 16 for connections in self.connections):
            raise invalid(f"--connections {self.connections}: 1 to 16 are possible")
        if len(self.rdma_devices) > 2:
            raise invalid(f"--rdma-devices {','.join(self.rdma_devices)}: the sender's and the receiver's, no more")
        largest = max(case.block_bytes * case.count for case in self.cases())
        machine.require_memory(4 * largest + (768 << 20))  # both caches and both sides of the limit's


@dataclass(frozen=True)
class TransferCase:
    """One row; ``connections`` is tcp's and rdma's, ``memory`` shm's, ``devices`` rdma's: None elsewhere.

    The receiver verifies checksums in any case. ``known``: the sender has them, as for blocks read from storage;
    ``made``: it makes them when it sends.
    """

    transport: str
    block_bytes: int
    count: int
    checksums: str
    connections: int | None = None
    memory: str | None = None
    devices: tuple[str, str] | None = None  # the sender's and the receiver's

    def node_options(self, side: int) -> dict[str, Any]:
        """Of the sender (0) or the receiver (1)."""
        out: dict[str, Any] = {} if self.connections is None else {"connections_per_lane": self.connections}
        if self.devices is not None:
            out["rdma_options"] = {"devices": self.devices[side]}
        return out

    @property
    def fields(self) -> dict[str, CaseValue]:
        """The row's own fields."""
        out: dict[str, CaseValue] = {
            "transport": self.transport,
            "block_bytes": self.block_bytes,
            "count": self.count,
            "checksums": self.checksums,
        }
        more = {"connections": self.connections, "memory": self.memory}
        return out | {name: value for name, value in more.items() if value is not None}

    def __str__(self) -> str:
        ways = "" if self.connections is None else f", {self.connections} conn"
        memory = "" if self.memory is None else f" {self.memory}"
        return f"{self.transport}{memory} {self.block_bytes >> 10} KiB{ways}, checksums {self.checksums}"


class Target(Protocol):
    """The receiver, wherever it is."""

    def call(self, op: str, *, timeout_s: float = DEADLINE_S, **arguments: Any) -> Any:
        """A method of :class:`Receiver`."""


class _SameProcess:
    """The loopback transport's receiver: its CPU time is the sender's already."""

    def __init__(self) -> None:
        self._receiver = Receiver()

    def call(self, op: str, *, timeout_s: float = DEADLINE_S, **arguments: Any) -> Any:
        out = getattr(self._receiver, op)(**arguments)
        return 0.0 if op == "finish" else out

    def __enter__(self) -> "_SameProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.close()


@contextlib.contextmanager
def receiver(transport: str) -> Iterator[Target]:
    """In a process of its own but for ``loopback``."""
    if transport == "loopback":
        with _SameProcess() as local:
            yield local
    else:
        command = [sys.executable, "-m", "dualkv.bench.receiver"]
        with JsonProcess("receiver", command) as remote:
            yield remote


class Sender:
    """Sends the same scattered blocks again and again, with a fresh grant each time. Not thread-safe."""

    def __init__(self, case: TransferCase, target: Target, directory: str) -> None:
        self._case = case
        self._target = target
        self._verified = False
        pattern = Pattern(case.block_bytes)
        self._block_ids = scattered(case.count, SOURCE_SEED)
        address = target.call(
            "open",
            directory=directory,
            block_bytes=case.block_bytes,
            count=case.count,
            transport=case.transport,
            options=case.node_options(1),
        )
        self._node = make_node("bench-sender", case.block_bytes, directory, (), **case.node_options(0))
        try:
            self._cache = self._source()
            for number in range(case.count):
                self._cache[number] = pattern.block(number)
            self._kv = dualkv.PagedKv(self._node.geometry, [self._cache])
            self._checksums = self._kv.checksums(self._block_ids) if case.checksums == "known" else None
            self._peer = self._node.connect(address)
            if case.devices is not None:
                self._wait_for_rdma()
        except BaseException:
            self._node.close()
            raise

    def _source(self) -> Bytes:
        shape = (self._case.count, self._case.block_bytes)
        if self._case.memory != "shared":
            return aligned_blocks(*shape)
        return self._node.allocate(shape[0] * shape[1]).reshape(shape)

    def _wait_for_rdma(self) -> None:
        """Sends until nothing goes inline: queue pairs are up, and the caches of both sides are registered."""
        until = time.monotonic() + DEADLINE_S
        inline = -1
        while True:
            before, inline = inline, self._inline_batches()
            if before == inline:
                return
            if time.monotonic() > until:
                raise Error(f"rdma: writes still go inline: {self._rdma()['last_failure']}", "timeout")
            self.ours()
            time.sleep(0.1)

    def _rdma(self) -> dict[str, Any]:
        return dict(self._node.stats()["links"][0]["rdma"])

    def _inline_batches(self) -> int:
        return int(self._rdma()["inline_batches"])

    def ours(self) -> Run:
        """Prepare: the array of block ids. Post: the call. Done: the receiver has verified every byte."""
        grant = self._target.call("grant", peer=self._node.name)
        began = time.perf_counter()
        block_ids = np.array(self._block_ids, np.uint32)
        cpu = cpu_seconds()
        posting = time.perf_counter()
        operation = self._peer.send_layers(grant, self._kv, block_ids, checksums=self._checksums, deadline_s=DEADLINE_S)
        posted = time.perf_counter()
        operation.wait(DEADLINE_S)
        done = time.perf_counter()
        cpu = cpu_seconds() - cpu + self._target.call("finish")
        if not self._verified:
            self._verify()
        size = self._case.count * self._case.block_bytes
        return Run(done - posting, size, cpu, prepare_s=posting - began, post_s=posted - posting)

    def _verify(self) -> None:
        right = self._target.call("verify")
        if right != self._case.count:
            raise Error(f"bench: {self._case.count - right} of {self._case.count} blocks arrived wrong", "corrupt")
        self._verified = True

    def fallbacks(self) -> dict[str, int]:
        """Those of both nodes."""
        out = dict(self._node.stats()["fallbacks"])
        for name, count in self._target.call("fallbacks").items():
            out[name] = out.get(name, 0) + count
        return out

    def close(self) -> None:
        """Ends the sending node."""
        self._node.close()


@contextlib.contextmanager
def sender(case: TransferCase) -> Iterator[Sender]:
    """A sender and its receiver, linked."""
    with tempfile.TemporaryDirectory(prefix="dualkv-bench-") as directory, receiver(case.transport) as target:
        made = Sender(case, target, directory)
        try:
            yield made
        finally:
            made.close()


def limit_text(case: TransferCase) -> str:
    """What :func:`limit_of` is."""
    if case.connections is None:
        return _MEMCPY
    if case.devices is not None:
        return f"ib_write_bw (perftest) of the same size, {case.connections} queue pairs, one buffer, nothing verified"
    return f"{case.connections} bare tcp stream{'s' * (case.connections > 1)} to another process, nothing verified"


def limit_of(case: TransferCase) -> Start:
    """Bare sockets for tcp, perftest for rdma, memcpy for what moves through memory."""

    def start(closing: contextlib.ExitStack) -> Contender:
        total = case.count * case.block_bytes
        if case.devices is not None:
            return WriteBandwidth(case.devices, case.block_bytes, case.count, case.connections or 1).run
        if case.connections is not None:
            sockets = closing.enter_context(limits.RawSockets(case.connections))
            return lambda: as_run(sockets.run(total))
        arena = limits.CopyArena(total)
        sources, targets = (
            np.array(scattered(case.count, seed), np.uint64) * np.uint64(case.block_bytes)
            for seed in (SOURCE_SEED, TARGET_SEED)
        )
        return lambda: as_run(arena.run(case.block_bytes, sources, targets))

    return start


def run_transfer(options: TransferOptions, stage: Stage) -> BenchResult:
    """All cases. Raises Error."""
    options.check()
    result = BenchResult("transfer", labels_of(options.transport), [])
    for case in options.cases():
        result.rows += measure_case(case, options.warmup, options.repeats, {}, result, stage)
    return result


def labels_of(transports: tuple[str, ...]) -> dict[str, str]:
    """Of a run over these transports."""
    topology = "1 node to another, 2 processes of this machine (loopback: 1 process)"
    return machine.labels(transport=",".join(transports), topology=topology)


def measure_case(
    case: TransferCase,
    warmup: int,
    repeats: int,
    peers: Peers,
    result: BenchResult,
    stage: Stage,
) -> list[Row]:
    """The rows of one case, one for each peer; what was dropped and why goes to the result's labels."""
    with contextlib.ExitStack() as closing:
        ours = closing.enter_context(sender(case))
        starts = {LIMIT: limit_of(case)} | {name: one for name, one in peers.items() if one is not None}
        contenders = {OURS: ours.ours} | {name: start_optional(one, closing) for name, one in starts.items()}
        step = stage(str(case), steps_of(len(contenders), warmup=warmup, repeats=repeats))
        measured = interleave(contenders, warmup=warmup, repeats=repeats, step=step, optional={*contenders} - {OURS})
        result.add_fallbacks(ours.fallbacks())
    result.add_dropped(str(case), measured.dropped)
    return rows_of(
        case.fields,
        measured,
        limit=limit_text(case),
        blocks=case.count,
        checksum_speed=checksum_gbps(case.block_bytes),
        peers=list(peers),
    )
