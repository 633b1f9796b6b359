"""An L2 adapter of LMCache's MP server."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from dualkv.errors import Error
from dualkv.integrations.lmcache.chunks import COUNTERS, TIMEOUTS, Chunks, digest, namespace_of, options_of

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def _object_key(key: ObjectKey) -> bytes:
    return digest("object", key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt)


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

    One thread with an event loop runs all tasks; each size of object has a :class:`Chunks`. Thread-safe.

    No locks: an object that a lookup found is marked as used, and no node's collector evicts it for
    ``in_use_grace_s``; a read has the file open, which outlives its name; and whatever happens in between is a miss.

    Args:
        adapter_params: the options of the table in docs/engines/lmcache.md.
        l1_memory_desc: not needed.

    Raises:
        Error: ``invalid_argument``, naming the option.
    """

    def __init__(self, adapter_params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        self._options = options_of(adapter_params)
        super().__init__()
        self._store_ready = create_event_notifier()
        self._lookup_ready = create_event_notifier()
        self._load_ready = create_event_notifier()
        self._lock = threading.Lock()  # of the next four
        self._last_task = 0
        self._stored: dict[int, L2StoreResult] = {}
        self._results: dict[int, Bitmap] = {}
        self._closed = False
        self._kinds: dict[_Kind, asyncio.Task[Chunks]] = {}  # of the loop's thread
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
        except TIMEOUTS:
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
            **{name: sum(one.counters[name] for one in chunks) for name in COUNTERS},
        }

    def close(self) -> None:
        """Ends what is in progress. When it returns, no memory of a caller is in use. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(*TIMEOUTS):
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

    def _open_chunks(self) -> list[Chunks]:
        ended = [opening for opening in list(self._kinds.values()) if opening.done() and not opening.cancelled()]
        return [opening.result() for opening in ended if opening.exception() is None]

    async def _chunks_of(self, kind: _Kind) -> Chunks:
        """Opened when first asked for. Raises Error, also for those who ask meanwhile; the next one tries again."""
        opening = self._kinds.get(kind)
        if opening is None:
            namespace = namespace_of("lmcache-mp", self._options.namespace, kind.dtypes, str(kind.size_bytes))
            opening = self._loop.create_task(asyncio.to_thread(Chunks, self._options, kind.size_bytes, 1, namespace))
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
