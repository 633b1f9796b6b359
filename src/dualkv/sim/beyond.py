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
        ``{rows, summary}``. A row has ``workload``, ``figure``, a value for each mode, and ``<mode>_gain``: how much
        better than ``scheduled``, relative; positive is better, whatever the figure.
    """
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
            setup = Setup(engine, Workload.recorded(fitting, 1, think=False, seed=seed))
            loads[f"{model} trace"] = (setup, BEYOND_ANY[model], _OFFLINE[model])
    rows = _offline(stage, loads) + _online(stage, loads)
    return {"rows": rows, "summary": _summary(rows)}


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

    def ttft(setup: Setup, rate: float, mode: str) -> tuple[float, float]:
        # Long enough for a hundred agents.
        each = run_at(setup, mode, rate, max(_ONLINE_S, _AGENTS / rate)).ttft_s
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
            values = {mode: times[name, mode][i] for mode in _ALL}
            rows.append(_row(label, figure, values, lower=True))
    return rows


def _row(workload: str, figure: str, values: Mapping[str, float], *, lower: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"workload": workload, "figure": figure, **values}
    base = values[PAPER]
    for mode in MODES:
        gain = (base - values[mode] if lower else values[mode] - base) / base if base else 0.0
        row[f"{mode}_gain"] = gain
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each mode: the least gain of JCT and capacity, the largest, and the least gain of p99 TTFT."""
    out = {}
    for mode in MODES:
        amounts = [row[f"{mode}_gain"] for row in rows if not row["figure"].startswith("TTFT")]
        tails = [row[f"{mode}_gain"] for row in rows if row["figure"] == "TTFT p99 s"]
        out[mode] = {
            "worst_gain": min(amounts, default=0.0),
            "best_gain": max(amounts, default=0.0),
            "worst_p99_ttft_gain": min(tails, default=0.0),
            "best_p99_ttft_gain": max(tails, default=0.0),
        }
    return out
