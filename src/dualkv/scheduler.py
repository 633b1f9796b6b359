"""Which engines a request gets, and which side reads its KV; and batches of a prefill engine (paper 6.1 and 6.2).

Everything is told, nothing is looked up: no clock, no thread, no I/O. The same calls give the same answers.
"""

from collections.abc import Sequence
from typing import Literal

from dualkv import _dualkv
from dualkv._dualkv import Assignment, AttentionModel, EngineReport, Fetched, Placement
from dualkv.errors import invalid

__all__ = [
    "Assignment",
    "AttentionModel",
    "EngineReport",
    "Fetched",
    "Placement",
    "Scheduler",
    "select_batch",
]


class Scheduler(_dualkv.Scheduler):
    """Prefill engines by Algorithm 1, decode engines in two phases, then the side with the shorter read queue.

    Engines form groups of one role; the leader of a group calls :meth:`fetch` for all of them whenever it likes, with
    what they report, and passes on what they get. Requests wait in one queue for a prefill engine, first come first
    served; those that have one are dealt to the groups of decode engines, and wait there for memory. What was assigned
    and is not in an engine's report yet (``EngineReport.seen``) is added to it, so reports may be late, repeated or
    missing. Not thread-safe.

    ``fetch(group, reports)`` returns ``assignments`` (``request, engine, number, reason``), ``placements`` (``request,
    prefill, decode, read, number, reason``: both engines are known, and ``read`` says on which side storage is read)
    and ``refused`` (no engine of the group could ever hold them). An engine reports the largest ``number`` it has
    taken in, 0 if none since it joined; reports from before it left and joined again are ignored.

    Args:
        short_queue_tokens: alpha: tokens a node reads in 3 s. Engines of nodes with a longer read queue come later.
        full_tokens: beta: tokens an engine computes in 5 s. Prefill engines with more get nothing.
        even_slack: decode engines beyond this many times the mean are taken only when no other has memory.
        max_waiting: requests that may wait; :meth:`submit` raises Error ``no_space`` beyond.

    ``submit(request, tokens, hit_tokens)``, ``prefilled(request)`` and ``finished(request)`` tell of requests (any
    integer ids), ``leave(engine)`` of an engine that is gone: it returns the requests that wait again, for the other
    engine to drop.
    """

    def join(self, engine: str, role: Literal["prefill", "decode"], *, group: str, node: str) -> None:
        """A new engine.

        Args:
            group: fetches as one; all of its engines have the same role.
            node: whose storage NIC the engine reads with.

        Raises:
            Error: ``invalid_argument`` for a name that is taken, or a group of the other role.
        """
        if role not in ("prefill", "decode"):
            raise invalid(f"scheduler: role {role!r}: must be prefill or decode")
        self._join(engine, role == "prefill", group, node)


def select_batch(model: AttentionModel, waiting: Sequence[tuple[int, int]], quota_s: float = 0.3) -> list[int]:
    """Tokens to compute now of each of the first waiting prefills, so that attention takes at most ``quota_s``.

    Args:
        model: of the engine; :meth:`AttentionModel.fit` makes one from measured batches.
        waiting: (cached tokens, tokens to compute) in order.

    Returns:
        One number a chosen prefill; the last may be a part of its own, the largest chunk that fits.
    """
    return list(_dualkv.select_batch(model, list(waiting), quota_s))
