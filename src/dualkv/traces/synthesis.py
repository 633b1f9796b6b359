"""Tokens for the inputs of a trace, from its block ids and, closed loop, a model's own output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .ids import Words, extended_ids, mix, scope_seed
from .session import Session, Turn

Tokens = npt.NDArray[np.uint32]
Output = Sequence[int] | npt.NDArray[np.integer[Any]]


def tokens(
    session: Session,
    turn_index: int,
    vocab_size: int,
    generated: Sequence[Output] | None = None,
) -> Tokens:
    """The whole input of one turn: a uint32 array of shape (input_tokens,), below vocab_size.

    generated is None: a block's tokens depend on its id, the scope of the ids and vocab_size, on
    nothing else. Equal ids in equal scopes give equal tokens; different ids differ in all but one
    of vocab_size ** block_size cases.

    generated: the tokens a model really gave for turns 0 to turn_index - 1. Where a turn continues
    an earlier one, its input is then the earlier input, the earlier output (cut off where the
    trace's input ends) and tokens synthesised from the ids. Where it does not - the context was
    compacted, or went another way - it is the shared blocks of the earlier input and synthesised
    tokens. Prefixes that the trace shares stay shared.

    Raises IndexError for a turn the session does not have, and ValueError for a vocab_size outside
    2 to 2**32, for fewer outputs than earlier turns and for an output that is not a flat sequence
    of unsigned 32-bit integers.
    """
    _check_vocab(vocab_size)
    if not 0 <= turn_index < len(session.turns):
        raise IndexError(f"turn {turn_index} of session {session.id!r} with {len(session.turns)}")
    if generated is None:
        return _synthesise(session, turn_index, vocab_size, 0)
    if len(generated) < turn_index:
        raise ValueError(f"{len(generated)} outputs given, turn {turn_index} needs {turn_index}")
    outputs = [_as_tokens(output) for output in generated[:turn_index]]
    return _closed_loop(session, turn_index, vocab_size, outputs)


class Conversation:
    """A session replayed against a real model: each prompt contains what the model said before.

    Loop until `done`: send `prompt()`, hand the model's tokens to `add_output()`. Prompts have
    exactly the trace's lengths and the same outputs always give the same prompts; see `tokens` for
    how they are put together. For one thread at a time.
    """

    def __init__(self, session: Session, vocab_size: int) -> None:
        """Raises ValueError for a vocab_size outside 2 to 2**32."""
        _check_vocab(vocab_size)
        self._session = session
        self._vocab_size = vocab_size
        self._outputs: list[Tokens] = []

    @property
    def done(self) -> bool:
        """Whether every turn has its output."""
        return len(self._outputs) == len(self._session.turns)

    @property
    def turn(self) -> Turn:
        """The next turn: how many tokens to generate, how long to wait; RuntimeError when done."""
        return self._session.turns[self._next_index()]

    def prompt(self) -> Tokens:
        """Input of the next turn, uint32 of shape (turn.input_tokens,); RuntimeError when done."""
        return _closed_loop(self._session, self._next_index(), self._vocab_size, self._outputs)

    def add_output(self, tokens: Output) -> None:
        """Ends the next turn with the model's tokens, any number of them.

        Raises RuntimeError when done, ValueError when it is not a flat sequence of unsigned 32-bit
        integers.
        """
        self._next_index()
        self._outputs.append(_as_tokens(tokens))

    def _next_index(self) -> int:
        if self.done:
            raise RuntimeError(f"session {self._session.id!r} is done: it has no further turn")
        return len(self._outputs)


def _closed_loop(session: Session, turn_index: int, vocab_size: int, outputs: Sequence[Tokens]) -> Tokens:
    lineage = _lineage(session, turn_index)
    context = np.empty(max(session.turns[index].input_tokens for index in lineage), np.uint32)
    for index in lineage:  # each turn keeps the head of its predecessor's input, in place
        size = session.turns[index].input_tokens
        link = session.links[index]
        start = link.shared_blocks * session.block_size
        if link.turn is not None and link.continues:
            start = session.turns[link.turn].input_tokens
            output = outputs[link.turn][: size - start]
            context[start : start + len(output)] = output
            start += len(output)
        context[start:size] = _synthesise(session, index, vocab_size, start)
    return context[: session.turns[turn_index].input_tokens]


def _lineage(session: Session, turn_index: int) -> list[int]:
    """The turn and those its input begins with, oldest first."""
    lineage: list[int] = []
    index: int | None = turn_index
    while index is not None:
        lineage.append(index)
        index = session.links[index].turn
    return lineage[::-1]


def _synthesise(session: Session, turn_index: int, vocab_size: int, start: int) -> Tokens:
    """Tokens of a turn's input from position `start` on, from its block ids alone."""
    stop = session.turns[turn_index].input_tokens
    size = session.block_size
    first, last = start // size, -(-stop // size)
    block_ids = extended_ids(session, turn_index, last)[first:]
    block_seeds = mix(block_ids ^ scope_seed(session))
    offsets: Words = np.arange(size, dtype=np.uint64)
    words = mix(block_seeds[:, np.newaxis] + offsets).reshape(-1)[start - first * size :]
    found: Tokens = (words[: stop - start] % np.uint64(vocab_size)).astype(np.uint32)
    return found


def _as_tokens(output: Output) -> Tokens:
    given = np.asarray(output)
    if given.size == 0 and given.ndim == 1:
        return np.empty(0, np.uint32)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(f"output of shape {given.shape} and type {given.dtype} is not tokens")
    if given.min() < 0 or given.max() >= 1 << 32:
        raise ValueError(f"output has tokens from {given.min()} to {given.max()}: not 32-bit ids")
    checked: Tokens = given.astype(np.uint32)
    return checked


def _check_vocab(vocab_size: int) -> None:
    if not 2 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size {vocab_size} is not from 2 to 2**32")
