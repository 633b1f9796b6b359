"""What a node has: GPUs, NICs and DRAM, and rates as people write them."""

import math
import re
from dataclasses import dataclass

from dualkv.errors import invalid

_PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NUMBER = r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*"


@dataclass(frozen=True)
class Hardware:
    """One node; all nodes are alike. Rates are bytes/s, of one direction.

    Attributes:
        gpus: g of the paper; each has its own compute NIC.
        cnic: B, of one compute NIC.
        snic: s * B, of all storage NICs of the node together.
        dram: M, reads and writes together.
        gpu_flops: what one GPU really reaches in prefill, FLOP/s; None if not known.
        gpu_hbm: bytes of one GPU's memory; None if not known.
    """

    gpus: int
    cnic: float
    snic: float
    dram: float
    gpu_flops: float | None = None
    gpu_hbm: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "cnic", "snic", "dram", "gpu_flops", "gpu_hbm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise invalid(f"hardware: {name} is {value}, must be more than 0")

    @property
    def s(self) -> float:
        """Bandwidth of the node's storage NICs in compute NICs."""
        return self.snic / self.cnic


HARDWARE = {
    # DualPath sections 4.2 and 7.2: 8 Hopper GPUs, 8 x 400 Gb/s CNICs, one 400 Gb/s SNIC, M about 500 GB/s.
    "paper": Hardware(gpus=8, cnic=50e9, snic=50e9, dram=500e9),
}


def parse_rate(text: str) -> float:
    """Bytes/s of ``400Gb/s`` or ``400Gbps`` (bits), or of ``50GB/s`` or ``46GiB/s`` (bytes)."""
    match = re.fullmatch(_NUMBER + r"([KkMmGgTt]?i?)(b|bits?|B|bytes?)(?:/s|ps)\s*", text, re.ASCII)
    prefixes = _PREFIXES | _BINARY
    if match is None or match[2].upper() not in prefixes:
        raise invalid(f"rate {text[:40]!r}: give a number with a unit, 400Gb/s in bits or 50GB/s in bytes")
    rate = float(match[1]) * prefixes[match[2].upper()]
    if not rate:
        raise invalid(f"rate {text[:40]!r}: must be more than 0")
    return rate if match[3] == "B" or match[3].startswith("byte") else rate / 8


def parse_flops(text: str) -> float:
    """FLOP/s of ``400TFLOPS`` or ``0.4PFLOP/s``."""
    match = re.fullmatch(_NUMBER + r"([KMGTP]?)FLOP(?:S|/S)\s*", text.upper(), re.ASCII)
    flops = float(match[1]) * _PREFIXES[match[2]] if match else 0.0
    if not flops:
        raise invalid(f"compute {text[:40]!r}: give a number with a unit, like 400TFLOPS")
    return flops
