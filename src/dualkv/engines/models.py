"""Two small reference decoders with a paged KV cache, for showing how an engine moves KV.

Weights are random but fixed by ``ModelConfig.seed``, and all arithmetic is fp32, on the CPU or on a GPU. A pass
goes layer by layer with a hook on each side of attention: in ``before_layer`` an engine waits until
that layer of a loaded prefix has arrived, in ``after_layer`` it publishes the layer just written.

* ``GqaDecoder``: Llama style. RMSNorm, rotary positions, grouped-query attention, SwiGLU.
* ``MlaDecoder``: DeepSeek style multi-head latent attention. A token's cache entry is one latent
  vector and one rotary key shared by all heads; attention runs against it without decompressing.

Letters in shapes: n new tokens, t = start + n tokens in all, H hidden, h heads, kv key/value heads,
g = h / kv query heads per key/value head, d head dimension, l latent dimension, r rotary dimension.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LayerHook = Callable[[int], None]
Parts = tuple[Tensor, ...]
Weights = dict[str, Tensor]

QUERY_CHUNK = 64  # queries per attention step: bounds the score matrix, keeps it near the core
QUERY_GAIN = 3.0  # random queries and keys attend almost evenly; this makes attention pick


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. "gqa" ignores latent_dim and rope_dim, "mla" ignores kv_heads."""

    kind: Literal["gqa", "mla"] = "gqa"
    layers: int = 16
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 128
    latent_dim: int = 512
    rope_dim: int = 64
    mlp_hidden: int = 512
    vocab: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("gqa", "mla"):
            raise ValueError(f"kind must be 'gqa' or 'mla', not {self.kind!r}")
        if self.kind == "gqa" and self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")

    @property
    def token_bytes(self) -> int:
        """Bytes of KV that one token takes in one layer, all planes."""
        return self.layer_bytes(1)

    def layer_bytes(self, tokens_per_block: int) -> int:
        """Bytes of KV that one block takes in one layer, all planes."""
        return 4 * math.prod(self.layer_shape(1, tokens_per_block))

    def layer_shape(self, num_blocks: int, tokens_per_block: int) -> tuple[int, ...]:
        """Shape of one layer's cache: the K and V planes apart (gqa), or one plane (mla)."""
        if self.kind == "gqa":
            return (2, num_blocks, tokens_per_block, self.kv_heads, self.head_dim)
        return (num_blocks, tokens_per_block, self.latent_dim + self.rope_dim)

    def new_cache(self, num_blocks: int, tokens_per_block: int, device: str = "cpu") -> list[Tensor]:
        """An empty paged cache: one fp32 tensor of ``layer_shape`` for each layer."""
        shape = self.layer_shape(num_blocks, tokens_per_block)
        return [torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(self.layers)]


