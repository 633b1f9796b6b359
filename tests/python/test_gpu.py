"""GPU memory from Python: what arrays and streams are taken, whole loads, errors, and what a compiler can say of the
kernels. Without a GPU the driver is the stand-in of tests/cuda."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeNode
from gpu_support import HAS_DRIVER, ROOT, DlpackOnly, Gpu, GpuArray, build_stand_in, check, load_driver
from support import LAYER_BYTES, LONG_S, filled, layer_block, make_keys

import dualkv
from dualkv.engines.compute import ModelledCompute, ModelledCosts
from dualkv.engines.decode import Decoded, DecodeEngine
from dualkv.engines.prefill import Prefilled, PrefillEngine

BLOCKS = 12


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    """The first GPU."""
    return Gpu(load_driver(tmp_path_factory.mktemp("driver")))


class GpuCache:
    """A paged cache in a GPU's memory, with one plane a layer."""

    def __init__(self, gpu: Gpu, geometry: dualkv.KvGeometry, blocks: int) -> None:
        self.arrays = [gpu.array((blocks, geometry.layer_bytes(i))) for i in range(geometry.layers)]
        self.kv = dualkv.PagedKv(geometry, self.arrays)

    def holds(self, block: int, tag: int) -> bool:
        return all(
            bool((array.read()[block] == layer_block(tag, layer, array.shape[1])).all())
            for layer, array in enumerate(self.arrays)
        )

    def fill(self, block: int, tag: int) -> None:
        for layer, array in enumerate(self.arrays):
            values = array.read()
            values[block] = layer_block(tag, layer, array.shape[1])
            array.write(values)


class TorchLike:
    """What a torch CUDA tensor shows of itself."""

    def __init__(self, array: GpuArray) -> None:
        self._array = array
        self.shape = array.shape
        self.device = type("device", (), {"type": "cuda", "index": 0})()

    def data_ptr(self) -> int:
        return self._array.pointer

    def element_size(self) -> int:
        return 1

    def stride(self) -> tuple[int, ...]:
        return (self.shape[1], 1)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process that has loaded no driver."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a CUDA driver")
def test_every_entry_says_that_there_is_no_driver(root: Path) -> None:
    program = f"""
import dualkv
def refused(call):
    try:
        call()
    except dualkv.Error as error:
        assert error.code == "unsupported" and "no CUDA driver" in str(error), str(error)
        return
    raise AssertionError("not refused")

class Array:
    __cuda_array_interface__ = {{"shape": (4, 64), "typestr": "|u1", "data": (4096, False), "version": 3}}

geometry = dualkv.KvGeometry(tokens_per_block=4, layer_bytes=(64,), namespace="test")
refused(dualkv.gpus)
refused(lambda: dualkv.PagedKv(geometry, [Array()]))
cache = dualkv.PagedKv.from_pointers(geometry, [[(4096, 64, 64)]], 4, gpu=0)
refused(lambda: cache.checksums([0]))
with dualkv.Node("n", geometry, store="file://{root}", gpu_copy="kernel", gpu_verify=True) as node:
    keys = dualkv.block_keys(list(range(4)), geometry)
    plan = dualkv.PrefillOnly().plan(keys, prefill=node.view())
    refused(lambda: node.prepare(cache))
    refused(lambda: node.load(plan, into=cache, block_ids=[0]))
    refused(lambda: node.grant("peer", cache, [0]))
    refused(lambda: node.copy(cache, [0], cache, [1]))
    refused(lambda: node.save(keys, cache, [0]).wait())
    assert node.store.match(keys) == 0
    assert node.stats()["gpus"] == [] and node.stats()["loads_active"] == 0
"""
    result = run_python(program)
    assert result.returncode == 0, result.stderr


def test_a_driver_that_does_not_start_is_named_with_the_cure(tmp_path: Path) -> None:
    library = build_stand_in(tmp_path)
    program = f"import ctypes; ctypes.CDLL({str(library)!r}); import dualkv; dualkv.gpus()"
    result = run_python(program, DUALKV_STAND_IN_GPUS="0")
    assert "unsupported" in result.stderr
    assert "cuInit: no CUDA-capable device is detected" in result.stderr
    assert "nvidia-smi" in result.stderr


