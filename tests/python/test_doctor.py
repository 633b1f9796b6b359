"""The doctor: what it says is what is in force, its exit codes, and that nothing of it stays behind."""

import ctypes
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support import LONG_S, eventually
from test_docs import SETTINGS, node_defaults, table
from test_failures import tmpfs

import dualkv
from dualkv.cli.main import cli
from dualkv.doctor import Check, check, devices, examine, machine, network, storage
from dualkv.doctor.check import Context
from dualkv.doctor.cures import FALLBACKS
from dualkv.doctor.fallbacks import check_fallbacks
from dualkv.lanes import LANES

HERE = Path(__file__).parent
DUALKV = ("-m", "dualkv")
NO_URING = (str(HERE / "seccomp_no_uring.py"),)
NAMES = {
    *("versions", "torch", "CUDA packages", "io_uring build", "io_uring", "registered buffers", "file system"),
    *("free space", "O_DIRECT", "round trip", "memlock", "huge pages", "NUMA", "TCP buffers", "TCP marks", "shm"),
    *("RDMA", "CUDA", "GPUDirect"),
}


def run(*arguments: object, program: Iterable[str] = DUALKV, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE,
        env=os.environ | {"COLUMNS": "250"} | env,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def by_name(out: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in json.loads(out)["checks"]}


def outcome(function: check.CheckFunction, context: Context) -> dict[str, Check]:
    check.run_guarded(function, context)
    return {one.name: one for one in context.checks}


def everything_below(place: Path) -> list[Path]:
    return sorted(place.rglob("*"))


# --- the command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "kv"
    path.mkdir()
    return path


def test_json(tmp_path: Path) -> None:
    done = run("doctor", tmp_path, "--json")
    result = json.loads(done.stdout)
    assert result.keys() == {"labels", "checks", "fallbacks", "ok"}
    assert result["labels"].keys() == {"machine", "cpus", "memory", "kernel", "user", "path"}
    assert result["labels"]["path"] == str(tmp_path)
    assert (done.returncode == 0) == result["ok"]
    for one in result["checks"]:
        assert one.keys() == {"name", "status", "detail", "cure"}
        assert one["status"] in {"ok", "warn", "fail", "absent"}, one
        assert one["detail"], one
        assert bool(one["cure"]) if one["status"] in ("warn", "fail") else one["status"] == "absent" or not one["cure"]
    assert result["ok"], [one for one in result["checks"] if one["status"] == "fail"]


def test_text_and_json_say_the_same(tmp_path: Path) -> None:
    found = by_name(run("doctor", tmp_path, "--json").stdout)
    assert len(found) >= len(NAMES)
    assert found.keys() >= NAMES
    text = run("doctor", tmp_path).stdout
    rows = re.findall(r"^  (\S.*?) {2,}(ok|warn|fail|absent)  ", text, re.M)
    assert rows == [(name, one["status"]) for name, one in found.items()]
    numbered = re.findall(r"^\d+\. (.*)$", text, re.M)
    cures = {one["cure"] for one in found.values()} - {""}
    assert len(numbered) == len(cures)
    for cure in cures:
        assert any(line.endswith(f": {cure}") for line in numbered), cure


def test_it_reports_what_the_library_reports(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["doctor", str(tmp_path), "--json"])
    assert found.exit_code == 0, found.output
    checks, fallbacks = by_name(found.stdout), json.loads(found.stdout)["fallbacks"]
    options = {"store": f"file://{tmp_path}/store", "staging": check.STAGING_BYTES}
    with dualkv.Node("n", check.GEOMETRY, **options) as node:  # type: ignore[arg-type]
        stats = node.stats()
    assert fallbacks == stats["fallbacks"]
    assert {name for name in checks if name.startswith("fallback ")} == {f"fallback {name}" for name in fallbacks}
    assert (checks["O_DIRECT"]["status"] == "ok") == stats["store"]["direct"]
    assert (checks["io_uring"]["status"] == "ok") == (stats["store"]["backend"] == "uring")
    assert (checks["registered buffers"]["status"] == "ok") == stats["store"]["registered"]
    assert (checks["memlock"]["status"] == "ok") == stats["staging"]["locked"]
    assert (checks["huge pages"]["status"] == "ok") == (stats["staging"]["pages"] == "huge")
    if stats["store"]["direct"]:
        assert f"alignment {stats['store']['alignment']} bytes" in checks["O_DIRECT"]["detail"]


def test_nothing_stays_behind(tmp_path: Path, place: Path) -> None:
    (place / "mine").write_text("mine")
    (tmp_path / "temporary").mkdir()
    before = everything_below(tmp_path)
    assert run("doctor", place, TMPDIR=str(tmp_path / "temporary")).returncode == 0
    assert everything_below(tmp_path) == before
    assert run("doctor", TMPDIR=str(place)).returncode == 0  # the default path
    assert everything_below(tmp_path) == before


def test_nothing_stays_behind_after_an_interrupt(place: Path) -> None:
    with subprocess.Popen([sys.executable, *DUALKV, "doctor", str(place)], stdout=subprocess.PIPE) as process:
        assert eventually(lambda: any(place.iterdir()))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LONG_S)
    assert process.returncode != 0
    assert everything_below(place) == []


