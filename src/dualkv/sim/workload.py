"""What a simulated cluster is asked: sessions of agents, as arrays."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualkv import traces
from dualkv.errors import invalid

Array = Any


@dataclass(frozen=True, eq=False)
class Workload:
    """Sessions, and who replays them when.

    Attributes:
        turns: ``[n, 3]``: input, hit and output tokens of all turns, session behind session.
        think_s: ``[n]``: seconds from the answer before to each turn.
        begins: ``[sessions + 1]``: where each session begins.
        agents: agent i replays session i modulo their number.
        agents_per_s: arrivals (Poisson); 0: all start together.
        end_s: stop here; 0: when all agents are done.
    """

    turns: Array
    think_s: Array
    begins: Array
    agents: int
    agents_per_s: float = 0.0
    end_s: float = 0.0
    seed: int = 1

    @classmethod
    def generated(
        cls,
        dataset: str,
        agents: int,
        *,
        sessions: int = 500,
        seed: int = 1,
        append: float = 1.0,
        generate: float = 1.0,
        agents_per_s: float = 0.0,
        end_s: float = 0.0,
    ) -> "Workload":
        """Like the paper's traces (Table 2): 500 trajectories, hits of all that was said before, no tool latency.

        ``append`` and ``generate`` multiply the lengths of every round but the first prompt; a trajectory then ends
        before it would be longer than the data set's maximum (paper Fig. 9).
        """
        rows = _generated(dataset, sessions, seed, append, generate)
        return dataclasses.replace(rows, agents=agents, agents_per_s=agents_per_s, end_s=end_s)

    @classmethod
    def recorded(
        cls,
        sessions: Sequence[traces.Session] | str | os.PathLike[str],
        agents: int,
        *,
        think: bool = True,
        agents_per_s: float = 0.0,
        end_s: float = 0.0,
        seed: int = 1,
    ) -> "Workload":
        """Of recorded sessions, or a trace file: hits are the full blocks that a turn shares with an earlier one of its
        session. Raises what ``traces.read`` raises."""
        if isinstance(sessions, str | os.PathLike):
            sessions = traces.read(sessions)
        rows, thinks = [], []
        for session in sessions:
            turns = list(zip(session.turns, session.hit_tokens, strict=True))
            rows.append([(t.input_tokens, min(hit, t.input_tokens - 1), max(1, t.output_tokens)) for t, hit in turns])
            thinks.append([turn.think_time_s if think else 0.0 for turn in session.turns])
        return cls.of(rows, thinks, agents, agents_per_s, end_s, seed)

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[tuple[int, int, int]]],
        thinks: Sequence[Sequence[float]],
        agents: int,
        agents_per_s: float = 0.0,
        end_s: float = 0.0,
        seed: int = 1,
    ) -> "Workload":
        """Of sessions as rows of (input, hit, output tokens), and seconds before each."""
        if not rows:
            raise invalid("workload: no sessions")
        return cls(
            np.array([row for session in rows for row in session], dtype=np.uint32),
            np.array([s for session in thinks for s in session], dtype=np.float32),
            np.cumsum([0] + [len(session) for session in rows]).astype(np.uint64),
            agents,
            agents_per_s,
            end_s,
            seed,
        )

    def arriving(self, agents_per_s: float, seconds: float) -> "Workload":
        """The same sessions, replayed by agents that come at this rate for so long."""
        # Some more than are expected: whether they come by then, chance decides.
        agents = int(agents_per_s * seconds * 1.3) + 16
        return dataclasses.replace(self, agents=agents, agents_per_s=agents_per_s, end_s=seconds)

    def mean_turn(self) -> tuple[float, float]:
        """Hit and new tokens of an average turn."""
        hit = float(self.turns[:, 1].mean())
        return hit, float(self.turns[:, 0].mean()) - hit


@functools.lru_cache(maxsize=16)
def _generated(dataset: str, sessions: int, seed: int, append: float, generate: float) -> Workload:
    """For one agent. Comparisons ask for the same sessions over and over, and making 500 takes most of a second."""
    most = int(dataset.removesuffix("K")) * 1024
    found = traces.generate(dataset, sessions, seed)
    rows = [_conversation(session, append, generate, most) for session in found]
    load = Workload.of(rows, [[0.0] * len(turns) for turns in rows], 1, seed=seed)
    for shared in (load.turns, load.think_s, load.begins):
        shared.flags.writeable = False
    return load


def _conversation(session: traces.Session, append: float, generate: float, most: int) -> list[tuple[int, int, int]]:
    rows: list[tuple[int, int, int]] = []
    said = heard = 0  # tokens so far: scaled, and of the session
    for i, turn in enumerate(session.turns):
        new = turn.input_tokens - heard
        heard = turn.input_tokens + turn.output_tokens
        new = max(1, round(new * append)) if i else new
        output = max(1, round(turn.output_tokens * generate))
        if rows and said + new + output > most:
            break
        rows.append((said + new, said, output))
        said += new + output
    return rows
