"""Ready configuration of two lanes, every line with its reason. Nothing is applied here."""

from dataclasses import dataclass

from dualkv.errors import invalid
from dualkv.lanes import LANES

FABRICS = ("infiniband", "roce", "ethernet")
SHARE = 0.99
"""Of a link that HIGH is guaranteed while both lanes want it (paper 5.1: about 99 %)."""

_PAPER_HIGH_LIMIT = 240  # paper A.1; 255 would shut LOW out
_MOST_HIGH_LIMIT = 254
_MTU = 1500
_LOW_PRIORITY, _HIGH_PRIORITY = LANES["low"].dscp >> 3, LANES["high"].dscp >> 3


@dataclass(frozen=True)
class Line:
    """A line of a configuration file, or a command, and why it is there."""

    text: str
    why: str


@dataclass(frozen=True)
class Section:
    """Lines that belong to one place."""

    place: str
    lines: tuple[Line, ...]


def plan_fabric(
    fabric: str, *, share: float | None = None, interface: str = "eth0", rate: int = 12_500_000_000
) -> list[Section]:
    """What to set, and where.

    Args:
        fabric: ``infiniband``, ``roce`` or ``ethernet``.
        share: of a link for HIGH while both lanes want it, in [0.5, 1); None for the paper's.
        interface: of the network card, where it is named.
        rate: of its link, bytes/s (``ethernet``).

    Raises:
        Error: ``invalid_argument``.
    """
    if fabric not in FABRICS:
        raise invalid(f"fabric {fabric!r}: give one of {', '.join(FABRICS)}")
    check_link(rate, SHARE if share is None else share)
    if fabric == "infiniband":
        return _infiniband(share)
    if fabric == "roce":
        return _roce(share or SHARE, interface)
    return [
        Section(
            f"every node, as root: {interface}",
            (_segments_line(interface), *htb_lines(interface, rate, share or SHARE)),
        ),
        Section(
            "every switch",
            (
                Line(
                    f"# trust DSCP; DSCP {LANES['high'].dscp} to a queue of strict priority, "
                    f"DSCP {LANES['low'].dscp} to one of weight 1",
                    "HTB orders what a node sends; where flows of several nodes meet, the switch has to.",
                ),
            ),
        ),
    ]


def check_link(rate: int, share: float) -> None:
    """Raises Error, ``invalid_argument``, for a rate or a share that no link should have."""
    if not 0.5 <= share < 1:
        raise invalid(f"share {share}: must be in [0.5, 1): LOW must get something, or its transfers never end")
    if rate < 1_000_000:
        raise invalid(f"rate {rate}: must be 1 MB/s or more")


def _segments_line(interface: str) -> Line:
    return Line(
        f"ip link set dev {interface} gso_max_segs 1",
        "Packets of one MTU: behind a 64 KiB super-packet of LOW, HIGH would wait 44 times as long.",
    )


def htb_lines(interface: str, rate: int, share: float) -> tuple[Line, ...]:
    """Commands that put two lanes on what ``interface`` sends. The testbed runs the same: on its links a packet takes
    no time, however large."""
    total = _kbit(rate)
    low = max(1, round(total * (1 - share)))
    high, device = LANES["high"], f"dev {interface}"
    return (
        *_link_lines(
            interface, rate, 20, "What carries no mark goes to LOW (class 20): who asks for nothing delays nobody."
        ),
        Line(
            f"tc class add {device} parent 1:1 classid 1:10 htb rate {total - low}kbit ceil {total}kbit "
            f"{_burst(rate)} prio 0 quantum {_MTU}",
            "HIGH: its share is guaranteed, and it may use all of the link.",
        ),
        Line(
            f"tc class add {device} parent 1:1 classid 1:20 htb rate {low}kbit ceil {total}kbit "
            f"burst {2 * _MTU} cburst {2 * _MTU} prio 7 quantum {_MTU}",
            "LOW: so little is guaranteed that it always ends, and all that HIGH leaves is lent to it, after HIGH.",
        ),
        Line(
            f"tc qdisc add {device} parent 1:10 handle 10: pfifo limit 1000",
            "HIGH's queue: a burst of an all-to-all must not be dropped.",
        ),
        Line(
            f"tc qdisc add {device} parent 1:20 handle 20: pfifo limit 200",
            "LOW's queue: short, so that TCP notices soon how little is left.",
        ),
        Line(
            f"tc filter add {device} parent 1: protocol ip prio 1 u32 match ip tos {high.tos:#04x} 0xfc flowid 1:10",
            f"DSCP {high.dscp} (high_dscp, docs/settings.md) is HIGH.",
        ),
    )


def queue_lines(interface: str, rate: int) -> tuple[Line, ...]:
    """One queue of the same rate for everything: what lanes are compared with."""
    return _link_lines(interface, rate, 1, "Everything waits in one queue.")


def _link_lines(interface: str, rate: int, default: int, why: str) -> tuple[Line, ...]:
    device = f"dev {interface}"
    return (
        Line(f"tc qdisc replace {device} root handle 1: htb default {default}", why),
        Line(
            f"tc class add {device} parent 1: classid 1:1 htb rate {_kbit(rate)}kbit {_burst(rate)} quantum {_MTU}",
            "The link, as --rate says; give a little less, or packets queue in the card, where nobody orders them.",
        ),
    )


