"""``dualkv bench storage``: blocks of one file each, verified, against a bare loop over one file."""

import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import dualkv
from dualkv.bench import fio, limits, machine
from dualkv.bench.blocks import Pattern, aligned_blocks, check_block_bytes, count_of, scattered
from dualkv.bench.measure import (
    LIMIT,
    OURS,
    SECOND_LIMIT,
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
from dualkv.bench.released import nixl_posix
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.errors import Error, invalid

LIMIT_TEXT = "bare io_uring loop, one open file of the same bytes, same block size, order and depth, nothing verified"
NIXL = "NIXL POSIX io_uring"

_LAYERS = 4
_SPARE_SLOTS = 4
_SAVED_AT_ONCE = 32  # blocks; bounds the memory that the files are written from
_ALIGNMENT = 4096  # of O_DIRECT, on any device
_DEADLINE_S = 300.0


@dataclass(frozen=True)
class StorageOptions:
    """What to measure. Sizes in bytes; each block size is combined with each depth."""

    path: str
    block_bytes: tuple[int, ...] = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
    total: int = 256 << 20
    count: int | None = None  # blocks, instead of total
    depth: tuple[int, ...] = (0,)  # 0: the store's own choice
    direct: bool = True
    fio: bool = False
    nixl_python: str | None = None
    repeats: int = 5
    warmup: int = 1

    def blocks(self, block_bytes: int) -> int:
        """Blocks of this size."""
        return count_of(block_bytes, self.total, self.count, minimum=16)

    def check(self) -> None:
        """Raises Error before anything is touched."""
        check_block_bytes(self.block_bytes, _ALIGNMENT)
        if not all(0 <= depth <= 1024 for depth in self.depth):
            raise invalid(f"--depth {self.depth}: 0 (the store chooses) to 1024 are possible")
        largest = max(size * self.blocks(size) for size in self.block_bytes)
        machine.require_disk(self.path, 2 * largest + (64 << 20))
        machine.require_memory(largest * 2 + (256 << 20))  # staging, as much again for a peer


class BlockFiles:
    """``count`` blocks as a store's files, and the same bytes in one file, under a directory of its own."""

    def __init__(self, directory: str, block_bytes: int, count: int) -> None:
        self.block_bytes = block_bytes
        self.count = count
        self.root = f"{directory}/store"
        self.raw = f"{directory}/raw"
        self.geometry = dualkv.KvGeometry(
            layers=_LAYERS, tokens_per_block=64, layer_bytes=block_bytes // _LAYERS, namespace="bench/storage"
        )
        self.keys = [number.to_bytes(32, "little") for number in range(count)]
        self._write()
        self.settle()

    def _write(self) -> None:
        pattern = Pattern(self.block_bytes)
        step = min(_SAVED_AT_ONCE, self.count)
        cache = aligned_blocks(_LAYERS * step, self.block_bytes // _LAYERS).reshape(_LAYERS, step, -1)
        kv = dualkv.PagedKv(self.geometry, list(cache))
        store = dualkv.Store(
            f"file://{self.root}", self.geometry, staging=2 * step * self.geometry.file_bytes, durable=False
        )
        with open(self.raw, "wb") as raw:
            for first in range(0, self.count, step):
                many = min(step, self.count - first)
                for i in range(many):
                    block = pattern.block(first + i)
                    cache[:, i] = block.reshape(_LAYERS, -1)
                    raw.write(block.tobytes())
                keys = self.keys[first : first + many]
                store.save(keys, kv, range(many), deadline_s=_DEADLINE_S).wait(_DEADLINE_S)

    def settle(self) -> None:
        """Writes back what is dirty, and drops all of it from the page cache."""
        for path in [pathlib.Path(self.raw), *pathlib.Path(self.root).rglob("*.kv")]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class Reader:
    """Contenders over the same blocks in the same order. Not thread-safe."""

    def __init__(self, files: BlockFiles, depth: int, direct: bool) -> None:
        self.files = files
        slots = files.count + _SPARE_SLOTS
        self._store = dualkv.Store(
            f"file://{files.root}",
            files.geometry,
            staging=slots * files.geometry.file_bytes,
            depth=depth,
            direct="auto" if direct else "off",
        )
        self._depth = int(self._store.stats()["depth"])
        self._order = scattered(files.count, 1)
        self._verified = False

    @property
    def direct(self) -> bool:
        """What the store's file descriptors really are; the limit's are the same."""
        return bool(self._store.stats()["direct"])

    @property
    def page_cache(self) -> str:
        """A label."""
        return "not used (O_DIRECT)" if self.direct else "files are fdatasynced and dropped from it before each run"

    @property
    def offsets(self) -> list[int]:
        """Of the blocks in the one file, in the order they are read."""
        return [number * self.files.block_bytes for number in self._order]

    def fallbacks(self) -> dict[str, int]:
        """Those of the store."""
        return dict(self._store.stats()["fallbacks"])

    def uncached(self, contender: Contender) -> Contender:
        """The same, but it never reads the page cache."""

        def run() -> Run:
            self._forget()
            return contender()

        return run

    def _forget(self) -> None:
        """Before a run: without O_DIRECT it would read the page cache."""
        if not self.direct:
            self.files.settle()

    def ours(self) -> Run:
        """Prepare: keys and slots. Post: the call. Done: every block is in its slot and verified."""
        self._forget()
        began = time.perf_counter()
        keys = [self.files.keys[number] for number in self._order]
        acquired = self._store.staging.acquire(len(keys))
        acquired.wait(_DEADLINE_S)
        slots = acquired.slots()
        cpu = cpu_seconds()
        posting = time.perf_counter()
        operation = self._store.read(keys, slots, deadline_s=_DEADLINE_S)
        posted = time.perf_counter()
        operation.wait(_DEADLINE_S)
        done = time.perf_counter()
        cpu = cpu_seconds() - cpu
        if not self._verified:
            self._verify(slots)
        size = self.files.count * self.files.block_bytes
        return Run(done - posting, size, cpu, prepare_s=posting - began, post_s=posted - posting)

    def _verify(self, slots: list[Any]) -> None:
        """The slots' bytes against what was saved, once: the store's own check is the other one."""
        pattern = Pattern(self.files.block_bytes)
        for number, slot in zip(self._order, slots, strict=True):
            if not pattern.matches(number, np.frombuffer(slot, np.uint8)[: self.files.block_bytes]):
                raise Error(f"bench: block {number} has not the bytes that were saved", "corrupt")
        self._verified = True

    def limit(self) -> Run:
        """The bare loop."""
        self._forget()
        path, block_bytes = self.files.raw, self.files.block_bytes
        return as_run(limits.read_file(path, block_bytes, self.offsets, depth=self._depth, direct=self.direct))

    def fio(self) -> Run:
        """fio over the one file."""
        self._forget()
        total = self.files.count * self.files.block_bytes
        return fio.read_file(
            self.files.raw, block_bytes=self.files.block_bytes, total=total, depth=self._depth, direct=self.direct
        )

    @property
    def case(self) -> dict[str, CaseValue]:
        """The row's own fields."""
        return {
            "block_bytes": self.files.block_bytes,
            "count": self.files.count,
            "depth": self._depth,
            "direct": self.direct,
        }

    def __str__(self) -> str:
        return f"storage {self.files.block_bytes >> 10} KiB, depth {self._depth}"


@contextlib.contextmanager
def block_files(path: str, block_bytes: int, count: int) -> Iterator[BlockFiles]:
    """Files under a new directory in ``path``, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="dualkv-bench-", dir=path) as directory:
        yield BlockFiles(directory, block_bytes, count)


def run_storage(options: StorageOptions, stage: Stage) -> BenchResult:
    """All cases. Raises Error."""
    options.check()
    result = BenchResult("storage", machine.labels(transport="none", topology="1 process", path=options.path), [])
    if options.fio:
        result.labels["fio"] = fio.require_fio()
    for block_bytes in options.block_bytes:
        with block_files(options.path, block_bytes, options.blocks(block_bytes)) as files:
            for depth in options.depth:
                reader = Reader(files, depth, options.direct)
                peers = peers_of(reader, options.nixl_python)
                result.rows += measure_case(reader, options, peers, result, stage)
                result.add_fallbacks(reader.fallbacks())
                result.labels["page cache"] = reader.page_cache
    return result


def measure_case(reader: Reader, options: StorageOptions, peers: Peers, result: BenchResult, stage: Stage) -> list[Row]:
    """The rows of one block size and depth, one for each peer; what was dropped and why goes to the labels."""
    starts: dict[str, Start] = {LIMIT: lambda _: reader.limit}
    if options.fio:
        starts[SECOND_LIMIT] = lambda _: reader.fio
    warmup, repeats = options.warmup, options.repeats
    with contextlib.ExitStack() as closing:
        contenders: dict[str, Contender] = {OURS: reader.ours}
        contenders |= {name: start_optional(one, closing) for name, one in starts.items()}
        contenders |= {
            name: reader.uncached(start_optional(one, closing)) for name, one in peers.items() if one is not None
        }
        step = stage(str(reader), steps_of(len(contenders), warmup=warmup, repeats=repeats))
        measured = interleave(contenders, warmup=warmup, repeats=repeats, step=step, optional={*contenders} - {OURS})
    result.add_dropped(str(reader), measured.dropped)
    return rows_of(
        reader.case,
        measured,
        limit=LIMIT_TEXT,
        second_limit="fio, randread, io_uring" if options.fio else None,
        blocks=reader.files.count,
        checksum_speed=checksum_gbps(reader.files.block_bytes // _LAYERS),
        peers=list(peers),
    )


def peers_of(reader: Reader, nixl_python: str | None) -> Peers:
    """NIXL over the file of the limit, if there is one."""
    if nixl_python is None:
        return {}
    files = reader.files
    return {NIXL: nixl_posix(nixl_python, files.raw, files.block_bytes, files.count, reader.direct)}