def test_usage(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for arguments in (["nowhere/at/all"], [file], [tmp_path, tmp_path], ["--fix"]):
        done = run("doctor", *arguments)
        assert done.returncode == 2, arguments
        assert "Error" in done.stderr
        assert done.stdout == ""
    assert run("doctor", "--help").stdout.strip().endswith("Example: dualkv doctor /mnt/kv --strict")


def test_strict_fails_on_warnings(tmp_path: Path) -> None:
    done = run("doctor", tmp_path, "--strict", "--json")
    warnings = [one for one in by_name(done.stdout).values() if one["status"] == "warn"]
    assert done.returncode == (1 if warnings else 0)
    assert json.loads(done.stdout)["ok"] == (not warnings)


def test_no_gpu_library_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from dualkv.doctor import examine; examine(sys.argv[1]);"
        "sys.exit(bool({'torch', 'cupy'} & sys.modules.keys()))"
    )
    assert run(tmp_path, program=("-c", code)).returncode == 0


# --- storage that fails


@pytest.mark.root
def test_a_read_only_path(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=8m,ro"):
        done = run("doctor", disk, "--json")
        found = by_name(done.stdout)
        assert done.returncode == 1
        assert "tmpfs" in found["file system"]["detail"]
        assert "read-only" in found["file system"]["detail"]
        assert (found["file system"]["status"], found["round trip"]["status"]) == ("fail", "fail")
        assert "Read-only file system" in found["round trip"]["detail"]
        assert found["O_DIRECT"]["status"] == found["fallbacks"]["status"] == "absent"
        assert found.keys() >= NAMES
        assert everything_below(disk) == []


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=1m"):
        done = run("doctor", disk, "--json")
        found = by_name(done.stdout)
        assert done.returncode == 1
        assert found["round trip"]["status"] == "fail"
        assert "space" in found["round trip"]["detail"]
        assert everything_below(disk) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_path_of_another_user() -> None:
    found = by_name(run("doctor", "/", "--json").stdout)
    assert found["round trip"]["status"] == "fail"


def with_faults(monkeypatch: pytest.MonkeyPatch, **faults: float) -> None:
    monkeypatch.setattr(dualkv, "Store", functools.partial(dualkv.Store, faults=faults))


@pytest.mark.parametrize("fault", ["corrupt_rate", "error_rate", "short_rate"])
def test_a_store_that_reads_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    with_faults(monkeypatch, seed=1, **{fault: 1})
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path), "--json"])
    assert result.exit_code == 1
    found = by_name(result.stdout)
    assert found["round trip"]["status"] == "fail", found
    assert found["round trip"]["cure"]
    assert [one["name"] for one in found.values() if one["status"] == "fail"] == ["round trip"]
    assert everything_below(tmp_path) == []


