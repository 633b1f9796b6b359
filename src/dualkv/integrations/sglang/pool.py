"""Moving the pages of one host pool between it and storage."""

import collections
import logging
import os
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.observability.metrics_collector import StorageMetrics

import dualkv
from dualkv.errors import Error, invalid
from dualkv.integrations.sglang.options import Options
from dualkv.integrations.sglang.pages import Pages, namespace_of
from dualkv.storage import root_of

_log = logging.getLogger(__name__)

_MAX_FORGOTTEN = 4096


class Counters:
    """What happened, and SGLang's metrics of it. Thread-safe."""

    def __init__(self, metrics: bool) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._metrics = metrics
        self._operations: list[tuple[str, int, float]] = []

    def count(self, what: str) -> None:
        """One more of it."""
        with self._lock:
            self._counts[what] += 1

    def moved(self, what: str, pages: int, size: int, seconds: float) -> None:
        """Pages were ``"loaded"`` or ``"saved"``."""
        with self._lock:
            self._counts[f"pages_{what}"] += pages
            self._counts[f"bytes_{what}"] += size
            if self._metrics:
                self._operations.append((what, pages, size / max(seconds, 1e-9) / 1e9))

    def counts(self) -> dict[str, int]:
        """All counts by name."""
        with self._lock:
            return dict(self._counts)

    def take_metrics(self) -> StorageMetrics:
        """What was moved since the last call, if SGLang wants to know."""
        with self._lock:
            operations, self._operations = self._operations, []
        metrics = StorageMetrics()
        for what, pages, bandwidth in operations:
            loaded = what == "loaded"
            (metrics.prefetch_pgs if loaded else metrics.backup_pgs).append(pages)
            (metrics.prefetch_bandwidth if loaded else metrics.backup_bandwidth).append(bandwidth)
        return metrics


