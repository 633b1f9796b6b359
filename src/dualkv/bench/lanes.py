"""``dualkv bench lanes``: HIGH beside a saturated LOW on a testbed, with lanes and, for contrast, without."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from dualkv.bench import machine
from dualkv.bench.measure import Stage
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.fabric import LaneReport, measure_lanes
from dualkv.fabric.measure import FLOWS, Flow
from dualkv.fabric.plan import SHARE
from dualkv.testbed import Testbed

_MEASURES = (
    "idle_p50_us", "idle_p99_us", "loaded_p50_us", "loaded_p99_us", "p50_ratio", "p99_ratio", "leakage",
    "high_alone", "high_beside", "high_share", "low_alone", "low_beside_half", "low_of_rest",
)  # fmt: skip


@dataclass(frozen=True)
class LanesOptions:
    """What to measure.

    Attributes:
        rate: of each link, bytes/s.
        share: of a link for HIGH while both lanes want it.
        seconds: of each flow.
    """

    rate: int = 125_000_000
    share: float = SHARE
    seconds: float = 3.0
    repeats: int = 3
    warmup: int = 0


def run_lanes(options: LanesOptions, stage: Stage) -> BenchResult:
    """Raises Error, ``unsupported``, where there can be no testbed (root, iproute2)."""
    runs = options.warmup + options.repeats
    step = stage("lanes and none", 2 * runs * FLOWS)
    reports: dict[bool, list[LaneReport]] = {True: [], False: []}
    for _ in range(runs):
        for lanes, told in reports.items():  # in turns: what else the machine does falls on both
            told.append(_measure(options, lanes, step))
    labels = machine.labels(transport="tcp", topology="2 network namespaces, a bridge; HTB on both ends of each link")
    return BenchResult(
        "lanes", labels, [_row(options, lanes, told[options.warmup :]) for lanes, told in reports.items()]
    )


def _measure(options: LanesOptions, lanes: bool, step: Callable[[], None]) -> LaneReport:
    with Testbed(2, rate=options.rate, lanes=lanes, share=options.share) as bed:
        sender, receiver = bed.prefix(0), bed.prefix(1)
        with Flow(receiver, op="serve", host=bed.address(1)) as server:
            port = server.first_line()["port"]
            return measure_lanes(bed.address(1), port, prefix=sender, seconds=options.seconds, step=step)


def _row(options: LanesOptions, lanes: bool, reports: list[LaneReport]) -> Row:
    told = [report.to_json() for report in reports]
    measures: dict[str, CaseValue] = {name: statistics.median(one[name] for one in told) for name in _MEASURES}
    measures["isolated"] = sum(report.isolated for report in reports)
    case: dict[str, CaseValue] = {"lanes": lanes, "rate": options.rate, "share": options.share}
    return Row(case, repeats=len(reports), measures=measures)
