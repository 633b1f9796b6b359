"""Fixtures of the Python tests."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import Child, assert_all_free, make_geometry

import dualkv

MakeNode = Callable[..., dualkv.Node]

# Shells start background jobs without SIGINT, and the children that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small() -> dualkv.KvGeometry:
    """Five layers of odd sizes."""
    return make_geometry()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store root that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def live_nodes() -> Iterator[list[dualkv.Node]]:
    """Nodes the test made. In the end all their staging becomes free, without closing them; then they are closed."""
    nodes: list[dualkv.Node] = []
    yield nodes
    try:
        assert_all_free(nodes)
    finally:
        for node in nodes:
            node.close()


@pytest.fixture
def make_node(root: Path, small: dualkv.KvGeometry, live_nodes: list[dualkv.Node]) -> MakeNode:
    """Makes nodes over one root, with a pool of ``slots`` blocks."""
    numbers = itertools.count()

    def make(name: str | None = None, *, slots: int = 64, **options: Any) -> dualkv.Node:
        options.setdefault("store", f"file://{root}")
        options.setdefault("stall_s", 0.5)
        geometry = options.pop("geometry", small)
        node = dualkv.Node(name or f"n{next(numbers)}", geometry, staging=slots * geometry.file_bytes, **options)
        live_nodes.append(node)
        return node

    return make


@pytest.fixture
def children() -> Iterator[Callable[..., Child]]:
    """Starts nodes in processes of their own, which end with the test."""
    made: list[Child] = []

    def make(prefix: Sequence[str] = ()) -> Child:
        made.append(Child(prefix))
        return made[-1]

    yield make
    for child in made:
        child.end()
