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
from dualkv.testbed.storage import ReadLimit, groups, remove_group

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
        storage: bytes/s that each node reads from the disk under ``path``, its storage NIC; 0 for no limit.

    Raises:
        Error: ``unsupported``, with the cure, without root, iproute2 or the kernel's namespaces, veth, bridge and HTB;
            ``invalid_argument``.
    """

    __test__ = False  # for pytest
    _numbers = itertools.count()

    def __init__(
        self,
        nodes: int = 2,
        *,
        rate: int = 125_000_000,
        lanes: bool = True,
        share: float = SHARE,
        storage: int = 0,
        path: str | os.PathLike[str] = ".",
    ) -> None:
        if not 2 <= nodes <= _MOST_NODES:
            raise invalid(f"testbed: nodes = {nodes}: must be 2 to {_MOST_NODES}")
        check_link(rate, share)
        self.nodes = nodes
        self._rate, self._lanes, self._share = rate, lanes, share
        self._number = next(self._numbers)
        self._limits = [ReadLimit(self._name(str(node)), path, storage) for node in range(nodes if storage else 0)]
        self._held = contextlib.ExitStack()

    def _name(self, what: str) -> str:
        return f"{_PREFIX}-{os.getpid()}-{self._number}-{what}"

    def address(self, node: int) -> str:
        """IPv4, on the testbed only."""
        return f"10.255.77.{node + 1}"

    def prefix(self, node: int) -> list[str]:
        """Put before a command, runs it on the node."""
        limited = self._limits[node].prefix() if self._limits else []
        return [*limited, "ip", "netns", "exec", self._name(str(node))]

    def __enter__(self) -> "Testbed":
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise Error(f"testbed: there is no `{tool}`: apt install iproute2", "unsupported")
        if os.geteuid() != 0:
            raise Error("testbed: network namespaces need root: run it with sudo", "unsupported")
        remove_leftovers()
        try:
            self._build()
            for limit in self._limits:
                self._held.enter_context(limit)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._name("*"))
        self._held.close()

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
    """Removes namespaces and cgroups of testbeds whose process is gone."""
    pattern = f"{_PREFIX}-*-*"
    for name in [path.name for path in _NAMESPACES.glob(pattern)] + groups(pattern):
        found = re.fullmatch(rf"{_PREFIX}-(\d+)-\d+-\w+", name)
        if found and not pathlib.Path(f"/proc/{found[1]}").exists():
            _remove(name)
            remove_group(name)
