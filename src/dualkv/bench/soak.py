"""``dualkv bench soak``: reads, saves, evictions and two nodes for a long time; nothing may be lost, wrong or leak."""

import collections
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import dualkv
from dualkv.bench import machine
from dualkv.bench.caches import PatternCache
from dualkv.bench.measure import Stage
from dualkv.bench.processes import JsonProcess
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.bench.second_node import listen_address, open_fds, resident_bytes
from dualkv.bench.shelf import CHAIN_BLOCKS, Chain, Shelf, Tally
from dualkv.errors import Error, invalid

TRANSPORTS = ("tcp", "shm")

_DEADLINE_S = 30.0
_LAYERS = 8
_KEPT_SHARE = 0.75  # of the grace: a mark of use may be a quarter of it old
_WARM_UP_SHARE = 0.2  # of the time, before memory is looked at
_MAX_WARM_UP_S = 20.0
_SAMPLES = 120
_MIB = 1 << 20


@dataclass(frozen=True)
class SoakOptions:
    """What to run. Sizes in bytes, rates in bytes/s."""

    path: str
    seconds: float = 120.0
    block_bytes: int = 256 << 10
    quota: int = 1 << 30
    staging: int = 16 << 20  # of each node
    write_limit: int = 64 * 10**6
    grace_s: float = 4.0
    readers: int = 4
    pressure: int = 256 << 20
    transport: str = "shm"

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of KvGeometry."""
        return {
            "layers": _LAYERS,
            "tokens_per_block": 64,
            "layer_bytes": self.block_bytes // _LAYERS,
            "namespace": "bench/soak",
        }

    @property
    def chain_bytes(self) -> int:
        """Of the files of one chain."""
        return CHAIN_BLOCKS * dualkv.KvGeometry(**self.geometry).file_bytes

    @property
    def owed_chains(self) -> int:
        """The newest chains, that eviction by last use may not reach: a third of what the quota holds.

        Used later than one of them was saved: at most those saved after it, those owed with it, and a few old ones.
        """
        return self.quota // 3 // self.chain_bytes

    @property
    def fields(self) -> dict[str, CaseValue]:
        """The row's own fields."""
        return {
            "transport": self.transport,
            "seconds": self.seconds,
            "block_bytes": self.block_bytes,
            "quota_bytes": self.quota,
            "staging_bytes": self.staging,
            "pressure_bytes": self.pressure,
            "readers": self.readers,
        }

    def check(self) -> None:
        """Raises Error before anything is touched."""
        if self.transport not in TRANSPORTS:
            raise invalid(f"--transport {self.transport}: must be {' or '.join(TRANSPORTS)}")
        if self.block_bytes < 8 * _LAYERS or self.block_bytes % (8 * _LAYERS):
            raise invalid(f"--block-bytes {self.block_bytes}: must be a multiple of {8 * _LAYERS}")
        if self.seconds <= 0 or self.grace_s <= 0:
            raise invalid("--seconds and --grace-s: must be more than 0")
        if self.staging < 2 * self.chain_bytes:
            raise invalid(f"--staging {self.staging}: must be at least {2 * self.chain_bytes}, twice a hit")
        if self.owed_chains < 2 or self.write_limit < 1 or self.write_limit * self.grace_s > self.quota / 2:
            raise invalid(
                f"--quota {self.quota}: must be at least {6 * self.chain_bytes}, and twice what --write-limit "
                "writes in --grace-s"
            )
        machine.require_disk(self.path, 2 * self.quota)
        machine.require_memory(2 * self.staging + self.pressure + (512 << 20), "give a smaller --pressure")