class Scratch(threading.local):
    """Buffers of a thread for large intermediates: fresh memory costs more than the copies do."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, device: torch.device, *shape: int) -> Tensor:
        size = math.prod(shape)
        key = name, device
        if key not in self.buffers or len(self.buffers[key]) < size:
            self.buffers[key] = torch.empty(size, dtype=torch.float32, device=device)
        return self.buffers[key][:size].view(shape)


scratch = Scratch()


class Pages:
    """Where one sequence's tokens lie in a paged plane ``[num_blocks, tokens_per_block, ...]`` of a device.

    ``block_table`` is on the CPU, so that no GPU is waited for.
    """

    def __init__(
        self, block_table: Tensor, start: int, total: int, tokens_per_block: int, device: torch.device
    ) -> None:
        used = -(-total // tokens_per_block)
        if len(block_table) < used:
            raise ValueError(f"{total} tokens need {used} blocks, got {len(block_table)}")
        ids = block_table[:used]
        listed = ids.tolist()
        run = range(listed[0], listed[0] + used)
        self.run = slice(run.start, run.stop) if listed == list(run) else None
        self.ids, self.total = ids.to(device), total
        positions = torch.arange(start, total, device=device)
        self.slots = self.ids[positions // tokens_per_block], positions % tokens_per_block

    def write(self, plane: Tensor, new: Tensor) -> None:
        """Store new ``[n, ...]``, the entries of positions start to total."""
        plane[self.slots] = new

    def read(self, plane: Tensor, name: str) -> Tensor:
        """All entries ``[total, ...]``: a view where the blocks lie in a row, else one gather."""
        if self.run is not None:
            return plane[self.run].flatten(0, 1)[: self.total]
        gathered = scratch.take(name, plane.device, len(self.ids), *plane.shape[1:])
        return torch.index_select(plane, 0, self.ids, out=gathered).flatten(0, 1)[: self.total]


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotary_table(positions: Tensor, dim: int) -> Parts:
    """Cosines and sines ``[n, 1, dim / 2]`` of positions ``[n]``; the middle axis is for heads."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = (positions.double()[:, None] * frequency)[:, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotary: Parts) -> Tensor:
    """Rotary position embedding of x ``[n, heads, dim]``, its halves paired."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def cached_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n tokens over all t, without repeating K or V for a group.

    q ``[kv, g, n, d]`` (already scaled), k ``[t, kv, d]``, v ``[t, kv, dv]`` -> ``[kv, g, n, dv]``.
    The queries of a group are rows of one matrix product; k and v are read where they lie.
    """
    kv, group, n, dim = q.shape
    out = []
    for low in range(0, n, QUERY_CHUNK):
        rows = min(QUERY_CHUNK, n - low)
        seen = len(k) - n + low + rows
        q_rows = q[:, :, low : low + rows].reshape(kv, group * rows, dim)
        scores = scratch.take("scores", q.device, kv, group * rows, seen)
        torch.bmm(q_rows, k[:seen].permute(1, 2, 0), out=scores)
        if rows > 1:  # all rows see the past; only the last `rows` columns need the triangle
            future = torch.full((rows, rows), float("-inf"), device=q.device).triu(1)
            scores.view(kv, group, rows, seen)[..., seen - rows :] += future
        chosen = torch.softmax(scores, -1, out=scratch.take("chosen", q.device, *scores.shape))
        out.append(torch.bmm(chosen, v[:seen].permute(1, 0, 2)).view(kv, group, rows, -1))
    return torch.cat(out, dim=2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention within a whole sequence, every head with its own K and V.

    q, k ``[n, h, d]``, v ``[n, h, dv]`` -> ``[n, h * dv]``. Scores one chunk of queries at a time.
    """
    out, position = [], torch.arange(len(q), device=q.device)
    for low in range(0, len(q), 256):
        high = min(low + 256, len(q))  # no query of this chunk sees further
        scores = torch.einsum("qhd,khd->hqk", q[low:high] * q.shape[-1] ** -0.5, k[:high])
        scores.masked_fill_(position[:high] > position[low:high, None], float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:high]).flatten(1))
    return torch.cat(out)


class Decoder(ABC):
    """What both decoders share: embedding, residual stream, SwiGLU, head, and the layer loop."""

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self.config = c = config
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(c.seed)
        self.embedding = self._random(c.vocab, c.hidden)
        self.head = self._random(c.vocab, c.hidden)
        self.layers: list[Weights] = []
        branch = (2 * c.layers) ** -0.5  # the branches together grow to the embedding's size
        for _ in range(c.layers):
            common = {
                "out": self._matrix(c.hidden, c.heads * c.head_dim, gain=2 * branch),
                "gate_up": self._matrix(2 * c.mlp_hidden, c.hidden),
                "down": self._matrix(c.hidden, c.mlp_hidden, gain=branch),
            }
            self.layers.append(common | self._attention_weights())

    def _random(self, *shape: int) -> Tensor:
        """Uniform, variance 1 (not normal: that would differ in the last bits between CPUs)."""
        on_cpu = (torch.rand(shape, generator=self._generator) - 0.5) * math.sqrt(12)
        return on_cpu.to(self.device)

    def _matrix(self, *shape: int, gain: float = 1.0) -> Tensor:
        """``[..., out, in]`` that maps vectors of unit size to vectors of size `gain`."""
        return self._random(*shape) * (gain / math.sqrt(shape[-1]))

    @abstractmethod
    def _attention_weights(self) -> Weights:
        """The weights of one layer that only this kind has."""

    @abstractmethod
    def _project(self, w: Weights, x: Tensor, rotary: Parts) -> Parts:
        """Queries and cache entries of x ``[n, H]``."""

    @abstractmethod
    def _cached(self, w: Weights, parts: Parts, cache: Tensor, pages: Pages) -> Tensor:
        """Write the new entries into the cache, then attend over all of them: ``[n, h * d]``."""

    @abstractmethod
    def _dense(self, w: Weights, parts: Parts) -> Tensor:
        """Attend within the projected tokens, which are a whole sequence: ``[n, h * d]``."""

    def _rotary(self, start: int, total: int) -> Parts:
        """The rotary table of positions start to total."""
        dim = self.config.head_dim if self.config.kind == "gqa" else self.config.rope_dim
        return rotary_table(torch.arange(start, total, device=self.device), dim)

    def _residual(self, w: Weights, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer after attention: output projection and SwiGLU, both added to x."""
        x = x + F.linear(attended, w["out"])
        gate, up = F.linear(rms_norm(x), w["gate_up"]).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, w["down"])

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        start: int,
        block_table: Tensor,
        cache: list[Tensor],
        before_layer: LayerHook | None = None,
        after_layer: LayerHook | None = None,
    ) -> Tensor:
        """Run new tokens ``[n]`` at positions start.. against the cache: last logits ``[vocab]``.

        tokens and block_table are on the CPU, the cache and the logits on the model's device.
        block_table holds the block ids of the sequence, at least enough for start + n tokens. Layer
        i of the cache is neither read nor written before ``before_layer(i)`` has returned, and is
        complete up to token start + n when ``after_layer(i)`` is called; on a GPU both are meant in
        the order of its stream.
        """
        total = start + len(tokens)
        pages = Pages(block_table, start, total, cache[0].shape[-3 + (self.config.kind == "mla")], self.device)
        rotary = self._rotary(start, total)
        x = self.embedding[tokens.to(self.device)]
        for i, w in enumerate(self.layers):
            parts = self._project(w, rms_norm(x), rotary)
            if before_layer is not None:
                before_layer(i)
            attended = self._cached(w, parts, cache[i], pages)
            if after_layer is not None:
                after_layer(i)
            x = self._residual(w, x, attended)
        return F.linear(rms_norm(x[-1]), self.head)

    def decode(self, token: int, position: int, block_table: Tensor, cache: list[Tensor]) -> Tensor:
        """A prefill of the one token at `position`: its logits ``[vocab]``."""
        return self.prefill(torch.tensor([token]), position, block_table, cache)

    @torch.inference_mode()
    def all_logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of a whole sequence ``[n]``, computed without any cache."""
        rotary = self._rotary(0, len(tokens))
        x = self.embedding[tokens.to(self.device)]
        for w in self.layers:
            x = self._residual(w, x, self._dense(w, self._project(w, rms_norm(x), rotary)))
        return F.linear(rms_norm(x), self.head)


class GqaDecoder(Decoder):
    """Grouped-query attention over a cache ``[2, num_blocks, tokens, kv, d]`` per layer."""

    def _attention_weights(self) -> Weights:
        c = self.config
        return {
            "q": self._matrix(c.heads * c.head_dim, c.hidden, gain=QUERY_GAIN),
            "k": self._matrix(c.kv_heads * c.head_dim, c.hidden),
            "v": self._matrix(c.kv_heads * c.head_dim, c.hidden),
        }

    def _project(self, w: Weights, x: Tensor, rotary: Parts) -> Parts:
        """q ``[n, h, d]``, k and v ``[n, kv, d]``."""
        q, k, v = (F.linear(x, w[i]).view(len(x), -1, self.config.head_dim) for i in "qkv")
        return rotate(q, rotary), rotate(k, rotary), v

    def _cached(self, w: Weights, parts: Parts, cache: Tensor, pages: Pages) -> Tensor:
        q, k, v = parts
        pages.write(cache[0], k)
        pages.write(cache[1], v)
        n, h, d = q.shape
        groups = (q * d**-0.5).view(n, -1, h // self.config.kv_heads, d).permute(1, 2, 0, 3)
        out = cached_attention(groups, pages.read(cache[0], "k"), pages.read(cache[1], "v"))
        return out.permute(2, 0, 1, 3).flatten(1)

    def _dense(self, w: Weights, parts: Parts) -> Tensor:
        q, k, v = parts
        group = self.config.heads // self.config.kv_heads
        return dense_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


class MlaDecoder(Decoder):
    """Multi-head latent attention over a cache ``[num_blocks, tokens, l + r]`` per layer.

    An entry is the normalised latent c ``[l]`` followed by the rotated shared key ``[r]``. Head j
    would expand c to the key ``key_up[j] @ c`` and the value ``value_up[j] @ c``. Applying key_up
    to the query and value_up to the mixed latents is the same attention, directly on the latents.
    """

    def _attention_weights(self) -> Weights:
        c = self.config
        return {
            "q": self._matrix(c.heads * (c.head_dim + c.rope_dim), c.hidden, gain=QUERY_GAIN),
            "entry": self._matrix(c.latent_dim + c.rope_dim, c.hidden),
            "key_up": self._matrix(c.heads, c.head_dim, c.latent_dim),
            "value_up": self._matrix(c.heads, c.head_dim, c.latent_dim),
        }

    def _project(self, w: Weights, x: Tensor, rotary: Parts) -> Parts:
        """Queries ``[n, h, d]`` and ``[n, h, r]``, latents ``[n, l]``, shared keys ``[n, r]``."""
        c = self.config
        q = F.linear(x, w["q"]).view(len(x), c.heads, -1)
        entry = F.linear(x, w["entry"])
        k_rope = rotate(entry[:, None, c.latent_dim :], rotary)[:, 0]
        latent = rms_norm(entry[:, : c.latent_dim])
        return q[..., : c.head_dim], rotate(q[..., c.head_dim :], rotary), latent, k_rope

    def _cached(self, w: Weights, parts: Parts, cache: Tensor, pages: Pages) -> Tensor:
        q_nope, q_rope, latent, k_rope = parts
        pages.write(cache, torch.cat((latent, k_rope), dim=-1))
        entries = pages.read(cache, "k")[:, None]  # [t, 1, l + r]: one key head for all queries
        absorbed = torch.bmm(q_nope.transpose(0, 1), w["key_up"])  # [h, n, l]
        q = torch.cat((absorbed, q_rope.transpose(0, 1)), dim=-1)
        q = q * (self.config.head_dim + self.config.rope_dim) ** -0.5
        mixed = cached_attention(q[None], entries, entries[..., : self.config.latent_dim])[0]
        return torch.bmm(mixed, w["value_up"].mT).transpose(0, 1).flatten(1)

    def _dense(self, w: Weights, parts: Parts) -> Tensor:
        q_nope, q_rope, latent, k_rope = parts
        k_nope = torch.einsum("tl,hdl->thd", latent, w["key_up"])
        k = torch.cat((k_nope, k_rope[:, None].expand_as(q_rope)), dim=-1)
        v = torch.einsum("tl,hdl->thd", latent, w["value_up"])
        return dense_attention(torch.cat((q_nope, q_rope), dim=-1), k, v)


def build(config: ModelConfig, device: str = "cpu") -> Decoder:
    """The decoder of config; equal configs give equal weights in any process, on any device."""
    return GqaDecoder(config, device) if config.kind == "gqa" else MlaDecoder(config, device)


def greedy(model: Decoder, logits: Tensor) -> int:
    """The token of the largest logit of ``[vocab]``."""
    return int(logits.argmax())