def test_wrong_bytes_fail_even_if_the_store_is_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "array_equal", lambda *_: False)
    found = outcome(storage.check_store, Context(tmp_path, store_root=tmp_path))
    assert found["round trip"].status == "fail"
    assert "wrong layers [0, 1, 2, 3]" in found["round trip"].detail


def test_a_store_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_OPERATION_S", 0.2)
    with_faults(monkeypatch, seed=1, drop_rate=1)
    report = examine(tmp_path, (storage.check_store,))
    assert not report.ok()
    assert everything_below(tmp_path) == []


# --- checks that misbehave


def test_an_exception_is_an_outcome(tmp_path: Path) -> None:
    def check_half_way(context: Context) -> Iterable[Check]:
        assert context.store_root
        (context.store_root / "left").mkdir()
        (context.store_root / "left" / "file").write_text("left")
        yield Check("first", "ok", "fine")
        raise ZeroDivisionError("by zero")

    def check_after(_: Context) -> Iterable[Check]:
        yield Check("after", "ok", "fine")

    report = examine(tmp_path, (check_half_way, check_after))
    assert [(one.name, one.status) for one in report.checks] == [("first", "ok"), ("half way", "fail"), ("after", "ok")]
    assert report.checks[1].detail == "ZeroDivisionError: by zero"
    assert not report.ok()
    assert everything_below(tmp_path) == []


def test_a_check_that_hangs_is_given_up(tmp_path: Path) -> None:
    ended = threading.Event()

    def check_hung(_: Context) -> Iterable[Check]:
        yield Check("before", "ok", "fine")
        ended.wait()

    context = Context(tmp_path)
    check.run_guarded(check_hung, context, limit_s=0.1)
    ended.set()
    assert [(one.name, one.status) for one in context.checks] == [("before", "ok"), ("hung", "fail")]
    assert "0.1 s" in context.checks[1].detail


def test_an_interrupt_while_a_check_starts_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    def check_slow(context: Context) -> Iterable[Check]:
        assert context.store_root
        for i in range(20):
            (context.store_root / str(i)).write_text("")
            time.sleep(0.005)
        yield Check("slow", "ok", "fine")

    monkeypatch.setattr(check.threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(tmp_path, (check_slow,))
    assert everything_below(tmp_path) == []


def test_what_could_not_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    report = examine(tmp_path, ())
    assert [one.name for one in report.checks] == ["clean-up"]
    assert str(everything_below(tmp_path)[0]) in report.checks[0].cure


def test_every_fallback_of_the_page_has_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = [row["name"].strip("`") for row in table(SETTINGS, "Fallbacks")]
    assert list(FALLBACKS) == page
    assert {fallback.check for fallback in FALLBACKS.values()} <= NAMES
    counts = {name: i for i, name in enumerate([*page, "of_tomorrow"], 1)}
    monkeypatch.setattr(dualkv.Node, "stats", lambda _: {"fallbacks": counts})
    context = Context(tmp_path, store_root=tmp_path, checks=[Check("io_uring", "warn", "refused", "the very cure")])
    found = outcome(check_fallbacks, context)
    assert context.fallbacks == counts
    for name, count in counts.items():
        one = found[f"fallback {name}"]
        assert (one.status, bool(one.cure), f"counted {count}" in one.detail) == ("warn", True, True)
    assert found["fallback no_uring"].cure == "the very cure"
    assert found["fallback no_direct"].cure == FALLBACKS["no_direct"].cure


# --- other machines: the files they would show


def files(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MOUNTINFO = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /mnt rw - xfs /dev/sdb rw
31 30 0:41 / /mnt/kv\\040cache rw shared:1 - nfs4 server:/export\\040one rw
32 22 0:42 / /over rw - ext4 /dev/old rw
33 22 0:43 / /over ro - tmpfs tmpfs rw
a line of another kind
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "ext4 on / (/dev/sda1)"),
        ("/mntx/kv", "ext4 on / (/dev/sda1)"),
        ("/mnt/kv", "xfs on /mnt (/dev/sdb)"),
        ("/mnt/kv cache/model", "nfs4 on /mnt/kv cache (server:/export one), a network file system"),
        ("/over", "tmpfs on /over (tmpfs), in memory"),
    ],
)
def test_the_mount_of_a_path(path: str, expected: str) -> None:
    mount = storage.mount_of(Path(path), MOUNTINFO)
    assert mount
    assert mount.describe() == expected


