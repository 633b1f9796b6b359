"""What one call costs its caller. What it sets off is waited for outside the timed part."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
from stored import STORED, make_cache

import dualkv

ROUNDS = 20
WAIT_S = 60


def test_block_keys_of_128k_tokens(benchmark: Any) -> None:
    geometry = dualkv.KvGeometry(layers=61, tokens_per_block=64, layer_bytes=36864, namespace="bench/keys")
    tokens = np.arange(128 << 10, dtype=np.uint32)
    assert len(benchmark(dualkv.block_keys, tokens, geometry)) == 2048


@pytest.mark.parametrize("views", [2, 3])
def test_plan_of_2048_blocks(benchmark: Any, views: int) -> None:
    keys = [number.to_bytes(32, "little") for number in range(2048)]
    prefill, decode, *helpers = (view(name) for name in ("p", "d", "h")[:views])
    plan = benchmark(dualkv.Split().plan, keys, prefill=prefill, decode=decode, helpers=helpers)
    assert sum(one.count for one in plan.ranges) == 2048


def view(name: str) -> dualkv.NodeView:
    return dualkv.NodeView(name=name, block_bytes=1 << 20, tokens_per_block=64, read_bandwidth=10**9)


@pytest.mark.parametrize("blocks", [1000, 15_000, 100_000])
def test_post_of_blocks(benchmark: Any, pair: tuple[dualkv.Node, dualkv.Peer, dualkv.Node], blocks: int) -> None:
    sender, peer, receiver = pair
    source, target = make_cache(sender.geometry, blocks), make_cache(receiver.geometry, blocks)
    ids = np.random.default_rng(1).permutation(blocks).astype(np.uint32)
    checksums = source.checksums(ids)
    grants: list[dualkv.Grant] = []
    sent: list[dualkv.Operation] = []

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        finish()
        grants.append(receiver.grant(sender.name, target, ids))
        return (grants[-1].id,), {}

    def post(grant: int) -> None:
        sent.append(peer.send_layers(grant, source, ids, checksums=checksums))

    def finish() -> None:
        for operation in sent:
            operation.wait(WAIT_S)
        sent.clear()
        grants.clear()

    benchmark.pedantic(post, setup=prepare, rounds=ROUNDS)
    finish()


def test_post_of_a_read_of_1000_blocks(benchmark: Any, node: dualkv.Node, keys: list[bytes]) -> None:
    acquired = node.staging.acquire(STORED)
    acquired.wait(WAIT_S)
    slots = acquired.slots()
    posted: list[dualkv.Operation] = []

    def prepare() -> None:
        for operation in posted:
            operation.wait(WAIT_S)
        posted.clear()

    benchmark.pedantic(lambda: posted.append(node.store.read(keys, slots)), setup=prepare, rounds=ROUNDS)
    prepare()


def test_wait_for_what_is_done(benchmark: Any, node: dualkv.Node, keys: list[bytes]) -> None:
    operation = node.save(keys[:1], make_cache(node.geometry, 1), [0])  # stored already
    operation.wait(WAIT_S)
    benchmark(operation.wait, WAIT_S)


def test_async_wake(benchmark: Any, node: dualkv.Node, keys: list[bytes]) -> None:
    """From the post of one read until the coroutine that awaits it goes on."""
    acquired = node.staging.acquire(1)
    acquired.wait(WAIT_S)
    slots = acquired.slots()
    loop = asyncio.new_event_loop()

    async def read() -> None:
        await node.store.read(keys[:1], slots)

    try:
        benchmark(lambda: loop.run_until_complete(read()))
    finally:
        loop.close()
        gc.collect()


@pytest.mark.parametrize("size", [64 << 10, 1 << 20], ids=["64KiB", "1MiB"])
def test_checksum(benchmark: Any, size: int) -> None:
    benchmark(dualkv.checksum, np.ones(size, np.uint8))


def test_paged_kv_of_61_layers(benchmark: Any) -> None:
    geometry = dualkv.KvGeometry(layers=61, tokens_per_block=64, layer_bytes=4096, namespace="bench/paged")
    layers = [np.zeros((16, 4096), np.uint8) for _ in range(geometry.layers)]
    assert benchmark(dualkv.PagedKv, geometry, layers).layers == 61


def test_chrome_trace(benchmark: Any, node: dualkv.Node, keys: list[bytes]) -> None:
    plan = dualkv.PrefillOnly().plan(keys[:16], prefill=node.view())
    load = node.load(plan, into=make_cache(node.geometry, 16), block_ids=range(16), layers_per_read=1)
    result = load.finish(WAIT_S)
    assert benchmark(dualkv.chrome_trace, [result])["traceEvents"]
