"""How many prefill and decode nodes, and what binds: the traffic of both paths, by arithmetic (docs/planner.md)."""

from dualkv.planner.hardware import HARDWARE, Hardware, parse_flops, parse_rate
from dualkv.planner.models import KV_DTYPES, MODELS, Model
from dualkv.planner.planning import Plan, Recommendation, Workload, plan, recommend
from dualkv.planner.traffic import Link, Range, feasible, gain, links

__all__ = [
    "HARDWARE",
    "KV_DTYPES",
    "MODELS",
    "Hardware",
    "Link",
    "Model",
    "Plan",
    "Range",
    "Recommendation",
    "Workload",
    "feasible",
    "gain",
    "links",
    "parse_flops",
    "parse_rate",
    "plan",
    "recommend",
]
