"""What goes beyond the paper's policy, against it: splits, idle nodes, recompute; on its workloads and on a trace."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dualkv import traces
from dualkv.sim.capacity import BEYOND_ANY, capacity, run_at
from dualkv.sim.engines import MODELS
from dualkv.sim.parallel import Stage, run_all
from dualkv.sim.run import Setup, simulate
from dualkv.sim.workload import Workload

PAPER = "scheduled"
MODES = ("split", "nway", "recompute")
_ALL = (PAPER, *MODES)
_OFFLINE = {"ds27b": (512, 2048), "ds660b": (512, 2048), "qwen2.5-32b": (64, 256)}  # agents: few, and many
_LOAD = 0.8  # of the paper's capacity
_ONLINE_S = 3600.0
_AGENTS = 100
_PRECISION = 0.01


def beyond(stage: Stage, *, trace: str | None = None, seed: int = 1) -> dict[str, Any]:
    """JCT offline, agents/s online, and TTFT at 0.8 of the paper's capacity, of each mode.

    Returns:
        ``{rows, summary, dropped_sessions}``. A row has ``workload``, ``figure``, a value for each mode, and
        ``<mode>_gain``: how much better than ``scheduled``, relative; positive is better, whatever the figure. Values
        are None where no request finished, gains where there is nothing to compare with. ``dropped_sessions``: how many
        of the trace's, by workload, have a turn that does not fit half a decode engine's memory.
    """
    dropped: dict[str, int] = {}
    loads: dict[str, tuple[Setup, float, tuple[int, ...]]] = {}
    for model, engine in MODELS.items():
        setup = Setup(engine, Workload.generated("64K", 1, seed=seed))
        loads[f"{model} 64K"] = (setup, BEYOND_ANY[model], _OFFLINE[model])
    if trace:
        sessions = traces.read(trace)
        for model, engine in MODELS.items():
            fitting = [
                session
                for session in sessions
                if all(turn.input_tokens + turn.output_tokens < engine.memory_tokens / 2 for turn in session.turns)
            ]
            name = f"{model} trace"
            dropped[name] = len(sessions) - len(fitting)
            if fitting:
                setup = Setup(engine, Workload.recorded(fitting, 1, think=False, seed=seed))
                loads[name] = (setup, BEYOND_ANY[model], _OFFLINE[model])
    rows = _offline(stage, loads) + _online(stage, loads)
    return {"rows": rows, "summary": _summary(rows), "dropped_sessions": dropped}


def _offline(stage: Stage, loads: Mapping[str, tuple[Setup, float, tuple[int, ...]]]) -> list[dict[str, Any]]:
    def jct(setup: Setup, agents: int, mode: str) -> float:
        load = dataclasses.replace(setup.workload, agents=agents)
        return simulate(dataclasses.replace(setup, workload=load), mode).jct_s

    jobs = {
        (name, agents, mode): functools.partial(jct, setup, agents, mode)
        for name, (setup, _, counts) in loads.items()
        for agents in counts
        for mode in _ALL
    }
    found = run_all(stage, "offline", jobs)
    rows = []
    for name, (_, _, counts) in loads.items():
        for agents in counts:
            values = {mode: found[name, agents, mode] for mode in _ALL}
            rows.append(_row(f"{name}, {agents} agents", "JCT s", values, lower=True))
    return rows


def _online(stage: Stage, loads: Mapping[str, tuple[Setup, float, tuple[int, ...]]]) -> list[dict[str, Any]]:
    jobs = {
        (name, PAPER): functools.partial(capacity, setup, PAPER, most=most, precision=_PRECISION)
        for name, (setup, most, _) in loads.items()
    }
    found = run_all(stage, f"capacity, {PAPER}", jobs)
    jobs = {
        (name, mode): functools.partial(capacity, setup, mode, most=most, near=found[name, PAPER], precision=_PRECISION)
        for name, (setup, most, _) in loads.items()
        for mode in MODES
    }
    found |= run_all(stage, "capacity, beyond", jobs)
    rows = []
    for name in loads:
        values = {mode: found[name, mode] for mode in _ALL}
        rows.append(_row(name, "capacity, agents/s", values, lower=False))

    def ttft(setup: Setup, rate: float, mode: str) -> tuple[float | None, float | None]:
        # Long enough for a hundred agents.
        each = run_at(setup, mode, rate, max(_ONLINE_S, _AGENTS / rate)).ttft_s
        if not len(each):
            return None, None
        return float(np.mean(each)), float(np.percentile(each, 99))

    latencies = {
        (name, mode): functools.partial(ttft, setup, _LOAD * found[name, PAPER], mode)
        for name, (setup, _, _) in loads.items()
        for mode in _ALL
        if found[name, PAPER] > 0
    }
    times = run_all(stage, "latency", latencies)
    for name in loads:
        if found[name, PAPER] == 0:
            continue
        label = f"{name}, {_LOAD * found[name, PAPER]:.3f} agents/s"
        for i, figure in enumerate(("TTFT mean s", "TTFT p99 s")):
            measured = {mode: times[name, mode][i] for mode in _ALL}
            rows.append(_row(label, figure, measured, lower=True))
    return rows


def _row(workload: str, figure: str, values: Mapping[str, float | None], *, lower: bool) -> dict[str, Any]:
    gains = {f"{mode}_gain": _gain(values[PAPER], values[mode], lower=lower) for mode in MODES}
    return {"workload": workload, "figure": figure, **values, **gains}


def _gain(base: float | None, value: float | None, *, lower: bool) -> float | None:
    if not base or value is None:
        return None
    return (base - value if lower else value - base) / base


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each mode: the least and the largest gain of JCT and capacity, and of p99 TTFT; None where there is none."""
    out = {}
    for mode in MODES:
        known = [(row["figure"], row[f"{mode}_gain"]) for row in rows if row[f"{mode}_gain"] is not None]
        amounts = [gain for figure, gain in known if not figure.startswith("TTFT")]
        tails = [gain for figure, gain in known if figure == "TTFT p99 s"]
        out[mode] = {
            "worst_gain": min(amounts, default=None),
            "best_gain": max(amounts, default=None),
            "worst_p99_ttft_gain": min(tails, default=None),
            "best_p99_ttft_gain": max(tails, default=None),
        }
    return out
