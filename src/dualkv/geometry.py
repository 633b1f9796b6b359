"""The shape of a model's KV cache, and the keys of its blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualkv import _dualkv
from dualkv.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined, unused-ignore]

    from numpy.typing import ArrayLike


class KvGeometry(_dualkv.KvGeometry):
    """Layers, tokens per block and bytes of a model's KV cache: equal geometries can exchange KV.

    Args:
        tokens_per_block: tokens of one block, as the engine's paged cache has them.
        layer_bytes: bytes of one layer's KV for one block; one number, or one a layer.
        namespace: all that must be equal for KV to be interchangeable: model, dtype, TP rank, salt.
        layers: number of layers; may be left out when ``layer_bytes`` is a sequence.

    Raises:
        Error: ``invalid_argument``, naming the value that is out of range.
    """

    def __init__(
        self,
        *,
        tokens_per_block: int,
        layer_bytes: int | Sequence[int],
        namespace: str,
        layers: int | None = None,
    ) -> None:
        if not isinstance(layer_bytes, Sequence):
            if layers is None:
                raise invalid("geometry: give layers, or layer_bytes as one number a layer")
            sizes = [int(layer_bytes)] * min(layers, 100_000)  # the core says what is too many
        else:
            sizes = [int(size) for size in layer_bytes]
            if layers is not None and layers != len(sizes):
                raise invalid(f"geometry: layers = {layers}, but layer_bytes has {len(sizes)}")
        if any(size < 1 for size in sizes):
            raise invalid(f"geometry: layer_bytes = {min(sizes)}: must be at least 1")
        if not 0 <= tokens_per_block < 2**32:
            raise invalid(f"geometry: tokens_per_block = {tokens_per_block}: must be 1 to 65536")
        super().__init__(sizes, tokens_per_block, namespace)

    def __hash__(self) -> int:
        return int(self.fingerprint)


def block_keys(tokens: "ArrayLike", geometry: KvGeometry, parent: bytes = b"") -> list[bytes]:
    """Keys of the complete blocks of ``tokens``, in order; a partly filled last block has none.

    A key is BLAKE2b-256 of the key before it and the block's tokens (docs/formats.md), so equal keys mean equal
    prefixes. An engine may use its own keys instead: any bytes, 1 to 32 long.

    Args:
        tokens: token ids, ``[n]``, 0 to 2**32 - 1.
        parent: the last key of a prefix that ``tokens`` continue.
    """
    array = np.asarray(tokens)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**32):
        raise invalid(f"tokens: integers from 0 to 2**32 - 1 are needed, got {array.dtype}")
    keys: list[bytes] = _dualkv.block_keys(array.astype(np.uint32, copy=False), geometry, parent)
    return keys


def checksum(buffer: "Buffer | Any") -> int:
    """The 64-bit XXH3 checksum that dualkv stores for a Layer Block. ``buffer`` must be contiguous."""
    return int(_dualkv.checksum(buffer))
