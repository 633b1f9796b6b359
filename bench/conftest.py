"""What the benchmarks of single calls share: a store with blocks in it, and two nodes that are linked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stored import STORED, make_cache

import dualkv


@pytest.fixture(scope="session")
def small() -> dualkv.KvGeometry:
    """Two layers of 4 KiB."""
    return dualkv.KvGeometry(layers=2, tokens_per_block=64, layer_bytes=4096, namespace="bench/calls")


@pytest.fixture(scope="session")
def keys() -> list[bytes]:
    """Of the stored blocks."""
    return [number.to_bytes(32, "little") for number in range(STORED)]


@pytest.fixture
def node(tmp_path: Path, small: dualkv.KvGeometry, keys: list[bytes]) -> Iterator[dualkv.Node]:
    """A node over stored blocks, with staging for all of them."""
    staging = 2 * STORED * small.file_bytes
    options = {"durable": False}
    with dualkv.Node("calls", small, store=f"file://{tmp_path}/store", staging=staging, store_options=options) as made:
        made.save(keys, make_cache(small, STORED), range(STORED)).wait(60)
        yield made


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[dualkv.Node, dualkv.Peer, dualkv.Node]]:
    """A sender, its link to a receiver, and the receiver: loopback, blocks of one layer of 64 bytes."""
    geometry = dualkv.KvGeometry(layers=1, tokens_per_block=64, layer_bytes=64, namespace="bench/post")
    where = {"store": f"file://{tmp_path}/store", "staging": 4 * geometry.file_bytes}
    with (
        dualkv.Node("receiver", geometry, listen=f"loopback://{tmp_path}", **where) as receiver,
        dualkv.Node("sender", geometry, **where) as sender,
    ):
        yield sender, sender.connect(receiver.addresses[0]), receiver
