"""What a soak has saved, and what has happened to it so far."""

import collections
import contextlib
import random
import threading
from dataclasses import dataclass, field

from dualkv.bench.caches import key_of

CHAIN_BLOCKS = 16  # of one hit
OLD_SHARE = 0.02  # of reads, that are of what may have been evicted


@dataclass
class Chain:
    """A hit: blocks that continue each other. ``used_at`` is when it was last known to be marked as used."""

    first: int
    used_at: float

    @property
    def numbers(self) -> list[int]:
        """Of its blocks' patterns."""
        return list(range(self.first, self.first + CHAIN_BLOCKS))

    @property
    def keys(self) -> list[bytes]:
        """Of its blocks."""
        return [key_of(number) for number in self.numbers]


class Shelf:
    """What was saved, in order. Thread-safe."""

    def __init__(self, owed: int) -> None:
        self._owed = owed
        self._chains: list[Chain] = []
        self._lock = threading.Lock()

    def add(self, chain: Chain) -> None:
        """The newest."""
        with self._lock:
            self._chains.append(chain)

    def pick(self, rng: random.Random) -> tuple[Chain, bool] | None:
        """A chain, and whether it is owed; None while there are none."""
        with self._lock:
            if not self._chains:
                return None
            newest = max(0, len(self._chains) - self._owed)
            if newest and rng.random() < OLD_SHARE:
                return self._chains[rng.randrange(newest)], False
            return self._chains[rng.randrange(newest, len(self._chains))], True

    def owes(self, chain: Chain) -> bool:
        """Whether it is among those that must be there."""
        with self._lock:
            return chain in self._chains[-self._owed :]

    def drop(self, chain: Chain) -> None:
        """It was evicted."""
        with self._lock, contextlib.suppress(ValueError):
            self._chains.remove(chain)

    def owed(self) -> list[Chain]:
        """Those that must all be there."""
        with self._lock:
            return self._chains[-self._owed :]


@dataclass
class Tally:
    """What happened so far. Thread-safe through :meth:`add`."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # the first of each kind
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, count: int = 1, reason: str = "") -> None:
        """Counts; keeps the first reason given."""
        with self.lock:
            self.counts[name] += count
            if reason:
                self.reasons.setdefault(name, reason)
