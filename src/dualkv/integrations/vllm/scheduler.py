"""The half of the connector that runs in vLLM's scheduler: what is stored, what to load, save and hand over."""

import logging
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dualkv
from dualkv.integrations.vllm.options import Options
from dualkv.integrations.vllm.orders import (
    PARAMS,
    Failures,
    HandOver,
    LoadOrder,
    Orders,
    PublishOrder,
    ReceiveOrder,
    SaveOrder,
    hand_over_params,
    place_of,
)
from dualkv.policy import POLICIES

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_MATCH_AGAIN_S = 0.2  # a request that waits for blocks is matched in every step; storage is asked this often
_MOST_FAILED = 65536


@dataclass
class _Asked:
    """Part of ``kv_transfer_params`` that is ours, checked."""

    # Of a prefill server: hand the prompt over to this node.
    node: str = ""
    address: str = ""
    policy: str = ""
    helpers: tuple[str, ...] = ()
    # Of a decode server: a prompt that was handed over; see hand_over_params().
    load_id: int = 0
    blocks: int = 0
    first: int = 0
    hit: int = 0

    @classmethod
    def of(cls, request: "Request") -> "_Asked":
        """From the request; what is malformed is left out: a request must not fail because of a hint."""
        given = (request.kv_transfer_params or {}).get(PARAMS)
        if given is None:
            return cls()
        try:
            asked = cls(**{**given, "helpers": tuple(map(str, given.get("helpers", ())))})
            numbers = (asked.load_id, asked.blocks, asked.first, asked.hit)
            fine = all(isinstance(n, int) and 0 <= n < 2**64 for n in numbers) and asked.first <= asked.hit
            fine = fine and all(isinstance(s, str) for s in (asked.node, asked.address, asked.policy))
            fine = fine and asked.policy in ("", *POLICIES) and bool(asked.node) == bool(asked.address)
        except (TypeError, AttributeError):
            fine = False
        if not fine:
            logger.warning("dualkv: request %s: malformed kv_transfer_params, ignored", request.request_id)
            return cls()
        return asked


@dataclass
class _Tracked:
    """A request that vLLM has not freed."""

    request: "Request"
    asked: _Asked
    saved: int = 0  # leading full blocks that are stored, or on their way
    first: int = 0  # the load's blocks
    hit: int = 0
    loading: bool = False  # asynchronously: vLLM waits for our word
    receiving: bool = False
    cached: int = 0  # leading blocks that vLLM had itself
    matched: tuple[float, int] = (0, 0)  # when, and how many blocks
    hand_over: HandOver | None = None  # a load is open under this id
    published: bool = False
    owes: bool = False  # the worker has work on this request's blocks, or had


