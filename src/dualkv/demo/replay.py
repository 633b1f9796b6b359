"""Replay of agents on a cluster: each sends its next turn when the last one has been answered."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualkv import traces
from dualkv.demo.cluster import Cluster, EngineProcess
from dualkv.errors import Error


@dataclass
class TurnRecord:
    """One answered turn."""

    agent: int
    turn: int
    prompt_tokens: int
    ttft_s: float
    seconds: float
    wrong_blocks: int
    prefilled: dict[str, Any]
    output: tuple[int, int]  # span of its output in the conversation


@dataclass
class Replay:
    """What one pass over all agents gave."""

    seconds: float = 0
    began: float = 0  # time.time()
    turns: list[TurnRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    conversations: dict[int, "np.ndarray[Any, Any]"] = field(default_factory=dict)


class Replayer:
    """Sends turns to a cluster.

    ``spread``: other decode and prefill nodes may help reading. ``sticky``: an agent stays with one decode engine.
    """

    def __init__(self, cluster: Cluster, vocab: int, *, spread: bool, sticky: bool) -> None:
        self._cluster = cluster
        self._vocab = vocab
        self._spread = spread
        self._sticky = sticky
        self._decode_turns = itertools.cycle(cluster.decode)

    async def run(
        self, sessions: Sequence[traces.Session], on_turn: Callable[[], None], starts: Sequence[float] | None = None
    ) -> Replay:
        """Agents, each turn after turn: all at once, or each ``starts[i]`` seconds from now."""
        replay = Replay(began=time.time())
        began = time.monotonic()

        async def one(agent: int, session: traces.Session) -> None:
            if starts is not None:
                await asyncio.sleep(began + starts[agent] - time.monotonic())
            await self._agent(agent, session, replay, on_turn)

        await asyncio.gather(*(one(i, session) for i, session in enumerate(sessions)))
        replay.seconds = time.monotonic() - began
        return replay

    async def warm(self, agent: int, tokens: "np.ndarray[Any, Any]") -> None:
        """Makes a stored context resident in the agent's engines."""
        await self._answer(agent, tokens.tolist(), 1)

    def _decode_of(self, agent: int) -> EngineProcess:
        return self._cluster.decode[agent % len(self._cluster.decode)] if self._sticky else next(self._decode_turns)

    async def _agent(self, agent: int, session: traces.Session, replay: Replay, on_turn: Callable[[], None]) -> None:
        conversation = traces.Conversation(session, self._vocab)
        spoken = np.zeros(0, dtype=np.uint32)
        turn = 0
        while not conversation.done:
            prompt = conversation.prompt()
            outputs = conversation.turn.output_tokens
            try:
                record, tokens = await self._turn(agent, turn, prompt, outputs)
            except Error as error:
                replay.failures.append(f"agent {agent}, turn {turn}: {error}")
                return
            replay.turns.append(record)
            conversation.add_output(tokens)
            spoken = np.append(prompt, np.asarray(tokens, dtype=np.uint32))
            turn += 1
            on_turn()
        replay.conversations[agent] = spoken

    async def _turn(
        self, agent: int, turn: int, prompt: "np.ndarray[Any, Any]", outputs: int
    ) -> tuple[TurnRecord, list[int]]:
        began = time.monotonic()
        prefilled, decoded, ttft_s = await self._answer(agent, prompt.tolist(), outputs)
        record = TurnRecord(
            agent,
            turn,
            len(prompt),
            ttft_s,
            time.monotonic() - began,
            prefilled["wrong_blocks"] + decoded["wrong_blocks"],
            prefilled,
            (len(prompt), len(prompt) + outputs),
        )
        return record, decoded["tokens"]

    async def _answer(
        self, agent: int, tokens: list[int], outputs: int
    ) -> tuple[dict[str, Any], dict[str, Any], float]:
        """What the prefill and the decode engine say, and the time to the first token."""
        prefill = self._cluster.prefill[agent % len(self._cluster.prefill)]
        decode = self._decode_of(agent)
        helpers = [e.name for e in self._cluster.engines if e not in (prefill, decode)] if self._spread else []
        began = time.monotonic()
        prefilled = await prefill.call("prefill", tokens=tokens, decode=decode.name, helpers=helpers)
        ttft_s = time.monotonic() - began
        decoded = await decode.call(
            "decode",
            load_id=prefilled["load_id"],
            tokens=tokens,
            first_token=prefilled["first_token"],
            output_tokens=outputs,
            hit_blocks=prefilled["hit_blocks"],
            resident_blocks=prefilled["resident_blocks"],
        )
        return prefilled, decoded, ttft_s
