"""The ways to load hits that are compared, each a step beyond the one before."""

from collections.abc import Callable
from dataclasses import dataclass

from dualkv.policy import PathPolicy, Recompute, RoundRobin, Split
from dualkv.sim.engines import Compute

_HELPERS = 3  # idle nodes that are offered to a split


@dataclass(frozen=True)
class Mode:
    """One way to load hits.

    Attributes:
        free: loads and transfers cost nothing.
        layerwise: transfers run beside the compute, layer by layer.
        staged: reads go through the bounded staging of dual-path nodes.
        scheduled: engines, batches and reading sides by the paper's scheduler; else by turns.
        policy: who reads; None: the scheduler's choice, or the prefill node.
        helpers: nodes besides prefill and decode that are offered to the policy.
    """

    text: str
    free: bool = False
    layerwise: bool = True
    staged: bool = False
    scheduled: bool = False
    policy: Callable[[Compute], PathPolicy] | None = None
    helpers: int = 0


def observed(policy: Recompute, compute: Compute) -> Recompute:
    """The policy, after it has seen some prefills of such an engine."""
    for cached in (2_000, 8_000, 16_000, 48_000):
        for tokens in (100, 500, 1_000, 2_000):
            policy.observe(cached, tokens, compute.forward_s + compute.prefill_s(cached, tokens))
    return policy


MODES: dict[str, Mode] = {
    "basic": Mode("the prefill node reads; hits are copied before they are used", layerwise=False),
    "layerwise": Mode("the same, layer by layer beside the compute"),
    "dualpath": Mode("prefill and decode node read by turns", staged=True, policy=lambda _: RoundRobin()),
    "scheduled": Mode("the paper's scheduler chooses engines, batches and who reads", staged=True, scheduled=True),
    "split": Mode(
        "each hit is read by both its nodes", staged=True, scheduled=True, policy=lambda _: Split(max_sides=2)
    ),
    "nway": Mode(
        "and by idle nodes", staged=True, scheduled=True, policy=lambda _: Split(max_sides=4), helpers=_HELPERS
    ),
    "recompute": Mode(
        "and what takes longer to load than to compute is computed",
        staged=True,
        scheduled=True,
        policy=lambda compute: observed(Recompute(Split(max_sides=4)), compute),
        helpers=_HELPERS,
    ),
    "oracle": Mode("hits and transfers cost nothing", free=True, scheduled=True),
}
"""By name; ``scheduled`` is the paper's DualPath, ``oracle`` its Oracle."""
