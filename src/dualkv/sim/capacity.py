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
_HIGHEST = 16.0  # times what was believed to be the most: beyond it, no rate is tried

BEYOND_ANY = {"ds27b": 1.2, "ds660b": 1.0, "qwen2.5-32b": 0.3}
"""Agents/s that no mode of a model can serve on the paper's workloads."""


@dataclass(frozen=True)
class Objectives:
    """Means that have to hold: of each window until the run is steady, and of the run."""

    ttft_s: float = 4.0
    tpot_s: float = 0.05

    def hold(self, outcome: Outcome) -> bool:
        """A run is steady when its TTFT over 150 s differs by less than 5 % from that of 30 minutes earlier.

        One that never is holds if no window up to its end breaks the objective; one that finished no request does not.
        """
        if not len(outcome.ttft_s):
            return False
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
    """Agents/s up to which the objectives hold, by bisection, within ``precision`` of it.

    0 if they hold at no rate. ``most``: more than is expected; where they hold even there, it is doubled, up to 16
    times, which is the answer where they always hold. ``near``: where it is expected, also above ``most``; saves steps
    if it is within a fifth of that.

    Poisson arrivals for two hours, each agent from its first round. ``setup.workload``'s sessions and seed are used.
    """
    near = near or 0.0
    low, high = 0.0, max(most, 1.2 * near)
    highest = _HIGHEST * high
    refuted = False  # at high

    def probe(rate: float) -> None:
        nonlocal low, high, refuted
        if objectives.hold(run_at(setup, mode, rate)):
            low = rate
        else:
            high, refuted = rate, True

    def bisect() -> None:
        # Below one agent in a run, there is nothing to judge.
        while high - low > precision * high and high * _HORIZON_S >= 1:
            probe((low + high) / 2)

    for rate in (0.8 * near, 1.2 * near):
        if low < rate < high:
            probe(rate)
    bisect()
    while not refuted and low < highest:
        probe(high)
        if not refuted:
            high *= 2
    if refuted:
        bisect()
    return low


def run_at(setup: Setup, mode: Mode | str, agents_per_s: float, seconds: float = _HORIZON_S) -> Outcome:
    """The setup's sessions, with agents that come at this rate for so long."""
    load = setup.workload.arriving(agents_per_s, seconds)
    return simulate(dataclasses.replace(setup, workload=load), mode)
