"""The report of a benchmark: its tables, its plots, and what it ran on, in one HTML file."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dualkv.bench.columns import Table, case_text, groups, once_each_case, shared_fields, tables
from dualkv.bench.results import BenchResult, Row
from dualkv.bench.views import notes_of, views_of
from dualkv.report.curves import BARS, LINES, lines
from dualkv.report.page import figure, page, text, write
from dualkv.report.plots import INK, new_figure, require_matplotlib, styled, to_svg

Series = Mapping[str, Sequence[float | None]]

_OURS, _LIMIT, _SECOND = "dualkv", "limit", "second limit"
_COLOURS = {_OURS: "#1f9e6e", _LIMIT: "#7f8a99", _SECOND: "#b8c0ca"}
_PEER_COLOURS = ("#3b82d6", "#e0821f", "#8b6fd6", "#d6456b", "#b59a1e")


def write_bench_report(result: BenchResult, path: str | os.PathLike[str]) -> None:
    """Writes ``result`` as one HTML file without scripts or links; needs matplotlib (``dualkv[report]``)."""
    require_matplotlib()
    title = f"dualkv bench {result.bench}"
    without = ", ".join(f"{name} ({count})" for name, count in sorted(result.fallbacks.items()))
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<pre>{text(result.command)}</pre>",
        "<h2>What it ran on, and what was emulated</h2>",
        _labels(result.labels),
        f'<p class="soft">Fallbacks in force: {text(without)} (docs/settings.md).</p>' if without else "",
        *(f'<p class="bad">Failed: {text(failure)}</p>' for failure in result.failures),
        "<h2>Results</h2>",
        *(_table(table) for table in tables(result.rows, views_of(result.bench))),
        *(f'<p class="soft">{text(note)}</p>' for note in notes_of(result.bench)),
        *(_plots(result.bench, rows, number) for number, rows in enumerate(groups(result.rows))),
        f'<footer><h3>Data</h3><pre id="data">{text(json.dumps(result.to_json(), indent=2))}</pre></footer>',
    ]
    write(page(title, parts), path)


def _labels(labels: Mapping[str, str]) -> str:
    rows = [f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in labels.items()]
    return f"<dl>{''.join(rows)}</dl>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{text(column.heading)}</th>" for column in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{text(column.cell(row))}</td>' for column in table.columns)}</tr>" for row in table.rows
    )
    title = "<br>".join(text(line) for line in table.title.splitlines())
    return f'<p>{title}</p><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(bench: str, rows: Sequence[Row], number: int) -> str:
    """Of one group of cases: its own plots where the benchmark has some, else speed, ratio and CPU."""
    shared, varying = shared_fields(rows)
    heading = "   ".join(f"{name}: {value}" for name, value in shared.items()) or "All cases"
    own = bench in BARS or bench in LINES
    plots = _own_plots(bench, rows, varying, number) if own else _speed_plots(rows, varying, number)
    return f"<h2>{text(heading)}</h2>{plots}" if plots else ""


def _names(rows: Sequence[Row], varying: Sequence[str]) -> list[str]:
    """Of cases, by the fields that differ."""
    return ["\n".join(f"{_field(name)}{case_text(name, row.case[name])}" for name in varying) for row in rows]


def _own_plots(bench: str, rows: Sequence[Row], varying: Sequence[str], number: int) -> str:
    """Those that have something to show."""
    names = _names(rows, varying)
    titles = {id(row): name.replace("\n", ", ") for row, name in zip(rows, names, strict=True)}
    out = []
    for i, lines_plot in enumerate(LINES.get(bench, ())):
        svg = lines(f"lines-{number}-{i}", lines_plot, rows, lambda row: titles[id(row)])
        out.append((lines_plot.heading, svg, lines_plot.caption))
    for i, plot in enumerate(BARS.get(bench, ())):
        svg = bars(f"own-{number}-{i}", plot.unit, names, plot.series(rows), mark=plot.mark, log=plot.log)
        out.append((plot.heading, svg, plot.caption))
    return "".join(figure(heading, svg, caption, "") for heading, svg, caption in out if svg)


def _speed_plots(rows: Sequence[Row], varying: Sequence[str], number: int) -> str:
    cases = once_each_case(rows)
    names = _names(cases, varying)
    spread = [(row.gbps_min, row.gbps_max) for row in cases]
    caption = "Medians over the repeats; the line on ours reaches from its slowest to its fastest repeat."
    return "".join(
        (
            figure(
                "Speed", bars(f"speed-{number}", "GB/s", names, speeds(rows), spread), caption, "Nothing was measured."
            ),
            figure(
                "Ours against the others",
                bars(f"ratio-{number}", "ours / other", names, ratios(rows), mark=1.0),
                "Medians over the repeats of ours against the other of the same repeat; above 1, ours is faster.",
                "There is nothing to compare with.",
            ),
            figure(
                "CPU time",
                bars(f"cpu-{number}", "CPU seconds per GB", names, cpu(rows)),
                "Of all processes that took part; lower is better.",
                "No CPU time was measured.",
            ),
        )
    )


def _field(name: str) -> str:
    return "" if name.endswith("_bytes") or name in ("transport", "bench") else f"{name} "


def _by_peer(rows: Sequence[Row], field: str) -> dict[str, list[float | None]]:
    """A list over the cases for each peer."""
    cases = [row.case for row in once_each_case(rows)]
    out: dict[str, list[float | None]] = {}
    for row in rows:
        if row.peer is not None:
            out.setdefault(row.peer, [None] * len(cases))[cases.index(row.case)] = getattr(row, field)
    return out


def speeds(rows: Sequence[Row]) -> Series:
    """GB/s over the cases."""
    cases = once_each_case(rows)
    return {
        _OURS: [row.gbps for row in cases],
        _LIMIT: [row.limit_gbps for row in cases],
        _SECOND: [row.second_limit_gbps for row in cases],
        **_by_peer(rows, "peer_gbps"),
    }


def ratios(rows: Sequence[Row]) -> Series:
    """Ours against each of the others."""
    return {_LIMIT: [row.ratio for row in once_each_case(rows)], **_by_peer(rows, "peer_ratio")}


def cpu(rows: Sequence[Row]) -> Series:
    """CPU seconds per GB."""
    cases = once_each_case(rows)
    return {
        _OURS: [row.cpu_s_per_gb for row in cases],
        _LIMIT: [row.limit_cpu_s_per_gb for row in cases],
        **_by_peer(rows, "peer_cpu_s_per_gb"),
    }


def bars(
    name: str,
    unit: str,
    cases: Sequence[str],
    series: Series,
    spread: Sequence[tuple[float | None, float | None]] = (),
    mark: float | None = None,
    log: bool = False,
) -> str:
    """A group of bars a case, a bar a series; unknown values leave a gap. Empty when all are unknown.

    Args:
        spread: lowest and highest of the first series, a case.
        mark: a line across.
        log: the axis of the values.
    """
    shown = {label: values for label, values in series.items() if any(value is not None for value in values)}
    if not shown:
        return ""
    with styled():
        drawn = new_figure(3.4)
        axes = drawn.subplots()
        width = 0.8 / len(shown)
        for k, (label, values) in enumerate(shown.items()):
            places = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(values))]
            heights = [value or 0.0 for value in values]
            axes.bar(places, heights, width * 0.92, color=_colour(label, list(shown)), label=label)
            if k == 0:
                _draw_spread(axes, places, spread)
        if mark is not None:
            axes.axhline(mark, color=INK, linestyle="--", linewidth=1.0)
        if log:
            axes.set_yscale("log")
        axes.set_xticks(range(len(cases)), cases)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(unit)
        drawn.legend(loc="outside lower center", ncols=min(6, len(shown)))
        return to_svg(drawn, name, f"{unit}, for each case")


def _draw_spread(axes: Any, places: Sequence[float], spread: Sequence[tuple[float | None, float | None]]) -> None:
    for place, (low, high) in zip(places, spread, strict=False):
        if low is not None and high is not None:
            axes.vlines(place, low, high, color=INK, linewidth=1.4)


def _colour(label: str, labels: Sequence[str]) -> str:
    others = [each for each in labels if each not in _COLOURS]
    return _COLOURS.get(label) or _PEER_COLOURS[others.index(label) % len(_PEER_COLOURS)]
