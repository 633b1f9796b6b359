"""A session of a trace: its turns, what each turn's input shares with earlier ones, and means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Turn:
    """One request: the whole context goes in, a few tokens come out.

    input_tokens: length of the whole input, at least 1.
    output_tokens: tokens generated, 0 or more.
    block_ids: one id (an int64) per full block of the input, in order.
    start_s: when the request was sent, seconds from the trace's start.
    think_time_s: seconds between the end of the turn before and this request; 0 where unknown.
    """

    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    start_s: float
    think_time_s: float

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 0:
            raise ValueError(
                f"turn with {self.input_tokens} input and {self.output_tokens} output tokens: "
                "at least 1 and 0 are needed"
            )


@dataclass(frozen=True)
class Link:
    """How the input of a turn begins: like the input of an earlier turn.

    turn: index of the earlier turn that shares the longest prefix, None: none does.
    shared_blocks: full blocks both inputs begin with.
    continues: the earlier input is a prefix of this one as far as block ids can tell. Its last,
        partial block is taken to be shared too, and its output to follow it.
    """

    turn: int | None
    shared_blocks: int
    continues: bool


@dataclass(frozen=True)
class Session:
    """The turns of one agent or conversation, in the order in which they were sent.

    id: name, unique within its trace.
    block_size: tokens per block id.
    turns: at least one; each has exactly input_tokens // block_size block ids.
    scope: where block ids have a meaning. Equal ids of sessions with equal scopes stand for equal
        tokens; None: ids mean something in this session only.

    Equal prefixes have equal ids. Raises ValueError when a count does not fit.
    """

    id: str
    block_size: int
    turns: tuple[Turn, ...]
    scope: str | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"session {self.id!r}: block_size {self.block_size} is below 1")
        if not self.turns:
            raise ValueError(f"session {self.id!r} has no turns")
        for index, turn in enumerate(self.turns):
            full_blocks = turn.input_tokens // self.block_size
            if len(turn.block_ids) != full_blocks:
                raise ValueError(
                    f"session {self.id!r}, turn {index}: {len(turn.block_ids)} block ids for "
                    f"{turn.input_tokens} tokens, which are {full_blocks} full blocks"
                )

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Per turn: the earlier turn whose input it begins with."""
        longest = list(accumulate((len(turn.block_ids) for turn in self.turns), max))
        return tuple(_link(self.turns, index, longest) for index in range(len(self.turns)))

    @cached_property
    def endings(self) -> tuple[int, ...]:
        """Per turn: the last turn of the chain in which each turn is first continued by the next.

        A turn that nothing continues is its own ending.
        """
        endings = list(range(len(self.turns)))
        for index, link in reversed(list(enumerate(self.links))):
            if link.turn is not None and link.continues:
                endings[link.turn] = endings[index]
        return tuple(endings)

    @property
    def hit_tokens(self) -> tuple[int, ...]:
        """Per turn: input tokens that are, in full blocks, a prefix of an earlier turn's input."""
        return tuple(link.shared_blocks * self.block_size for link in self.links)

    @property
    def append_tokens(self) -> tuple[int, ...]:
        """Per turn: input tokens that neither an earlier input nor its output accounts for.

        The first turn appends its whole input. A turn that goes on from another place than the end
        of an earlier turn appends what follows the shared blocks.
        """
        return tuple(self._appended(index) for index in range(len(self.turns)))

    @property
    def hit_rate(self) -> float:
        """Fraction of all input tokens that are hit tokens, 0 to 1."""
        return sum(self.hit_tokens) / sum(turn.input_tokens for turn in self.turns)

    def _appended(self, index: int) -> int:
        turn, link = self.turns[index], self.links[index]
        if link.turn is None or not link.continues:
            return turn.input_tokens - link.shared_blocks * self.block_size
        earlier = self.turns[link.turn]
        return max(0, turn.input_tokens - earlier.input_tokens - earlier.output_tokens)


@dataclass(frozen=True)
class Statistics:
    """Means over sessions, in the columns of Table 2 of the DualPath paper (arXiv 2602.21548).

    All but hit_rate are means over sessions of the session's own mean: each session counts once.
    Table 2 has to be read this way: its 60 turns of 608 + 148 tokens are 45360, not the 28639 it
    gives as the total, so long sessions have the short turns.

    turns: turns per session.
    append_tokens, generated_tokens, context_tokens: appended, output and input tokens per turn.
    total_tokens: input and output of the last turn.
    hit_rate: fraction of all input tokens of all sessions, 0 to 1.
    """

    turns: float
    append_tokens: float
    generated_tokens: float
    total_tokens: float
    context_tokens: float
    hit_rate: float


def statistics(sessions: Iterable[Session]) -> Statistics:
    """Means of one or more sessions; ValueError when there is none."""
    sessions = list(sessions)
    if not sessions:
        raise ValueError("statistics of no sessions")
    inputs = [[turn.input_tokens for turn in session.turns] for session in sessions]
    outputs = [[turn.output_tokens for turn in session.turns] for session in sessions]
    hits = sum(sum(session.hit_tokens) for session in sessions)
    return Statistics(
        turns=_mean([len(session.turns) for session in sessions]),
        append_tokens=_mean([_mean(session.append_tokens) for session in sessions]),
        generated_tokens=_mean([_mean(counts) for counts in outputs]),
        total_tokens=_mean([i[-1] + o[-1] for i, o in zip(inputs, outputs, strict=True)]),
        context_tokens=_mean([_mean(counts) for counts in inputs]),
        hit_rate=hits / sum(map(sum, inputs)),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _link(turns: Sequence[Turn], index: int, longest: Sequence[int]) -> Link:
    """Link of one turn; longest[i] is the largest block count of turns 0 to i."""
    turn = turns[index]
    best, best_turn = (0, False), None
    for earlier in range(index - 1, -1, -1):
        if (longest[earlier], True) <= best:
            break
        found = _overlap(turns[earlier], turn)
        if found > best:
            best, best_turn = found, earlier
    return Link(best_turn, *best)


def _overlap(earlier: Turn, later: Turn) -> tuple[int, bool]:
    """Shared full blocks, and whether the whole earlier input is a prefix of the later one."""
    shared = _common_prefix(earlier.block_ids, later.block_ids)
    continues = shared == len(earlier.block_ids) and earlier.input_tokens <= later.input_tokens
    return shared, continues


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    if a[:size] == b[:size]:  # the usual case, at C speed
        return size
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
