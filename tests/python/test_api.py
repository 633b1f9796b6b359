"""The Python API against its documentation: values, caches, waiting, options, ends of lives."""

from __future__ import annotations

import array
import asyncio
import ctypes.util
import gc
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeNode
from support import (
    LAYER_BYTES,
    LONG_S,
    UNTOUCHED,
    HostCache,
    all_free,
    error_of,
    eventually,
    filled,
    layer_block,
    make_geometry,
    make_keys,
    open_fds,
    plan,
    threads,
)

import dualkv
from dualkv.sizes import parse_size

BLOCKS = 6


def refused(call: Callable[[], Any], *mentions: str, code: str = "invalid_argument") -> None:
    """The call raises an Error that says what was wrong."""
    error = error_of(call)
    assert error is not None, "not refused"
    assert error.code == code, error
    for text in mentions:
        assert text in str(error)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent, check=False
    )


# --- importing


def test_importing_dualkv_imports_nothing_heavy() -> None:
    heavy = ("torch", "matplotlib", "click", "rich", "cupy")
    done = run_python(f"import sys, dualkv; print([m for m in {heavy!r} if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- geometry, keys, sizes


def test_geometry() -> None:
    one = dualkv.KvGeometry(layers=3, tokens_per_block=4, layer_bytes=100, namespace="x")
    same = dualkv.KvGeometry(tokens_per_block=4, layer_bytes=[100, 100, 100], namespace="x")
    other = dualkv.KvGeometry(tokens_per_block=4, layer_bytes=[100, 100, 100], namespace="y")
    assert (one.layers, one.tokens_per_block, one.block_bytes, one.namespace) == (3, 4, 300, "x")
    assert [one.layer_offset(i) for i in range(3)] == [0, 100, 200]
    assert one == same
    assert one != other
    assert len({one, same, other}) == 2
    assert one.file_bytes % 4096 == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": None},
        {"layers": 0},
        {"layers": -1},
        {"layers": 2, "layer_bytes": [1, 2, 3]},
        {"layer_bytes": 0},
        {"layer_bytes": [100, 0, 100]},
        {"layer_bytes": -5},
        {"layer_bytes": 2**31},
        {"layers": 1025},
        {"tokens_per_block": 0},
        {"tokens_per_block": 65537},
        {"namespace": ""},
        {"namespace": "n" * 257},
    ],
    ids=str,
)
def test_geometry_out_of_range(changed: dict[str, Any]) -> None:
    values: dict[str, Any] = {"layers": 3, "tokens_per_block": 4, "layer_bytes": 100, "namespace": "x"}
    refused(lambda: dualkv.KvGeometry(**values | changed))


def test_layers_of_a_geometry_are_bounded(small: dualkv.KvGeometry) -> None:
    refused(lambda: small.layer_bytes(small.layers), "layer 5 of 5")
    assert small.layer_offset(small.layers) == small.block_bytes
    refused(lambda: small.layer_offset(small.layers + 1))


def test_keys_chain(small: dualkv.KvGeometry) -> None:
    tokens = np.arange(4 * small.tokens_per_block + 3)
    keys = dualkv.block_keys(tokens, small)
    assert len(keys) == len(set(keys)) == 4
    assert dualkv.block_keys(tokens.tolist(), small) == keys
    assert dualkv.block_keys(tokens[: small.tokens_per_block - 1], small) == []
    changed = tokens.copy()
    changed[small.tokens_per_block] += 1
    assert dualkv.block_keys(changed, small)[0] == keys[0]
    assert not set(dualkv.block_keys(changed, small)[1:]) & set(keys)
    assert not set(dualkv.block_keys(tokens, make_geometry(namespace="other"))) & set(keys)


@pytest.mark.parametrize("tokens", [[-1, 2, 3, 4], [2**32, 0, 0, 0], [1.5, 2, 3, 4], ["a", "b", "c", "d"]], ids=str)
def test_tokens_that_are_none(small: dualkv.KvGeometry, tokens: list[Any]) -> None:
    refused(lambda: dualkv.block_keys(tokens, small), "tokens")


def test_tokens_of_two_dimensions(small: dualkv.KvGeometry) -> None:
    refused(lambda: dualkv.block_keys(np.zeros((2, 4), np.int64), small), "one-dimensional")


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("0", 0), ("8MiB", 8 << 20), ("200MB", 200_000_000), ("1.5 KiB", 1536), ("2gib", 2 << 30), ("7 B/s", 7)],
)
def test_parse_size(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "8 QiB", "-1", -1, True, "1e3", None, "nan", "inf", "9" * 400], ids=repr)
def test_parse_size_refuses(text: Any) -> None:
    refused(lambda: parse_size(text), "size")


# --- paged caches


def save_and_load(
    make_node: MakeNode, cache: dualkv.PagedKv, ids: list[int], keys: list[bytes], into: HostCache
) -> None:
    node = make_node()
    node.save(keys, cache, ids).wait(LONG_S)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=into.kv, block_ids=range(len(keys)))
    load.finish(LONG_S)


