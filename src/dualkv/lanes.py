"""The two lanes, as marks on packets: HIGH for the model's own traffic, LOW for KV."""

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Marks:
    """``dscp``: in the IP header, 0 to 63; ``so_priority``: queueing class of this host, 0 to 15.

    ``service_level``: of RDMA queue pairs, 0 to 15.
    """

    dscp: int
    so_priority: int
    service_level: int

    @property
    def tos(self) -> int:
        """The byte of the IP header: the DSCP and two bits of ECN."""
        return self.dscp << 2


LANES = {"low": Marks(8, 1, 2), "high": Marks(46, 6, 0)}
"""Defaults of every node (docs/settings.md)."""


def mark(sock: socket.socket, lane: str) -> None:
    """Puts what an IPv4 or IPv6 socket sends on a lane. Raises OSError where the kernel refuses a mark."""
    marks = LANES[lane]
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, marks.tos)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, marks.tos)
    # The priority comes second: setting the TOS changes it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, marks.so_priority)
