"""The raw limit loops: they do what they claim, and a failure leaves no descriptor and no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import LONG_S, error_of, eventually, open_fds, threads

import dualkv
from dualkv.bench import limits

BLOCK = 64 << 10


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A file of 32 blocks."""
    path = tmp_path / "blocks"
    path.write_bytes(os.urandom(32 * BLOCK))
    return path


def read_or_skip(path: Path, offsets: list[int] | np.ndarray, *, direct: bool, depth: int = 8) -> limits.Sample:
    try:
        return limits.read_file(path, BLOCK, offsets, depth=depth, direct=direct)
    except dualkv.Error as error:
        if error.code == "unsupported":
            pytest.skip(str(error))
        raise


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def is_zombie(pid: int) -> bool:
    """Ended, and its new parent has not noticed: not ours to reap."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# --- storage


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("depth", [1, 8, 1024])
def test_read_file_reads_every_offset(blocks: Path, direct: bool, depth: int) -> None:
    before = open_fds()
    sample = read_or_skip(blocks, np.arange(32)[::-1] * BLOCK, direct=direct, depth=depth)
    assert sample.bytes == 32 * BLOCK
    assert len(sample.latencies_us) == 32
    assert all(0 < latency <= sample.seconds * 1e6 for latency in sample.latencies_us)
    assert sample.cpu_s > 0
    assert sample.gbps == sample.bytes / sample.seconds / 1e9
    assert sample.cpu_s_per_gb == sample.cpu_s / (sample.bytes / 1e9)
    assert open_fds() == before


@pytest.mark.parametrize("at", [0, 13, 31])
def test_a_short_read_names_its_offset(blocks: Path, at: int) -> None:
    offsets = [i * BLOCK for i in range(32)]
    offsets[at] = 32 * BLOCK - 512
    before = open_fds()
    error = error_of(lambda: read_or_skip(blocks, offsets, direct=False))
    assert error is not None
    assert error.code == "io"
    assert f"offset {32 * BLOCK - 512}" in str(error)
    assert open_fds() == before
    assert read_or_skip(blocks, [0], direct=False).bytes == BLOCK


def test_a_read_that_the_kernel_refuses_names_its_offset(blocks: Path) -> None:
    before = open_fds()
    error = error_of(lambda: read_or_skip(blocks, [0, 1], direct=True))
    assert error is not None
    assert error.code == "io"
    assert "offset 1 " in str(error)
    assert error.os_errno != 0
    assert open_fds() == before


def test_read_file_says_what_is_wrong_before_it_reads(blocks: Path, tmp_path: Path) -> None:
    read_or_skip(blocks, [0], direct=False)
    before = open_fds()
    calls: dict[str, Callable[[], limits.Sample]] = {
        "block_bytes = 0": lambda: limits.read_file(blocks, 0, [0]),
        "block_bytes = 1073741825": lambda: limits.read_file(blocks, 2**30 + 1, [0]),
        "depth = 0": lambda: limits.read_file(blocks, BLOCK, [0], depth=0),
        "depth = 1025": lambda: limits.read_file(blocks, BLOCK, [0], depth=1025),
        "0 offsets": lambda: limits.read_file(blocks, BLOCK, []),
        "offsets: integers": lambda: limits.read_file(blocks, BLOCK, [-1]),
        "one-dimensional": lambda: limits.read_file(blocks, BLOCK, [[0]]),
    }
    for message, call in calls.items():
        error = error_of(call)
        assert error is not None, message
        assert error.code == "invalid_argument"
        assert message in str(error)
    missing = error_of(lambda: limits.read_file(tmp_path / "missing", BLOCK, [0]))
    assert missing is not None
    assert missing.code == "not_found"
    assert open_fds() == before


# --- memory


@pytest.mark.parametrize("huge_pages", [False, True])
def test_copy_arena_runs_again_and_again(huge_pages: bool) -> None:
    arena = limits.CopyArena(4 << 20, huge_pages)
    for _ in range(3):
        sample = arena.run(BLOCK, [3 * BLOCK, 0, BLOCK], [0, (4 << 20) - BLOCK, 5 * BLOCK])
        assert sample.bytes == 3 * BLOCK
        assert sample.seconds > 0
        assert sample.latencies_us == ()
    once = limits.copy_memory(BLOCK, [0], [BLOCK], bytes=2 * BLOCK, huge_pages=huge_pages)
    assert once.bytes == BLOCK


def test_blocks_outside_are_refused() -> None:
    arena = limits.CopyArena(4 << 20)
    for sources, targets in (([4 << 20], [0]), ([0], [(4 << 20) - BLOCK + 1]), ([0], []), ([], [])):
        error = error_of(lambda s=sources, t=targets: arena.run(BLOCK, s, t))  # type: ignore[misc]
        assert error is not None
        assert error.code == "invalid_argument"
    assert arena.run(BLOCK, [0], [0]).bytes == BLOCK


def test_checksum_memory_counts_whole_blocks() -> None:
    assert limits.checksum_memory((2 << 20) + 1, BLOCK).bytes == 2 << 20
    error = error_of(lambda: limits.checksum_memory(BLOCK, BLOCK + 1))
    assert error is not None
    assert error.code == "invalid_argument"


# --- sockets


def test_raw_sockets_run_again_and_again_and_leave_nothing() -> None:
    before, tasks = open_fds(), threads()
    with limits.RawSockets(3, chunk_bytes=100_000, memory_bytes=1 << 20) as sockets:
        pid = sockets.pid
        for size in (1, 2, (8 << 20) + 1):
            sample = sockets.run(size)
            assert sample.bytes == size
            assert sample.seconds > 0
            assert sample.cpu_s > 0
    assert gone(pid)
    assert open_fds() == before
    assert eventually(lambda: threads() <= tasks)  # the kernel lists a thread for a moment after its join
    sockets.close()
    error = error_of(lambda: sockets.run(1))
    assert error is not None
    assert error.code == "invalid_argument"


def test_a_receiver_that_dies_ends_the_run_and_leaves_nothing() -> None:
    before = open_fds()
    sockets = limits.RawSockets(2, memory_bytes=1 << 20)
    os.kill(sockets.pid, signal.SIGKILL)
    error = error_of(lambda: sockets.run(1 << 20))
    assert error is not None
    assert error.code == "peer_lost"
    assert gone(sockets.pid)
    assert open_fds() == before


def test_a_receiver_that_stops_is_killed() -> None:
    before = open_fds()
    with limits.RawSockets(1, memory_bytes=1 << 20) as sockets:
        os.kill(sockets.pid, signal.SIGSTOP)
    assert gone(sockets.pid)
    assert open_fds() == before


def test_the_receiver_ends_with_its_sender() -> None:
    before = open_fds()
    program = (
        "import os, signal; from dualkv.bench import limits;"
        "print(limits.RawSockets(2, memory_bytes=1 << 20).pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    sender = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=LONG_S, check=False)
    assert sender.returncode == -signal.SIGKILL
    pid = int(sender.stdout)
    assert eventually(lambda: gone(pid) or is_zombie(pid), LONG_S)
    assert open_fds() == before


def test_raw_sockets_say_what_is_wrong_before_they_start() -> None:
    before = open_fds()
    for values in ({"streams": 0}, {"streams": 2, "memory_bytes": 8191}, {"streams": 1, "chunk_bytes": 0}):
        error = error_of(lambda values=values: limits.RawSockets(**values))  # type: ignore[misc]
        assert error is not None
        assert error.code == "invalid_argument"
    with limits.RawSockets(1, memory_bytes=4096) as sockets:
        assert error_of(lambda: sockets.run(0)) is not None
        assert sockets.run(1).bytes == 1
    assert open_fds() == before