@pytest.mark.parametrize(
    ("rmem", "wmem", "status", "cure"),
    [
        ("4096 131072 6291456", "4096 16384 4194304", "ok", ""),
        ("4096 131072 4194303", "4096 16384 4194304", "warn", "`sysctl net.ipv4.tcp_rmem='4096 131072 16777216'`"),
        ("4096 131072 6291456", "4096 16384 212992", "warn", "`sysctl net.ipv4.tcp_wmem='4096 16384 16777216'`"),
        ("garbage", "4096 16384 4194304", "absent", ""),
    ],
)
def test_tcp_buffers(tmp_path: Path, rmem: str, wmem: str, status: str, cure: str) -> None:
    proc = files(
        tmp_path,
        {"sys/net/ipv4/tcp_rmem": rmem, "sys/net/ipv4/tcp_wmem": wmem, "sys/net/core/rmem_max": "212992"},
    )
    found = outcome(network.check_tcp_buffers, Context(tmp_path, proc=proc))["TCP buffers"]
    assert (found.status, found.cure) == (status, cure)
    if status == "ok":
        assert "net.core.rmem_max 208.0 KiB, net.core.wmem_max not readable" in found.detail


@pytest.mark.parametrize(("scope", "status"), [("0", "ok"), ("1", "warn"), ("2", "warn")])
def test_yama_warns_even_where_root_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, status: str
) -> None:
    monkeypatch.setattr(network, "read_sibling", lambda: "")
    proc = files(tmp_path, {"sys/kernel/yama/ptrace_scope": f"{scope}\n"})
    found = outcome(network.check_shm, Context(tmp_path, proc=proc))["shm"]
    assert found.status == status
    assert f"ptrace_scope={scope}" in found.detail
    assert ("ptrace_scope=0" in found.cure) == (status == "warn")


