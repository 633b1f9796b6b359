"""How many agents a second a cluster serves within its objectives, judged as the paper judges it (7.4)."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from dualkv.sim.modes import Mode
from dualkv.sim.outcome import Outcome
from dualkv.sim.run import Setup, simulate

_WINDOW_S = 150.0
_APART_S = 1800.0
_STEADY = 0.05
_HORIZON_S = 7200.0

BEYOND_ANY = {"ds27b": 1.2, "ds660b": 1.0, "qwen2.5-32b": 0.3}
"""Agents/s that no mode of a model can serve on the paper's workloads."""


@dataclass(frozen=True)
class Objectives:
    """Means that have to hold: of each window until the run is steady, and of the run."""

    ttft_s: float = 4.0
    tpot_s: float = 0.05

    def hold(self, outcome: Outcome) -> bool:
        """A run is steady when its TTFT over 150 s differs by less than 5 % from that of 30 minutes earlier.

        One that never is holds if no window up to its end breaks the objective.
        """
        first = outcome.requests["arrival_s"] + outcome.ttft_s
        window = (first / _WINDOW_S).astype(int)
        # The last is cut off: its slow requests are not there.
        count = int(outcome.jct_s / _WINDOW_S)
        sums = np.bincount(window, weights=outcome.ttft_s, minlength=count)[:count]
        means = sums / np.maximum(1, np.bincount(window, minlength=count)[:count])
        apart = int(_APART_S / _WINDOW_S)
        for i, mean in enumerate(means):
            if mean > self.ttft_s:
                return False
            if i >= apart and abs(mean - means[i - apart]) < _STEADY * means[i - apart]:
                break
        tpot = outcome.tpot_s  # nobody may have three tokens
        return len(tpot) == 0 or float(np.mean(tpot)) <= self.tpot_s


def capacity(
    setup: Setup,
    mode: Mode | str,
    *,
    most: float,
    near: float | None = None,
    objectives: Objectives = Objectives(),
    precision: float = 0.02,
) -> float:
    """Agents/s up to which the objectives hold, by bisection below ``most``, within ``precision`` of it.

    ``near``: where it is expected; saves steps if it is within a fifth of that.

    Poisson arrivals for two hours, each agent from its first round. ``setup.workload``'s sessions and seed are used.
    """
    low, high = 0.0, most

    def probe(rate: float) -> None:
        nonlocal low, high
        if objectives.hold(run_at(setup, mode, rate)):
            low = rate
        else:
            high = rate

    for rate in () if near is None else (0.8 * near, 1.2 * near):
        if low < rate < high:
            probe(rate)
    while high - low > precision * high:
        probe((low + high) / 2)
    return low


def run_at(setup: Setup, mode: Mode | str, agents_per_s: float, seconds: float = _HORIZON_S) -> Outcome:
    """The setup's sessions, with agents that come at this rate for so long."""
    load = setup.workload.arriving(agents_per_s, seconds)
    return simulate(dataclasses.replace(setup, workload=load), mode)
