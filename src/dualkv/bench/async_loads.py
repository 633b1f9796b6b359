"""``dualkv bench async``: many loads awaited on one event loop, how late coroutines wake, and what idling costs."""

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import dualkv
from dualkv.bench import machine
from dualkv.bench.caches import PatternCache, key_of
from dualkv.bench.measure import OURS, Measured, Run, Stage, cpu_seconds, interleave, rows_of, steps_of
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.bench.second_node import resident_bytes
from dualkv.errors import Error, invalid

LIMIT_TEXT = "bare asyncio: a thread writes an eventfd, a coroutine wakes; one at a time"

_DEADLINE_S = 120.0
_STORED = 64  # blocks that all loads are of
_ALONE = 200  # loads, one after the other
_PAUSE_S = 0.0005  # so that the loop sleeps before each bare wake-up
_SETTLE_S = 0.2  # after the last load, before idling


@dataclass(frozen=True)
class AsyncOptions:
    """What to measure. Each of ``loads`` is a case: so many at a time."""

    path: str
    loads: tuple[int, ...] = (1000, 10000)
    layers: int = 2
    layer_bytes: int = 4096
    blocks: int = 2  # of each load
    idle_s: float = 5.0
    repeats: int = 3
    warmup: int = 1

    @property
    def geometry(self) -> dualkv.KvGeometry:
        """Of both nodes."""
        return dualkv.KvGeometry(
            layers=self.layers, tokens_per_block=64, layer_bytes=self.layer_bytes, namespace="bench/async"
        )

    @property
    def block_bytes(self) -> int:
        """Of all its layers."""
        return self.layers * self.layer_bytes

    def check(self) -> None:
        """Raises Error before anything is touched."""
        if not all(1 <= loads <= 1_000_000 for loads in self.loads):
            raise invalid(f"--loads {self.loads}: 1 to 1000000 are possible")
        if self.layers < 1 or self.layer_bytes < 8 or self.layer_bytes % 8:
            raise invalid(f"--layers {self.layers} --layer-bytes {self.layer_bytes}: at least 1, of a multiple of 8")
        if not 1 <= self.blocks <= _STORED:
            raise invalid(f"--blocks {self.blocks}: 1 to {_STORED} are possible")
        machine.require_disk(self.path, 2 * _STORED * self.geometry.file_bytes)
        most = max(self.loads) * (self.blocks * self.block_bytes + (16 << 10))
        machine.require_memory(most + (512 << 20), "give fewer --loads")


class Engine:
    """A node over stored blocks, and a peer that is connected and does nothing. Not thread-safe."""

    def __init__(self, options: AsyncOptions, directory: str, peer: dualkv.Node) -> None:
        self._options = options
        geometry = options.geometry
        slots = max(256, _STORED)
        self.node = dualkv.Node(
            "bench-loads",
            geometry,
            store=f"file://{directory}/store",
            staging=slots * geometry.file_bytes,
            store_options={"durable": False},
            max_loads=max(16384, *options.loads),
        )
        try:
            self._peer = self.node.connect(peer.addresses[0])
            self._plans = self._save()
        except BaseException:
            self.node.close()
            raise

    def _save(self) -> list[Any]:
        """Stores the blocks; plans for hits of neighbouring ones."""
        numbers = list(range(_STORED))
        cache = PatternCache(self._options.geometry, _STORED)
        cache.fill(numbers)
        self.node.save([key_of(i) for i in numbers], cache.kv, numbers).wait(_DEADLINE_S)
        view = self.node.view()
        firsts = range(0, _STORED - self._options.blocks + 1, self._options.blocks)
        self._firsts = list(firsts)
        hits = [[key_of(first + i) for i in range(self._options.blocks)] for first in firsts]
        return [dualkv.PrefillOnly().plan(keys, prefill=view) for keys in hits]

    def hit(self, number: int) -> tuple[Any, list[int]]:
        """The plan of load ``number``, and the blocks it is of."""
        which = number % len(self._plans)
        return self._plans[which], [self._firsts[which] + i for i in range(self._options.blocks)]

    def close(self) -> None:
        """Ends the node."""
        self.node.close()


