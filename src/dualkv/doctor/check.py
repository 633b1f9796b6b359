"""A check and its outcome, what checks share, and the guard each one runs under."""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import dualkv

Status = Literal["ok", "warn", "fail", "absent"]

LIMIT_S = 10.0  # of one check: far above what any takes, unless a file system or a driver hangs
STAGING_BYTES = 64 << 20
GEOMETRY = dualkv.KvGeometry(layers=4, tokens_per_block=16, layer_bytes=256 << 10, namespace="dualkv-doctor")


@dataclasses.dataclass(frozen=True)
class Check:
    """Outcome of one check. ``cure`` is empty when nothing is to be done."""

    name: str
    status: Status
    detail: str
    cure: str = ""


@dataclasses.dataclass
class Context:
    """What checks read and where they leave their outcomes, in order.

    ``store_root`` is a directory of the doctor's own in ``path``, None (and ``refusal`` says why) where none can be
    made; ``any_root`` is the same, or one in the directory for temporary files. Tests give other ``proc`` and ``sys``.
    """

    path: Path
    store_root: Path | None = None
    any_root: Path | None = None
    refusal: str = ""
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    checks: list[Check] = dataclasses.field(default_factory=list)
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)

    def sysctl(self, name: str) -> str | None:
        """Value of ``net.core.rmem_max``; None if it can't be read."""
        return read_text(self.proc / "sys" / name.replace(".", "/"))

    def cure_of(self, name: str) -> str:
        """The cure that an earlier check found; empty if none."""
        return next((check.cure for check in self.checks if check.name == name), "")


CheckFunction = Callable[[Context], Iterable[Check]]


def read_text(path: Path) -> str | None:
    """Content of a small file without white space at its ends; None if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def errno_text(number: int) -> str:
    """``EPERM (Operation not permitted)``."""
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"


def explain(error: dualkv.Error) -> tuple[str, str]:
    """What went wrong and the cure, from an Error: its messages put the cure behind a semicolon."""
    fact, _, cure = error.message.partition("; ")
    return (f"{fact}: {errno_text(error.os_errno)}" if error.os_errno else fact), cure


@contextlib.contextmanager
def scratch_directory(place: Path) -> Iterator[Path]:
    """A directory of the doctor's own in ``place``; in the end it is gone, whatever happened."""
    directory = Path(tempfile.mkdtemp(prefix=".dualkv-doctor-", dir=place))
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        except BaseException:  # interrupted in the middle of it
            shutil.rmtree(directory, ignore_errors=True)
            raise


def run_guarded(check: CheckFunction, context: Context, limit_s: float = LIMIT_S) -> None:
    """Adds the outcomes of ``check`` to the context; one that raises or hangs has failed and harms no other."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    found: list[Check] = []
    ended = threading.Event()

    def collect() -> None:
        try:
            for outcome in check(context):
                found.append(outcome)  # noqa: PERF402 - what came before an exception counts
        except Exception as error:
            cure = "unexpected: please report it with the output of `dualkv doctor --json`"
            found.append(Check(name, "fail", f"{type(error).__name__}: {error}", cure))
        finally:
            ended.set()

    thread = threading.Thread(target=collect, name=f"doctor-{name}", daemon=True)
    try:
        thread.start()
        hangs = not ended.wait(limit_s)
    except KeyboardInterrupt:  # perhaps within start(), where the thread may run and can't be joined yet
        ended.wait(limit_s)  # it must neither write to what is about to be removed nor end with the interpreter
        raise
    context.checks += list(found)
    if hangs:
        cure = "a file system, driver or device that does not answer; look at `dmesg`"
        context.checks.append(Check(name, "fail", f"did not end within {limit_s:g} s", cure))