class Reader:
    """Loads hits through both nodes and looks at every byte. One thread."""

    def __init__(self, soak: "Soak", seed: int) -> None:
        self._soak = soak
        self._rng = random.Random(seed)
        self._cache = PatternCache(soak.node.geometry, CHAIN_BLOCKS)

    def step(self) -> None:
        """One hit."""
        picked = self._soak.shelf.pick(self._rng)
        if picked is None:
            time.sleep(0.01)
            return
        self.read(*picked)

    def read(self, chain: Chain, owed: bool) -> None:
        """Matches, loads and compares; whatever is missing is counted as lost or as evicted."""
        tally, asked = self._soak.tally, time.monotonic()
        hit = self._soak.node.store.match(chain.keys)
        # It may have been owed when it was picked, and others saved since.
        owed = owed and self._soak.shelf.owes(chain)
        kept = owed or time.monotonic() < chain.used_at + self._soak.options.grace_s * _KEPT_SHARE
        if hit < CHAIN_BLOCKS:
            missing = CHAIN_BLOCKS - hit
            reason = f"blocks from {chain.first + hit}: matched {hit} of {CHAIN_BLOCKS}"
            tally.add("lost" if kept else "evicted", missing, reason)
            self._soak.shelf.drop(chain)
            return
        chain.used_at = max(chain.used_at, asked)
        try:
            self._load(chain)
        except Error as error:
            tally.add(f"failed {error.code}", reason=str(error))
            self._look_for(chain, str(error))
            return
        tally.add("loads")
        tally.add("bytes_read", CHAIN_BLOCKS * self._soak.options.block_bytes)
        wrong = self._cache.wrong_bytes(chain.numbers)
        if wrong:
            tally.add("wrong", wrong, f"blocks from {chain.first}")

    def _load(self, chain: Chain) -> None:
        node, peer = self._soak.node, self._soak.peer
        helpers = [peer.view()] if peer.connected else []
        plan = dualkv.Split().plan(chain.keys, prefill=node.view(), helpers=helpers)
        load = node.load(plan, into=self._cache.kv, block_ids=range(CHAIN_BLOCKS), deadline_s=_DEADLINE_S)
        result = load.finish(_DEADLINE_S)
        helped = sum(path["bytes"] for path in result["paths"] if path["node"] != node.name)
        self._soak.tally.add("bytes_helped", helped)

    def _look_for(self, chain: Chain, why: str) -> None:
        """After a load that failed: its hit was just matched, so every block must still be there."""
        store = self._soak.node.store
        missing = sum(not store.contains(key) for key in chain.keys)
        if missing:
            self._soak.tally.add("lost", missing, f"blocks from {chain.first}, matched and then missing: {why}")
            self._soak.shelf.drop(chain)


class Writer:
    """Saves chain after chain, at the rate of the options. One thread."""

    def __init__(self, soak: "Soak") -> None:
        self._soak = soak
        self._cache = PatternCache(soak.node.geometry, CHAIN_BLOCKS)
        self._next = 0
        self._due = time.monotonic()

    def step(self) -> None:
        """One chain, when its time has come."""
        self._due = max(self._due + self._soak.options.chain_bytes / self._soak.options.write_limit, time.monotonic())
        while not self._soak.stop.is_set() and time.monotonic() < self._due:
            time.sleep(min(0.05, max(0.0, self._due - time.monotonic())))
        self.save()

    def save(self) -> None:
        """One chain; it is on the shelf once it is published."""
        chain = Chain(self._next, time.monotonic())
        self._next += CHAIN_BLOCKS
        self._cache.fill(chain.numbers)
        try:
            operation = self._soak.node.save(chain.keys, self._cache.kv, range(CHAIN_BLOCKS), deadline_s=_DEADLINE_S)
            operation.wait(_DEADLINE_S)
        except Error as error:
            self._soak.tally.add(f"failed save {error.code}", reason=str(error))
            return
        self._soak.tally.add("bytes_written", CHAIN_BLOCKS * self._soak.options.block_bytes)
        self._soak.shelf.add(chain)


@dataclass(frozen=True)
class Sample:
    """Of one moment; both processes together but for memory."""

    at_s: float
    rss_bytes: int
    second_rss_bytes: int
    fds: int
    bytes_read: int
    bytes_written: int
    fallbacks: dict[str, int]


