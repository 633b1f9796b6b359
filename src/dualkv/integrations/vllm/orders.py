"""What the scheduler's half of the connector tells the worker's half each step, and what comes back.

vLLM may run the two in different processes: these are plain values, pickled by vLLM.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

PARAMS = "dualkv"  # the one key of kv_transfer_params that is ours: other connectors may share the dictionary


@dataclass(frozen=True)
class HandOver:
    """A prompt's KV is to arrive at a decode server under this id."""

    load_id: int
    node: str
    address: str
    blocks: int  # of the prompt, the last one may be partly filled


@dataclass(frozen=True)
class LoadOrder:
    """Load ``keys[i]`` into ``block_ids[i]``; the ids behind them are further blocks of a prompt to hand over."""

    request: str
    keys: list[bytes]
    block_ids: list[int]
    layerwise: bool  # the request computes in this very step
    hand_over: HandOver | None = None
    policy: str = ""
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishOrder:
    """This step computes the end of the prompt: hand its layers over as they are done."""

    request: str
    block_ids: list[int]  # of the prompt's blocks that had no place before


@dataclass(frozen=True)
class ReceiveOrder:
    """Copy block ``blocks[i]`` of a prompt that was handed over to ``block_ids[i]``."""

    request: str
    load_id: int
    blocks: list[int]
    block_ids: list[int]


@dataclass(frozen=True)
class SaveOrder:
    """Save ``block_ids[i]`` as ``keys[i]``."""

    request: str
    keys: list[bytes]
    block_ids: list[int]
    parent: bytes


@dataclass
class Orders(KVConnectorMetadata):
    """One step's."""

    engine: str = ""  # that gave them
    loads: list[LoadOrder] = field(default_factory=list)
    publishes: list[PublishOrder] = field(default_factory=list)
    receives: list[ReceiveOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    # Their blocks are about to be taken away.
    preempted: list[str] = field(default_factory=list)
    # vLLM keeps their blocks until they are reported.
    finishing: list[str] = field(default_factory=list)


@dataclass
class Failures(KVConnectorWorkerMetadata):
    """Requests whose load failed, and the key that could not be read; empty: another reason."""

    keys: dict[str, bytes] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of two workers: a load has failed where one rank's has."""
        assert isinstance(other, Failures)
        return Failures({**self.keys, **other.keys})


def hand_over_params(hand_over: HandOver, first: int, hit: int) -> dict[str, Any]:
    """What the prefill server answers and the router passes on to the decode server.

    The hand-over's blocks are in the order in which the prefill server came by them: prompt blocks ``first..hit``,
    which it loaded, then ``0..first``, which it had, then the rest.
    """
    return {PARAMS: {"load_id": hand_over.load_id, "blocks": hand_over.blocks, "first": first, "hit": hit}}


def place_of(block: int, first: int, hit: int) -> int:
    """Index in the hand-over of a block of the prompt; see :func:`hand_over_params`."""
    if block >= hit:
        return block
    return block - first if block >= first else block + hit - first
