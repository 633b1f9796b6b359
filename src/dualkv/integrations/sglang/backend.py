"""The storage backend: SGLang's interface over host pools."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from dualkv.errors import Error, invalid
from dualkv.integrations.sglang.options import options_of
from dualkv.integrations.sglang.pages import key_of, parent_of
from dualkv.integrations.sglang.pool import Counters, HostPool

_log = logging.getLogger(__name__)

_KV = str(PoolName.KV)  # the pool of the model's KV; SGLang names the others


class DualKVHiCache(HiCacheStorage):
    """HiCache's third tier in a dualkv store: pages are verified where they arrive, and calls end by a deadline.

    SGLang makes it from ``--hicache-storage-backend dynamic`` and its extra config (docs/engines/sglang.md), then
    registers its host pools; each gets a node. A page that is missing, corrupt or late is reported as not there, and
    so is what follows it; nothing is raised in SGLang's threads.

    Args:
        storage_config: SGLang's; ``extra_config`` holds the options.
        kwargs: unused.

    Raises:
        Error: ``invalid_argument`` naming an unknown or wrong option. Registering a pool raises ``unsupported`` for
            one that is not plain KV, and what :class:`dualkv.Node` raises.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        self._config = storage_config
        self._options = options_of(storage_config.extra_config)
        self._counters = Counters(storage_config.enable_storage_metrics)
        self._pools: dict[str, HostPool] = {}

    # Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of the model's KV. Makes its node."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """A further pool, of a draft model or of sliding-window layers. Makes its node."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def _register(self, name: str, host: Any) -> None:
        known = self._pools.get(name)
        if known is not None and known.host is host:
            return
        if known is not None:
            raise invalid(f"sglang: pool {name!r} is registered already")
        pool = self._pools[name] = HostPool(name, host, self._config, self._options, self._counters)
        _log.info("dualkv: pool %r: %d bytes a page, %s", name, pool.geometry.block_bytes, pool.geometry.namespace)

    def _pool(self, name: str = _KV) -> HostPool:
        if name not in self._pools:
            raise invalid(f"sglang: no pool {name!r} is registered; there are {sorted(self._pools)}")
        return self._pools[name]

    # Whole batches, between storage and the host pool

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages from the start are stored; perhaps more, if one between them is missing: reading finds out."""
        return int(self._checked(lambda: self._pool().match([key_of(key) for key in keys]), 0))

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Reads pages into the host pool. True, verified, up to the first that failed; False from there on."""
        return self._get(_KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Saves pages of the host pool; which are stored. The memory is free when it returns."""
        return self._set(_KV, keys, host_indices, extra_info)

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Pages from the start that are stored in the KV pool and, as each pool's policy asks, in the others."""

        def look() -> PoolTransferResult:
            names = [key_of(key) for key in keys]
            hit = self._pool().match(names)
            found = {_KV: hit} if hit else {}
            usable = set(range(1, hit + 1))
            for transfer in pool_transfers or []:
                lengths = self._lengths_in(transfer, names[:hit])
                if lengths:
                    found[transfer.name] = max(lengths)
                usable &= lengths
            return PoolTransferResult(max(usable, default=0), found, sorted(usable))

        return self._checked(look, PoolTransferResult.empty())

    def _lengths_in(self, transfer: PoolTransfer, keys: list[bytes]) -> set[int]:
        """Prefix lengths that this pool could restore. Raises Error for a policy it does not know."""
        pool = self._pool(str(transfer.name))
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            return set(range(1, pool.match(keys) + 1))
        if transfer.hit_policy != PoolHitPolicy.TRAILING_PAGES:
            raise Error(f"sglang: hit policy {transfer.hit_policy} of pool {transfer.name} is unknown", "unsupported")
        window = max(1, len(transfer.keys or ()))
        there = [pool.match([key]) == 1 for key in keys]  # these pools keep windows: what is stored has holes
        return {end for end in range(1, len(keys) + 1) if all(there[max(0, end - window) : end])}

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As :meth:`batch_get_v1`, for the pools named."""
        return {t.name: self._get(str(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As :meth:`batch_set_v1`, for the pools named."""
        return {t.name: self._set(str(t.name), t.keys or [], t.host_indices, extra_info) for t in transfers}

    def _get(self, name: str, keys: list[str], host_indices: Any) -> list[bool]:
        def read() -> list[bool]:
            pool = self._pool(name)
            there = pool.load([key_of(key) for key in keys], pool.page_ids(host_indices, len(keys)))
            return [i < there for i in range(len(keys))]

        return self._checked(read, [False] * len(keys))

    def _set(
        self, name: str, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None
    ) -> list[bool]:
        def write() -> list[bool]:
            pool = self._pool(name)
            pages = pool.page_ids(host_indices, len(keys))
            return pool.save([key_of(key) for key in keys], pages, parent_of(extra_info))

        return self._checked(write, [False] * len(keys))

    def _checked(self, call: Callable[[], Any], otherwise: Any) -> Any:
        """A call from SGLang's threads: what it can't serve is a miss."""
        try:
            return call()
        except Error as error:
            self._counters.count(f"call_{error.code}")
            _log.warning("%s", error)
            return otherwise

    # Single pages, as tensors: what SGLang uses without interface_v1

    def exists(self, key: str) -> bool:
        """Whether the page is stored, and was not unreadable lately."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any | None = None, target_sizes: Any | None = None) -> Any | None:
        """Reads a page into ``target_location``, or new memory, and returns it; None if it is not there."""

        def read() -> Any | None:
            pool = self._pool()
            page = pool.new_page() if target_location is None else target_location
            return page if pool.load([key_of(key)], [0], pool.cache_of(page)) else None

        return self._checked(read, None)

    def batch_get(
        self, keys: list[str], target_locations: Any | None = None, target_sizes: Any | None = None
    ) -> list[Any | None]:
        """As :meth:`get` for each; None from the first that is not there."""
        pages: list[Any | None] = []
        for key, target in zip(keys, target_locations or [None] * len(keys), strict=True):
            page = self.get(key, target)
            if page is None:
                break
            pages.append(page)
        return pages + [None] * (len(keys) - len(pages))

    def set(
        self, key: str, value: Any | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        """Saves a page; whether it is stored."""

        def write() -> bool:
            pool = self._pool()
            return pool.save([key_of(key)], [0], b"", pool.cache_of(value))[0]

        return bool(self._checked(write, False))

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """As :meth:`set` for each, up to the first that fails; whether all are stored."""
        pages = [None] * len(keys) if values is None else values
        return all(self.set(key, page) for key, page in zip(keys, pages, strict=True))

    # The rest

    def clear(self) -> bool:
        """With ``clear_removes``, removes the pages of this rank's namespaces. Otherwise refuses: others share them.

        Raises:
            Error: ``unsupported`` without ``clear_removes``; SGLang logs it.
        """
        if not self._options.clear_removes:
            raise Error(
                "sglang: the store is shared, nothing was removed; set clear_removes, or choose another namespace",
                "unsupported",
            )
        removed = sum(pool.remove_all() for pool in self._pools.values())
        _log.info("dualkv: removed %d pages", removed)
        return True

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of each call since the last time; empty unless SGLang's storage metrics are on.

        A save counts pages that were stored already, too.
        """
        return self._counters.take_metrics()

    def stats(self) -> dict[str, Any]:
        """``counters`` of this backend, and the statistics of each pool's node."""
        nodes = {name: pool.node.stats() for name, pool in self._pools.items()}
        return {"counters": self._counters.counts(), "nodes": nodes}

    def close(self) -> None:
        """Ends what is in progress and closes the nodes. Idempotent."""
        for pool in self._pools.values():
            pool.node.close()
