"""Checks of the host: versions, locked memory, huge pages, NUMA."""

import importlib.metadata
import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import dualkv
from dualkv.doctor.check import GEOMETRY, STAGING_BYTES, Check, Context, read_text
from dualkv.doctor.cures import FALLBACKS, HUGE_PAGE_BYTES
from dualkv.sizes import format_size

# Distributions that bring a GPU runtime: looked up by name, never imported.
_GPU_PACKAGES = (
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime-cu13",
)


def labels(path: Path) -> dict[str, str]:
    """The machine in words, and where storage was looked at."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "memory": format_size(memory),
        "kernel": f"{platform.system()} {platform.release()}",
        "user": "root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
        "path": str(path),
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown libc"
    except (OSError, ValueError):
        return "not glibc"


def check_versions(_: Context) -> Iterator[Check]:
    """dualkv and what it runs on; torch and CUDA packages only if installed."""
    versions = (
        f"dualkv {dualkv.__version__}",
        f"Python {platform.python_version()}",
        f"numpy {_installed('numpy')}",
        f"Linux {platform.release()}",
        _libc(),
    )
    yield Check("versions", "ok", ", ".join(versions))
    torch = _installed("torch")
    yield Check("torch", "ok" if torch else "absent", torch or "not installed; only the reference engines need it")
    found = [f"{name} {version}" for name in _GPU_PACKAGES if (version := _installed(name))]
    yield Check("CUDA packages", "ok" if found else "absent", ", ".join(found) or "none installed; none needed")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else format_size(value)


def _transparent_bytes(proc: Path) -> int:
    """Of this process, in transparent huge pages; 0 if unknown."""
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", read_text(proc / "self/smaps_rollup") or "", re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def check_memory(context: Context) -> Iterator[Check]:
    """Takes staging, and looks whether it was locked and what pages it got."""
    before = _transparent_bytes(context.proc)
    staging = dualkv.StagingPool(GEOMETRY, STAGING_BYTES)
    transparent = _transparent_bytes(context.proc) - before
    stats = staging.stats()
    yield _memlock(bool(stats["locked"]))
    yield _huge_pages(context, str(stats["pages"]), transparent if stats["locked"] else None)


def _memlock(locked: bool) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = f"RLIMIT_MEMLOCK {_limit(soft)} soft, {_limit(hard)} hard"
    size = format_size(STAGING_BYTES)
    if locked:
        return Check("memlock", "ok", f"{size} of staging locked; {limits}")
    return Check("memlock", "warn", f"{size} of staging not locked; {limits}", FALLBACKS["staging_not_locked"].cure)


def _chosen(text: str | None) -> str:
    """``madvise`` of ``always [madvise] never``."""
    found = re.search(r"\[([\w+]+)\]", text or "")
    return found[1] if found else "unknown"


def _huge_pages(context: Context, pages: str, transparent_bytes: int | None) -> Check:
    transparent = context.sys / "kernel/mm/transparent_hugepage"
    reserved = context.sys / f"kernel/mm/hugepages/hugepages-{HUGE_PAGE_BYTES >> 10}kB"
    count, free = (read_text(reserved / f"{name}_hugepages") or "0" for name in ("nr", "free"))
    enabled, shared = (_chosen(read_text(transparent / name)) for name in ("enabled", "shmem_enabled"))
    got = f"staging got {pages} pages"
    if pages == "transparent huge":
        got = "staging asked for transparent huge pages"
        if transparent_bytes is not None:
            got += f" and got {format_size(max(transparent_bytes, 0))} of them"
    detail = (
        f"{got}; {count} pages of {HUGE_PAGE_BYTES >> 20} MiB reserved, {free} free; "
        f"transparent_hugepage/enabled is {enabled}, shmem_enabled {shared}"
    )
    if pages == "huge":
        return Check("huge pages", "ok", detail)
    return Check("huge pages", "warn", detail, FALLBACKS["no_huge_pages"].cure)


def _cpus(text: str) -> set[int]:
    """``0-3,8`` as numbers."""
    out: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        out |= set(range(int(first), int(last or first) + 1))
    return out


def check_numa(context: Context) -> Iterator[Check]:
    """CPUs and memory a node; whether this process may run on more than one of them."""
    folder = context.sys / "devices/system/node"
    nodes = sorted(folder.glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    if not nodes:
        yield Check("NUMA", "absent", "this kernel shows no nodes")
        return
    details, mine = [], []
    for node in nodes:
        cpus = read_text(node / "cpulist") or ""
        found = re.search(r"MemTotal:\s+(\d+) kB", read_text(node / "meminfo") or "")
        size = format_size(int(found[1]) << 10) if found else "unknown size"
        details.append(f"{node.name}: CPUs {cpus or 'none'}, {size}")
        if _cpus(cpus) & os.sched_getaffinity(0):
            mine.append(node.name)
    if len(mine) > 1:
        cure = "bind each engine to the node of its NICs: `numactl --cpunodebind=0 --membind=0`"
        yield Check("NUMA", "warn", f"{'; '.join(details)}; this process may run on {len(mine)} nodes", cure)
    else:
        yield Check("NUMA", "ok", "; ".join(details))