def test_a_driver_without_batches_refuses_them_and_has_the_others(tmp_path: Path, root: Path) -> None:
    library = build_stand_in(tmp_path)
    program = f"""
import ctypes, sys
ctypes.CDLL({str(library)!r})
sys.path.insert(0, {str(ROOT / "tests/python")!r})
import dualkv, gpu_support
assert "CUDA 12.8" in dualkv.gpus()[0].missing["batch"]
geometry = dualkv.KvGeometry(tokens_per_block=4, layer_bytes=(64,), namespace="test")
array = gpu_support.Gpu(ctypes.CDLL("libcuda.so.1")).array((4, 64))
cache = dualkv.PagedKv(geometry, [array])
with dualkv.Node("n", geometry, store="file://{root}") as node:
    node.prepare(cache)
with dualkv.Node("n", geometry, store="file://{root}", gpu_copy="batch") as node:
    node.prepare(cache)
"""
    result = run_python(program, DUALKV_STAND_IN_NO_BATCH="1")
    assert "gpu_copy='batch' on GPU 0" in result.stderr, result.stderr
    assert "CUDA 12.8" in result.stderr


GDS = f"""
import ctypes, os, sys
for library in os.environ["STAND_INS"].split():
    ctypes.CDLL(library)
sys.path.insert(0, {str(ROOT / "tests/python")!r})
import dualkv, gpu_support, numpy
root, strict = os.environ["ROOT"], "STRICT" in os.environ
geometry = dualkv.KvGeometry(tokens_per_block=4, layer_bytes=(512, 4096), namespace="test")
gpu = gpu_support.Gpu(ctypes.CDLL("libcuda.so.1"))
arrays = [gpu.array((8, size)) for size in (512, 4096)]
for number, array in enumerate(arrays, 1):
    array.write(numpy.arange(array.shape[0] * array.shape[1]).reshape(array.shape) * number % 251)
stored = [array.read() for array in arrays]
keys = dualkv.block_keys(list(range(32)), geometry)
allowed = dict(staging_options=dict(lock_memory=False, huge_pages=False),
               store_options=dict(direct="off", backend="pread", fail_on_fallback=strict))
with dualkv.Node("n", geometry, store=f"file://{{root}}", gpu_gds="1MiB", **allowed) as node:
    cache = dualkv.PagedKv(geometry, arrays)
    node.save(keys, cache, list(range(8))).wait()
    for array in arrays:
        array.write(numpy.zeros(array.shape))
    load = node.load(dualkv.PrefillOnly().plan(keys, prefill=node.view()), into=cache, block_ids=list(range(8)))
    load.wait(0), load.wait(1)
    load.cancel()
    assert all((array.read() == values).all() for array, values in zip(arrays, stored))
    stats = node.stats()
    print(stats["gpus"][0]["gds_bytes"], *(name for name in stats["fallbacks"] if "gds" in name))
"""


@pytest.mark.skipif(HAS_DRIVER, reason="the stand-in of cuFile needs that of the driver")
def test_storage_reads_come_to_a_gpu_or_it_is_said_why_not(tmp_path: Path, root: Path) -> None:
    driver = build_stand_in(tmp_path)
    both = f"{driver} {build_stand_in(tmp_path, 'cufile', 'libcufile.so.0')}"
    hit = 8 * (512 + 4096)
    for libraries, said, more in (
        (both, f"{hit}\n", {}),
        (both, f"{hit} gds_compatibility\n", {"DUALKV_STAND_IN_NO_NVFS": "1"}),
        (both, "0 no_gds\n", {"DUALKV_STAND_IN_BUFFERS": "3"}),
        (str(driver), "0 no_gds\n", {}),
    ):
        result = run_python(GDS, STAND_INS=libraries, ROOT=str(root), **more)
        assert (result.stdout, result.stderr) == (said, "")
    for libraries, why, more in (
        (both, "nvidia-fs is not loaded", {"DUALKV_STAND_IN_NO_NVFS": "1"}),
        (both, "cuFileBufRegister failed with 5036", {"DUALKV_STAND_IN_BUFFERS": "3"}),
        (str(driver), "install GPUDirect Storage", {}),
    ):
        result = run_python(GDS, STAND_INS=libraries, ROOT=str(root), STRICT="1", **more)
        assert result.returncode != 0
        assert why in result.stderr


