"""Trace files into sessions: agentic coding traces and Mooncake traces."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from reprlib import repr as short_repr

from .records import Record, Source, read_records
from .session import Session, Turn

_MOONCAKE_BLOCK_SIZE = 512  # tokens; the trace does not say it, its publisher does


def read(path: Source, *, sessions: int | None = None, turns: int | None = None) -> list[Session]:
    """Reads a trace of either format; the first line tells which.

    For arguments and errors see `read_agentic` and `read_mooncake`.
    """
    first = next(read_records(path), None)
    if first is None:
        raise ValueError(f"{path}: no sessions in it")
    if "requests" in first.values:
        return read_agentic(path, sessions=sessions, turns=turns)
    if "input_length" in first.values:
        return read_mooncake(path, sessions=sessions, turns=turns)
    raise ValueError(
        f"{first.place}: fields {short_repr(list(first.values))}: neither an agentic trace (field "
        "requests) nor a Mooncake trace (field input_length)"
    )


def read_agentic(path: Source, *, sessions: int | None = None, turns: int | None = None) -> list[Session]:
    """Reads anonymised coding-agent sessions: JSON lines, plain or gzip, one session each.

    Fields: id, block_size (tokens), requests[] with t (s from the session's start), in, out
    (tokens), hash_ids (one per full block of the input) and, where known, think_time (s). A
    hash_id_scope other than "local", the default, is the scope the ids are shared in.

    sessions, turns: read only the file's first sessions, only each session's first turns; what
        follows is not looked at.

    Raises OSError when the file cannot be read, and ValueError for a malformed file, with file,
    line, field and value; nothing is returned then.
    """
    _check_limits(sessions, turns)
    found: dict[str, Session] = {}
    for record in read_records(path):
        session = _agentic_session(record, turns)
        if session.id in found:
            raise record.error("id", "an earlier line has it")
        found[session.id] = session
        if len(found) == sessions:
            break
    return _not_empty(path, list(found.values()))


def read_mooncake(path: Source, *, sessions: int | None = None, turns: int | None = None) -> list[Session]:
    """Reads a Mooncake trace: JSON lines, plain or gzip, one request each; groups the requests.

    Fields: timestamp (ms), input_length, output_length (tokens), hash_ids (one per 512 tokens; one
    for the partial last block may be there and is left out). Ids are shared by all sessions of a
    file; their scope is the file's name up to its first dot.

    The trace does not say which requests belong together. A request continues the session whose
    latest request's ids, less the last one, are the longest prefix of its own, the most recent of
    equals; otherwise it begins a session. Requests of a single id are never continued. Requests
    with nothing but a long system prompt in common can thus end up in one session.
    think_time_s is 0: unknown.

    sessions, turns: return only the first sessions, only each session's first turns.

    Raises OSError when the file cannot be read, and ValueError for a malformed file, with file,
    line, field and value; nothing is returned then.
    """
    _check_limits(sessions, turns)
    groups = _Groups()
    for record in read_records(path):
        turn, ids = _mooncake_turn(record)
        groups.add(turn, ids)
    scope = Path(path).name.partition(".")[0]
    found = [
        Session(f"{scope}-{index}", _MOONCAKE_BLOCK_SIZE, tuple(group[:turns]), scope)
        for index, group in enumerate(groups.turns[:sessions])
    ]
    return _not_empty(path, found)


def _agentic_session(record: Record, turns: int | None) -> Session:
    block_size = record.count("block_size", least=1)
    scope = record.text("hash_id_scope", default="local")
    requests = record.records("requests")[:turns]
    return Session(
        id=record.text("id"),
        block_size=block_size,
        turns=tuple(_agentic_turn(request, block_size) for request in requests),
        scope=None if scope == "local" else scope,
    )


def _agentic_turn(request: Record, block_size: int) -> Turn:
    input_tokens = request.count("in", least=1)
    ids = request.block_ids("hash_ids")
    full_blocks = input_tokens // block_size
    if len(ids) != full_blocks:
        problem = f"{len(ids)} ids for {input_tokens} tokens, which are {full_blocks} full blocks"
        raise request.error("hash_ids", problem)
    return Turn(
        input_tokens=input_tokens,
        output_tokens=request.count("out", least=0),
        block_ids=ids,
        start_s=request.seconds("t"),
        think_time_s=request.seconds("think_time", default=0.0),
    )


def _mooncake_turn(record: Record) -> tuple[Turn, tuple[int, ...]]:
    """A turn, and the ids of all its blocks, full or not."""
    input_tokens = record.count("input_length", least=1)
    ids = record.block_ids("hash_ids")
    full_blocks, rest = divmod(input_tokens, _MOONCAKE_BLOCK_SIZE)
    if len(ids) not in (full_blocks, full_blocks + (rest > 0)):
        problem = f"{len(ids)} ids for {input_tokens} tokens, which are {full_blocks} full blocks"
        raise record.error("hash_ids", problem)
    turn = Turn(
        input_tokens=input_tokens,
        output_tokens=record.count("output_length", least=0),
        block_ids=ids[:full_blocks],
        start_s=record.seconds("timestamp", unit=1000.0),
        think_time_s=0.0,
    )
    return turn, ids


class _Groups:
    """Turns in sessions, found again by the prefix that a continuation must have."""

    def __init__(self) -> None:
        self.turns: list[list[Turn]] = []
        self._prefixes: list[tuple[int, ...]] = []  # per session, of its latest turn
        self._by_hash: dict[int, list[int]] = {}  # prefix hash -> sessions, most recent last

    def add(self, turn: Turn, ids: tuple[int, ...]) -> None:
        hashes = list(accumulate(ids, lambda before, block_id: hash((before, block_id)), initial=0))
        session = self._take(ids, hashes)
        if session is None:
            session = len(self.turns)
            self.turns.append([])
            self._prefixes.append(())
        self.turns[session].append(turn)
        self._prefixes[session] = ids[:-1]
        self._by_hash.setdefault(hashes[len(ids[:-1])], []).append(session)

    def _take(self, ids: tuple[int, ...], hashes: list[int]) -> int | None:
        """Removes the session the ids continue from the index."""
        for size in range(len(ids), 0, -1):
            for session in reversed(self._by_hash.get(hashes[size], ())):
                if self._prefixes[session] == ids[:size]:
                    self._by_hash[hashes[size]].remove(session)
                    return session
        return None


def _check_limits(sessions: int | None, turns: int | None) -> None:
    for name, limit in (("sessions", sessions), ("turns", turns)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} {limit} is below 1")


def _not_empty(path: Source, sessions: list[Session]) -> list[Session]:
    if not sessions:
        raise ValueError(f"{path}: no sessions in it")
    return sessions
