"""What reference engines compute with: a real torch model, or a calibrated wait over recognisable bytes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

import dualkv

TokenArray: TypeAlias = "np.ndarray[Any, Any]"
Mark: TypeAlias = Callable[[], float]
"""When something happened, on ``time.monotonic()``'s clock; to be asked when it has."""


def host_mark() -> Mark:
    """Now."""
    now_s = time.monotonic()
    return lambda: now_s


@dataclass
class _GpuMark:
    """The GPU's clock has another zero: what has passed since the event, by now, tells when it was."""

    event: Any
    now: Any
    stream: Any

    def seconds(self) -> float:
        self.now.record(self.stream)
        self.now.synchronize()
        return time.monotonic() - float(self.event.elapsed_time(self.now)) / 1e3


class TorchCompute:
    """Runs a model of ``models.py`` on one CPU thread, or on a GPU (``device="cuda:0"``); its paged cache is there."""

    def __init__(self, config: Any, tokens_per_block: int, block_count: int, device: str = "cpu") -> None:
        import torch

        from dualkv.engines import models

        torch.set_num_threads(1)
        self._torch = torch
        self._models = models
        self.block_count = block_count
        self._device = torch.device(device)
        self.model = models.build(config, device)
        self.geometry = dualkv.KvGeometry(
            layers=config.layers,
            tokens_per_block=tokens_per_block,
            layer_bytes=config.layer_bytes(tokens_per_block),
            namespace=f"reference-{config}",
        )
        self.cache = config.new_cache(block_count, tokens_per_block, device)
        two_planes = config.kind == "gqa"
        self.kv = dualkv.PagedKv(self.geometry, [(t[0], t[1]) if two_planes else t for t in self.cache])

    @property
    def stream(self) -> Any:
        """See ``Compute.stream``: torch's current one."""
        return self._torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def mark(self) -> Mark:
        """See ``Compute.mark``: an event on the stream, so that nothing waits for the GPU until it is read."""
        if self._device.type != "cuda":
            return host_mark()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return _GpuMark(event, self._torch.cuda.Event(enable_timing=True), self.stream).seconds

    def _tensor(self, values: Any) -> Any:
        return self._torch.as_tensor(np.asarray(values, dtype=np.int64))

    def prefill(
        self,
        tokens: TokenArray,
        start: int,
        block_ids: Sequence[int],
        before_layer: Callable[[int], None],
        after_layer: Callable[[int], None],
    ) -> int:
        """See ``Compute.prefill``."""
        table = self._tensor(block_ids)
        logits = self.model.prefill(self._tensor(tokens[start:]), start, table, self.cache, before_layer, after_layer)
        return int(self._models.greedy(self.model, logits))

    def fill(self, tokens: TokenArray, block_ids: Sequence[int]) -> None:
        """See ``Compute.fill``."""
        self.prefill(tokens, 0, block_ids, lambda _layer: None, lambda _layer: None)

    def decode(self, tokens: TokenArray, block_ids: Sequence[int]) -> int:
        """See ``Compute.decode``."""
        table = self._tensor(block_ids)
        logits = self.model.decode(int(tokens[-1]), len(tokens) - 1, table, self.cache)
        return int(self._models.greedy(self.model, logits))

    def wrong_blocks(self, tokens: TokenArray, block_ids: Sequence[int]) -> int:
        """Tokens tell: the caller compares them with generation that uses no cache."""
        return 0

    def wrong_tokens(self, tokens: TokenArray, spans: Sequence[tuple[int, int]]) -> list[int]:
        """For each (begin, end): tokens in it that no-cache generation would not have produced.

        One dense pass over the whole conversation gives the logits after every prefix.
        """
        best = self.model.all_logits(self._tensor(tokens)).argmax(dim=-1).cpu().numpy()
        return [int((best[begin - 1 : end - 1] != np.asarray(tokens[begin:end])).sum()) for begin, end in spans]