def test_gpus_are_listed(gpu: Gpu) -> None:
    found = dualkv.gpus()
    assert [one.ordinal for one in found] == list(range(len(found)))
    assert found[0].name
    assert re.fullmatch(r"\d+\.\d", found[0].cuda)
    assert set(found[0].missing) <= {"batch", "kernel"}


@pytest.mark.parametrize("kind", ["cuda array interface", "strides", "torch", "dlpack", "dlpack offset", "pointers"])
def test_arrays_are_described_without_a_copy(gpu: Gpu, small: dualkv.KvGeometry, kind: str) -> None:
    host = filled(small, BLOCKS)
    skip = 2 if kind == "dlpack offset" else 0
    gap = 40 if kind == "strides" else 0
    arrays = [gpu.array((BLOCKS + skip, size + gap)) for size in LAYER_BYTES]
    for array, values in zip(arrays, host.arrays, strict=True):
        there = np.zeros(array.shape, np.uint8)
        there[skip:, : values.shape[1]] = values
        array.write(there)
    if kind == "pointers":
        planes = [[(array.pointer, size, size)] for array, size in zip(arrays, LAYER_BYTES, strict=True)]
        cache = dualkv.PagedKv.from_pointers(small, planes, BLOCKS, gpu=0)
    elif kind == "torch":
        cache = dualkv.PagedKv(small, [TorchLike(array) for array in arrays])
    elif kind.startswith("dlpack"):
        cache = dualkv.PagedKv(small, [DlpackOnly(array, skip) for array in arrays])
    elif kind == "strides":
        cache = dualkv.PagedKv(small, [Sliced(array, size) for array, size in zip(arrays, LAYER_BYTES, strict=True)])
    else:
        cache = dualkv.PagedKv(small, arrays)
    assert cache.gpu == 0
    assert cache.block_count == BLOCKS
    assert (cache.checksums(range(BLOCKS)) == host.kv.checksums(range(BLOCKS))).all()


class Sliced:
    """The first ``size`` bytes of each block."""

    def __init__(self, array: GpuArray, size: int) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            **array.__cuda_array_interface__,
            "shape": (array.shape[0], size),
            "strides": (array.shape[1], 1),
        }


def test_arrays_that_can_not_hold_kv_are_refused(gpu: Gpu, small: dualkv.KvGeometry) -> None:
    host = [np.zeros((BLOCKS, size), np.uint8) for size in LAYER_BYTES]
    arrays: list[Any] = [gpu.array((BLOCKS, size)) for size in LAYER_BYTES]
    assert dualkv.PagedKv(small, host).gpu is None
    with pytest.raises(dualkv.Error, match="planes lie in host memory, GPU 0"):
        dualkv.PagedKv(small, [*host[:-1], arrays[-1]])
    read_only = Sliced(arrays[-1], LAYER_BYTES[-1])
    read_only.__cuda_array_interface__["data"] = (arrays[-1].pointer, True)
    with pytest.raises(dualkv.Error, match="read-only"):
        dualkv.PagedKv(small, [*arrays[:-1], read_only])
    nowhere = Sliced(arrays[-1], LAYER_BYTES[-1])
    nowhere.__cuda_array_interface__["data"] = (host[0].ctypes.data, False)
    with pytest.raises(dualkv.Error, match="not known to CUDA, not of a GPU"):
        dualkv.PagedKv(small, [*arrays[:-1], nowhere])
    with pytest.raises(dualkv.Error, match="5 planes"):
        dualkv.PagedKv.from_pointers(small, [[(4096, 64, 64)] * 5], 1, gpu=0)