def test_strided_planes(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    """One array that interleaves the blocks of all layers, as an engine might lay them out."""
    whole = np.zeros((4, small.block_bytes + 13), np.uint8)
    layers = []
    for i in range(small.layers):
        layers.append(whole[:, small.layer_offset(i) : small.layer_offset(i) + small.layer_bytes(i)])
        for block in range(4):
            layers[i][block] = layer_block(block + 1, i, small.layer_bytes(i))
    into = HostCache(small, 4)
    save_and_load(make_node, dualkv.PagedKv(small, layers), [3, 1], make_keys(small, 2), into)
    assert into.holds(0, 4)
    assert into.holds(1, 2)
    assert into.untouched(2)
    assert not whole[:, small.block_bytes :].any()


def test_k_and_v_apart(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    """A Layer Block is the concatenation of its planes, of whatever sizes."""
    target = [[np.zeros((3, 100), np.uint8), np.zeros((3, small.layer_bytes(i) - 100), np.uint8)] for i in range(5)]
    source = filled(small, 3)
    node = make_node()
    keys = make_keys(small, 3)
    node.save(keys, source.kv, [0, 1, 2]).wait(LONG_S)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=dualkv.PagedKv(small, target), block_ids=[2, 0, 1])
    load.finish(LONG_S)
    for layer, (k, v) in enumerate(target):
        for i, block in enumerate([2, 0, 1]):
            expected = layer_block(i + 1, layer, small.layer_bytes(layer))
            assert bytes(k[block]) + bytes(v[block]) == expected.tobytes()


class Dlpack:
    """Offers nothing but DLPack."""

    def __init__(self, owned: np.ndarray[Any, Any]) -> None:
        self.owned = owned

    def __dlpack__(self, **options: Any) -> Any:
        return self.owned.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.owned.__dlpack_device__()


class ArrayInterface:
    def __init__(self, owned: np.ndarray[Any, Any]) -> None:
        self.owned = owned

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.owned.__array_interface__


def as_memoryview(owned: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(bytearray(owned.tobytes())).cast("B", owned.shape)


@pytest.mark.parametrize("wrap", [as_memoryview, Dlpack, ArrayInterface], ids=lambda wrap: wrap.__name__)
def test_memory_of_other_kinds(make_node: MakeNode, small: dualkv.KvGeometry, wrap: Callable[[Any], Any]) -> None:
    layers = [wrap(owned) for owned in filled(small, 2).arrays]
    into = HostCache(small, 3)
    save_and_load(make_node, dualkv.PagedKv(small, layers), [1, 0], make_keys(small, 2), into)
    assert into.holds(0, 2)
    assert into.holds(1, 1)
    assert into.untouched(2)


def test_torch_tensors(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    torch = pytest.importorskip("torch")
    layers = [torch.zeros((3, small.layer_bytes(i)), dtype=torch.uint8) for i in range(5)]
    kv = dualkv.PagedKv(small, layers)
    node = make_node()
    keys = make_keys(small, 2)
    node.save(keys, filled(small, 2).kv, [0, 1]).wait(LONG_S)
    node.load(plan(dualkv.PrefillOnly(), keys, node), into=kv, block_ids=[2, 0]).finish(LONG_S)
    for layer, tensor in enumerate(layers):
        assert bytes(tensor[2].tolist()) == layer_block(1, layer, small.layer_bytes(layer)).tobytes()
        assert bytes(tensor[0].tolist()) == layer_block(2, layer, small.layer_bytes(layer)).tobytes()
        assert not tensor[1].any()
    refused(lambda: dualkv.PagedKv(small, [t[:, ::2] for t in layers]), "contiguous")
    meta = [torch.zeros(t.shape, device="meta", dtype=t.dtype) for t in layers]
    refused(lambda: dualkv.PagedKv(small, meta), "meta", code="unsupported")


def test_a_cache_of_other_sizes_is_refused(small: dualkv.KvGeometry) -> None:
    arrays = HostCache(small, 4).arrays
    refused(lambda: dualkv.PagedKv(small, arrays[:-1]), "layers")
    refused(lambda: dualkv.PagedKv(small, []))
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], arrays[-1][:, :-1]]), "layer 4")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], arrays[-1][:3]]), "[3, 4]")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], arrays[-1].reshape(-1)]), "layer 4")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], [arrays[-1]] * 5]), "5 planes")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], []]), "0 planes")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], 7]), "layer 4")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], np.zeros((0, LAYER_BYTES[-1]), np.uint8)]), "layer 4")


def test_arrays_that_cannot_be_written_in_place(small: dualkv.KvGeometry) -> None:
    arrays = HostCache(small, 4).arrays
    size = LAYER_BYTES[-1]
    read_only = arrays[-1].copy()
    read_only.flags.writeable = False
    wide = np.zeros((4, 2 * size), np.uint8)
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(4 * size, np.uint8), (4, size), (1, 1))
    for last, mention in {
        "read-only": (read_only, "read-only"),
        "bytes": (memoryview(bytes(4 * size)).cast("B", (4, size)), "read-only"),
        "every other byte": (wide[:, ::2], "contiguous"),
        "backwards in a block": (arrays[-1][:, ::-1], "contiguous"),
        "backwards": (arrays[-1][::-1], "stride"),
        "overlapping": (overlapping, "layer 4"),
    }.values():
        refused(lambda last=last: dualkv.PagedKv(small, [*arrays[:-1], last]), mention)  # type: ignore[misc]