class Soak:
    """Both nodes, and the threads that use them."""

    def __init__(self, options: SoakOptions, directory: str, second: JsonProcess) -> None:
        self.options = options
        self.tally = Tally()
        self.shelf = Shelf(options.owed_chains)
        self.stop = threading.Event()
        self._second = second
        self._threads: list[threading.Thread] = []
        shared: dict[str, Any] = {"store": f"file://{directory}/store", "staging": options.staging}
        store = {"durable": False, "in_use_grace_s": options.grace_s}
        self.node = dualkv.Node(
            "bench-soak",
            dualkv.KvGeometry(**options.geometry),
            store_options={**store, "quota": options.quota},
            **shared,
        )
        try:
            listen = listen_address(options.transport, directory)
            more: dict[str, Any] = {
                "name": "bench-helper",
                "geometry": options.geometry,
                "listen": listen,
                "store_options": store,
            }
            self.peer = self.node.connect(second.call("open", **more, **shared))
            self._writer = Writer(self)
        except BaseException:
            self.node.close()
            raise

    def prepare(self) -> list[Reader]:
        """Saves as much as eviction must leave, and reads once with every reader."""
        for _ in range(self.options.owed_chains):
            self._writer.save()
        readers = [Reader(self, seed) for seed in range(self.options.readers)]
        for reader in readers:
            reader.step()
        return readers

    def start(self, readers: list[Reader]) -> None:
        """A thread each."""
        for step in [self._writer.step, *(reader.step for reader in readers)]:
            self._threads.append(threading.Thread(target=self._go_on, args=(step,)))
        for thread in self._threads:
            thread.start()

    def _go_on(self, step: Callable[[], None]) -> None:
        try:
            while not self.stop.is_set():
                step()
        except Exception as error:  # a thread that ends unnoticed would look like peace
            self.tally.add("broken", reason=repr(error))

    def sample(self, began: float) -> Sample:
        """Now."""
        usage = self._second.call("usage")
        fallbacks = collections.Counter(self.node.stats()["fallbacks"])
        fallbacks.update(usage["fallbacks"])
        return Sample(
            at_s=time.monotonic() - began,
            rss_bytes=resident_bytes(),
            second_rss_bytes=usage["rss_bytes"],
            fds=open_fds() + usage["fds"],
            bytes_read=self.tally.counts["bytes_read"],
            bytes_written=self.tally.counts["bytes_written"],
            fallbacks=dict(fallbacks),
        )

    def finish(self, reader: Reader) -> None:
        """Stops the threads, then reads all that is owed once more."""
        self._join()
        for chain in self.shelf.owed() if not self.tally.counts["broken"] else ():
            reader.read(chain, owed=True)

    def _join(self) -> None:
        self.stop.set()
        deadline = time.monotonic() + 2 * _DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = sum(thread.is_alive() for thread in self._threads)
        if hanging:
            self.tally.add("broken", hanging, f"{hanging} threads did not end")

    def close(self) -> None:
        """Ends the threads and the node."""
        self.stop.set()
        self.node.close()
        for thread in self._threads:
            thread.join(_DEADLINE_S)


@contextlib.contextmanager
def soaking(options: SoakOptions) -> Iterator[tuple[Soak, JsonProcess]]:
    """Nodes over a new directory in ``options.path``, removed in the end, and the process that presses."""
    with contextlib.ExitStack() as closing:
        directory = closing.enter_context(tempfile.TemporaryDirectory(prefix="dualkv-bench-", dir=options.path))
        pressure, second = (
            closing.enter_context(JsonProcess(name, [sys.executable, "-m", f"dualkv.bench.{module}"]))
            for name, module in (("pressure", "pressure"), ("second node", "second_node"))
        )
        made = Soak(options, directory, second)
        closing.callback(made.close)
        yield made, pressure


