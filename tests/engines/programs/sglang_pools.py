"""Host pools of SGLang's own, and storage backends made by its own factory, for the programs beside this file.

A page's bytes are always read through SGLang (get_page_buffer_meta, get_data_page), never through dualkv's view.
"""

import ctypes
import dataclasses
import hashlib
from typing import Any

import sglang_shim  # noqa: F401  before sglang
import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a pool's KV. ``pages`` that fit; SGLang adds one."""

    layers: int = 3
    heads: int = 2
    dim: int = 8
    page: int = 4
    pages: int = 16

    @property
    def tokens(self) -> int:
        return self.page * self.pages

    def arguments(self) -> dict[str, Any]:
        """What every host pool is told."""
        return {
            "host_to_device_ratio": 1.0,
            "host_size": 0,
            "page_size": self.page,
            "pin_memory": False,
            "device_capacity_tokens": self.tokens,
            "start_layer": 0,
            "end_layer": self.layers - 1,
        }


SMALL = Shape()


def mha_pool(layout: str, dtype: torch.dtype = torch.float32, v_dim: int = 0, shape: Shape = SMALL) -> Any:
    """A host pool of plain attention, filled with noise. ``v_dim``: where V is not as wide as K."""
    k = tuple(torch.zeros(shape.tokens, shape.heads, shape.dim, dtype=dtype) for _ in range(shape.layers))
    v = tuple(torch.zeros(shape.tokens, shape.heads, v_dim or shape.dim, dtype=dtype) for _ in range(shape.layers))
    info = MHABufferInfo(
        buffers=KVBuffers(k=k, v=v, k_data_ptrs=_pointers(k), v_data_ptrs=_pointers(v), layout=KVBufferLayout.NHD),
        page_size=shape.page,
        head_num=shape.heads,
        head_dim=shape.dim,
        v_head_dim=v_dim or shape.dim,
        dtype=dtype,
        device=CPU,
    )
    kind = AsymmetricMHATokenToKVPoolHost if v_dim else MHATokenToKVPoolHost
    return filled(kind(info, layout=layout, **shape.arguments()))


def mla_pool(layout: str, dtype: torch.dtype = torch.float32, shape: Shape = SMALL) -> Any:
    """A host pool of latent attention, filled with noise."""
    rows = tuple(torch.zeros(shape.tokens, 1, 24, dtype=dtype) for _ in range(shape.layers))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(shape.layers)),
        device_layer_num=shape.layers,
        page_size=shape.page,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=dtype,
        device=CPU,
    )
    return filled(MLATokenToKVPoolHost(info, layout=layout, target_layer_num=shape.layers, **shape.arguments()))


def _pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def _buffers(pool: Any) -> list[torch.Tensor]:
    return list(pool.kv_buffer) if isinstance(pool.kv_buffer, tuple) else [pool.kv_buffer]


def filled(pool: Any) -> Any:
    """The pool, with noise in it."""
    for buffer in _buffers(pool):
        buffer.copy_((torch.rand(buffer.shape) * 200).to(buffer.dtype))
    return pool


def cleared(pool: Any) -> Any:
    """The pool, with zeros in it."""
    for buffer in _buffers(pool):
        buffer.zero_()
    return pool


def indices_of(pages: list[int], page_size: int = SMALL.page) -> torch.Tensor:
    """The token indices that SGLang names these pages by."""
    return torch.cat([torch.arange(page * page_size, (page + 1) * page_size) for page in pages])


def page_bytes(pool: Any, page: int) -> bytes:
    """A page as SGLang's zero-copy interface sees it."""
    pointers, sizes = pool.get_page_buffer_meta(indices_of([page], pool.page_size))
    return b"".join(ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True))


def same(pool: Any, pages: list[int], other: Any, other_pages: list[int]) -> list[bool]:
    """Whether pages of two pools are equal, byte by byte."""
    return [page_bytes(pool, a) == page_bytes(other, b) for a, b in zip(pages, other_pages, strict=True)]


def keys_of(chain: str, count: int) -> list[str]:
    """Page hashes of the form SGLang makes."""
    keys: list[str] = []
    for i in range(count):
        keys.append(hashlib.sha256(f"{keys[-1] if keys else chain}{i}".encode()).hexdigest())
    return keys


def config(mla: bool = False, metrics: bool = False, **changed: Any) -> HiCacheStorageConfig:
    """Of a rank of an engine."""
    values = {
        "tp_rank": 0,
        "tp_size": 2,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": mla,
        "enable_storage_metrics": metrics,
        "is_page_first_layout": False,
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(**{**values, **changed})


def backend(root: str, pool: Any, settings: HiCacheStorageConfig | None = None, **options: Any) -> Any:
    """As SGLang makes one: through the factory, then the pool is registered."""
    settings = settings or config()
    settings.extra_config = {
        "backend_name": "dualkv",
        "module_path": "dualkv.integrations.sglang",
        "class_name": "DualKVHiCache",
        "interface_v1": 1,
        "store": f"file://{root}",
        "staging": "1MiB",
        **options,
    }
    made = StorageBackendFactory.create_backend("dynamic", settings, pool)
    made.register_mem_pool_host(pool)
    made.register_mem_host_pool_v2(pool, PoolName.KV)
    made.on_host_pools_registered()
    return made
