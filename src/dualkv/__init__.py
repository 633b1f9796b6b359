"""dualkv: move KV cache between storage and inference engines over two paths.

Start with :class:`Node`; ``docs/embedding.md`` walks through a whole engine.
"""

from dualkv._dualkv import Path, PathRange, Plan
from dualkv.errors import Error
from dualkv.geometry import KvGeometry, block_keys, checksum
from dualkv.gpu import Gpu, gpus
from dualkv.node import Grant, Incoming, LayerGates, Load, Node, Peer
from dualkv.paged import PagedKv
from dualkv.policy import (
    DecodeOnly,
    NodeView,
    PathPolicy,
    PrefillOnly,
    Recompute,
    RoundRobin,
    ShortestQueue,
    Split,
)
from dualkv.scheduler import EngineReport, Scheduler
from dualkv.storage import StagingPool, Store
from dualkv.timeline import chrome_trace
from dualkv.waiting import Notifier, Operation

__version__ = "0.1.0"

__all__ = [
    "DecodeOnly",
    "EngineReport",
    "Error",
    "Gpu",
    "Grant",
    "Incoming",
    "KvGeometry",
    "LayerGates",
    "Load",
    "Node",
    "NodeView",
    "Notifier",
    "Operation",
    "PagedKv",
    "Path",
    "PathPolicy",
    "PathRange",
    "Peer",
    "Plan",
    "PrefillOnly",
    "Recompute",
    "RoundRobin",
    "Scheduler",
    "ShortestQueue",
    "Split",
    "StagingPool",
    "Store",
    "block_keys",
    "checksum",
    "chrome_trace",
    "gpus",
]
