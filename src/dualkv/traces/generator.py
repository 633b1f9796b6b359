"""Seeded agent sessions with the means of the DualPath paper's workloads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from statistics import NormalDist

from .session import Session, Turn


@dataclass(frozen=True)
class _Workload:
    """One line of Table 2 of arXiv 2602.21548 (section 7), in tokens; means over trajectories."""

    max_tokens: int
    turns: int
    append_tokens: int
    generated_tokens: int
    total_tokens: int
    context_tokens: int


_WORKLOADS = {
    "32K": _Workload(32 * 1024, 60, 608, 148, 28639, 17183),
    "48K": _Workload(48 * 1024, 106, 474, 172, 42607, 25120),
    "64K": _Workload(64 * 1024, 157, 429, 176, 55958, 32721),
}
_Z_LIMIT = 3.0  # rare agents are cut here, so that even the longest leaves tokens for each turn
_APPEND_SIGMA = 1.2  # most tool results are short, a few are long
_OUTPUT_SIGMA = 0.6


def generate(dataset: str, agents: int, seed: int, *, block_size: int = 64) -> list[Session]:
    """Sessions of `agents` agents that share nothing, each growing to just below the maximum.

    dataset: "32K", "48K" or "64K", the maximum length of input and output of the last turn.
    seed: 0 or more; the same arguments give the same sessions.

    Means of `statistics` are within 5 % of Table 2 of the DualPath paper for 200 agents. The paper
    gives means only; the distributions are ours. Turn counts are lognormal and drawn from equal
    slices of the distribution, so that few agents are enough for the means. Their spread follows
    from the table: with a session's length L nearly constant, the mean length of a turn is the mean
    of L / turns. The first prompt is as long as the mean context asks for, and the rest is divided
    among the turns by lognormal weights.

    start_s and think_time_s are 0: all agents start together and tools take no time.
    Raises ValueError for an unknown dataset, agents or block_size below 1 or a negative seed.
    """
    if dataset not in _WORKLOADS:
        raise ValueError(f"dataset {dataset!r} is none of {', '.join(_WORKLOADS)}")
    if agents < 1 or seed < 0 or block_size < 1:
        raise ValueError(f"agents {agents}, seed {seed}, block_size {block_size}: below 1, 0 or 1")
    workload = _WORKLOADS[dataset]
    rng = Random(f"dualkv {dataset} {agents} {seed}")
    turn_counts = _turn_counts(workload, agents, rng)
    return [
        _session(f"{dataset}-{seed}-{agent}", workload, turns, block_size, rng)
        for agent, turns in enumerate(turn_counts)
    ]


def _turn_counts(workload: _Workload, agents: int, rng: Random) -> list[int]:
    """One turn count from each of `agents` equal slices of a lognormal distribution, shuffled.

    A lognormal X of mean m has a mean of 1/X of exp(sigma**2) / m. With turns as X, the mean of
    total / turns is append + generated.
    """
    per_turn = workload.append_tokens + workload.generated_tokens
    sigma = math.sqrt(math.log(workload.turns * per_turn / workload.total_tokens))
    mu = math.log(workload.turns) - sigma**2 / 2
    counts = []
    for slice_index in range(agents):
        quantile = (slice_index + _open_uniform(rng)) / agents
        z = max(-_Z_LIMIT, min(_Z_LIMIT, NormalDist().inv_cdf(quantile)))
        counts.append(max(2, round(math.exp(mu + sigma * z))))
    rng.shuffle(counts)
    return counts


def _session(session_id: str, workload: _Workload, turns: int, block_size: int, rng: Random) -> Session:
    appended, generated = _lengths(workload, turns, rng)
    grown = list(accumulate(a + g for a, g in zip(appended, generated, strict=True)))
    inputs = [length - output for length, output in zip(grown, generated, strict=True)]
    block_ids = tuple(range(inputs[-1] // block_size))
    return Session(
        id=session_id,
        block_size=block_size,
        turns=tuple(
            Turn(size, output, block_ids[: size // block_size], start_s=0.0, think_time_s=0.0)
            for size, output in zip(inputs, generated, strict=True)
        ),
    )


def _lengths(workload: _Workload, turns: int, rng: Random) -> tuple[list[int], list[int]]:
    """Appended and generated tokens per turn.

    With even growth from the first prompt P to the last input T - g, the mean context is
    (P + T - g) / 2; P as a fraction of T follows.
    """
    total_mean = workload.total_tokens
    per_turn = workload.append_tokens + workload.generated_tokens
    least = 2 * total_mean - workload.max_tokens  # lengths are even from here to the maximum
    total = round(rng.uniform(least, workload.max_tokens))
    prompt_mean = 2 * workload.context_tokens - total_mean + workload.generated_tokens
    prompt = round(total * prompt_mean / total_mean * rng.uniform(0.5, 1.5))
    output = round(total * workload.generated_tokens / per_turn)
    append = total - prompt - output
    return (
        [prompt, *_split(append, _weights(turns - 1, _APPEND_SIGMA, rng))],
        _split(output, _weights(turns, _OUTPUT_SIGMA, rng)),
    )


def _weights(count: int, sigma: float, rng: Random) -> list[float]:
    return [math.exp(sigma * NormalDist().inv_cdf(_open_uniform(rng))) for _ in range(count)]


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in parts of at least 1, the rest in proportion to the weights."""
    free = total - len(weights)
    unit = free / sum(weights)
    bounds = [round(unit * end) for end in accumulate(weights, initial=0.0)]
    bounds[-1] = free
    return [1 + high - low for low, high in pairwise(bounds)]


def _open_uniform(rng: Random) -> float:
    """A number above 0 and below 1."""
    return rng.random() or 0.5