class Crowd:
    """So many loads at a time, each into blocks of its own. Not thread-safe."""

    def __init__(self, engine: Engine, options: AsyncOptions, loads: int) -> None:
        self._engine = engine
        self._options = options
        self._loads = loads
        self._cache = PatternCache(options.geometry, loads * options.blocks)
        self._ids = np.arange(loads * options.blocks, dtype=np.uint32).reshape(loads, -1)
        self._verified = False
        self._growth = 0

    def run(self) -> Run:
        """Post: until the last load was started. Done: each has told its coroutine that it is complete."""
        self._wakes: list[float] = []
        self._done = 0
        before, threads = resident_bytes(), thread_count()
        cpu = cpu_seconds()
        began = time.perf_counter()
        asyncio.run(in_time(self._all()))
        seconds = time.perf_counter() - began
        cpu = cpu_seconds() - cpu
        if self._done != self._loads:
            raise Error(f"bench: {self._done} of {self._loads} loads completed", "io")
        self._verify()
        # Later runs find the memory that the first one took.
        self._growth = max(self._growth, self._resident - before)
        wakes: dict[str, CaseValue] = {
            f"wake_us_p{share}": float(np.percentile(self._wakes, share) * 1e6) if self._wakes else None
            for share in (50, 99)
        }
        measures: dict[str, CaseValue] = {
            "completed": self._done,
            "loads_per_s": self._loads / seconds,
            **wakes,
            "waited": len(self._wakes),
            "threads_before": threads,
            "threads_in_flight": self._threads,
            "threads_after": thread_count(),
            "rss_per_load_bytes": self._growth / self._loads,
        }
        size = self._loads * self._options.blocks * self._options.block_bytes
        return Run(seconds, size, cpu, post_s=self._posted - began, measures=measures)

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self._loads)))

    async def _one(self, number: int) -> None:
        plan, _ = self._engine.hit(number)
        load = self._engine.node.load(plan, into=self._cache.kv, block_ids=self._ids[number], deadline_s=_DEADLINE_S)
        if number == self._loads - 1:
            self._posted = time.perf_counter()
            self._resident, self._threads = resident_bytes(), thread_count()
        self._wakes += await wake_latencies(load, self._options.layers)
        self._done += 1

    def _verify(self) -> None:
        """Every byte, once."""
        if not self._verified:
            wrong = self._cache.wrong_bytes([i for n in range(self._loads) for i in self._engine.hit(n)[1]])
            if wrong:
                raise Error(f"bench: {wrong} bytes were not those that were saved", "corrupt")
        self._verified = True


async def wake_latencies(load: dualkv.Load, layers: int) -> list[float]:
    """Awaits a whole load; seconds from a layer being in place to its coroutine running, of layers waited for."""
    woke: dict[int, float] = {}
    for layer in range(layers):
        waits = not load.ready(layer)
        await load.layer(layer)
        if waits:
            woke[layer] = time.monotonic()
    result = await load.finished()
    return [when - result["started_s"] - result["layer_ready_s"][layer] for layer, when in woke.items()]


async def alone(engine: Engine, options: AsyncOptions) -> list[float]:
    """Wake-up latencies of loads one after the other."""
    cache = PatternCache(options.geometry, options.blocks)
    out: list[float] = []
    for number in range(_ALONE):
        plan, _ = engine.hit(number)
        load = engine.node.load(plan, into=cache.kv, block_ids=range(options.blocks), deadline_s=_DEADLINE_S)
        out += await wake_latencies(load, options.layers)
    return out


