"""Describes an engine's paged KV cache to dualkv, without a copy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dualkv import _dualkv
from dualkv.errors import Error, invalid
from dualkv.geometry import KvGeometry
from dualkv.gpu import device_view

_MAX_PLANES = 4
_HOST = -1  # instead of a GPU's number


class _Plane(NamedTuple):
    pointer: int
    stride: int  # of blocks, in bytes
    size: int  # of a block, in bytes
    blocks: int
    device: int
    owner: Any


class PagedKv(_dualkv.PagedKv):
    """A paged KV cache in host memory or a GPU's: where block ``id`` of layer ``i`` lies.

    Args:
        geometry: the model's geometry.
        layers: per layer one array whose first axis is the block (one plane, as MLA keeps it), or a sequence of
            such arrays (K and V apart, as vLLM keeps them): numpy arrays, torch tensors, cupy arrays, or anything that
            offers the buffer protocol, ``__array_interface__``, ``__cuda_array_interface__`` or DLPack. Each block of
            a plane must be contiguous. A Layer Block is the concatenation of its planes. All lie in host memory, or
            all in that of one GPU.

    The memory is not copied: the object keeps the arrays alive, and must not outlive a reallocation of theirs.

    Raises:
        Error: ``invalid_argument`` if planes don't add up to the geometry, or lie here and there; ``unsupported`` for
            memory of a GPU where there is no driver.
    """

    def __init__(self, geometry: KvGeometry, layers: Sequence[Any]) -> None:
        arrays = [_arrays_of(i, layer) for i, layer in enumerate(layers)]
        planes = [[_plane_of(i, array) for array in layer] for i, layer in enumerate(arrays)]
        counts = {plane.blocks for layer in planes for plane in layer}
        if len(counts) != 1:
            raise invalid(f"KV cache: planes have {sorted(counts)} blocks; they must have equally many")
        devices = {plane.device for layer in planes for plane in layer}
        if len(devices) != 1:
            raise invalid(f"KV cache: planes lie in {', '.join(map(_name_of, sorted(devices)))}; one is needed")
        owners = [plane.owner for layer in planes for plane in layer]
        super().__init__(geometry, _table_of(planes), counts.pop(), devices.pop(), owners)

    @classmethod
    def from_pointers(
        cls,
        geometry: KvGeometry,
        layers: Sequence[Sequence[tuple[int, int, int]]],
        block_count: int,
        *,
        gpu: int | None = None,
    ) -> "PagedKv":
        """A cache that no array describes; the caller keeps the memory alive.

        Args:
            layers: per layer its planes: (pointer, bytes from one block to the next, bytes of a block).
            gpu: whose memory it is; host memory if left out. Checked when a node first gets the cache.
        """
        device = _HOST if gpu is None else gpu
        planes = [[_Plane(*plane, block_count, device, None) for plane in layer] for layer in layers]
        if max(map(len, planes), default=0) > _MAX_PLANES:
            raise invalid(f"KV cache: {max(map(len, planes))} planes; 1 to {_MAX_PLANES} are possible")
        cache = cls.__new__(cls)
        _dualkv.PagedKv.__init__(cache, geometry, _table_of(planes), block_count, device, None)
        return cache

    @property
    def gpu(self) -> int | None:
        """The GPU whose memory it is; None for host memory."""
        return None if self._device == _HOST else int(self._device)

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


def _plane_of(index: int, array: Any) -> _Plane:
    if (there := device_view(array)) is not None:
        device = _dualkv.gpu_of(there.pointer)
        return _checked(index, there.pointer, there.shape, list(there.strides), there.item, device, there.owner)
    if hasattr(array, "data_ptr"):  # a torch tensor, without importing torch
        if array.device.type != "cpu":
            raise Error(f"KV cache, layer {index}: memory of {array.device} is not supported", "unsupported")
        item = array.element_size()
        strides = [s * item for s in array.stride()]
        return _checked(index, array.data_ptr(), tuple(array.shape), strides, item, _HOST, array)
    view = _view_of(index, array)
    if not view.flags.writeable:
        raise invalid(f"KV cache, layer {index}: the array is read-only")
    if view.dtype.hasobject:
        raise invalid(f"KV cache, layer {index}: an array of Python objects holds no KV")
    return _checked(index, view.ctypes.data, view.shape, list(view.strides), view.itemsize, _HOST, array)


def _checked(
    index: int, pointer: int, shape: tuple[int, ...], strides: list[int], item: int, device: int, owner: Any
) -> _Plane:
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
    return _Plane(pointer, strides[0], expected, shape[0], device, owner)


def _table_of(planes: list[list[_Plane]]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    table = np.zeros((len(planes), _MAX_PLANES, 3), dtype=np.uint64)
    for i, layer in enumerate(planes):
        for j, plane in enumerate(layer):
            table[i, j] = plane.pointer, plane.stride, plane.size
    return table


def _name_of(device: int) -> str:
    return "host memory" if device == _HOST else f"GPU {device}"
