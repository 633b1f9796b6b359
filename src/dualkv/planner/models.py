"""Bytes of KV and FLOPs of prefill, from a model's architecture.

Every number is from a published configuration, named in ``source``. Only matrix products count: norms, biases,
embeddings and the output head (one token a turn) are left out.
"""

from dataclasses import dataclass

from dualkv.errors import invalid

# fp8_ds_mla is FlashMLA's layout of a latent: FP8 with a float32 scale for each 128 values, then the rope part in BF16.
KV_DTYPES = ("bf16", "fp8", "fp8_ds_mla")
_ELEMENT_BYTES = {"bf16": 2, "fp8": 1}
_SCALE_BYTES, _SCALED_VALUES = 4, 128


@dataclass(frozen=True)
class Gqa:
    """Keys and values for ``kv_heads`` of ``heads`` heads."""

    heads: int
    kv_heads: int
    head_dim: int

    def layer_bytes(self, dtype: str) -> int:
        """A token's cache in one layer."""
        if dtype not in _ELEMENT_BYTES:
            raise invalid(f"KV dtype {dtype!r} is for latent attention only: give bf16 or fp8")
        return 2 * self.kv_heads * self.head_dim * _ELEMENT_BYTES[dtype]

    def weights(self, hidden: int) -> int:
        """Query and output, key and value projections."""
        return 2 * hidden * self.head_dim * (self.heads + self.kv_heads)

    def flops(self, hit: int, append: int, window: int | None) -> int:
        """Scores and weighted sum."""
        return 4 * self.heads * self.head_dim * pairs(hit, append, window)


@dataclass(frozen=True)
class Indexer:
    """Sparse attention: each token scores all tokens before it with small heads, and attends to the best ``topk``."""

    heads: int
    dim: int
    topk: int

    @property
    def layer_bytes(self) -> int:
        """An FP8 key with its scales, whatever the rest of the cache is in (DeepSeek-V3.2-Exp inference/model.py)."""
        return self.dim + self.dim // _SCALED_VALUES * _SCALE_BYTES

    def weights(self, hidden: int, q_rank: int) -> int:
        """Queries from the query latent, one key, a weight for each head."""
        return q_rank * self.heads * self.dim + hidden * (self.dim + self.heads)


@dataclass(frozen=True)
class Mla:
    """One latent of ``rank`` values and one rope key of ``rope`` values for all heads."""

    heads: int
    rank: int
    rope: int
    nope: int
    value: int
    q_rank: int
    indexer: Indexer | None = None

    def layer_bytes(self, dtype: str) -> int:
        """A token's cache in one layer, the indexer's key included."""
        index = self.indexer.layer_bytes if self.indexer else 0
        if dtype == "fp8_ds_mla":
            return self.rank + self.rank // _SCALED_VALUES * _SCALE_BYTES + 2 * self.rope + index
        return (self.rank + self.rope) * _ELEMENT_BYTES[dtype] + index

    def weights(self, hidden: int) -> int:
        """Query down and up, latent down and up, output, indexer."""
        query = self.q_rank * (hidden + self.heads * (self.nope + self.rope))
        latent = hidden * (self.rank + self.rope) + self.rank * self.heads * (self.nope + self.value)
        index = self.indexer.weights(hidden, self.q_rank) if self.indexer else 0
        return query + latent + self.heads * self.value * hidden + index

    def flops(self, hit: int, append: int, window: int | None) -> int:
        """Scores and weighted sum over latents (the up-projection absorbed into query and output)."""
        limit = self.indexer.topk if self.indexer else window
        out = 2 * self.heads * (2 * self.rank + self.rope) * pairs(hit, append, limit)
        if self.indexer:
            out += 2 * self.indexer.heads * self.indexer.dim * pairs(hit, append, None)
        return out


@dataclass(frozen=True)
class Experts:
    """``active`` of ``routed`` experts a token, and ``shared`` ones that all take."""

    routed: int
    active: int
    shared: int
    width: int


@dataclass(frozen=True)
class Model:
    """An architecture.

    Attributes:
        dense_layers: layers whose MLP is dense, ``dense_width`` wide; the others have ``experts``.
        window_layers: layers that attend to the last ``window`` tokens only.
        kv_dtype: what serving engines keep the cache in unless told otherwise.
    """

    name: str
    source: str
    layers: int
    hidden: int
    attention: Gqa | Mla
    dense_layers: int
    dense_width: int
    experts: Experts | None = None
    window_layers: int = 0
    window: int | None = None
    kv_dtype: str = "bf16"

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """What one more token adds; layers with a window, once it is full, add nothing."""
        return (self.layers - self.window_layers) * self.layer_bytes(dtype)

    def kv_bytes(self, tokens: int, dtype: str | None = None) -> int:
        """Of a prefix of so many tokens."""
        windowed = self.window_layers * min(tokens, self.window or 0) * self.layer_bytes(dtype)
        return self.kv_bytes_per_token(dtype) * tokens + windowed

    def layer_bytes(self, dtype: str | None = None) -> int:
        """A token's cache in one layer."""
        return self.attention.layer_bytes(dtype or self.kv_dtype)

    def active_weights(self) -> int:
        """Weights that one token is multiplied with."""
        mlp = 3 * self.hidden * self.dense_width * self.dense_layers
        if self.experts:
            one = 3 * self.hidden * self.experts.width * (self.experts.active + self.experts.shared)
            mlp += (one + self.hidden * self.experts.routed) * (self.layers - self.dense_layers)
        return self.attention.weights(self.hidden) * self.layers + mlp

    def prefill_flops(self, hit: int, append: int) -> int:
        """Of computing ``append`` tokens after ``hit`` tokens whose KV is there."""
        full = self.layers - self.window_layers
        out = 2 * self.active_weights() * append + full * self.attention.flops(hit, append, None)
        if self.window_layers:
            out += self.window_layers * self.attention.flops(hit, append, self.window)
        return out

    def gb_per_pflop(self, context: int, append: int, dtype: str | None = None) -> float:
        """The paper's cache-compute ratio (Table 1): KV read over compute, of a prompt with ``append`` new tokens."""
        hit = context - append
        return self.kv_bytes(hit, dtype) / 1e9 / (self.prefill_flops(hit, append) / 1e15)


