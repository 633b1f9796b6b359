"""Plots of what only one benchmark measures: lines over layers or time, and bars of its own measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dualkv.bench.results import Row
from dualkv.report.plots import new_figure, styled, to_svg

_COLOURS = ("#1f9e6e", "#3b82d6", "#e0821f", "#8b6fd6", "#d6456b", "#b59a1e", "#17a2a8", "#7f8a99")


@dataclass(frozen=True)
class Curve:
    """A line of a row; ``over`` names the curve that is its x, "" for 0, 1, 2 ..."""

    name: str
    label: str = ""
    over: str = ""


@dataclass(frozen=True)
class LinePlot:
    """One plot for a group of rows."""

    heading: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    caption: str
    scale: float = 1.0


@dataclass(frozen=True)
class BarPlot:
    """Bars of own measures, a series each, by label."""

    heading: str
    unit: str
    measures: Mapping[str, str]
    caption: str
    mark: float | None = None
    log: bool = False

    def series(self, rows: Sequence[Row]) -> dict[str, list[float | None]]:
        """Over the rows."""
        return {label: [_number(row, name) for row in rows] for label, name in self.measures.items()}


def _number(row: Row, name: str) -> float | None:
    value = row.measures.get(name)
    return float(value) if isinstance(value, int | float) else None


LINES: dict[str, tuple[LinePlot, ...]] = {
    "layers": (
        LinePlot(
            "When each layer is ready",
            "layer",
            "ms after the load began",
            (Curve("layer_ready_s"),),
            "Of loads alone, medians over the repeats.",
            scale=1e3,
        ),
    ),
    "soak": (
        LinePlot(
            "Memory",
            "seconds",
            "RSS, MiB",
            (Curve("rss_mib", "measured process", "at_s"), Curve("second_rss_mib", "second node", "at_s")),
            "From the end of the warm-up on.",
        ),
    ),
}
BARS: dict[str, tuple[BarPlot, ...]] = {
    "layers": (
        BarPlot(
            "Overlap",
            "longer of transfer and compute / both",
            {"overlap": "overlap", "but one layer": "overlap_one_layer"},
            "1 is a load that compute hides altogether; one layer can't be hidden.",
            mark=1.0,
        ),
        BarPlot("Time to the first layer", "seconds", {"layer 0": "first_layer_s"}, "Of loads alone."),
    ),
    "register": (
        BarPlot(
            "Time until it can be used",
            "seconds",
            {"open": "open_s", "all ready": "ready_s", "register": "register_s"},
            "Open: until the call returns; register: what a store on top takes for it.",
        ),
    ),
    "lanes": (
        BarPlot(
            "HIGH's latency",
            "µs, a round trip",
            {
                "idle, p50": "idle_p50_us",
                "idle, p99": "idle_p99_us",
                "beside LOW, p50": "loaded_p50_us",
                "beside LOW, p99": "loaded_p99_us",
            },
            "Each step of the axis is ten times as long.",
            log=True,
        ),
        BarPlot(
            "Throughput",
            "of what there is",
            {"HIGH beside LOW": "high_share", "LOW of what half a HIGH leaves": "low_of_rest"},
            "HIGH: of its throughput alone.",
            mark=1.0,
        ),
    ),
    "async": (
        BarPlot(
            "Wake-up",
            "µs",
            {"p50": "wake_us_p50", "p99": "wake_us_p99"},
            "From a layer being in place until its coroutine runs.",
        ),
        BarPlot("Speed", "loads / s", {"loads": "loads_per_s"}, "From the first call to the last coroutine's end."),
    ),
}


def lines(name: str, plot: LinePlot, rows: Sequence[Row], title: Callable[[Row], str]) -> str:
    """A line for each curve of each row; empty when no row has any."""
    shown = [(row, curve) for row in rows for curve in plot.curves if row.curves.get(curve.name)]
    if not shown:
        return ""
    with styled():
        drawn = new_figure(3.2)
        axes = drawn.subplots()
        for i, (row, curve) in enumerate(shown):
            values = [value * plot.scale for value in row.curves[curve.name]]
            x = row.curves[curve.over] if curve.over else range(len(values))
            label = curve.label or title(row)
            axes.plot(x, values, color=_COLOURS[i % len(_COLOURS)], linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        drawn.legend(loc="outside lower center", ncols=min(6, len(shown)))
        return to_svg(drawn, name, f"{plot.y} over {plot.x}, for each case")
