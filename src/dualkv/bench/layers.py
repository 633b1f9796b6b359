"""``dualkv bench layers``: how much of a load its compute hides, and what reading by groups of layers does."""

import contextlib
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dualkv
from dualkv.bench import machine
from dualkv.bench.caches import PatternCache, key_of
from dualkv.bench.measure import (
    LIMIT,
    OURS,
    Contender,
    Measured,
    Run,
    Stage,
    cpu_seconds,
    interleave,
    median,
    rows_of,
    steps_of,
)
from dualkv.bench.processes import JsonProcess
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.bench.second_node import DEADLINE_S, listen_address
from dualkv.errors import Error, invalid

TRANSPORTS = ("tcp", "shm")

_NAME = "bench-prefill"
_SPARE_SLOTS = 8
_REFILL_S = 0.02  # between loads, for what a token bucket lets through at once: all loads have the same of it
_PROMPT_SHARE = 0.75  # of a pool's slots, that a prompt may take


@dataclass(frozen=True)
class LayersOptions:
    """What to measure. Sizes in bytes; each of ``layers_per_read`` is a case, 0 being whole blocks."""

    path: str
    layers: int = 32
    layer_bytes: int = 64 << 10
    blocks: int = 64  # of the hit
    layers_per_read: tuple[int, ...] = (0, 2, 4, 8)
    read_limit: int = 10**9  # bytes/s of each node's token bucket, 0 = none
    decode: bool = False
    transport: str = "tcp"
    trace: str | None = None
    repeats: int = 5
    warmup: int = 1

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of KvGeometry."""
        return {
            "layers": self.layers,
            "tokens_per_block": 64,
            "layer_bytes": self.layer_bytes,
            "namespace": "bench/layers",
        }

    @property
    def nodes(self) -> int:
        """How many nodes read."""
        return 1 + self.decode

    @property
    def staging(self) -> int:
        """Of each node: the prompt fits into what prompts may take."""
        slots = int(self.blocks / _PROMPT_SHARE) + _SPARE_SLOTS
        return slots * dualkv.KvGeometry(**self.geometry).file_bytes

    def check(self) -> None:
        """Raises Error before anything is touched."""
        if self.layers < 1 or self.layer_bytes < 8 or self.layer_bytes % 8:
            raise invalid(f"--layers {self.layers} --layer-bytes {self.layer_bytes}: at least 1, of a multiple of 8")
        if self.blocks < 1:
            raise invalid(f"--blocks {self.blocks}: must be at least 1")
        wrong = [group for group in self.layers_per_read if not 0 <= group <= self.layers]
        if wrong:
            raise invalid(f"--layers-per-read {wrong[0]}: 0 (whole blocks) to {self.layers} are possible")
        if self.transport not in TRANSPORTS:
            raise invalid(f"--transport {self.transport}: must be {' or '.join(TRANSPORTS)}")
        if self.trace and not os.access(pathlib.Path(self.trace).absolute().parent, os.W_OK):
            raise Error(f"bench: can't write the trace {self.trace!r}; give another --trace", "io")
        machine.require_disk(self.path, 2 * self.staging)
        machine.require_memory(self.staging * (self.nodes + 2) + (256 << 20), "give fewer --blocks")


@dataclass(frozen=True)
class LayersRun(Run):
    """A load alone, which makes the run, and one with compute; the results are those of ``Load.finish``."""

    alone: dict[str, Any] = field(default_factory=dict)
    computed: dict[str, Any] = field(default_factory=dict)


def overlap_measures(transfer_s: float, compute_s: float, total_s: float, layers: int) -> dict[str, CaseValue]:
    """Seconds of the two alone and of both together, and what share of the best possible time that is.

    With perfect overlap both take as long as the longer one. One layer of it can't be hidden: compute begins after
    the first layer, or transfer ends before the last.
    """
    longer = max(transfer_s, compute_s)
    return {
        "transfer_s": transfer_s,
        "compute_s": compute_s,
        "total_s": total_s,
        "overlap": longer / total_s,
        "overlap_one_layer": longer * (1 + 1 / layers) / total_s,
    }


@dataclass(frozen=True)
class LayerTimes:
    """When the engine asked for a layer, went on, and had computed it, on ``time.monotonic()``'s clock."""

    asked_s: float
    came_s: float
    ended_s: float


