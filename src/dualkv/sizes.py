"""Sizes with units, as people write them."""

import re

from dualkv.errors import invalid

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(size: int | str) -> int:
    """Bytes of ``8 * 2**20``, ``"8MiB"``, ``"200MB"`` (or, of a rate, ``"200MB/s"``)."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)(?:/s)?\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise invalid(f"size {size!r}: give bytes or a number with a unit, like 64MiB or 200MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
