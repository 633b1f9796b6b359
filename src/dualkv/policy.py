"""Path policies: which node reads which blocks. Subclass :class:`PathPolicy` to write your own.

``plan(keys, *, prefill, decode=None, helpers=())`` returns a :class:`dualkv.Plan` whose ranges tile ``keys`` in order.
A policy sees :class:`NodeView` values only: no clock, no I/O.
"""

from dualkv._dualkv import DecodeOnly, NodeView, PathPolicy, PrefillOnly, RoundRobin, ShortestQueue, Split

__all__ = ["DecodeOnly", "NodeView", "PathPolicy", "PrefillOnly", "RoundRobin", "ShortestQueue", "Split"]