def test_a_sibling_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PR_SET_DUMPABLE off: not readable for the same user; root may read it still."""
    guarded = network._HOLDER.replace(
        "import ctypes, sys", "import ctypes, sys\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"
    )
    monkeypatch.setattr(network, "_HOLDER", guarded)
    found = outcome(network.check_shm, Context(tmp_path, proc=tmp_path))["shm"]
    if os.geteuid() == 0:
        assert found.status == "ok"
    else:
        assert found.status == "warn"
        assert "EPERM" in found.detail
    monkeypatch.setattr(network, "_HOLDER", network._HOLDER.replace("addressof(held)", "addressof(held) * 0 + 8"))
    found = outcome(network.check_shm, Context(tmp_path, proc=tmp_path))["shm"]
    assert found.status == "warn"
    assert "EFAULT" in found.detail or "EPERM" in found.detail


def test_the_marks_are_the_defaults_of_a_node() -> None:
    defaults = node_defaults()
    names = ("dscp", "so_priority", "service_level")
    lanes = {lane: tuple(defaults[f"{lane}_{name}"] for name in names) for lane in ("low", "high")}
    assert lanes == {lane: (marks.dscp, marks.so_priority, marks.service_level) for lane, marks in LANES.items()}


def test_refused_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "SO_PRIORITY", 9999)
    found = outcome(network.check_tcp_marks, Context(tmp_path))["TCP marks"]
    assert found.status == "warn"
    assert "ENOPROTOOPT" in found.detail
    assert found.cure == FALLBACKS["lane_not_marked"].cure


def test_numa(tmp_path: Path) -> None:
    mine = ",".join(map(str, os.sched_getaffinity(0)))
    memory = "Node {} MemTotal:  1048576 kB\nNode {} MemFree: 1 kB\n"
    nodes = {"node0/cpulist": mine, "node0/meminfo": memory, "node10/cpulist": "", "node10/meminfo": memory}
    root = files(tmp_path, {f"devices/system/node/{name}": text for name, text in nodes.items()})
    found = outcome(machine.check_numa, Context(tmp_path, sys=root))["NUMA"]
    assert found == Check("NUMA", "ok", f"node0: CPUs {mine}, 1.0 GiB; node10: CPUs none, 1.0 GiB")
    files(tmp_path, {"devices/system/node/node2/cpulist": f"{mine},5000-5003\n"})
    found = outcome(machine.check_numa, Context(tmp_path, sys=root))["NUMA"]
    assert found.status == "warn"
    assert "may run on 2 nodes" in found.detail
    assert "numactl" in found.cure
    assert outcome(machine.check_numa, Context(tmp_path, sys=tmp_path / "no"))["NUMA"].status == "absent"


def test_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = "class/infiniband/mlx5_0/ports/1"
    gids = {f"{port}/gids/{i}": gid for i, gid in enumerate(["fe80::1", "0000:" * 7 + "0000"])}
    state = {f"{port}/state": "4: ACTIVE", f"{port}/link_layer": "InfiniBand", f"{port}/rate": "400 Gb/sec (4X NDR)"}
    context = Context(tmp_path, sys=files(tmp_path, gids | state))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    found = outcome(devices.check_rdma, context)["RDMA"]
    assert found == Check("RDMA", "ok", "mlx5_0 port 1: ACTIVE, InfiniBand, 400 Gb/sec (4X NDR), 1 GIDs")

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    found = outcome(devices.check_rdma, context)["RDMA"]
    assert found.status == "warn"
    assert "libibverbs.so.1: cannot open" in found.detail
    assert "rdma-core" in found.cure
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    files(tmp_path, {f"{port}/state": "1: DOWN"})
    found = outcome(devices.check_rdma, context)["RDMA"]
    assert found.status == "warn"
    assert "no port is active" in found.detail
    found = outcome(devices.check_rdma, Context(tmp_path, sys=tmp_path / "no"))["RDMA"]
    assert found.status == "absent"


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  Sat May 24\nGCC version: gcc 12.2.0\n"
H200 = {"ordinal": 0, "name": "NVIDIA H200", "cuda": "12.9", "missing": {}}


@pytest.mark.parametrize(
    ("driver", "child", "status", "text"),
    [
        ("", {"error": "no libcuda.so.1"}, "absent", "no driver"),
        (DRIVER, {"gpus": [H200, H200]}, "ok", "driver 575.57.08, CUDA 12.9: 2 x NVIDIA H200; copies by kernel"),
        (DRIVER, {"error": "no libcuda.so.1"}, "warn", "driver 575.57.08, but no libcuda.so.1"),
        (DRIVER, {"gpus": []}, "warn", "it shows no GPU"),
        ("", {"gpus": [H200]}, "ok", "driver of unknown version, CUDA 12.9: 1 x NVIDIA H200"),
        (DRIVER, {"gpus": [H200 | {"missing": {"batch": "too old"}}]}, "warn", "1 x NVIDIA H200; no batch: too old"),
    ],
)
def test_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, child: dict[str, Any], status: str, text: str
) -> None:
    monkeypatch.setattr(devices, "_list_gpus", lambda: child)
    content = {"driver/nvidia/version": driver} if driver else {}
    modules = "nvidia_peermem 1 0 - Live 0x0\nnvidia_uvm 1 0 - Live 0x0\n"
    proc = files(tmp_path, content | {"modules": modules})
    found = outcome(devices.check_cuda, Context(tmp_path, proc=proc))
    assert found["CUDA"].status == status
    assert text in found["CUDA"].detail
    assert found["GPUDirect"].detail.startswith("nvidia_peermem loaded")


@pytest.mark.parametrize(
    ("program", "error"),
    [("import os; os.abort()", "ended its process"), ("import time; time.sleep(60)", "did not answer")],
)
def test_a_driver_that_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch, program: str, error: str) -> None:
    monkeypatch.setattr(devices, "_LIST_GPUS", program)
    monkeypatch.setattr(devices, "_CHILD_S", 0.5)
    assert error in str(devices._list_gpus()["error"])


@pytest.mark.parametrize(("pages", "status"), [("huge", "ok"), ("transparent huge", "warn"), ("small", "warn")])
def test_huge_pages(tmp_path: Path, pages: str, status: str) -> None:
    content = {
        "transparent_hugepage/enabled": "always madvise [never]",
        "transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force",
        "hugepages/hugepages-2048kB/nr_hugepages": "40",
        "hugepages/hugepages-2048kB/free_hugepages": "8",
    }
    root = files(tmp_path, {f"kernel/mm/{name}": text for name, text in content.items()})
    found = machine._huge_pages(Context(tmp_path, sys=root), pages, 0)
    assert found.status == status
    assert "40 pages of 2 MiB reserved, 8 free; transparent_hugepage/enabled is never" in found.detail
    assert ("got 0 B of them" in found.detail) == (pages == "transparent huge")
    assert ("vm.nr_hugepages=32" in found.cure) == (status == "warn")


def test_memory_that_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool: Callable[..., dualkv.StagingPool] = functools.partial(dualkv.StagingPool, lock_memory=False)
    monkeypatch.setattr(dualkv, "StagingPool", pool)
    found = outcome(machine.check_memory, Context(tmp_path))["memlock"]
    assert found.status == "warn"
    assert "64.0 MiB of staging not locked; RLIMIT_MEMLOCK" in found.detail
    assert "LimitMEMLOCK" in found.cure


def test_a_build_without_io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise dualkv.Error("this build has no io_uring: install liburing's headers", "unsupported")

    monkeypatch.setattr(dualkv, "Store", refuse)
    found = outcome(storage.check_io_uring, Context(tmp_path, any_root=tmp_path))
    assert [found[name].status for name in ("io_uring build", "io_uring", "registered buffers")] == [
        "warn",
        "absent",
        "absent",
    ]
    assert "liburing's headers" in found["io_uring build"].cure


# --- io_uring refused by a real seccomp filter


def without_io_uring(*arguments: object, program: Iterable[str] = NO_URING) -> subprocess.CompletedProcess[str]:
    """A process that the kernel refuses io_uring, and would not without the filter."""
    done = run(*arguments, program=program)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    return done


@pytest.fixture
def permitted(tmp_path: Path) -> None:
    """Skips where io_uring is refused even without the filter."""
    place = tmp_path / "probe"
    try:
        dualkv.Store(f"file://{place}", check.GEOMETRY, staging="4MiB", backend="uring")
    except dualkv.Error as error:
        pytest.skip(f"no io_uring to refuse: {error}")


@pytest.mark.usefixtures("permitted")
def test_doctor_names_a_seccomp_filter(place: Path) -> None:
    done = without_io_uring("doctor", place, "--json")
    found, fallbacks = by_name(done.stdout), json.loads(done.stdout)["fallbacks"]
    assert done.returncode == 0, done.stdout
    assert found["io_uring build"]["status"] == "ok"
    assert found["io_uring"]["status"] == "warn"
    assert "refused by the kernel: EPERM (Operation not permitted)" in found["io_uring"]["detail"]
    assert "seccomp: a filter" in found["io_uring"]["detail"]
    assert "a seccomp profile that permits io_uring_setup" in found["io_uring"]["cure"]
    assert found["registered buffers"]["status"] == "absent"
    assert fallbacks["no_uring"] == 1
    assert found["fallback no_uring"]["status"] == "warn"
    assert found["fallback no_uring"]["cure"] == found["io_uring"]["cure"]
    assert found["round trip"]["status"] == "ok"
    assert "(pread)" in found["round trip"]["detail"]
    assert everything_below(place) == []


@pytest.mark.usefixtures("permitted")
def test_doctor_strict_under_a_seccomp_filter(place: Path) -> None:
    done = without_io_uring("doctor", place, "--strict")
    assert done.returncode == 1
    assert re.search(r"^\d+\. io_uring, fallback no_uring: allow it", done.stdout, re.M), done.stdout
    assert everything_below(place) == []


CODE = """
import gc, json, os, sys
from seccomp_no_uring import refuse_io_uring
try:
    refuse_io_uring()
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(77)
import dualkv
from support import error_of, filled, make_geometry, make_keys, open_fds, threads
geometry = make_geometry()
def store(**options):
    return dualkv.Store("file://" + sys.argv[1], geometry, staging="1MiB", direct="off", **options)
