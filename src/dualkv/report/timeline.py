"""Where the time of single requests went, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dualkv.demo.replay import TurnRecord
from dualkv.demo.results import ModeRun
from dualkv.report.plots import PATH_COLOURS, new_figure, styled, to_svg

_PATH_NAMES = {"pe_path": "PE path", "de_path": "DE path", "helper_path": "helper path"}
_WAIT, _COMPUTE, _PUBLISH = "#9aa0a8", "#8b5cd6", "#d6456b"
_READ_TOP, _READ_HEIGHT = -0.42, 0.42  # of a layer's row, which is 1 high; the engine's bar is below
_ENGINE_HEIGHT = 0.38


@dataclass
class Pick:
    """One request to show."""

    title: str
    turn: TurnRecord


def bytes_by_path(turn: TurnRecord) -> dict[str, int]:
    """Only the paths that carried something."""
    out: dict[str, int] = {}
    for path in turn.prefilled["result"]["paths"]:
        if path["bytes"]:
            out[path["path"]] = out.get(path["path"], 0) + path["bytes"]
    return out


_WANTED: list[tuple[str, str, Callable[[dict[str, int]], bool]]] = [
    ("basic", "over the PE path alone", lambda used: set(used) == {"pe_path"}),
    ("dualpath", "over the DE path alone", lambda used: set(used) == {"de_path"}),
    ("split", "over several paths", lambda used: len(used) > 1),
]


def pick(runs: Sequence[ModeRun]) -> tuple[list[Pick], list[str]]:
    """A request of median TTFT for each kind of path, and a sentence for each kind that never occurred."""
    picks: list[Pick] = []
    missing: list[str] = []
    for mode, kind, fits in _WANTED:
        turns = [turn for run in runs if run.mode == mode and run.replay for turn in run.replay.turns]
        turns = sorted((turn for turn in turns if fits(bytes_by_path(turn))), key=lambda turn: turn.ttft_s)
        if not turns:
            missing.append(f"No turn of mode {mode} was loaded {kind}: no timeline of it.")
            continue
        turn = turns[(len(turns) - 1) // 2]
        amounts = ", ".join(f"{size / 1e6:.3g} MB {_PATH_NAMES[path]}" for path, size in bytes_by_path(turn).items())
        title = f"{mode}: agent {turn.agent}, turn {turn.turn}, TTFT {turn.ttft_s * 1e3:.3g} ms ({amounts})"
        picks.append(Pick(title, turn))
    return picks, missing


def _ms(seconds: Sequence[float]) -> list[float]:
    return [value * 1e3 for value in seconds]


def _draw_reads(axes: Any, turn: TurnRecord, bars: dict[str, Any]) -> None:
    """Each side's reading of each layer; pale until the side's first byte of any layer came."""
    paths = [path for path in turn.prefilled["result"]["paths"] if path["bytes"]]
    height = _READ_HEIGHT / max(1, len(paths))
    for k, path in enumerate(paths):
        first = path["first_s"] * 1e3
        done = [(layer, end) for layer, end in enumerate(_ms(path["layer_done_s"])) if end > 0]
        rows = [layer + _READ_TOP + (k + 0.5) * height for layer, _ in done]
        colour = PATH_COLOURS.get(path["path"], PATH_COLOURS["helper_path"])
        axes.barh(rows, [min(first, end) for _, end in done], height, color=colour, alpha=0.35)
        bars[f"read + stream, {_PATH_NAMES.get(path['path'], path['path'])}"] = axes.barh(
            rows, [max(0.0, end - first) for _, end in done], height, left=first, color=colour
        )


def _draw_engine(axes: Any, turn: TurnRecord, bars: dict[str, Any]) -> None:
    """The prefill engine's own time: wait, compute, publish."""
    start, compute, done = (_ms(turn.prefilled[f"layer_{what}_s"]) for what in ("start", "compute", "done"))
    published = _ms(turn.prefilled["result"]["layer_published_s"])[: len(done)]
    rows = [layer + _ENGINE_HEIGHT / 2 for layer in range(len(done))]
    for label, colour, begin, end in (
        ("wait for the layer", _WAIT, start, compute),
        ("compute", _COMPUTE, compute, done),
        ("publish to the decode node", _PUBLISH, done, published),
    ):
        lengths = [max(0.0, b - a) for a, b in zip(begin, end, strict=False)]
        count = len(lengths)
        bars[label] = axes.barh(rows[:count], lengths, _ENGINE_HEIGHT, left=begin[:count], color=colour)


def _span(turn: TurnRecord) -> tuple[float, float]:
    """From the engine's first to its last moment, with a little room, in milliseconds."""
    begin = min(turn.prefilled["layer_start_s"])
    end = max(*turn.prefilled["layer_done_s"], *turn.prefilled["result"]["layer_published_s"])
    room = 0.04 * (end - begin) or 1e-3
    return (begin - room) * 1e3, (end + room) * 1e3


def timeline(picks: Sequence[Pick], name: str) -> str:
    """A row of panels a request: from the load's begin on the left, the engine's part enlarged on the right."""
    picks = [each for each in picks if each.turn.prefilled["layer_done_s"]]
    if not picks:
        return ""
    with styled():
        figure = new_figure(0.8 + 2.75 * len(picks))
        panels = figure.subplots(len(picks), 2, squeeze=False, sharey="row", width_ratios=(3, 2))
        bars: dict[str, Any] = {}
        for (whole, engine), each in zip(panels, picks, strict=True):
            layers = len(each.turn.prefilled["layer_done_s"])
            for axes in (whole, engine):
                _draw_reads(axes, each.turn, bars)
                _draw_engine(axes, each.turn, bars)
                axes.grid(visible=False, axis="y")
            whole.set_title(each.title)
            whole.set_ylim(layers - 0.5, -0.5)
            whole.set_yticks(range(0, layers, max(1, layers // 8)))
            whole.set_ylabel("layer")
            whole.set_xlim(0, _span(each.turn)[1])
            engine.set_xlim(*_span(each.turn))
            engine.set_title("prefill engine, enlarged", loc="right")
        panels[-1][0].set_xlabel("ms since the load began")
        panels[-1][1].set_xlabel("ms since the load began")
        labels = sorted(bars, key=lambda label: not label.startswith("read"))
        columns = len(labels) if len(labels) <= 5 else 3
        figure.legend([bars[label] for label in labels], labels, loc="outside lower center", ncols=columns)
        return to_svg(figure, name, "Layer-by-layer timeline of one request on each path")
