"""JSON lines, plain or gzip, as records whose getters name file, line, field and value."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

Source = str | os.PathLike[str]

_MISSING = object()
_INT64 = 1 << 63


def read_records(path: Source) -> Iterator[Record]:
    """The file's JSON objects, one per line that is not blank.

    Raises OSError when the file cannot be read, ValueError for a line that is not a JSON object
    and for damaged gzip.
    """
    for number, line in enumerate(_lines(path), start=1):
        place = f"{os.fspath(path)}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {short_repr(line)}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{place}: {short_repr(values)}: not a JSON object")
        yield Record(place, values)


def _lines(path: Source) -> Iterator[bytes]:
    with open(path, "rb") as plain:
        compressed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        if not compressed:
            yield from plain
            return
        try:
            yield from gzip.GzipFile(fileobj=plain)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{os.fspath(path)}: damaged gzip: {error}") from error


@dataclass(frozen=True)
class Record:
    """A JSON object and where it stands.

    Every getter raises ValueError for a field that is missing or has another type or range.
    """

    place: str
    values: dict[str, Any]
    prefix: str = ""

    def error(self, name: str, problem: str) -> ValueError:
        """The error to raise for a field."""
        value = self.values.get(name, _MISSING)
        shown = "is missing" if value is _MISSING else f"= {short_repr(value)}"
        return ValueError(f"{self.place}: {self.prefix}{name} {shown}: {problem}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or not value:
            raise self.error(name, "must be a string, not empty")
        return value

    def count(self, name: str, least: int) -> int:
        """An integer from `least` on."""
        value = self.values.get(name)
        if type(value) is bool or not isinstance(value, int) or not least <= value < _INT64:
            raise self.error(name, f"must be an integer from {least} on")
        return value

    def seconds(self, name: str, default: float | None = None, unit: float = 1.0) -> float:
        """A finite time from 0 on, in the file's unit: `unit` of them are a second."""
        value = self.values.get(name, default)
        if type(value) is bool or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error(name, "must be a finite number from 0 on")
        return float(value) / unit

    def block_ids(self, name: str) -> tuple[int, ...]:
        """A list of integers of 64 bits."""
        value = self.values.get(name)
        if not isinstance(value, list) or not set(map(type, value)) <= {int}:
            raise self.error(name, "must be a list of integers")
        if value and (min(value) < -_INT64 or max(value) >= _INT64):
            raise self.error(name, "has an integer of more than 64 bits")
        return tuple(value)

    def records(self, name: str) -> list[Record]:
        """A list of objects, not empty."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value:
            raise self.error(name, "must be a list of objects, not empty")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise ValueError(f"{self.place}: {self.prefix}{name}[{index}] = {short_repr(item)}: must be an object")
        return [Record(self.place, item, f"{name}[{i}].") for i, item in enumerate(value)]