class HostPool:
    """Moves the pages of one host pool: owns the node. Thread-safe.

    ``match``, ``load`` and ``save`` block and never raise: what went wrong is logged and counted. ``counters`` are
    shared by the pools of a backend.
    """

    def __init__(
        self, name: str, host: Any, config: HiCacheStorageConfig, options: Options, counters: Counters
    ) -> None:
        self.host = host
        self._pages = Pages(host)
        if config.is_mla_model and not self._pages.is_mla and config.tp_size > 1:
            raise Error(f"sglang: pool {name!r}: split over TP ranks, but SGLang saves that of one only", "unsupported")
        self.saves = config.is_storage_writer or not self._pages.is_mla
        self._options = options
        self._counters = counters
        self._forgotten: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self.geometry = dualkv.KvGeometry(
            tokens_per_block=self._pages.tokens,
            layer_bytes=self._pages.layer_bytes,
            namespace=namespace_of(name, host, self._pages, config, options.namespace),
        )
        self._cache = dualkv.PagedKv(self.geometry, self._pages.planes)
        self.node = dualkv.Node(
            f"{options.name}-{name}-tp{config.tp_rank}-pp{config.pp_rank}-{os.getpid()}",
            self.geometry,
            store=options.store,
            staging=options.staging,
            store_options={"forget_s": options.forget_failed_s, **options.store_options},
            staging_options=options.staging_options,
        )

    def page_ids(self, host_indices: Any, count: int) -> list[int]:
        """Pages of ``count * page_size`` token indices. Raises Error if they are not whole pages."""
        tokens = self._pages.tokens
        if host_indices is None or host_indices.numel() != count * tokens:
            size = None if host_indices is None else host_indices.numel()
            raise invalid(f"sglang: {size} indices for {count} pages of {tokens} tokens")
        rows = host_indices.reshape(count, tokens).cpu()
        if bool((rows[:, 0] % tokens != 0).any()) or bool((rows != rows[:, :1] + torch.arange(tokens)).any()):
            raise invalid("sglang: the indices are not whole pages")
        return [int(page) for page in (rows[:, 0] // tokens).tolist()]

    def cache_of(self, page: Any) -> dualkv.PagedKv:
        """A tensor that holds one page. Raises Error if it does not."""
        needed = self.geometry.block_bytes
        if not isinstance(page, torch.Tensor) or page.nbytes != needed or not page.is_contiguous():
            raise invalid(f"sglang: a contiguous tensor of {needed} bytes is needed for a page")
        return dualkv.PagedKv(self.geometry, self._pages.planes_in(page.view(-1).view(torch.uint8)))

    def new_page(self) -> Any:
        """Memory for one page."""
        return torch.zeros(self.geometry.block_bytes, dtype=torch.uint8).view(self.host.dtype)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many pages from the start are stored, and were not unreadable lately."""
        try:
            hit = self.node.store.match(keys)
        except Exception as error:
            self._note("match", error, keys)
            return 0
        now = time.monotonic()
        with self._lock:
            return next((i for i in range(hit) if self._forgotten.get(keys[i], 0) > now), hit)

    def load(self, keys: Sequence[bytes], pages: Sequence[int], into: dualkv.PagedKv | None = None) -> int:
        """Reads pages by the deadline: how many from the start are in place. The bytes of the others are void."""
        began = time.monotonic()
        until = began + self._options.deadline_s
        count = len(keys)
        while count:
            failed = self._try_load(keys[:count], pages[:count], into, until)
            if failed is None:
                self._counters.moved("loaded", count, count * self.geometry.block_bytes, time.monotonic() - began)
                return count
            count = failed
        return 0

    def _try_load(
        self, keys: Sequence[bytes], pages: Sequence[int], into: dualkv.PagedKv | None, until: float
    ) -> int | None:
        """None, or how many pages from the start are worth another try."""
        load = None
        try:
            left = until - time.monotonic()
            if left <= 0:
                raise Error(f"not read within {self._options.deadline_s} s", "timeout")
            plan = dualkv.PrefillOnly().plan(list(keys), prefill=self.node.view())
            load = self.node.load(plan, into=into or self._cache, block_ids=pages, deadline_s=left)
            load.finish()
        except Exception as error:
            failed = load.failed_block if load is not None else None
            if load is not None:
                load.cancel()  # from here on nothing writes to the pages: SGLang gives them to others
            self._note("load", error, keys, failed)
            code = getattr(error, "code", "")
            if code == "timeout":
                self._forget(keys[failed or 0])
            return failed if failed is not None and code != "timeout" else 0
        return None

    def save(
        self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, source: dualkv.PagedKv | None = None
    ) -> list[bool]:
        """Saves pages and waits until they are published: which of them are stored."""
        if not self.saves or not keys:
            return [True] * len(keys)  # all ranks have this KV; another one saves it
        began = time.monotonic()
        limit = self._options.deadline_s
        try:
            saving = self.node.save(keys, source or self._cache, pages, parent=parent, deadline_s=limit)
            saving.wait(max(0.0, began + limit - time.monotonic()))  # it may have waited for staging
        except Exception as error:
            self._note("save", error, keys)
            return [self.match([key]) == 1 for key in keys]
        self._counters.moved("saved", len(keys), len(keys) * self.geometry.block_bytes, time.monotonic() - began)
        return [True] * len(keys)

    def remove_all(self) -> int:
        """Removes the pages of this namespace, by the names docs/formats.md gives them: how many."""
        folder = pathlib.Path(root_of(self._options.store), f"{dualkv.checksum(self.geometry.namespace.encode()):016x}")
        store = self.node.store
        return sum(store.remove(bytes.fromhex(file.stem)) for file in folder.glob("??/*.kv"))

    def _forget(self, key: bytes) -> None:
        """Storage lists it, but gives no answer. What is missing, corrupt or an I/O error the store forgets itself."""
        now = time.monotonic()
        with self._lock:
            if len(self._forgotten) >= _MAX_FORGOTTEN:
                self._forgotten = {key: until for key, until in self._forgotten.items() if until > now}
            if len(self._forgotten) < _MAX_FORGOTTEN:
                self._forgotten[key] = now + self._options.forget_failed_s

    def _note(self, what: str, error: Exception, keys: Sequence[bytes], failed: int | None = None) -> None:
        code = getattr(error, "code", "internal")
        self._counters.count(f"{what}_{code}")
        which = f"page {keys[failed].hex()}" if failed is not None else f"{len(keys)} pages"
        level = logging.INFO if code == "not_found" else logging.WARNING  # not_found: evicted since it was looked up
        _log.log(level, "dualkv: %s of %s: %s", what, which, error, exc_info=code == "internal")
