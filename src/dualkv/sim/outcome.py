"""What a simulated run gave: times of every request, utilisation over time, and the figures people quote."""

from typing import Any

import numpy as np

Array = Any
PARTS = ("scheduling", "reading", "queueing", "prefill")
"""Of the time to the first token, in order."""


class Outcome:
    """A finished run.

    Attributes:
        jct_s: until the last answer. Of a workload with ``end_s``, its end, unless all agents were done before: how
            long the run was, not a JCT.
        requests: columns, one entry a request: ``agent``, ``turn``, ``prefill`` and ``decode`` (engines),
            ``arrival_s``, and durations: ``scheduling_s``, ``reading_s``, ``queueing_s``, ``prefill_s``, ``second_s``
            (from the first to the second token), ``decode_s`` (from the first to the last), and ``output_tokens``.
        windows: columns over time, one entry each ``window_s``: ``prefill_snic, decode_snic, snic_max, cnic``
            (utilisation), ``attention_ratio`` (slowest over mean of a forward pass), ``running``, ``prompt_tokens``.
        agent_seconds: of each agent that is done.
    """

    def __init__(self, nodes: tuple[int, int], window_s: float, raw: dict[str, Any]) -> None:
        self.nodes = nodes
        self.window_s = window_s
        self.jct_s: float = raw["seconds"]
        self.requests: dict[str, Array] = raw["requests"]
        self.windows: dict[str, Array] = raw["windows"]
        self.agent_seconds: Array = raw["agent_seconds"]
        self.snic_bytes: Array = raw["snic_bytes"]
        self.bytes = {name: raw[f"{name}_bytes"] for name in ("hit", "read", "relayed", "published", "recomputed")}
        self.events: int = raw["events"]

    @property
    def ttft_s(self) -> Array:
        """Time to the first token of each request."""
        return sum(self.requests[f"{part}_s"] for part in PARTS)

    @property
    def ttst_s(self) -> Array:
        """From the first to the second token, of requests that have one."""
        return self.requests["second_s"][self.requests["output_tokens"] > 1]

    @property
    def tpot_s(self) -> Array:
        """Time per output token behind the second, of requests with more than two."""
        many = self.requests["output_tokens"] > 2
        rest = self.requests["decode_s"][many] - self.requests["second_s"][many]
        return np.maximum(0, rest) / (self.requests["output_tokens"][many] - 2)

    def breakdown(self) -> dict[str, float]:
        """Share of the mean time to the first token, by part; zeros when there is nothing."""
        if not len(self.ttft_s):
            return dict.fromkeys(PARTS, 0.0)
        total = float(np.mean(self.ttft_s)) or 1.0
        return {part: float(np.mean(self.requests[f"{part}_s"])) / total for part in PARTS}

    def snic_average(self) -> Array:
        """Utilisation of all SNICs, over the windows."""
        prefill, decode = self.nodes
        return (self.windows["prefill_snic"] * prefill + self.windows["decode_snic"] * decode) / (prefill + decode)

    def snic_max_avg(self, seconds: float) -> float:
        """Traffic of the busiest SNIC of a window over that of a mean one, over the first ``seconds``."""
        count = max(1, int(seconds / self.window_s))
        average = float(self.snic_average()[:count].mean()) if len(self.windows["snic_max"]) else 0.0
        return float(self.windows["snic_max"][:count].mean()) / average if average else 0.0

    def to_json(self) -> dict[str, Any]:
        """Figures, without the columns."""
        return {
            "jct_s": self.jct_s,
            "requests": len(self.requests["agent"]),
            "agents_done": len(self.agent_seconds),
            "ttft_s": _percentiles(self.ttft_s),
            "ttst_s": _percentiles(self.ttst_s),
            "tpot_s": _percentiles(self.tpot_s),
            "agent_s": _percentiles(self.agent_seconds),
            "ttft_share": self.breakdown(),
            "snic_utilisation": {
                "prefill": _mean(self.windows["prefill_snic"]),
                "decode": _mean(self.windows["decode_snic"]),
            },
            "snic_max_avg": self.snic_max_avg(self.jct_s),
            "cnic_utilisation": _mean(self.windows["cnic"]),
            "bytes": self.bytes,
            "events": self.events,
        }


def _mean(values: Array) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _percentiles(values: Array) -> dict[str, float]:
    """Zeros when there is nothing."""
    if len(values) == 0:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    return {"mean": float(np.mean(values)), **{f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}}
