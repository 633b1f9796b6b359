"""The simulator against the paper: every published cell, ours beside it, and what is off.

Compute was calibrated on the Oracle column and one Basic cell a model (:mod:`dualkv.sim.calibrate`); everything else
here is predicted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualkv.errors import invalid
from dualkv.sim import paper
from dualkv.sim.capacity import BEYOND_ANY, capacity, run_at
from dualkv.sim.engines import MODELS
from dualkv.sim.paper import Where
from dualkv.sim.parallel import Stage, run_all
from dualkv.sim.run import Setup, simulate
from dualkv.sim.workload import Workload

_ONLINE_S = 3600.0


@dataclass(frozen=True)
class Cell:
    """One published figure and ours. ``error`` is relative, but for the ablation (percentage points) and max/avg."""

    part: str
    name: str
    what: str
    paper: float
    ours: float
    error: float
    calibrated: bool = False  # this figure was used for calibration


@dataclass(frozen=True)
class Target:
    """What was set out to be met."""

    name: str
    value: float
    limit: float
    met: bool


@dataclass
class Validation:
    """All cells, what they come to, and the targets."""

    cells: list[Cell] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``{summary, targets, cells, inputs}``."""
        return dataclasses.asdict(self)


class _Runner:
    """Runs each setup and mode once."""

    def __init__(self, seed: int, stage: Stage) -> None:
        self.seed = seed
        self.stage = stage
        self._known: dict[tuple[Where, str], float] = {}

    def setup(self, where: Where) -> Setup:
        engine = MODELS[where.model]
        load = Workload.generated(
            where.dataset, where.agents, seed=self.seed, append=where.append, generate=where.generate
        )
        return Setup(engine, load, where.prefill_nodes, where.decode_nodes)

    def _jct(self, where: Where, mode: str) -> float:
        return simulate(self.setup(where), mode).jct_s

    def jct(self, name: str, cells: Iterable[tuple[Where, str]]) -> dict[tuple[Where, str], float]:
        """JCT of each cell and mode."""
        wanted = [cell for cell in dict.fromkeys(cells) if cell not in self._known]
        wanted.sort(key=lambda cell: -cell[0].agents * int(cell[0].dataset.removesuffix("K")))
        jobs = {cell: functools.partial(self._jct, *cell) for cell in wanted}
        if jobs:
            self._known |= run_all(self.stage, name, jobs)
        return self._known


def _relative(ours: float, published: float) -> float:
    return ours / published - 1


def _compared(part: str, name: str, what: str, published: float, ours: float, *, calibrated: bool = False) -> Cell:
    return Cell(part, name, what, published, ours, _relative(ours, published), calibrated)


def _label(where: Where) -> str:
    parts = [where.model, where.dataset, f"{where.agents} agents"]
    if where.prefill_nodes:
        parts.append(f"{where.prefill_nodes}P{where.decode_nodes}D")
    if where.append != 1:
        parts.append(f"append x{where.append:g}")
    if where.generate != 1:
        parts.append(f"generate x{where.generate:g}")
    return " ".join(parts)


def _ratio_cells(run: _Runner, part: str, published: Mapping[Where, paper.Jct]) -> list[Cell]:
    modes = {"oracle": "oracle", "ours": "scheduled", "basic": "basic"}
    asked = [
        (where, mode)
        for where, jct in published.items()
        for name, mode in modes.items()
        if getattr(jct, name) is not None
    ]
    jct = run.jct(part, asked)
    cells = []
    for where, row in published.items():
        label = _label(where)
        for name, mode in modes.items():
            value = getattr(row, name)
            if value is None:
                continue
            calibrated = (part == "offline" and name == "oracle") or (
                name == "basic" and where == paper.BASIC_CELLS.get(where.model)
            )
            cells.append(_compared(part, label, f"JCT s, {name}", value, jct[where, mode], calibrated=calibrated))
        ours = jct[where, "basic"] / jct[where, "scheduled"]
        cells.append(_compared(part, label, "basic/ours", row.basic / row.ours, ours))
    return cells


