"""Describes an engine's paged KV cache to dualkv, without a copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualkv import _dualkv
from dualkv.errors import invalid
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
        planes = [_planes_of(i, layer) for i, layer in enumerate(layers)]
        counts = {count for layer in planes for *_, count in layer}
        if len(counts) != 1:
            raise invalid(f"KV cache: planes have {sorted(counts)} blocks; they must have equally many")
        table = np.zeros((len(planes), _MAX_PLANES, 3), dtype=np.uint64)
        for i, layer in enumerate(planes):
            for j, (pointer, stride, size, _) in enumerate(layer):
                table[i, j] = pointer, stride, size
        super().__init__(geometry, table, counts.pop(), list(layers))


def _planes_of(index: int, layer: Any) -> list[tuple[int, int, int, int]]:
    arrays = layer if isinstance(layer, list | tuple) else [layer]
    if not 1 <= len(arrays) <= _MAX_PLANES:
        raise invalid(f"KV cache, layer {index}: {len(arrays)} planes; 1 to {_MAX_PLANES} are possible")
    return [_plane_of(index, array) for array in arrays]


def _plane_of(index: int, array: Any) -> tuple[int, int, int, int]:
    """(pointer, block stride, bytes of a block, blocks) of one plane."""
    if hasattr(array, "data_ptr"):  # a torch tensor, without importing torch
        if array.device.type != "cpu":
            from dualkv.errors import Error

            raise Error(f"KV cache, layer {index}: memory of {array.device} is not supported yet", "unsupported")
        item = array.element_size()
        pointer, shape, strides = array.data_ptr(), tuple(array.shape), [s * item for s in array.stride()]
    else:
        view = np.from_dlpack(array) if hasattr(array, "__dlpack__") and not _has_buffer(array) else np.asarray(array)
        if not view.flags.writeable:
            raise invalid(f"KV cache, layer {index}: the array is read-only")
        if not np.shares_memory(view, np.asarray(array)) if _has_buffer(array) else False:
            raise invalid(f"KV cache, layer {index}: {type(array).__name__} can't be used without a copy")
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


def _has_buffer(array: Any) -> bool:
    if hasattr(array, "__array_interface__"):
        return True
    try:
        memoryview(array)
    except TypeError:
        return False
    return True
