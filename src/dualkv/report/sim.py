"""Reports of simulated runs, and of the simulator against the paper."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dualkv.report.page import figure, page, text, write
from dualkv.report.plots import INK, new_figure, styled, to_svg
from dualkv.sim.outcome import PARTS, Outcome
from dualkv.sim.validate_paper import Cell, Validation

COLOURS = {
    "basic": "#7f8a99",
    "layerwise": "#b59a1e",
    "dualpath": "#d6456b",
    "scheduled": "#e0821f",
    "split": "#1f9e6e",
    "nway": "#17a2a8",
    "recompute": "#3b82d6",
    "oracle": "#8b6fd6",
}
_PART_COLOURS = ("#8b6fd6", "#e0821f", "#7f8a99", "#3b82d6")
_SIMULATED = "Simulated; docs/simulator.md says how far to believe it."


def write_sim_report(fields: Mapping[str, Any], outcomes: Mapping[str, Outcome], path: str | os.PathLike[str]) -> None:
    """One HTML file: latencies, what TTFT is spent on, and NICs over time, of each mode."""
    labels = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in fields["labels"].items())
    title = f"dualkv sim: {fields['labels']['model']}, {fields['labels']['topology']}"
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<dl>{labels}</dl>",
        _runs_table(fields["runs"]),
        figure("Time to first token", _ttft_plot(outcomes), "Share of requests that had theirs by then.", ""),
        figure("What it is spent on", _share_plot(outcomes), "Means, in seconds.", ""),
        figure("Storage NICs", _snic_plot(outcomes), "Utilisation of all nodes' together, over time.", ""),
        figure("Requests on their way", _running_plot(outcomes), _SIMULATED, ""),
        f'<footer><h3>Data</h3><pre id="data">{text(json.dumps(fields, indent=2))}</pre></footer>',
    ]
    write(page(title, parts), path)


def write_validation(found: Validation, path: str | os.PathLike[str]) -> None:
    """One HTML file: every cell, ours over the paper's."""
    targets = "".join(
        f"<tr><td class='name'>{text(t.name)}</td><td>{t.value:.3g}</td><td>{t.limit:g}</td>"
        f"<td class='{'' if t.met else 'bad'}'>{'met' if t.met else 'missed'}</td></tr>"
        for t in found.targets
    )
    cells = "".join(
        f"<tr>{_names(c.part, c.name, c.what)}<td>{c.paper:.4g}</td><td>{c.ours:.4g}</td><td>{c.error:+.3f}</td>"
        f"<td>{'yes' if c.calibrated else ''}</td></tr>"
        for c in found.cells
    )
    parts = [
        "<h1>dualkv sim against the paper</h1>",
        f"<p>Calibrated on: {text(found.inputs['calibrated_on'])}.</p>",
        _html_table(("error of", "is", "target", ""), targets),
        figure(
            "Basic over ours", _ratio_plot(found.cells), "A point a published cell; the line is equality.", "Not run."
        ),
        _html_table(("part", "cell", "figure", "paper", "ours", "error", "calibrated on"), cells),
        f'<footer><h3>Data</h3><pre id="data">{text(json.dumps(found.to_json(), indent=2))}</pre></footer>',
    ]
    write(page("dualkv sim against the paper", parts), path)


def _names(*names: str) -> str:
    return "".join(f"<td class='name'>{text(name)}</td>" for name in names)


def _html_table(headings: tuple[str, ...], body: str) -> str:
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _runs_table(runs: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td class='name'>{text(mode)}</td><td>{run['jct_s']:.0f}</td><td>{run['ttft_s']['mean']:.2f}</td>"
        f"<td>{run['ttft_s']['p99']:.2f}</td><td>{run['ttst_s']['mean']:.3f}</td>"
        f"<td>{1e3 * run['tpot_s']['mean']:.1f}</td>"
        f"<td>{run['snic_utilisation']['prefill']:.0%}</td><td>{run['snic_utilisation']['decode']:.0%}</td></tr>"
        for mode, run in runs.items()
    )
    return _html_table(("mode", "JCT s", "TTFT s", "p99", "TTST s", "TPOT ms", "SNIC P", "SNIC D"), rows)


def _ttft_plot(outcomes: Mapping[str, Outcome]) -> str:
    with styled():
        drawn = new_figure(3.4)
        axes = drawn.subplots()
        for mode, outcome in outcomes.items():
            times = np.percentile(outcome.ttft_s, np.linspace(0, 100, 201))
            axes.plot(times, np.linspace(0, 1, 201), color=COLOURS[mode], linewidth=1.6, label=mode)
        axes.set_xscale("log")
        axes.set_xlabel("seconds")
        axes.set_ylabel("share of requests")
        drawn.legend(loc="outside right upper")
        return to_svg(drawn, "ttft", "Distribution of the time to first token, for each mode")


def _share_plot(outcomes: Mapping[str, Outcome]) -> str:
    with styled():
        drawn = new_figure(0.6 + 0.4 * len(outcomes))
        axes = drawn.subplots()
        names = list(outcomes)
        left = np.zeros(len(names))
        for part, colour in zip(PARTS, _PART_COLOURS, strict=True):
            widths = np.array([float(np.mean(outcomes[mode].requests[f"{part}_s"])) for mode in names])
            axes.barh(names, widths, left=left, color=colour, label=part)
            left += widths
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        drawn.legend(loc="outside right upper")
        return to_svg(drawn, "shares", "Mean time to first token by part, for each mode")


def _snic_plot(outcomes: Mapping[str, Outcome]) -> str:
    return _over_time(outcomes, lambda o: o.snic_average(), "utilisation", "snic")


def _running_plot(outcomes: Mapping[str, Outcome]) -> str:
    return _over_time(outcomes, lambda o: o.windows["running"], "requests", "running")


def _over_time(outcomes: Mapping[str, Outcome], values: Any, label: str, name: str) -> str:
    with styled():
        drawn = new_figure(3.2)
        axes = drawn.subplots()
        for mode, outcome in outcomes.items():
            y = values(outcome)
            axes.plot(np.arange(len(y)) * outcome.window_s, y, color=COLOURS[mode], linewidth=1.4, label=mode)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel(label)
        drawn.legend(loc="outside right upper")
        return to_svg(drawn, name, f"{label} over time, for each mode")


def _ratio_plot(cells: list[Cell]) -> str:
    shown = [cell for cell in cells if cell.what == "basic/ours"]
    if not shown:
        return ""
    with styled():
        drawn = new_figure(4.5)
        axes = drawn.subplots()
        most = max(max(cell.paper, cell.ours) for cell in shown) * 1.05
        for part, colour in (("offline", "#3b82d6"), ("ratios", "#e0821f"), ("scaling", "#1f9e6e")):
            mine = [cell for cell in shown if cell.part == part]
            axes.scatter([c.paper for c in mine], [c.ours for c in mine], s=18, color=colour, label=part)
        axes.plot([1, most], [1, most], color=INK, linewidth=1.0)
        axes.set_xlabel("paper")
        axes.set_ylabel("simulated")
        drawn.legend(loc="outside right upper")
        return to_svg(drawn, "ratios", "Basic over ours: simulated against published, a point a cell")
