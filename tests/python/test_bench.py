"""dualkv bench: every row as documented, ours beside a limit, nothing left behind. No speed is asserted."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_support import HAS_DRIVER, driver_environment
from marks import needs_rdma
from support import LONG_S, RDMA_DEVICES, error_of, eventually

import dualkv
from dualkv.bench import blocks, columns, machine, peer_runner, released, storage, transfer
from dualkv.bench.compare import compare
from dualkv.bench.measure import LIMIT, OURS, Run, interleave, rows_of, steps_of
from dualkv.bench.processes import JsonProcess
from dualkv.bench.results import MEASURED, BenchResult, Row, Spread, load

KIB, MIB = 1 << 10, 1 << 20
NIXL, MOONCAKE = os.environ.get("DUALKV_NIXL_PYTHON"), os.environ.get("DUALKV_MOONCAKE_PYTHON")
has_peer = any(importlib.util.find_spec(name) for names in released._MODULES.values() for name in names)

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def bench(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dualkv", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **env},
    )


def run_quick(*arguments: str) -> dict[str, Any]:
    ran = bench(*arguments, "--quick", "--json")
    assert ran.returncode == 0, ran.stderr
    out: dict[str, Any] = json.loads(ran.stdout)
    return out


def check(result: dict[str, Any], name: str, rows: int) -> None:
    assert set(result) == {"bench", "command", "labels", "rows", "fallbacks", "failures"}
    assert result["failures"] == []
    assert result["bench"] == name
    assert result["labels"].keys() >= {"memory", "transport", "snic", "topology", "cpu", "cores", "kernel", "date"}
    assert not [label for label in result["labels"] if label.startswith("no ")]
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        check_row(row, verifies=name != "copy")


def check_row(row: dict[str, Any], *, verifies: bool = True) -> None:
    assert row.keys() > set(MEASURED)
    assert row["repeats"] == len(row["samples"]) == len(row["limit_samples"]) == len(row["cpu_samples"]) == 2
    assert row["gbps"] == pytest.approx(statistics.median(row["samples"]))
    assert (row["gbps_min"], row["gbps_max"]) == (min(row["samples"]), max(row["samples"]))
    assert row["limit_gbps"] == pytest.approx(statistics.median(row["limit_samples"]))
    pairs = zip(row["samples"], row["limit_samples"], strict=True)
    assert row["ratio"] == pytest.approx(statistics.median(ours / limit for ours, limit in pairs))
    for name in ("cpu_s_per_gb", "limit_cpu_s_per_gb", "post_ns_per_block", "limit"):
        assert row[name], name
    assert bool(row["checksum_share"]) == verifies
    for name in ("prepare_us", "post_us", "latency_us"):
        assert row[name]["avg"] > 0, name
    # The transfer is what GB/s are made of, and the post is a part of it.
    size = row["block_bytes"] * row["count"]
    assert row["latency_us"]["avg"] == pytest.approx(statistics.mean(size / one / 1e3 for one in row["samples"]))
    assert row["post_us"]["avg"] <= row["latency_us"]["avg"]


# --- storage


def test_policy() -> None:
    (row,) = run_quick("policy")["rows"]
    told = row["measures"]
    assert row["engines"] == 64
    assert told["requests"] >= 2000
    assert told["us_per_request"] > 0
    assert told["rss_last_mib"] < told["rss_first_mib"] * 2
    assert len(row["curves"]["rss_mib"]) > 10
    ran = bench("policy", "--engines", "20")
    assert ran.returncode == 2
    assert "--engines 20" in ran.stderr


@pytest.mark.parametrize("way", ["--direct", "--no-direct"])
def test_storage(tmp_path: Path, way: str) -> None:
    result = run_quick("storage", "--path", str(tmp_path), "--depth", "4,32", way)
    check(result, "storage", 4)
    cases = [(row["block_bytes"], row["count"], row["depth"]) for row in result["rows"]]
    assert cases == [(64 * KIB, 128, 4), (64 * KIB, 128, 32), (256 * KIB, 32, 4), (256 * KIB, 32, 32)]
    if way == "--no-direct":
        assert [row["direct"] for row in result["rows"]] == [False] * 4
        assert "dropped" in result["labels"]["page cache"]
    assert list(tmp_path.iterdir()) == []


def test_storage_removes_its_files_after_an_error(tmp_path: Path) -> None:
    def stage(name: str, steps: int) -> Any:
        raise dualkv.Error(f"stop before {steps} steps of {name}", "cancelled")

    options = storage.StorageOptions(str(tmp_path), block_bytes=(64 * KIB,), total=MIB)
    with pytest.raises(dualkv.Error, match="stop before 12 steps"):
        storage.run_storage(options, stage)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_storage_removes_its_files_when_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    arguments = ["storage", "--path", str(tmp_path), "--block-bytes", "64KiB", "--total", "16MiB", "--repeats", "1000"]
    with subprocess.Popen(
        [sys.executable, "-m", "dualkv", "bench", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert eventually(lambda: any(tmp_path.rglob("*.kv")), LONG_S)
            process.send_signal(number)
            assert process.wait(LONG_S) != 0
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_changed_on_disk_is_not_measured(tmp_path: Path) -> None:
    with storage.block_files(str(tmp_path), 64 * KIB, 16) as files:
        path = next(Path(files.root).rglob("*.kv"))
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        error = error_of(storage.Reader(files, 4, True).ours)
        assert error is not None
        assert error.code == "corrupt"


# --- transfer


@pytest.mark.parametrize(
    ("transport", "field", "kinds"),
    [("tcp", "connections", [1, 2]), ("shm", "memory", ["shared", "private"]), ("loopback", "memory", [None])],
)
def test_transfer(transport: str, field: str, kinds: list[int | str | None]) -> None:
    result = run_quick("transfer", "--transport", transport)
    rows = result["rows"]
    check(result, "transfer", 2 * len(kinds))
    assert {(row["transport"], row["block_bytes"], row["count"]) for row in rows} == {(transport, 64 * KIB, 128)}
    assert [(row.get(field), row["checksums"]) for row in rows] == [
        (kind, checksums) for kind in kinds for checksums in ("known", "made")
    ]


def test_count_overrides_total_and_quick_only_what_was_left_out() -> None:
    cases = ("--transport", "shm", "--memory", "shared", "--checksums", "made")
    (row,) = run_quick("transfer", *cases, "--block-bytes", "4KiB", "--count", "300")["rows"]
    assert (row["block_bytes"], row["count"]) == (4 * KIB, 300)


def test_a_receiver_that_dies_is_an_error_and_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    case = transfer.TransferCase("tcp", 64 * KIB, 64, "made", 1)
    with transfer.sender(case) as sender:
        sender.ours()
        assert isinstance(sender._target, JsonProcess)
        sender._target._process.kill()
        error = error_of(sender.ours)
        assert error is not None
        assert error.code == "peer_lost"
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_arrive_wrong_are_noticed() -> None:
    case = transfer.TransferCase("loopback", 4 * KIB, 8, "made")
    with transfer.sender(case) as sender:
        sender._cache[3, 17] ^= 1
        with pytest.raises(dualkv.Error, match="1 of 8 blocks arrived wrong"):
            sender.ours()


@needs_rdma
def test_transfer_over_rdma_against_perftest() -> None:
    result = run_quick("transfer", "--transport", "rdma", "--connections", "1", "--checksums", "known")
    (row,) = result["rows"]
    assert row["transport"] == "rdma"
    assert "ib_write_bw" in row["limit"]
    assert row["gbps"] > 0 < row["limit_gbps"]


# --- copy


@pytest.mark.parametrize("engine", ["cpu", pytest.param("nic", marks=needs_rdma)])
def test_copy(engine: str) -> None:
    result = run_quick("copy", "--engine", engine)
    check(result, "copy", 2)
    assert [(row["engine"], row["block_bytes"], row["count"]) for row in result["rows"]] == [
        (engine, 64 * KIB, count) for count in (1, 64)
    ]


@pytest.mark.skipif(bool(RDMA_DEVICES), reason="this machine has an RDMA device")
def test_a_copy_engine_that_is_not_there_is_named() -> None:
    result = run_quick("copy", "--engine", "cpu,nic", "--counts", "1")
    assert [row["engine"] for row in result["rows"]] == ["cpu"]
    assert "unsupported: rdma" in result["labels"]["no nic, nic 1 x 64 KiB"]


def test_copy_to_a_gpu_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in driver_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    result = run_quick("copy", "--engine", "gpu-kernel,gpu-batch,gpu-memcpy,gpu-verified", "--counts", "64")
    assert result["failures"] == []
    measured = {(row["engine"], row["direction"]) for row in result["rows"]}
    assert measured == {
        *((f"gpu-{engine}", way) for engine in ("kernel", "batch", "memcpy") for way in ("to GPU", "from GPU")),
        ("gpu-verified", "to GPU"),
    }
    assert len(result["rows"]) == len(measured)
    for row in result["rows"]:
        assert row["post_ns_per_block"] > 0 < row["ratio"]
        assert row["limit"] == "one copy of as many bytes, pinned memory"
    assert "CUDA" in result["labels"]["gpu"]


@pytest.mark.skipif(bool(RDMA_DEVICES), reason="this machine has an RDMA device")
def test_copy_by_a_nic_to_a_gpu_needs_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in driver_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    result = run_quick("copy", "--engine", "gpu-kernel,gpu-nic", "--counts", "1")
    assert {row["engine"] for row in result["rows"]} == {"gpu-kernel"}
    assert "unsupported: rdma" in result["labels"]["no gpu-nic, gpu-nic to GPU 1 x 64 KiB"]


_WITHOUT_THE_NIC = """
from dualkv.bench import copy

