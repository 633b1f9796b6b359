"""What a result was measured on, as labels that every report prints."""

import datetime
import os
import pathlib
import platform
import re

import dualkv
from dualkv.errors import Error
from dualkv.sizes import format_size


def labels(*, transport: str, topology: str, path: str | None = None) -> dict[str, str]:
    """The machine, the versions, and what stood in for what. ``path``: where files were read, if any were."""
    out = {
        "memory": "host",
        "transport": transport,
        "snic": "none",
        "topology": topology,
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "ram": format_size(memory_bytes("MemTotal")),
        "load": f"{os.getloadavg()[0]:.1f} before",
        "huge pages": huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "dualkv": dualkv.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return out if path is None else {**out, "file system": file_system(path)}


def cpu_model() -> str:
    """As the kernel names it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    return found[1] if found else platform.machine()


def memory_bytes(field: str) -> int:
    """A line of /proc/meminfo, like ``MemAvailable``; 0 if the kernel does not tell."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _read("/proc/meminfo"), re.M)
    return int(found[1]) << 10 if found else 0


def huge_pages() -> str:
    """Huge pages that are reserved, and the mode of transparent ones."""
    found = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    reserved = re.search(r"^HugePages_Total:\s*(\d+)", _read("/proc/meminfo"), re.M)
    return f"{reserved[1] if reserved else 0} reserved, transparent: {found[1] if found else 'unknown'}"


def file_system(path: str) -> str:
    """Type and device of what is mounted at ``path``, like ``ext4 on /dev/sda1``."""
    real = pathlib.Path(os.path.realpath(path))
    best = ("", "unknown")
    for line in _read("/proc/self/mountinfo").splitlines():
        place, _, source = line.partition(" - ")
        mounted = place.split()[4].replace("\\040", " ")
        if real.is_relative_to(mounted) and len(mounted) >= len(best[0]):
            kind, device = source.split()[:2]
            best = (mounted, f"{kind} on {device}")
    return best[1]


def require_memory(needed: int, cure: str = "give a smaller --total or --count") -> None:
    """Raises Error, ``no_space``, rather than let the machine run out of memory halfway."""
    available = memory_bytes("MemAvailable")
    if available and needed > available * 0.9:
        raise Error(
            f"bench: {format_size(needed)} of memory needed, {format_size(available)} are available; {cure}",
            "no_space",
        )


def require_disk(path: str, needed: int) -> None:
    """The same of the file system at ``path``."""
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise Error(
            f"bench: {format_size(needed)} needed under {path!r}, {format_size(free)} are free; give another --path "
            "or a smaller --total",
            "no_space",
        )


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
