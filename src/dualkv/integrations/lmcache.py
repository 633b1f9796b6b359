"""LMCache: a connector for its remote backend, and an L2 adapter for its MP server (docs/engines/lmcache.md)."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext, extract_plugin_type
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

import dualkv
from dualkv.errors import Error, invalid
from dualkv.storage import check_options, root_of, to_staging_options, to_store_options

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one class since Python 3.11
_LMCACHE_OPTIONS = {"module_path", "class_name"}  # among a plug-in's options, but not for it
_MAX_NAMESPACE = 256
_COUNTERS = ("stored", "loaded", "missed", "corrupt", "failed", "skipped")
_IN_FLIGHT = 64  # reads, and writes, that a store is asked for at once; further ones wait their turn
_DEFAULT_STAGING_BYTES, _DEFAULT_STAGING_CHUNKS = 256 << 20, 8


@dataclasses.dataclass(frozen=True)
class _Options:
    """What stands in LMCache's configuration; docs/engines/lmcache.md has the table."""

    store: str
    staging: int | str | None = None
    namespace: str = ""
    deadline_s: float = 30
    store_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    staging_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _options_of(given: Mapping[str, Any]) -> _Options:
    check_options(given, {field.name for field in dataclasses.fields(_Options)}, "lmcache")
    if "store" not in given:
        raise invalid("lmcache: option store is missing: give file:///directory")
    options = _Options(**given)
    to_store_options(options.store, options.store_options)
    to_staging_options(options.staging or 0, options.staging_options)
    if not pathlib.Path(root_of(options.store)).parent.is_dir():
        raise Error(f"lmcache: store {options.store!r}: its parent directory does not exist", "io")
    deadline_s = options.deadline_s
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s <= 86400:
        raise invalid(f"lmcache: deadline_s = {deadline_s!r}: must be more than 0 and at most a day, in seconds")
    return options


