"""A paged cache whose blocks are told apart by their bytes."""

from collections.abc import Sequence

import numpy as np

import dualkv
from dualkv.bench.blocks import Pattern, aligned_blocks

_UNTOUCHED = 0xA5


def key_of(number: int) -> bytes:
    """The key of the block whose bytes are the pattern's ``number``."""
    return number.to_bytes(32, "little")


class PatternCache:
    """``blocks`` blocks of a geometry whose layers are equally large, faulted in. Not thread-safe."""

    def __init__(self, geometry: dualkv.KvGeometry, blocks: int) -> None:
        layers, layer_bytes = geometry.layers, geometry.layer_bytes(0)
        self.data = aligned_blocks(layers * blocks, layer_bytes).reshape(layers, blocks, layer_bytes)
        self.data[:] = _UNTOUCHED
        self.kv = dualkv.PagedKv(geometry, list(self.data))
        self._pattern = Pattern(layers * layer_bytes)

    def fill(self, numbers: Sequence[int]) -> None:
        """Block ``i`` becomes block ``numbers[i]``."""
        for i, number in enumerate(numbers):
            self.data[:, i] = self._pattern.block(number).reshape(len(self.data), -1)

    def wrong_bytes(self, numbers: Sequence[int]) -> int:
        """How many bytes of the first blocks are not those of ``numbers``."""
        return sum(
            int(np.count_nonzero(self.data[:, i] != self._pattern.block(number).reshape(len(self.data), -1)))
            for i, number in enumerate(numbers)
        )
