"""Released peers as contenders: each runs in its own Python, as processes that answer calls (``peer_runner.py``)."""

import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping

from dualkv.bench.measure import Contender, Run, Start
from dualkv.bench.processes import JsonProcess
from dualkv.errors import Error

_RUNNER = pathlib.Path(__file__).with_name("peer_runner.py")
_START_S = 120.0  # importing torch from a cold disk
_MODULES = {"nixl": ("nixl", "nixl_cu13", "nixl_cu12"), "mooncake": ("mooncake",)}


def python_of(peer: str, given: str | None) -> str | None:
    """The interpreter to run ``nixl`` or ``mooncake`` with: the given one, or this one if it has the peer."""
    if given is not None:
        return given
    return sys.executable if any(importlib.util.find_spec(name) for name in _MODULES[peer]) else None


def version(kind: str, python: str) -> str:
    """Of the peer, which is imported for it. Raises Error with the reason it can't be."""
    with _runner(kind, python) as process:
        return str(process.call("version", timeout_s=_START_S))


def nixl_posix(python: str, path: str, block_bytes: int, count: int, direct: bool) -> Start:
    """NIXL's POSIX plugin, io_uring, reading ``count`` blocks of a file in the order of the others."""

    def start(closing: contextlib.ExitStack) -> Contender:
        process = closing.enter_context(_runner("nixl-posix", python))
        process.call("open", path=path, block_bytes=block_bytes, count=count, direct=direct, timeout_s=_START_S)
        return _verified([process], process, count)

    return start


def transfer_peer(kind: str, python: str, block_bytes: int, count: int, env: Mapping[str, str]) -> Start:
    """``nixl-xfer`` or ``mooncake``: memory to memory between two processes, same blocks, same order."""

    def start(closing: contextlib.ExitStack) -> Contender:
        target = closing.enter_context(_runner(kind, python, env))
        source = closing.enter_context(_runner(kind, python, env))
        where = target.call("open", block_bytes=block_bytes, count=count, sends=False, timeout_s=_START_S)
        source.call("open", block_bytes=block_bytes, count=count, sends=True, timeout_s=_START_S)
        source.call("connect", **where)
        return _verified([source, target], target, count)

    return start


def _runner(kind: str, python: str, env: Mapping[str, str] | None = None) -> JsonProcess:
    return JsonProcess(kind, [python, str(_RUNNER), kind], env)


def _verified(processes: list[JsonProcess], target: JsonProcess, count: int) -> Contender:
    """Runs the first process, verifies the first run. All are stopped in between: some poll while they are idle."""
    first = True

    def run() -> Run:
        nonlocal first
        with _running(processes):
            out = _run(processes)
            if first and (right := target.call("verify")) != count:
                raise Error(f"{count - right} of {count} blocks arrived wrong", "corrupt")
        first = False
        return out

    for process in processes:
        process.pause()
    return run


@contextlib.contextmanager
def _running(processes: list[JsonProcess]) -> Iterator[None]:
    for process in processes:
        process.resume()
    try:
        yield
    finally:
        for process in processes:
            process.pause()


def _run(processes: list[JsonProcess]) -> Run:
    """The first process's own CPU time is that of the run; the other's that of the whole call."""
    before = [other.call("cpu") for other in processes[1:]]
    told = processes[0].call("run", timeout_s=_START_S)
    told["cpu_s"] += sum(other.call("cpu") - began for other, began in zip(processes[1:], before, strict=True))
    return Run(**told)
