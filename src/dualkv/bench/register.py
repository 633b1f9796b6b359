"""``dualkv bench register``: how long staging takes to open, against one thread that populates as much memory."""

import itertools
import mmap
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import dualkv
from dualkv.bench import machine
from dualkv.bench.measure import LIMIT, OURS, Run, Stage, cpu_seconds, interleave, rows_of, steps_of
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.errors import Error, invalid

LIMIT_TEXT = "one thread populates a private mapping of the same size and kind of pages; nothing locked or registered"

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap names it from 3.15 on
_PAGE_BYTES = 4096
_READY_S = 300.0
_BLOCK_BYTES = 1 << 20
_LAYERS = 4


@dataclass(frozen=True)
class RegisterOptions:
    """What to measure. Sizes in bytes; each is combined with locked or not, and huge pages or not."""

    path: str
    size: tuple[int, ...] = (256 << 20, 1 << 30, 4 << 30)
    lazy: bool = False  # a lazy pool besides each other one
    repeats: int = 3
    warmup: int = 0

    def cases(self) -> list["RegisterCase"]:
        """In the order they are measured."""
        ways = itertools.product(self.size, (True, False), (True, False), (False, True) if self.lazy else (False,))
        return [RegisterCase(*way) for way in ways]

    def check(self) -> None:
        """Raises Error before anything is touched."""
        if min(self.size) < 8 * _BLOCK_BYTES:
            raise invalid(f"--size {min(self.size)}: must be at least {8 * _BLOCK_BYTES}")
        machine.require_memory(max(self.size) + (256 << 20), "give a smaller --size")
        if self.lazy and not knows_lazy():
            raise Error("--lazy: this build's staging has no option lazy", "unsupported")


@dataclass(frozen=True)
class RegisterCase:
    """One row."""

    size: int
    lock_memory: bool
    huge_pages: bool
    lazy: bool

    @property
    def fields(self) -> dict[str, CaseValue]:
        """The row's own fields."""
        return {
            "staging_bytes": self.size,
            "lock_memory": self.lock_memory,
            "huge_pages": self.huge_pages,
            "lazy": self.lazy,
        }

    @property
    def staging_options(self) -> dict[str, Any]:
        """Of the pool."""
        out = {"lock_memory": self.lock_memory, "huge_pages": self.huge_pages}
        return {**out, "lazy": self.lazy} if knows_lazy() else out

    def __str__(self) -> str:
        ways = {"locked": self.lock_memory, "huge pages": self.huge_pages, "lazy": self.lazy}
        return ", ".join([f"register {self.size >> 20} MiB", *(name for name, way in ways.items() if way)])


def make_geometry() -> dualkv.KvGeometry:
    """Blocks of 1 MiB."""
    return dualkv.KvGeometry(
        layers=_LAYERS, tokens_per_block=64, layer_bytes=_BLOCK_BYTES // _LAYERS, namespace="bench/register"
    )


def knows_lazy() -> bool:
    """Whether staging can be opened before all of it is ready."""
    geometry = make_geometry()
    try:
        dualkv.StagingPool(geometry, 2 * geometry.file_bytes, lazy=True, lock_memory=False, huge_pages=False)
    except Error as error:
        if error.code != "invalid_argument":
            raise
        return False
    return True


class Registration:
    """Opens a pool, and a store on it, again and again. Not thread-safe."""

    def __init__(self, case: RegisterCase, directory: str) -> None:
        self._case = case
        self._root = f"{directory}/store"
        self._options = case.staging_options
        self._geometry = make_geometry()
        self.fallbacks: dict[str, int] = {}
        self._bare_s: list[float] = []
        self._open_bare_store()  # makes its folders
        self._bare_s.clear()

    def _open_bare_store(self) -> None:
        """On the least staging: how long it takes is what opening a store takes besides registering."""
        pool = dualkv.StagingPool(self._geometry, 2 * self._geometry.file_bytes, lock_memory=False, huge_pages=False)
        began = time.perf_counter()
        dualkv.Store(f"file://{self._root}", self._geometry, staging=pool)
        self._bare_s.append(time.perf_counter() - began)

    def ours(self) -> Run:
        """From the call until every byte of the pool is ready, and then until a store has registered it.

        What was not locked is faulted in no sooner than that, so only both together compare with the limit.
        """
        self._open_bare_store()
        cpu = cpu_seconds()
        began = time.perf_counter()
        pool = dualkv.StagingPool(self._geometry, self._case.size, **self._options)
        opened = time.perf_counter()
        stats = _wait_ready(pool)
        ready = time.perf_counter()
        store = dualkv.Store(f"file://{self._root}", self._geometry, staging=pool)
        registered = time.perf_counter()
        cpu = cpu_seconds() - cpu
        register_s = max(0.0, registered - ready - float(np.median(self._bare_s)))
        self.fallbacks = dict(store.stats()["fallbacks"])
        measures: dict[str, CaseValue] = {
            "open_s": opened - began,
            "ready_s": ready - began,
            "open_gbps": self._case.size / (opened - began) / 1e9,
            "store_open_s": registered - ready,
            "register_s": register_s,
        }
        return Run(ready - began + register_s, self._case.size, cpu, measures={**measures, **_told(stats)})

    def limit(self) -> Run:
        """The same memory, nothing else."""
        cpu = cpu_seconds()
        began = time.perf_counter()
        area = mmap.mmap(-1, self._case.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE if self._case.huge_pages else mmap.MADV_NOHUGEPAGE)
        _populate(area)
        populated = time.perf_counter()
        cpu = cpu_seconds() - cpu
        area.close()
        return Run(populated - began, self._case.size, cpu)


def _populate(area: mmap.mmap) -> None:
    try:
        area.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # an older kernel
        np.frombuffer(area, np.uint8)[::_PAGE_BYTES] = 1


def _wait_ready(pool: dualkv.StagingPool) -> dict[str, Any]:
    """Stats of a pool whose chunks are all ready; those of a pool that has no chunks at once."""
    deadline = time.monotonic() + _READY_S
    stats = pool.stats()
    while stats.get("ready_chunks", 0) < stats.get("chunks", 0):
        if time.monotonic() > deadline:
            raise Error(f"staging: {stats['ready_chunks']} of {stats['chunks']} chunks after {_READY_S} s", "timeout")
        time.sleep(0.001)
        stats = pool.stats()
    return stats


def _told(stats: dict[str, Any]) -> dict[str, CaseValue]:
    """What the pool says of itself, as far as this build says it."""
    return {name: stats[name] for name in ("pages", "locked", "chunks", "ready_chunks", "prepare_s") if name in stats}


def run_register(options: RegisterOptions, stage: Stage) -> BenchResult:
    """All cases. Raises Error."""
    options.check()
    result = BenchResult("register", machine.labels(transport="none", topology="1 process", path=options.path), [])
    with tempfile.TemporaryDirectory(prefix="dualkv-bench-", dir=options.path) as directory:
        for case in options.cases():
            result.rows.append(_measure(Registration(case, directory), case, options, result, stage))
    return result


def _measure(
    ours: Registration, case: RegisterCase, options: RegisterOptions, result: BenchResult, stage: Stage
) -> Row:
    warmup, repeats = options.warmup, options.repeats
    step = stage(str(case), steps_of(2, warmup=warmup, repeats=repeats))
    measured = interleave({OURS: ours.ours, LIMIT: ours.limit}, warmup=warmup, repeats=repeats, step=step)
    result.add_fallbacks(ours.fallbacks)
    return rows_of(case.fields, measured, limit=LIMIT_TEXT)[0]
