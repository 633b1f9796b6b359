"""Plots of a demo run as SVG text to put inside an HTML page, drawn with matplotlib."""

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dualkv.demo.results import ModeRun
from dualkv.errors import Error

WIDTH_INCHES = 10.0
# Becomes currentColor: text, axes and grid follow the page's colour, light or dark.
INK = "#010203"
PATH_COLOURS = {"pe_path": "#3b82d6", "de_path": "#e0821f", "helper_path": "#17a2a8"}
MODE_COLOURS = {"basic": "#7f8a99", "dualpath": "#d6456b", "split": "#1f9e6e", "oracle": "#8b6fd6"}
_ENGINE_COLOURS = {
    "prefill": (PATH_COLOURS["pe_path"], "#17a2a8", "#7b6ff0", "#6b8aa8"),
    "decode": (PATH_COLOURS["de_path"], "#d4504a", "#b59a1e", "#a8704a"),
    "": ("#7f8a99",),
}
_OTHER_COLOURS = ("#b59a1e", "#5b8c3a", "#a0522d", "#4a90a4")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dualkv",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def require_matplotlib() -> None:
    """Raises dualkv.Error, ``unsupported``, where matplotlib can't be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = f"the report's plots need matplotlib ({error}); pip install 'dualkv[report]'"
        raise Error(message, "unsupported") from error


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Our settings, whatever the user's are, and theirs again afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height_inches: float) -> Any:
    """A figure of no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches))


def to_svg(figure: Any, name: str, description: str) -> str:
    """An ``<svg>`` element whose ids all begin with ``name``, so that many of them can share one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">") + 1 :]
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = re.sub(r'\bid="', f'id="{name}-', body).replace(INK, "currentColor")
    return f'<svg {box.group()} role="img" aria-label="{html.escape(description)}">{body.strip()}'


def mode_colour(mode: str) -> str:
    """Always the same for the same mode."""
    return MODE_COLOURS.get(mode, _OTHER_COLOURS[sum(mode.encode()) % len(_OTHER_COLOURS)])


def engine_looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Prefill engines in cold colours, decode engines in warm ones."""
    out: dict[str, dict[str, Any]] = {}
    for kind, colours in _ENGINE_COLOURS.items():
        mine = sorted(name for name in names if name not in out and name.startswith(kind))
        for i, name in enumerate(mine):
            out[name] = {"color": colours[i % len(colours)], "linestyle": "-" if i < len(colours) else ":"}
    return out


def bandwidth_steps(run: ModeRun) -> dict[str, tuple[list[float], list[float]]]:
    """Per engine: the edges (seconds since the run began) and the MB/s between them."""
    out: dict[str, tuple[list[float], list[float]]] = {}
    began = run.replay.began if run.replay else 0.0
    last: dict[str, tuple[float, int]] = {}
    for engine, when, total in sorted(run.samples, key=lambda sample: sample[1]):
        if engine not in last:
            out[engine] = ([when - began], [])
        elif when > last[engine][0]:
            before, bytes_before = last[engine]
            out[engine][0].append(when - began)
            out[engine][1].append(max(0, total - bytes_before) / (when - before) / 1e6)
        else:
            continue
        last[engine] = (when, total)
    return {engine: steps for engine, steps in out.items() if steps[1]}


def bandwidth(runs: Sequence[ModeRun], limit: int, name: str) -> str:
    """Storage bandwidth of each engine over time, a panel a mode; empty when nothing was sampled."""
    shown = [(run, steps) for run in runs if run.replay and (steps := bandwidth_steps(run))]
    if not shown:
        return ""
    with styled():
        figure = new_figure(0.7 + 1.35 * len(shown))
        panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        looks = engine_looks(sorted({engine for _, steps in shown for engine in steps}))
        lines: dict[str, Any] = {}
        for panel, (run, steps) in zip(panels, shown, strict=True):
            panel.set_title(f"{run.mode}: all agents done after {run.jct_s:.3g} s")
            for engine in sorted(steps, key=list(looks).index):
                edges, values = steps[engine]
                lines[engine] = panel.stairs(values, edges, linewidth=1.6, baseline=None, **looks[engine])
            if limit:
                label = f"SNIC limit, {limit / 1e6:g} MB/s"
                lines[label] = panel.axhline(limit / 1e6, color=INK, linestyle="--", linewidth=1.0)
        panels[0].set_ylim(bottom=0)
        panels[0].set_xlim(0, max(run.jct_s for run, _ in shown) * 1.02 or 1.0)
        panels[-1].set_xlabel("seconds since the agents began")
        figure.supylabel("MB/s read from storage", fontsize="medium")
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(6, len(lines)))
        return to_svg(figure, name, "Storage bandwidth of each engine over time, for each mode")


def ttft(runs: Sequence[ModeRun], name: str) -> str:
    """The share of turns whose TTFT is at most so much, a line a mode; empty when there are no turns."""
    shown = [(run, sorted(turn.ttft_s for turn in run.replay.turns)) for run in runs if run.replay and run.replay.turns]
    if not shown:
        return ""
    with styled():
        figure = new_figure(3.2)
        axes = figure.subplots()
        right = max(values[-1] for _, values in shown) * 1.03 or 1.0
        for run, values in shown:
            share = np.arange(len(values) + 1) / len(values)
            # From the left edge at 0 to the right edge at 1, so that every line crosses the whole plot.
            axes.step(
                [0.0, *values, right],
                [*share, 1.0],
                where="post",
                color=mode_colour(run.mode),
                linewidth=1.8,
                label=f"{run.mode} (median {run.ttft_s.p50:.3g} s)",
            )
        axes.set_xlim(0, right)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("TTFT, seconds")
        axes.set_ylabel("share of turns at or below")
        figure.legend(loc="outside right upper")
        return to_svg(figure, name, "Distribution of the time to first token, for each mode")


def speedup(runs: Sequence[ModeRun], name: str) -> str:
    """Speed-up over basic, a group of bars a topology; empty when there was no basic run to compare with."""
    shown = [run for run in runs if run.speedup > 0]
    if not shown:
        return ""
    topologies = list(dict.fromkeys(run.topology for run in shown))
    modes = list(dict.fromkeys(run.mode for run in shown))
    with styled():
        figure = new_figure(3.2)
        axes = figure.subplots()
        width = 0.8 / len(modes)
        for k, mode in enumerate(modes):
            mine = [run for run in shown if run.mode == mode]
            places = [topologies.index(run.topology) + (k - (len(modes) - 1) / 2) * width for run in mine]
            bars = axes.bar(places, [run.speedup for run in mine], width * 0.9, color=mode_colour(mode), label=mode)
            axes.bar_label(bars, fmt="%.2fx", padding=2)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.0)
        axes.set_xticks(range(len(topologies)), topologies)
        axes.set_xlim(-0.6, len(topologies) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.set_ylabel("speed-up over basic (JCT)")
        figure.legend(loc="outside right upper")
        return to_svg(figure, name, "Speed-up over basic, for each topology and mode")
