"""Describes an engine's paged KV cache to dualkv, without a copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dualkv import _dualkv
from dualkv.errors import Error, invalid
from dualkv.geometry import KvGeometry

_MAX_PLANES = 4


class PagedKv(_dualkv.PagedKv):
    """A paged KV cache in host memory: where block ``id`` of layer ``i`` lies.

    Args:
        geometry: the model's geometry.
        layers: per layer one array whose first axis is the block (one plane, as MLA keeps it), or a sequence of
            such arrays (K and V apart, as vLLM keeps them): numpy arrays, torch CPU tensors, or anything that offers
            the buffer protocol, ``__array_interface__`` or DLPack. Each block of a plane must be contiguous. A Layer
            Block is the concatenation of its planes.

    The memory is not copied: the object keeps the arrays alive, and must not outlive a reallocation of theirs.

    Raises:
        Error: ``invalid_argument`` if planes don't add up to the geometry, ``unsupported`` for memory of a device.
    """

    def __init__(self, geometry: KvGeometry, layers: Sequence[Any]) -> None:
        arrays = [_arrays_of(i, layer) for i, layer in enumerate(layers)]
        planes = [[_plane_of(i, array) for array in layer] for i, layer in enumerate(arrays)]
        counts = {count for layer in planes for *_, count in layer}
        if len(counts) != 1:
            raise invalid(f"KV cache: planes have {sorted(counts)} blocks; they must have equally many")
        table = np.zeros((len(planes), _MAX_PLANES, 3), dtype=np.uint64)
        for i, layer in enumerate(planes):
            for j, (pointer, stride, size, _) in enumerate(layer):
                table[i, j] = pointer, stride, size
        super().__init__(geometry, table, counts.pop(), arrays)

    def checksums(
        self, block_ids: ArrayLike, layers: tuple[int, int] | None = None
    ) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """XXH3-64 of each Layer Block, ``[layers, blocks]``: what a store keeps with it. Blocks; releases the GIL.

        Args:
            layers: (first, count); all if left out.
        """
        ids = block_ids_array(block_ids)
        first, count = layers if layers is not None else (0, self.layers)
        return self._checksums(ids, first, count).reshape(count, len(ids))


def block_ids_array(block_ids: ArrayLike) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """Block ids as the core takes them. Raises Error for anything but integers in range."""
    try:
        array = np.asarray(block_ids)
    except ValueError as error:
        raise invalid(f"block ids: {error}") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**32:
        raise invalid(
            f"block ids: a flat list of integers from 0 to 2**32 - 1 is needed, got {array.dtype} {array.shape}"
        )
    return array.astype(np.uint32, copy=False)


def _arrays_of(index: int, layer: Any) -> list[Any]:
    arrays = list(layer) if isinstance(layer, list | tuple) else [layer]
    if not 1 <= len(arrays) <= _MAX_PLANES:
        raise invalid(f"KV cache, layer {index}: {len(arrays)} planes; 1 to {_MAX_PLANES} are possible")
    return arrays


def _view_of(index: int, array: Any) -> "np.ndarray[Any, Any]":
    """The array's own memory as numpy sees it; never a copy, whose pointer would dangle."""
    if not hasattr(array, "__array_interface__"):
        try:
            array = memoryview(array)
        except TypeError:
            if not hasattr(array, "__dlpack__"):
                raise invalid(
                    f"KV cache, layer {index}: {type(array).__name__} offers no buffer, __array_interface__ or DLPack"
                ) from None
            return np.from_dlpack(array)
    return np.asarray(array)


def _plane_of(index: int, array: Any) -> tuple[int, int, int, int]:
    """(pointer, block stride, bytes of a block, blocks) of one plane."""
    if hasattr(array, "data_ptr"):  # a torch tensor, without importing torch
        if array.device.type != "cpu":
            raise Error(f"KV cache, layer {index}: memory of {array.device} is not supported yet", "unsupported")
        item = array.element_size()
        pointer, shape, strides = array.data_ptr(), tuple(array.shape), [s * item for s in array.stride()]
    else:
        view = _view_of(index, array)
        if not view.flags.writeable:
            raise invalid(f"KV cache, layer {index}: the array is read-only")
        if view.dtype.hasobject:
            raise invalid(f"KV cache, layer {index}: an array of Python objects holds no KV")
        item = view.itemsize
        pointer, shape, strides = view.ctypes.data, view.shape, list(view.strides)
    if len(shape) < 2 or shape[0] < 1:
        raise invalid(f"KV cache, layer {index}: shape {shape}; the first axis must be the block, of two or more axes")
    expected = item
    for size, stride in zip(reversed(shape[1:]), reversed(strides[1:]), strict=True):
        if size > 1 and stride != expected:
            raise invalid(
                f"KV cache, layer {index}: a block of shape {shape[1:]} is not contiguous (strides {strides})"
            )
        expected *= size
    if strides[0] < 0:
        raise invalid(f"KV cache, layer {index}: negative block stride {strides[0]}")
    return pointer, strides[0], expected, shape[0]