make_node = copy.make_node
copy.make_node = lambda *args, **options: make_node(*args)  # what copies is the GPU
copy._require_nic = lambda node: None
options = copy.CopyOptions(engine=("gpu-nic",), block_bytes=(64 << 10,), counts=(64,), repeats=1)
result = copy.run_copy(options, lambda *_: lambda: None)
assert [row.case["direction"] for row in result.rows] == ["to GPU", "from GPU"], result.rows
assert all(row.ratio > 0 and row.limit == "one copy of as many bytes, pinned memory" for row in result.rows)
"""


def test_copy_by_a_nic_to_a_gpu_goes_there_and_back(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_NIC],
        env={**os.environ, **driver_environment(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a CUDA driver")
def test_without_a_gpu_its_engines_are_named_once() -> None:
    result = run_quick("copy", "--engine", "cpu,gpu-kernel,gpu-memcpy", "--counts", "1")
    assert [row["engine"] for row in result["rows"]] == ["cpu"]
    assert "no CUDA driver" in result["labels"]["no gpu-kernel, gpu-memcpy, copies to GPUs"]


# --- peers


@pytest.mark.skipif(has_peer, reason="a peer is installed here")
def test_without_any_peer_peers_is_not_supported(tmp_path: Path) -> None:
    ran = bench("peers", "--path", str(tmp_path), "--quick", "--mooncake-python", "/no/such/python")
    assert ran.returncode == 77
    assert "give --nixl-python" in ran.stderr
    assert "/no/such/python" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_fails_leaves_nulls(tmp_path: Path) -> None:
    fake = tmp_path / "packages" / "mooncake"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "engine.py").write_text("class TransferEngine:\n    def initialize(self, *_):\n        return 7\n")
    ran = bench(
        *("peers", "--path", str(tmp_path), "--quick", "--json", "--mooncake-python", sys.executable),
        PYTHONPATH=os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")]),
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    rows = {row["peer"]: row for row in result["rows"]}
    assert set(rows) == {"NIXL UCX tcp", "NIXL UCX all", "NIXL POSIX io_uring", "Mooncake tcp"}
    for row in rows.values():
        check_row(row)
    row = rows["Mooncake tcp"]
    assert (row["peer_gbps"], row["peer_ratio"], row["peer_cpu_s_per_gb"], row["peer_post_us"]) == (None,) * 4
    assert "initialize returned 7" in result["labels"]["no Mooncake tcp, tcp 64 KiB, 2 conn, checksums known"]
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


@pytest.mark.skipif(not (NIXL and MOONCAKE), reason="needs DUALKV_NIXL_PYTHON and DUALKV_MOONCAKE_PYTHON")
def test_released_peers(tmp_path: Path) -> None:
    result = run_quick("peers", "--path", str(tmp_path), "--nixl-python", NIXL, "--mooncake-python", MOONCAKE)  # type: ignore[arg-type]
    check(result, "peers", 4)
    for row in result["rows"]:
        pairs = zip(row["samples"], row["peer_samples"], strict=True)
        assert row["peer_ratio"] == pytest.approx(statistics.median(ours / peer for ours, peer in pairs))
        assert row["peer_cpu_s_per_gb"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_runner_of_peers_moves_the_same_blocks_without_dualkv() -> None:
    tree = ast.parse(Path(peer_runner.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith("dualkv")]
    assert peer_runner.scattered(1000, 2) == blocks.scattered(1000, 2) != blocks.scattered(1000, 1)
    assert (peer_runner.pattern(4096)(5) == blocks.Pattern(4096).block(5)).all()


def test_a_process_that_does_not_answer_is_killed() -> None:
    with JsonProcess("sleeper", [sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        error = error_of(lambda: process.call("anything", timeout_s=0.1))
        assert error is not None
        assert error.code == "timeout"
        error = error_of(lambda: process.call("anything"))
        assert error is not None
        assert error.code == "peer_lost"


def test_a_process_that_ends_says_why() -> None:
    with JsonProcess("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"]) as process:
        error = error_of(lambda: process.call("anything"))
        assert error is not None
        assert "no such thing" in str(error)


# --- the framework


def test_contenders_take_turns_and_warm_ups_are_dropped() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> Any:
        return lambda: order.append(name) or Run(seconds * len(order), 100)  # type: ignore[func-returns-value]

    steps: list[None] = []
    contenders = {"a": contender("a", 1), "b": contender("b", 2), "c": contender("c", 4)}
    measured = interleave(contenders, warmup=1, repeats=3, step=lambda: steps.append(None))
    assert "".join(order) == "abcbcacababc"
    assert len(steps) == steps_of(3, warmup=1, repeats=3) == 12
    assert [run.seconds for run in measured.of("a")] == [6, 8, 10]


def test_who_fails_leaves_only_if_optional() -> None:
    def failing() -> Run:
        raise dualkv.Error("gone", "peer_lost")

    measured = interleave({"a": lambda: Run(1, 1), "b": failing}, warmup=0, repeats=2, optional=("b",))
    assert len(measured.of("a")) == 2
    assert measured.of("b") == []
    assert measured.dropped == {"b": "peer_lost: gone"}
    with pytest.raises(dualkv.Error, match="gone"):
        interleave({"b": failing}, warmup=0, repeats=1)


def test_unknown_is_null() -> None:
    measured = interleave({OURS: lambda: Run(1, 10**9)}, warmup=0, repeats=2)
    (row,) = rows_of({"block_bytes": 1}, measured, limit="nothing", peers=["absent"])
    told = row.to_json()
    assert told["gbps"] == 1
    for name in ("limit_gbps", "ratio", "cpu_s_per_gb", "prepare_us", "post_us", "checksum_share", "peer_gbps"):
        assert told[name] is None, name
    assert told["peer"] == "absent"


def test_aligned_blocks_and_patterns() -> None:
    data = blocks.aligned_blocks(5, 3 * 4096)
    assert data.ctypes.data % (2 * MIB) == 0
    assert data.shape == (5, 3 * 4096)
    assert not data.any()
    pattern = blocks.Pattern(64)
    words = np.array([pattern.block(i).view(np.uint64) for i in range(100)])
    assert len(np.unique(words)) == words.size
    assert pattern.matches(3, pattern.block(3))
    assert not pattern.matches(3, pattern.block(4))


def test_file_system_of_a_path(tmp_path: Path) -> None:
    assert " on " in machine.file_system(str(tmp_path))
    assert machine.file_system("/proc").startswith("proc")


# --- results and compare


def make_row(speed: float = 2.0, *, spread: float = 0.1, block_bytes: int = 65536, peer: str | None = None) -> Row:
    samples = [speed - spread / 2, speed, speed + spread / 2]
    latency = Spread(1e3 / speed, 1.1e3 / speed)
    return Row(
        {"transport": "tcp", "block_bytes": block_bytes, "count": 16, "direct": True},
        gbps=speed,
        gbps_min=samples[0],
        gbps_max=samples[2],
        limit_gbps=4.0,
        limit="sockets",
        ratio=speed / 4,
        cpu_s_per_gb=1 / speed,
        latency_us=latency,
        repeats=3,
        samples=samples,
        limit_samples=[4.0] * 3,
        cpu_samples=[1 / speed] * 3,
        peer=peer,
        peer_gbps=1.0 if peer else None,
        peer_samples=[1.0] * 3 if peer else [],
    )


def make_result(*rows: Row, **labels: str) -> BenchResult:
    return BenchResult("transfer", {"memory": "host", "date": "today", **labels}, list(rows), {"no_huge_pages": 1}, "x")


def test_results_round_trip(tmp_path: Path) -> None:
    result = make_result(make_row(), make_row(3.0, peer="other"))
    result.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == result
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["rows"][0]["block_bytes"] == 65536
    assert told["rows"][0]["peer"] is None


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("not json", "corrupt"),
        ("[]", "corrupt"),
        ("{}", "corrupt"),
        ('{"rows": [{"gbps": 1}]}', "corrupt"),
        (None, "io"),
    ],
)
def test_what_is_not_a_result_is_refused(tmp_path: Path, content: str | None, code: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(dualkv.Error, match=r"file\.json") as raised:
        load(path)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("after", "verdict", "slower"),
    [
        (make_row(2.0), "same", 0.0),
        (make_row(1.95), "same", 0.0),  # within 5 % of spread
        (make_row(3.0), "better", 0.0),
        (make_row(1.0), "worse", 0.5),
        (make_row(1.0, spread=0.9), "same", 0.0),  # the other's spread is wider than the change
    ],
)
def test_a_change_counts_beyond_both_spreads(after: Row, verdict: str, slower: float) -> None:
    (case,) = compare(make_result(make_row()), make_result(after)).cases
    by_name = {change.measure: change for change in case.changes}
    assert set(by_name) == {"gbps", "ratio", "cpu_s_per_gb", "p99_us"}
    assert by_name["gbps"].verdict == verdict
    assert case.slower_by() == pytest.approx(slower)
    if slower:
        assert {change.verdict for change in case.changes} == {"worse"}


def test_unknown_values_are_not_compared() -> None:
    bare = dataclass_without(make_row(), "gbps", "ratio", "cpu_s_per_gb", "latency_us")
    (case,) = compare(make_result(make_row()), make_result(bare)).cases
    assert {change.verdict for change in case.changes} == {"unknown"}
    assert case.slower_by() == 0


def dataclass_without(row: Row, *names: str) -> Row:
    out = copy.deepcopy(row)
    for name in names:
        setattr(out, name, None)
    return out


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    make_result(make_row(), make_row(block_bytes=1 << 20), cpu="one").save(a)
    make_result(make_row(1.0), make_row(block_bytes=4 << 20, peer="other"), cpu="two").save(b)
    ran = bench("compare", a, b)
    assert ran.returncode == 0, ran.stderr
    for said in ("worse", "only in the first", "1 MiB", "only in the second", "4 MiB", "cpu: one -> two"):
        assert said in ran.stdout
    assert bench("compare", a, b, "--fail-above", "60").returncode == 0
    ran = bench("compare", a, b, "--fail-above", "40", "--json")
    assert ran.returncode == 1
    told = json.loads(ran.stdout)
    assert [case["block_bytes"] for case in told["failed"]] == [65536]
    assert bench("compare", b, a, "--fail-above", "0").returncode == 0
    ran = bench("compare", a, str(tmp_path / "absent.json"))
    assert ran.returncode == 1
    assert "absent.json" in ran.stderr


def test_where_no_bytes_move_there_are_no_gigabytes_per_second() -> None:
    measured = interleave({OURS: lambda: Run(1e-3, 0, cpu_s=1e-3), LIMIT: lambda: Run(1e-3, 8)}, warmup=0, repeats=2)
    (row,) = rows_of({"regions": 3}, measured, limit="nothing")
    assert (row.gbps, row.ratio, row.cpu_s_per_gb, row.samples, row.repeats) == (None, None, None, [], 2)
    assert row.latency_us == Spread(1e3, 1e3)
    slower = copy.deepcopy(row)
    slower.latency_us = Spread(2e3, 2e3)
    (case,) = compare(make_result(row), make_result(slower)).cases
    assert case.slower_by() == pytest.approx(1.0)


# --- text and HTML


def test_tables_fit_and_say_everything() -> None:
    rows = [make_row(), make_row(peer="one"), make_row(peer="two"), make_row(block_bytes=1 << 20)]
    against, beside = columns.tables(rows)
    assert [row.case["block_bytes"] for row in against.rows] == [65536, 1 << 20]
    assert [row.peer for row in beside.rows] == ["one", "two"]
    assert "transport: tcp" in against.title
    assert "limit: sockets" in against.title
    assert "direct: yes" in against.title


def test_quick_text_with_report_and_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    html, saved = tmp_path / "r.html", tmp_path / "r.json"
    ran = bench("transfer", "--quick", "--transport", "tcp", "--html", str(html), "--save", str(saved))
    assert ran.returncode == 0, ran.stderr
    assert max(map(len, ran.stdout.splitlines())) <= 120
    for said in ("64 KiB", "GB/s", "memory: host", "transport: tcp", "bare tcp stream"):
        assert said in ran.stdout
    result = load(saved)
    assert result.command.startswith("dualkv")
    text = html.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert "http" not in text
    assert "bare tcp stream" in text


@needs_matplotlib
def test_report_of_peers_and_of_nothing(tmp_path: Path) -> None:
    from dualkv.report.bench import write_bench_report

    path = tmp_path / "r.html"
    write_bench_report(make_result(make_row(peer="one <&>"), make_row(peer="two")), path)
    text = path.read_text(encoding="utf-8")
    assert "one &lt;&amp;&gt;" in text
    assert "one <" not in text
    assert "no_huge_pages" in text
    nothing = dataclass_without(make_row(), "gbps", "ratio", "cpu_s_per_gb", "limit_gbps")
    write_bench_report(make_result(nothing), path)
    assert "<svg" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["storage", "--block-bytes", "1000"], "multiple of 4096"),
        (["storage", "--block-bytes", "many"], "many"),
        (["storage", "--depth", "1025"], "depth"),
        (["storage", "--depth", "x"], "whole numbers"),
        (["storage", "--path", "/no/such/place"], "/no/such/place"),
        (["storage", "--total", "900TiB"], "are free"),
        (["storage", "--quick", "--save", "/no/such/place/a.json"], "/no/such/place"),
        (["transfer", "--transport", "pigeon"], "pigeon"),
        (["transfer", "--connections", "17"], "1 to 16"),
        (["transfer", "--block-bytes", "1001"], "multiple of 8"),
        (["transfer", "--count", "10000000"], "memory needed"),
        (["transfer", "--repeats", "0"], "repeats"),
        (["transfer", "--transport", "rdma", "--rdma-devices", "a,b,c"], "no more"),
        (["copy", "--engine", "pigeon"], "pigeon"),
        (["copy", "--counts", "0"], "1 to 1048576"),
        (["copy", "--most", "1KiB"], "raise --most"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = bench(*arguments)
    assert ran.returncode in (1, 2)
    assert said in ran.stderr
    assert ran.stdout == ""
    with contextlib.suppress(FileNotFoundError):
        assert list(tmp_path.iterdir()) == []
