"""The half of the connector that runs in a vLLM worker: its node loads, hands over, receives and saves."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import dualkv
from dualkv.integrations.vllm.options import Options, rank_address, rank_name
from dualkv.integrations.vllm.orders import Failures, HandOver, LoadOrder, Orders, ReceiveOrder, SaveOrder
from dualkv.integrations.vllm.stats import DualKVStats
from dualkv.policy import POLICIES

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.dualkv")

_SHORTER_HIT_HELPS = {"not_found", "corrupt", "io"}
_RETRY_CONNECT_S = 1.0


class _Peers:
    """Connections to other servers' nodes, made in the background: an engine's step must not wait for a dead host."""

    def __init__(self, node: dualkv.Node, rank: int, connect_s: float) -> None:
        self._node = node
        self._rank = rank
        self._connect_s = connect_s
        self._threads = ThreadPoolExecutor(2, "dualkv-connect")
        self._peers: dict[str, Future[dualkv.Peer]] = {}
        self._failed: dict[str, float] = {}

    def find(self, address: str) -> "Future[dualkv.Peer]":
        """The node that listens there, as seen from rank 0. Returns at once; fails after ``connect_s``."""
        known = self._peers.get(address)
        if known is not None and not (known.done() and self._lost(address, known)):
            return known
        mine = rank_address(address, self._rank)
        self._peers[address] = self._threads.submit(self._node.connect, mine, self._connect_s)
        return self._peers[address]

    def _lost(self, address: str, known: "Future[dualkv.Peer]") -> bool:
        """Whether it is time to try again. A link that was up once comes back by itself."""
        if known.exception() is None:
            return False
        now = time.monotonic()
        if now < self._failed.setdefault(address, now + _RETRY_CONNECT_S):
            return False
        del self._failed[address]
        return True

    def close(self) -> None:
        """Gives up connecting."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass
class _Loading:
    """A load that was ordered."""

    order: LoadOrder
    hand_over: HandOver | None  # None also if it can't be handed over after all
    deadline: float
    peers: "list[Future[dualkv.Peer]]"  # the decode server's first
    load: dualkv.Load | None = None  # None while peers are being connected, and if it never began
    ended: bool = False  # all layers are in place, or not going to be
    reported: bool = False
    invalid: list[int] = dataclasses.field(default_factory=list)  # blocks that are not what they should be
    more_blocks: list[int] = dataclasses.field(default_factory=list)  # of the prompt, once they have a place
    unpublished: set[int] = dataclasses.field(default_factory=set)  # layers that were done before the load was open

    def connected(self) -> bool:
        return all(peer.done() for peer in self.peers)

    def at_rest(self) -> bool:
        """Nothing reads or writes its blocks any more."""
        return self.ended and (self.load is None or self.load.done)


