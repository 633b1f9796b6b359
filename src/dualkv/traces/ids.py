"""64-bit mixing of block ids, and the ids of blocks past the last full one of an input.

Everything here is integer arithmetic: the same on every platform and numpy version.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from .session import Session

Words = npt.NDArray[np.uint64]


def mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def seed(*parts: object) -> np.uint64:
    """A 64-bit word from the printed parts."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    word: np.uint64 = np.uint64(int.from_bytes(digest, "little"))
    return word


def scope_seed(session: Session) -> np.uint64:
    """A word that is equal for sessions in which equal block ids mean equal tokens."""
    if session.scope is None:
        return seed("session", session.id)
    return seed("scope", session.scope)


def extended_ids(session: Session, turn_index: int, blocks: int) -> Words:
    """Ids of the first `blocks` blocks of a turn, also past the end of its input.

    A trace has no id for the partial block at the end of an input. The turn that continues this
    one tells it; where none does, the id is the session's own and equals no other.
    """
    last = session.endings[turn_index]
    known = np.array(session.turns[last].block_ids[:blocks], dtype=np.int64).view(np.uint64)
    private = np.arange(len(known), blocks, dtype=np.uint64)
    return np.concatenate([known, mix(private ^ seed("private", session.id, last))])