class WithPtr:
    def __init__(self, handle: int) -> None:
        self.ptr = handle


class WithCudaStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


class WithProtocol:
    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)


@pytest.mark.parametrize("wrap", [int, WithPtr, WithCudaStream, WithProtocol])
@pytest.mark.parametrize("policy", [dualkv.PrefillOnly, dualkv.DecodeOnly, dualkv.Split])
def test_a_whole_load_in_gpu_memory(
    gpu: Gpu, make_node: MakeNode, small: dualkv.KvGeometry, wrap: Any, policy: type[dualkv.PathPolicy]
) -> None:
    pe, de = make_node("pe"), make_node("de", listen="tcp://127.0.0.1:0")
    peer = pe.connect(de.addresses[0])
    keys = make_keys(small, BLOCKS)
    source = GpuCache(gpu, small, BLOCKS)
    for block in range(BLOCKS):
        source.fill(block, block + 1)
    pe.save(keys, source.kv, range(BLOCKS)).wait(LONG_S)
    assert pe.store.match(keys) == BLOCKS
    cache, decode = GpuCache(gpu, small, BLOCKS + 1), GpuCache(gpu, small, BLOCKS + 1)
    cache.fill(BLOCKS, BLOCKS + 1)  # as if computed
    handle = gpu.stream()
    stream = wrap(handle)
    plan = policy().plan(keys, prefill=pe.view(), decode=peer.view())
    load = pe.load(plan, into=cache.kv, block_ids=range(BLOCKS + 1))
    incoming = de.incoming(load.id)
    for layer in range(small.layers):
        load.wait_on_stream(layer, stream)
        load.publish(layer, stream)
    result = load.finish(LONG_S)
    gpu.synchronize(handle)
    assert sum(path["bytes"] for path in result["paths"]) == BLOCKS * small.block_bytes
    incoming.wait(LONG_S)
    incoming.copy_to(decode.kv, range(BLOCKS, -1, -1))
    for block in range(BLOCKS + 1):
        assert cache.holds(block, block + 1), block
        assert decode.holds(BLOCKS - block, block + 1), block
    incoming.close()
    (stats,) = pe.stats()["gpus"]
    assert stats["gpu"] == 0
    assert stats["to_gpu"]["bytes"] == BLOCKS * small.block_bytes
    assert sum(stats["to_gpu"]["batches"].values()) > 0


