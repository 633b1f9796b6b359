"""The demo's report: one file that parses, holds every run, and needs nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import dualkv
from dualkv.demo.cluster import Topology
from dualkv.demo.replay import Replay, TurnRecord
from dualkv.demo.results import DemoResult, HighTraffic, ModeRun, Percentiles
from dualkv.demo.run import DemoOptions
from dualkv.report import plots, timeline
from dualkv.report.html import write_demo_report

LAYERS = 4
BEGAN = 1000.0
USED = {"basic": {"pe_path": 8}, "dualpath": {"de_path": 8}, "split": {"pe_path": 4, "de_path": 3, "helper_path": 1}}
OPTIONS = DemoOptions(
    topologies=(Topology(1, 1), Topology(1, 2)), modes=tuple(USED), engine="modelled", trace="<traces & co>.jsonl"
)
LABELS = {"memory": "host", "transport": "tcp", "snic": "bucket", "engine": "modelled", "topology": "1P1D,1P2D"}
VOID = {"meta", "br"}

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


class Page(html.parser.HTMLParser):
    """Elements must nest; keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.options = ""
        self._in_options = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(str(values["id"]))
        self.references += [str(values[name]) for name in ("href", "xlink:href", "src") if name in values]
        self._in_options = self._in_options or values.get("id") == "options"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._in_options = self._in_options and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_options:
            self.options += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def make_turn(mode: str, agent: int, turn: int, ttft_s: float) -> TurnRecord:
    arrived = [0.01 * (layer + 1) for layer in range(LAYERS)]
    paths = [
        {
            "node": f"node-{path}",
            "path": path,
            "blocks": blocks,
            "bytes": blocks << 20,
            "first_s": 0.005,
            "last_s": arrived[-1],
            "layer_done_s": arrived,
        }
        for path, blocks in USED[mode].items()
    ]
    idle = {"node": "idle", "path": "de_path", "blocks": 0, "bytes": 0, "first_s": 0.0, "last_s": 0.0}
    paths.append({**idle, "layer_done_s": [0.0] * LAYERS})
    prefilled: dict[str, Any] = {
        "result": {
            "paths": paths,
            "layer_ready_s": arrived,
            "layer_published_s": [at + 0.006 for at in arrived],
            "bytes_published": 1 << 20,
        },
        "layer_start_s": [at - 0.004 for at in arrived],
        "layer_compute_s": arrived,
        "layer_done_s": [at + 0.005 for at in arrived],
    }
    return TurnRecord(agent, turn, 100, ttft_s, ttft_s + 0.1, 0, prefilled, (100, 110))


def make_run(mode: str, topology: str, number: int) -> ModeRun:
    turns = [make_turn(mode, agent, turn, 0.1 * (1 + agent + turn)) for agent in range(2) for turn in range(3)]
    engines = ["prefill-0", *(f"decode-{i}" for i in range(int(topology[2])))]
    return ModeRun(
        mode=mode,
        topology=topology,
        jct_s=10.0 + number,
        prompt_tokens_per_s=1000.0 + number,
        ttft_s=Percentiles(0.3, 0.4),
        ttft_alone_s=Percentiles(0.1, 0.1),
        bytes={"pe_path": 3_000_000_000, "de_path": 2_000_000_000, "helper_path": 0, "published": 7, "saved": 8},
        snic_utilisation={"prefill": 0.9, "decode": 0.5},
        exact={"ok": 6, "total": 6},
        failures=[f"agent 1, turn 0: <lost & {number}>"] if mode == "split" else [],
        speedup=1.0 + number / 10,
        fallbacks={"no_huge_pages": 2},
        replay=Replay(seconds=10.0, began=BEGAN, turns=turns),
        samples=[(engine, BEGAN + 0.1 * i, 1_000_000 * i) for i in range(50) for engine in engines],
    )


@pytest.fixture
def result() -> DemoResult:
    cases = [(mode, str(topology)) for topology in OPTIONS.topologies for mode in USED]
    return DemoResult(dict(LABELS), [make_run(mode, topology, i) for i, (mode, topology) in enumerate(cases)])


def write(result: DemoResult, directory: Path, options: DemoOptions = OPTIONS) -> str:
    path = directory / "report.html"
    write_demo_report(result, path, options)
    return path.read_text(encoding="utf-8")


