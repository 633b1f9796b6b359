"""What an engine stored, changed between two runs of it."""

import os
import pathlib
from typing import Any

import sglang_shim  # noqa: F401  before sglang
import torch
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang_pools import Shape, backend, config, indices_of, mha_pool


def apply(damage: dict[str, Any], model: str, prompts: dict[str, list[int]], page_size: int) -> dict[str, Any]:
    """Changes the pages of three prompts in ``damage["store"]``; returns what was done.

    ``noise``: every page is replaced by noise, saved through the storage backend under the same keys, so that its
    checksums are right. ``raw``: noise is written into the file of page ``damage["page"]``. ``missing``: that page's
    file is removed.
    """
    store, page = damage["store"], damage["page"]
    shape = Shape(layers=4, heads=2, dim=32, page=page_size, pages=32)  # of tiny_models' llama
    keys = {name: get_storage_hash_str(tokens, page_size=page_size) for name, tokens in prompts.items()}
    rewritten = _noise_with_checksums(store, model, shape, keys["noise"][: len(prompts["noise"]) // page_size])
    damaged = _file_of(store, keys["raw"][page])
    with damaged.open("r+b") as file:
        file.write(os.urandom(page_size * shape.heads * shape.dim * 4))  # K of the first layer
    _file_of(store, keys["missing"][page]).unlink()
    return {"rewritten": rewritten, "damaged": str(damaged)}


def _file_of(store: str, key: str) -> pathlib.Path:
    (file,) = pathlib.Path(store).glob(f"*/{key[:2]}/{key}.kv")
    return file


def _noise_with_checksums(store: str, model: str, shape: Shape, keys: list[str]) -> bool:
    """As the engine's own backend would save it; True if all is stored, in the engine's namespace."""
    before = len(list(pathlib.Path(store).iterdir()))
    for key in keys:
        _file_of(store, key).unlink()
    torch.manual_seed(5)
    pool = mha_pool("page_first_direct", shape=shape)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    one = backend(store, pool, config(tp_size=1, model_name=model))
    saved = one.batch_set_v1(keys, indices_of(list(range(len(keys))), shape.page))
    one.close()
    return all(saved) and len(list(pathlib.Path(store).iterdir())) == before