def test_gates_stand_for_one_load_after_the_other(gpu: Gpu, make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node()
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    plan = dualkv.PrefillOnly().plan(keys, prefill=node.view())
    gates = node.layer_gates(gpu=0)
    assert gates.layers == small.layers
    stream = WithPtr(gpu.stream())
    for _ in range(3):
        cache = GpuCache(gpu, small, BLOCKS)
        load = node.load(plan, into=cache.kv, block_ids=range(BLOCKS))
        load.open_gates(gates, stream)
        for layer in range(small.layers):  # as a replay does
            gates.wait(layer, stream)
        gpu.synchronize(stream.ptr)
        assert load.ready(small.layers - 1)
        assert cache.holds(BLOCKS - 1, BLOCKS)
        load.cancel()
    with pytest.raises(dualkv.Error, match="layer 5 of 5"):
        gates.wait(5, stream)


def test_streams_that_are_none_and_caches_in_host_memory_are_refused(
    gpu: Gpu, make_node: MakeNode, small: dualkv.KvGeometry
) -> None:
    node = make_node()
    keys = make_keys(small, BLOCKS)
    host = filled(small, BLOCKS)
    node.save(keys, host.kv, range(BLOCKS)).wait(LONG_S)
    plan = dualkv.PrefillOnly().plan(keys, prefill=node.view())
    cache = GpuCache(gpu, small, BLOCKS)
    load = node.load(plan, into=cache.kv, block_ids=range(BLOCKS))
    for wrong in ("stream", None, True, object()):
        with pytest.raises(dualkv.Error, match=r"stream: \w+ is none"):
            load.wait_on_stream(0, wrong)
    with pytest.raises(dualkv.Error, match="layer 5 of 5"):
        load.wait_on_stream(5, gpu.stream())
    load.wait(4, LONG_S)
    load.cancel()
    load = node.load(plan, into=host.kv, block_ids=range(BLOCKS))
    with pytest.raises(dualkv.Error, match="host memory; use wait"):
        load.wait_on_stream(0, gpu.stream())
    load.wait(4, LONG_S)
    assert cache.holds(3, 4)


class GpuCompute(ModelledCompute):
    """Modelled compute whose cache is in a GPU's memory, and whose work is all on one stream: nothing here waits."""

    def __init__(self, gpu: Gpu, layers: int, layer_bytes: int, block_count: int) -> None:
        super().__init__(layers, layer_bytes, 4, block_count, ModelledCosts())
        self.gpu, self.stream = gpu, WithPtr(gpu.stream())
        self.arrays = [gpu.array((block_count, layer_bytes)) for _ in range(layers)]
        self.kv = dualkv.PagedKv(self.geometry, self.arrays)
        self._size = layer_bytes

    def _enqueue(self, to: int, source: int) -> None:
        with self.gpu:
            pointers = ctypes.c_uint64(to), ctypes.c_uint64(source)
            check(
                self.gpu.driver.cuMemcpyAsync(*pointers, ctypes.c_size_t(self._size), ctypes.c_void_p(self.stream.ptr))
            )

    def prefill(self, tokens: Any, start: int, block_ids: Any, before_layer: Any, after_layer: Any) -> int:
        names = self._names(tokens)
        hit = start // self.geometry.tokens_per_block
        seen, patterns = [], []
        for layer, array in enumerate(self.arrays):
            before_layer(layer)
            for index, block in enumerate(block_ids[: len(names)]):
                place = array.pointer + block * self._size
                pattern = self._pattern(names[index], layer)
                patterns.append(pattern)  # lives until the stream has read it
                if index < hit:
                    seen.append((pattern, np.zeros_like(pattern)))
                    self._enqueue(seen[-1][1].ctypes.data, place)
                else:
                    self._enqueue(place, pattern.ctypes.data)
            after_layer(layer)
        self.gpu.synchronize(self.stream.ptr)
        self._wrong += sum(not np.array_equal(*pair) for pair in seen)
        return names[-1] % 50021

    def fill(self, tokens: Any, block_ids: Any) -> None:
        self.prefill(tokens, 0, block_ids, lambda _layer: None, lambda _layer: None)

    def wrong_blocks(self, tokens: Any, block_ids: Any) -> int:
        wrong, self._wrong = self._wrong, 0
        there = [array.read() for array in self.arrays]
        for name, block in zip(self._names(tokens), block_ids, strict=False):
            wrong += any(
                not np.array_equal(there[layer][block].view(np.uint64), self._pattern(name, layer))
                for layer in range(self.geometry.layers)
            )
        return wrong


@pytest.mark.parametrize("policy", [dualkv.PrefillOnly, dualkv.DecodeOnly, dualkv.Split])
def test_reference_engines_wait_and_publish_on_a_stream(
    gpu: Gpu, make_node: MakeNode, policy: type[dualkv.PathPolicy]
) -> None:
    computes = [GpuCompute(gpu, layers=6, layer_bytes=4096, block_count=64) for _ in range(2)]
    geometry = computes[0].geometry
    pe = make_node("pe", geometry=geometry)
    de = make_node("de", geometry=geometry, listen="tcp://127.0.0.1:0")
    peer = pe.connect(de.addresses[0])
    stored, prompt = 12, np.arange(53, dtype=np.uint32)

    async def run() -> tuple[Prefilled, Decoded]:
        prefill, decode = PrefillEngine(pe, computes[0], policy()), DecodeEngine(de, computes[1])
        computes[0].fill(prompt[: stored * 4], range(20, 20 + stored))
        keys = dualkv.block_keys(prompt, geometry)
        await pe.save(keys[:stored], computes[0].kv, range(20, 20 + stored))
        done = await prefill.prefill(prompt, peer)
        return done, await decode.decode(done.load_id, prompt, done.first_token, 1, hit_blocks=done.hit_blocks)

    done, decoded = asyncio.run(asyncio.wait_for(run(), LONG_S))
    assert done.hit_blocks == stored
    assert computes[0].wrong_blocks(prompt, []) == 0, "the stream did not wait for a layer"
    assert decoded.wrong_blocks == 0
    assert decoded.tokens == [done.first_token]
    assert sorted(done.layer_done_s) == done.layer_done_s


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"gpu_copy": "dma"}, "gpu_copy = 'dma'"),
        ({"gpu_verify": "yes"}, "gpu_verify"),
        ({"gpu_bounce": "lots"}, "lots"),
        ({"gpu_gds": "all"}, "all"),
        ({"gpu_rdma": "all"}, "all"),
    ],
)
def test_bad_options_are_named(make_node: MakeNode, option: dict[str, Any], why: str) -> None:
    with pytest.raises(dualkv.Error, match=why):
        make_node(**option)