def run_soak(options: SoakOptions, stage: Stage) -> BenchResult:
    """Runs for ``options.seconds``. What must not have happened is in ``failures``. Raises Error."""
    options.check()
    topology = "1 node, 1 helper in a process of its own, policy Split"
    result = BenchResult("soak", machine.labels(transport=options.transport, topology=topology, path=options.path), [])
    with soaking(options) as (soak, pressure):
        if options.pressure:
            pressure.call("hold", size_bytes=options.pressure)
        readers = soak.prepare()
        before = soak.sample(0.0)
        soak.start(readers)
        samples = _watch(soak, options, stage)
        soak.finish(readers[0])
        after = soak.sample(options.seconds)
        evicted = int(soak.node.stats()["store"]["blocks_evicted"])
    result.add_fallbacks(after.fallbacks)
    row = _row(options, soak.tally, samples)
    row.measures |= {"evicted_blocks": evicted, **_held(before, after)}
    result.rows = [row]
    _judge(result, soak.tally, before, after)
    return result


def _watch(soak: Soak, options: SoakOptions, stage: Stage) -> list[Sample]:
    """Samples from the end of the warm-up on, at least three; ends early when something broke."""
    step = stage("soak", _SAMPLES)
    began = time.monotonic()
    warm_s = min(_MAX_WARM_UP_S, options.seconds * _WARM_UP_SHARE)
    samples: list[Sample] = []
    for i in range(_SAMPLES):
        when = began + options.seconds * (i + 1) / _SAMPLES
        time.sleep(max(0.0, when - time.monotonic()))
        if time.monotonic() - began >= warm_s or i >= _SAMPLES - 3:
            samples.append(soak.sample(began))
        step()
        if soak.tally.counts["broken"] and len(samples) >= 3:
            break
    return samples


def slope_mib_per_min(at_s: list[float], sizes: list[int]) -> float:
    """Of the straight line through all samples."""
    return float(np.polyfit(at_s, sizes, 1)[0]) / _MIB * 60


def _row(options: SoakOptions, tally: Tally, samples: list[Sample]) -> Row:
    first, last = samples[0], samples[-1]
    seconds = last.at_s - first.at_s
    at_s = [sample.at_s for sample in samples]
    memory = [sample.rss_bytes for sample in samples]
    second = [sample.second_rss_bytes for sample in samples]
    read = (last.bytes_read - first.bytes_read) / seconds / 1e9
    measures: dict[str, CaseValue] = {
        "read_gbps": read,
        "written_gbps": (last.bytes_written - first.bytes_written) / seconds / 1e9,
        "helped_share": tally.counts["bytes_helped"] / max(1, tally.counts["bytes_read"]),
        "loads": tally.counts["loads"],
        "failed": sum(count for name, count in tally.counts.items() if name.startswith("failed")),
        "lost": tally.counts["lost"],
        "wrong_bytes": tally.counts["wrong"],
        "rss_start_bytes": memory[0],
        "rss_max_bytes": max(memory),
        "rss_end_bytes": memory[-1],
        "rss_slope_mib_per_min": slope_mib_per_min(at_s, memory),
        "second_rss_slope_mib_per_min": slope_mib_per_min(at_s, second),
    }
    curves = {"at_s": at_s, "rss_mib": [size / _MIB for size in memory], "second_rss_mib": [s / _MIB for s in second]}
    return Row(options.fields, gbps=read, repeats=1, samples=[read], measures=measures, curves=curves)


def _held(before: Sample, after: Sample) -> dict[str, CaseValue]:
    """Of moments when nothing was in progress."""
    return {
        "fds_start": before.fds,
        "fds_end": after.fds,
        "fallbacks_start": sum(before.fallbacks.values()),
        "fallbacks_end": sum(after.fallbacks.values()),
    }


def _judge(result: BenchResult, tally: Tally, before: Sample, after: Sample) -> None:
    """What must not happen becomes a failure; loads that failed, labels with their reasons."""
    for name in ("lost", "wrong", "broken"):
        if tally.counts[name]:
            result.failures.append(f"{name}: {tally.counts[name]} ({tally.reasons.get(name, '')})")
    new = sorted(set(after.fallbacks) - set(before.fallbacks))
    if new:
        result.failures.append(f"new fallbacks: {', '.join(new)}")
    for name, count in sorted(tally.counts.items()):
        if name.startswith("failed"):
            result.labels[name] = f"{count}, the first: {tally.reasons.get(name, '')}"