class OnlyArray:
    """Gives a new array each time it is asked: memory that nobody keeps."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.zeros(self.shape, np.uint8)


def test_values_that_numpy_would_copy_are_refused(small: dualkv.KvGeometry) -> None:
    """A pointer into the copy would dangle at once."""
    arrays = HostCache(small, 4).arrays
    nested = [[0] * (8 * 97)] * 4  # of 64-bit integers
    g = make_geometry((*LAYER_BYTES[:-1], 8 * 8 * 97))
    refused(lambda: dualkv.PagedKv(g, [*arrays[:-1], [nested]]), "layer 4")
    refused(lambda: dualkv.PagedKv(small, [*arrays[:-1], OnlyArray((4, LAYER_BYTES[-1]))]), "layer 4")


def test_arrays_of_python_objects_are_refused() -> None:
    """Their bytes are pointers: loading would overwrite them."""
    g = make_geometry((800,))
    refused(lambda: dualkv.PagedKv(g, [np.zeros((4, 100), object)]), "layer 0")


def test_owners_live_as_long_as_the_cache(small: dualkv.KvGeometry) -> None:
    arrays = [np.zeros((4, size), np.uint8) for size in LAYER_BYTES]
    watched = weakref.ref(arrays[2])
    layers: list[Any] = [[one] for one in arrays]
    del arrays
    kv = dualkv.PagedKv(small, layers)
    layers[2].clear()  # the caller's lists are the caller's
    layers.clear()
    gc.collect()
    assert watched() is not None
    del kv
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("kind", ["load", "grant", "send"])
def test_owners_live_as_long_as_what_moves_their_bytes(
    make_node: MakeNode, small: dualkv.KvGeometry, kind: str
) -> None:
    arrays = [np.zeros((4, size), np.uint8) for size in LAYER_BYTES]
    watched = weakref.ref(arrays[0])
    kv = dualkv.PagedKv(small, arrays)
    del arrays
    node, other = make_node(), make_node("other", listen=f"loopback://owners-{kind}")
    peer = node.connect(other.addresses[0])
    handle: Any
    if kind == "load":
        keys = make_keys(small, 2)
        node.save(keys, kv, [0, 1]).wait(LONG_S)
        handle = node.load(plan(dualkv.PrefillOnly(), keys, node), into=kv, block_ids=[0, 1])
    elif kind == "grant":
        handle = node.grant("other", kv, [0, 1])
    else:
        handle = peer.send_layers(1, kv, [0, 1])
    del kv
    gc.collect()
    assert watched() is not None
    del handle
    gc.collect()
    assert watched() is None


# --- store and staging on their own


@pytest.fixture
def store(root: Path, small: dualkv.KvGeometry) -> dualkv.Store:
    return dualkv.Store(f"file://{root}", small, staging=16 * small.file_bytes)


def test_save_match_read_remove(store: dualkv.Store, small: dualkv.KvGeometry) -> None:
    keys = make_keys(small, BLOCKS)
    source = filled(small, BLOCKS)
    store.save(keys, source.kv, range(BLOCKS)).wait(LONG_S)
    assert store.match(keys) == BLOCKS
    assert store.match([*keys[:2], b"unknown"]) == 2
    assert store.match([]) == 0
    assert store.contains(keys[3])
    assert not store.contains(b"unknown")

    wanted = store.staging.acquire(2)
    wanted.wait(LONG_S)
    slots = wanted.slots()
    store.read([keys[4], keys[1]], slots).wait(LONG_S)
    for slot, tag in zip(slots, (5, 2), strict=True):
        data = np.frombuffer(slot, np.uint8)
        for layer in range(small.layers):
            at = small.layer_offset(layer)
            assert (data[at : at + LAYER_BYTES[layer]] == layer_block(tag, layer, LAYER_BYTES[layer])).all()
    del data, slot, slots, wanted
    assert store.verify() == (BLOCKS, [])

    assert store.remove(keys[3])
    assert not store.remove(keys[3])
    assert store.match(keys) <= BLOCKS
    assert not store.contains(keys[3])
    assert store.contains(keys[2])
    assert eventually(lambda: store.staging.stats()["free_slots"] == 16)


def test_the_source_may_change_as_soon_as_save_returns(
    store: dualkv.Store, root: Path, small: dualkv.KvGeometry
) -> None:
    keys = make_keys(small, BLOCKS)
    source = filled(small, BLOCKS)
    operation = store.save(keys, source.kv, range(BLOCKS))
    for one in source.arrays:
        one[:] = 0
    operation.wait(LONG_S)
    again = dualkv.Store(f"file://{root}", small, staging=16 * small.file_bytes)
    assert again.verify() == (BLOCKS, [])
    wanted = again.staging.acquire(BLOCKS)
    wanted.wait(LONG_S)
    slots = wanted.slots()
    again.read(keys, slots, layers=(0, 1)).wait(LONG_S)
    for i, slot in enumerate(slots):
        assert bytes(memoryview(slot)[: LAYER_BYTES[0]]) == layer_block(i + 1, 0, LAYER_BYTES[0]).tobytes()


def test_a_missing_block_ends_with_not_found(store: dualkv.Store, small: dualkv.KvGeometry) -> None:
    wanted = store.staging.acquire(1)
    wanted.wait(LONG_S)
    refused(lambda: store.read([b"missing"], wanted.slots()).wait(LONG_S), b"missing".hex(), code="not_found")
    assert eventually(lambda: store.staging.stats()["free_slots"] == 16)


def test_waiting_in_every_way(store: dualkv.Store, small: dualkv.KvGeometry) -> None:
    keys = make_keys(small, BLOCKS)
    source = filled(small, BLOCKS)
    notifier = dualkv.Notifier()
    with select.epoll() as epoll:
        epoll.register(notifier.fileno(), select.EPOLLIN)
        assert epoll.poll(0) == []
        operations = [store.save([key], source.kv, [i]) for i, key in enumerate(keys)]
        for i, operation in enumerate(operations):
            operation.notify(notifier, 100 + i)
        told: list[int] = []
        while len(told) < BLOCKS:
            assert epoll.poll(LONG_S)
            told += notifier.drain()
        assert sorted(told) == [100 + i for i in range(BLOCKS)]
        assert epoll.poll(0) == []
    assert all(operation.done for operation in operations)
    operations[0].wait(0)
    operations[0].notify(notifier, 2**64 - 1)  # ended already: told at once
    assert notifier.drain() == [2**64 - 1]

    async def many() -> None:
        await asyncio.gather(*(wait_for(store.save([key], source.kv, [0])) for key in keys))

    async def wait_for(operation: dualkv.Operation) -> None:
        await operation

    asyncio.run(many())


def test_staging_is_all_or_nothing_and_first_come_first_served(small: dualkv.KvGeometry) -> None:
    pool = dualkv.StagingPool(small, 4 * small.file_bytes)
    assert pool.stats()["slots"] == 4
    refused(lambda: pool.acquire(5), "5")
    first = pool.acquire(3)
    first.wait(0)
    slots = first.slots()
    assert first.slots() == []
    assert all(memoryview(slot).nbytes == small.file_bytes and not memoryview(slot).readonly for slot in slots)
    second, third = pool.acquire(3), pool.acquire(1)
    assert not second.done
    assert not third.done  # one is free, but the second came first
    refused(second.slots, "wait")
    refused(lambda: second.wait(0.05), code="timeout")  # gives its place up
    third.wait(LONG_S)
    del slots, third
    gc.collect()
    assert pool.stats() | {"free_slots": 4, "waiting": 0} == pool.stats()


def test_a_dropped_acquisition_gives_its_place_up(small: dualkv.KvGeometry) -> None:
    pool = dualkv.StagingPool(small, 2 * small.file_bytes)
    held = pool.acquire(2)
    waiting = pool.acquire(1)
    assert pool.stats()["waiting"] == 1
    del waiting
    assert pool.stats()["waiting"] == 0
    del held
    assert pool.stats()["free_slots"] == 2


def test_slots_of_another_pool_are_refused(store: dualkv.Store, small: dualkv.KvGeometry) -> None:
    strange = dualkv.StagingPool(small, 4 * small.file_bytes).acquire(1)
    refused(lambda: store.read([b"key"], strange.slots()), "slot")
    refused(lambda: store.read([b"key", b"other"], []), "2 keys and 0 slots")


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"], [BLOCKS], [0, 1], [[0]]], ids=repr)
def test_block_ids_out_of_range_are_refused_everywhere(make_node: MakeNode, small: dualkv.KvGeometry, ids: Any) -> None:
    node, other = make_node(), make_node("other", listen="loopback://ids")
    peer = node.connect(other.addresses[0])
    cache = filled(small, BLOCKS)
    keys = make_keys(small, 3)
    node.save(keys, cache.kv, [0, 1, 2]).wait(LONG_S)
    chosen = plan(dualkv.PrefillOnly(), keys, node)
    refused(lambda: node.save([b"new key"], cache.kv, ids))
    refused(lambda: node.load(chosen, into=cache.kv, block_ids=ids))
    if ids != [0, 1]:
        refused(lambda: node.grant("other", cache.kv, ids))
        refused(lambda: peer.send_layers(1, cache.kv, ids))
    assert not node.store.contains(b"new key")
    assert all(cache.holds(block, block + 1) for block in range(BLOCKS))


# --- policies


class Halves(dualkv.PathPolicy):
    """A policy as a user would write it."""

    def plan(self, keys: Any, *, prefill: Any, decode: Any = None, helpers: Any = ()) -> dualkv.Plan:
        half = len(keys) // 2
        ranges = [
            dualkv.PathRange(prefill.name, dualkv.Path.PREFILL, 0, half),
            dualkv.PathRange(decode.name, dualkv.Path.DECODE, half, len(keys) - half),
        ]
        ranges = [part for part in ranges if part.count]
        return dualkv.Plan(keys=keys, ranges=ranges, prefill=prefill.name, decode=decode.name, reason="half and half")


POLICIES = [
    dualkv.PrefillOnly,
    dualkv.DecodeOnly,
    dualkv.RoundRobin,
    dualkv.ShortestQueue,
    dualkv.Split,
    Halves,
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_plans_tile_the_hit(policy: type[dualkv.PathPolicy], small: dualkv.KvGeometry) -> None:
    views = [dualkv.NodeView(name=name, block_bytes=100, read_bandwidth=10 + i) for i, name in enumerate("pdh")]
    keys = make_keys(small, 7)
    for count in range(8):
        made = policy().plan(keys[:count], prefill=views[0], decode=views[1], helpers=[])
        assert made.keys == keys[:count]
        at = 0
        for part in made.ranges:
            assert part.first == at
            assert part.node in ("p", "d")
            at += part.count
        assert at == count
        assert made.reason


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_a_load_of_every_policy(make_node: MakeNode, small: dualkv.KvGeometry, policy: type[dualkv.PathPolicy]) -> None:
    node, decode = make_node("pe"), make_node("de", listen=f"loopback://policy-{policy.__name__}")
    peer = node.connect(decode.addresses[0])
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    cache = HostCache(small, BLOCKS + 3)
    cache.fill(BLOCKS, BLOCKS + 1)  # what prefill computes
    chosen = plan(policy(), keys, node, peer)
    load = node.load(chosen, into=cache.kv, block_ids=range(BLOCKS + 1))
    incoming = decode.incoming(load.id)
    for layer in range(small.layers):
        load.wait(layer, LONG_S)
        assert load.ready(layer)
        if chosen.decode:
            load.publish(layer)
    result = load.finish(LONG_S)
    assert result["reason"] == chosen.reason
    assert sum(path["bytes"] for path in result["paths"]) == BLOCKS * small.block_bytes
    assert all(cache.holds(block, block + 1) for block in range(BLOCKS + 1))
    assert cache.untouched(BLOCKS + 1)
    if chosen.decode:
        target = HostCache(small, 20)
        incoming.wait(LONG_S)
        assert incoming.block_count == BLOCKS + 1
        incoming.copy_to(target.kv, range(10, 10 + BLOCKS + 1))
        assert all(target.holds(10 + block, block + 1) for block in range(BLOCKS + 1))
        assert target.untouched(9)
        assert target.untouched(10 + BLOCKS + 1)
    incoming.close()


class Raises(dualkv.PathPolicy):
    def plan(self, keys: Any, **_: Any) -> Any:
        raise ZeroDivisionError("a policy with a bug")


class NoPlan(dualkv.PathPolicy):
    pass


def test_a_policy_that_raises(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node()
    keys = make_keys(small, 2)
    with pytest.raises(ZeroDivisionError, match="a policy with a bug"):
        Raises().plan(keys, prefill=node.view())
    refused(lambda: NoPlan().plan(keys, prefill=node.view()), "plan() is not implemented")
    refused(lambda: dualkv.DecodeOnly().plan(keys, prefill=node.view()), "decode")
    assert all_free(node)


def nonsense_ranges() -> dict[str, list[tuple[str, int, int]]]:
    return {
        "a gap": [("n", 0, 1), ("n", 2, 2)],
        "an overlap": [("n", 0, 3), ("n", 2, 2)],
        "too short": [("n", 0, 3)],
        "too long": [("n", 0, 5)],
        "out of order": [("n", 2, 2), ("n", 0, 2)],
        "wrap-around": [("n", 0, 2**32 - 1)],
        "nothing": [],
    }


@pytest.mark.parametrize("what", nonsense_ranges())
def test_a_plan_that_does_not_tile_is_refused(small: dualkv.KvGeometry, what: str) -> None:
    ranges = [
        dualkv.PathRange(name, dualkv.Path.PREFILL, first, count) for name, first, count in nonsense_ranges()[what]
    ]
    refused(lambda: dualkv.Plan(keys=make_keys(small, 4), ranges=ranges))


NOT_PLANS = ["None", "'nonsense'", "[]", "42", "object()"]


def test_a_load_of_nonsense_is_an_exception_and_not_a_crash(root: Path) -> None:
    """In a process of its own: a crash must not take the other tests with it."""
    done = run_python(f"""
