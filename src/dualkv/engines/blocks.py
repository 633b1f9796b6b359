"""Free list of a paged cache's blocks, and what is resident in it."""

import asyncio
from collections.abc import Sequence


class BlockPool:
    """Hands out block ids; waits when there are none. For one asyncio loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> list[int]:
        """``count`` ids; waits until so many are free."""
        if count > self.count:
            raise ValueError(f"{count} blocks wanted, the cache has {self.count}")
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            taken = [self._free.pop() for _ in range(count)]
        return sorted(taken)  # runs of neighbouring blocks are cheaper to read

    async def give_back(self, ids: Sequence[int]) -> None:
        """Makes the ids free again."""
        async with self._changed:
            self._free.extend(ids)
            self._changed.notify_all()


class ResidentPrefixes:
    """Blocks that stay in the cache between turns, by key: what an engine's own prefix cache holds."""

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Ids of the longest resident prefix of ``keys``."""
        ids = []
        for key in keys:
            if key not in self._ids:
                break
            ids.append(self._ids[key])
        return ids

    def keep(self, keys: Sequence[bytes], ids: Sequence[int]) -> list[int]:
        """Makes blocks resident; returns the ids that are not needed (no key, or a key that is resident already)."""
        spare = list(ids[len(keys) :])
        for key, block in zip(keys, ids, strict=False):
            if self._ids.setdefault(key, block) != block:
                spare.append(block)
        return spare