def _with_times_of(walked: list[LayerTimes], result: dict[str, Any]) -> dict[str, Any]:
    """A load's result whose timeline has every layer's compute.

    By itself it knows waits that had to wait, and layers that were published: with no decode node, none.
    """
    start = result["started_s"]
    out = {
        **result,
        "layer_wait_begin_s": [times.asked_s - start for times in walked],
        "layer_wait_end_s": [times.came_s - start for times in walked],
    }
    if not any(result["layer_published_s"]):
        out["layer_published_s"] = [times.ended_s - start for times in walked]
    return out


def sleep_until(when_s: float) -> None:
    """On ``time.monotonic()``'s clock; returns at once if that is past."""
    left = when_s - time.monotonic()
    if left > 0:
        time.sleep(left)


class Prefill:
    """A prefill node over stored blocks, and its decode node if there is one. Not thread-safe."""

    def __init__(self, options: LayersOptions, directory: str, decode: JsonProcess | None) -> None:
        self._options = options
        self._decode = decode
        self._peer: dualkv.Peer | None = None
        self._verified: set[int] = set()
        self._numbers = list(range(options.blocks))
        self._keys = [key_of(number) for number in self._numbers]
        self._cache = PatternCache(dualkv.KvGeometry(**options.geometry), options.blocks)
        node_options: dict[str, Any] = {
            "store": f"file://{directory}/store",
            "staging": options.staging,
            "store_options": {"read_limit": options.read_limit, "durable": False},
        }
        self._node = dualkv.Node(_NAME, dualkv.KvGeometry(**options.geometry), **node_options)
        try:
            self._save()
            if decode is not None:
                listen = listen_address(options.transport, directory)
                more: dict[str, Any] = {"name": "bench-decode", "geometry": options.geometry, "listen": listen}
                self._peer = self._node.connect(decode.call("open", **more, **node_options))
        except BaseException:
            self._node.close()
            raise

    def _save(self) -> None:
        self._cache.fill(self._numbers)
        self._node.save(self._keys, self._cache.kv, self._numbers, deadline_s=DEADLINE_S).wait(DEADLINE_S)

    def measure(self, layers_per_read: int) -> LayersRun:
        """One load alone, then one with as much compute as that took, spread evenly over the layers."""
        first_time = layers_per_read not in self._verified
        if first_time:
            self._cache.data[:] = 0
        cpu = self._cpu_seconds()
        alone, _ = self._load(layers_per_read, 0.0, verify=first_time)
        cpu = self._cpu_seconds() - cpu
        self._verified.add(layers_per_read)
        transfer_s = max(alone["layer_ready_s"])
        computed, total_s = self._load(layers_per_read, transfer_s / self._options.layers)
        measures = overlap_measures(transfer_s, transfer_s, total_s, self._options.layers)
        measures["first_layer_s"] = alone["layer_ready_s"][0]
        if self._decode is not None:
            measures["hand_over_s"] = computed["seconds"] - total_s
        size = self._options.blocks * self._options.layers * self._options.layer_bytes
        return LayersRun(
            transfer_s, size, None if first_time else cpu, measures=measures, alone=alone, computed=computed
        )

    def _load(self, layers_per_read: int, compute_s: float, verify: bool = False) -> tuple[dict[str, Any], float]:
        """The load's result, and seconds from its beginning to the end of the last layer's compute."""
        time.sleep(_REFILL_S)
        decode = None if self._peer is None else self._peer.view()
        plan = dualkv.Split().plan(self._keys, prefill=self._node.view(), decode=decode)
        load = self._node.load(
            plan,
            into=self._cache.kv,
            block_ids=self._numbers,
            layers_per_read=layers_per_read,
            deadline_s=DEADLINE_S,
        )
        walked = self._walk(load, compute_s)
        result = load.finish(DEADLINE_S)
        wrong = self._cache.wrong_bytes(self._numbers) if verify else 0
        if self._decode is not None:
            wrong += self._decode.call("receive", load_id=load.id, numbers=self._numbers if verify else [])
        if wrong:
            raise Error(f"bench: {wrong} bytes were not those that were saved", "corrupt")
        return _with_times_of(walked, result), walked[-1].ended_s - result["started_s"]

    def _walk(self, load: dualkv.Load, compute_s: float) -> list["LayerTimes"]:
        """Waits for each layer and computes it.

        Compute goes on where the layer before ended, as a device's queue does: a sleep that ends late is made up for
        by the next one.
        """
        busy_until = 0.0
        times = []
        for layer in range(self._options.layers):
            came_early = load.ready(layer)
            asked = time.monotonic()
            load.wait(layer, DEADLINE_S)
            came = began = time.monotonic()
            if came_early and compute_s:
                told = load.result()
                began = min(began, max(busy_until, told["started_s"] + told["layer_ready_s"][layer]))
            busy_until = began + compute_s
            sleep_until(busy_until)
            times.append(LayerTimes(asked, came, time.monotonic()))
            if self._peer is not None:
                load.publish(layer)
        return times

    def _cpu_seconds(self) -> float:
        return cpu_seconds() + (0.0 if self._decode is None else self._decode.call("usage")["cpu_s"])

    def fallbacks(self) -> list[dict[str, int]]:
        """Those of each node."""
        own = [dict(self._node.stats()["fallbacks"])]
        return own if self._decode is None else [*own, self._decode.call("usage")["fallbacks"]]

    def close(self) -> None:
        """Ends the node."""
        self._node.close()


