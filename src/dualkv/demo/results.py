"""What a demo run measured, as values: the same fields for people, programs and plots."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dualkv.demo.replay import Replay


@dataclass
class Percentiles:
    """Seconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """NaN-free: zeros when there is nothing."""
        if not values:
            return cls(0.0, 0.0)
        return cls(float(np.percentile(values, 50)), float(np.percentile(values, 99)))


@dataclass
class HighTraffic:
    """An exchange of the model's own traffic, an all-to-all on HIGH: before the mode ran, and beside it."""

    alone_s: Percentiles
    beside_s: Percentiles
    p99_ratio: float  # beside over alone


@dataclass
class ModeRun:
    """One mode over all agents."""

    mode: str
    topology: str
    jct_s: float
    prompt_tokens_per_s: float
    ttft_s: Percentiles
    ttft_alone_s: Percentiles  # one agent, nothing else running
    bytes: dict[str, int]  # pe_path, de_path, helper_path, published, saved, by_rdma
    snic_utilisation: dict[str, float]  # prefill, decode: of the limit, over the whole run
    exact: dict[str, int]  # ok, total
    failures: list[str]
    speedup: float = 0.0  # basic's jct_s over this one's
    fallbacks: dict[str, int] = field(default_factory=dict)
    high: HighTraffic | None = None  # on a testbed
    replay: Replay | None = None  # for plots, not in the JSON
    samples: list[tuple[str, float, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Without what only plots need."""
        out = asdict(self)
        del out["replay"], out["samples"]
        return out


@dataclass
class DemoResult:
    """All modes of one or more topologies."""

    labels: dict[str, str]  # memory, transport, snic, engine, topology
    runs: list[ModeRun]

    def to_json(self) -> dict[str, Any]:
        """``{labels, runs}``."""
        return {"labels": self.labels, "runs": [run.to_json() for run in self.runs]}


def path_bytes(replay: Replay) -> dict[str, int]:
    """Hit bytes per path and published bytes, from the loads' own accounts."""
    out = {"pe_path": 0, "de_path": 0, "helper_path": 0, "published": 0}
    for turn in replay.turns:
        result = turn.prefilled["result"]
        out["published"] += result["bytes_published"]
        for path in result["paths"]:
            out[path["path"]] += path["bytes"]
    return out