def _digest(*parts: Any) -> bytes:
    """A key of dualkv's for a key of LMCache's: BLAKE2b-256 of its fields. There is no way back."""
    text = "dualkv lmcache key v1\n" + json.dumps(parts, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _namespace(*parts: str) -> str:
    """The parts, or a digest in their place where they are too long."""
    whole = "/".join(part for part in parts if part)
    if len(whole.encode()) <= _MAX_NAMESPACE:
        return whole
    return f"{parts[0]}/{hashlib.blake2b(whole.encode(), digest_size=32).hexdigest()}"


class _Chunks:
    """Chunks of one size in a block store: each is a Full Block of one layer.

    Owns a node, and two threads: one asks the directory, one copies what is saved into staging. Used from one event
    loop; :meth:`ask` also from any thread. What can't be read is a miss, and counted.
    """

    def __init__(self, options: _Options, chunk_bytes: int, chunk_tokens: int, namespace: str) -> None:
        self._geometry = dualkv.KvGeometry(
            layers=1, tokens_per_block=chunk_tokens, layer_bytes=chunk_bytes, namespace=namespace
        )
        staging = options.staging
        if staging is None:
            staging = max(_DEFAULT_STAGING_BYTES, _DEFAULT_STAGING_CHUNKS * int(self._geometry.file_bytes))
        self._node = dualkv.Node(
            f"lmcache-{os.getpid()}-{secrets.token_hex(4)}",
            self._geometry,
            store=options.store,
            staging=staging,
            store_options=options.store_options,
            staging_options=options.staging_options,
        )
        self.folder = pathlib.Path(root_of(options.store)) / f"{dualkv.checksum(namespace.encode()):016x}"
        self.chunk_bytes = chunk_bytes
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self._store = self._node.store
        self._policy = dualkv.PrefillOnly()
        self._deadline_s = float(options.deadline_s)
        self._asking = concurrent.futures.ThreadPoolExecutor(1, "dualkv-ask")
        self._saving = concurrent.futures.ThreadPoolExecutor(1, "dualkv-save")
        self._reads, self._writes = asyncio.Semaphore(_IN_FLIGHT), asyncio.Semaphore(_IN_FLIGHT)

    def count(self, what: str, why: str = "") -> None:
        """Counts an event; logs its 1st, 2nd, 4th, 8th ... if there is a reason to."""
        self.counters[what] += 1
        times = self.counters[what]
        if why and times & (times - 1) == 0:
            _log.warning("lmcache: %s (%s, number %d of this kind)", why, what, times)

    def has(self, key: bytes) -> bool:
        """Whether the chunk is stored. Marks it as used: for in_use_grace_s nobody evicts it."""
        return self._store.match([key]) == 1

    def has_each(self, keys: Sequence[bytes]) -> list[bool]:
        """:meth:`has` of each."""
        return [self.has(key) for key in keys]

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many are stored, up to the first that is not."""
        for count, key in enumerate(keys):
            if not self.has(key):
                return count
        return len(keys)

    def names(self) -> list[str]:
        """The keys of all stored chunks, as hex digits."""
        return sorted(path.stem for path in self.folder.glob("??/*.kv"))

    def reachable(self) -> bool:
        """Whether the store's directory is there."""
        return self.folder.is_dir()

    def remove(self, key: bytes) -> bool:
        """Removes a chunk; False if it was not there."""
        return self._store.remove(key)

    def ask(self, question: Callable[..., _T], *arguments: Any, otherwise: _T) -> _T:
        """Asks the directory. Blocks, up to the deadline; ``otherwise`` if there is no answer by then."""
        try:
            return self._asking.submit(question, *arguments).result(self._deadline_s)
        except (*_TIMEOUTS, RuntimeError, OSError) as error:  # RuntimeError: Error, or closed
            self.count("failed", f"{question.__name__}: {error or 'timeout'}")
            return otherwise

    async def ask_async(self, question: Callable[..., _T], *arguments: Any, otherwise: _T) -> _T:
        """The awaitable form of :meth:`ask`."""
        try:
            future = asyncio.wrap_future(self._asking.submit(question, *arguments))
            return await asyncio.wait_for(future, self._deadline_s)
        except (*_TIMEOUTS, RuntimeError, OSError) as error:
            self.count("failed", f"{question.__name__}: {error or 'timeout'}")
            return otherwise

    async def read(self, key: bytes, memory: Any) -> bool:
        """Fills ``memory`` with the chunk, verified. When it returns or is cancelled, nothing writes there any more.

        False if the chunk is not stored, damaged, of another size, or not there by the deadline.
        """
        deadline = time.monotonic() + self._deadline_s
        if len(memory) != self.chunk_bytes:
            self.count("skipped", f"a buffer of {len(memory)} bytes for chunks of {self.chunk_bytes}")
            return False
        try:
            async with _turn(self._reads, deadline):
                await self._load(key, memory, deadline)
        except _TIMEOUTS:
            self.count("failed", f"chunk {key.hex()}: not read by the deadline")
            return False
        except Error as error:
            kind = {"not_found": "missed", "corrupt": "corrupt"}.get(error.code, "failed")
            self.count(kind, "" if kind == "missed" else f"chunk {key.hex()}: {error.message}")
            return False
        self.count("loaded")
        return True

    async def _load(self, key: bytes, memory: Any, deadline: float) -> None:
        plane = np.frombuffer(memory, np.uint8).reshape(1, -1)
        load = self._node.load(
            self._policy.plan([key], prefill=self._node.view()),
            into=dualkv.PagedKv(self._geometry, [plane]),
            block_ids=[0],
            deadline_s=max(0.001, deadline - time.monotonic()),
        )
        try:
            await load.finished()
        finally:
            load.cancel()

    async def write(self, key: bytes, memory: Any, release: Callable[[], None] = lambda: None) -> None:
        """Stores a chunk; returns when it is published, at once if it is stored already.

        Args:
            release: called when ``memory`` has been copied, or never will be: also if the caller is cancelled.

        Raises:
            Error: why it is not stored.
        """
        deadline = time.monotonic() + self._deadline_s
        with contextlib.ExitStack() as unless_submitted:
            unless_submitted.callback(release)
            try:
                async with _turn(self._writes, deadline):
                    plane = np.frombuffer(memory, np.uint8).reshape(1, -1)
                    kv = dualkv.PagedKv(self._geometry, [plane if plane.flags.writeable else plane.copy()])
                    copying = self._saving.submit(self._save, key, kv, deadline)
                    unless_submitted.pop_all()
                    copying.add_done_callback(lambda _: release())
                    operation = await asyncio.wrap_future(copying)
                    await asyncio.wait_for(operation, max(0.001, deadline - time.monotonic()))
            except _TIMEOUTS:
                self.counters["failed"] += 1
                raise Error(f"chunk {key.hex()}: not stored after {self._deadline_s} s", "timeout") from None
            except Error:
                self.counters["failed"] += 1
                raise
        self.count("stored")

    def _save(self, key: bytes, kv: dualkv.PagedKv, deadline: float) -> dualkv.Operation:
        """Copies a chunk to staging; waits for room there, up to the deadline."""
        return self._node.save([key], kv, [0], deadline_s=max(0.001, deadline - time.monotonic()))

    def close(self) -> None:
        """Ends what is in progress. Blocks until no memory of a caller is in use, at most up to the deadline."""
        self._asking.shutdown(wait=False)
        self._saving.shutdown(wait=True, cancel_futures=True)
        self._node.close()


@contextlib.asynccontextmanager
async def _turn(semaphore: asyncio.Semaphore, deadline: float) -> Any:
    await asyncio.wait_for(semaphore.acquire(), max(0.001, deadline - time.monotonic()))
    try:
        yield
    finally:
        semaphore.release()


# --- in the engine's process: LMCache's remote backend


def _key_of(key: Any) -> bytes:
    """Of a CacheEngineKey: all that makes two of them equal."""
    tags = [list(tag) for tag in key.tags or ()]
    return _digest("engine", key.model_name, key.world_size, key.worker_id, str(key.chunk_hash), str(key.dtype), tags)


class DualKVConnector(RemoteConnector):
    """Chunks of LMCache's remote backend as blocks of a dualkv store. :class:`DualKVAdapter` makes it.

    Full chunks only: a partly filled one is not stored, and counted as ``skipped``. What is damaged, missing or not
    read by the deadline is a miss. Keys go in one way: :meth:`list` shows digests.

    Raises:
        Error: ``unsupported`` with ``use_layerwise`` or a ``remote_serde`` that changes sizes; ``invalid_argument``;
            ``io`` when the store can't be opened.
    """

    def __init__(self, config: Any, metadata: Any, local_cpu_backend: Any, **options: Any) -> None:
        checked = _options_of(options)
        if config.use_layerwise:
            raise Error("lmcache: use_layerwise is not supported: chunks are stored whole", "unsupported")
        if config.remote_serde not in (None, "naive"):
            raise Error(
                f"lmcache: remote_serde {config.remote_serde!r} is not supported: chunks must keep their size; "
                "use 'naive'",
                "unsupported",
            )
        super().__init__(config, metadata)
        self.local_cpu_backend = local_cpu_backend
        namespace = _namespace(
            "lmcache",
            checked.namespace,
            metadata.model_name,
            "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.meta_dtypes})),
            self.meta_fmt.name,
            f"{metadata.chunk_size}x{self.full_chunk_size_bytes}",
        )
        self._chunks = _Chunks(checked, self.full_chunk_size_bytes, metadata.chunk_size, namespace)
        self._closed = False
        if config.save_unfull_chunk:
            _log.warning("lmcache: save_unfull_chunk is on, but partly filled chunks are not stored by dualkv")

    def stats(self) -> dict[str, int]:
        """Chunks ``stored``, ``loaded``, ``missed``, ``corrupt``, ``failed`` and ``skipped`` (partly filled)."""
        return dict(self._chunks.counters)

    async def exists(self, key: Any) -> bool:
        """Whether the chunk is stored."""
        return await self._chunks.ask_async(self._chunks.has, _key_of(key), otherwise=False)

    def exists_sync(self, key: Any) -> bool:
        """Whether the chunk is stored. Blocks, up to the deadline."""
        return self._chunks.ask(self._chunks.has, _key_of(key), otherwise=False)

    def support_batched_contains(self) -> bool:
        """True."""
        return True

    def batched_contains(self, keys: list[Any]) -> int:
        """How many of the first chunks are stored, up to the first that is not. Blocks, up to the deadline."""
        return self._chunks.ask(self._chunks.leading, [_key_of(key) for key in keys], otherwise=0)

    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        """The awaitable form of :meth:`batched_contains`. ``pin`` is not needed: a chunk found is not evicted soon."""
        return await self._chunks.ask_async(self._chunks.leading, [_key_of(key) for key in keys], otherwise=0)

    async def get(self, key: Any) -> Any:
        """A new memory object with the chunk, every byte verified; None if there is no such chunk, or no memory."""
        digest = _key_of(key)
        if not await self._chunks.ask_async(self._chunks.has, digest, otherwise=False):
            self._chunks.count("missed")
            return None
        # Not busy_loop: what it waits for may have to run on this event loop.
        memory = self.local_cpu_backend.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt, busy_loop=False)
        if memory is None:
            self._chunks.count("failed", "no memory for a chunk")
            return None
        filled = False
        try:
            filled = await self._chunks.read(digest, memory.byte_array)
        finally:
            if not filled:
                memory.ref_count_down()
        return memory if filled else None

    async def put(self, key: Any, memory_obj: Any) -> None:
        """Stores a full chunk; returns when it is on disk.

        Raises:
            Error: ``no_space``, ``io``, ``timeout``; LMCache logs and counts it.
        """
        if memory_obj.get_size() != self._chunks.chunk_bytes:
            self._chunks.count("skipped")
            return
        memory_obj.ref_count_up()
        await self._chunks.write(_key_of(key), memory_obj.byte_array, memory_obj.ref_count_down)

    def remove_sync(self, key: Any) -> bool:
        """Removes a chunk for every instance; False if it was not there."""
        return self._chunks.ask(self._chunks.remove, _key_of(key), otherwise=False)

    async def list(self) -> list[str]:
        """The stored chunks of this model, each as the hex digits of its key's digest: LMCache's key is not kept."""
        return await self._chunks.ask_async(self._chunks.names, otherwise=[])

    def support_ping(self) -> bool:
        """True."""
        return True

    async def ping(self) -> int:
        """0 while the store's directory can be reached, else 1."""
        return 0 if await self._chunks.ask_async(self._chunks.reachable, otherwise=False) else 1

    async def close(self) -> None:
        """Ends what is in progress. Idempotent."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._chunks.close)


class DualKVAdapter(ConnectorAdapter):
    """Makes a :class:`DualKVConnector` for the plug-in ``dualkv``, or ``dualkv.<any name>``.

    Its options stand in ``extra_config`` as ``remote_storage_plugin.<plug-in>.<option>``.
    """

    def __init__(self) -> None:
        super().__init__("plugin://dualkv")

    def can_parse(self, url: str) -> bool:
        """Whether the plug-in's name is ``dualkv`` or begins with ``dualkv.``."""
        return url.startswith("plugin://") and extract_plugin_type(url.removeprefix("plugin://")) == "dualkv"

    def create_connector(self, context: ConnectorContext) -> DualKVConnector:
        """Reads the options, and opens the store.

        Raises:
            Error: as :class:`DualKVConnector` does; LMCache logs it, and goes on without this backend.
        """
        plugin = context.plugin_name or context.url.removeprefix("plugin://")  # no name: it came by remote_url
        prefix = f"remote_storage_plugin.{plugin}."
        extra = (context.config.extra_config or {}) if context.config is not None else {}
        given = {name.removeprefix(prefix): value for name, value in extra.items() if name.startswith(prefix)}
        # A dot: of another plug-in, whose name continues this one's.
        options = {name: value for name, value in given.items() if name not in _LMCACHE_OPTIONS and "." not in name}
        return DualKVConnector(context.config, context.metadata, context.local_cpu_backend, **options)


