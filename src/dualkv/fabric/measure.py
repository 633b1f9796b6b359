"""Are lanes real? HIGH alone, HIGH beside a saturated LOW, and what LOW gets of the rest."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualkv.errors import Error

MOST_LATENCY = 1.5
"""Of HIGH's idle latency, median and 99th percentile, beside a saturated LOW."""
LEAST_HIGH = 0.95
"""Of HIGH's throughput alone, beside a saturated LOW."""

FLOWS = 6
"""That :func:`measure_lanes` measures, one after the other."""

_MESSAGE_BYTES = 64
_CONNECTIONS = {"low": 4, "high": 2}
_SETTLE_S = 0.7  # until LOW's queues are full
_SLACK_S = 30.0


@dataclass(frozen=True)
class LaneReport:
    """Latencies in microseconds, rates in bytes/s."""

    idle_p50_us: float
    idle_p99_us: float
    loaded_p50_us: float
    loaded_p99_us: float
    low_alone: float
    high_alone: float
    high_beside: float
    low_beside_half: float
    high_half: float

    @property
    def p50_ratio(self) -> float:
        """Loaded over idle."""
        return self.loaded_p50_us / self.idle_p50_us

    @property
    def p99_ratio(self) -> float:
        """Loaded over idle."""
        return self.loaded_p99_us / self.idle_p99_us

    @property
    def leakage(self) -> float:
        """Of HIGH's throughput alone, what LOW takes of it: 0 for perfect lanes (tebench's isolation leakage)."""
        return max(0.0, 1 - self.high_share)

    @property
    def high_share(self) -> float:
        """Of its throughput alone."""
        return self.high_beside / self.high_alone

    @property
    def low_of_rest(self) -> float:
        """What LOW gets of what a HIGH at half of the link leaves: 1 for all of it."""
        return self.low_beside_half / max(1.0, max(self.low_alone, self.high_alone) - self.high_half)

    def missed(self) -> list[str]:
        """What real lanes would do, and these do not."""
        out = [
            f"HIGH's {name} latency is {ratio:.2f}x of idle beside a saturated LOW (at most {MOST_LATENCY}x)"
            for name, ratio in (("p50", self.p50_ratio), ("p99", self.p99_ratio))
            if ratio > MOST_LATENCY
        ]
        if self.high_share < LEAST_HIGH:
            out.append(f"HIGH keeps {self.high_share:.2f} of its throughput beside LOW (at least {LEAST_HIGH})")
        return out

    @property
    def isolated(self) -> bool:
        """HIGH does not notice LOW. What LOW gets is another matter: :attr:`low_of_rest`."""
        return not self.missed()

    def to_json(self) -> dict[str, Any]:
        """What was measured, then what follows from it."""
        found = {
            name: getattr(self, name) for name in ("p50_ratio", "p99_ratio", "leakage", "high_share", "low_of_rest")
        }
        return {**dataclasses.asdict(self), **found, "isolated": self.isolated, "missed": self.missed()}


class Flow:
    """A process of :mod:`dualkv.fabric.flows`; ends with its block."""

    def __init__(self, prefix: Sequence[str], **request: Any) -> None:
        command = [*prefix, sys.executable, "-m", "dualkv.fabric.flows", json.dumps(request)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise Error(f"lanes: can't start {command[0]!r}: {error.strerror}", "io", error.errno or 0) from error

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def first_line(self) -> Any:
        """What it says first. Raises Error, ``io``, if it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Error("lanes: a flow ended before it began", "io")
        return json.loads(line)

    def result(self, timeout_s: float) -> Any:
        """What it says at its end. Raises Error: ``io``, ``timeout``."""
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Error("lanes: a flow did not end in time: nothing gets through", "timeout") from error
        if not out.strip():
            raise Error(f"lanes: a flow failed with exit code {self._process.returncode}", "io")
        answer = json.loads(out)
        if isinstance(answer, dict) and "error" in answer:
            raise Error(f"lanes: {answer['error']}; is `dualkv fabric serve` running there?", "io")
        return answer


def measure_lanes(
    host: str, port: int, *, prefix: Sequence[str] = (), seconds: float = 3.0, step: Callable[[], None] = lambda: None
) -> LaneReport:
    """Measures the lanes between this node and a :class:`~dualkv.fabric.flows.FlowServer` on another.

    Args:
        prefix: of commands that are to run on the sending node, such as ``ip netns exec NAME``.
        seconds: of each flow that is measured.
        step: called after each of the :data:`FLOWS`.

    Raises:
        Error: ``io`` or ``timeout`` if the server is not there or nothing gets through.
    """
    at = {"host": host, "port": port}

    def flood(lane: str, seconds: float, rate: int = 0) -> Flow:
        return Flow(prefix, op="flood", lane=lane, connections=_CONNECTIONS[lane], seconds=seconds, rate=rate, **at)

    def rate_of(flow: Flow) -> float:
        counted = flow.result(seconds + _SLACK_S)
        return float(counted["bytes"] / max(counted["seconds"], 1e-9))

    def alone(lane: str) -> float:
        with flood(lane, seconds) as flow:
            rate = rate_of(flow)
        step()
        return rate

    def latency() -> "np.ndarray[Any, Any]":
        with Flow(prefix, op="echo", lane="high", size=_MESSAGE_BYTES, seconds=seconds, **at) as flow:
            trips = np.array(flow.result(seconds + _SLACK_S)) * 1e6
        step()
        return np.percentile(trips, [50, 99])

    low_alone, high_alone = alone("low"), alone("high")
    idle = latency()
    # LOW goes on for longer than what is measured beside it.
    longer = seconds + 4 * _SETTLE_S + _SLACK_S
    with flood("low", longer):
        time.sleep(_SETTLE_S)
        loaded = latency()
    with flood("low", longer):
        time.sleep(_SETTLE_S)
        high_beside = alone("high")
    with flood("high", seconds + 4 * _SETTLE_S, rate=int(high_alone / 2)) as high:
        time.sleep(_SETTLE_S)
        low_beside_half = alone("low")
        high_half = rate_of(high)
    return LaneReport(
        float(idle[0]), float(idle[1]), float(loaded[0]), float(loaded[1]),
        low_alone, high_alone, high_beside, low_beside_half, high_half,
    )  # fmt: skip
