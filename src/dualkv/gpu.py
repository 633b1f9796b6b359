"""GPUs: which there are, the memory of theirs that Python objects describe, and their streams."""

import dataclasses
from typing import Any

from dualkv import _dualkv
from dualkv.errors import invalid

# Of DLPack.
_DLPACK_CUDA = (2, 13)  # device memory, managed memory


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of this process.

    Attributes:
        ordinal: its number among those that ``CUDA_VISIBLE_DEVICES`` shows.
        name: what the driver calls it.
        cuda: of the driver, like ``"13.0"``.
        missing: of the copy engines (``gpu_copy``) that can't be had here, the reason.
    """

    ordinal: int
    name: str
    cuda: str
    missing: dict[str, str]


def gpus() -> list[Gpu]:
    """The GPUs that the driver shows this process. Opens them, some 100 ms each.

    Raises:
        Error: ``unsupported`` where there is no driver, or it doesn't work, with the likely cure.
    """
    out = []
    for ordinal, name, version, no_batch, no_kernel in _dualkv.gpus():
        missing = {"batch": no_batch, "kernel": no_kernel}
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        out.append(Gpu(ordinal, name, cuda, {engine: why for engine, why in missing.items() if why}))
    return out


@dataclasses.dataclass(frozen=True)
class DeviceView:
    """An array in a GPU's memory: pointer, shape, strides and size of an item in bytes, and who keeps it alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int
    owner: Any


def device_view(array: Any) -> DeviceView | None:
    """What a torch, cupy, numba, JAX or DLPack array in a GPU's memory describes; None if it lies in host memory."""
    if hasattr(array, "data_ptr"):  # a torch tensor, without importing torch
        if array.device.type != "cuda":
            return None
        item = array.element_size()
        strides = tuple(stride * item for stride in array.stride())
        return DeviceView(array.data_ptr(), tuple(array.shape), strides, item, array)
    if hasattr(array, "__cuda_array_interface__"):
        return _of_interface(array, array.__cuda_array_interface__)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA:
        # -1: no order is asked of the producer's stream; the cache is described, not read.
        capsule = array.__dlpack__(stream=-1)
        pointer, shape, strides, item = _dualkv.dlpack_view(capsule)
        return DeviceView(pointer, shape, tuple(strides), item, (array, capsule))
    return None


def _of_interface(array: Any, interface: dict[str, Any]) -> DeviceView:
    pointer, read_only = interface["data"]
    if read_only:
        raise invalid("KV cache: the array is read-only")
    kind, item = interface["typestr"][1], int(interface["typestr"][2:])
    if kind == "O":
        raise invalid("KV cache: an array of Python objects holds no KV")
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        steps = [item]
        for size in reversed(shape[1:]):
            steps.append(steps[-1] * size)
        strides = tuple(reversed(steps))
    return DeviceView(pointer, shape, tuple(strides), item, array)


def stream_handle(stream: Any) -> int:
    """The CUstream of an int, a torch or cupy stream, or an object with ``__cuda_stream__`` (CUDA Python).

    Raises:
        Error: ``invalid_argument`` for anything else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise invalid(
        f"stream: {type(stream).__name__} is none; give a torch.cuda.Stream, a cupy.cuda.Stream, an object with "
        "__cuda_stream__, or the handle as an int"
    )
