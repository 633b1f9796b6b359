"""The stored blocks of the benchmarks, and caches for them."""

from __future__ import annotations

import numpy as np

import dualkv

STORED = 1000


def make_cache(geometry: dualkv.KvGeometry, blocks: int) -> dualkv.PagedKv:
    """Blocks of zeros, faulted in."""
    layers = [np.full((blocks, geometry.layer_bytes(i)), 0, np.uint8) for i in range(geometry.layers)]
    return dualkv.PagedKv(geometry, layers)
