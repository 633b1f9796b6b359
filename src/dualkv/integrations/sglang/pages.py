"""SGLang's host pools and page hashes as dualkv sees them: planes, a namespace, keys."""

import hashlib
import json
import re
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.runtime_context import get_server_args

from dualkv.errors import Error


def key_of(page_hash: str) -> bytes:
    """A page's key: SGLang's SHA-256 as it is; anything else is hashed."""
    if re.fullmatch(r"[0-9a-f]{64}", page_hash):
        return bytes.fromhex(page_hash)
    return hashlib.blake2b(page_hash.encode(), digest_size=32).digest()


def parent_of(extra_info: HiCacheStorageExtraInfo | None) -> bytes:
    """The key before a batch's first, if SGLang says (``hicache_storage_pass_prefix_keys``)."""
    before = extra_info.prefix_keys if extra_info is not None else None
    return key_of(before[-1]) if before else b""


class Pages:
    """A host pool as dualkv sees it: for each layer, planes whose first axis is the page. Views, no copy.

    ``order`` names the order of a page's bytes in storage. Layouts that keep a layer's rows of a page together share
    one, ``layers``: their pages are the same file. In the others a page is one layer.

    Raises:
        Error: ``unsupported`` for memory that is anything but what the layout says.
    """

    def __init__(self, pool: Any) -> None:
        self._check_pool(pool)
        self.is_mla = hasattr(pool, "kv_cache_dim")
        self.tokens = int(pool.page_size)
        self.layers = int(pool.layer_num)
        self.heads = 1 if self.is_mla else int(pool.head_num)
        self.dims = [pool.kv_cache_dim] if self.is_mla else [pool.head_dim, pool.v_head_dim]
        halves = [pool.kv_buffer] if self.is_mla else list(pool.kv_buffer)
        self._check_memory(pool, halves)
        self.order, self.planes = self._planes_of(pool, halves)

    def _check_pool(self, pool: Any) -> None:
        what = type(pool).__name__
        plain = hasattr(pool, "kv_cache_dim") or (hasattr(pool, "head_num") and hasattr(pool, "v_head_dim"))
        if not plain or getattr(pool, "kv_buffer", None) is None:
            raise Error(f"sglang: {what} does not keep plain KV in memory of its own", "unsupported")
        if pool.dcp_size > 1:
            raise Error(f"sglang: {what} with dcp_size = {pool.dcp_size} is not supported", "unsupported")
        if pool.shared_allocation_domain is not None:
            raise Error(f"sglang: the memory of {what} can move; that is not supported", "unsupported")

    def _check_memory(self, pool: Any, halves: list[Any]) -> None:
        what = f"{type(pool).__name__} of layout {pool.layout!r}"
        if len(halves) != len(self.dims):
            raise Error(f"sglang: {what}: {len(halves)} buffers, {len(self.dims)} are expected", "unsupported")
        for half, dim in zip(halves, self.dims, strict=True):
            expected = self._shape_of(pool, dim)
            shape = tuple(half.shape)
            if shape != expected or half.device.type != "cpu" or not half.is_contiguous():
                raise Error(
                    f"sglang: {what}: {shape} on {half.device}; contiguous {expected} on the CPU is expected",
                    "unsupported",
                )
        seen, all_bytes = sum(half.nbytes for half in halves), pool.size * pool.size_per_token
        if seen != all_bytes:  # scales, or another state of a page, lie elsewhere
            raise Error(f"sglang: {what}: its buffers hold {seen} of its {all_bytes} bytes", "unsupported")

    def _shape_of(self, pool: Any, dim: int) -> tuple[int, ...]:
        shapes: dict[str, tuple[int, ...]] = {
            "layer_first": (self.layers, pool.size, self.heads, dim),
            "page_first": (pool.size, self.layers, self.heads, dim),
            "page_first_direct": (pool.page_num, self.layers, self.tokens, self.heads, dim),
            "page_head": (pool.page_num, self.heads, self.tokens, self.layers, dim),
        }
        if pool.layout not in shapes:
            raise Error(f"sglang: layout {pool.layout!r} is not one of {', '.join(sorted(shapes))}", "unsupported")
        return shapes[pool.layout]

    def _planes_of(self, pool: Any, halves: list[Any]) -> tuple[str, list[list[Any]]]:
        paged = (pool.page_num, self.tokens)
        if pool.layout == "layer_first":
            return "layers", [[half[i].unflatten(0, paged) for half in halves] for i in range(self.layers)]
        if pool.layout == "page_first_direct":
            return "layers", [[half[:, i] for half in halves] for i in range(self.layers)]
        if pool.layout == "page_first":
            return "page_first", [[half.unflatten(0, paged) for half in halves]]
        return "page_head", [halves]

    @property
    def layer_bytes(self) -> list[int]:
        """Of each of dualkv's layers, for one page."""
        return [sum(plane[0].nbytes for plane in layer) for layer in self.planes]

    def planes_in(self, flat: Any) -> list[list[Any]]:
        """The same planes in a tensor of one page, as ``get_data_page()`` makes it: all of K, then all of V."""
        layers: list[list[Any]] = [[] for _ in self.planes]
        at = 0
        for half in range(len(self.dims)):
            for i, planes in enumerate(self.planes):
                size = planes[half][0].nbytes
                layers[i].append(flat[at : at + size].view(1, size))
                at += size
        return layers


def namespace_of(name: str, pool: Any, pages: Pages, config: HiCacheStorageConfig, salt: str) -> str:
    """Everything that must be equal for pages to be interchangeable, in at most 256 bytes."""
    replicated = config.is_mla_model and pages.is_mla  # every TP rank has the same KV, and one of them saves it
    facts = {
        "model": config.model_name,
        "pool": name,
        "salt": salt,
        "dtype": _dtype_of(pool),
        "order": pages.order,
        "mla": pages.is_mla,
        "page": pages.tokens,
        "layers": [pages.layers, getattr(pool, "target_layer_num", pages.layers), pool.start_layer],
        "heads": pages.heads,
        "dims": pages.dims,
        "tp": None if replicated else [config.tp_rank, config.tp_size],
        "pp": [config.pp_rank, config.pp_size],
        "cp": [config.attn_cp_rank, config.attn_cp_size],
    }
    text = json.dumps(facts)
    return f"sglang/{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} {text}"[:256]


def _dtype_of(pool: Any) -> str:
    name = str(pool.dtype).removeprefix("torch.")
    if pool.dtype.itemsize > 1:
        return name
    # All 8-bit formats lie in uint8 tensors: what the bytes mean depends on the server's arguments and the platform.
    try:
        meaning = get_server_args().kv_cache_dtype
    except ValueError as error:
        raise Error(f"sglang: the meaning of the KV's {name} is not known: {error}", "unsupported") from error
    return f"{name}/{meaning}{'/hip' if torch.version.hip else ''}"
