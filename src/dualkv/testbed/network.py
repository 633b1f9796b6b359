"""Namespaces joined by a bridge. A link is a veth pair: both of its ends are shaped, as a NIC and a switch port are."""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Sequence

from dualkv.errors import Error, invalid
from dualkv.fabric.plan import SHARE, check_link, htb_lines, queue_lines

_PREFIX = "dualkv"
_NAMESPACES = pathlib.Path("/run/netns")
_MOST_NODES = 64


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Error(f"testbed: `{' '.join(command)}`: {done.stderr.strip() or done.returncode}", "unsupported")
    return done.stdout


class Testbed:
    """So many nodes, each with one NIC of ``rate`` bytes/s at one switch. A context manager; leaves nothing behind.

    Args:
        lanes: HIGH and LOW as ``dualkv fabric plan --fabric ethernet`` sets them, on every link in both directions;
            else one queue of the same rate.
        share: of a link for HIGH while both lanes want it.

    Raises:
        Error: ``unsupported``, with the cure, without root, iproute2 or the kernel's namespaces, veth, bridge and HTB;
            ``invalid_argument``.
    """

    __test__ = False  # for pytest
    _numbers = itertools.count()

    def __init__(self, nodes: int = 2, *, rate: int = 125_000_000, lanes: bool = True, share: float = SHARE) -> None:
        if not 2 <= nodes <= _MOST_NODES:
            raise invalid(f"testbed: nodes = {nodes}: must be 2 to {_MOST_NODES}")
        check_link(rate, share)
        self.nodes = nodes
        self._rate, self._lanes, self._share = rate, lanes, share

        self._number = next(self._numbers)

    def _name(self, what: str) -> str:
        return f"{_PREFIX}-{os.getpid()}-{self._number}-{what}"

    def address(self, node: int) -> str:
        """IPv4, on the testbed only."""
        return f"10.255.77.{node + 1}"

    def prefix(self, node: int) -> list[str]:
        """Put before a command, runs it on the node."""
        return ["ip", "netns", "exec", self._name(str(node))]

    def __enter__(self) -> "Testbed":
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise Error(f"testbed: there is no `{tool}`: apt install iproute2", "unsupported")
        if os.geteuid() != 0:
            raise Error("testbed: network namespaces need root: run it with sudo", "unsupported")
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._name("*"))

    def _build(self) -> None:
        switch = self._name("switch")
        _run(["ip", "netns", "add", switch])
        _run(["ip", "-n", switch, "link", "add", "switch", "type", "bridge"])
        _run(["ip", "-n", switch, "link", "set", "switch", "up"])
        for node in range(self.nodes):
            name, port = self._name(str(node)), f"port{node}"
            _run(["ip", "netns", "add", name])
            pair = ["type", "veth", "peer", "name", port, "netns", switch]
            _run(["ip", "link", "add", "nic", "netns", name, *pair])
            _run(["ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "nic"])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
            _run(["ip", "-n", name, "link", "set", "nic", "up"])
            _run(["ip", "-n", switch, "link", "set", port, "master", "switch"])
            _run(["ip", "-n", switch, "link", "set", port, "up"])
            self._shape(name, "nic")
            self._shape(switch, port)

    def _shape(self, namespace: str, interface: str) -> None:
        lanes = htb_lines(interface, self._rate, self._share)
        for line in lanes if self._lanes else queue_lines(interface, self._rate):
            _run(["ip", "netns", "exec", namespace, *line.text.split()])


def _remove(names: str) -> None:
    for path in _NAMESPACES.glob(names):
        with contextlib.suppress(Error):
            _run(["ip", "netns", "del", path.name])


def remove_leftovers() -> None:
    """Removes namespaces of testbeds whose process is gone."""
    for path in _NAMESPACES.glob(f"{_PREFIX}-*-*"):
        found = re.fullmatch(rf"{_PREFIX}-(\d+)-\d+-\w+", path.name)
        if found and not pathlib.Path(f"/proc/{found[1]}").exists():
            _remove(path.name)