def told(error):
    return error and {"code": error.code, "errno": error.os_errno, "message": error.message}
out = {}
"""


def in_child(code: str, root: Path) -> dict[str, Any]:
    done = without_io_uring(root, program=("-c", f"{CODE}\n{code}\nprint(json.dumps(out))"))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.usefixtures("permitted")
def test_a_store_that_insists_on_io_uring_is_refused(root: Path) -> None:
    code = """
attempt = lambda: error_of(lambda: store(backend="uring"))
out["error"] = told(attempt())
gc.collect()
fds, running = open_fds(), threads()
for _ in range(20): attempt()
gc.collect()
out["leaked"] = [open_fds() - fds, threads() - running]
"""
    result = in_child(code, root)
    assert (result["error"]["code"], result["error"]["errno"]) == ("unsupported", 1)
    assert "io_uring is refused by the kernel" in result["error"]["message"]
    assert "seccomp" in result["error"]["message"]
    assert result["leaked"] == [0, 0]
    # The namespace's folders and its geometry are made before the reader; no block and no temporary file.
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["geometry"]
    (namespace,) = root.iterdir()
    assert {path.name for path in namespace.iterdir()} == {f"{i:02x}" for i in range(256)} | {"geometry", "tmp"}


@pytest.mark.usefixtures("permitted")
def test_a_store_falls_back_on_pread_and_reads_right_bytes(root: Path) -> None:
    code = """
