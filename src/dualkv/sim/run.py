"""One simulated run: a setup and a mode in, an outcome out."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dualkv import _dualkv
from dualkv.errors import invalid
from dualkv.sim.engines import Engine
from dualkv.sim.modes import MODES, Mode
from dualkv.sim.outcome import Outcome
from dualkv.sim.workload import Workload

_ALPHA_S = 3.0  # a node's read queue is short up to so much reading (paper A.4)
_BETA_S = 5.0  # a prefill engine gets nothing beyond so much computing


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    Attributes:
        prefill_nodes, decode_nodes: 0: as the engine is usually run.
        fetch_s: between two fetches of a group. At little load the paper's requests spend 0.19 s on scheduling (Fig.
            12), which is half an interval for each of their two engines.
        batch_tokens: new tokens of an engine in a forward pass, at most.
        batch_requests: requests of an engine in a forward pass, at most; 0: any.
        window_s: of the utilisation curves.
    """

    engine: Engine
    workload: Workload
    prefill_nodes: int = 0
    decode_nodes: int = 0
    fetch_s: float = 0.2
    batch_tokens: int = 2048
    batch_requests: int = 0
    window_s: float = 10.0

    @property
    def topology(self) -> str:
        """Like ``2P4D``, in nodes."""
        return f"{self.nodes[0]}P{self.nodes[1]}D"

    @property
    def nodes(self) -> tuple[int, int]:
        """Prefill and decode nodes."""
        return self.prefill_nodes or self.engine.prefill_nodes, self.decode_nodes or self.engine.decode_nodes


def simulate(setup: Setup, mode: Mode | str) -> Outcome:
    """Runs to the end; the GIL is released meanwhile. The same arguments give the same outcome.

    Raises:
        Error: ``invalid_argument`` for an unknown mode or values that can't be. What a policy raises passes through.
    """
    if isinstance(mode, str):
        if mode not in MODES:
            raise invalid(f"simulator: mode {mode!r} is none of {', '.join(MODES)}")
        mode = MODES[mode]
    return Outcome(setup.nodes, setup.window_s, _dualkv.simulate(_options(setup, mode)))


def _options(setup: Setup, mode: Mode) -> dict[str, Any]:
    engine, hardware, workload = setup.engine, setup.engine.hardware, setup.workload
    prefill_nodes, decode_nodes = setup.nodes
    hit, new = workload.mean_turn()
    # Tokens of a mean request, its hit included, for each second of computing.
    pace = (hit + new) / engine.compute.prefill_s(hit, new)
    return {
        "model": {
            "layers": engine.layers,
            "tokens_per_block": engine.tokens_per_block,
            "bytes_per_token": float(engine.bytes_per_token),
            "compute": dataclasses.asdict(engine.compute),
        },
        "hardware": {
            "prefill_nodes": prefill_nodes,
            "decode_nodes": decode_nodes,
            "engines_per_node": hardware.engines,
            "engines_per_prefill_group": engine.group,
            "snic": hardware.snic,
            "cnic": hardware.cnic,
            "dram": hardware.dram,
            "high_share": hardware.high_share,
            "decode_memory_tokens": engine.memory_tokens,
            "staging": hardware.staging if mode.staged else 0.0,
        },
        "workload": {field.name: getattr(workload, field.name) for field in dataclasses.fields(workload)},
        "free_loads": mode.free,
        "layerwise": mode.layerwise,
        "policy": mode.policy(engine.compute) if mode.policy else None,
        "helpers": mode.helpers,
        "scheduled": mode.scheduled,
        "short_queue_tokens": max(1, int(_ALPHA_S * hardware.snic / engine.bytes_per_token)),
        "full_tokens": max(1, int(_BETA_S * pace)),
        "max_waiting": max(1, workload.agents),
        "fetch_s": setup.fetch_s,
        "batch_tokens": setup.batch_tokens,
        "batch_requests": setup.batch_requests,
        "window_s": setup.window_s,
    }
