"""A prefill engine: loads a prompt's stored prefix layer by layer while it computes the rest.

Everything an engine needs of dualkv is in :meth:`PrefillEngine.prefill`: match, plan, load, wait, publish, finish.
With a :class:`dualkv.Recompute` policy, what takes longer to load than to compute is computed.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

import dualkv
from dualkv.engines.blocks import BlockPool, ResidentPrefixes

_READ_FAILURES = {"not_found", "corrupt", "io"}  # a shorter hit may still work


class Compute(Protocol):
    """What an engine computes with; see ``compute.py``."""

    geometry: dualkv.KvGeometry
    kv: dualkv.PagedKv
    block_count: int

    @property
    def stream(self) -> Any:
        """Of a GPU, where ``prefill`` puts its work on the calling thread; None where it computes itself."""
        ...

    def mark(self) -> Callable[[], float]:
        """When what was computed by now was done; asked for its ``time.monotonic()`` when prefill has returned."""
        ...

    def prefill(
        self,
        tokens: "np.ndarray[Any, Any]",
        start: int,
        block_ids: Sequence[int],
        before_layer: Callable[[int], None],
        after_layer: Callable[[int], None],
    ) -> int:
        """Computes ``tokens[start:]`` against the cached ``tokens[:start]``; returns the next token."""
        ...

    def fill(self, tokens: "np.ndarray[Any, Any]", block_ids: Sequence[int]) -> None:
        """Computes the KV of a whole context."""
        ...

    def decode(self, tokens: "np.ndarray[Any, Any]", block_ids: Sequence[int]) -> int:
        """Computes the last of ``tokens`` against the cached rest; returns the next token."""
        ...

    def wrong_blocks(self, tokens: "np.ndarray[Any, Any]", block_ids: Sequence[int]) -> int:
        """Blocks whose cached bytes are known to be wrong; 0 where only the tokens can tell."""
        ...


@dataclass
class Prefilled:
    """One prefill: its first token, and where its KV came from."""

    first_token: int
    load_id: int
    hit_blocks: int  # loaded from storage
    recomputed_blocks: int  # in storage, but sooner computed
    resident_blocks: int  # were in the cache already; the decode node has them too
    retries: int
    result: dict[str, Any]
    layer_start_s: list[float] = field(default_factory=list)  # since the load began: wait, then compute
    layer_compute_s: list[float] = field(default_factory=list)
    layer_done_s: list[float] = field(default_factory=list)


@dataclass
class Pace:
    """Seconds a token of computing, lately: of sums, so that a short prefill counts for the little it took."""

    _seconds: float = 0.0
    _tokens: float = 0.0

    _MEMORY: ClassVar = 0.9  # at each prefill

    @property
    def token_s(self) -> float:
        """0 while nothing was computed."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """One prefill."""
        self._seconds = self._MEMORY * self._seconds + seconds
        self._tokens = self._MEMORY * self._tokens + tokens


class PrefillEngine:
    """One prefill engine. ``helpers`` are nodes whose storage NICs may help besides the decode node's."""

    def __init__(
        self,
        node: dualkv.Node,
        compute: Compute,
        policy: dualkv.PathPolicy,
        *,
        resident: bool = False,
        deadline_s: float = 30,
    ) -> None:
        self.node = node
        self.compute = compute
        self.policy = policy
        self.deadline_s = deadline_s
        self.resident = ResidentPrefixes() if resident else None
        self.blocks = BlockPool(compute.block_count)
        self._gpu = asyncio.Lock()  # one forward pass at a time; loads of later requests go on meanwhile
        self._pace = Pace()
        self._tokens = 0  # that will be computed for the requests that are here

    async def prefill(
        self, tokens: "np.ndarray[Any, Any]", decode: dualkv.Peer, helpers: Sequence[dualkv.Peer] = ()
    ) -> Prefilled:
        """Prefills one prompt and hands its KV to ``decode``. Raises dualkv.Error by the deadline if it can't."""
        geometry = self.node.geometry
        keys = dualkv.block_keys(tokens, geometry)
        loadable = keys[: (len(tokens) - 1) // geometry.tokens_per_block]  # one token at least is computed
        resident_ids = self.resident.match(loadable) if self.resident else []
        base = len(resident_ids)
        total = -(-len(tokens) // geometry.tokens_per_block)
        new_ids = await self.blocks.take(total - base)
        deadline = time.monotonic() + self.deadline_s
        retries = 0
        try:
            while True:
                try:
                    done = await self._attempt(
                        tokens, loadable[base:], resident_ids + new_ids, base, decode, helpers, deadline
                    )
                    done.retries = retries
                    break
                except dualkv.Error as error:
                    # The failed block is not advertised again: the next match ends before it.
                    if error.code not in _READ_FAILURES or time.monotonic() > deadline:
                        raise
                    retries += 1
            if self.resident:
                new_ids = self.resident.keep(keys[base:], new_ids)
            return done
        finally:
            await self.blocks.give_back(new_ids)

    async def _attempt(
        self,
        tokens: "np.ndarray[Any, Any]",
        keys: list[bytes],
        block_ids: list[int],
        base: int,
        decode: dualkv.Peer,
        helpers: Sequence[dualkv.Peer],
        deadline: float,
    ) -> Prefilled:
        stored = self.node.store.match(keys)
        per_block = self.node.geometry.tokens_per_block
        new = len(tokens) - (base + stored) * per_block
        plan = self.policy.plan(
            keys[:stored],
            prefill=self.node.view(compute_queue_s=(self._tokens + new) * self._pace.token_s),
            decode=decode.view(),
            helpers=[helper.view() for helper in helpers if helper.connected],
        )
        hit = len(plan.keys)
        load = self.node.load(
            plan,
            into=self.compute.kv,
            block_ids=block_ids[base:],
            deadline_s=max(0.001, deadline - time.monotonic()),
        )
        done = Prefilled(0, load.id, hit, stored - hit, base, 0, {})
        began = time.monotonic()
        starts, computes, ends = [], [], []
        compute = self.compute

        def before_layer(layer: int) -> None:
            starts.append(compute.mark())
            if compute.stream is None:
                load.wait(layer)
            else:  # the GPU waits, and this thread goes on
                load.wait_on_stream(layer, compute.stream)
            computes.append(compute.mark())

        def after_layer(layer: int) -> None:
            load.publish(layer, compute.stream)
            ends.append(compute.mark())

        start = (base + hit) * per_block
        self._tokens += len(tokens) - start
        try:
            await load.layer(0)
            async with self._gpu:
                done.first_token = await asyncio.to_thread(
                    compute.prefill, tokens, start, block_ids, before_layer, after_layer
                )
            done.layer_start_s, done.layer_compute_s, done.layer_done_s = (
                [mark() - began for mark in marks] for marks in (starts, computes, ends)
            )
        finally:
            self._tokens -= len(tokens) - start
        done.result = await load.finished()
        self._learn(start, len(tokens) - start, done)
        return done

    def _learn(self, cached: int, tokens: int, done: Prefilled) -> None:
        """How long computing took, without the waits for layers."""
        took = sum(end - begin for begin, end in zip(done.layer_compute_s, done.layer_done_s, strict=True))
        self._pace.observe(tokens, took)
        if isinstance(self.policy, dualkv.Recompute):
            self.policy.observe(cached, tokens, took)
