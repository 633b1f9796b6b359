"""Chunks of LMCache as blocks of a dualkv store: what both plug-ins share."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

import dualkv
from dualkv.errors import Error, invalid
from dualkv.storage import check_options, root_of, to_staging_options, to_store_options

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one class since Python 3.11
_MAX_NAMESPACE = 256
COUNTERS = ("stored", "loaded", "missed", "corrupt", "failed", "skipped")
_IN_FLIGHT = 64  # reads, and writes, that a store is asked for at once; further ones wait their turn
_DEFAULT_STAGING_BYTES, _DEFAULT_STAGING_CHUNKS = 256 << 20, 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands in LMCache's configuration; docs/engines/lmcache.md has the table."""

    store: str
    staging: int | str | None = None
    namespace: str = ""
    deadline_s: float = 30
    store_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    staging_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def options_of(given: Mapping[str, Any]) -> Options:
    check_options(given, {field.name for field in dataclasses.fields(Options)}, "lmcache")
    if "store" not in given:
        raise invalid("lmcache: option store is missing: give file:///directory")
    options = Options(**given)
    to_store_options(options.store, options.store_options)
    to_staging_options(options.staging or 0, options.staging_options)
    if not pathlib.Path(root_of(options.store)).parent.is_dir():
        raise Error(f"lmcache: store {options.store!r}: its parent directory does not exist", "io")
    deadline_s = options.deadline_s
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s <= 86400:
        raise invalid(f"lmcache: deadline_s = {deadline_s!r}: must be more than 0 and at most a day, in seconds")
    return options


def digest(*parts: Any) -> bytes:
    """A key of dualkv's for a key of LMCache's: BLAKE2b-256 of its fields. There is no way back."""
    text = "dualkv lmcache key v1\n" + json.dumps(parts, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def namespace_of(*parts: str) -> str:
    """The parts, or a digest in their place where they are too long."""
    whole = "/".join(part for part in parts if part)
    if len(whole.encode()) <= _MAX_NAMESPACE:
        return whole
    return f"{parts[0]}/{hashlib.blake2b(whole.encode(), digest_size=32).hexdigest()}"


class Chunks:
    """Chunks of one size in a block store: each is a Full Block of one layer.

    Owns a node, and two threads: one asks the directory, one copies what is saved into staging. Used from one event
    loop; :meth:`ask` also from any thread. What can't be read is a miss, and counted.
    """

    def __init__(self, options: Options, chunk_bytes: int, chunk_tokens: int, namespace: str) -> None:
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
        self.counters = dict.fromkeys(COUNTERS, 0)
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
        except (*TIMEOUTS, RuntimeError, OSError) as error:  # RuntimeError: Error, or closed
            self.count("failed", f"{question.__name__}: {error or 'timeout'}")
            return otherwise

    async def ask_async(self, question: Callable[..., _T], *arguments: Any, otherwise: _T) -> _T:
        """The awaitable form of :meth:`ask`."""
        try:
            future = asyncio.wrap_future(self._asking.submit(question, *arguments))
            return await asyncio.wait_for(future, self._deadline_s)
        except (*TIMEOUTS, RuntimeError, OSError) as error:
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
        except TIMEOUTS:
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
            except TIMEOUTS:
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
