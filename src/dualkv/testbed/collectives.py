"""What a model's collectives would send on HIGH: every node exchanges messages with every other."""

import contextlib
import itertools

from dualkv.fabric.measure import Flow
from dualkv.testbed.network import Testbed

_END_S = 30.0


class AllToAll:
    """An all-to-all on HIGH between all nodes of a testbed, an exchange of each pair every ``interval_s``.

    A context manager that keeps a server on each node; :meth:`start` and :meth:`stop` as often as wanted.

    Args:
        size: bytes of a message, each way.

    Raises:
        Error: ``io``, ``timeout`` if a flow ends early.
    """

    def __init__(self, bed: Testbed, *, size: int = 16 << 10, interval_s: float = 0.005) -> None:
        self._bed, self._size, self._interval_s = bed, size, interval_s
        self._servers = contextlib.ExitStack()
        self._running = contextlib.ExitStack()
        self._ports: list[int] = []
        self._flows: list[Flow] = []

    def __enter__(self) -> "AllToAll":
        with contextlib.ExitStack() as servers:
            for node in range(self._bed.nodes):
                prefix, host = self._bed.prefix(node), self._bed.address(node)
                server = servers.enter_context(Flow(prefix, op="serve", host=host))
                self._ports.append(server.first_line()["port"])
            self._servers = servers.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()
        self._servers.close()

    def start(self) -> None:
        """Returns while processes are still starting."""
        for sender, receiver in itertools.permutations(range(self._bed.nodes), 2):
            flow = Flow(
                self._bed.prefix(sender),
                op="rounds",
                host=self._bed.address(receiver),
                port=self._ports[receiver],
                lane="high",
                size=self._size,
                interval_s=self._interval_s,
            )
            self._flows.append(self._running.enter_context(flow))

    def stop(self) -> list[float]:
        """Seconds of each exchange since :meth:`start`, of all pairs."""
        out = [seconds for flow in self._flows for seconds in flow.result(_END_S)]
        self._flows.clear()
        self._running.close()
        return out
