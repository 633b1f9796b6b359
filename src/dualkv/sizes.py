"""Sizes with units, as people write them."""

import decimal
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
    text = str(int(size)) if isinstance(size, int) and not isinstance(size, bool) else str(size)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)(?:/s)?\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise invalid(f"size {text[:40]!r}: give bytes or a number with a unit, like 64MiB or 200MB")
    count = round(decimal.Decimal(match[1]) * _UNITS[match[2].upper()])
    if count >= 2**63:
        raise invalid(f"size {text!r}: must be less than 2**63 bytes")
    return count


def format_size(size: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
