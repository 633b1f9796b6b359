"""Load of every link for P prefill and D decode nodes: equations 1 to 9 of DualPath, section 4.2.

Only KV that is read from storage counts. New KV, its writes to storage and the model's own traffic come on top.
"""

import math
from dataclasses import dataclass

from dualkv.errors import invalid
from dualkv.planner.hardware import Hardware

SNICS = ("PE SNIC", "DE SNIC")
_CLOSE = 1e-9


@dataclass(frozen=True)
class Link:
    """One link, of one GPU (CNIC) or of one node (SNIC, DRAM); bytes/s."""

    name: str
    load: float
    capacity: float

    @property
    def share(self) -> float:
        """1 is full."""
        return self.load / self.capacity


@dataclass(frozen=True)
class Range:
    """P/D for which no link is asked for more than it has while every storage NIC is full.

    ``lower_links`` and ``upper_links`` are full at that end. When the range is empty, ``reason`` says why, and the
    ends are what the equations give.
    """

    lower: float
    upper: float
    lower_links: tuple[str, ...]
    upper_links: tuple[str, ...]
    reason: str = ""

    @property
    def empty(self) -> bool:
        """Whether no ratio will do."""
        return bool(self.reason)

    def contains(self, ratio: float) -> bool:
        """Ends included."""
        return not self.empty and self.lower * (1 - _CLOSE) <= ratio <= self.upper * (1 + _CLOSE)


def links(node: Hardware, prefill: int, decode: int, *, dual: bool = True) -> tuple[Link, ...]:
    """Every link while the storage NICs are full: of all nodes or, without ``dual``, of the prefill nodes."""
    if prefill < 1 or decode < 1:
        raise invalid(f"{prefill} prefill and {decode} decode nodes: at least one of each")
    return links_at(node, prefill / decode, dual=dual)


def links_at(node: Hardware, ratio: float, *, dual: bool = True) -> tuple[Link, ...]:
    """The same for any P/D.

    With T_p and T_c the paper's bytes/s of a pair of one PE and one DE, ``pe`` is T_p*D*g and ``de`` is T_c*P*g:
    what one GPU's share of its own node's SNIC brings.
    """
    pe = node.snic / node.gpus
    de = pe if dual else 0.0
    g = node.gpus
    return (
        Link("PE CNIC read", 2 * pe, node.cnic),
        Link("PE CNIC write", pe + de / ratio, node.cnic),
        Link("DE CNIC read", pe * ratio + 2 * de, node.cnic),
        Link("DE CNIC write", 2 * pe * ratio + de, node.cnic),
        Link("PE DRAM", 2 * pe * g, node.dram),
        Link("DE DRAM", (2 * pe * ratio + 3 * de) * g, node.dram),
        Link("PE SNIC", node.snic, node.snic),
        Link("DE SNIC", node.snic if dual else 0.0, node.snic),
    )


def busiest(of: tuple[Link, ...]) -> Link:
    """The fullest link that isn't a storage NIC; those are full by assumption."""
    return max((link for link in of if link.name not in SNICS), key=lambda link: link.share)


def feasible(node: Hardware) -> Range:
    """Equation 9, with equation 1 as s <= g/2 (2 * T_p * D * g <= B; the paper says s <= g)."""
    s, g = node.s, node.gpus
    lower = s / (g - s) if s < g else math.inf
    uppers = {
        "DE CNIC read": (g - 2 * s) / s,
        "DE CNIC write": (g - s) / (2 * s),
        "DE DRAM": (node.dram / node.snic - 3) / 2,
    }
    upper = min(uppers.values())
    binding = tuple(name for name, end in uppers.items() if math.isclose(end, upper, rel_tol=_CLOSE, abs_tol=_CLOSE))
    return Range(lower, upper, ("PE CNIC write",), binding, _why_empty(node, lower, upper, binding))


def _why_empty(node: Hardware, lower: float, upper: float, binding: tuple[str, ...]) -> str:
    fixed = [link for link in links_at(node, 1.0) if link.name in ("PE CNIC read", "PE DRAM") and _over(link)]
    if fixed:
        return f"{fixed[0].name} would need {fixed[0].share:.0%} of its capacity at any P/D"
    names = " and ".join(binding)
    if upper <= _CLOSE:
        return f"{names} would be full, or more, however few the prefill nodes are"
    if lower > upper * (1 + _CLOSE):
        return f"PE CNIC write needs P/D of at least {lower:.3g}, {names} at most {upper:.3g}"
    return ""


def _over(link: Link) -> bool:
    return link.share > 1 + _CLOSE


def gain(prefill: int, decode: int) -> float:
    """What both paths read over what the prefill nodes alone do, where storage binds: 1 + D/P."""
    return 1 + decode / prefill
