"""Engines and nodes of a simulated cluster: what they compute, keep and move."""

import dataclasses
from dataclasses import dataclass

from dualkv.errors import invalid
from dualkv.planner import MODELS as ARCHITECTURES

PAPER_BLOCK_TOKENS = 64  # DualPath section 4.1, its example


@dataclass(frozen=True)
class Compute:
    """Seconds of one engine.

    A forward pass of prefill takes ``forward_s``, plus ``token_s`` a new token (mean of the engines that step
    together), plus attention on the slowest of them: ``context_s`` a token of context, once a request, and ``pair_s`` a
    pair of a new token and a token before it. A step of decode takes ``step_s``, plus ``step_request_s`` a request of
    its batch, plus ``step_context_s`` a token of their contexts. Without layer-wise prefill, copying a Layer Block to
    the GPU keeps it from computing for ``copy_call_s``.
    """

    forward_s: float
    token_s: float
    context_s: float
    pair_s: float
    step_s: float
    step_request_s: float = 0.0
    step_context_s: float = 0.0
    copy_call_s: float = 0.0

    def prefill_s(self, cached: float, tokens: float) -> float:
        """Of ``tokens`` new tokens behind ``cached`` ones, in a pass that is made anyway."""
        attention = self.context_s * (cached + tokens) + self.pair_s * tokens * (cached + tokens / 2)
        return self.token_s * tokens + attention


@dataclass(frozen=True)
class Hardware:
    """One node; all are alike. Rates in bytes/s of one direction.

    Attributes:
        engines: of a node, each with a compute NIC.
        snic: of all storage NICs of a node, reads.
        cnic: of one engine's compute NIC.
        dram: of a node, reads and writes together.
        high_share: of each compute NIC that the model's own traffic takes, first.
        staging: bytes of a node's staging under dual-path modes; 0: without end.
    """

    engines: int = 8
    snic: float = 50e9
    cnic: float = 50e9
    dram: float = 500e9
    high_share: float = 0.3
    staging: float = 80e9


@dataclass(frozen=True)
class Engine:
    """A model on its hardware.

    Attributes:
        group: prefill engines that step together (expert parallelism).
        memory_tokens: of KV that fit a decode engine.
        prefill_nodes, decode_nodes: what it is usually run on.
    """

    name: str
    layers: int
    bytes_per_token: float
    compute: Compute
    hardware: Hardware
    group: int
    memory_tokens: float
    prefill_nodes: int
    decode_nodes: int
    tokens_per_block: int = PAPER_BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.layers < 1 or self.bytes_per_token <= 0 or self.group < 1 or self.memory_tokens <= 0:
            raise invalid(f"engine {self.name!r}: layers, bytes_per_token, group and memory_tokens must be positive")


_HBM_FOR_KV = 0.9  # of a GPU's memory, less the weights: what serving engines leave free by default
_NODE = Hardware()

# Where each number comes from is in docs/simulator.md. Compute: `python -m dualkv.sim.calibrate MODEL`.
_DS660B = Engine(
    name="ds660b",
    layers=61,
    bytes_per_token=ARCHITECTURES["deepseek-v3.2"].kv_bytes_per_token("bf16"),
    compute=Compute(0.242, 379e-6, 9.84e-7, 1.84e-9, 0.027, 2e-4, 1.75e-8, copy_call_s=3.6e-6),
    hardware=_NODE,
    group=16,
    memory_tokens=600e3,
    prefill_nodes=2,
    decode_nodes=4,
)
_DS27B = Engine(
    name="ds27b",
    layers=30,
    # Like its large sibling: a BF16 latent of 576, and an FP8 indexer key of 64 with one scale.
    bytes_per_token=30 * (2 * 576 + 64 + 4),
    compute=Compute(0.0338, 67.5e-6, 4.05e-7, 9.4e-10, 0.0089, 3e-5, 3e-9, copy_call_s=3.6e-6),
    hardware=dataclasses.replace(_NODE, snic=51.2e9),
    group=8,
    memory_tokens=1.5e6,
    prefill_nodes=1,
    decode_nodes=1,
)
_QWEN = Engine(
    name="qwen2.5-32b",
    layers=64,
    bytes_per_token=ARCHITECTURES["qwen2.5-32b"].kv_bytes_per_token("bf16"),
    compute=Compute(0.57, 119e-6, 1.29e-7, 6.03e-9, 0.0347, 2e-4, 3.7e-8, copy_call_s=3.6e-6),
    hardware=dataclasses.replace(_NODE, snic=43e9, staging=320e9),
    group=1,
    memory_tokens=(_HBM_FOR_KV * 141e9 - 2 * 32.5e9) / ARCHITECTURES["qwen2.5-32b"].kv_bytes_per_token("bf16"),
    prefill_nodes=1,
    decode_nodes=2,
)
MODELS = {engine.name: engine for engine in (_DS27B, _DS660B, _QWEN)}
"""Of the DualPath paper's evaluation, by name."""