def pairs(hit: int, append: int, limit: int | None) -> int:
    """How many tokens the new ones attend to in all, each itself included, none more than ``limit``."""
    below = append if limit is None else max(0, min(append, limit - hit))
    return below * hit + below * (below + 1) // 2 + (append - below) * (limit or 0)


_DEEPSEEK_EXPERTS = Experts(routed=256, active=8, shared=1, width=2048)
_DEEPSEEK_V3_SOURCE = "transformers, DeepseekV3Config (its defaults are DeepSeek-V3)"
_PRESETS = (
    Model(
        name="deepseek-v3.2",
        source=f"{_DEEPSEEK_V3_SOURCE}; indexer: deepseek-ai/DeepSeek-V3.2-Exp, inference/model.py; "
        "cache: vLLM's fp8_ds_mla and DeepseekV32IndexerCache",
        layers=61,
        hidden=7168,
        attention=Mla(
            heads=128,
            rank=512,
            rope=64,
            nope=128,
            value=128,
            q_rank=1536,
            indexer=Indexer(heads=64, dim=128, topk=2048),
        ),
        dense_layers=3,
        dense_width=18432,
        experts=_DEEPSEEK_EXPERTS,
        kv_dtype="fp8_ds_mla",
    ),
    Model(
        name="deepseek-v3",
        source=_DEEPSEEK_V3_SOURCE,
        layers=61,
        hidden=7168,
        attention=Mla(heads=128, rank=512, rope=64, nope=128, value=128, q_rank=1536),
        dense_layers=3,
        dense_width=18432,
        experts=_DEEPSEEK_EXPERTS,
    ),
    Model(
        name="kimi-k2",
        source="NVIDIA Megatron Bridge, KimiK2Provider; slime, scripts/models/kimi-k2.sh",
        layers=61,
        hidden=7168,
        attention=Mla(heads=64, rank=512, rope=64, nope=128, value=128, q_rank=1536),
        dense_layers=1,
        dense_width=18432,
        experts=Experts(routed=384, active=8, shared=1, width=2048),
    ),
    Model(
        name="qwen2.5-32b",
        source="config.json of Qwen/Qwen2.5-32B",
        layers=64,
        hidden=5120,
        attention=Gqa(heads=40, kv_heads=8, head_dim=128),
        dense_layers=64,
        dense_width=27648,
    ),
    Model(
        name="qwen3-32b",
        source="config.json of Qwen/Qwen3-32B",
        layers=64,
        hidden=5120,
        attention=Gqa(heads=64, kv_heads=8, head_dim=128),
        dense_layers=64,
        dense_width=25600,
    ),
    Model(
        name="qwen3-235b-a22b",
        source="slime, scripts/models/qwen3-235B-A22B.sh; MindSpeed-RL, configs/model/qwen3_235b_a22b.yaml",
        layers=94,
        hidden=4096,
        attention=Gqa(heads=64, kv_heads=4, head_dim=128),
        dense_layers=0,
        dense_width=0,
        experts=Experts(routed=128, active=8, shared=0, width=1536),
    ),
    Model(
        name="llama-3-8b",
        source="config.json of meta-llama/Meta-Llama-3-8B",
        layers=32,
        hidden=4096,
        attention=Gqa(heads=32, kv_heads=8, head_dim=128),
        dense_layers=32,
        dense_width=14336,
    ),
    Model(
        name="llama-3-70b",
        source="config.json of meta-llama/Meta-Llama-3-70B",
        layers=80,
        hidden=8192,
        attention=Gqa(heads=64, kv_heads=8, head_dim=128),
        dense_layers=80,
        dense_width=28672,
    ),
    Model(
        name="gpt-oss-20b",
        source="config.json of openai/gpt-oss-20b; openai/gpt-oss, gpt_oss/torch/model.py",
        layers=24,
        hidden=2880,
        attention=Gqa(heads=64, kv_heads=8, head_dim=64),
        dense_layers=0,
        dense_width=0,
        experts=Experts(routed=32, active=4, shared=0, width=2880),
        window_layers=12,
        window=128,
    ),
    Model(
        name="gpt-oss-120b",
        source="openai/gpt-oss, gpt_oss/torch/model.py (its defaults are 120b)",
        layers=36,
        hidden=2880,
        attention=Gqa(heads=64, kv_heads=8, head_dim=64),
        dense_layers=0,
        dense_width=0,
        experts=Experts(routed=128, active=4, shared=0, width=2880),
        window_layers=18,
        window=128,
    ),
)
MODELS = {model.name: model for model in _PRESETS}
