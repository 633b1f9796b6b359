"""A node and what runs on it: loads, hand-overs, grants."""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dualkv import _dualkv
from dualkv.errors import Error, invalid
from dualkv.geometry import KvGeometry
from dualkv.gpu import stream_handle
from dualkv.paged import PagedKv, block_ids_array
from dualkv.policy import NodeView
from dualkv.sizes import parse_size
from dualkv.storage import (
    StagingPool,
    Store,
    check_options,
    to_staging_options,
    to_store_options,
)
from dualkv.waiting import Notifier, Operation, until

_NODE_OPTIONS = {
    "connections_per_lane",
    "low_dscp",
    "low_so_priority",
    "high_dscp",
    "high_so_priority",
    "low_service_level",
    "high_service_level",
    "write_frame",
    "write_window",
    "heartbeat_s",
    "peer_silence_s",
    "handshake_s",
    "reconnect_max_s",
    "spin_us",
    "stall_s",
    "max_loads",
    "max_peers",
    "copy",
    "gpu_copy",
    "gpu_verify",
    "gpu_bounce",
    "gpu_gds",
    "gpu_rdma",
}
_RDMA_OPTIONS = {
    "devices",
    "gid_index",
    "mtu",
    "timeout",
    "retries",
    "rnr_retries",
    "stall_s",
    "gpu",
    "send_depth",
    "receive_depth",
    "registered",
    "relaxed_ordering",
    "on_demand_paging",
}


def _to_rdma_options(given: dict[str, Any]) -> dict[str, Any]:
    check_options(given, _RDMA_OPTIONS, "rdma")
    out = dict(given)
    if "devices" in out:
        out["devices"] = [out["devices"]] if isinstance(out["devices"], str) else list(out["devices"])
    if "registered" in out:
        out["registered"] = parse_size(out["registered"])
    return out