@contextlib.contextmanager
def prefill(options: LayersOptions) -> Iterator[Prefill]:
    """Blocks and nodes under a new directory in ``options.path``, removed in the end."""
    with contextlib.ExitStack() as closing:
        directory = closing.enter_context(tempfile.TemporaryDirectory(prefix="dualkv-bench-", dir=options.path))
        decode = None
        if options.decode:
            command = [sys.executable, "-m", "dualkv.bench.second_node"]
            decode = closing.enter_context(JsonProcess("decode node", command))
        made = Prefill(options, directory, decode)
        closing.callback(made.close)
        yield made


def run_layers(options: LayersOptions, stage: Stage) -> BenchResult:
    """All cases, in turns. Raises Error."""
    options.check()
    result = BenchResult("layers", _labels(options), [])
    with prefill(options) as ours:
        contenders: dict[str, Contender] = {
            str(group): functools.partial(ours.measure, group) for group in options.layers_per_read
        }
        steps = steps_of(len(contenders), warmup=options.warmup, repeats=options.repeats)
        step = stage("layers", steps)
        measured = interleave(contenders, warmup=options.warmup, repeats=options.repeats, step=step)
        for found in ours.fallbacks():
            result.add_fallbacks(found)
    whole = measured.of("0")
    result.rows = [_row(options, group, measured.of(str(group)), whole) for group in options.layers_per_read]
    if options.trace:
        _write_trace(options.trace, {name: runs[-1] for name, runs in measured.runs.items()})
    return result


def _labels(options: LayersOptions) -> dict[str, str]:
    transport, topology = "none", "1 prefill node"
    if options.decode:
        transport, topology = options.transport, "1 prefill node, 1 decode node in a process of its own, policy Split"
    out = machine.labels(transport=transport, topology=topology, path=options.path)
    out["compute"] = "timed wait"
    if options.read_limit:
        out["snic"] = f"bucket, {options.read_limit / 1e9:g} GB/s a node"
    return out


def _row(options: LayersOptions, group: int, runs: list[Run], whole: list[Run]) -> Row:
    case: dict[str, CaseValue] = {
        "layers": options.layers,
        "layer_bytes": options.layer_bytes,
        "blocks": options.blocks,
        "layers_per_read": group,
    }
    limit = "the nodes' token buckets" if options.read_limit else "none: no --read-limit; see bench storage"
    bucket = [Run(run.bytes / options.read_limit / options.nodes, run.bytes) for run in runs if options.read_limit]
    (row,) = rows_of(case, Measured({OURS: runs, LIMIT: bucket}), limit=limit, blocks=options.blocks)
    row.measures |= _against_whole(runs, whole)
    ready = [run.alone["layer_ready_s"] for run in runs if isinstance(run, LayersRun)]
    row.curves["layer_ready_s"] = [float(value) for value in np.median(ready, axis=0)]
    return row


def _against_whole(runs: list[Run], whole: list[Run]) -> dict[str, CaseValue]:
    """Medians over the repeats against whole blocks of the same repeat; None if those were not measured."""
    pairs = list(zip(runs, whole, strict=True)) if whole else []
    firsts = [(run.measures["first_layer_s"], other.measures["first_layer_s"]) for run, other in pairs]
    return {
        "cost": median(run.seconds / other.seconds - 1 for run, other in pairs),
        "first_layer_speedup": median(float(other or 0) / float(mine or 1) for mine, other in firsts),
    }


def _write_trace(path: str, last: dict[str, Run]) -> None:
    """The loads with compute of the last repeat."""
    results = {name: run.computed for name, run in last.items() if isinstance(run, LayersRun)}
    names = ["whole blocks" if name == "0" else f"layers per read: {name}" for name in results]
    trace = dualkv.chrome_trace(results.values(), names)
    try:
        pathlib.Path(path).write_text(json.dumps(trace), encoding="utf-8")
    except OSError as error:
        raise Error(f"bench: can't write {path!r}: {error.strerror}", "io", error.errno or 0) from error
