"""What a benchmark measured, as values, and the file they are kept in: one shape for people, programs and plots."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualkv.errors import Error

CaseValue = str | int | float | bool | None
Measures = Mapping[str, CaseValue]
"""What only one benchmark measures, by name; names end in their unit."""


@dataclass(frozen=True)
class Spread:
    """Mean and 99th percentile of one time over the repeats, in microseconds."""

    avg: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float | None]) -> "Spread | None":
        """None when nothing was measured."""
        known = [value * 1e6 for value in seconds if value is not None]
        return cls(float(np.mean(known)), float(np.percentile(known, 99))) if known else None


@dataclass
class Row:
    """One case. Unknown is None, never 0. GB are 10**9 bytes; CPU seconds are those of all processes that took part.

    ``ratio`` and ``peer_ratio`` are medians over the repeats of ours against the other of the same repeat. A case
    measured beside several peers has a row for each, which differ in the peer's fields only.
    """

    case: dict[str, CaseValue]  # block_bytes, count, depth, connections, transport ... whatever applies
    gbps: float | None = None
    gbps_min: float | None = None
    gbps_max: float | None = None
    limit_gbps: float | None = None
    limit: str | None = None  # what the limit is
    ratio: float | None = None
    cpu_s_per_gb: float | None = None
    limit_cpu_s_per_gb: float | None = None
    prepare_us: Spread | None = None
    post_us: Spread | None = None
    latency_us: Spread | None = None  # from post to done
    post_ns_per_block: float | None = None
    checksum_share: float | None = None  # of ours' time, estimated from the speed of one pass over the data
    repeats: int = 0
    samples: list[float] = field(default_factory=list)  # GB/s of each repeat
    limit_samples: list[float] = field(default_factory=list)
    cpu_samples: list[float] = field(default_factory=list)  # CPU seconds per GB of each repeat
    second_limit: str | None = None
    second_limit_gbps: float | None = None
    peer: str | None = None
    peer_gbps: float | None = None
    peer_ratio: float | None = None
    peer_cpu_s_per_gb: float | None = None
    peer_prepare_us: Spread | None = None
    peer_post_us: Spread | None = None
    peer_samples: list[float] = field(default_factory=list)
    measures: dict[str, CaseValue] = field(default_factory=dict)  # of this benchmark only: medians over the repeats
    curves: dict[str, list[float]] = field(default_factory=dict)  # of this benchmark only: over layers, over time

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for rows that measure the same."""
        return (*sorted(self.case.items(), key=str), self.peer)

    def to_json(self) -> dict[str, Any]:
        """The case's fields, then the measured ones, in one flat object."""
        out = dataclasses.asdict(self)
        return {**out.pop("case"), **out}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Row":
        """The inverse of :meth:`to_json`; KeyError or TypeError for anything else."""
        measured = {name: row[name] for name in MEASURED if name not in _OWN}
        measured |= {name: dict(row.get(name, {})) for name in _OWN}  # older files have none
        for name in _SPREADS:
            measured[name] = None if row[name] is None else Spread(**row[name])
        for name in _SAMPLES:
            measured[name] = [float(value) for value in row[name]]
        for name in _NUMBERS:
            measured[name] = None if row[name] is None else float(row[name])
        return cls({name: value for name, value in row.items() if name not in MEASURED}, **measured)


MEASURED = tuple(one.name for one in dataclasses.fields(Row) if one.name != "case")
_SPREADS = tuple(name for name in MEASURED if name.endswith("_us"))
_SAMPLES = tuple(name for name in MEASURED if name.endswith("samples"))
_OWN = ("measures", "curves")
_NUMBERS = tuple(one.name for one in dataclasses.fields(Row) if one.type == float | None)


@dataclass
class BenchResult:
    """All cases of one run, and all that one needs to know to judge them."""

    bench: str
    labels: dict[str, str]  # machine, what was emulated, what could not be measured and why
    rows: list[Row]
    fallbacks: dict[str, int] = field(default_factory=dict)
    command: str = ""
    failures: list[str] = field(default_factory=list)  # what must not happen, and did: the command's exit code is 1

    def to_json(self) -> dict[str, Any]:
        """``{bench, command, labels, rows, fallbacks, failures}``."""
        rows = [row.to_json() for row in self.rows]
        return {
            "bench": self.bench,
            "command": self.command,
            "labels": self.labels,
            "rows": rows,
            "fallbacks": self.fallbacks,
            "failures": self.failures,
        }

    def add_fallbacks(self, found: Mapping[str, int]) -> None:
        """Adds up counts of the same name."""
        for name, count in found.items():
            self.fallbacks[name] = self.fallbacks.get(name, 0) + count

    def add_dropped(self, case: str, dropped: Mapping[str, str]) -> None:
        """Says in the labels what of a case could not be measured, and why."""
        for name, reason in dropped.items():
            self.labels[f"no {name}, {case}"] = reason

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON that :func:`load` reads. Raises Error, ``io``."""
        try:
            pathlib.Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise Error(f"result: can't write {os.fspath(path)!r}: {error.strerror}", "io", error.errno or 0) from error


def load(path: str | os.PathLike[str]) -> BenchResult:
    """A result that :meth:`BenchResult.save` wrote. Raises Error, ``io`` or ``corrupt``, naming the file."""
    name = os.fspath(path)
    try:
        told = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Error(f"result: can't read {name!r}: {error.strerror}", "io", error.errno or 0) from error
    except ValueError as error:
        raise Error(f"result: {name!r} is not JSON ({error}); give a file of --save", "corrupt") from error
    try:
        rows = [Row.from_json(row) for row in told["rows"]]
        return BenchResult(
            bench=str(told["bench"]),
            labels=dict(told["labels"]),
            rows=rows,
            fallbacks=dict(told["fallbacks"]),
            command=str(told["command"]),
            failures=list(told.get("failures", [])),  # older files have none
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Error(
            f"result: {name!r} is not a result of dualkv bench ({error!r}); give one of --save", "corrupt"
        ) from error
