"""What SGLang needs to be imported, and to run HiCache, on a machine without a GPU. Import it before sglang.

Not SGLang's code, and nothing of dualkv: empty modules in place of wheels that exist for CUDA only, no registration
of host memory with a driver that is not there, and three of sgl_kernel's copies between device and host, as plain
torch. SGLang's scheduler, radix tree, host pools and storage threads run unchanged.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from transformers.utils import import_utils

_EMPTY = ("sgl_kernel", "torchaudio", "torchvision")


class _Empty(types.ModuleType):
    """A module that has whatever is asked of it, and nothing that works."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class _EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in _EMPTY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _rows(indices: torch.Tensor, page_size: int) -> list[int]:
    return indices.view(-1, page_size)[:, 0].tolist()


def _to_host(src_ptrs: list, dst_ptrs: list, src_indices: Any, dst_indices: Any, page_size: int) -> None:
    """transfer_kv_all_layer_direct_lf_pf: per layer tensors of tokens -> K and V of [page, layer, token, ...]."""
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, source in enumerate(src_ptrs):
        half, layer = dst_ptrs[i // layers], i % layers
        for row, at in zip(_rows(src_indices, page_size), _rows(dst_indices, page_size), strict=True):
            half[at // page_size, layer] = source[row : row + page_size]


def _to_device(
    src_ptrs: list, dst_ptrs: list, src_indices: Any, dst_indices: Any, layer_id: int, page_size: int
) -> None:
    """transfer_kv_per_layer_direct_pf_lf: one layer of [page, layer, token, ...] -> tensors of tokens."""
    for half, target in zip(src_ptrs, dst_ptrs, strict=True):
        for at, row in zip(_rows(src_indices, page_size), _rows(dst_indices, page_size), strict=True):
            target[row : row + page_size] = half[at // page_size, layer_id]


def _same_layout(src_layers: list, dst_layers: list, src_indices: Any, dst_indices: Any, page_size: int) -> None:
    """transfer_kv_direct: tensors of tokens to tensors of tokens."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def _patch_copies() -> None:
    from sglang.srt.mem_cache.pool_host import base, common, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # it leaves 10 GiB of the machine alone; the tests' pools are small
    common._cuda_host_register = lambda *_, **__: None
    common._cuda_host_unregister = mha._cuda_host_unregister = lambda *_, **__: None
    mha.transfer_kv_all_layer_direct_lf_pf = _to_host
    mha.transfer_kv_per_layer_direct_pf_lf = _to_device
    mha.transfer_kv_direct = _same_layout


def _settings() -> dict[str, str]:
    """SGLang's own: that there is no GPU, and which models not to import (all but one, which saves seconds)."""
    models = pathlib.Path(importlib.util.find_spec("sglang").submodule_search_locations[0], "srt", "models")
    others = [file.stem for file in models.glob("*.py") if file.stem != "llama"]
    return {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_DISABLED_MODEL_ARCHS": ",".join(others)}


def _install() -> None:
    os.environ.update(_settings())
    # transformers remembers that these are not there, before they seem to be.
    for known in ("is_torchvision_available", "is_torchvision_v2_available", "is_torchaudio_available"):
        getattr(import_utils, known)()
    sys.meta_path.insert(0, _EmptyModules())
    _patch_copies()


def patched() -> Sequence[str]:
    """What stands in for what, for logs."""
    return (*_EMPTY, "cudaHostRegister", "transfer_kv_all_layer_direct_lf_pf", "transfer_kv_per_layer_direct_pf_lf")


_install()