@dataclass(frozen=True)
class ModelledCosts:
    """Seconds of compute. The defaults are those of the 16-layer GQA reference model on one thread of a 2025 EPYC
    (docs/performance.md), so that a modelled run keeps the proportions of a real one."""

    prefill_token_s: float = 6e-4
    prefill_token_pair_s: float = 1e-6  # per new token and context token
    decode_s: float = 8e-3
    decode_context_s: float = 5e-6  # per context token


class ModelledCompute:
    """Compute is a wait; KV is a pattern of the block's key and layer, written and checked byte for byte."""

    def __init__(
        self, layers: int, layer_bytes: int, tokens_per_block: int, block_count: int, costs: ModelledCosts
    ) -> None:
        self.block_count = block_count
        self.costs = costs
        self.geometry = dualkv.KvGeometry(
            layers=layers, tokens_per_block=tokens_per_block, layer_bytes=layer_bytes, namespace="modelled"
        )
        words = layer_bytes // 8
        self.cache = np.zeros((layers, block_count, words), dtype=np.uint64)
        self.kv = dualkv.PagedKv(self.geometry, list(self.cache))
        self.stream = None
        self._ramp = np.arange(words, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._wrong = 0

    def mark(self) -> Mark:
        """See ``Compute.mark``."""
        return host_mark()

    def _names(self, tokens: TokenArray) -> list[int]:
        """A number for each block's content: of its key, or of what a partly filled last block holds."""
        keys = dualkv.block_keys(tokens, self.geometry)
        names = [int.from_bytes(key[:6], "little") for key in keys]
        rest = np.ascontiguousarray(tokens[len(keys) * self.geometry.tokens_per_block :])
        if len(rest):
            before = keys[-1] if keys else b""
            names.append(dualkv.checksum(before + rest.tobytes()) >> 16)
        return names

    def _pattern(self, name: int, layer: int) -> TokenArray:
        return np.bitwise_xor(self._ramp, np.uint64(name * 1024 + layer))

    def prefill(
        self,
        tokens: TokenArray,
        start: int,
        block_ids: Sequence[int],
        before_layer: Callable[[int], None],
        after_layer: Callable[[int], None],
    ) -> int:
        """See ``Compute.prefill``."""
        names = self._names(tokens)
        hit = start // self.geometry.tokens_per_block
        new = len(tokens) - start
        costs = self.costs
        layer_s = new * (costs.prefill_token_s + costs.prefill_token_pair_s * len(tokens)) / self.geometry.layers
        for layer in range(self.geometry.layers):
            before_layer(layer)
            began = time.monotonic()
            for name, block in zip(names[:hit], block_ids, strict=False):
                self._wrong += not np.array_equal(self.cache[layer, block], self._pattern(name, layer))
            for name, block in zip(names[hit:], block_ids[hit:], strict=True):
                self.cache[layer, block] = self._pattern(name, layer)
            time.sleep(max(0.0, layer_s - (time.monotonic() - began)))
            after_layer(layer)
        return names[-1] % 50021

    def fill(self, tokens: TokenArray, block_ids: Sequence[int]) -> None:
        """See ``Compute.fill``; takes no modelled time."""
        for layer in range(self.geometry.layers):
            for name, block in zip(self._names(tokens), block_ids, strict=True):
                self.cache[layer, block] = self._pattern(name, layer)

    def decode(self, tokens: TokenArray, block_ids: Sequence[int]) -> int:
        """See ``Compute.decode``."""
        time.sleep(self.costs.decode_s + self.costs.decode_context_s * len(tokens))
        names = self._names(tokens)
        block = block_ids[len(names) - 1]
        if len(tokens) % self.geometry.tokens_per_block == 0:
            for layer in range(self.geometry.layers):
                self.cache[layer, block] = self._pattern(names[-1], layer)
        return names[-1] % 50021

    def wrong_blocks(self, tokens: TokenArray, block_ids: Sequence[int]) -> int:
        """Blocks with a wrong byte: those given, and those prefill has met since the last call."""
        wrong, self._wrong = self._wrong, 0
        for name, block in zip(self._names(tokens), block_ids, strict=False):
            wrong += any(
                not np.array_equal(self.cache[layer, block], self._pattern(name, layer))
                for layer in range(self.geometry.layers)
            )
        return wrong