# What a compiler can say of the kernels, without a GPU.


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("no nvcc")
    return found


KERNEL_FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'cpp'}"]
KERNELS = ROOT / "cpp/memory/cuda_kernels.cu"


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_spill_nothing_and_move_16_bytes_at_once(tmp_path: Path, architecture: str) -> None:
    cubin = tmp_path / "kernels.cubin"
    command = [nvcc(), "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}", *KERNEL_FLAGS, "-o", cubin, KERNELS]
    compiled = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = compiled.stdout + compiled.stderr
    assert usage.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, usage
    tools = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    disassembler = shutil.which("cuobjdump", path=path)
    if disassembler is None:
        pytest.skip("no cuobjdump")
    listing = subprocess.run(
        [disassembler, "-sass", str(cubin)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    copy = next(part for part in listing.split("Function : ") if part.startswith("dualkv_copy"))
    assert len(re.findall(r"\bLDG\.E\S*\.128\b", copy)) >= 4
    assert len(re.findall(r"\bSTG\.E\S*\.128\b", copy)) >= 4
    assert not re.search(r"\b(LDL|STL)\b", listing), "local memory is used"


def test_our_declarations_of_the_driver_are_those_of_its_header() -> None:
    include = Path(nvcc()).resolve().parent.parent / "include"
    if not (include / "cudaTypedefs.h").exists():
        include = Path("/usr/local/cuda/include")
    if not (include / "cudaTypedefs.h").exists():
        pytest.skip("no cudaTypedefs.h")
    source = ROOT / "tests/cuda/abi_test.cpp"
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'cpp'}", f"-I{include}", str(source)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_our_declarations_of_cufile_are_those_of_its_header() -> None:
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or () for path in Path(place).rglob("cufile.h")]
    include = Path("/usr/local/cuda/include")
    if not found or not (include / "cuda.h").exists():
        pytest.skip("no cufile.h, or no cuda.h")
    source = ROOT / "tests/cufile/abi_test.cpp"
    paths = [f"-I{ROOT / 'cpp'}", f"-I{include}", f"-I{found[0].parent}"]
    checked = subprocess.run(["c++", "-std=c++20", "-fsyntax-only", *paths, source], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_build_that_is_tested_has_the_kernels(gpu: Gpu) -> None:
    nvcc()
    assert "kernel" not in dualkv.gpus()[0].missing


@pytest.mark.skipif(HAS_DRIVER, reason="a real driver keeps its own rules")
def test_the_stand_in_keeps_the_drivers_rules(gpu: Gpu) -> None:
    """What the tests above would otherwise not notice: host code that touches a GPU's memory dies."""
    array = gpu.array((1, 4096))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(array.pointer, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11
    with gpu:
        wild = ctypes.c_uint64(array.pointer + 4000)
        assert gpu.driver.cuMemcpyAsync(wild, ctypes.c_uint64(array.pointer), ctypes.c_size_t(200), None) != 0
    outside = gpu.driver.cuStreamQuery(None)
    assert outside != 0, "no context is current"