def _ablation(run: _Runner) -> list[Cell]:
    wheres = [Where("ds660b", "64K", agents) for agents in paper.ABLATION_AGENTS]
    jct = run.jct("ablation", [(where, mode) for where in wheres for mode in ("basic", *paper.ABLATION)])
    cells = []
    for step, published in paper.ABLATION.items():
        ours = 100 * float(np.mean([1 - jct[where, step] / jct[where, "basic"] for where in wheres]))
        cells.append(Cell("ablation", f"ds660b 64K, up to {step}", "% of JCT cut", published, ours, ours - published))
    return cells


def _balance(run: _Runner) -> list[Cell]:
    where = Where("ds27b", "48K", 1024, 1, 2)
    modes = {"round_robin": "dualpath", "scheduled": "scheduled"}

    def ratio(mode: str) -> float:
        return simulate(run.setup(where), mode).snic_max_avg(paper.SNIC_SECONDS)

    found = run_all(run.stage, "balance", {name: functools.partial(ratio, mode) for name, mode in modes.items()})
    return [
        Cell("balance", f"{_label(where)}, {name}", "SNIC max/avg", published, found[name], found[name] - published)
        for name, published in paper.SNIC_MAX_AVG.items()
    ]


def _capacity(run: _Runner) -> list[Cell]:
    def found(model: str, mode: str) -> float:
        return capacity(run.setup(Where(model, "64K", 1)), mode, most=BEYOND_ANY[model])

    modes = ("scheduled", "basic", "oracle")
    jobs = {(model, mode): functools.partial(found, model, mode) for model in paper.CAPACITY for mode in modes}
    result = run_all(run.stage, "capacity", jobs)
    cells = []
    for model, published in paper.CAPACITY.items():
        ours = result[model, "scheduled"] / result[model, "basic"]
        rates = ", ".join(f"{mode} {result[model, mode]:.3f}" for mode in modes)
        cells.append(_compared("capacity", f"{model} 64K ({rates} agents/s)", "ours/basic", published, ours))
    return cells


def _scale(run: _Runner) -> list[Cell]:
    wheres = {
        name: Where("ds660b", "48K", agents, prefill, decode)
        for name, (prefill, decode, agents, _) in paper.SCALE.items()
    }
    jct = run.jct("scale", [(where, "scheduled") for where in wheres.values()])
    ours = {name: jct[where, "scheduled"] for name, where in wheres.items()}
    cells = [
        _compared("scale", _label(wheres[name]), "JCT s, ours", published, ours[name])
        for name, (*_, published) in paper.SCALE.items()
    ]
    published_ratio = paper.SCALE["large"][3] / paper.SCALE["small"][3]
    ratio = ours["large"] / ours["small"]
    return [*cells, _compared("scale", "48P96D / 2P4D", "JCT ratio", published_ratio, ratio)]


def _online(run: _Runner) -> list[Cell]:
    def figures(prefill: int, decode: int, rate: float) -> tuple[float, float, float]:
        setup = run.setup(Where("ds660b", "64K", 1, prefill, decode))
        outcome = run_at(setup, "scheduled", rate, _ONLINE_S)
        return tuple(float(np.mean(v)) for v in (outcome.ttft_s, outcome.ttst_s, outcome.tpot_s))  # type: ignore

    jobs = {name: functools.partial(figures, *row[:3]) for name, row in paper.ONLINE.items()}
    found = run_all(run.stage, "online", jobs)
    cells = []
    for name, (prefill, decode, rate, *published) in paper.ONLINE.items():
        for what, theirs, ours in zip(("TTFT s", "TTST s", "TPOT s"), published, found[name], strict=True):
            label = f"ds660b {prefill}P{decode}D {rate:g} agents/s"
            cells.append(_compared("online", label, what, theirs, ours))
    return cells