import numpy as np, dualkv
from support import HostCache, make_geometry
g = make_geometry()
cache = HostCache(g, 4)
plan = dualkv.Plan(keys=[], ranges=[])
with dualkv.Node("n", g, store="file://{root}", staging=8 * g.file_bytes) as node:
    def refused(call):
        try:
            call()
        except (dualkv.Error, TypeError):
            return
        raise AssertionError("accepted")
    for bad in [{", ".join(NOT_PLANS)}]:
        refused(lambda: node.load(bad, into=cache.kv, block_ids=[0]))
        refused(lambda: node.load(plan, into=bad, block_ids=[0]))
        refused(lambda: node.grant("x", bad, [0]))
    refused(lambda: node.load(plan, into=cache.kv, block_ids=[0], deadline_s="soon"))
    refused(lambda: node.load(plan, into=cache.kv, block_ids=[0], window_layers=-1))
    refused(lambda: node.grant(5, cache.kv, [0]))
    with dualkv.Node("m", g, store="file://{root}", staging=8 * g.file_bytes, listen="loopback://m") as other:
        peer = node.connect("loopback://m")
        refused(lambda: peer.send_layers("x", cache.kv, [0]))
        refused(lambda: peer.send_layers(1, "x", [0]))
        refused(lambda: peer.send_layers(1, cache.kv, [0], layers=(-1, 1)))
        refused(lambda: peer.send_layers(1, cache.kv, [0], lane="fast"))
    stats = node.stats()
    assert stats["staging"]["free_slots"] == 8 and stats["loads_active"] == 0, stats
