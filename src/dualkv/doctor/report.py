"""Runs all checks and keeps what they found."""

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from dualkv.doctor.check import Check, CheckFunction, Context, run_guarded, scratch_directory
from dualkv.doctor.devices import check_cuda, check_rdma
from dualkv.doctor.fallbacks import check_fallbacks
from dualkv.doctor.machine import check_memory, check_numa, check_versions, labels
from dualkv.doctor.network import check_shm, check_tcp_buffers, check_tcp_marks
from dualkv.doctor.storage import check_file_system, check_io_uring, check_store

CHECKS: tuple[CheckFunction, ...] = (
    check_versions,
    check_io_uring,
    check_file_system,
    check_store,
    check_memory,
    check_numa,
    check_tcp_buffers,
    check_tcp_marks,
    check_shm,
    check_rdma,
    check_cuda,
    check_fallbacks,
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the checks found, in order."""

    labels: dict[str, str]
    checks: list[Check]
    fallbacks: dict[str, int]  # as in Node.stats()

    def count(self, status: str) -> int:
        """How many checks have this status."""
        return sum(check.status == status for check in self.checks)

    def ok(self, strict: bool = False) -> bool:
        """No check failed; if strict, none warns either."""
        return self.count("fail") == 0 and not (strict and self.count("warn"))

    def cures(self) -> dict[str, list[str]]:
        """Each cure once, with the checks that ask for it."""
        out: dict[str, list[str]] = {}
        for check in self.checks:
            if check.cure:
                out.setdefault(check.cure, []).append(check.name)
        return out

    def to_json(self, strict: bool = False) -> dict[str, Any]:
        """``{labels, checks [{name, status, detail, cure}], fallbacks, ok}``."""
        return {**dataclasses.asdict(self), "ok": self.ok(strict)}


def _scratch_in(stack: contextlib.ExitStack, place: str | Path) -> tuple[Path | None, str]:
    """A directory there, or why there is none."""
    try:
        return stack.enter_context(scratch_directory(Path(place))), ""
    except OSError as error:
        return None, error.strerror or str(error)


def default_path() -> str:
    """The directory for temporary files, or the current one."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return os.curdir


def examine(path: str | Path, checks: tuple[CheckFunction, ...] = CHECKS) -> Report:
    """Runs the checks; ``path`` is where blocks would be stored. Nothing of it stays there.

    Takes a second or two and about 100 MiB of memory; a check that hangs is given up after ten seconds.
    """
    context = Context(Path(path))
    with contextlib.ExitStack() as stack:
        context.store_root, context.refusal = _scratch_in(stack, path)
        context.any_root = context.store_root or _scratch_in(stack, default_path())[0]
        for check in checks:
            run_guarded(check, context)
    for root in {context.store_root, context.any_root} - {None}:
        if root and root.exists():
            context.checks.append(Check("clean-up", "fail", f"{root} could not be removed", f"`rm -r {root}`"))
    return Report(labels(Path(path)), context.checks, context.fallbacks)
