"""What ``dualkv plan`` shows: rows and sentences for the table and the page, and the page's plot."""

import json
import math
import os
from typing import Any

from dualkv.planner import Plan
from dualkv.planner.traffic import SNICS, links_at
from dualkv.sizes import format_size

LINK_HEADINGS = ("link", "load GB/s", "of GB/s", "share")
_COLOURS = {"PE": ("#3b82d6", "#17a2a8", "#7b6ff0"), "DE": ("#e0821f", "#d4504a", "#b59a1e")}
_POINTS = 200


def link_rows(result: Plan) -> list[tuple[str, ...]]:
    """Under LINK_HEADINGS."""
    return [
        (link.name, f"{link.load / 1e9:.1f}", f"{link.capacity / 1e9:.1f}", f"{link.share:.0%}")
        for link in result.links
    ]


def value_rows(result: Plan) -> list[tuple[str, str]]:
    """All other fields of the plan's JSON that are not sentences."""
    out = []
    for name, value in result.to_json().items():
        if name in ("model", "kv_dtype", "prefill", "decode", "links", "binds", "why", "recommendation"):
            continue
        fields = value.items() if isinstance(value, dict) else [(name, value)]
        prefix = f"{name}: " if isinstance(value, dict) else ""
        out += [(prefix + field.replace("_", " "), _cell(prefix + field, one)) for field, one in fields]
    return out


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(value)
    if isinstance(value, str | bool):
        return str(value) or "-"
    if name in ("hardware: cnic", "hardware: snic", "hardware: dram"):
        return f"{value / 1e9:g} GB/s"
    if "flops" in name:
        return f"{value / 1e12:.4g} TFLOP" + ("/s" if "gpu" in name else "")
    if "bytes" in name or name == "hardware: gpu_hbm":
        return format_size(value)
    if name == "hit_rate":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def sentences(result: Plan) -> list[str]:
    """The range, what binds, and what would be better."""
    allowed, best = result.range, result.recommendation
    ends = f"full at the ends: {_names(allowed.lower_links)}; {_names(allowed.upper_links)}"
    first = f"P/D may be from {allowed.lower:.3g} to {allowed.upper:.3g} ({ends})."
    if allowed.empty:
        first = f"No P/D keeps all links below capacity: {allowed.reason}."
    nodes = result.prefill + result.decode
    last = f"For {nodes} nodes: {best.prefill}P{best.decode}D, {best.reason}."
    if best.prefill is None:
        last = f"For {nodes} nodes: {best.reason}."
    return [first, result.why, last]


def _names(names: tuple[str, ...]) -> str:
    return " and ".join(names)


def write(result: Plan, path: str | os.PathLike[str]) -> None:
    """One HTML file; needs matplotlib (``dualkv[report]``)."""
    from dualkv.report.page import figure, page, text, write
    from dualkv.report.plots import require_matplotlib

    require_matplotlib()
    title = f"dualkv plan: {result.prefill}P{result.decode}D, {result.model}"
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in value_rows(result))
    parts = [
        f"<h1>{text(title)}</h1>",
        *(f"<p>{text(line)}</p>" for line in sentences(result)),
        figure("Link loads over P/D", _plot(result), "While all storage NICs are full. 1 is a full link.", ""),
        _link_table(result),
        f"<h2>Values</h2><dl>{rows}</dl>",
        f'<footer><h3>Data</h3><pre id="data">{text(json.dumps(result.to_json(), indent=2))}</pre></footer>',
    ]
    write(page(title, parts), path)


def _link_table(result: Plan) -> str:
    from dualkv.report.page import text

    head = "".join(f"<th>{text(heading)}</th>" for heading in LINK_HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in link_rows(result))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plot(result: Plan) -> str:
    from dualkv.report.plots import INK, new_figure, styled, to_svg

    ratio = result.prefill / result.decode
    ratios = _ratios(result, ratio)
    with styled():
        drawn = new_figure(3.8)
        axes = drawn.subplots()
        colours = {side: iter(of) for side, of in _COLOURS.items()}
        for i, link in enumerate(result.links):
            if link.name not in SNICS:
                shares = [links_at(result.hardware, one)[i].share for one in ratios]
                axes.plot(ratios, shares, color=next(colours[link.name[:2]]), linewidth=1.6, label=link.name)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.0)
        axes.axvline(ratio, color=INK, linestyle=":", linewidth=1.2, label=f"{result.prefill}P{result.decode}D")
        if not result.range.empty:
            axes.axvspan(result.range.lower, result.range.upper, color="#1f9e6e", alpha=0.12, label="in range")
        axes.set_xscale("log")
        axes.set_xlim(ratios[0], ratios[-1])
        ticks = _ticks(ratios[0], ratios[-1])
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set_ylim(0, 2)
        axes.set_xlabel("P/D")
        axes.set_ylabel("share of capacity")
        drawn.legend(loc="outside right upper")
        return to_svg(drawn, "loads", "Share of capacity of each link over P/D")


def _ratios(result: Plan, ratio: float) -> list[float]:
    """A log scale around the range and the planned ratio."""
    ends = [ratio, 0.1, 10.0]
    if not result.range.empty:
        ends += [result.range.lower, result.range.upper]
    first, last = math.log(min(ends) / 2), math.log(max(ends) * 2)
    return [math.exp(first + (last - first) * i / (_POINTS - 1)) for i in range(_POINTS)]


def _ticks(first: float, last: float) -> dict[float, str]:
    """Powers of two between them, a dozen at most."""
    powers = range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)
    shown = powers[:: 1 + len(powers) // 12]
    return {2.0**power: f"1/{2**-power}" if power < 0 else str(2**power) for power in shown}