print("fine")
""")
    assert done.stdout.strip() == "fine", f"ended with {done.returncode}: {done.stderr[-2000:]}"


def test_bad_loads_reserve_nothing(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node("n")
    keys = make_keys(small, 4)
    node.save(keys, filled(small, 4).kv, range(4)).wait(LONG_S)
    cache = HostCache(small, 6)
    good = plan(dualkv.PrefillOnly(), keys, node)

    def load(chosen: dualkv.Plan = good, ids: Any = (0, 1, 2, 3), **options: Any) -> Callable[[], Any]:
        return lambda: node.load(chosen, into=options.pop("into", cache.kv), block_ids=list(ids), **options)

    refused(load(ids=[0, 1, 2]), "3 block ids")
    refused(load(ids=[0, 1, 2, 2]), "twice")
    refused(load(ids=[0, 1, 2, 6]), "block id 6")
    for deadline in (0, -1, float("nan"), float("inf"), 86401):
        refused(load(deadline_s=deadline), "deadline")
    other = make_geometry((1, 2))
    refused(load(into=HostCache(other, 6).kv), "layers")

    def ranges(name: str) -> list[dualkv.PathRange]:
        return [dualkv.PathRange(name, dualkv.Path.DECODE, 0, 4)]

    refused(load(dualkv.Plan(keys=keys, ranges=ranges("nobody"))), "nobody", code="peer_lost")
    refused(load(dualkv.Plan(keys=keys, ranges=ranges("n"), prefill="other")), "other")
    refused(load(dualkv.Plan(keys=keys, ranges=ranges("n"), decode="n")), "decode")
    stats = node.stats()
    assert (stats["loads_done"], stats["loads_failed"], stats["loads_active"]) == (0, 0, 0)
    assert all_free(node)
    assert all(cache.untouched(block) for block in range(6))
    load()().finish(LONG_S)
    assert all(cache.holds(block, block + 1) for block in range(4))


# --- options


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("node", "peer_silense_s"),
        ("store_options", "read_limitt"),
        ("staging_options", "hugepages"),
        ("faults", "eror_rate"),
    ],
)
def test_a_typo_is_refused_by_name(root: Path, small: dualkv.KvGeometry, where: str, name: str) -> None:
    options: dict[str, Any] = {
        "node": {name: 1},
        "store_options": {"store_options": {name: 1}},
        "staging_options": {"staging_options": {name: 1}},
        "faults": {"store_options": {"faults": {name: 1}}},
    }[where]
    refused(lambda: dualkv.Node("n", small, store=f"file://{root}", **options), name)
    assert not root.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"connections_per_lane": 0},
        {"connections_per_lane": 17},
        {"connections_per_lane": -1},
        {"connections_per_lane": "two"},
        {"low_dscp": 64},
        {"high_so_priority": 16},
        {"heartbeat_s": 0},
        {"peer_silence_s": 0.1},
        {"peer_silence_s": float("nan")},
        {"handshake_s": 0},
        {"stall_s": -1},
        {"stall_s": "x"},
        {"reconnect_max_s": 0},
        {"write_window": "1KiB", "write_frame": "1MiB"},
        {"write_frame": "lots"},
        {"staging_options": {"transit_share": 2}},
        {"staging_options": {"transit_share": float("nan")}},
        {"store_options": {"backend": "tape"}},
        {"store_options": {"direct": "maybe"}},
        {"store_options": {"depth": -1}},
        {"store_options": {"depth": "x"}},
        {"store_options": {"read_limit": "fast"}},
        {"store_options": {"faults": {"error_rate": 2}}},
        {"store_options": {"faults": {"error_rate": float("nan")}}},
        {"staging": 1},
        {"staging": 2**70},
        {"listen": "ftp://x"},
        {"listen": "tcp://127.0.0.1:70000"},
        {"listen": "tcp://0.0.0.0:0"},
        {"store": "/no/url"},
        {"secret": "a", "secret_file": "b"},
    ],
    ids=str,
)
def test_values_of_options_out_of_range(root: Path, small: dualkv.KvGeometry, options: dict[str, Any]) -> None:
    gc.collect()
    before = open_fds()
    values: dict[str, Any] = {"store": f"file://{root}", "staging": "1MiB"}
    refused(lambda: dualkv.Node("n", small, **values | options))
    gc.collect()
    assert open_fds() <= before


def test_3fs_without_its_library_is_refused_with_the_cure(root: Path, small: dualkv.KvGeometry) -> None:
    if ctypes.util.find_library("hf3fs_api_shared"):
        pytest.skip("this machine has 3FS's library")
    before = open_fds()
    why = "libhf3fs_api_shared.so.*install 3FS's client"
    with pytest.raises(dualkv.Error, match=why) as refusal:
        dualkv.Store(f"file://{root}", small, staging="1MiB", backend="usrbio")
    assert refusal.value.code == "unsupported"
    del refusal
    gc.collect()
    assert open_fds() <= before


def test_secret_file(tmp_path: Path, make_node: MakeNode) -> None:
    path = tmp_path / "secret"
    refused(lambda: make_node(secret_file=path), str(path), code="io")
    path.write_text(" \n")
    refused(lambda: make_node(secret_file=path), "empty")
    path.write_text("  the secret \n")
    node = make_node("a", secret_file=path, listen="tcp://127.0.0.1:0")
    make_node("b", secret="the secret").connect(node.addresses[0])
    refused(lambda: make_node("c", secret="another").connect(node.addresses[0]), code="refused")
    assert [link["peer"] for link in node.stats()["links"]] == ["b"]


@pytest.mark.parametrize("never", [float("inf"), 1e12], ids=str)
def test_to_wait_for_ever_is_not_to_wait_for_nothing(
    make_node: MakeNode, small: dualkv.KvGeometry, never: float
) -> None:
    node = make_node()
    cache = filled(small, 3)
    node.save(make_keys(small, 3), cache.kv, range(3)).wait(never)
    node.save(make_keys(small, 3, seed=1), cache.kv, range(3), deadline_s=never).wait(LONG_S)
    incoming = node.incoming(5, 30)
    assert error_of(lambda: incoming.wait(0.05)) is not None
    incoming.close()


def test_layers_out_of_range_of_handles(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node, other = make_node(), make_node("other", listen="loopback://layers")
    node.connect(other.addresses[0])
    cache = HostCache(small, 2)
    keys = make_keys(small, 1)
    node.save(keys, cache.kv, [0]).wait(LONG_S)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=[0])
    grant = node.grant("other", cache.kv, [1])
    for layer in (small.layers, 64, 10_000, -1):
        refused(lambda layer=layer: load.wait(layer, 0.05), "layer")  # type: ignore[misc]
        refused(lambda layer=layer: load.publish(layer), "layer")  # type: ignore[misc]
        refused(lambda layer=layer: grant.wait(layer, 0.05), "layer")  # type: ignore[misc]
    load.finish(LONG_S)


# --- the end of lives


def test_context_managers(root: Path, small: dualkv.KvGeometry) -> None:
    with dualkv.Node("n", small, store=f"file://{root}", staging="1MiB") as node, node.incoming(7) as incoming:
        assert not incoming.block_count
    refused(lambda: node.incoming(8), code="cancelled")
    with pytest.raises(ZeroDivisionError), dualkv.Node("n", small, store=f"file://{root}", staging="1MiB") as node:
        raise ZeroDivisionError
    refused(lambda: node.incoming(8), code="cancelled")


def calls_of(node: dualkv.Node, address: str, cache: HostCache) -> dict[str, Callable[[], Any]]:
    empty = dualkv.Plan(keys=[], ranges=[])
    return {
        "connect": lambda: node.connect(address),
        "load": lambda: node.load(empty, into=cache.kv, block_ids=[0]),
        "incoming": lambda: node.incoming(1),
        "grant": lambda: node.grant("other", cache.kv, [0]),
        "save": lambda: node.save([b"key"], cache.kv, [0]).wait(LONG_S),
        "read": lambda: node.store.read([b"key"], node.staging.acquire(1).slots()).wait(LONG_S),
        "peer": lambda: node.peer("other").view(),
    }


def test_after_close_everything_raises_and_nothing_hangs(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node, other = make_node("node", listen="tcp://127.0.0.1:0"), make_node("other", listen="tcp://127.0.0.1:0")
    peer = node.connect(other.addresses[0])
    assert eventually(lambda: "node" in [link["peer"] for link in other.stats()["links"]])
    cache = HostCache(small, 4)
    incoming, grant = node.incoming(3), node.grant("other", cache.kv, [0])
    operation = peer.send_layers(77, cache.kv, [0])
    node.close()
    node.close()
    for handle in (incoming.wait, lambda timeout: grant.wait(0, timeout), operation.wait):
        error = error_of(lambda handle=handle: handle(LONG_S))  # type: ignore[misc]
        assert error is not None
        assert error.code in ("cancelled", "peer_lost", "refused")
    assert not peer.connected
    for handle in (incoming.close, grant.revoke):
        handle()
    not_raised = [name for name, call in calls_of(node, other.addresses[0], cache).items() if error_of(call) is None]
    node.stats()
    node.view()
    assert not_raised == []
    assert not other.store.contains(b"key")


def test_close_during_a_load(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node(store_options={"read_limit": 2 * small.block_bytes})
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    cache = HostCache(small, BLOCKS + 1)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(BLOCKS))
    codes: list[str] = []
    waiter = threading.Thread(target=lambda: codes.append((error_of(lambda: load.finish(LONG_S)) or no_error()).code))
    waiter.start()
    node.close()
    waiter.join(LONG_S)
    assert codes == ["cancelled"]
    for one in cache.arrays:
        one[:] = UNTOUCHED
    time.sleep(0.1)
    assert all(cache.untouched(block) for block in range(BLOCKS + 1)), "written after close()"


def no_error() -> dualkv.Error:
    return dualkv.Error("nothing was raised", "none")


def test_a_dropped_node_frees_its_threads_and_fds(root: Path, small: dualkv.KvGeometry) -> None:
    def one_life() -> None:
        node = dualkv.Node("n", small, store=f"file://{root}", staging="1MiB", listen="tcp://127.0.0.1:0")
        other = dualkv.Node("o", small, store=f"file://{root}", staging="1MiB")
        other.connect(node.addresses[0])

    one_life()
    gc.collect()
    before = threads(), open_fds()
    for _ in range(5):
        one_life()
    gc.collect()
    assert eventually(lambda: (threads(), open_fds()) == before)


def test_handles_outlive_their_node(root: Path, small: dualkv.KvGeometry) -> None:
    """In whatever order Python drops things."""
    node = dualkv.Node("n", small, store=f"file://{root}", staging="1MiB")
    keys = make_keys(small, 2)
    cache = HostCache(small, 2)
    node.save(keys, cache.kv, [0, 1]).wait(LONG_S)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=[0, 1])
    incoming, store, pool = node.incoming(4), node.store, node.staging
    del node
    gc.collect()
    assert error_of(lambda: incoming.wait(LONG_S)) is not None
    assert error_of(lambda: load.finish(LONG_S)) is None or load.result()
    assert store.match(keys) == 2
    assert pool.stats()["slots"] > 0


# --- many


def test_the_gil_is_free_while_a_load_waits(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node(store_options={"read_limit": 10 * small.block_bytes})
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    cache = HostCache(small, BLOCKS)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(BLOCKS))
    done = threading.Event()

    def wait() -> None:
        load.wait(0, LONG_S)
        done.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    counted = 0
    while not done.is_set() and counted < 1_000_000:
        counted += 1
        time.sleep(0)
    waiter.join(LONG_S)
    assert counted > 10
    load.finish(LONG_S)


def test_thousands_of_loads_leak_nothing(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node, decode = make_node("pe"), make_node("de", listen="tcp://127.0.0.1:0")
    peer = node.connect(decode.addresses[0])
    keys = make_keys(small, 2)
    node.save(keys, filled(small, 2).kv, range(2)).wait(LONG_S)
    cache = HostCache(small, 3)
    chosen = plan(dualkv.Split(), keys, node, peer), plan(dualkv.PrefillOnly(), keys, node)

    def some(count: int) -> None:
        for i in range(count):
            with_decode = i % 4 == 0
            load = node.load(chosen[0 if with_decode else 1], into=cache.kv, block_ids=[0, 1])
            if with_decode:
                with decode.incoming(load.id) as incoming:
                    for layer in range(small.layers):
                        load.wait(layer, LONG_S)
                        load.publish(layer)
                    incoming.wait(LONG_S)
            load.finish(LONG_S)

    some(50)
    gc.collect()
    before = threads(), open_fds()
    some(2000)
    gc.collect()
    assert (threads(), open_fds()) == before
    assert all(cache.holds(block, block + 1) for block in range(2))
    assert cache.untouched(2)


def test_many_loads_in_one_loop_and_one_thread(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node, decode = make_node("pe", slots=48), make_node("de", slots=48, listen="loopback://many")
    peer = node.connect(decode.addresses[0])
    keys = make_keys(small, 3)
    node.save(keys, filled(small, 3).kv, range(3)).wait(LONG_S)
    chosen = plan(dualkv.Split(), keys, node, peer)
    before = threads()
    most = 0

    async def one() -> HostCache:
        nonlocal most
        cache = HostCache(small, 4)
        load = node.load(chosen, into=cache.kv, block_ids=range(3), deadline_s=60)
        incoming = decode.incoming(load.id, 60)
        for layer in range(small.layers):
            await load.layer(layer)
            load.publish(layer)
        await load.finished()
        await incoming.ready()
        most = max(most, threads())
        incoming.close()
        return cache

    async def many() -> list[HostCache]:
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(200))), 60)

    caches = asyncio.run(many())
    assert most == before
    expected = caches[0]
    assert all(expected.holds(block, block + 1) for block in range(3))
    assert expected.untouched(3)
    for cache in caches[1:]:
        assert all((a == b).all() for a, b in zip(cache.arrays, expected.arrays, strict=True))


def test_a_cancelled_await_leaves_the_load_alone(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node(store_options={"read_limit": 20 * small.block_bytes})
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    cache = HostCache(small, BLOCKS)

    async def main() -> None:
        load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(BLOCKS))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(load.layer(0), 0.01)
        await load.finished()

    asyncio.run(main())
    assert all(cache.holds(block, block + 1) for block in range(BLOCKS))


def test_loops_that_come_and_go_leak_nothing(make_node: MakeNode) -> None:
    node = make_node()

    async def wait() -> None:
        with node.incoming(11) as incoming, pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(incoming.ready(), 0.001)

    asyncio.run(wait())
    gc.collect()
    before = open_fds()
    for _ in range(20):
        asyncio.run(wait())
    gc.collect()
    assert open_fds() == before


def test_a_cancelled_load_touches_nothing_afterwards(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    node = make_node(store_options={"read_limit": 20 * small.block_bytes})
    keys = make_keys(small, BLOCKS)
    node.save(keys, filled(small, BLOCKS).kv, range(BLOCKS)).wait(LONG_S)
    cache = HostCache(small, BLOCKS + 1)
    dropped = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(BLOCKS))
    time.sleep(0.05)
    del dropped
    cancelled = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(BLOCKS))
    time.sleep(0.05)
    cancelled.cancel()
    cancelled.cancel()
    refused(lambda: cancelled.finish(LONG_S), code="cancelled")
    for one in cache.arrays:
        one[:] = UNTOUCHED
    time.sleep(0.2)
    assert all(cache.untouched(block) for block in range(BLOCKS + 1))


def test_a_buffer_of_another_kind_is_checksummed() -> None:
    data = bytes(range(200))
    assert dualkv.checksum(data) == dualkv.checksum(memoryview(data)) == dualkv.checksum(array.array("B", data))
    assert dualkv.checksum(np.frombuffer(data, np.uint32)) == dualkv.checksum(data)
    refused(lambda: dualkv.checksum(np.frombuffer(data, np.uint8)[::2]), "contiguous")
