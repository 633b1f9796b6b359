"""What the DualPath paper published of its evaluation (arXiv 2602.21548, section 7), as data.

JCT in seconds are read off figures, so they are some percent uncertain; the text prints the ablation, the load balance,
the capacities and Table 3.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Jct:
    """Seconds of one cell of a figure; None where it has no such bar."""

    oracle: float | None
    ours: float
    basic: float


@dataclass(frozen=True)
class Where:
    """A cell's setting."""

    model: str
    dataset: str
    agents: int
    prefill_nodes: int = 0  # 0: the model's default
    decode_nodes: int = 0
    append: float = 1.0
    generate: float = 1.0


def _offline() -> dict[Where, Jct]:
    """Figure 7."""
    rows = {
        ("ds27b", "32K"): "512 389 425 522, 1024 460 681 1000, 2048 735 1124 1876, 4096 1319 2124 3573",
        ("ds27b", "48K"): "512 623 784 1226, 1024 764 1347 2171, 2048 1246 2271 4040, 4096 3136 4824 7292",
        ("ds27b", "64K"): "512 866 1299 2205, 1024 1457 2402 4134, 2048 2402 4488 7874, 4096 5236 9449 16762",
        ("ds660b", "32K"): "512 884 884 985, 1024 1106 1106 1528, 2048 1688 1648 2553, 4096 3015 2894 4704",
        ("ds660b", "48K"): "512 1429 1429 1818, 1024 1775 1861 3074, 2048 3030 3160 5498, 4096 5628 5931 10390",
        ("ds660b", "64K"): "512 1979 2083 2917, 1024 2708 2969 5417, 2048 4948 5417 10104, 4096 9375 10365 19333",
        ("qwen2.5-32b", "32K"): "128 524 746 1048, 256 778 1254 2048, 512 1175 1794 3810",
        ("qwen2.5-32b", "48K"): "128 1031 1641 2595, 256 1527 2405 4809, 512 2634 4466 9160",
        ("qwen2.5-32b", "64K"): "32 1244 1679 1886, 64 1347 2010 2653, 128 1617 2819 4974",
    }
    out = {}
    for (model, dataset), cells in rows.items():
        for cell in cells.split(","):
            agents, oracle, ours, basic = map(int, cell.split())
            out[Where(model, dataset, agents)] = Jct(oracle, ours, basic)
    return out


def _ratios() -> dict[Where, Jct]:
    """Figure 8: ours/basic of 2P1D, 1P2D and 1P1D."""
    rows = {
        ("32K", 512): "381/386 372/545 425/521",
        ("32K", 1024): "541/647 545/1009 685/1004",
        ("32K", 2048): "903/1158 903/1858 1125/1887",
        ("48K", 512): "659/761 670/1216 795/1216",
        ("48K", 1024): "1045/1341 1034/2341 1341/2182",
        ("48K", 2048): "1818/2364 1875/4443 2273/4023",
        ("64K", 512): "1067/1323 1045/2197 1301/2240",
        ("64K", 1024): "1856/2432 1856/4523 2432/4139",
        ("64K", 2048): "3307/4245 3413/8341 4501/7915",
    }
    out = {}
    for (dataset, agents), cells in rows.items():
        for (prefill, decode), cell in zip(((2, 1), (1, 2), (1, 1)), cells.split(), strict=True):
            ours, basic = map(int, cell.split("/"))
            out[Where("ds27b", dataset, agents, prefill, decode)] = Jct(None, ours, basic)
    return out


def _scaling() -> dict[Where, Jct]:
    """Figure 9: 660B, 64K, 1024 agents; rounds with longer appends or generations."""
    append = {1.5: Jct(2386, 2506, 4832), 2.0: Jct(2266, 2226, 4431), 3.0: Jct(2045, 1985, 3769)}
    generate = {1.5: Jct(2847, 2967, 4451), 2.0: Jct(2987, 3048, 4150), 3.0: Jct(3168, 3168, 4251)}
    out = {Where("ds660b", "64K", 1024, append=by): jct for by, jct in append.items()}
    return out | {Where("ds660b", "64K", 1024, generate=by): jct for by, jct in generate.items()}


OFFLINE = _offline()
RATIOS = _ratios()
SCALING = _scaling()

ABLATION = {"layerwise": 17.21, "dualpath": 38.19, "scheduled": 45.62}
"""Percent of basic's JCT that each step has cut, mean of 1024 and 2048 agents (7.6: 660B, 64K)."""
ABLATION_AGENTS = (1024, 2048)

SNIC_MAX_AVG = {"round_robin": 1.53, "scheduled": 1.18}
"""Traffic of the busiest storage NIC over a mean one (7.7: 48K, 1024 trajectories, three machines, 1500 s)."""
SNIC_SECONDS = 1500

CAPACITY = {"ds27b": 1.67, "ds660b": 2.25}
"""Agents/s within TTFT <= 4 s and TPOT <= 50 ms, over basic's (7.5)."""

SCALE = {"small": (2, 4, 2_000, 3167.0), "large": (48, 96, 48_000, 3201.0)}
"""Prefill and decode nodes, agents, JCT in seconds (Table 3, offline). The data set is not published; 48K fits."""

ONLINE = {"small": (2, 4, 0.4, 1.739, 0.228, 0.039), "large": (44, 88, 8.8, 1.847, 0.194, 0.036)}
"""Prefill and decode nodes, agents/s, mean TTFT, TTST and TPOT in seconds (Table 3, online)."""

BASIC_CELLS = {
    "ds27b": Where("ds27b", "64K", 2048),
    "ds660b": Where("ds660b", "64K", 2048),
    "qwen2.5-32b": Where("qwen2.5-32b", "64K", 128),
}
"""The one Basic cell of each model that was used for calibration."""
