"""Interleaved repeats: contenders take turns, so that what disturbs the machine disturbs all of them."""

import contextlib
import resource
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualkv.bench import limits
from dualkv.bench.results import CaseValue, Measures, Row, Spread
from dualkv.errors import Error

OURS = "ours"
LIMIT = "limit"
SECOND_LIMIT = "second limit"

Stage = Callable[[str, int], Callable[[], None]]
"""Begins a stage of so many steps; the result is called after each step."""

_CHECKSUM_BYTES = 64 << 20  # far more than caches hold, as the data that is verified


@dataclass(frozen=True)
class Run:
    """One timed run: seconds from post to done, bytes moved, CPU seconds of all processes that took part.

    ``bytes`` is 0 where none move: then there are no GB/s.
    """

    seconds: float
    bytes: int
    cpu_s: float | None = None
    prepare_s: float | None = None
    post_s: float | None = None
    measures: Measures = field(default_factory=dict)

    @property
    def gbps(self) -> float | None:
        """10**9 bytes per second."""
        return self.bytes / self.seconds / 1e9 if self.bytes else None

    @property
    def cpu_s_per_gb(self) -> float | None:
        """CPU seconds per 10**9 bytes."""
        return None if self.cpu_s is None or not self.bytes else self.cpu_s / (self.bytes / 1e9)


Contender = Callable[[], Run]
Start = Callable[[contextlib.ExitStack], Contender]
"""Makes a contender ready; what it needs is closed with the stack."""
Peers = Mapping[str, Start | None]
"""By name; None for one that is missing, whose row says so by its nulls."""


def as_run(sample: limits.Sample) -> Run:
    """A limit's sample as a run."""
    return Run(sample.seconds, sample.bytes, sample.cpu_s)


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def start_optional(start: Start, closing: contextlib.ExitStack) -> Contender:
    """One that can't be made ready fails when it is run, so that only it is dropped."""
    try:
        return start(closing)
    except Error as error:
        return _failing(error)


def _failing(error: Error) -> Contender:
    def run() -> Run:
        raise error

    return run


@dataclass
class Measured:
    """The runs of each contender, in order of the repeats, and why others have none."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> list[Run]:
        """Empty if it did not take part or was dropped."""
        return self.runs.get(name, [])


def interleave(
    contenders: Mapping[str, Contender],
    *,
    warmup: int,
    repeats: int,
    step: Callable[[], None] = lambda: None,
    optional: Collection[str] = (),
) -> Measured:
    """Runs each contender once per repeat, each repeat beginning with another one; warm-ups are dropped.

    Args:
        step: called after each run, ``steps_of(...)`` times.
        optional: contenders that leave the race at their first Error; that of any other is raised.
    """
    out = Measured({name: [] for name in contenders})
    names = list(contenders)
    for repeat in range(warmup + repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            if name not in out.dropped:
                _run_one(name, contenders[name], out, keep=repeat >= warmup, optional=name in optional)
            step()
    return out


def _run_one(name: str, contender: Contender, out: Measured, *, keep: bool, optional: bool) -> None:
    try:
        run = contender()
    except Error as error:
        if not optional:
            raise
        out.dropped[name] = str(error)
        del out.runs[name]
        return
    if keep:
        out.runs[name].append(run)


def steps_of(contenders: int, *, warmup: int, repeats: int) -> int:
    """How often :func:`interleave` steps."""
    return contenders * (warmup + repeats)


def median(values: Iterable[float | None]) -> float | None:
    """None of nothing."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def median_measures(runs: Sequence[Run]) -> dict[str, CaseValue]:
    """Medians of numbers; of what is no number, the last run's."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    return {name: _median_value([run.measures.get(name) for run in runs]) for name in names}


def _median_value(values: Sequence[CaseValue]) -> CaseValue:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return median(numbers) if numbers else values[-1]


def ratio(ours: Sequence[float], other: Sequence[float]) -> float | None:
    """Median of ours against the other of the same repeat; None if either moved nothing."""
    return median(a / b for a, b in zip(ours, other, strict=True)) if ours and other else None


def _speeds(runs: Iterable[Run]) -> list[float]:
    return [run.gbps for run in runs if run.gbps is not None]


def checksum_gbps(layer_bytes: int) -> float:
    """One thread's speed at the checksum that every Layer Block is verified with, GB/s."""
    return limits.checksum_memory(layer_bytes * max(1, _CHECKSUM_BYTES // layer_bytes), layer_bytes).gbps


def rows_of(
    case: Mapping[str, CaseValue],
    measured: Measured,
    *,
    limit: str,
    second_limit: str | None = None,
    blocks: int = 1,
    checksum_speed: float | None = None,
    peers: Sequence[str] = (),
) -> list[Row]:
    """A row of the case, or one for each of the peers, those that were dropped included.

    Args:
        limit: what the contender ``LIMIT`` is; ``second_limit`` the same of ``SECOND_LIMIT``.
        blocks: that one post hands over.
        checksum_speed: of :func:`checksum_gbps`, if ours verifies.
        peers: names of contenders.
    """
    fields = {**_ours(measured, blocks, checksum_speed), **_limits(measured, limit, second_limit)}
    if not peers:
        return [Row(dict(case), **fields)]
    return [Row(dict(case), **fields, **_peer(measured, peer)) for peer in peers]


def _ours(measured: Measured, blocks: int, checksum_speed: float | None) -> dict[str, Any]:
    runs = measured.of(OURS)
    samples = _speeds(runs)
    gbps = median(samples)
    post = median(run.post_s for run in runs)
    return {
        "gbps": gbps,
        "gbps_min": min(samples, default=None),
        "gbps_max": max(samples, default=None),
        "cpu_s_per_gb": median(run.cpu_s_per_gb for run in runs),
        "prepare_us": Spread.of([run.prepare_s for run in runs]),
        "post_us": Spread.of([run.post_s for run in runs]),
        "latency_us": Spread.of([run.seconds for run in runs]),
        "post_ns_per_block": None if post is None else post * 1e9 / blocks,
        "checksum_share": None if checksum_speed is None or gbps is None else gbps / checksum_speed,
        "repeats": len(runs),
        "samples": samples,
        "cpu_samples": [run.cpu_s_per_gb for run in runs if run.cpu_s_per_gb is not None],
        "measures": median_measures(runs),
    }


def _limits(measured: Measured, limit: str, second_limit: str | None) -> dict[str, Any]:
    runs, second = measured.of(LIMIT), measured.of(SECOND_LIMIT)
    samples = _speeds(runs)
    return {
        "limit": limit,
        "limit_gbps": median(samples),
        "limit_cpu_s_per_gb": median(run.cpu_s_per_gb for run in runs),
        "ratio": ratio(_speeds(measured.of(OURS)), samples),
        "limit_samples": samples,
        "second_limit": second_limit,
        "second_limit_gbps": median(run.gbps for run in second),
    }


def _peer(measured: Measured, peer: str) -> dict[str, Any]:
    runs = measured.of(peer)
    samples = _speeds(runs)
    return {
        "peer": peer,
        "peer_gbps": median(samples),
        "peer_ratio": ratio(_speeds(measured.of(OURS)), samples),
        "peer_cpu_s_per_gb": median(run.cpu_s_per_gb for run in runs),
        "peer_prepare_us": Spread.of([run.prepare_s for run in runs]),
        "peer_post_us": Spread.of([run.post_s for run in runs]),
        "peer_samples": samples,
    }
