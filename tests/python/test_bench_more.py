"""dualkv bench layers, register, async and soak: what they promise holds, nothing is left behind. No speed asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import LONG_S, error_of, eventually

import dualkv
from dualkv.bench import async_loads, caches, layers, register, shelf, soak, views
from dualkv.bench.measure import OURS, Run, interleave, median_measures, rows_of
from dualkv.bench.processes import JsonProcess
from dualkv.bench.results import BenchResult, Row, load

KIB, MIB = 1 << 10, 1 << 20
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "dualkv", "bench"]

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=240)


def run_quick(name: str, path: Path, *arguments: str) -> dict[str, Any]:
    ran = bench(name, "--path", str(path), "--quick", "--json", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert not list(path.glob("dualkv-bench-*"))
    out: dict[str, Any] = json.loads(ran.stdout)
    assert out["bench"] == name
    assert out["failures"] == []
    assert out["labels"].keys() >= {"memory", "transport", "snic", "topology", "cpu", "kernel", "file system"}
    return out


def no_stage(name: str, steps: int) -> Any:
    raise dualkv.Error(f"stop before {steps} steps of {name}", "cancelled")


def silent_stage(name: str, steps: int) -> Any:
    return lambda: None


# --- layers


@pytest.mark.parametrize("way", [[], ["--decode"], ["--decode", "--transport", "shm"]])
def test_layers(tmp_path: Path, way: list[str]) -> None:
    trace = tmp_path / "trace.json"
    result = run_quick("layers", tmp_path, "--layers-per-read", "0,2,8", "--trace", str(trace), *way)
    assert [row["layers_per_read"] for row in result["rows"]] == [0, 2, 8]
    assert (result["labels"]["compute"], result["labels"]["snic"]) == ("timed wait", "bucket, 0.1 GB/s a node")
    for row in result["rows"]:
        check_overlap(row)
        assert row["repeats"] == len(row["samples"]) == len(row["limit_samples"]) == 2
        assert len(row["curves"]["layer_ready_s"]) == row["layers"] == 8
        assert ("hand_over_s" in row["measures"]) == bool(way)
    assert result["rows"][0]["measures"]["cost"] == 0
    assert result["rows"][0]["measures"]["first_layer_speedup"] == 1
    check_trace(trace, ["whole blocks", "layers per read: 2", "layers per read: 8"], publishes=bool(way))


def check_overlap(row: dict[str, Any]) -> None:
    """Medians of two repeats are their means, so that parts of a run still fit together roughly; exactly elsewhere."""
    told = row["measures"]
    assert 0 < told["first_layer_s"] <= told["transfer_s"] <= told["total_s"]
    assert told["compute_s"] == told["transfer_s"]
    assert told["overlap_one_layer"] == pytest.approx(told["overlap"] * (1 + 1 / row["layers"]))
    assert 0 < told["overlap"] <= 1.001  # the load with compute is another load than the one alone


def check_trace(path: Path, names: list[str], publishes: bool) -> None:
    trace = json.loads(path.read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == names
    kinds = {event["cat"] for event in events if event["ph"] != "M"}
    assert kinds >= {"bench-prefill read", "bench-prefill stream", "wait", "compute"}
    assert ("publish" in kinds) == publishes
    begun = {event["id"] for event in events if event["ph"] == "b"}
    assert begun == {event["id"] for event in events if event["ph"] == "e"}
    for event in events:
        assert event["ph"] in "MbeX"
        assert event["ph"] == "M" or event["ts"] > 0
        assert event["ph"] != "X" or event["dur"] >= 0


def test_overlap_is_the_longer_part_against_both() -> None:
    told = layers.overlap_measures(transfer_s=2.0, compute_s=3.0, total_s=4.0, layers=10)
    assert told["overlap"] == 0.75
    assert told["overlap_one_layer"] == pytest.approx(0.825)


def test_without_whole_blocks_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    (row,) = run_quick("layers", tmp_path, "--layers-per-read", "4", "--read-limit", "auto")["rows"]
    assert (row["measures"]["cost"], row["measures"]["first_layer_speedup"]) == (None, None)
    assert (row["limit_gbps"], row["ratio"]) == (None, None)


def test_sleeping_until_the_past_returns_at_once() -> None:
    layers.sleep_until(time.monotonic() - 1000)


def test_a_load_that_delivers_wrong_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = layers.LayersOptions(str(tmp_path), layers=4, layer_bytes=4 * KIB, blocks=3, layers_per_read=(0,))
    monkeypatch.setattr(caches.PatternCache, "wrong_bytes", lambda *_: 7)
    error = error_of(lambda: layers.run_layers(options, silent_stage))
    assert error is not None
    assert error.code == "corrupt"
    assert list(tmp_path.iterdir()) == []


# --- register


@pytest.mark.parametrize("lazy", [False, True])
def test_register(tmp_path: Path, lazy: bool) -> None:
    if lazy and not register.knows_lazy():
        ran = bench("register", "--path", str(tmp_path), "--quick", "--lazy")
        assert ran.returncode == 77
        assert "lazy" in ran.stderr
        return
    result = run_quick("register", tmp_path, *(["--lazy"] if lazy else []))
    names = ("staging_bytes", "lock_memory", "huge_pages", "lazy")
    cases = {tuple(row[name] for name in names) for row in result["rows"]}
    assert len(cases) == len(result["rows"]) == 2 * 2 * 2 * (1 + lazy)
    for row in result["rows"]:
        told = row["measures"]
        assert 0 < told["open_s"] <= told["ready_s"]
        assert 0 <= told["register_s"] <= told["store_open_s"]
        assert row["gbps"] > 0
        assert row["limit_gbps"] > 0
        assert row["ratio"] > 0
        assert isinstance(told["locked"], bool)
        assert told["pages"]
        assert told.get("ready_chunks") == told.get("chunks")


# --- async


def test_async(tmp_path: Path) -> None:
    result = run_quick("async", tmp_path, "--loads", "1,50,300")
    *rows, idle = result["rows"]
    assert [row["loads"] for row in rows] == [1, 50, 300]
    for row in rows:
        told = row["measures"]
        assert told["completed"] == row["loads"]
        assert told["waited"] <= row["loads"] * row["layers"]
        assert told["threads_before"] == told["threads_in_flight"] == told["threads_after"]
        for name in ("alone_wake_us", "limit_wake_us"):
            assert 0 < told[f"{name}_p50"] <= told[f"{name}_p99"]
        assert told["loads_per_s"] > 0
    assert idle["measures"]["idle_cpu_share"] >= 0
    assert idle["idle_s"] == 0.5


def test_a_load_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = async_loads.AsyncOptions(str(tmp_path), loads=(5,), idle_s=0.1, repeats=1)
    monkeypatch.setattr(async_loads, "key_of", lambda number: random.randbytes(32))
    error = error_of(lambda: async_loads.run_async(options, silent_stage))
    assert error is not None
    assert list(tmp_path.iterdir()) == []


# --- soak


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_soak(tmp_path: Path, transport: str) -> None:
    result = run_quick("soak", tmp_path, "--transport", transport)
    (row,) = result["rows"]
    told = row["measures"]
    assert (told["lost"], told["wrong_bytes"], told["failed"]) == (0, 0, 0), result["labels"]
    assert told["loads"] > 0
    assert told["read_gbps"] > 0
    assert told["written_gbps"] > 0
    assert told["evicted_blocks"] > 0
    assert 0 < told["helped_share"] < 1
    assert told["rss_start_bytes"] <= told["rss_max_bytes"]
    assert told["fallbacks_end"] == told["fallbacks_start"]
    assert told["fds_end"] <= told["fds_start"]
    assert len({len(curve) for curve in row["curves"].values()}) == 1


def soak_options(path: Path) -> soak.SoakOptions:
    return soak.SoakOptions(
        str(path),
        seconds=0.5,
        block_bytes=4 * KIB,
        quota=8 * MIB,
        staging=MIB,
        write_limit=10**6,
        grace_s=1,
        readers=2,
        pressure=0,
    )


def test_blocks_that_vanish_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = soak.Writer.save

    def save_and_remove(self: soak.Writer) -> None:
        saved(self)
        self._soak.node.store.remove(caches.key_of(self._next - 1))

    monkeypatch.setattr(soak.Writer, "save", save_and_remove)
    result = soak.run_soak(soak_options(tmp_path), silent_stage)
    assert result.rows[0].measures["lost"]
    assert any(failure.startswith("lost") and "matched 15 of 16" in failure for failure in result.failures)
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_wrong_fail_the_command(tmp_path: Path) -> None:
    program = (
        "from dualkv.bench import caches; caches.PatternCache.wrong_bytes = lambda *_: 3;"
        "from dualkv.cli.main import main; main()"
    )
    arguments = ["soak", "--path", str(tmp_path), "--quick", "--seconds", "0.5", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", program, "bench", *arguments], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 1
    assert "failed: wrong" in ran.stderr
    assert json.loads(ran.stdout)["rows"][0]["measures"]["wrong_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_breaks_ends_the_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: soak.Reader, chain: shelf.Chain, owed: bool) -> None:
        if soak.threading.current_thread() is not soak.threading.main_thread():
            raise ZeroDivisionError("once")

    monkeypatch.setattr(soak.Reader, "read", broken)
    result = soak.run_soak(soak_options(tmp_path), silent_stage)
    assert any("ZeroDivisionError" in failure for failure in result.failures)
    assert list(tmp_path.iterdir()) == []


def test_what_is_owed_is_the_newest_half() -> None:
    saved = shelf.Shelf(owed=2)
    assert saved.pick(random.Random(1)) is None
    chains = [shelf.Chain(first, 0.0) for first in (0, 16, 32, 48)]
    for chain in chains:
        saved.add(chain)
    picked = [saved.pick(random.Random(seed)) for seed in range(2000)]
    assert {(one[0].first, one[1]) for one in picked if one} == {(0, False), (16, False), (32, True), (48, True)}
    saved.drop(chains[3])
    saved.drop(chains[3])
    assert [chain.first for chain in saved.owed()] == [16, 32]


def test_slope_of_memory() -> None:
    assert soak.slope_mib_per_min([0, 30, 60], [MIB, 2 * MIB, 3 * MIB]) == pytest.approx(2)
    assert soak.slope_mib_per_min([0, 1, 2], [5, 5, 5]) == pytest.approx(0)


# --- all of them


@pytest.mark.parametrize(
    "run",
    [
        lambda path: layers.run_layers(layers.LayersOptions(path, layers=2, blocks=2, layers_per_read=(0,)), no_stage),
        lambda path: register.run_register(register.RegisterOptions(path, size=(16 * MIB,)), no_stage),
        lambda path: async_loads.run_async(async_loads.AsyncOptions(path, loads=(2,)), no_stage),
        lambda path: soak.run_soak(soak_options(Path(path)), no_stage),
    ],
    ids=["layers", "register", "async", "soak"],
)
def test_nothing_is_left_behind_after_an_error(tmp_path: Path, run: Any) -> None:
    with pytest.raises(dualkv.Error, match="stop before"):
        run(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_soak_cleans_up_when_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    arguments = ["soak", "--path", str(tmp_path), "--quick", "--seconds", "1000"]
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: len(list(tmp_path.rglob("*.kv"))) > 100, LONG_S)
            process.send_signal(number)
            assert process.wait(LONG_S) != 0
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layers", "--layers-per-read", "33"], "0 (whole blocks) to 32"),
        (["layers", "--layers", "0"], "--layers 0"),
        (["layers", "--layer-bytes", "12"], "multiple of 8"),
        (["layers", "--blocks", "0"], "--blocks 0"),
        (["layers", "--blocks", "9000000"], "are free"),
        (["layers", "--read-limit", "fast"], "fast"),
        (["layers", "--transport", "pigeon"], "pigeon"),
        (["layers", "--trace", "/no/such/place/t.json"], "/no/such/place"),
        (["register", "--size", "900TiB"], "give a smaller --size"),
        (["register", "--size", "1KiB"], "at least"),
        (["async", "--loads", "0"], "--loads"),
        (["async", "--blocks", "65"], "1 to 64"),
        (["async", "--loads", "1000000", "--layer-bytes", "1MiB"], "memory needed"),
        (["soak", "--seconds", "0"], "--seconds"),
        (["soak", "--block-bytes", "100"], "multiple of 64"),
        (["soak", "--staging", "1MiB"], "twice a hit"),
        (["soak", "--grace-s", "60"], "--quota"),
        (["soak", "--quota", "900TiB"], "are free"),
        (["soak", "--repeats", "3"], "No such option"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments: list[str], said: str, tmp_path: Path) -> None:
    ran = bench(arguments[0], "--path", str(tmp_path), *arguments[1:])
    assert ran.returncode in (1, 2)
    assert said in ran.stderr
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_presses_touches_its_memory_again_and_again() -> None:
    with JsonProcess("pressure", [sys.executable, "-m", "dualkv.bench.pressure"]) as pressure:
        pressure.call("hold", size_bytes=MIB)
        assert eventually(lambda: pressure.call("passes") >= 3, LONG_S)


# --- the framework


def test_measures_are_medians_and_what_is_said_last() -> None:
    told = [{"a": 1, "b": "small", "c": True}, {"a": 3, "b": "huge", "c": False}, {"a": 8, "b": "huge", "c": False}]
    assert median_measures([Run(1, 1, measures=one) for one in told]) == {"a": 3.0, "b": "huge", "c": False}
    measured = interleave({OURS: lambda: Run(1, 1, measures={"a": None})}, warmup=0, repeats=2)
    assert rows_of({"x": 1}, measured, limit="nothing")[0].measures == {"a": None}


def test_measures_curves_and_failures_are_kept(tmp_path: Path) -> None:
    row = Row({"seconds": 1.0}, measures={"lost": 1, "pages": "huge", "none": None}, curves={"rss_mib": [1.0, 2.0]})
    result = BenchResult("soak", {}, [row], failures=["lost: 1"])
    result.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == result
    told = json.loads((tmp_path / "a.json").read_text())
    del told["failures"]
    for name in ("measures", "curves"):
        del told["rows"][0][name]  # as files of older versions
    (tmp_path / "old.json").write_text(json.dumps(told))
    assert load(tmp_path / "old.json").rows[0].measures == {}


def test_own_measures_have_columns() -> None:
    from dualkv.bench.columns import tables

    result = BenchResult("layers", {}, [Row({"layers_per_read": 2}, measures={"overlap": 0.5, "transfer_s": 0.25})])
    (table,) = tables(result.rows, views.views_of("layers"))
    assert [column.cell(result.rows[0]) for column in table.columns] == ["250.00", "50.0%"]
    assert "layers_per_read: 2" in table.title


@needs_matplotlib
def test_reports_show_them(tmp_path: Path) -> None:
    for name, plots in (("layers", 3), ("async", 2), ("soak", 1)):
        html, saved = tmp_path / f"{name}.html", tmp_path / f"{name}.json"
        ran = bench(name, "--path", str(tmp_path), "--quick", "--html", str(html), "--save", str(saved))
        assert ran.returncode == 0, ran.stderr
        assert max(map(len, ran.stdout.splitlines())) <= 120
        text = html.read_text(encoding="utf-8")
        assert text.count("<svg") == plots
        for note in views.notes_of(name):
            assert note.split(":")[0] in text
        assert load(saved).bench == name


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_the_benchmarks_of_single_calls_run() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env={**os.environ})
    assert ran.returncode == 0, ran.stdout + ran.stderr