async def bare_wake_latencies(count: int) -> list[float]:
    """The limit: an eventfd and asyncio, without dualkv. Seconds from just before the write."""
    loop = asyncio.get_running_loop()
    fd = os.eventfd(0)
    asked, sent, out = threading.Semaphore(0), [0.0], []
    woken = asyncio.Event()

    def write() -> None:
        for _ in range(count):
            if not asked.acquire(timeout=_DEADLINE_S):
                return
            time.sleep(_PAUSE_S)
            sent[0] = time.monotonic()
            os.eventfd_write(fd, 1)

    def read() -> None:
        os.eventfd_read(fd)
        woken.set()

    loop.add_reader(fd, read)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(count):
            woken.clear()
            asked.release()
            await woken.wait()
            out.append(time.monotonic() - sent[0])
    finally:
        await asyncio.to_thread(writer.join, _DEADLINE_S)
        loop.remove_reader(fd)
        os.close(fd)
    return out


async def in_time(what: Coroutine[Any, Any, Any]) -> Any:
    """Its result; Error ``timeout`` rather than for ever."""
    try:
        return await asyncio.wait_for(what, _DEADLINE_S)
    except asyncio.TimeoutError:
        raise Error(f"bench: not done within {_DEADLINE_S} s", "timeout") from None


def thread_count() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def engine_and_peer(options: AsyncOptions) -> Iterator[Engine]:
    """Both in this process, linked by tcp, over a store under a new directory, removed in the end."""
    with contextlib.ExitStack() as closing:
        directory = closing.enter_context(tempfile.TemporaryDirectory(prefix="dualkv-bench-", dir=options.path))
        geometry = options.geometry
        peer = closing.enter_context(
            dualkv.Node(
                "bench-peer",
                geometry,
                store=f"file://{directory}/store",
                staging=2 * geometry.file_bytes,
                listen="tcp://127.0.0.1:0",
            )
        )
        engine = Engine(options, directory, peer)
        closing.callback(engine.close)
        yield engine


def run_async(options: AsyncOptions, stage: Stage) -> BenchResult:
    """All cases, then the bare wake-up, then idling. Raises Error."""
    options.check()
    topology = "1 node, 1 idle peer, 1 process"
    result = BenchResult("async", machine.labels(transport="tcp, idle", topology=topology, path=options.path), [])
    with engine_and_peer(options) as engine:
        once = _wake_measures(engine, options)
        for loads in options.loads:
            result.rows.append(_measure(engine, options, loads, once, stage))
        result.rows.append(_idle(options, stage))
        result.add_fallbacks(dict(engine.node.stats()["fallbacks"]))
    return result


def _wake_measures(engine: Engine, options: AsyncOptions) -> dict[str, CaseValue]:
    found = {
        "alone_wake_us": asyncio.run(in_time(alone(engine, options))),
        "limit_wake_us": asyncio.run(in_time(bare_wake_latencies(_ALONE))),
    }
    return {
        f"{name}_p{share}": float(np.percentile(seconds, share) * 1e6) if seconds else None
        for name, seconds in found.items()
        for share in (50, 99)
    }


def _measure(engine: Engine, options: AsyncOptions, loads: int, once: dict[str, CaseValue], stage: Stage) -> Row:
    case: dict[str, CaseValue] = {
        "loads": loads,
        "layers": options.layers,
        "layer_bytes": options.layer_bytes,
        "blocks": options.blocks,
    }
    crowd = Crowd(engine, options, loads)
    steps = steps_of(1, warmup=options.warmup, repeats=options.repeats)
    step = stage(f"{loads} loads", steps)
    measured = interleave({OURS: crowd.run}, warmup=options.warmup, repeats=options.repeats, step=step)
    (row,) = rows_of(case, Measured({OURS: measured.of(OURS)}), limit=LIMIT_TEXT, blocks=loads)
    row.measures |= once
    return row


def _idle(options: AsyncOptions, stage: Stage) -> Row:
    """CPU time of the whole process, both nodes being up and linked, and nothing to do."""
    step = stage("idle", 1)
    time.sleep(_SETTLE_S)
    cpu, began = time.process_time(), time.monotonic()
    time.sleep(options.idle_s)
    share = (time.process_time() - cpu) / (time.monotonic() - began)
    step()
    measures: dict[str, CaseValue] = {"idle_cpu_share": share, "threads": thread_count()}
    return Row({"idle_s": options.idle_s, "nodes": 2}, repeats=1, measures=measures)
