"""Blocks to move: aligned memory, bytes that tell every block apart, and orders without any locality."""

import mmap
import random
from typing import Any, TypeAlias

import numpy as np

from dualkv.errors import invalid

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_HUGE = 2 << 20
_STEP = 0x9E3779B97F4A7C15  # the golden ratio of 2**64: multiples differ in all their bytes


def aligned_blocks(count: int, block_bytes: int) -> Bytes:
    """Zeroed memory, ``[count, block_bytes]``, that begins on 2 MiB and asks for transparent huge pages."""
    area = mmap.mmap(-1, count * block_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(area, np.uint8)
    start = -data.ctypes.data % _HUGE
    return data[start : start + count * block_bytes].reshape(count, block_bytes)


class Pattern:
    """The bytes of each block of a benchmark; ``block_bytes`` is a multiple of 8."""

    def __init__(self, block_bytes: int) -> None:
        self._words = np.random.default_rng(block_bytes).integers(0, 2**64, block_bytes // 8, dtype=np.uint64)

    def block(self, number: int) -> Bytes:
        """A new array of the block's bytes."""
        return (self._words ^ np.uint64((number + 1) * _STEP % 2**64)).view(np.uint8)

    def matches(self, number: int, data: Bytes) -> bool:
        """Whether ``data`` is the whole block."""
        return bool((data == self.block(number)).all())


def scattered(count: int, seed: int) -> list[int]:
    """0 to count - 1 in an order that is the same wherever it is asked for."""
    out = list(range(count))
    random.Random(seed).shuffle(out)
    return out


def check_block_bytes(sizes: tuple[int, ...], multiple: int) -> None:
    """Raises Error for a size that is not a multiple."""
    for size in sizes:
        if size < multiple or size % multiple:
            raise invalid(f"--block-bytes {size}: must be a multiple of {multiple}")


def count_of(block_bytes: int, total: int, count: int | None, minimum: int = 1) -> int:
    """Blocks of ``total`` bytes, at least ``minimum``; ``count`` instead if it is given."""
    return count if count is not None else max(minimum, total // block_bytes)