class Load:
    """A load in progress on the prefill node. Dropping it cancels it.

    Layer ``i`` is in place when ``wait(i)`` returns or ``await load.layer(i)`` is done: every byte of it is the byte
    that was saved. Ends, well or not, by its deadline.
    """

    def __init__(self, core: Any, cache: PagedKv) -> None:
        # The order matters: the core ends before the memory it borrows.
        self._core = core
        self._cache = cache
        self._milestones = core.milestones

    @property
    def id(self) -> int:
        """What the decode node passes to :meth:`Node.incoming`."""
        return int(self._core.id)

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self._core.layers:
            raise invalid(f"layer {layer} of {self._core.layers}")
        return layer

    def ready(self, layer: int) -> bool:
        """Whether the layer is in place."""
        return bool(self._milestones.reached(self._layer(layer)))

    def wait(self, layer: int, timeout_s: float | None = None) -> None:
        """Blocks (without the GIL) until the layer is in place.

        Raises:
            Error: why the load failed; ``timeout`` if it is still in progress after ``timeout_s``.
        """
        self._core.wait(self._layer(layer), timeout_s)

    async def layer(self, layer: int) -> None:
        """The awaitable form of :meth:`wait`."""
        began_s = time.monotonic()
        try:
            await until(self._milestones, self._layer(layer))
        finally:
            self._core.note_wait(layer, began_s)

    def notify(self, layer: int, notifier: Notifier, token: int) -> None:
        """Puts ``token`` on the notifier when the layer is in place or the load has failed."""
        self._milestones.notify(self._layer(layer), notifier, token)

    def ended(self, layer: int) -> bool:
        """Whether the layer is in place, or never will be: then :meth:`wait` returns or raises at once."""
        return bool(self._milestones.ended(self._layer(layer)))

    def add_blocks(self, block_ids: ArrayLike) -> None:
        """Where the prompt's next blocks are, if ``prompt_blocks`` was given; all before the first :meth:`publish`.

        Raises:
            Error: ``invalid_argument`` for ids out of range, given before, or too many; none was added.
        """
        self._core.add_blocks(block_ids_array(block_ids))

    def wait_on_stream(self, layer: int, stream: Any) -> None:
        """Makes the GPU wait for the layer, not the CPU; returns at once. For caches in a GPU's memory.

        What is put on ``stream`` from now on begins when the layer is in place, **or the load has failed**: ask
        :meth:`finish`, or :attr:`done` and :meth:`ready`, before results are used. In a graph: :class:`LayerGates`.

        Args:
            stream: of the cache's GPU: a torch or cupy stream, an object with ``__cuda_stream__``, or the handle.

        Raises:
            Error: why the load failed, if it has; ``invalid_argument`` for a cache in host memory, or a stream that is
                being captured; ``io``.
        """
        self._core.wait_on_stream(self._layer(layer), stream_handle(stream))

    def publish(self, layer: int, stream: Any = None) -> None:
        """This layer's new KV is in the cache: send it to the decode node, with what that did not read itself.

        Returns at once. The layer must be in place. The cache must not change until :meth:`finish`.

        Args:
            stream: of the cache's GPU, as in :meth:`wait_on_stream`: begin when what is on it by now is done. The
                layer must be in place by then.
        """
        if stream is None:
            self._core.publish(self._layer(layer))
        else:
            self._core.publish_on_stream(self._layer(layer), stream_handle(stream))

    def open_gates(self, gates: "LayerGates", stream: Any) -> None:
        """Graphs that are replayed on ``stream`` from now on, and have these gates, are for this load. Returns at once.

        Raises:
            Error: why the load failed, if it has; ``invalid_argument`` for a cache in host memory, gates of another
                model, or a stream that is being captured; ``io``.
        """
        self._core.open_gates(gates._core, stream_handle(stream))

    def release(self, layer: int) -> None:
        """The window slot of this layer is free again (``window_layers``); layers in order."""
        self._core.release(self._layer(layer))

    @property
    def done(self) -> bool:
        """Finished or failed: :meth:`finish` returns or raises at once."""
        return bool(self._milestones.ended(self._core.layers))

    def cancel(self) -> None:
        """Gives up. When it returns, nothing writes to the cache any more."""
        self._core.cancel()

    def finish(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Blocks until all layers are in place and all published KV has arrived.

        Returns:
            ``{reason, started_s, paths, layer_ready_s, layer_wait_begin_s, layer_wait_end_s, layer_published_s,
            layer_publish_done_s, bytes_published, failovers, seconds}``. ``started_s`` is on ``time.monotonic()``'s
            clock, all other times are seconds since then, 0 = it did not happen. ``paths`` has an entry a node:
            ``{node, path, blocks, bytes, first_s, last_s, layer_first_s, layer_done_s, reads}``, where ``reads`` says
            when its storage read which layers: ``[{first_layer, layers, begin_s, end_s, verify_s, bytes}]``.
            :func:`dualkv.chrome_trace` turns it into a timeline.
        """
        self._milestones.wait(self._core.layers, timeout_s)
        return self.result()

    async def finished(self) -> dict[str, Any]:
        """The awaitable form of :meth:`finish`."""
        await until(self._milestones, self._core.layers)
        return self.result()

    def result(self) -> dict[str, Any]:
        """What :meth:`finish` returns, as far as it is known; ``paths`` is filled in at the end."""
        return dict(self._core.result())

    @property
    def failed_block(self) -> int | None:
        """Index of the block that no node could read, if that is why the load failed."""
        block = int(self._core.failed_block)
        return None if block < 0 else block


class LayerGates:
    """For CUDA graphs, which are captured once and replayed for one load after the other: a gate a layer.

    While the graph is captured, :meth:`wait` and :meth:`publish` stand where :meth:`Load.wait_on_stream` and
    :meth:`Load.publish` would. Before each replay, :meth:`Load.open_gates` says for which load it is. Must outlive the
    graphs. From :meth:`Node.layer_gates`.
    """

    def __init__(self, core: Any) -> None:
        self._core = core

    @property
    def layers(self) -> int:
        """How many gates there are."""
        return int(self._core.layers)

    def wait(self, layer: int, stream: Any) -> None:
        """Puts on the stream a wait until the load that has the gates has the layer in place, **or has failed**.

        Gates that no load has been given are open, so that a warm-up waits for nothing.
        """
        self._core.wait(layer, stream_handle(stream))

    def publish(self, layer: int, stream: Any) -> None:
        """Puts on the stream a :meth:`Load.publish` of the layer, of the load that has the gates."""
        self._core.publish(layer, stream_handle(stream))


class Incoming:
    """A prompt arriving in the decode node's staging. Dropping it frees the staging."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._milestones = core.milestones

    @property
    def id(self) -> int:
        """The load's id."""
        return int(self._core.id)

    @property
    def block_count(self) -> int:
        """Blocks of the prompt, the last partly filled one included; 0 until it is ready."""
        return int(self._core.block_count)

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the whole prompt is in staging."""
        self._milestones.wait(0, timeout_s)

    async def ready(self) -> None:
        """The awaitable form of :meth:`wait`."""
        await until(self._milestones, 0)

    def notify(self, notifier: Notifier, token: int) -> None:
        """Puts ``token`` on the notifier when the prompt is ready or has failed."""
        self._milestones.notify(0, notifier, token)

    @property
    def done(self) -> bool:
        """The prompt is in staging, or never will be: :meth:`wait` returns or raises at once."""
        return bool(self._milestones.ended(0))

    def copy_to(self, cache: PagedKv, block_ids: ArrayLike, blocks: ArrayLike | None = None) -> None:
        """Copies block ``i`` of the prompt to ``block_ids[i]``. Blocks; releases the GIL.

        Args:
            blocks: copy block ``blocks[i]`` to ``block_ids[i]`` instead: where this node has some of them already.
        """
        chosen = None if blocks is None else block_ids_array(blocks)
        self._core.copy_to(cache, block_ids_array(block_ids), chosen)

    def save(self, keys: Sequence[bytes], *, first_block: int, parent: bytes = b"") -> Operation:
        """Saves blocks from staging, without a copy; those stored already are skipped."""
        return Operation(self._core.save(list(keys), first_block, parent))

    def close(self) -> None:
        """Frees the staging; cancels the hand-over if it was not complete."""
        self._core.close()

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Grant:
    """The right of one peer to write into a cache, for a time. Dropping it revokes it."""

    def __init__(self, core: Any, cache: PagedKv) -> None:
        # The order matters: the core ends before the memory it borrows.
        self._core = core
        self._cache = cache
        self._milestones = core.milestones

    @property
    def id(self) -> int:
        """What the sender passes to :meth:`Peer.send_layers`; unguessable."""
        return int(self._core.id)

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self._milestones.count:
            raise invalid(f"layer {layer} of {self._milestones.count}")
        return layer

    def wait(self, layer: int, timeout_s: float | None = None) -> None:
        """Blocks until every block of the layer has arrived and is right."""
        self._milestones.wait(self._layer(layer), timeout_s)

    async def layer(self, layer: int) -> None:
        """The awaitable form of :meth:`wait`."""
        await until(self._milestones, self._layer(layer))

    def notify(self, layer: int, notifier: Notifier, token: int) -> None:
        """Puts ``token`` on the notifier when the layer has arrived or the grant has ended."""
        self._milestones.notify(self._layer(layer), notifier, token)

    def revoke(self) -> None:
        """Ends the right. When it returns, nothing writes there any more."""
        self._core.revoke()


class Peer:
    """A connected node."""

    def __init__(self, core: Any, layers: int) -> None:
        self._core = core
        self._layers = layers

    @property
    def name(self) -> str:
        """The peer's name."""
        return str(self._core.name)

    @property
    def connected(self) -> bool:
        """Whether there is a link right now; a lost one is re-established in the background."""
        return bool(self._core.connected)

    def view(self) -> NodeView:
        """The peer's last report, corrected by what this node asked of it since.

        Raises:
            Error: ``peer_lost`` when it is not connected.
        """
        return self._core.view()

    def send_layers(
        self,
        grant: int,
        source: PagedKv,
        block_ids: ArrayLike,
        *,
        first_block: int = 0,
        layers: tuple[int, int] | None = None,
        lane: str = "low",
        deadline_s: float = 30,
        checksums: ArrayLike | None = None,
    ) -> Operation:
        """Sends blocks ``block_ids[i]`` of ``source`` as blocks ``first_block + i`` of the peer's grant.

        Layer by layer, in order. Done when the peer has verified the last byte, or has it in slots of its GPU
        (``gpu_rdma``): what that GPU then finds wrong ends the peer's grant, and is no error here. The source must not
        change until then. Dropping the operation withdraws what was not sent.

        Args:
            layers: (first, count); all if left out.
            lane: ``"low"`` (KV) or ``"high"`` (the model's own traffic).
            checksums: of what is sent, ``[layers, blocks]`` as :meth:`dualkv.PagedKv.checksums` made them when the KV
                was made; the peer verifies against them. If left out, they are made when each block is sent.
        """
        if lane not in ("low", "high"):
            raise invalid(f"lane {lane!r}: must be 'low' or 'high'")
        first, count = layers if layers is not None else (0, self._layers)
        ids = block_ids_array(block_ids)
        known = np.zeros(0, np.uint64) if checksums is None else np.asarray(checksums, np.uint64)
        if checksums is not None and known.shape != (count, len(ids)):
            raise invalid(f"checksums of shape {known.shape}: {(count, len(ids))} is needed, layers by blocks")
        core = self._core.send_layers(
            grant, source, ids, first_block, first, count, lane == "high", deadline_s, known.reshape(-1)
        )
        return Operation(core, source)


class Node:
    """One engine's store, staging and links, driven by a progress thread of its own.

    Args:
        name: unique among the nodes that meet.
        geometry: of the model.
        store: ``file:///directory``, shared by all nodes.
        staging: size of the staging pool, like ``"8GiB"``.
        listen: where peers connect: ``tcp://host:port`` (port 0 = any), ``rdma://host:port``, ``shm:///path.sock``,
            ``loopback://name``; one or a list. rdma needs libibverbs and an active port (docs/rdma.md).
        secret: shared by all peers; needed to listen on, or connect to, another host. Or ``secret_file``, whose
            content is stripped of white space at its ends.
        store_options: ``read_limit``, ``backend``, ``quota`` ... (docs/settings.md).
        staging_options: ``transit_share``, ``lock_memory``, ``shared``, ``lazy`` ... (docs/settings.md).
        rdma_options: ``devices``, ``gid_index``, ``timeout`` ... of ``rdma://`` links (docs/settings.md).
        options: ``connections_per_lane``, ``low_dscp``, ``stall_s``, ``peer_silence_s`` ... (docs/settings.md).

    Use it as a context manager, or call :meth:`close`. Thread-safe.

    Raises:
        Error: naming the option, path or address, and the cure.
    """

    def __init__(
        self,
        name: str,
        geometry: KvGeometry,
        *,
        store: str,
        staging: int | str = "256MiB",
        listen: str | Sequence[str] = (),
        secret: str | None = None,
        secret_file: str | pathlib.Path | None = None,
        store_options: dict[str, Any] | None = None,
        staging_options: dict[str, Any] | None = None,
        rdma_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_options(options, _NODE_OPTIONS, "node")
        node = dict(options)
        for size in ("write_frame", "write_window", "gpu_bounce", "gpu_gds", "gpu_rdma"):
            if size in node:
                node[size] = parse_size(node[size])
        node["name"] = name
        node["listen"] = [listen] if isinstance(listen, str) else list(listen)
        node["secret"] = _secret(secret, secret_file)
        self._geometry = geometry
        self._core = _dualkv.Node(
            geometry,
            node,
            _to_rdma_options(rdma_options or {}),
            to_store_options(store, store_options or {}),
            to_staging_options(staging, staging_options or {}),
        )

    @property
    def name(self) -> str:
        """This node's name."""
        return str(self._core.name)

    @property
    def geometry(self) -> KvGeometry:
        """The geometry it was made with."""
        return self._geometry

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports the kernel chose."""
        return list(self._core.addresses)

    @property
    def store(self) -> Store:
        """The block store."""
        return Store._of(self._core.store)

    @property
    def staging(self) -> StagingPool:
        """The staging pool."""
        return StagingPool._of(self._core.staging)

    def connect(self, address: str, timeout_s: float = 5) -> Peer:
        """Connects to a node and keeps the link up. Blocks; releases the GIL.

        Raises:
            Error: ``refused`` (secret, geometry, name), ``timeout``, ``peer_lost``.
        """
        return Peer(self._core.connect(address, timeout_s), self._geometry.layers)

    def peer(self, name: str) -> Peer:
        """A peer by name, whoever connected to whom. Raises Error ``not_found``."""
        return Peer(self._core.peer(name), self._geometry.layers)

    def view(self, *, compute_queue_s: float | None = None) -> NodeView:
        """What a policy needs to know of this node.

        Args:
            compute_queue_s: seconds that this node's engine will compute before it needs the hit, the request's own new
                tokens included. :class:`dualkv.Recompute` needs it; without it, it leaves nothing to the engine.
        """
        return self._core.view(compute_queue_s)

    def load(
        self,
        plan: _dualkv.Plan,
        *,
        into: PagedKv,
        block_ids: ArrayLike,
        prompt_blocks: int = 0,
        load_id: int = 0,
        deadline_s: float = 30,
        window_layers: int = 0,
        layers_per_read: int = 0,
    ) -> Load:
        """Starts a load; returns at once.

        Args:
            plan: from a policy: which node reads which blocks of the hit, and who decodes.
            into: this engine's cache.
            block_ids: where the prompt's blocks go, ``[blocks]``: first the hit's, then those prefill will compute.
            prompt_blocks: blocks of the prompt, if ``block_ids`` are only the first: an engine that prefills in chunks
                allocates as it goes, and brings the rest with :meth:`Load.add_blocks`. 0 = ``len(block_ids)``.
            load_id: what the decode node passes to :meth:`incoming`, chosen by whoever routes the request so that
                both sides can be told at once; 1 to 2**64 - 1, unique among loads in progress. 0 = a random one.
            deadline_s: the load has ended by then, well or not.
            window_layers: layers the cache can hold at once, 0 = all; see :meth:`Load.release`.
            layers_per_read: layers that storage reads at once, 0 = whole blocks (or half a window). Fewer layers: the
                first ones are ready after their share of the bytes, at the price of more and smaller reads.

        Raises:
            Error: ``invalid_argument``, ``peer_lost``, ``no_space`` (the decode node's staging can't hold the
                prompt): nothing was reserved.
        """
        ids = block_ids_array(block_ids)
        if not 0 <= load_id < 2**64 or not 0 <= prompt_blocks < 2**32:
            raise invalid(f"load: load_id = {load_id}, prompt_blocks = {prompt_blocks}: out of range")
        options = (prompt_blocks, load_id, deadline_s, window_layers, layers_per_read)
        return Load(self._core.load(plan, into, ids, *options), into)

    def incoming(self, load_id: int, deadline_s: float = 30) -> Incoming:
        """The hand-over of a load to this node, also before the prefill node has begun it. Returns at once.

        It fails with ``timeout`` if the prompt is not complete by the deadline.
        """
        return Incoming(self._core.incoming(load_id, deadline_s))

    def grant(self, peer: str, into: PagedKv, block_ids: ArrayLike, *, deadline_s: float = 30) -> Grant:
        """Lets ``peer`` write blocks 0..n-1 of every layer to ``block_ids`` of ``into``."""
        return Grant(self._core.grant(peer, into, block_ids_array(block_ids), deadline_s), into)

    def save(
        self,
        keys: Sequence[bytes],
        source: PagedKv,
        block_ids: ArrayLike,
        *,
        parent: bytes = b"",
        deadline_s: float = 30,
    ) -> Operation:
        """Persists Full Blocks as soon as they are complete; see :meth:`Store.save`."""
        return self.store.save(keys, source, block_ids, parent=parent, deadline_s=deadline_s)

    def prepare(self, cache: PagedKv) -> None:
        """Sets up what copies to and from this cache's GPU need: streams, pinned staging, the choice of an engine.

        Otherwise the first call with such a cache does. Blocks, some 0.1 s a GiB of staging; releases the GIL.
        Nothing for host memory.

        Raises:
            Error: ``unsupported`` where the GPU, or the engine that ``gpu_copy`` names, can't be had.
        """
        self._core.prepare(cache)

    def layer_gates(self, gpu: int = 0) -> LayerGates:
        """New gates for graphs on this GPU.

        Raises:
            Error: ``unsupported`` where it can't be used; ``io``.
        """
        return LayerGates(self._core.layer_gates(gpu))

    def copy(
        self,
        source: PagedKv,
        source_ids: ArrayLike,
        target: PagedKv,
        target_ids: ArrayLike,
        *,
        layers: tuple[int, int] | None = None,
    ) -> Operation:
        """Copies blocks ``source_ids[i]`` of one cache to ``target_ids[i]`` of another, within this node, by layers.

        By the engine that the option ``copy`` chose: the CPU (the progress thread, a part at a time), or the NIC, by a
        write to itself on the LOW lane. Where one is a GPU's memory, that GPU copies, or, with ``gpu_rdma``, the NIC
        between the host and a slot there; from one GPU to another, the one that gets the bytes. Returns at once, but
        for the first copy with a GPU; both caches must not change until it is done. Dropping the operation ends it,
        with any part copied.

        Args:
            layers: (first, count); all if left out.

        Raises:
            Error: ``invalid_argument``, with nothing copied.
        """
        first, count = layers if layers is not None else (0, self._geometry.layers)
        from_ids, to_ids = block_ids_array(source_ids), block_ids_array(target_ids)
        return Operation(self._core.copy(source, from_ids, target, to_ids, first, count), (source, target))

    def allocate(self, size: int | str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Zeroed memory that peers on this host read without the kernel's help when this node writes from it (shm).

        A place for the caches of engines on CPUs: reshape it, or ``torch.from_numpy`` it, and give it to
        :class:`dualkv.PagedKv`. Locked, and in huge pages, as the staging options say. Freed with the last array that
        looks into it; at most 63 allocations at a time.

        Args:
            size: bytes, or like ``"8GiB"``.

        Raises:
            Error: ``no_space``.
        """
        return self._core.allocate(parse_size(size))

    def stats(self) -> dict[str, Any]:
        """Counters of store, staging, links and loads, and every fallback in force."""
        return dict(self._core.stats())

    def close(self) -> None:
        """Fails what is in progress with ``cancelled``, and joins the progress thread. Idempotent."""
        self._core.close()

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _secret(secret: str | None, secret_file: str | pathlib.Path | None) -> str:
    if secret_file is None:
        return secret or ""
    if secret is not None:
        raise invalid("node: give secret or secret_file, not both")
    try:
        text = pathlib.Path(secret_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Error(f"node: secret_file {str(secret_file)!r}: {error.strerror}", "io", error.errno or 0) from error
    if not text:
        raise invalid(f"node: secret_file {str(secret_file)!r} is empty")
    return text
