"""``dualkv bench copy``: Layer Blocks from one cache to another of a node, by each copy engine, against memcpy."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import dualkv
from dualkv.bench import limits, machine
from dualkv.bench.blocks import Pattern, aligned_blocks, check_block_bytes, scattered
from dualkv.bench.measure import (
    LIMIT,
    OURS,
    Contender,
    Run,
    Stage,
    as_run,
    cpu_seconds,
    interleave,
    rows_of,
    steps_of,
)
from dualkv.bench.receiver import SOURCE_SEED, TARGET_SEED, make_node
from dualkv.bench.results import BenchResult, CaseValue
from dualkv.errors import Error, invalid

ENGINES = ("cpu", "nic")
_DEADLINE_S = 60.0
_MEMCPY = "memcpy of the same scattered blocks, one thread, huge pages"


@dataclass(frozen=True)
class CopyOptions:
    """What to measure: every engine with every size and count. ``rdma_device``: of ``nic``; none: the nearest."""

    engine: tuple[str, ...] = ENGINES
    block_bytes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
    counts: tuple[int, ...] = (1, 64, 1000, 15_000)
    most: int = 1 << 30  # bytes of a case; larger ones are left out
    rdma_device: str = ""
    repeats: int = 7
    warmup: int = 1

    def cases(self) -> list["CopyCase"]:
        """In the order they are measured."""
        return [
            CopyCase(engine, size, count, self.rdma_device)
            for engine in self.engine
            for size in self.block_bytes
            for count in self.counts
            if size * count <= self.most
        ]

    def check(self) -> None:
        """Raises Error before anything is touched."""
        check_block_bytes(self.block_bytes, 8)
        if not set(self.engine) <= set(ENGINES):
            raise invalid(f"--engine {', '.join(self.engine)}: must be {', '.join(ENGINES)}")
        if not all(1 <= count <= 1 << 20 for count in self.counts):
            raise invalid(f"--counts {self.counts}: 1 to {1 << 20} are possible")
        if not self.cases():
            raise invalid(f"no case has at most {self.most} bytes; raise --most")
        machine.require_memory(4 * max(case.block_bytes * case.count for case in self.cases()) + (512 << 20))


@dataclass(frozen=True)
class CopyCase:
    """One row."""

    engine: str
    block_bytes: int
    count: int
    rdma_device: str = ""

    def __str__(self) -> str:
        return f"{self.engine} {self.count} x {self.block_bytes >> 10} KiB"


class Copier:
    """Copies the same scattered blocks again and again within one node."""

    def __init__(self, case: CopyCase, directory: str) -> None:
        self._case = case
        options = {"rdma_options": {"devices": case.rdma_device}} if case.rdma_device else {}
        self.node = make_node("bench-copy", case.block_bytes, directory, (), copy=case.engine, **options)
        try:
            self._pattern = Pattern(case.block_bytes)
            self._from, self._to = (aligned_blocks(case.count, case.block_bytes) for _ in range(2))
            for number in range(case.count):
                self._from[number] = self._pattern.block(number)
            self._to[:] = 0xA5
            self._source, self._target = (
                dualkv.PagedKv(self.node.geometry, [cache]) for cache in (self._from, self._to)
            )
            self._from_ids, self._to_ids = (
                np.array(scattered(case.count, seed), np.uint32) for seed in (SOURCE_SEED, TARGET_SEED)
            )
            self._wait_for_engine()
            self._verify()
        except BaseException:
            self.node.close()
            raise

    def _by_cpu(self) -> int:
        return int(self.node.stats()["fallbacks"].get("copy_by_cpu", 0))

    def _wait_for_engine(self) -> None:
        """Until the NIC, if it is to copy, copies all: its queue pair is up and the caches are registered."""
        until = time.monotonic() + _DEADLINE_S
        before = -1
        while before != self._by_cpu():
            if time.monotonic() > until:
                raise Error("copy: the NIC does not copy; see the fallback copy_by_cpu in docs/settings.md", "timeout")
            before = self._by_cpu()
            self.run()
            time.sleep(0.05)

    def _verify(self) -> None:
        for from_id, to_id in zip(self._from_ids, self._to_ids, strict=True):
            if not self._pattern.matches(int(from_id), self._to[to_id]):
                raise Error(f"bench: block {from_id} was copied wrong", "corrupt")

    def run(self) -> Run:
        """Prepare: the arrays of ids. Post: the call. Done: every byte is in place."""
        began = time.perf_counter()
        from_ids, to_ids = np.array(self._from_ids), np.array(self._to_ids)
        cpu = cpu_seconds()
        posting = time.perf_counter()
        operation = self.node.copy(self._source, from_ids, self._target, to_ids)
        posted = time.perf_counter()
        operation.wait(_DEADLINE_S)
        done = time.perf_counter()
        size = self._case.count * self._case.block_bytes
        return Run(done - posting, size, cpu_seconds() - cpu, prepare_s=posting - began, post_s=posted - posting)


@contextlib.contextmanager
def _copier(case: CopyCase) -> Iterator[Copier]:
    with tempfile.TemporaryDirectory(prefix="dualkv-bench-") as directory:
        made = Copier(case, directory)
        try:
            yield made
        finally:
            made.node.close()


def _memcpy(case: CopyCase) -> Contender:
    arena = limits.CopyArena(case.count * case.block_bytes)
    sources, targets = (
        np.array(scattered(case.count, seed), np.uint64) * np.uint64(case.block_bytes)
        for seed in (SOURCE_SEED, TARGET_SEED)
    )
    return lambda: as_run(arena.run(case.block_bytes, sources, targets))


def run_copy(options: CopyOptions, stage: Stage) -> BenchResult:
    """All cases; an engine that this machine has not is named and left out. Raises Error."""
    options.check()
    result = BenchResult("copy", machine.labels(transport="none", topology="1 node, 1 process"), [])
    for case in options.cases():
        try:
            with _copier(case) as ours:
                step = stage(str(case), steps_of(2, warmup=options.warmup, repeats=options.repeats))
                contenders = {OURS: ours.run, LIMIT: _memcpy(case)}
                measured = interleave(
                    contenders, warmup=options.warmup, repeats=options.repeats, step=step, optional={LIMIT}
                )
                result.add_fallbacks({k: int(v) for k, v in ours.node.stats()["fallbacks"].items()})
        except Error as error:
            if error.code != "unsupported":
                raise
            result.add_dropped(str(case), {case.engine: str(error)})
            continue
        fields: dict[str, CaseValue] = {"engine": case.engine, "block_bytes": case.block_bytes, "count": case.count}
        result.rows += rows_of(fields, measured, limit=_MEMCPY, blocks=case.count)
    return result