# --- in LMCache's MP server


def _object_key(key: ObjectKey) -> bytes:
    return _digest("object", key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Objects that can share a namespace: of one size, and of the same types."""

    size_bytes: int
    dtypes: str

    @classmethod
    def of_layout(cls, layout: MemoryLayoutDesc) -> "_Kind":
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)]
        return cls(sum(sizes), cls._names(layout.dtypes))

    @classmethod
    def of_object(cls, memory: Any) -> "_Kind":
        return cls(memory.get_size(), cls._names(memory.meta.dtypes or [memory.get_dtype()]))

    @staticmethod
    def _names(dtypes: Sequence[Any]) -> str:
        return "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


class DualKVL2Adapter(L2AdapterInterface):
    """Objects of LMCache's MP server as blocks of a dualkv store.

    One thread with an event loop runs all tasks; each size of object has a :class:`_Chunks`. Thread-safe.

    No locks: an object that a lookup found is marked as used, and no node's collector evicts it for
    ``in_use_grace_s``; a read has the file open, which outlives its name; and whatever happens in between is a miss.

    Args:
        adapter_params: the options of the table in docs/engines/lmcache.md.
        l1_memory_desc: not needed.

    Raises:
        Error: ``invalid_argument``, naming the option.
    """

    def __init__(self, adapter_params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        self._options = _options_of(adapter_params)
        super().__init__()
        self._store_ready = create_event_notifier()
        self._lookup_ready = create_event_notifier()
        self._load_ready = create_event_notifier()
        self._lock = threading.Lock()  # of the next four
        self._last_task = 0
        self._stored: dict[int, L2StoreResult] = {}
        self._results: dict[int, Bitmap] = {}
        self._closed = False
        self._kinds: dict[_Kind, asyncio.Task[_Chunks]] = {}  # of the loop's thread
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dualkv-lmcache", daemon=True)
        self._thread.start()

    def get_store_event_fd(self) -> int:
        """Readable when a store task has ended."""
        return int(self._store_ready.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup has ended."""
        return int(self._lookup_ready.fileno())

    def get_load_event_fd(self) -> int:
        """Readable when a load task has ended."""
        return int(self._load_ready.fileno())

    def submit_store_task(self, keys: list[ObjectKey], objects: list[Any]) -> int:
        """Starts to store objects. Returns at once; ``objects`` must stay until the task has ended.

        Raises:
            Error: ``cancelled`` once closed.
        """

        def end(task: int, result: L2StoreResult) -> None:
            with self._lock:
                self._stored[task] = result
            self._store_ready.notify()

        work = functools.partial(self._store, list(keys), list(objects))
        return self._submit(work, end, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Tasks that have ended since the last call: bytes that were new, or failure of any object."""
        with self._lock:
            stored, self._stored = self._stored, {}
        return stored

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Starts to look objects up. Returns at once.

        An object is looked for among those of its group's layout; without one, among all sizes this adapter has seen.
        """
        work = functools.partial(self._lookup, list(keys), dict(group_layout_descs))
        return self._submit(work, self._end_with(self._lookup_ready), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """A bit an object, once; None before the task has ended."""
        with self._lock:
            return self._results.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing to do: there are no locks."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[Any]) -> int:
        """Starts to fill ``objects``. Returns at once; they must stay until the task has ended."""
        work = functools.partial(self._load, list(keys), list(objects))
        return self._submit(work, self._end_with(self._load_ready), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """A bit an object, set if every byte of it is the one that was stored; once; None before the task has ended."""
        with self._lock:
            return self._results.pop(task_id, None)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Removes objects for every server, of all sizes this adapter has seen. Blocks, up to the deadline."""
        with self._lock:
            if self._closed:
                return
            future = asyncio.run_coroutine_threadsafe(self._delete(list(keys)), self._loop)
        try:
            future.result(self._options.deadline_s)
        except _TIMEOUTS:
            future.cancel()
            _log.warning("lmcache: deletion of %d objects did not end by the deadline", len(keys))

    def report_status(self) -> dict[str, Any]:
        """``is_healthy``, the store, and the counters of all sizes together."""
        chunks = self._open_chunks()
        return {
            "is_healthy": self._thread.is_alive() and not self._closed,
            "type": type(self).__name__,
            "store": self._options.store,
            "object_bytes": sorted(one.chunk_bytes for one in chunks),
            **{name: sum(one.counters[name] for one in chunks) for name in _COUNTERS},
        }

    def close(self) -> None:
        """Ends what is in progress. When it returns, no memory of a caller is in use. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(*_TIMEOUTS):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(self._options.deadline_s + 5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for notifier in (self._store_ready, self._lookup_ready, self._load_ready):
            notifier.close()

    # From here on: the loop's thread, but for _submit and _open_chunks.

    def _submit(
        self, work: Callable[[], Coroutine[Any, Any, _T]], end: Callable[[int, _T], None], otherwise: _T
    ) -> int:
        async def run(task: int) -> None:
            try:
                result = await work()
            except Exception:  # a task that never ends would be worse
                _log.exception("lmcache: task %d", task)
                result = otherwise
            end(task, result)

        with self._lock:
            if self._closed:
                raise Error("lmcache: the adapter is closed", "cancelled")
            self._last_task += 1
            asyncio.run_coroutine_threadsafe(run(self._last_task), self._loop)
            return self._last_task

    def _end_with(self, notifier: Any) -> Callable[[int, Bitmap], None]:
        def end(task: int, result: Bitmap) -> None:
            with self._lock:
                self._results[task] = result
            notifier.notify()

        return end

    def _open_chunks(self) -> list[_Chunks]:
        ended = [opening for opening in list(self._kinds.values()) if opening.done() and not opening.cancelled()]
        return [opening.result() for opening in ended if opening.exception() is None]

    async def _chunks_of(self, kind: _Kind) -> _Chunks:
        """Opened when first asked for. Raises Error, also for those who ask meanwhile; the next one tries again."""
        opening = self._kinds.get(kind)
        if opening is None:
            namespace = _namespace("lmcache-mp", self._options.namespace, kind.dtypes, str(kind.size_bytes))
            opening = self._loop.create_task(asyncio.to_thread(_Chunks, self._options, kind.size_bytes, 1, namespace))
            self._kinds[kind] = opening
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._kinds.get(kind) is opening:
                del self._kinds[kind]
            raise

    async def _store(self, keys: list[ObjectKey], objects: list[Any]) -> L2StoreResult:
        async def one(key: ObjectKey, memory: Any) -> int:
            """Bytes that were new."""
            chunks = await self._chunks_of(_Kind.of_object(memory))
            digest = _object_key(key)
            if await chunks.ask_async(chunks.has, digest, otherwise=False):
                return 0
            await chunks.write(digest, memory.byte_array)
            return chunks.chunk_bytes

        results = await self._each("stored", one, keys, objects)
        new = {key: size for key, size in zip(keys, results, strict=True) if size}
        if new:
            self._notify_keys_stored(list(new), list(new.values()))
        return L2StoreResult(None not in results, sum(new.values()))

    async def _each(
        self,
        what: str,
        one: Callable[[ObjectKey, Any], Coroutine[Any, Any, _T]],
        keys: list[ObjectKey],
        objects: list[Any],
    ) -> list[_T | None]:
        """The result for each object, None for one that failed; logs the first failure.

        Waits for all of them, also when one fails: until then, memory of the caller is in use.
        """
        results = await asyncio.gather(*map(one, keys, objects), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            _log.warning("lmcache: %d of %d objects not %s; the first: %s", len(errors), len(keys), what, errors[0])
        return [None if isinstance(result, BaseException) else result for result in results]

    async def _lookup(self, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> Bitmap:
        found = Bitmap(len(keys))
        groups: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(key.object_group_id, []).append(i)
        for group, indices in groups.items():
            try:
                layout = layouts.get(group)
                places = self._open_chunks() if layout is None else [await self._chunks_of(_Kind.of_layout(layout))]
            except Error as error:
                _log.warning("lmcache: %d objects not looked up: %s", len(indices), error)
                continue
            digests = [_object_key(keys[i]) for i in indices]
            for chunks in places:
                stored = await chunks.ask_async(chunks.has_each, digests, otherwise=[False] * len(digests))
                for i, there in zip(indices, stored, strict=True):
                    if there:
                        found.set(i)
        return found

    async def _load(self, keys: list[ObjectKey], objects: list[Any]) -> Bitmap:
        async def one(key: ObjectKey, memory: Any) -> bool:
            chunks = await self._chunks_of(_Kind.of_object(memory))
            return await chunks.read(_object_key(key), memory.byte_array)

        results = await self._each("loaded", one, keys, objects)
        loaded = Bitmap(len(keys))
        there = [i for i, filled in enumerate(results) if filled]
        if there:
            loaded.batched_set(there)
            self._notify_keys_accessed([keys[i] for i in there])
        return loaded

    async def _delete(self, keys: list[ObjectKey]) -> None:
        for chunks in self._open_chunks():
            gone = [key for key in keys if await chunks.ask_async(chunks.remove, _object_key(key), otherwise=False)]
            if gone:
                self._notify_keys_deleted(gone, [chunks.chunk_bytes] * len(gone))

    async def _end(self) -> None:
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task(), *self._kinds.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._kinds.values(), return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(chunks.close) for chunks in self._open_chunks()))
