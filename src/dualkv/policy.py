"""Path policies: which node reads which blocks. Subclass :class:`PathPolicy` to write your own.

``plan(keys, *, prefill, decode=None, helpers=())`` returns a :class:`dualkv.Plan` whose ranges tile its keys in order:
the given ones, or the first of them (see :class:`Recompute`). A policy sees :class:`NodeView` values only: no clock,
no I/O.

A side is done with so many bytes when it has read what is queued before them, at its measured rate, and its link has
carried them behind what is in flight there; staging limits what it takes at once. :class:`ShortestQueue`,
:class:`Split` and :class:`Recompute` choose by these times; nothing is set by hand that is measured.

``ShortestQueue(*, margin=0.1)``: the whole hit to the side that is done first (paper 6.1). It stays with the side it
took last unless another is sooner by ``margin`` of the request's own reading time.

``Split(*, max_sides=4, helper_blocks=4, helper_gain=0.1)``: shares that end at one instant, over at most ``max_sides``
nodes. Helpers with fewer than ``helper_blocks`` blocks are left out, and all of them unless the hit is there sooner by
``helper_gain`` of the time it takes without them; to be there before ``compute_queue_s`` is over is no gain. Parts wait
in staging for each other: where prefill or decode node has no free staging for the whole hit, and one of them has it in
half of ``compute_queue_s``, that one reads it all.
"""

from dualkv import _dualkv
from dualkv._dualkv import DecodeOnly, NodeView, PathPolicy, PrefillOnly, RoundRobin, ShortestQueue, Split

__all__ = [
    "POLICIES",
    "DecodeOnly",
    "NodeView",
    "PathPolicy",
    "PrefillOnly",
    "Recompute",
    "RoundRobin",
    "ShortestQueue",
    "Split",
]


class Recompute(_dualkv.Recompute):
    """Plans with another policy, but leaves the hit's last blocks to the engine where computing is sooner than loading.

    For storage that is slower than compute: where a block takes longer to compute than to read behind no queue, all is
    loaded, however long the queue is. Else each request would gain and all of them would wait for the engine.

    Storage brings the first blocks while the engine works off what it has; the boundary is where both are done. Then
    ``plan.keys`` are only the blocks that are loaded, and ``plan.recompute_blocks`` those behind them: prefill begins
    behind ``len(plan.keys)`` blocks. Nothing is recomputed for a prefill view without ``compute_queue_s`` (pass
    ``node.view(compute_queue_s=...)``, which says that the caller minds the boundary), nor before :meth:`observe` has
    seen 16 prefills.

    Args:
        inner: plans what is loaded; a :class:`Split` if not given.
        margin: of the time until the hit is there; what recomputing gains must be that at least, or all is loaded.

    ``observe(cached, tokens, seconds)``: computing ``tokens`` new tokens behind ``cached`` ones took ``seconds``, waits
    for loads left out. Engines call it after each prefill; later ones count more.
    """

    def __init__(self, inner: PathPolicy | None = None, *, margin: float = 0.1) -> None:
        super().__init__(Split() if inner is None else inner, margin=margin)


POLICIES: dict[str, type[PathPolicy]] = {
    "prefill_only": PrefillOnly,
    "decode_only": DecodeOnly,
    "round_robin": RoundRobin,
    "shortest_queue": ShortestQueue,
    "split": Split,
    "recompute": Recompute,
}
"""By the names that configurations and command lines use."""