class SchedulerSide:
    """All methods are called by vLLM's scheduler, on its thread; see KVConnectorBase_V1."""

    def __init__(self, geometries: list[dualkv.KvGeometry], options: Options) -> None:
        self._options = options
        self._block = geometries[0].tokens_per_block
        # Only looked into: the smallest pool there is.
        self._stores = [
            dualkv.Store(
                options.store,
                geometry,
                staging=dualkv.StagingPool(geometry, 2 * geometry.file_bytes, lock_memory=False, huge_pages=False),
                backend="pread",
                direct="off",
                depth=1,
            )
            for geometry in geometries
        ]
        self._requests: dict[str, _Tracked] = {}
        self._failed: dict[bytes, float] = {}  # keys that could not be read, and until when they are not advertised
        self._missing: set[bytes] = set()  # those of them that are there again once they are saved
        self._orders = Orders(options.name)

    # --- a request comes

    def on_new_request(self, request: "Request") -> None:
        """Nothing is reserved yet."""
        self._requests[request.request_id] = _Tracked(request, _Asked.of(request))

    def matched_tokens(self, request: "Request", computed: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond the first ``computed``, and whether between steps. Looks into storage."""
        tracked = self._tracked(request)
        if self._arriving(tracked):
            return max(0, request.num_tokens - computed), request.num_tokens > computed
        tracked.cached = first = computed // self._block
        # One token at least is computed: it gives the next one.
        hit = min(self._match(tracked, first), (request.num_tokens - 1) // self._block)
        if hit - first < max(1, self._options.min_hit_blocks):
            return 0, False
        tracked.first, tracked.hit = first, hit
        return (hit - first) * self._block, self._options.load == "async"

    def is_receiving(self, request: "Request") -> bool:
        """Whether its KV comes from another server rather than from storage."""
        return self._tracked(request).receiving

    def _tracked(self, request: "Request") -> _Tracked:
        if request.request_id not in self._requests:
            self.on_new_request(request)
        return self._requests[request.request_id]

    def _arriving(self, tracked: _Tracked) -> bool:
        """Whether the request's prompt is to be handed over to this server."""
        asked, request = tracked.asked, tracked.request
        if asked.load_id == 0 or asked.node:
            return False
        if request.num_preemptions == 0 and asked.blocks == -(-request.num_prompt_tokens // self._block):
            return True
        asked.load_id = 0
        return False

    def _match(self, tracked: _Tracked, first: int) -> int:
        now = time.monotonic()
        if now - tracked.matched[0] < _MATCH_AGAIN_S:
            return tracked.matched[1]
        keys = [bytes(key) for key in tracked.request.block_hashes]
        for at, key in enumerate(keys):
            if self._failed.get(key, 0) > now:
                keys = keys[:at]
                break
        hit = min(store.match(keys) for store in self._stores) if len(keys) > first else 0
        tracked.matched = (now, hit)
        return hit

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """vLLM has room for the ``external`` tokens that matched_tokens() offered. Comes again when they are there."""
        tracked = self._tracked(request)
        tracked.saved = max(tracked.saved, tracked.cached)  # by the request that computed them
        if external <= 0:
            return
        ids = list(blocks.get_block_ids()[0])
        if self._arriving(tracked):
            self._receive(tracked, ids, external)
        else:
            tracked.loading = self._options.load == "async"
            self._load(tracked, ids)

    def _receive(self, tracked: _Tracked, ids: list[int], external: int) -> None:
        asked, request = tracked.asked, tracked.request
        first = (request.num_prompt_tokens - external) // self._block
        wanted = range(first, asked.blocks)
        places = [place_of(block, asked.first, asked.hit) for block in wanted]
        self._orders.receives.append(
            ReceiveOrder(request.request_id, asked.load_id, places, [ids[block] for block in wanted])
        )
        tracked.loading = tracked.receiving = True
        tracked.first = first
        tracked.saved = max(tracked.saved, request.num_prompt_tokens // self._block)  # the prefill server saves those

    def _load(self, tracked: _Tracked, ids: list[int]) -> None:
        """Opens the load of a hit, or of nothing where a prompt is only to be handed over."""
        request, asked = tracked.request, tracked.asked
        first, hit = tracked.first, tracked.hit
        if asked.node and self._may_hand_over(request):
            blocks = -(-request.num_prompt_tokens // self._block)
            tracked.hand_over = HandOver(secrets.randbits(63) | 1, asked.node, asked.address, blocks)
            tracked.published = False
        self._orders.loads.append(
            LoadOrder(
                request.request_id,
                [bytes(key) for key in request.block_hashes[first:hit]],
                ids[first:hit] + (ids[:first] if tracked.hand_over else []),
                not tracked.loading,
                tracked.hand_over,
                asked.policy or self._options.policy,
                asked.helpers or self._options.helpers,
            )
        )
        tracked.saved = max(tracked.saved, hit)

    @staticmethod
    def _may_hand_over(request: "Request") -> bool:
        """Later tokens would be written into the prompt's last block while that is on its way."""
        return request.max_tokens == 1 and request.num_preemptions == 0

    # --- a step begins

    def orders(self, output: "SchedulerOutput") -> Orders:
        """What the worker does in this step."""
        for name in output.preempted_req_ids or ():
            self._preempted(name)
        for name, tokens in output.num_scheduled_tokens.items():
            tracked = self._requests.get(name)
            if tracked is None:
                continue
            tracked.loading = tracked.receiving = False
            publishes = self._publishes(tracked, tokens)
            full = self._full_blocks(tracked)
            if publishes or full > tracked.saved:  # few steps do: a table of blocks is not looked up for nothing
                ids = list(output.kv_connector_block_state.get_block_ids(name)[0])
                if publishes:
                    self._publish(tracked, ids)
                self._save(tracked, min(full, len(ids)), ids)
        orders, self._orders = self._orders, Orders(self._options.name)
        return orders

    def _preempted(self, name: str) -> None:
        self._orders.preempted.append(name)
        if tracked := self._requests.get(name):
            tracked.hand_over = None
            tracked.published = False
            tracked.matched = (0, 0)

    def _publishes(self, tracked: _Tracked, tokens: int) -> bool:
        """Whether this step computes the end of a prompt that is to be handed over. Opens the hand-over before."""
        request = tracked.request
        if not tracked.asked.node or tracked.published or not self._may_hand_over(request):
            return False
        if tracked.hand_over is None:  # nothing was loaded, or what was has failed
            tracked.first = tracked.hit = 0
            self._load(tracked, [])
        return bool(request.num_computed_tokens + tokens >= request.num_prompt_tokens)

    def _publish(self, tracked: _Tracked, ids: list[int]) -> None:
        assert tracked.hand_over is not None
        self._orders.publishes.append(
            PublishOrder(tracked.request.request_id, ids[tracked.hit : tracked.hand_over.blocks])
        )
        tracked.published = tracked.owes = True

    def _full_blocks(self, tracked: _Tracked) -> int:
        """Leading blocks that were full before this step: whatever is in flight can't change them."""
        request = tracked.request
        if not self._options.save:
            return 0
        done = (request.num_computed_tokens - request.num_in_flight_tokens) // self._block
        return int(min(done, len(request.block_hashes)))

    def _save(self, tracked: _Tracked, full: int, ids: list[int]) -> None:
        saved, request = tracked.saved, tracked.request
        if full <= saved:
            return
        keys = [bytes(key) for key in request.block_hashes[saved:full]]
        parent = bytes(request.block_hashes[saved - 1]) if saved else b""
        self._orders.saves.append(SaveOrder(request.request_id, keys, ids[saved:full], parent))
        for key in self._missing.intersection(keys):
            self._missing.discard(key)
            self._failed.pop(key, None)
        tracked.saved = full
        tracked.owes = True

    # --- a step has ended

    def update(self, output: "KVConnectorOutput") -> None:
        """Failed loads: what could not be read is not advertised for a while, and saved again once it is computed."""
        failures = output.kv_connector_worker_meta
        if not isinstance(failures, Failures):
            return
        until = time.monotonic() + self._options.forget_failed_s
        if len(self._failed) > _MOST_FAILED:
            self._failed.clear()
            self._missing.clear()
        for name, key in failures.keys.items():
            tracked = self._requests.get(name)
            if key:
                self._failed[key] = until
                # A corrupt block was moved aside. Its successors are still stored: that hides the hole from a search.
                if not all(store.contains(key) for store in self._stores):
                    self._missing.add(key)
            if tracked is None:
                continue
            if tracked.receiving:
                tracked.asked.load_id = 0  # from storage then, or computed
                tracked.saved = tracked.first
            keys = [bytes(one) for one in tracked.request.block_hashes]
            tracked.saved = min(tracked.saved, keys.index(key) if key in keys else tracked.first)
            tracked.hand_over = None
            tracked.published = False
            tracked.receiving = False
            tracked.matched = (0, 0)

    # --- a request goes

    def finished(self, request: "Request", ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM must keep the request's blocks until the worker reports it, and what the router is told."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False, None
        if tracked.loading:  # given up while its blocks are being written: vLLM waits for the load's end anyway
            self._orders.cancelled.append(request.request_id)
            return False, None
        self._save(tracked, min(self._full_blocks(tracked), len(ids)), list(ids))
        params = None
        if tracked.hand_over is not None:
            tracked.owes = True
            if tracked.published:
                params = hand_over_params(tracked.hand_over, tracked.first, tracked.hit)
            else:
                self._orders.cancelled.append(request.request_id)
        if tracked.owes:
            self._orders.finishing.append(request.request_id)
        return tracked.owes, params
