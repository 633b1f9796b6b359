"""Smaller sessions of the same shape, for short runs and small models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import overload

import numpy as np

from .ids import extended_ids, mix
from .session import Session, Turn


@overload
def scale(
    sessions: Session,
    factor: float,
    *,
    block_size: int,
    turns: int | None = None,
    skip_tokens: int = 0,
) -> Session: ...
@overload
def scale(
    sessions: Iterable[Session],
    factor: float,
    *,
    block_size: int,
    turns: int | None = None,
    skip_tokens: int = 0,
) -> list[Session]: ...
def scale(
    sessions: Session | Iterable[Session],
    factor: float,
    *,
    block_size: int,
    turns: int | None = None,
    skip_tokens: int = 0,
) -> Session | list[Session]:
    """Divides token counts by `factor` and cuts the inputs into blocks of `block_size` tokens.

    A prefix of L tokens that two inputs share in the trace is at least floor(L / factor) tokens
    long in the result, as far as full blocks can say it; so are prefixes shared by sessions of one
    scope. Each turn keeps at least one output token and, where it continues an earlier input, room
    for that one's whole output and one appended token: many tiny turns in a row grow a little
    beyond their share. Times stay as they are.

    turns: keep this many consecutive turns (all, if there are fewer) that begin with the turn whose
        input is nearest to the session's mean input, or as near before it as leaves enough of them.
        The first kept turn then has a large prompt. It starts when the session did.
    skip_tokens: tokens at the head of every input to leave out before dividing.

    Raises ValueError for a factor that is below 1 or not finite, block_size or turns below 1, and
    negative skip_tokens.
    """
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor {factor} is not a finite number from 1 on")
    if block_size < 1 or skip_tokens < 0 or (turns is not None and turns < 1):
        raise ValueError(f"block_size {block_size}, turns {turns}, skip_tokens {skip_tokens}: below 1, 1 or 0")
    grid = _Grid(Fraction(factor), block_size, skip_tokens)
    if isinstance(sessions, Session):
        return _scale(_window(sessions, turns), grid)
    return [_scale(_window(session, turns), grid) for session in sessions]


@dataclass(frozen=True)
class _Grid:
    """Where scaled tokens and blocks lie in the original input; a fraction, so exact."""

    factor: Fraction
    block_size: int
    skip_tokens: int

    def position(self, original: int) -> int:
        """Scaled position of an original one."""
        return max(0, self.count(original - self.skip_tokens))

    def count(self, original: int) -> int:
        """A token count, divided and rounded down."""
        return original * self.factor.denominator // self.factor.numerator

    def covered_blocks(self, scaled_blocks: int, original_block_size: int) -> list[int]:
        """Per scaled block: the original blocks from the input's start to the block's end."""
        step = self.block_size * self.factor.numerator
        skipped = self.skip_tokens * self.factor.denominator
        unit = original_block_size * self.factor.denominator
        return [-(-(skipped + end * step) // unit) for end in range(1, scaled_blocks + 1)]


def _window(session: Session, turns: int | None) -> Session:
    if turns is None or turns >= len(session.turns):
        return session
    inputs = [turn.input_tokens for turn in session.turns]
    mean = sum(inputs) / len(inputs)
    nearest = min(range(len(inputs)), key=lambda index: abs(inputs[index] - mean))
    first = min(nearest, len(inputs) - turns)
    shift_s = session.turns[first].start_s - session.turns[0].start_s
    kept = [replace(turn, start_s=turn.start_s - shift_s) for turn in session.turns[first : first + turns]]
    kept[0] = replace(kept[0], think_time_s=session.turns[0].think_time_s)
    return replace(session, turns=tuple(kept))


def _scale(session: Session, grid: _Grid) -> Session:
    inputs = _scaled_inputs(session, grid)
    covered = grid.covered_blocks(max(inputs) // grid.block_size, session.block_size)
    scaled = [
        Turn(
            input_tokens=size,
            output_tokens=_scaled_output(turn, grid),
            block_ids=_scaled_ids(session, index, covered[: size // grid.block_size]),
            start_s=turn.start_s,
            think_time_s=turn.think_time_s,
        )
        for index, (turn, size) in enumerate(zip(session.turns, inputs, strict=True))
    ]
    return replace(session, block_size=grid.block_size, turns=tuple(scaled))


def _scaled_inputs(session: Session, grid: _Grid) -> list[int]:
    """Input length of each scaled turn."""
    inputs: list[int] = []
    for turn, link in zip(session.turns, session.links, strict=True):
        shared = grid.position(link.shared_blocks * session.block_size)
        least = shared + 1
        if link.turn is not None:
            earlier = inputs[link.turn]
            # Where it parts from the earlier input only after that one's last full scaled block,
            # ids can't tell that it does.
            if link.continues or shared // grid.block_size == earlier // grid.block_size:
                least = earlier + _scaled_output(session.turns[link.turn], grid) + 1
        inputs.append(max(least, grid.position(turn.input_tokens)))
    return inputs


def _scaled_output(turn: Turn, grid: _Grid) -> int:
    return max(1, grid.count(turn.output_tokens))


def _scaled_ids(session: Session, turn_index: int, covered: list[int]) -> tuple[int, ...]:
    """Per scaled block: an id made of its index and of all original ids up to its end.

    Position-dependent words of the ids are summed (modulo 2**64), so that the words of all
    prefixes are one cumulative sum.
    """
    if not covered:
        return ()
    originals = extended_ids(session, turn_index, covered[-1])
    places = mix(np.arange(len(originals), dtype=np.uint64))
    prefixes = np.cumsum(mix(originals ^ places), dtype=np.uint64)
    ends = prefixes[np.array(covered) - 1]
    words = mix(ends ^ mix(np.arange(len(covered), dtype=np.uint64)))
    return tuple((words >> np.uint64(1)).tolist())
