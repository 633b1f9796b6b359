"""What ``kv_connector_extra_config`` may hold, and the geometry and namespace of a vLLM model's KV cache."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dualkv
from dualkv.errors import invalid
from dualkv.policy import POLICIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of :class:`dualkv.integrations.vllm.DualKVConnector`; docs/engines/vllm.md describes each."""

    store: str
    """Root of the block store, ``file:///directory``, shared by all servers of the model."""
    staging: int | str = "1GiB"
    """Size of the staging pool. A decode server's must hold the longest prompt that is handed to it."""
    name: str = ""
    """Of this server's node; the engine id if left out. Unique among servers."""
    listen: str = ""
    """Where other servers' nodes connect, ``tcp://host:port`` or ``shm:///path``; needed on decode servers."""
    load: str = "async"
    """``async``: a request waits for its KV while others compute. ``layerwise``: it computes layers as they come."""
    policy: str = "split"
    """Which node reads what, where the router says nothing: ``prefill_only``, ``decode_only``, ``split`` ..."""
    helpers: tuple[str, ...] = ()
    """Addresses of further nodes whose storage NICs may help."""
    save: bool = True
    """Whether this server saves full blocks."""
    namespace: str = ""
    """Added to what must be equal for KV to be shared; change it to leave old KV behind."""
    min_hit_blocks: int = 1
    """Shorter hits are computed instead of loaded."""
    deadline_s: float = 30
    """A load, a hand-over or a save has ended by then, well or not."""
    connect_s: float = 2
    """How long a hand-over waits for a decode server that is not connected yet."""
    forget_failed_s: float = 30
    """For so long a block that could not be read is not looked for again."""
    layers_per_read: int = 0
    """Layers that storage reads at once; 0 = whole blocks (see :meth:`dualkv.Node.load`)."""
    secret: str | None = None
    secret_file: str | None = None
    store_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    staging_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    node_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Options":
        """From ``kv_connector_extra_config``. Raises dualkv.Error for what is unknown or out of range."""
        given: Mapping[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise invalid(f"kv_connector_extra_config: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        if "store" not in given:
            raise invalid('kv_connector_extra_config: give "store": "file:///directory"')
        values = dict(given)
        values["helpers"] = tuple(values.get("helpers", ()))
        if not values.get("name"):
            values["name"] = str(vllm_config.kv_transfer_config.engine_id)
        options = cls(**values)
        if options.load not in ("async", "layerwise"):
            raise invalid(f"kv_connector_extra_config: load {options.load!r}: must be async or layerwise")
        if options.policy not in POLICIES:
            raise invalid(f"kv_connector_extra_config: policy {options.policy!r}: must be one of {', '.join(POLICIES)}")
        return options


def rank_of(vllm_config: "VllmConfig", worker: bool) -> list[int]:
    """Tensor-parallel ranks: this worker's, or all of them for the scheduler."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise dualkv.Error("vLLM: pipeline parallelism is not supported by this connector", "unsupported")
    if not worker:
        return list(range(parallel.tensor_parallel_size))
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return [int(get_tensor_model_parallel_rank())]


def rank_name(name: str, rank: int) -> str:
    """The name of a rank's node: each rank has its own."""
    return name if rank == 0 else f"{name}.{rank}"


def rank_address(address: str, rank: int) -> str:
    """Where a rank's node listens, from rank 0's address: the next ports, or paths with the rank at their end."""
    if not address or rank == 0:
        return address
    head, colon, port = address.rpartition(":")
    if address.startswith("tcp:") and colon and port.isdigit():
        return f"{head}:{int(port) + rank}" if int(port) else address
    return f"{address}.{rank}"


def geometry_of(
    vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", options: Options, rank: int
) -> dualkv.KvGeometry:
    """The geometry of a rank's KV cache: a Layer Block is the whole, opaque block of one attention layer.

    Raises:
        Error: ``unsupported`` for models whose KV is not one growing table of blocks.
    """
    layers = _layers_of(kv_cache_config)
    block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    hashed = getattr(kv_cache_config, "hash_block_size", None)
    if hashed not in (None, block_size):
        raise dualkv.Error(
            f"vLLM hashes blocks of {hashed} tokens and caches blocks of {block_size}: not supported", "unsupported"
        )
    return dualkv.KvGeometry(
        tokens_per_block=block_size,
        layer_bytes=[spec.page_size_bytes for spec in layers.values()],
        namespace=_namespace(vllm_config, kv_cache_config, layers, options, rank),
    )


def _layers_of(kv_cache_config: "KVCacheConfig") -> dict[str, Any]:
    """Spec of each attention layer, in the order of the model."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise dualkv.Error(
            f"vLLM: this model has {len(groups)} KV cache groups; start it with --disable-hybrid-kv-cache-manager, "
            "if it can be",
            "unsupported",
        )
    spec = groups[0].kv_cache_spec
    per_layer = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(groups[0].layer_names, spec)
    other = {type(one).__name__ for one in per_layer.values() if not isinstance(one, FullAttentionSpec)}
    if other:
        raise dualkv.Error(
            f"vLLM: KV of {', '.join(sorted(other))} is not supported, only full attention", "unsupported"
        )
    return {name: per_layer[name] for name in groups[0].layer_names}


def _namespace(
    vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", layers: dict[str, Any], options: Options, rank: int
) -> str:
    """All that must be equal for one server's blocks to be right on another.

    vLLM's block hashes hold the tokens, and LoRA, multi-modal and salt of the request, but nothing of the model.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    spec = next(iter(layers.values()))
    parts = [
        "vllm",
        _weights(model),
        f"dtype={spec.dtype}",
        f"cache={cache.cache_dtype}",
        f"block={spec.block_size}",
        f"heads={getattr(spec, 'num_kv_heads', 0)}x{getattr(spec, 'head_size', 0)}",
        f"layers={len(layers)}",
        f"tp={rank}/{parallel.tensor_parallel_size}",
        f"layout={_layout(vllm_config, kv_cache_config, spec)}",
        f"hash={getattr(cache, 'prefix_caching_hash_algo', '')}",
        options.namespace,
    ]
    return "/".join(parts)


def _layout(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", spec: Any) -> str:
    """How the bytes of a block are ordered: on CPUs it depends on the instruction set that the kernels use."""
    from vllm.platforms import current_platform

    layout = f"{current_platform.device_type}-{kv_cache_config.kv_cache_layout}"
    if not current_platform.is_cpu():
        return layout
    from vllm.v1.attention.backends import cpu_attn

    cache_dtype = vllm_config.cache_config.cache_dtype
    isa = cpu_attn._get_attn_isa(vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache_dtype)
    return f"{layout}-{isa}"


_SAMPLE_BYTES = 1 << 16


def _weights(model: Any) -> str:
    """A fingerprint of the weights: of samples of local files, or the revision of a model on a hub."""
    folder = pathlib.Path(str(model.model))
    if not folder.is_dir():
        return f"{model.model}@{model.revision or 'main'}"
    import hashlib

    digest = hashlib.blake2b(digest_size=12)
    files = [path for kind in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in sorted(folder.glob(kind))]
    for path in [*files, folder / "config.json"]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in range(4):
                file.seek(max(0, (size - _SAMPLE_BYTES) * part // 3))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"weights={digest.hexdigest()}"
