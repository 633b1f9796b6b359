"""vLLM's interface: passes on to the half that runs here."""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from dualkv.integrations.vllm.options import Options, geometry_of, rank_of
from dualkv.integrations.vllm.orders import Orders
from dualkv.integrations.vllm.scheduler import SchedulerSide
from dualkv.integrations.vllm.stats import DualKVPromMetrics, DualKVStats
from dualkv.integrations.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class DualKVConnector(KVConnectorBase_V1):
    """A V1 connector; one object in vLLM's scheduler, one in each worker.

    Not ``SupportsHMA``: vLLM then runs models of several kinds of attention with one table of blocks, which is what
    storage can hold. Loads need no CPU of the engine's thread; nothing here raises into vLLM once it has started.

    Raises:
        dualkv.Error: at start, for unknown options, storage that can't be used, and models whose KV is not supported.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.of(vllm_config)
        ranks = rank_of(vllm_config, worker=role == KVConnectorRole.WORKER)
        geometries = [geometry_of(vllm_config, kv_cache_config, options, rank) for rank in ranks]
        self._scheduler = self._worker = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(geometries, options)
        else:
            layers = kv_cache_config.kv_cache_groups[0].layer_names
            self._worker = WorkerSide(geometries[0], layers, options, ranks[0])

    @property
    def requires_kv_delivery(self) -> bool:
        """Storage is a cache: a save that is dropped is a later miss. A hand-over that fails is loaded or computed."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are waited for and published from between the pieces."""
        return True

    # --- worker

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Describes vLLM's cache to the node."""
        self._here().register(kv_caches, self._kv_cache_config.num_blocks)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Waits until nothing uses the blocks of preempted requests."""
        assert isinstance(kv_connector_metadata, Orders)
        self._here().before_overwriting(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begins the step's loads: start_load_kv comes after the model where a step only publishes."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Orders)
        self._here().begin(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """They have begun; see bind_connector_metadata()."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Blocks until the layer is in place for all requests that compute while they load, or has failed."""
        self._here().wait(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any, **kwargs: Any) -> None:
        """Hands the layer over where a prompt ends in this step."""
        self._here().layer_done(layer_name)

    def wait_for_save(self) -> None:
        """Saves go on in the background; vLLM keeps the blocks until they are done."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks may be freed, and requests that have loaded, well or not."""
        sent, received = self._here().finished()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks to compute instead, or to fail for: ``kv_load_failure_policy`` says which."""
        return self._here().take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Which keys could not be read, for the scheduler not to look for them again."""
        return self._here().take_failures()

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        """Counters since the last call."""
        return self._worker.take_stats() if self._worker is not None else None

    def shutdown(self) -> None:
        """Ends loads, finishes saves, joins all threads. Idempotent."""
        if self._worker is not None:
            self._worker.close()

    # --- scheduler

    def on_new_request(self, request: "Request") -> None:
        """Looks at the request's ``kv_transfer_params``."""
        self._there().on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """What storage holds, or another server hands over, beyond the computed tokens."""
        return self._there().matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Orders the load."""
        self._there().allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Storage, or another server."""
        received = self._there().is_receiving(request)
        return {CacheHitSource.P2P if received else CacheHitSource.DISK: num_external_tokens}

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """The step's orders."""
        return self._there().orders(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Failed loads."""
        self._there().update(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Saves what is left; tells the router what the decode server needs."""
        return self._there().finished(request, block_ids)

    def reset_cache(self) -> bool:
        """Storage is shared and stays; a new ``namespace`` leaves it behind."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> "KVConnectorStats | None":
        """From what a worker sent."""
        return DualKVStats(data=data) if data is not None else DualKVStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> "KVConnectorPromMetrics":
        """``vllm:dualkv_*``."""
        return DualKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _here(self) -> WorkerSide:
        assert self._worker is not None, "vLLM called the worker's half in the scheduler"
        return self._worker

    def _there(self) -> SchedulerSide:
        assert self._scheduler is not None, "vLLM called the scheduler's half in a worker"
        return self._scheduler