class WorkerSide:
    """All methods are called by vLLM's worker, on its thread, and return quickly but where they say otherwise."""

    def __init__(self, geometry: dualkv.KvGeometry, layers: list[str], options: Options, rank: int) -> None:
        self._geometry = geometry
        self._options = options
        self._rank = rank
        self._layer_of = {name: i for i, name in enumerate(layers)}
        self._kv: dualkv.PagedKv | None = None
        self._stats = DualKVStats()
        self._failures = Failures()
        self._invalid: set[int] = set()
        self._loads: dict[str, _Loading] = {}
        self._receiving: dict[str, tuple[ReceiveOrder, dualkv.Incoming, Future[None] | None]] = {}
        self._layerwise: list[_Loading] = []  # of this step
        self._publishing: list[_Loading] = []  # of this step
        self._received: set[str] = set()  # to report: loads and hand-overs that have ended
        self._finishing: set[str] = set()  # to report as soon as nothing reads their blocks
        self._saves: dict[str, list[Future[tuple[dualkv.Operation, int]]]] = {}  # being copied from the cache
        self._writing: list[tuple[dualkv.Operation, int]] = []
        self._policies = {name: policy() for name, policy in POLICIES.items()}
        self._saver = ThreadPoolExecutor(1, "dualkv-save")
        self._copier = ThreadPoolExecutor(1, "dualkv-copy")
        self._node = dualkv.Node(
            rank_name(options.name, rank),
            geometry,
            store=options.store,
            staging=options.staging,
            listen=rank_address(options.listen, rank) or (),
            secret=options.secret,
            secret_file=options.secret_file,
            store_options=options.store_options,
            staging_options=options.staging_options,
            **options.node_options,
        )
        self._peers = _Peers(self._node, rank, options.connect_s)
        for address in options.helpers:
            self._peers.find(address)

    def register(self, kv_caches: "dict[str, torch.Tensor]", num_blocks: int) -> None:
        """vLLM's cache: one tensor a layer, whose blocks are taken as they are."""
        missing = sorted(set(self._layer_of) - set(kv_caches))
        if missing:
            raise dualkv.Error(f"vLLM registered no KV cache for {', '.join(missing[:3])}", "unsupported")
        self._kv = dualkv.PagedKv(self._geometry, [_planes(kv_caches[name], num_blocks) for name in self._layer_of])

    # --- a step begins

    def before_overwriting(self, orders: Orders) -> None:
        """Blocks of preempted requests are about to be reused: waits until nothing reads or writes them."""
        for name in orders.preempted:
            for save in self._saves.pop(name, ()):
                self._copied(save)
            self._give_up(name)

    def begin(self, orders: Orders) -> None:
        """Starts what the step needs, before the model runs: vLLM calls start_load_kv too late for hand-overs."""
        if orders.engine != self._options.name:
            # vLLM keeps one worker connector a process: these block ids are another cache's.
            raise dualkv.Error(
                f"orders of vLLM engine '{orders.engine}' came to the connector of '{self._options.name}': two engines "
                "can't share a process; start each in its own",
                "unsupported",
            )
        for order in orders.loads:
            self._loads[order.request] = self._start(order)
        self._layerwise = [self._loads[o.request] for o in orders.loads if o.layerwise and o.keys]
        self._publishing = []
        for publish in orders.publishes:
            loading = self._loads.get(publish.request)
            if loading is not None and loading.hand_over is not None:
                loading.more_blocks = publish.block_ids
                self._publishing.append(loading)
        for receive in orders.receives:
            self._receive(receive)
        for name in orders.cancelled:
            self._cancel(name)
        for save in orders.saves:
            self._saves.setdefault(save.request, []).append(self._saver.submit(self._save, save, self._computed()))
        self._finishing.update(orders.finishing)

    def _start(self, order: LoadOrder) -> _Loading:
        addresses = [order.hand_over.address] if order.hand_over is not None else []
        peers = [self._peers.find(address) for address in (*addresses, *order.helpers)]
        loading = _Loading(order, order.hand_over, time.monotonic() + self._options.deadline_s, peers)
        if loading.connected():
            self._open(loading)
        return loading

    def _open(self, loading: _Loading) -> None:
        """Plans and begins; what can't be handed over is loaded all the same."""
        order, hand_over = loading.order, loading.hand_over
        if hand_over is not None:
            try:
                decode = loading.peers[0].result()
                if decode.name != rank_name(hand_over.node, self._rank):
                    raise dualkv.Error(f"'{decode.name}' listens there, not '{hand_over.node}'", "refused")
                return self._begin_load(loading, decode)
            except dualkv.Error as error:
                logger.warning("dualkv: %s is not handed to %s: %s", order.request, hand_over.address, error)
                self._stats.add(hand_overs_failed=1)
                loading.hand_over = None
        try:
            self._begin_load(loading, None)
        except dualkv.Error as error:
            self._failed(loading, error)

    def _begin_load(self, loading: _Loading, decode: dualkv.Peer | None) -> None:
        order, hand_over = loading.order, loading.hand_over
        if hand_over is None and not order.keys:
            loading.ended = True
            return
        helpers = loading.peers if order.hand_over is None else loading.peers[1:]
        connected = [peer.result() for peer in helpers if peer.exception() is None]
        plan = self._policies[order.policy].plan(
            order.keys,
            prefill=self._node.view(),
            decode=decode.view() if decode is not None else None,
            helpers=[peer.view() for peer in connected if peer.connected],
        )
        assert self._kv is not None
        loading.load = self._node.load(
            plan,
            into=self._kv,
            block_ids=order.block_ids if hand_over is not None else order.block_ids[: len(order.keys)],
            prompt_blocks=hand_over.blocks if hand_over is not None else 0,
            load_id=hand_over.load_id if hand_over is not None else 0,
            deadline_s=max(0.001, loading.deadline - time.monotonic()),
            layers_per_read=self._options.layers_per_read,
        )
        logger.debug("dualkv: %s: load %x: %s", order.request, loading.load.id, plan.reason)

    # --- a layer

    def wait(self, layer_name: str) -> None:
        """Blocks until the layer of all requests that load while they compute is in place, or has failed."""
        if not self._layerwise:
            return
        layer = self._layer_of.get(layer_name)
        if layer is None:
            return
        for loading in self._layerwise:
            if loading.load is None and not loading.ended:
                for peer in loading.peers:
                    with contextlib.suppress(Exception):
                        peer.result(max(0.0, loading.deadline - time.monotonic()))
                self._open(loading)
            if loading.load is None or loading.ended:
                continue
            try:
                loading.load.wait(layer)
            except dualkv.Error as error:
                self._failed(loading, error)

    def layer_done(self, layer_name: str) -> None:
        """The layer's KV of this step is in the cache: publishes it where a prompt ends."""
        if not self._publishing:
            return
        layer = self._layer_of.get(layer_name)
        for loading in self._publishing if layer is not None else ():
            assert layer is not None
            loading.unpublished.add(layer)
            self._publish(loading)

    def _publish(self, loading: _Loading) -> None:
        """What is done of the layers, as far as the load is open; the rest when it is."""
        load = loading.load
        if load is None or loading.hand_over is None:
            if loading.ended:
                loading.unpublished.clear()
            return
        try:
            if loading.more_blocks:
                load.add_blocks(loading.more_blocks)
                loading.more_blocks = []
            for layer in sorted(loading.unpublished):
                if load.ended(layer):
                    load.publish(layer, self._stream())
                    loading.unpublished.discard(layer)
        except dualkv.Error as error:  # the load says so too, when it ends
            logger.warning("dualkv: %s is not handed over: %s", loading.order.request, error)
            loading.unpublished.clear()
            load.cancel()

    # --- a step ends

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks nothing uses any more, of those that vLLM asked about; and those that have loaded."""
        self._layerwise = []
        self._publishing = []
        if self._loads:
            self._poll_loads()
        if self._receiving:
            self._poll_receiving()
        if self._saves or self._writing:
            self._poll_saves()
        sent: set[str] = set()
        if self._finishing:
            sent = {name for name in self._finishing if name not in self._saves and name not in self._loads}
            self._finishing -= sent
        received, self._received = self._received, set()
        return sent, received

    def take_invalid(self) -> set[int]:
        """Blocks that were to be loaded and are not what they should be."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_failures(self) -> Failures | None:
        """Requests whose load failed since the last call."""
        if not self._failures.keys:
            return None
        failures, self._failures = self._failures, Failures()
        return failures

    def take_stats(self) -> DualKVStats | None:
        """What happened since the last call."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, DualKVStats()
        return stats

    def _poll_loads(self) -> None:
        last = self._geometry.layers - 1
        for name, loading in list(self._loads.items()):
            if loading.load is None and not loading.ended and loading.connected():
                self._open(loading)
            if loading.load is not None and not loading.ended and loading.load.ended(last):
                self._check(loading, last)
            if loading.unpublished:
                self._publish(loading)
            if loading.ended and not loading.reported:
                loading.reported = True
                self._invalid.update(loading.invalid)
                if loading.order.keys and not loading.order.layerwise:
                    self._received.add(name)
            if loading.at_rest():
                self._record(loading)
                del self._loads[name]

    def _check(self, loading: _Loading, last: int) -> None:
        assert loading.load is not None
        try:
            loading.load.wait(last)
            loading.ended = True
        except dualkv.Error as error:
            self._failed(loading, error)

    def _failed(self, loading: _Loading, error: dualkv.Error) -> None:
        """What nobody could read is computed instead; what lies before it is loaded again, if there is time."""
        order, load = loading.order, loading.load
        bad = load.failed_block if load is not None else None
        if bad is not None and bad >= len(order.keys):
            bad = None
        # Where no block is to blame (a deadline), the first one is: nothing of this hit is to be looked for again soon.
        self._failures.keys[order.request] = order.keys[bad or 0] if order.keys else b""
        logger.warning("dualkv: %s: %s", order.request, error)
        if load is not None:
            self._record(loading)
        loading.hand_over = loading.load = None
        shorter = bad if bad and error.code in _SHORTER_HIT_HELPS and not order.layerwise else 0
        loading.invalid += order.block_ids[shorter : len(order.keys)]
        if not shorter:
            loading.ended = True
            return
        loading.order = dataclasses.replace(order, keys=order.keys[:shorter], block_ids=order.block_ids[:shorter])
        try:
            self._begin_load(loading, None)
        except dualkv.Error as again:
            self._failed(loading, again)

    def _record(self, loading: _Loading) -> None:
        """Counts a load that has ended."""
        load, hand_over = loading.load, loading.hand_over
        if load is None:
            return
        handed_over = loaded = True
        try:
            load.wait(self._geometry.layers - 1, 0)
            load.finish(0)
        except dualkv.Error as error:
            handed_over = False
            loaded = load.ready(self._geometry.layers - 1)
            if loaded and hand_over is not None:
                logger.warning("dualkv: %s: %s", loading.order.request, error)
        result = load.result()
        if loading.order.keys:
            self._stats.add(loads=int(loaded), loads_failed=int(not loaded), failovers=result["failovers"])
            if loaded:
                self._stats.add_seconds(max(result["layer_ready_s"]))
        if hand_over is not None:
            self._stats.add(hand_overs=int(handed_over), hand_overs_failed=int(not handed_over))
        self._stats.add(bytes_published=result["bytes_published"])
        for path in result["paths"]:
            self._stats.add(**{f"bytes_{path['path']}": path["bytes"]})

    # --- hand-overs to this server

    def _receive(self, order: ReceiveOrder) -> None:
        try:
            incoming = self._node.incoming(order.load_id, self._options.deadline_s)
            self._receiving[order.request] = (order, incoming, None)
        except dualkv.Error as error:  # claimed before: somebody sent the same request twice
            self._not_received(order, error)

    def _not_received(self, order: ReceiveOrder, error: BaseException) -> None:
        logger.warning("dualkv: %s: the prompt did not arrive: %s", order.request, error)
        self._stats.add(received_failed=1)
        self._failures.keys[order.request] = b""
        self._invalid.update(order.block_ids)
        self._received.add(order.request)

    def _poll_receiving(self) -> None:
        for name, (order, incoming, copy) in list(self._receiving.items()):
            if copy is None:
                if not incoming.done:
                    continue
                copy = self._copier.submit(self._copy, order, incoming)
                self._receiving[name] = (order, incoming, copy)
            if not copy.done():
                continue
            del self._receiving[name]
            error = copy.exception()
            if error is not None:
                self._not_received(order, error)
                continue
            self._received.add(name)
            self._stats.add(received=1)

    def _copy(self, order: ReceiveOrder, incoming: dualkv.Incoming) -> None:
        assert self._kv is not None
        with incoming:
            incoming.wait(0)
            incoming.copy_to(self._kv, order.block_ids, order.blocks)

    # --- saves

    def _stream(self) -> Any:
        """Of the GPU that has the cache, what vLLM computes on; None for a cache in host memory."""
        if self._kv is None or self._kv.gpu is None:
            return None
        import torch

        return torch.cuda.current_stream(self._kv.gpu)

    def _computed(self) -> Callable[[], None]:
        """Blocks, when called, until what was put on the stream by now is in the cache."""
        stream = self._stream()
        return (lambda: None) if stream is None else stream.record_event().synchronize

    def _save(self, order: SaveOrder, computed: Callable[[], None]) -> tuple[dualkv.Operation, int]:
        """Returns when the blocks have been copied from the cache; how many, and the writing of their files."""
        assert self._kv is not None
        computed()
        deadline_s = self._options.deadline_s
        saved = self._node.save(order.keys, self._kv, order.block_ids, parent=order.parent, deadline_s=deadline_s)
        return saved, len(order.keys)

    def _poll_saves(self) -> None:
        for name, saves in list(self._saves.items()):
            for save in [save for save in saves if save.done()]:
                saves.remove(save)
                self._copied(save)
            if not saves:
                del self._saves[name]
        for entry in [entry for entry in self._writing if entry[0].done]:
            self._writing.remove(entry)
            self._written(*entry)

    def _copied(self, save: "Future[tuple[dualkv.Operation, int]]") -> None:
        """Waits until the blocks have been copied from the cache."""
        try:
            self._writing.append(save.result())
        except dualkv.Error as error:
            self._save_failed(error)

    def _written(self, operation: dualkv.Operation, blocks: int) -> None:
        try:
            operation.wait(0)
            self._stats.add(blocks_saved=blocks)
        except dualkv.Error as error:
            self._save_failed(error)

    def _save_failed(self, error: dualkv.Error) -> None:
        self._stats.add(saves_failed=1)
        logger.warning("dualkv: blocks were not saved: %s", error)

    # --- the end

    def _cancel(self, name: str) -> None:
        """The request was given up."""
        if name in self._receiving:
            self._receiving[name][1].close()  # ends it: reported as soon as nothing copies from it
        loading = self._loads.get(name)
        if loading is not None:
            waiting = not loading.ended and bool(loading.order.keys) and not loading.order.layerwise
            self._give_up(name)
            if waiting:
                self._received.add(name)

    def _give_up(self, name: str) -> None:
        """When it returns, nothing moves from or to the request's blocks."""
        loading = self._loads.pop(name, None)
        if loading is not None and loading.load is not None:
            loading.load.cancel()
            self._record(loading)

    def close(self) -> None:
        """Ends what is in progress; saves that were begun are finished, within their deadline."""
        for name in list(self._loads):
            self._give_up(name)
        for _, incoming, _ in self._receiving.values():
            incoming.close()
        self._peers.close()
        self._copier.shutdown()
        self._saver.shutdown()
        for saves in self._saves.values():
            for save in saves:
                self._copied(save)
        for operation, _ in self._writing:
            with contextlib.suppress(dualkv.Error):
                operation.wait(self._options.deadline_s)
        self._node.close()


def _planes(tensor: "torch.Tensor", num_blocks: int) -> "list[torch.Tensor]":
    """The tensor with the block as first axis; K and V apart where vLLM keeps them so."""
    if tensor.shape[0] == num_blocks:
        return [tensor]
    if tensor.dim() > 2 and tensor.shape[1] == num_blocks:
        return [tensor[i] for i in range(tensor.shape[0])]
    raise dualkv.Error(
        f"vLLM: a KV cache of shape {tuple(tensor.shape)} has no axis of {num_blocks} blocks", "unsupported"
    )