auto = store()
cache, keys = filled(geometry, 3), make_keys(geometry, 3)
auto.save(keys, cache.kv, range(3)).wait(10)
asked = auto.staging.acquire(3)
asked.wait(10)
slots = asked.slots()
auto.read(keys, slots).wait(10)
out["right"] = all(
    bytes(memoryview(slot))[geometry.layer_offset(i):][:array.shape[1]] == array[block].tobytes()
    for block, slot in enumerate(slots) for i, array in enumerate(cache.arrays)
)
out["hit"] = auto.match(keys)
out["stats"] = auto.stats()
"""
    result = in_child(code, root)
    assert result["right"]
    assert result["hit"] == 3
    assert result["stats"]["backend"] == "pread"
    assert result["stats"]["fallbacks"] == {"no_uring": 1}
    assert not result["stats"]["registered"]


@pytest.mark.usefixtures("permitted")
def test_fail_on_fallback_refuses_pread(root: Path) -> None:
    code = """
out["error"] = told(error_of(lambda: store(fail_on_fallback=True)))
out["asked for"] = told(error_of(lambda: store(fail_on_fallback=True, backend="pread")))
"""
    result = in_child(code, root)
    assert result["error"]["code"] == "unsupported"
    assert "fallback 'no_uring' is not allowed (fail_on_fallback)" in result["error"]["message"]
    assert "io_uring is refused by the kernel" in result["error"]["message"]
    assert result["asked for"] is None
