"""Path policies: which node reads which blocks. Subclass :class:`PathPolicy` to write your own.

``plan(keys, *, prefill, decode=None, helpers=())`` returns a :class:`dualkv.Plan` whose ranges tile ``keys`` in order.
A policy sees :class:`NodeView` values only: no clock, no I/O.
"""

from dualkv._dualkv import DecodeOnly, NodeView, PathPolicy, PrefillOnly, RoundRobin, ShortestQueue, Split

__all__ = ["POLICIES", "DecodeOnly", "NodeView", "PathPolicy", "PrefillOnly", "RoundRobin", "ShortestQueue", "Split"]

POLICIES: dict[str, type[PathPolicy]] = {
    "prefill_only": PrefillOnly,
    "decode_only": DecodeOnly,
    "round_robin": RoundRobin,
    "shortest_queue": ShortestQueue,
    "split": Split,
}
"""By the names that configurations and command lines use."""