@needs_matplotlib
def test_one_file_without_references(result: DemoResult, tmp_path: Path) -> None:
    text = write(result, tmp_path)
    page = Page(text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for outside in ("http://", "https://", "src=", "<script", "<link", "@import", str(tmp_path)):
        assert outside not in text
    assert page.tags.count("svg") == 1 + 3 * 2  # the speed-ups, and three a topology
    assert len(page.ids) == len(set(page.ids))
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert plots.INK not in text


@needs_matplotlib
def test_every_run_has_its_row(result: DemoResult, tmp_path: Path) -> None:
    rows = Page(write(result, tmp_path)).rows[1:]
    assert [row[:3] for row in rows] == [[run.topology, run.mode, f"{run.jct_s:.2f}"] for run in result.runs]
    assert rows[1][3:] == [
        *("1.10x", "1,001", "0.300", "0.400", "0.100", "3.000", "2.000", "0.000", "90 %", "50 %", "6/6", "0"),
    ]
    assert [row[-1] for row in rows] == ["0", "0", "1"] * 2


@needs_matplotlib
def test_runs_on_a_testbed_show_the_models_traffic(result: DemoResult, tmp_path: Path) -> None:
    result.runs[0].high = HighTraffic(Percentiles(0.0001, 0.0004), Percentiles(0.0002, 0.0005), 1.25)
    heads, *rows = Page(write(result, tmp_path)).rows
    assert len(heads) == len(rows[0])
    assert rows[0][-2:] == ["0.50", "1.25x"]
    assert rows[1][-2:] == ["-", "-"]


@needs_matplotlib
def test_options_round_trip_and_text_is_escaped(result: DemoResult, tmp_path: Path) -> None:
    result.labels["memory"] = "<b>&"
    text = write(result, tmp_path)
    told = json.loads(Page(text).options)
    told["topologies"] = tuple(Topology.parse(topology) for topology in told["topologies"])
    told["modes"] = tuple(told["modes"])
    assert DemoOptions(**told) == OPTIONS
    assert "<b>" not in text
    assert "<lost" not in text
    assert "&lt;lost &amp; 2&gt;" in text


@needs_matplotlib
def test_strange_mode_names_reach_the_plots_escaped(result: DemoResult, tmp_path: Path) -> None:
    for run in result.runs:
        run.mode = "<i>$x_1$&" if run.mode == "dualpath" else run.mode
    text = write(result, tmp_path)
    assert "<i>" not in text
    assert Page(text).tags.count("svg") == 7
    assert "No turn of mode dualpath was loaded over the DE path alone" in text


@needs_matplotlib
def test_without_anything_to_plot(result: DemoResult, tmp_path: Path) -> None:
    bare = [dataclasses.replace(result.runs[0], speedup=0.0, samples=[], replay=replay) for replay in (None, Replay())]
    text = write(DemoResult(LABELS, bare), tmp_path)
    page = Page(text)
    assert "svg" not in page.tags
    assert len(page.rows) == 3
    for said in ("Nothing was sampled.", "No turn was answered.", "There is no request to show.", "no basic run"):
        assert said in text
    assert Page(write(DemoResult(LABELS, []), tmp_path)).rows[1:] == []


@needs_matplotlib
def test_settings_of_matplotlib_stay_as_they_were(
    result: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    before = dict(matplotlib.rcParams)
    assert "<text" in write(result, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_bandwidth_is_the_difference_of_samples(result: DemoResult) -> None:
    run = result.runs[0]
    # Out of order, twice at the same moment, and a counter that began again.
    run.samples = [
        *(("prefill-0", BEGAN + 1, 5_000_000), ("prefill-0", BEGAN, 1_000_000), ("prefill-0", BEGAN + 1, 6_000_000)),
        *(("prefill-0", BEGAN + 3, 0), ("decode-0", BEGAN, 0)),
    ]
    assert plots.bandwidth_steps(run) == {"prefill-0": ([0.0, 1.0, 3.0], [4.0, 0.0])}


def test_picks_the_turn_of_median_ttft_on_each_path(result: DemoResult) -> None:
    runs = [run for run in result.runs if run.topology == "1P1D"]
    picks, missing = timeline.pick(runs)
    assert [each.title.split(":")[0] for each in picks] == ["basic", "dualpath", "split"]
    assert missing == []
    for each in picks:
        assert each.turn.ttft_s == pytest.approx(0.2)  # of 0.1, 0.2, 0.2, 0.3, 0.3, 0.4
    picks, missing = timeline.pick(runs[:1])
    assert len(picks) == 1
    assert len(missing) == 2


def test_without_matplotlib(result: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(dualkv.Error, match=r"pip install 'dualkv\[report\]'") as raised:
        write(result, tmp_path)
    assert raised.value.code == "unsupported"
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
def test_a_place_that_cannot_be_written(result: DemoResult, tmp_path: Path) -> None:
    with pytest.raises(dualkv.Error, match="absent") as raised:
        write_demo_report(result, tmp_path / "absent" / "report.html", OPTIONS)
    assert raised.value.code == "io"
