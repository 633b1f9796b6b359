"""``dualkv bench compare``: two results, case by case; a change counts when it is beyond the spread of both."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dualkv.bench.results import BenchResult, CaseValue, Row


@dataclass(frozen=True)
class Change:
    """Of one measure of one case. Changes and spreads are shares: 0.1 is 10 %. Unknown is None."""

    measure: str  # gbps, ratio, cpu_s_per_gb, p99_us
    before: float | None
    after: float | None
    change: float | None
    spread: float | None  # the wider of both runs': highest to lowest, of the median
    verdict: str  # better, worse, same, unknown


@dataclass(frozen=True)
class CaseChange:
    """All measures of one case that both results have."""

    case: dict[str, CaseValue]
    changes: tuple[Change, ...]

    def slower_by(self) -> float:
        """By how much it got slower beyond the spread, as a share; 0 if it did not.

        Of GB/s, or of the 99th percentile where no bytes move.
        """
        by_name = {change.measure: change for change in self.changes}
        speed = by_name["gbps"] if by_name["gbps"].change is not None else by_name["p99_us"]
        return abs(speed.change) if speed.verdict == "worse" and speed.change is not None else 0.0


@dataclass(frozen=True)
class Comparison:
    """What two results have in common, and what only one has."""

    cases: tuple[CaseChange, ...]
    only_before: tuple[dict[str, CaseValue], ...]
    only_after: tuple[dict[str, CaseValue], ...]
    labels: dict[str, tuple[str | None, str | None]]  # those that differ

    def failed(self, above: float) -> list[CaseChange]:
        """Cases that got slower by more than ``above``, a share, beyond the spread."""
        return [case for case in self.cases if case.slower_by() > above]

    def to_json(self) -> dict[str, Any]:
        """The same fields."""
        return dataclasses.asdict(self)


def _spread(samples: Sequence[float]) -> float | None:
    if not samples:
        return None
    middle = sorted(samples)[len(samples) // 2]
    return (max(samples) - min(samples)) / middle if middle else None


def _ratios(row: Row) -> list[float]:
    return [ours / limit for ours, limit in zip(row.samples, row.limit_samples, strict=False) if limit]


def _latencies(row: Row) -> list[float]:
    """What has the latency's spread: GB/s, each being a repeat's time, or its own percentiles where no bytes move."""
    known = [] if row.latency_us is None else [row.latency_us.avg, row.latency_us.p99]
    return row.samples or known


# Name, value, the samples whose spread is its own, and whether more is better.
_MEASURES: tuple[tuple[str, Callable[[Row], float | None], Callable[[Row], Sequence[float]], bool], ...] = (
    ("gbps", lambda row: row.gbps, lambda row: row.samples, True),
    ("ratio", lambda row: row.ratio, _ratios, True),
    ("cpu_s_per_gb", lambda row: row.cpu_s_per_gb, lambda row: row.cpu_samples, False),
    ("p99_us", lambda row: row.latency_us.p99 if row.latency_us else None, _latencies, False),
)


def compare(before: BenchResult, after: BenchResult) -> Comparison:
    """Matches cases by their fields and peer."""
    old = {row.key: row for row in before.rows}
    new = {row.key: row for row in after.rows}
    names = sorted({*before.labels, *after.labels} - {"date"})
    labels = {name: (before.labels.get(name), after.labels.get(name)) for name in names}
    return Comparison(
        cases=tuple(_case(old[key], new[key]) for key in old if key in new),
        only_before=tuple(_name(row) for key, row in old.items() if key not in new),
        only_after=tuple(_name(row) for key, row in new.items() if key not in old),
        labels={name: pair for name, pair in labels.items() if pair[0] != pair[1]},
    )


def _name(row: Row) -> dict[str, CaseValue]:
    return row.case if row.peer is None else {**row.case, "peer": row.peer}


def _case(before: Row, after: Row) -> CaseChange:
    changes = [
        _change(name, value(before), value(after), (_spread(samples(before)), _spread(samples(after))), more)
        for name, value, samples, more in _MEASURES
    ]
    return CaseChange(_name(before), tuple(changes))


def _change(
    name: str, before: float | None, after: float | None, spreads: tuple[float | None, float | None], more: bool
) -> Change:
    change = None if before is None or after is None or before == 0 else after / before - 1
    known = [spread for spread in spreads if spread is not None]
    spread = max(known, default=None)
    if change is None:
        verdict = "unknown"
    elif abs(change) <= (spread or 0):
        verdict = "same"
    else:
        verdict = "better" if (change > 0) == more else "worse"
    return Change(name, before, after, change, spread, verdict)
