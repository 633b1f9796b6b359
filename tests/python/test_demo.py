"""The demo on a small scale: every mode exact, the JSON as documented, nothing left behind."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import dualkv
from dualkv.cli.main import cli
from dualkv.demo.run import DemoOptions, arrivals
from dualkv.engines.prefill import Pace

TRACE = Path(
    os.environ.get("DUALKV_TRACE_FILE", Path(__file__).parents[3] / "shared/data/agentic_coding_traces.jsonl.gz")
)


def run(tmp_path: Path, *arguments: str) -> dict:
    small = ["--agents", "2", "--turns", "2", "--scale", "128", "--snic-limit", "400MB/s", "--staging", "256MiB"]
    command = ["demo", *small, "--work-dir", str(tmp_path), "--json", *arguments]
    result = CliRunner().invoke(cli, command)
    if isinstance(result.exception, dualkv.Error):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [], "the demo left files behind"
    out: dict = json.loads(result.stdout)
    return out


def check(result: dict, modes: int) -> None:
    assert set(result["labels"]) == {"memory", "transport", "snic", "engine", "topology", "network"}
    assert len(result["runs"]) == modes
    for one in result["runs"]:
        assert one["exact"]["ok"] == one["exact"]["total"] > 0, one
        assert one["failures"] == []
        assert one["jct_s"] > 0
        assert set(one["bytes"]) == {"pe_path", "de_path", "helper_path", "published", "saved", "by_rdma"}
        assert set(one["snic_utilisation"]) == {"prefill", "decode"}
        assert set(one["ttft_s"]) == {"p50", "p99"}


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_modelled_engine_is_exact_in_every_mode(tmp_path: Path, transport: str) -> None:
    result = run(tmp_path, "--engine", "modelled", "--transport", transport)
    check(result, 4)
    by_mode = {one["mode"]: one["bytes"] for one in result["runs"]}
    assert by_mode["basic"]["de_path"] == 0
    assert by_mode["split"]["de_path"] > 0
    assert by_mode["split"]["pe_path"] > 0


def test_agents_that_begin_at_random(tmp_path: Path) -> None:
    starts = arrivals(DemoOptions(agents=400, rate=2.0, seed=3))
    assert starts is not None
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(200, rel=0.15)
    assert starts == arrivals(DemoOptions(agents=400, rate=2.0, seed=3)), "the same for every mode"
    assert arrivals(DemoOptions()) is None
    last = (arrivals(DemoOptions(agents=2, rate=0.5)) or [])[-1]
    result = run(tmp_path, "--engine", "modelled", "--rate", "0.5", "--modes", "basic,split")
    check(result, 2)
    assert all(one["jct_s"] > last > 0.5 for one in result["runs"])


@pytest.mark.root
def test_engines_on_nodes_of_a_testbed(tmp_path: Path) -> None:
    command = ["--testbed", "--engine", "modelled", "--modes", "basic,split", "--snic-limit", "100MB/s"]
    try:
        result = run(tmp_path, *command)
    except dualkv.Error as error:
        if error.code != "unsupported":
            raise
        assert list(tmp_path.iterdir()) == []
        pytest.skip(str(error))
    check(result, 2)
    assert result["labels"]["snic"] == "cgroup"
    assert "HTB" in result["labels"]["network"]
    basic, split = result["runs"]
    assert basic["bytes"]["de_path"] == 0 < split["bytes"]["de_path"]
    for one in (basic, split):
        assert 0 < one["high"]["alone_s"]["p50"] <= one["high"]["alone_s"]["p99"]
        # The kernel lets no more through than the limit, bursts at the start aside.
        assert max(one["snic_utilisation"].values()) < 1.5
    for left in ("/run/netns", "/sys/fs/cgroup/blkio", "/sys/fs/cgroup"):
        assert not list(Path(left).glob(f"dualkv-{os.getpid()}-*"))


def test_helpers_read_in_1p2d(tmp_path: Path) -> None:
    result = run(tmp_path, "--engine", "modelled", "--topology", "1P2D", "--modes", "basic,split")
    check(result, 2)
    assert result["runs"][1]["bytes"]["helper_path"] > 0


def test_two_prefill_engines(tmp_path: Path) -> None:
    check(run(tmp_path, "--engine", "modelled", "--topology", "2P1D", "--modes", "split,oracle"), 2)


@pytest.mark.torch
@pytest.mark.parametrize("engine", ["modelled", "torch"])
def test_recompute_is_exact_and_reads_less(tmp_path: Path, engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    # Ten times as long to read as to compute, and more prefills than the 16 that it must have seen.
    slow = ["--scale", "512", "--turns", "10", "--snic-limit", "10MB/s", "--modes", "basic,recompute"]
    result = run(tmp_path, "--engine", engine, *slow)
    check(result, 2)
    read = [sum(one["bytes"][path] for path in ("pe_path", "de_path", "helper_path")) for one in result["runs"]]
    assert read[1] < read[0], "some of the hits were computed again"


@pytest.mark.torch
@pytest.mark.parametrize("model", ["gqa", "mla"])
def test_torch_engine_says_exactly_the_tokens_of_generation_without_a_cache(tmp_path: Path, model: str) -> None:
    pytest.importorskip("torch")
    check(run(tmp_path, "--engine", "torch", "--model", model, "--modes", "basic,dualpath,split"), 3)


def test_real_traces(tmp_path: Path) -> None:
    if not TRACE.exists():
        pytest.skip(f"no trace file at {TRACE}; set DUALKV_TRACE_FILE")
    result = run(tmp_path, "--engine", "modelled", "--trace", str(TRACE), "--modes", "basic,split")
    check(result, 2)
    assert result["labels"]["engine"] == "modelled"
    assert result["labels"]["snic"] == "bucket"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "0P1D"], "topology"),
        (["--modes", "basic,nonsense"], "nonsense"),
        (["--snic-limit", "fast"], "fast"),
        (["--trace", "does-not-exist"], "does-not-exist"),
        (["--agents", "0"], "agents"),
        (["--testbed", "--transport", "shm"], "--testbed"),
        (["--cnic-limit", "1GB/s"], "--testbed"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--work-dir", str(tmp_path / "work"), *arguments])
    assert result.exit_code != 0
    assert said in result.output + str(result.exception)
    assert not (tmp_path / "work").exists()


def test_a_short_prefill_does_not_make_the_queue_look_long() -> None:
    pace = Pace()
    assert pace.token_s == 0, "nothing was computed yet"
    pace.observe(10_000, 1.0)
    pace.observe(1, 0.01)  # what a forward pass takes whatever it computes
    assert pace.token_s == pytest.approx(1e-4, rel=0.02)
    for _ in range(100):
        pace.observe(1000, 1.0)
    assert pace.token_s == pytest.approx(1e-3, rel=0.02), "later ones count more"