def _kbit(rate: int) -> int:
    return 8 * rate // 1000


def _burst(rate: int) -> str:
    """Of 0.1 ms."""
    size = max(2 * _MTU, rate // 10_000)
    return f"burst {size} cburst {size}"


def _infiniband(share: float | None) -> list[Section]:
    limit = _PAPER_HIGH_LIMIT if share is None else min(_MOST_HIGH_LIMIT, max(1, round(share / (1 - share))))
    return [
        Section(
            "opensm.conf, where the subnet manager runs",
            (
                Line("qos TRUE", "Without it OpenSM writes no SL2VL and no arbitration tables."),
                Line("qos_max_vls 4", "Four data lanes: the paper's, and what most switches have at full buffers."),
                Line(
                    f"qos_high_limit {limit}",
                    f"{limit} x 4 KiB of the high table may pass before the low one gets a packet: HIGH has "
                    f"{limit / (limit + 1):.1%}. 255 would shut LOW out; 0 would be one packet.",
                ),
                Line(
                    "qos_vlarb_high 0:192,1:192,2:0,3:192",
                    "Lanes 0, 1 and 3 carry the model's traffic; lane 2, KV, has no turn in the high table.",
                ),
                Line(
                    "qos_vlarb_low 0:192,1:192,2:64,3:192",
                    "Where the low table has its turn, lane 2 shares it with what HIGH has left over: KV always ends.",
                ),
                Line(
                    "qos_sl2vl 0,1,2,3,0,1,2,3,0,1,2,3,0,1,2,3",
                    "Service level n travels on lane n mod 4: KV's queue pairs take SL 2, the model's 0, 1 or 3. The "
                    "paper does not give this line.",
                ),
            ),
        ),
        Section(
            "every process",
            (
                Line("export NCCL_IB_SL=0", "The model's collectives on a lane of the high table."),
                Line("# KV: service level 2", "Whatever moves KV sets `sl = 2` in its address vectors."),
            ),
        ),
        Section(
            "to see what is in force",
            (
                Line("smpquery sl2vl -D 0", "The mapping of this port."),
                Line("smpquery vlarb -D 0", "Its arbitration tables; some firmware ignores weights of 0."),
            ),
        ),
    ]


def _roce(share: float, interface: str) -> list[Section]:
    low, high = LANES["low"], LANES["high"]
    percent = max(1, round(100 * (1 - share)))
    weights = [0] * 8
    weights[_LOW_PRIORITY] = percent
    weights[0] = 1  # what carries no mark
    weights[_HIGH_PRIORITY] = 100 - percent - 1
    lossless = ["1" if i in (_LOW_PRIORITY, _HIGH_PRIORITY) else "0" for i in range(8)]
    return [
        Section(
            f"every node, as root: {interface}",
            (
                Line(
                    f"mlnx_qos -i {interface} --trust dscp",
                    "The card and the switch look at the DSCP, which survives routing, not at VLAN priorities.",
                ),
                *(
                    Line(
                        f"mlnx_qos -i {interface} --dscp2prio set,{marks.dscp},{marks.dscp >> 3}",
                        f"{name} packets carry DSCP {marks.dscp}: priority {marks.dscp >> 3}, as usual, made sure.",
                    )
                    for name, marks in (("LOW", low), ("HIGH", high))
                ),
                Line(
                    f"mlnx_qos -i {interface} --prio_tc 0,1,2,3,4,5,6,7",
                    "Each priority has a traffic class, that is a hardware queue, of its own.",
                ),
                Line(
                    f"mlnx_qos -i {interface} --tsa {','.join(['ets'] * 8)} --tcbw {','.join(map(str, weights))}",
                    f"Weights: HIGH (class {_HIGH_PRIORITY}) {weights[_HIGH_PRIORITY]} %, LOW (class {_LOW_PRIORITY}) "
                    f"{percent} %. They count only while both want the link; what one leaves, the other gets.",
                ),
                Line(
                    f"mlnx_qos -i {interface} --pfc {','.join(lossless)}",
                    "Both lanes are lossless, each paused alone: RoCE recovers badly from loss, and a paused LOW must "
                    "not pause HIGH.",
                ),
                *(
                    Line(
                        f"echo 1 > /sys/class/net/{interface}/ecn/{role}/enable/{priority}",
                        "Congestion slows the sender down (DCQCN) before PFC has to stop it.",
                    )
                    for role in ("roce_np", "roce_rp")
                    for priority in (_LOW_PRIORITY, _HIGH_PRIORITY)
                ),
            ),
        ),
        Section(
            "every process",
            (
                Line(
                    f"export NCCL_IB_TC={high.tos}",
                    f"The model's collectives: DSCP {high.dscp}, shifted by the two bits of ECN.",
                ),
                Line(
                    f"# KV: traffic class {low.tos}",
                    f"Whatever moves KV sets DSCP {low.dscp}; over tcp dualkv does (low_dscp).",
                ),
            ),
        ),
        Section(
            "every switch",
            (
                Line(
                    f"# trust DSCP; both DSCPs to lossless queues, weights {100 - percent}:{percent}, PFC, ECN",
                    "The card orders what one node sends; where flows of several nodes meet, the switch has to.",
                ),
            ),
        ),
    ]
