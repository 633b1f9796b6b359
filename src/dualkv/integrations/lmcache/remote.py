"""A connector of LMCache's remote backend, in the engine's process."""

import asyncio
import logging
from typing import Any

from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext, extract_plugin_type
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from dualkv.errors import Error
from dualkv.integrations.lmcache.chunks import Chunks, digest, namespace_of, options_of

_log = logging.getLogger(__name__)
_LMCACHE_OPTIONS = {"module_path", "class_name"}  # among a plug-in's options, but not for it


def _key_of(key: Any) -> bytes:
    """Of a CacheEngineKey: all that makes two of them equal."""
    tags = [list(tag) for tag in key.tags or ()]
    return digest("engine", key.model_name, key.world_size, key.worker_id, str(key.chunk_hash), str(key.dtype), tags)


class DualKVConnector(RemoteConnector):
    """Chunks of LMCache's remote backend as blocks of a dualkv store. :class:`DualKVAdapter` makes it.

    Full chunks only: a partly filled one is not stored, and counted as ``skipped``. What is damaged, missing or not
    read by the deadline is a miss. Keys go in one way: :meth:`list` shows digests.

    Raises:
        Error: ``unsupported`` with ``use_layerwise`` or a ``remote_serde`` that changes sizes; ``invalid_argument``;
            ``io`` when the store can't be opened.
    """

    def __init__(self, config: Any, metadata: Any, local_cpu_backend: Any, **options: Any) -> None:
        checked = options_of(options)
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
        namespace = namespace_of(
            "lmcache",
            checked.namespace,
            metadata.model_name,
            "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.meta_dtypes})),
            self.meta_fmt.name,
            f"{metadata.chunk_size}x{self.full_chunk_size_bytes}",
        )
        self._chunks = Chunks(checked, self.full_chunk_size_bytes, metadata.chunk_size, namespace)
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