PARTS: dict[str, Callable[[_Runner], list[Cell]]] = {
    "offline": functools.partial(_ratio_cells, part="offline", published=paper.OFFLINE),
    "ratios": functools.partial(_ratio_cells, part="ratios", published=paper.RATIOS),
    "scaling": functools.partial(_ratio_cells, part="scaling", published=paper.SCALING),
    "ablation": _ablation,
    "balance": _balance,
    "capacity": _capacity,
    "scale": _scale,
    "online": _online,
}


def validate_paper(stage: Stage, parts: Sequence[str] = (), seed: int = 1) -> Validation:
    """Runs the cells of ``parts`` (all, if none are named).

    Raises:
        Error: ``invalid_argument`` for an unknown part.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise invalid(f"simulator: part {unknown[0]!r} is none of {', '.join(PARTS)}")
    run = _Runner(seed, stage)
    out = Validation(inputs=_inputs(seed))
    for part in parts or PARTS:
        out.cells += PARTS[part](run)
    out.summary = summary(out.cells)
    out.targets = targets(out.summary)
    return out


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the cells come to; None where a part was not run."""

    def of(part: str, what: str = "") -> list[Cell]:
        return [cell for cell in cells if cell.part == part and (not what or cell.what == what)]

    # A setting that two figures show (1P1D) counts in each, as it was published twice.
    compared = [cell for part in ("offline", "ratios", "scaling") for cell in of(part, "basic/ours")]
    ratios = [abs(cell.error) for cell in compared]
    models = {cell.name.split()[0] for cell in compared}
    by_model = {m: float(np.mean([abs(c.error) for c in compared if c.name.split()[0] == m])) for m in sorted(models)}
    ablation = [abs(cell.error) for cell in of("ablation")]
    balance = {cell.name.rsplit(", ", 1)[1]: cell.ours for cell in of("balance")}
    capacities = {cell.name.split()[0]: cell.ours for cell in of("capacity")}
    scale = of("scale", "JCT ratio")
    return {
        "ratio_mae": float(np.mean(ratios)) if ratios else None,
        "ratio_worst": max(ratios, default=None),
        "ratio_mae_by_model": by_model,
        "ablation_worst_points": max(ablation, default=None),
        "snic_max_avg": {name: balance.get(name) for name in paper.SNIC_MAX_AVG},
        "scale_ratio": scale[0].ours if scale else None,
        "capacity": {model: capacities.get(model) for model in paper.CAPACITY},
    }


def targets(found: Mapping[str, Any]) -> list[Target]:
    """Limits on errors; those of parts that were not run are left out."""
    errors: dict[str, tuple[float | None, float]] = {
        "mean error of basic/ours": (found["ratio_mae"], 0.08),
        "worst error of basic/ours": (found["ratio_worst"], 0.20),
        "worst ablation step, points": (found["ablation_worst_points"], 6.0),
    }
    for name, published in paper.SNIC_MAX_AVG.items():
        ours = found["snic_max_avg"][name]
        errors[f"SNIC max/avg, {name}"] = (None if ours is None else abs(ours - published), 0.1)
    ratio = found["scale_ratio"]
    errors["48P96D against 2P4D"] = (None if ratio is None else abs(ratio - 1), 0.05)
    for model, published in paper.CAPACITY.items():
        ours = found["capacity"][model]
        errors[f"capacity, {model}"] = (None if ours is None else abs(_relative(ours, published)), 0.12)
    return [Target(name, error, limit, error <= limit) for name, (error, limit) in errors.items() if error is not None]


def _inputs(seed: int) -> dict[str, Any]:
    """What was calibrated, and what was assumed."""
    return {
        "seed": seed,
        "engines": {name: dataclasses.asdict(engine) for name, engine in MODELS.items()},
        "calibrated_on": "Oracle's JCT (Fig. 7), TTFT and TPOT (Fig. 10), and one Basic cell a model",
        "basic_cells": {model: _label(where) for model, where in paper.BASIC_CELLS.items()},
        "setup": {f.name: f.default for f in dataclasses.fields(Setup) if f.default is not dataclasses.MISSING},
    }
