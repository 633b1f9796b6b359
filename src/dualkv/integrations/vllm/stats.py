"""Counters of the connector, from the worker to vLLM's log and its Prometheus endpoint."""

from collections import Counter as Counts
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Name of the counter here: (name at the endpoint, its extra label's value, what it counts).
COUNTERS = {
    "loads": ("dualkv_loads", "ok", "Loads of stored KV"),
    "loads_failed": ("dualkv_loads", "failed", "Loads of stored KV"),
    "bytes_pe_path": ("dualkv_load_bytes", "pe_path", "Bytes of stored KV that reached this engine, by path"),
    "bytes_de_path": ("dualkv_load_bytes", "de_path", "Bytes of stored KV that reached this engine, by path"),
    "bytes_helper_path": ("dualkv_load_bytes", "helper_path", "Bytes of stored KV that reached this engine, by path"),
    "failovers": ("dualkv_failovers", "blocks", "Blocks that a second node had to read"),
    "hand_overs": ("dualkv_hand_overs", "sent", "Prompts handed over"),
    "hand_overs_failed": ("dualkv_hand_overs", "send_failed", "Prompts handed over"),
    "received": ("dualkv_hand_overs", "received", "Prompts handed over"),
    "received_failed": ("dualkv_hand_overs", "receive_failed", "Prompts handed over"),
    "bytes_published": ("dualkv_published_bytes", "sent", "Bytes of KV handed over to decode servers"),
    "blocks_saved": ("dualkv_saved_blocks", "ok", "Full blocks handed to storage"),
    "saves_failed": ("dualkv_saved_blocks", "failed_calls", "Full blocks handed to storage"),
}
_SECONDS = "load_seconds"
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


@dataclass
class DualKVStats(KVConnectorStats):
    """Counts of an interval, and the seconds each load took."""

    def __post_init__(self) -> None:
        """An empty interval."""
        self.data.setdefault("counts", {})
        self.data.setdefault(_SECONDS, [])

    def reset(self) -> None:
        """Begins a new interval."""
        data: dict[str, Any] = {"counts": {}, _SECONDS: []}
        self.data = data

    def add(self, **counts: int) -> None:
        """Counts what has happened."""
        mine = self.data["counts"]
        for name, count in counts.items():
            if count:
                mine[name] = mine.get(name, 0) + count

    def add_seconds(self, seconds: float) -> None:
        """Of one load."""
        self.data[_SECONDS].append(seconds)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another worker's, or another interval's."""
        self.add(**other.data["counts"])
        self.data[_SECONDS].extend(other.data[_SECONDS])
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        out: dict[str, int | float] = dict(Counts(self.data["counts"]))
        seconds = self.data[_SECONDS]
        if seconds:
            out["load_ms_avg"] = round(1e3 * sum(seconds) / len(seconds), 1)
            out["load_ms_max"] = round(1e3 * max(seconds), 1)
        return out

    def is_empty(self) -> bool:
        """Nothing has happened."""
        return not self.data["counts"] and not self.data[_SECONDS]


class DualKVPromMetrics(KVConnectorPromMetrics):
    """``vllm:dualkv_*`` at ``/metrics``."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made: dict[str, Any] = {}
        self._counters: dict[str, dict[int, Any]] = {}
        for name, (public, kind, text) in COUNTERS.items():
            if public not in made:
                made[public] = self._counter_cls(
                    name=f"vllm:{public}", documentation=text, labelnames=[*labelnames, "kind"]
                )
            values = {engine: [*labels, kind] for engine, labels in per_engine_labelvalues.items()}
            self._counters[name] = create_metric_per_engine(made[public], values)
        seconds = self._histogram_cls(
            name="vllm:dualkv_load_seconds",
            documentation="Time from the start of a load until its last layer was in place",
            buckets=_BUCKETS,
            labelnames=labelnames,
        )
        self._seconds = create_metric_per_engine(seconds, per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds an interval."""
        for name, count in transfer_stats_data["counts"].items():
            self._counters[name][engine_idx].inc(count)
        for seconds in transfer_stats_data[_SECONDS]:
            self._seconds[engine_idx].observe(seconds)
