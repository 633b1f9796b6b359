"""The demo's report: one HTML file that needs nothing else."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

from dualkv.demo.results import DemoResult, ModeRun
from dualkv.demo.run import DemoOptions
from dualkv.report import plots, timeline
from dualkv.report.page import figure, page, text, write

_TITLE = "dualkv demo: loading KV cache over two paths"

# What each value of a label means. {limit} is the SNIC limit.
_LABELS = {
    "memory": {"host": "KV caches are host memory, no GPU memory is involved"},
    "transport": {
        "tcp": "engines exchange KV over TCP on this machine's loopback, which stands in for the compute network",
        "shm": "engines exchange KV through shared memory, which stands in for the compute network",
    },
    "snic": {
        "bucket": "a token bucket stands in for the storage NIC: it limits each engine's reads to {limit}",
        "cgroup": "the kernel stands in for the storage NIC: it holds each engine's reads of the disk to {limit}",
        "none": "no storage NIC is emulated: files are read as fast as this machine can",
    },
    "engine": {
        "torch": "a real PyTorch model computes, on one CPU thread per engine",
        "modelled": "compute is a calibrated wait, and KV is a pattern that is written and checked byte for byte",
    },
    "topology": {},
    "network": {
        "namespaces, HTB lanes": "each engine is in a network namespace with a link of its own to a bridge; HTB keeps "
        "the lanes apart, and an all-to-all runs on HIGH beside",
        "none": "no network is emulated",
    },
}
_TOPOLOGY_MEANING = "1P2D is one prefill and two decode engines, processes of one machine with an SNIC limit each"

_MODES = {
    "basic": "the prefill node reads every stored block through its own storage NIC.",
    "dualpath": "each request is loaded by the node with the shorter read queue: the prefill node (PE path), or the "
    "decode node, which reads with its own storage NIC and streams each layer to the prefill node (DE path).",
    "split": "each request is divided among all these storage NICs at once, idle nodes' included (helper path).",
    "recompute": "as split, but the last blocks of a hit are computed again where that is sooner than loading them.",
    "oracle": "what is stored is in the engines' caches before the clock starts, so loading costs nothing: the bound "
    "that no loading can beat.",
}

_MEASURES = (
    "JCT is the time until the last agent's last turn is answered; agents send a turn when the last one is answered. "
    "TTFT is the time from sending a prompt to its first token; “alone” is the median TTFT of one agent with nothing "
    "else running. SNIC utilisation is what a side's storage NICs read, of what they could have read in that time. "
)
_EXACT = {
    "torch": "A turn is exact when its tokens are those of the same model without any cache.",
    "modelled": "A turn is exact when every byte of KV the engines used was the right one.",
}


def _rate(limit: int) -> str:
    return f"{limit / 1e6:g} MB/s" if limit else "nothing"


def _labels(labels: dict[str, str], options: DemoOptions) -> str:
    rows = []
    for name, value in labels.items():
        meaning = _LABELS.get(name, {}).get(value, "").format(limit=_rate(options.snic_limit))
        if name == "topology":
            meaning = _TOPOLOGY_MEANING
        said = f"<strong>{text(value)}</strong>" + (f": {text(meaning)}" if meaning else "")
        rows.append(f"<dt>{text(name)}</dt><dd>{said}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _modes() -> str:
    said = "".join(f"<dt>{text(mode)}</dt><dd>{text(meaning)}</dd>" for mode, meaning in _MODES.items())
    intro = "Agents hold long conversations; the KV of what was said is on storage. The modes differ in who reads it:"
    return f"<p>{intro}</p><dl>{said}</dl>"


def _gigabytes(run: ModeRun, path: str) -> str:
    return f"{run.bytes.get(path, 0) / 1e9:.3f}"


def _percent(run: ModeRun, side: str) -> str:
    return f"{100 * run.snic_utilisation.get(side, 0.0):.0f} %"


def _exact(run: ModeRun) -> str:
    said = f"{run.exact.get('ok', 0)}/{run.exact.get('total', 0)}"
    return said if run.exact.get("ok") == run.exact.get("total") else f'<span class="bad">{said}</span>'


def _failures(run: ModeRun) -> str:
    return f'<span class="bad">{len(run.failures)}</span>' if run.failures else "0"


# Heading, and the cell's HTML.
_COLUMNS: tuple[tuple[str, Callable[[ModeRun], str]], ...] = (
    ("topology", lambda run: text(run.topology)),
    ("mode", lambda run: text(run.mode)),
    ("JCT\ns", lambda run: f"{run.jct_s:.2f}"),
    ("speed-up\nover\nbasic", lambda run: f"{run.speedup:.2f}x" if run.speedup else "-"),
    ("prompt\ntokens/s", lambda run: f"{run.prompt_tokens_per_s:,.0f}"),
    ("TTFT\np50, s", lambda run: f"{run.ttft_s.p50:.3f}"),
    ("TTFT\np99, s", lambda run: f"{run.ttft_s.p99:.3f}"),
    ("TTFT\nalone, s", lambda run: f"{run.ttft_alone_s.p50:.3f}"),
    ("PE\npath\nGB", lambda run: _gigabytes(run, "pe_path")),
    ("DE\npath\nGB", lambda run: _gigabytes(run, "de_path")),
    ("helper\npath\nGB", lambda run: _gigabytes(run, "helper_path")),
    ("SNIC\nused,\nprefill", lambda run: _percent(run, "prefill")),
    ("SNIC\nused,\ndecode", lambda run: _percent(run, "decode")),
    ("exact\nturns", _exact),
    ("failures", _failures),
)
# Of runs on a testbed: an exchange of the model's own traffic.
_HIGH_COLUMNS: tuple[tuple[str, Callable[[ModeRun], str]], ...] = (
    ("HIGH\np99, ms", lambda run: f"{1e3 * run.high.beside_s.p99:.2f}" if run.high else "-"),
    ("of\nalone", lambda run: f"{run.high.p99_ratio:.2f}x" if run.high else "-"),
)
_NAMES = 2  # that many first columns are names, the others numbers


def _table(runs: Sequence[ModeRun]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        names = [f'<{tag} class="name">{value}</{tag}>' for value in values[:_NAMES]]
        return "".join(names + [f"<{tag}>{value}</{tag}>" for value in values[_NAMES:]])

    columns = _COLUMNS + (_HIGH_COLUMNS if any(run.high for run in runs) else ())
    head = cells("th", [text(heading) for heading, _ in columns])
    body = "".join(f"<tr>{cells('td', [cell(run) for _, cell in columns])}</tr>" for run in runs)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _notes(runs: Sequence[ModeRun]) -> str:
    """Every failure, and what the nodes had to do without."""
    items = [f"{run.topology} {run.mode}: {failure}" for run in runs for failure in run.failures]
    failures = f"<h3>Failures</h3><ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>" if items else ""
    without = sorted({what for run in runs for what, count in run.fallbacks.items() if count})
    if without:
        failures += f'<p class="soft">Fallbacks the nodes took: {text(", ".join(without))}.</p>'
    return failures


def _speedups(runs: Sequence[ModeRun]) -> str:
    svg = plots.speedup(runs, "speedup")
    caption = "Basic's JCT over each mode's; higher is better."
    return figure("Speed-up over basic", svg, caption, "There is no basic run to compare with.")


def _timelines(runs: Sequence[ModeRun], name: str) -> str:
    picks, missing = timeline.pick(runs)
    caption = (
        "For each way to load, its turn of median TTFT. Upper half of a layer's row: reading "
        "from storage and streaming, until that side's last byte of the layer arrived; pale until the side's first "
        "byte of any layer. Lower half: the prefill engine waits for the layer, computes it, publishes it to the "
        "decode node. An engine computes one request at a time, so there may be a gap before its first bar."
    )
    svg = timeline.timeline(picks, name)
    said = figure("One request, layer by layer", svg, caption, "There is no request to show.")
    return said + "".join(f'<p class="soft">{text(sentence)}</p>' for sentence in missing)


def _topology(runs: Sequence[ModeRun], topology: str, number: int, options: DemoOptions) -> str:
    """The plots of one topology."""
    mine = [run for run in runs if run.topology == topology]
    return "".join(
        (
            f"<h2>{text(topology)}</h2>",
            figure(
                "Storage bandwidth of each engine",
                plots.bandwidth(mine, options.snic_limit, f"bandwidth-{number}"),
                "Bytes each engine's node read from storage between one sample and the next; a burst after a pause "
                "may exceed the limit for one sample.",
                "Nothing was sampled.",
            ),
            figure(
                "Time to first token",
                plots.ttft(mine, f"ttft-{number}"),
                "Over all turns of all agents; further left is better.",
                "No turn was answered.",
            ),
            _timelines(mine, f"timeline-{number}"),
        )
    )


def options_json(options: DemoOptions) -> str:
    """The options as JSON; topologies as they are written on the command line."""
    fields = dataclasses.asdict(options)
    fields["topologies"] = [str(topology) for topology in options.topologies]
    return json.dumps(fields, indent=2, default=str)


def _page(result: DemoResult, options: DemoOptions) -> str:
    topologies = list(dict.fromkeys(run.topology for run in result.runs))
    exact = _EXACT.get(result.labels.get("engine", ""), "")
    parts = [
        f"<h1>{text(_TITLE)}</h1>",
        "<h2>What ran, and what was emulated</h2>",
        _labels(result.labels, options),
        "<h2>Modes</h2>",
        _modes(),
        "<h2>Results</h2>",
        _table(result.runs),
        f'<p class="soft">{text(_MEASURES + exact)}</p>',
        _notes(result.runs),
        _speedups(result.runs),
        *(_topology(result.runs, topology, i, options) for i, topology in enumerate(topologies)),
        f'<footer><h3>Options</h3><pre id="options">{text(options_json(options))}</pre></footer>',
    ]
    return page(_TITLE, parts)


def write_demo_report(result: DemoResult, path: str | os.PathLike[str], options: DemoOptions) -> None:
    """Writes ``result`` as one HTML file without scripts or links; needs matplotlib (``dualkv[report]``)."""
    plots.require_matplotlib()
    write(_page(result, options), path)
