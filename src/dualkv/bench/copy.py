"""``dualkv bench copy``: Layer Blocks from one cache to another of a node, by each copy engine, against memcpy; and
between pinned memory and a GPU, by each engine, against one copy of as many bytes."""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

_GPU_ENGINES = {"gpu-kernel": "kernel", "gpu-batch": "batch", "gpu-memcpy": "memcpy"}
_VERIFIED = "gpu-verified"  # as gpu_verify does: copies by the kernel, then checksums in the GPU's memory
_GPU_NIC = "gpu-nic"  # as copy="nic" does with gpu_rdma: the NIC to a slot, then within the GPU
ENGINES = ("cpu", "nic", *_GPU_ENGINES, _VERIFIED, _GPU_NIC)
_BY_NODE = ("cpu", "nic", _GPU_NIC)
_DEADLINE_S = 60.0
_ONE_COPY = "one copy of as many bytes, pinned memory"
_MEMCPY = "memcpy of the same scattered blocks, one thread, huge pages"


@dataclass(frozen=True)
class CopyOptions:
    """What to measure: every engine with every size and count, those of GPUs in both directions; ``gpu-nic`` with
    sizes of whole 64 bytes only.

    ``rdma_device``: of ``nic`` and ``gpu-nic``; none: the nearest. ``gpu``: whose memory.
    """

    engine: tuple[str, ...] = ENGINES
    block_bytes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
    counts: tuple[int, ...] = (1, 64, 1000, 15_000)
    most: int = 1 << 30  # bytes of a case; larger ones are left out
    rdma_device: str = ""
    gpu: int = 0
    repeats: int = 7
    warmup: int = 1

    def cases(self) -> list["CopyCase"]:
        """In the order they are measured."""
        return [
            CopyCase(engine, size, count, self.rdma_device, direction, self.gpu)
            for engine in self.engine
            for direction in _directions(engine)
            for size in self.block_bytes
            for count in self.counts
            if size * count <= self.most and (engine != _GPU_NIC or size % 64 == 0)
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
    direction: str = "within the host"
    gpu: int = 0

    def __str__(self) -> str:
        where = f" {self.direction}" if self.engine not in ("cpu", "nic") else ""
        return f"{self.engine}{where} {self.count} x {self.block_bytes >> 10} KiB"


def _directions(engine: str) -> tuple[str, ...]:
    if engine == _VERIFIED:
        return ("to GPU",)
    return ("to GPU", "from GPU") if engine in (*_GPU_ENGINES, _GPU_NIC) else ("within the host",)


class Copier:
    """Copies the same scattered blocks again and again within one node.

    Args:
        arena: what has the GPU's memory, of ``gpu-nic``.
    """

    def __init__(self, case: CopyCase, directory: str, arena: limits.GpuArena | None) -> None:
        self._case = case
        options: dict[str, Any] = {"copy": "cpu" if case.engine == "cpu" else "nic"}
        if case.rdma_device:
            options["rdma_options"] = {"devices": case.rdma_device}
        if arena:
            options["gpu_rdma"] = max(256 << 20, 4 * case.block_bytes)
        self.node = make_node("bench-copy", case.block_bytes, directory, (), **options)
        try:
            self._pattern = Pattern(case.block_bytes)
            self._from, self._to = (aligned_blocks(case.count, case.block_bytes) for _ in range(2))
            for number in range(case.count):
                self._from[number] = self._pattern.block(number)
            self._to[:] = 0xA5
            caches = [dualkv.PagedKv(self.node.geometry, [cache]) for cache in (self._from, self._to)]
            if arena:
                caches.insert(1, self._gpu_cache(arena))
            self._ways = list(itertools.pairwise(caches))
            self._from_ids, self._to_ids = (
                np.array(scattered(case.count, seed), np.uint32) for seed in (SOURCE_SEED, TARGET_SEED)
            )
            self._wait_for_engine()
            if arena:
                _require_nic(self.node)
            self._verify()
        except BaseException:
            self.node.close()
            raise

    def _gpu_cache(self, arena: limits.GpuArena) -> dualkv.PagedKv:
        size = self._case.block_bytes
        return dualkv.PagedKv.from_pointers(
            self.node.geometry, [[(arena.memory, size, size)]], self._case.count, gpu=self._case.gpu
        )

    def _not_by_nic(self) -> int:
        fallbacks = self.node.stats()["fallbacks"]
        return sum(int(fallbacks.get(name, 0)) for name in ("copy_by_cpu", "copy_by_gpu"))

    def _copy_all(self) -> None:
        """The whole way; between two steps blocks stay where they are."""
        ids = self._from_ids
        for source, target in self._ways:
            self.node.copy(source, ids, target, self._to_ids).wait(_DEADLINE_S)
            ids = self._to_ids

    def _wait_for_engine(self) -> None:
        """Until the NIC, if it is to copy, copies all: its queue pair is up and the caches are registered."""
        until = time.monotonic() + _DEADLINE_S
        before = -1
        while before != self._not_by_nic():
            if time.monotonic() > until:
                raise Error("copy: the NIC does not copy; see copy_by_cpu, copy_by_gpu in docs/settings.md", "timeout")
            before = self._not_by_nic()
            self._copy_all()
            time.sleep(0.05)

    def _verify(self) -> None:
        for from_id, to_id in zip(self._from_ids, self._to_ids, strict=True):
            if not self._pattern.matches(int(from_id), self._to[to_id]):
                raise Error(f"bench: block {from_id} was copied wrong", "corrupt")

    def run(self) -> Run:
        """Prepare: the arrays of ids. Post: the call. Done: every byte is in place."""
        began = time.perf_counter()
        last = self._case.direction == "from GPU"
        source, target = self._ways[last]
        from_ids, to_ids = np.array(self._to_ids if last else self._from_ids), np.array(self._to_ids)
        cpu = cpu_seconds()
        posting = time.perf_counter()
        operation = self.node.copy(source, from_ids, target, to_ids)
        posted = time.perf_counter()
        operation.wait(_DEADLINE_S)
        done = time.perf_counter()
        size = self._case.count * self._case.block_bytes
        return Run(done - posting, size, cpu_seconds() - cpu, prepare_s=posting - began, post_s=posted - posting)


def _require_nic(node: dualkv.Node) -> None:
    stats = node.stats()
    if not all(gpu["to_gpu_by_nic"] and gpu["from_gpu_by_nic"] for gpu in stats["gpus"]):
        raise Error(f"copy: no NIC reaches the GPU's memory; fallbacks: {stats['fallbacks']}", "unsupported")


@contextlib.contextmanager
def _copier(case: CopyCase, arena: limits.GpuArena | None) -> Iterator[Copier]:
    with tempfile.TemporaryDirectory(prefix="dualkv-bench-") as directory:
        made = Copier(case, directory, arena)
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


def _gpu_arena(case: CopyCase) -> limits.GpuArena:
    return limits.GpuArena(case.block_bytes, case.count, gpu=case.gpu, to_gpu=case.direction == "to GPU")


def _measure_node(case: CopyCase, options: CopyOptions, stage: Stage, result: BenchResult) -> None:
    arena = _gpu_arena(case) if case.engine == _GPU_NIC else None
    limit = (lambda: as_run(arena.one_copy())) if arena else _memcpy(case)
    with _copier(case, arena) as ours:
        step = stage(str(case), steps_of(2, warmup=options.warmup, repeats=options.repeats))
        contenders = {OURS: ours.run, LIMIT: limit}
        measured = interleave(contenders, warmup=options.warmup, repeats=options.repeats, step=step, optional={LIMIT})
        result.add_fallbacks({k: int(v) for k, v in ours.node.stats()["fallbacks"].items()})
    fields: dict[str, CaseValue] = {"engine": case.engine, "direction": case.direction}
    fields |= {"block_bytes": case.block_bytes, "count": case.count}
    result.rows += rows_of(fields, measured, limit=_ONE_COPY if arena else _MEMCPY, blocks=case.count)


def _measure_gpu(case: CopyCase, options: CopyOptions, stage: Stage, result: BenchResult) -> None:
    arena = _gpu_arena(case)
    engine = _GPU_ENGINES.get(case.engine, "kernel")
    if not arena.moves_the_right_bytes(engine):
        raise Error(f"bench: {case}: copied wrong", "corrupt")

    def ours() -> Run:
        sample, submit_s = arena.run(engine, verify=case.engine == _VERIFIED)
        return Run(sample.seconds, sample.bytes, sample.cpu_s, post_s=submit_s)

    step = stage(str(case), steps_of(2, warmup=options.warmup, repeats=options.repeats))
    contenders = {OURS: ours, LIMIT: lambda: as_run(arena.one_copy())}
    measured = interleave(contenders, warmup=options.warmup, repeats=options.repeats, step=step)
    fields: dict[str, CaseValue] = {"engine": case.engine, "direction": case.direction}
    fields |= {"block_bytes": case.block_bytes, "count": case.count}
    result.rows += rows_of(fields, measured, limit=_ONE_COPY, blocks=case.count)


def _without_gpu(options: CopyOptions, result: BenchResult) -> set[str]:
    """The engines that are left out because there is no such GPU."""
    asked = set(options.engine) - {"cpu", "nic"}
    if not asked:
        return asked
    try:
        found = dualkv.gpus()
        if options.gpu < len(found):
            return set()
        why = f"there is no GPU {options.gpu}, the driver shows {len(found)}"
    except Error as error:
        why = str(error)
    result.add_dropped("copies to GPUs", {", ".join(sorted(asked)): why})
    return asked


def run_copy(options: CopyOptions, stage: Stage) -> BenchResult:
    """All cases; an engine that this machine has not is named, once, and left out. Raises Error."""
    options.check()
    result = BenchResult("copy", machine.labels(transport="none", topology="1 node, 1 process"), [])
    missing = _without_gpu(options, result)
    for case in options.cases():
        if case.engine in missing:
            continue
        try:
            (_measure_node if case.engine in _BY_NODE else _measure_gpu)(case, options, stage, result)
        except Error as error:
            if error.code != "unsupported":
                raise
            missing.add(case.engine)
            result.add_dropped(str(case), {case.engine: str(error)})
            continue
        if case.direction != "within the host":
            gpu = dualkv.gpus()[case.gpu]
            result.labels["gpu"] = f"{gpu.name}, CUDA {gpu.cuda}"
    return result
