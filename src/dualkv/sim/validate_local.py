"""The simulator against real engines: the demo's processes on this machine, and the same sessions simulated."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dualkv import traces
from dualkv.demo.cluster import Topology
from dualkv.demo.run import (
    MODEL_LAYERS,
    MODEL_TOKEN_BYTES,
    MODELLED_VOCAB,
    MODES,
    DemoOptions,
    Progress,
    load_sessions,
    run_demo,
    stored_prefix,
)
from dualkv.engines.compute import ModelledCosts
from dualkv.policy import POLICIES
from dualkv.sim.engines import Compute, Engine, Hardware
from dualkv.sim.modes import Mode
from dualkv.sim.run import Setup, simulate
from dualkv.sim.workload import Workload

TOPOLOGIES = (Topology(1, 1), Topology(1, 2), Topology(2, 1))
TARGET = 0.1
"""Of the worst error of a speed-up."""
_LINK_BYTES_PER_S = 2e9  # tcp on loopback, one node to another (docs/performance.md)
_DRAM_BYTES_PER_S = 2e10


@dataclass(frozen=True)
class LocalCell:
    """A mode on a topology; speed-ups are over basic."""

    topology: str
    mode: str
    measured_jct_s: float
    predicted_jct_s: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative, of the speed-up."""
        return self.predicted / self.measured - 1


@dataclass
class LocalValidation:
    """All cells; ``exact`` says that the real engines loaded what was stored, byte for byte."""

    labels: dict[str, str] = field(default_factory=dict)
    cells: list[LocalCell] = field(default_factory=list)
    exact: bool = True

    @property
    def worst_error(self) -> float | None:
        """Of all cells; None if there are none."""
        return max((abs(cell.error) for cell in self.cells), default=None)

    @property
    def met(self) -> bool:
        """Whether the worst error is within the target."""
        return self.worst_error is not None and self.worst_error <= TARGET

    def to_json(self) -> dict[str, Any]:
        """``{labels, exact, worst_error, target, met, cells}``."""
        return {
            "labels": self.labels,
            "exact": self.exact,
            "worst_error": self.worst_error,
            "target": TARGET,
            "met": self.met,
            "cells": [{**dataclasses.asdict(cell), "error": cell.error} for cell in self.cells],
        }


def validate_local(
    progress: Progress,
    seed: int = 1,
    *,
    topologies: Sequence[Topology] = TOPOLOGIES,
    modes: Sequence[str] = ("basic", "dualpath", "split"),
    agents: int = 12,
    turns: int = 9,
) -> LocalValidation:
    """Runs the demo with modelled compute, then predicts it from its options alone: nothing is fitted to the run."""
    options = DemoOptions(topologies=topologies, modes=modes, engine="modelled", agents=agents, turns=turns, seed=seed)
    measured = run_demo(options, progress)
    out = LocalValidation(labels=dict(measured.labels))
    for topology in topologies:
        runs = {run.mode: run for run in measured.runs if run.topology == str(topology)}
        predicted = {mode: predict(options, topology, mode) for mode in modes}
        for mode in modes:
            run = runs[mode]
            out.exact &= not run.failures and run.exact["ok"] == run.exact["total"]
            if mode == "basic":
                continue
            out.cells.append(
                LocalCell(
                    str(topology),
                    mode,
                    run.jct_s,
                    predicted[mode],
                    runs["basic"].jct_s / run.jct_s,
                    predicted["basic"] / predicted[mode],
                )
            )
    return out


def predict(options: DemoOptions, topology: Topology, mode: str) -> float:
    """JCT of the demo's mode, from its options: sessions, NIC limits, and the engines' modelled costs."""
    sessions = load_sessions(options)[:-1]
    given = MODES[mode]
    way = Mode(
        "as the demo's engines do",
        free=given.resident,
        policy=lambda _: POLICIES[given.policy](),
        helpers=topology.prefill + topology.decode - 2 if given.spread else 0,
    )
    setup = Setup(
        _engine(options, ModelledCosts(**options.costs)),
        _workload(sessions, options),
        topology.prefill,
        topology.decode,
        fetch_s=1e-3,  # no scheduler: a request goes to its engine at once
        batch_tokens=1 << 20,
        batch_requests=1,
        window_s=0.1,
    )
    return simulate(setup, way).jct_s


def _engine(options: DemoOptions, costs: ModelledCosts) -> Engine:
    """The demo's engines: one a node, one forward pass at a time, decode steps in turn."""
    return Engine(
        name="modelled",
        layers=MODEL_LAYERS,
        bytes_per_token=MODEL_LAYERS * MODEL_TOKEN_BYTES,
        compute=Compute(
            forward_s=1e-6,
            token_s=costs.prefill_token_s,
            context_s=0.0,
            pair_s=costs.prefill_token_pair_s,
            step_s=0.0,
            step_request_s=costs.decode_s,
            step_context_s=costs.decode_context_s,
        ),
        hardware=Hardware(
            engines=1,
            snic=float(options.snic_limit),
            cnic=_LINK_BYTES_PER_S,
            dram=_DRAM_BYTES_PER_S,
            high_share=0.0,
            staging=0.0,
        ),
        group=1,
        memory_tokens=1e9,
        prefill_nodes=1,
        decode_nodes=1,
        tokens_per_block=options.tokens_per_block,
    )


def _workload(sessions: Sequence[traces.Session], options: DemoOptions) -> Workload:
    """Hits as the demo's storage gives them: what was populated or saved, in full blocks, but for one token.

    Generated sessions only ever grow.
    """
    per_block = options.tokens_per_block
    rows = []
    for session in sessions:
        stored = len(stored_prefix(session, MODELLED_VOCAB, per_block))
        turns: list[tuple[int, int, int]] = []
        for turn in session.turns:
            hit = min(stored, turn.input_tokens - 1) // per_block * per_block
            turns.append((turn.input_tokens, hit, max(1, turn.output_tokens)))
            # The last token that is generated has no KV.
            stored = max(stored, turn.input_tokens + turn.output_tokens - 1)
        rows.append(turns)
    return Workload.of(rows, [[0.0] * len(turns) for turns in rows], len(sessions))
