"""A cluster in discrete events, driven by the same policies and scheduler as a real one (docs/simulator.md).

``simulate(setup, mode)`` runs one; :data:`MODES` are the ways to load hits, :data:`MODELS` engines whose compute was
fitted to published or measured times.
"""

from dualkv.sim.capacity import capacity
from dualkv.sim.engines import MODELS, Compute, Engine, Hardware
from dualkv.sim.modes import MODES, Mode
from dualkv.sim.outcome import Outcome
from dualkv.sim.run import Setup, simulate
from dualkv.sim.workload import Workload

__all__ = [
    "MODELS",
    "MODES",
    "Compute",
    "Engine",
    "Hardware",
    "Mode",
    "Outcome",
    "Setup",
    "Workload",
    "capacity",
    "simulate",
]
