"""How rows are written for people: the same cells in text and HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dualkv.bench.results import CaseValue, Row, Spread

UNKNOWN = "-"


@dataclass(frozen=True)
class Column:
    """A heading, of several lines, and its cell."""

    heading: str
    cell: Callable[[Row], str]


def short_size(size: int) -> str:
    """``65536`` as ``64 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size % 1024 or unit == "GiB":
            return f"{size} {unit}"
        size //= 1024
    raise AssertionError


def case_text(name: str, value: CaseValue) -> str:
    """One field of a case."""
    if name.endswith("_bytes") and isinstance(value, int):
        return short_size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return UNKNOWN if value is None else str(value)


def number(value: float | None, digits: int = 2) -> str:
    """Of so many digits behind the point."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(spread: Spread | None) -> str:
    """Mean and 99th percentile."""
    return UNKNOWN if spread is None else f"{_us(spread.avg)}/{_us(spread.p99)}"


def _range(row: Row) -> str:
    return UNKNOWN if row.gbps is None else f"{number(row.gbps_min)}..{number(row.gbps_max)}"


def _share(row: Row) -> str:
    return UNKNOWN if row.checksum_share is None else f"{row.checksum_share:.0%}"


_SHORT = {
    "block_bytes": "block",
    "connections": "conn",
    "transport": "trans-\nport",
    "checksums": "sums",
    "layers_per_read": "layers\na read",
    "staging_bytes": "staging",
    "lock_memory": "lock",
    "huge_pages": "huge\npages",
}
_SPEED = (
    Column("\nGB/s", lambda row: number(row.gbps)),
    Column("\nmin..max", _range),
    Column("limit\nGB/s", lambda row: number(row.limit_gbps)),
    Column("ours/\nlimit", lambda row: number(row.ratio)),
    Column("2nd l.\nGB/s", lambda row: number(row.second_limit_gbps)),
    Column("CPU\ns/GB", lambda row: number(row.cpu_s_per_gb)),
    Column("limit\ns/GB", lambda row: number(row.limit_cpu_s_per_gb)),
    Column("check-\nsums", _share),
    Column("prepare\navg/p99 µs", lambda row: times(row.prepare_us)),
    Column("post\navg/p99 µs", lambda row: times(row.post_us)),
    Column("a block\nns", lambda row: number(row.post_ns_per_block, 0)),
    Column("transfer\navg/p99 µs", lambda row: times(row.latency_us)),
)
_PEER = (
    Column("\npeer", lambda row: row.peer or UNKNOWN),
    Column("ours\nGB/s", lambda row: number(row.gbps)),
    Column("peer\nGB/s", lambda row: number(row.peer_gbps)),
    Column("ours/\npeer", lambda row: number(row.peer_ratio)),
    Column("CPU ours\ns/GB", lambda row: number(row.cpu_s_per_gb)),
    Column("CPU peer\ns/GB", lambda row: number(row.peer_cpu_s_per_gb)),
    Column("peer prepare\navg/p99 µs", lambda row: times(row.peer_prepare_us)),
    Column("peer post\navg/p99 µs", lambda row: times(row.peer_post_us)),
)
_ALWAYS = ("block_bytes", "count", "depth", "connections")  # columns even if all rows have the same
_NOTE = (
    "ours/limit: median over repeats of ours against the limit of the same repeat; checksums: their estimated share "
    "of ours' time; post: the call that hands over all blocks; transfer: from post to done; a block: post time a block."
)


def own(heading: str, name: str, show: Callable[[Any], str]) -> Column:
    """The column of one of the row's own measures; ``show`` is given its value."""

    def cell(row: Row) -> str:
        value = row.measures.get(name)
        return UNKNOWN if value is None else show(value)

    return Column(heading, cell)


@dataclass(frozen=True)
class View:
    """One way to show a group of rows. A benchmark with measures of its own has views of its own (views.py).

    Attributes:
        wanted: rows it is for.
        each_peer: shows the rows of one case that differ in the peer only.
        names_limits: says above the table what the limits are.
        note: below all tables, how to read it.
    """

    title: str
    columns: tuple[Column, ...]
    wanted: Callable[[Row], bool] = lambda _: True
    each_peer: bool = False
    names_limits: bool = False
    note: str = ""


SPEED = View("against the limit", _SPEED, names_limits=True, note=_NOTE)
PEERS = View("beside released peers", _PEER, wanted=lambda row: row.peer is not None, each_peer=True)


@dataclass(frozen=True)
class Table:
    """Rows with the same fields; what all of them share is in the title."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose cases have the same fields belong together."""
    out: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(row.case), []).append(row)
    return list(out.values())


def once_each_case(rows: Sequence[Row]) -> list[Row]:
    """Without the repetitions that several peers make."""
    return list({tuple(row.case.items()): row for row in reversed(rows)}.values())[::-1]


def tables(rows: Sequence[Row], views: Sequence[View] = (SPEED, PEERS)) -> list[Table]:
    """Each group in each view that is for it."""
    out = []
    for group in groups(rows):
        for view in views:
            wanted = [row for row in group if view.wanted(row)]
            if wanted:
                out.append(_table(wanted if view.each_peer else once_each_case(wanted), view))
    return out


def _table(rows: Sequence[Row], view: View) -> Table:
    shared, varying = shared_fields(rows)
    known = tuple(column for column in view.columns if any(column.cell(row) != UNKNOWN for row in rows))
    said = "   ".join([view.title, *(f"{name}: {text}" for name, text in shared.items())])
    limits = dict.fromkeys(text for row in rows for text in (row.limit, row.second_limit) if text)
    said += "".join(f"\nlimit: {text}" for text in limits) if view.names_limits else ""
    return Table(said, tuple(_case_column(name) for name in varying) + known, tuple(rows))


def _case_column(name: str) -> Column:
    return Column(_SHORT.get(name, name), lambda row: case_text(name, row.case[name]))


def shared_fields(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Fields that are the same in all rows, with their text, and the names of the others."""
    shared = {
        name: case_text(name, value)
        for name, value in rows[0].case.items()
        if name not in _ALWAYS and len({str(row.case[name]) for row in rows}) == 1
    }
    return shared, [name for name in rows[0].case if name not in shared]
