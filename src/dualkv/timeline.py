"""Timelines of loads, for chrome://tracing and Perfetto."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any

_ENGINE_THREAD = 1
_LEAST_WAIT_S = 5e-6  # less is the call itself: the layer was there


def chrome_trace(results: Iterable[Mapping[str, Any]], names: Sequence[str] | None = None) -> dict[str, Any]:
    """What loads did and when, as Chrome trace JSON: open it in Perfetto (ui.perfetto.dev) or chrome://tracing.

    One process row a load. In it, per node that delivered: ``read`` (storage, a group of layers at a time; of it, the
    time on checksums is in the arguments), ``stream`` (first to last byte of a layer into the prefill engine's
    cache), ``verify``; ``publish`` (to the decode node, until it has verified the layer); and one row for the engine:
    ``wait`` and ``compute`` of each layer. Compute of a layer is what lies between the end of its wait and its
    publish, or the next layer's wait.

    Args:
        results: of :meth:`dualkv.Load.finish`; loads of one machine share its clock.
        names: one a load, for the row; "load 0" ... if left out.

    Returns:
        ``{"traceEvents": [...], "displayTimeUnit": "ms"}``, times in microseconds of CLOCK_MONOTONIC. Of other nodes'
        reads they are a message's way late: clocks of different machines are not compared.
    """
    events: list[dict[str, Any]] = []
    for pid, result in enumerate(results, start=1):
        name = names[pid - 1] if names is not None else f"load {pid - 1}"
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": _ENGINE_THREAD, "args": {"name": "engine"}})
        events.extend(_Events(pid, result).all())
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class _Events:
    def __init__(self, pid: int, result: Mapping[str, Any]) -> None:
        self._pid = pid
        self._result = result
        self._layers = len(result["layer_ready_s"])

    def all(self) -> Iterator[dict[str, Any]]:
        for path in self._result["paths"]:
            yield from self._reads(path)
            yield from self._streams(path)
        for layer in range(self._layers):
            yield from self._engine(layer)
            begin, end = self._result["layer_published_s"][layer], self._result["layer_publish_done_s"][layer]
            if begin and end:
                yield from self._span("publish", layer, f"layer {layer}", begin, end)

    def _us(self, seconds: float) -> float:
        return round((self._result["started_s"] + seconds) * 1e6, 3)

    def _span(self, kind: str, number: int, name: str, begin: float, end: float, **args: Any) -> Iterator[Any]:
        """An asynchronous span: those of one kind may overlap."""
        common = {
            "cat": kind,
            "id": f"{self._pid}.{kind}.{number}",
            "name": f"{kind} {name}",
            "pid": self._pid,
            "tid": 0,
        }
        yield {**common, "ph": "b", "ts": self._us(begin), "args": args}
        yield {**common, "ph": "e", "ts": self._us(max(begin, end))}

    def _reads(self, path: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for read in path["reads"]:
            first, count = read["first_layer"], read["layers"]
            name = f"layers {first}..{first + count - 1}"
            args = {"bytes": read["bytes"], "verify_ms": read["verify_s"] * 1e3}
            kind = f"{path['node']} read"
            yield from self._span(kind, first, name, read["begin_s"], read["end_s"], **args)
            # Checksums are made block by block all along; drawn as one piece, at the end.
            begin = max(read["begin_s"], read["end_s"] - read["verify_s"])
            yield from self._span(f"{path['node']} verify", first, name, begin, read["end_s"])

    def _streams(self, path: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        times = zip(path["layer_first_s"], path["layer_done_s"], strict=True)
        for layer, (begin, end) in enumerate(times):
            if end:
                yield from self._span(f"{path['node']} stream", layer, f"layer {layer}", begin, end)

    def _engine(self, layer: int) -> Iterator[dict[str, Any]]:
        waits, ends = self._result["layer_wait_begin_s"], self._result["layer_wait_end_s"]
        if ends[layer] - waits[layer] > _LEAST_WAIT_S:
            yield self._slice("wait", layer, waits[layer], ends[layer])
        begin = max(ends[layer], self._result["layer_ready_s"][layer])
        # An engine may publish later than it goes on to the next layer, even all layers in the end.
        following = waits[layer + 1] if layer + 1 < self._layers else 0
        end = min(self._result["layer_published_s"][layer] or inf, following or inf)
        if begin and begin < end < inf:
            yield self._slice("compute", layer, begin, end)

    def _slice(self, kind: str, layer: int, begin: float, end: float) -> dict[str, Any]:
        span = {"ts": self._us(begin), "dur": round((end - begin) * 1e6, 3)}
        return {
            "ph": "X",
            "cat": kind,
            "name": f"{kind} layer {layer}",
            "pid": self._pid,
            "tid": _ENGINE_THREAD,
            **span,
        }
