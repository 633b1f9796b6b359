"""A CUDA driver for tests, the machine's or the stand-in of tests/cuda, and memory of its GPUs."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]


def build_stand_in(folder: Path, what: str = "cuda", soname: str = "libcuda.so.1") -> Path:
    """Compiles a stand-in, the driver's if nothing else is said, to a library of this name in ``folder``."""
    library = folder / soname
    source = ROOT / "tests" / what / "stand_in.cpp"
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'cpp'}", str(source)]
    subprocess.run([*command, f"-Wl,-soname,{soname}", "-o", str(library)], check=True)
    return library


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


HAS_DRIVER = _has_driver()


def load_driver(folder: Path) -> ctypes.CDLL:
    """The machine's driver; where there is none, the stand-in, which dlopen() then finds by its soname."""
    return ctypes.CDLL("libcuda.so.1" if HAS_DRIVER else str(build_stand_in(folder)))


def driver_environment(folder: Path) -> dict[str, str]:
    """The same for a process of its own."""
    if HAS_DRIVER:
        return {}
    build_stand_in(folder)
    return {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def check(result: int) -> None:
    """Of every driver call."""
    assert result == 0, f"CUDA error {result}"


class Gpu:
    """One GPU by the driver's own calls."""

    def __init__(self, driver: ctypes.CDLL, ordinal: int = 0) -> None:
        self.driver = driver
        self.ordinal = ordinal
        check(driver.cuInit(0))
        self._context = ctypes.c_void_p()
        check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), ordinal))

    def __enter__(self) -> Gpu:
        check(self.driver.cuCtxPushCurrent_v2(self._context))
        return self

    def __exit__(self, *_: object) -> None:
        check(self.driver.cuCtxPopCurrent_v2(None))

    def copy(self, to: int, source: int, size: int) -> None:
        """Blocks until it is done."""
        with self:
            check(self.driver.cuMemcpyAsync(ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), None))
            check(self.driver.cuStreamSynchronize(None))

    def stream(self) -> int:
        """A new stream's handle; never destroyed."""
        stream = ctypes.c_void_p()
        with self:
            check(self.driver.cuStreamCreateWithPriority(ctypes.byref(stream), 1, 0))
        assert stream.value
        return stream.value

    def synchronize(self, stream: int) -> None:
        """Waits for the stream."""
        with self:
            check(self.driver.cuStreamSynchronize(ctypes.c_void_p(stream)))

    def array(self, shape: tuple[int, ...], fill: int = 0) -> GpuArray:
        """New memory."""
        return GpuArray(self, shape, fill)


class GpuArray:
    """Bytes in a GPU's memory, that cupy's protocol describes."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], fill: int) -> None:
        self._gpu = gpu
        self.shape = shape
        pointer = ctypes.c_uint64()
        with gpu:
            check(gpu.driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(np.prod(shape)))))
        self.pointer = pointer.value
        self.write(np.full(shape, fill, np.uint8))

    def __del__(self) -> None:
        with self._gpu:
            self._gpu.driver.cuMemFree_v2(ctypes.c_uint64(self.pointer))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def write(self, values: np.ndarray[Any, Any]) -> None:
        """From the host."""
        values = np.ascontiguousarray(values, np.uint8)
        assert values.shape == self.shape
        self._gpu.copy(self.pointer, values.ctypes.data, values.nbytes)

    def read(self) -> np.ndarray[Any, Any]:
        """To the host."""
        values = np.empty(self.shape, np.uint8)
        self._gpu.copy(values.ctypes.data, self.pointer, values.nbytes)
        return values


class _DlTensor(ctypes.Structure):
    _fields_ = [
        *(("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)),
        *(("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))),
        ("byte_offset", ctypes.c_uint64),
    ]


class DlpackOnly:
    """The same memory for those who speak DLPack, with an offset of ``skip`` blocks."""

    def __init__(self, array: GpuArray, skip: int = 0) -> None:
        self._array = array
        self._skip = skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, stream: int | None = None) -> object:
        assert stream == -1, "no order is asked for"
        blocks, *rest = self._array.shape
        self._shape = (ctypes.c_int64 * 2)(blocks - self._skip, *rest)
        offset = self._skip * rest[0]
        self._tensor = _DlTensor(self._array.pointer, 2, 0, 2, 1, 8, 1, self._shape, None, offset)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._tensor), b"dltensor", None)
