"""Runs the demo: populate storage, then each mode over its own copy of it."""

import asyncio
import contextlib
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import dualkv
from dualkv import traces
from dualkv.demo.cluster import Cluster, Topology
from dualkv.demo.replay import Replay, Replayer
from dualkv.demo.results import DemoResult, HighTraffic, ModeRun, Percentiles, path_bytes
from dualkv.errors import Error, invalid
from dualkv.testbed import AllToAll, Testbed


@dataclass(frozen=True)
class Mode:
    """How hits are loaded."""

    policy: str
    resident: bool = False  # hits stay in the engines' caches: loading costs nothing
    spread: bool = False  # every idle node's storage NIC may help


MODES = {
    "basic": Mode("prefill_only"),
    "dualpath": Mode("shortest_queue"),
    "split": Mode("split", spread=True),
    "recompute": Mode("recompute", spread=True),
    "oracle": Mode("prefill_only", resident=True),
}
COMPARED = ("basic", "dualpath", "split", "oracle")

# A 16-layer GQA model whose KV is large for its compute (64 KiB a token in fp32), as long contexts are.
TORCH_VOCAB = 512
MODELLED_VOCAB = 50021
MODEL_LAYERS = 16
MODEL_TOKEN_BYTES = 4096  # of one layer
TORCH_MODEL = {
    "kind": "gqa",
    "layers": MODEL_LAYERS,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 128,
    "mlp_hidden": 512,
    "vocab": TORCH_VOCAB,
    "seed": 7,
}
MLA_MODEL = {**TORCH_MODEL, "kind": "mla", "latent_dim": 512, "rope_dim": 64}

_HIGH_ALONE_S = 3.0  # of the model's own traffic, before a mode runs


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Attributes:
        device: "cpu", or "cuda": the engines compute on this machine's GPUs, in turn, and keep their caches there.
        rate: agents that begin a second, at random (Poisson), the same moments in every mode; 0: all at once.
        testbed: each engine on a node of its own, with ``cnic_limit`` bytes/s a link, lanes, an all-to-all of HIGH
            beside, and storage held to ``snic_limit`` by the kernel instead of by the store.
    """

    topologies: Sequence[Topology] = (Topology(1, 1),)
    modes: Sequence[str] = COMPARED
    engine: str = "torch"
    device: str = "cpu"
    model: str = "gqa"
    transport: str = "tcp"
    agents: int = 12
    turns: int = 9
    rate: float = 0.0
    dataset: str = "64K"
    trace: str | None = None
    scale: float = 32.0
    tokens_per_block: int = 16
    snic_limit: int = 200_000_000
    staging: int | str = "auto"
    work_dir: str | None = None
    seed: int = 1
    deadline_s: float = 120.0
    costs: dict[str, float] = field(default_factory=dict)
    testbed: bool = False
    cnic_limit: int = 125_000_000

    def check(self) -> None:
        """Raises Error for what makes no sense."""
        if self.testbed and self.transport != "tcp":
            raise invalid("demo: a testbed's nodes share no memory: --testbed needs --transport tcp")
        if self.device == "cuda" and self.engine != "torch":
            raise invalid("demo: modelled engines compute nothing: --device cuda needs --engine torch")

    def gpus(self) -> list[dualkv.Gpu]:
        """Those that engines use; none on the CPU. Raises Error where there is no driver."""
        return dualkv.gpus() if self.device == "cuda" else []


class Progress(Protocol):
    """Where progress goes."""

    def stage(self, name: str, steps: int) -> Callable[[], None]:
        """Begins a stage of ``steps``; call what is returned after each."""
        ...


def load_sessions(options: DemoOptions) -> list[traces.Session]:
    """One session an agent, and one more that runs alone; scaled down, beginning at a long context."""
    wanted = options.agents + 1
    if options.trace:
        sessions = traces.read(options.trace)
        sessions = [s for s in sessions if len(s.turns) >= 2][:wanted]
        if len(sessions) < wanted:
            raise Error(
                f"trace {options.trace!r} has {len(sessions)} usable sessions, {wanted} are needed; lower --agents",
                "invalid_argument",
            )
    else:
        sessions = traces.generate(options.dataset, wanted, options.seed)
    return list(traces.scale(sessions, options.scale, block_size=options.tokens_per_block, turns=options.turns))


def arrivals(options: DemoOptions) -> list[float] | None:
    """When each agent begins, in seconds; None: all at once."""
    if options.rate == 0:
        return None
    gaps = np.random.default_rng(options.seed).exponential(1 / options.rate, options.agents)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]


def stored_prefix(session: traces.Session, vocab: int, per_block: int) -> "np.ndarray[Any, Any]":
    """What the first turn's prompt shares with storage: all of it but what an average turn appends."""
    conversation = traces.Conversation(session, vocab)
    prompt = conversation.prompt()
    lengths = [turn.input_tokens for turn in session.turns]
    appended = [later - earlier for earlier, later in itertools.pairwise(lengths) if later > earlier]
    append = int(np.mean(appended)) if appended else per_block
    keep = max(0, len(prompt) - max(1, append)) // per_block * per_block
    return prompt[:keep]


def _most_blocks(session: traces.Session, per_block: int) -> int:
    return max(-(-(turn.input_tokens + turn.output_tokens) // per_block) for turn in session.turns)


def _staging_for(longest_blocks: int, options: DemoOptions) -> int:
    """2 GiB, or room for two of the longest prompts beside what transit keeps."""
    layer_bytes = MODEL_TOKEN_BYTES * options.tokens_per_block
    return max(2 << 30, 3 * longest_blocks * 16 * layer_bytes)


class _Demo:
    """One topology: its processes, its storage, its modes."""

    def __init__(
        self,
        options: DemoOptions,
        topology: Topology,
        directory: pathlib.Path,
        progress: Progress,
        bed: Testbed | None,
        high: AllToAll | None,
    ) -> None:
        self.options = options
        self.topology = topology
        self.directory = directory
        self.progress = progress
        self.high = high
        self.vocab = TORCH_VOCAB if options.engine == "torch" else MODELLED_VOCAB
        sessions = load_sessions(options)
        self.sessions, self.alone = sessions[:-1], sessions[-1:]
        # Each session has one turn in flight; two blocks more for what is partly filled.
        blocks = [_most_blocks(session, options.tokens_per_block) + 2 for session in sessions]
        devices = [f"cuda:{gpu.ordinal}" for gpu in options.gpus()] or ["cpu"]
        self.cluster = Cluster(topology, self._config(sum(blocks)), bed, devices)
        self.staging = options.staging if options.staging != "auto" else _staging_for(max(blocks), options)
        self.wrong_tokens: dict[int, list[int]] | None = None

    def _config(self, blocks: int) -> dict[str, Any]:
        options = self.options
        config: dict[str, Any] = {
            "engine": options.engine,
            "tokens_per_block": options.tokens_per_block,
            "block_count": blocks,
        }
        if options.engine == "torch":
            config["model"] = TORCH_MODEL if options.model == "gqa" else MLA_MODEL
        else:
            # The bytes of the torch model.
            config.update(
                layers=MODEL_LAYERS, layer_bytes=MODEL_TOKEN_BYTES * options.tokens_per_block, costs=dict(options.costs)
            )
        return config

    async def populate(self) -> pathlib.Path:
        """Stores every session's context as it was before the first turn."""
        root = self.directory / "seed"
        step = self.progress.stage(f"{self.topology} populate storage", len(self.sessions) + 1)
        await self.cluster.open(str(root), self.options.transport, str(self.directory), {"staging": self.staging})
        engines = self.cluster.prefill

        async def one(i: int, session: traces.Session) -> None:
            tokens = stored_prefix(session, self.vocab, self.options.tokens_per_block)
            if len(tokens):
                await engines[i % len(engines)].call("populate", tokens=tokens.tolist())
            step()

        # One at a time an engine: a forward pass of a whole context is all its core can do.
        everyone = list(enumerate(self.sessions + self.alone))
        await asyncio.gather(*(self._in_turn(one, everyone[k :: len(engines)]) for k in range(len(engines))))
        await self.cluster.close_nodes()
        return root

    @staticmethod
    async def _in_turn(call: Callable[..., Any], items: Sequence[tuple[int, Any]]) -> None:
        for item in items:
            await call(*item)

    async def run_mode(self, name: str, seed: pathlib.Path) -> ModeRun:
        """One mode over a copy of the seed (hard links: nothing is written twice)."""
        mode = MODES[name]
        root = self.directory / name
        shutil.copytree(seed, root, copy_function=os.link)
        options = {
            "staging": self.staging,
            "policy": mode.policy,
            "resident": mode.resident,
            "deadline_s": self.options.deadline_s,
            # On a testbed the kernel holds the node's reads back, and the store knows nothing of it.
            "store_options": {"read_limit": 0 if self.options.testbed else self.options.snic_limit},
        }
        await self.cluster.open(str(root), self.options.transport, str(self.directory), options)
        replayer = Replayer(self.cluster, self.vocab, spread=mode.spread, sticky=mode.resident)
        turns = sum(len(session.turns) for session in self.sessions + self.alone)
        step = self.progress.stage(f"{self.topology} {name}", turns)
        if mode.resident:
            await self._warm(replayer)
        high_alone = await self._high_alone()
        alone = await replayer.run(self.alone, step)
        before = await self._bytes_read()
        self.cluster.samples.clear()
        if self.high:
            self.high.start()
        replay = await replayer.run(self.sessions, step, arrivals(self.options))
        high = await self._high_beside(high_alone)
        stats = [await engine.call("stats") for engine in self.cluster.engines]
        run = self._summary(name, replay, alone, before, stats)
        run.high = high
        run.samples = list(self.cluster.samples)
        await self.cluster.close_nodes()
        shutil.rmtree(root)
        return run

    async def _warm(self, replayer: Replayer) -> None:
        """The oracle's caches hold every stored context before the clock starts."""
        for i, session in enumerate(self.sessions + self.alone):
            agent = i if i < len(self.sessions) else 0
            tokens = stored_prefix(session, self.vocab, self.options.tokens_per_block)
            if len(tokens):
                await replayer.warm(agent, tokens)

    async def _high_alone(self) -> list[float]:
        if self.high is None:
            return []
        self.high.start()
        await asyncio.sleep(_HIGH_ALONE_S)
        return await asyncio.to_thread(self.high.stop)

    async def _high_beside(self, alone: list[float]) -> HighTraffic | None:
        if self.high is None:
            return None
        first = Percentiles.of(alone)
        then = Percentiles.of(await asyncio.to_thread(self.high.stop))
        return HighTraffic(first, then, then.p99 / first.p99 if first.p99 else 0.0)

    async def _bytes_read(self) -> dict[str, int]:
        return {e.name: (await e.call("stats"))["store"]["bytes_read"] for e in self.cluster.engines}

    def _summary(
        self, name: str, replay: Replay, alone: Replay, before: dict[str, int], stats: list[dict[str, Any]]
    ) -> ModeRun:
        limit = self.options.snic_limit
        used: dict[str, list[float]] = {"prefill": [], "decode": []}
        fallbacks: dict[str, int] = {}
        for engine, stat in zip(self.cluster.engines, stats, strict=True):
            read = stat["store"]["bytes_read"] - before[engine.name]
            used[engine.role].append(read / (limit * replay.seconds) if limit else 0.0)
            for what, count in stat["fallbacks"].items():
                fallbacks[what] = fallbacks.get(what, 0) + count
        total = sum(len(session.turns) for session in self.sessions)
        return ModeRun(
            mode=name,
            topology=str(self.topology),
            jct_s=replay.seconds,
            prompt_tokens_per_s=sum(t.prompt_tokens for t in replay.turns) / replay.seconds,
            ttft_s=Percentiles.of([t.ttft_s for t in replay.turns]),
            ttft_alone_s=Percentiles.of([t.ttft_s for t in alone.turns]),
            bytes={
                **path_bytes(replay),
                "saved": sum(s["store"]["bytes_saved"] for s in stats),
                "by_rdma": sum(link.get("rdma", {}).get("bytes_written_low", 0) for s in stats for link in s["links"]),
            },
            snic_utilisation={role: float(np.mean(values)) for role, values in used.items()},
            exact={"ok": sum(t.wrong_blocks == 0 for t in replay.turns), "total": total},
            failures=replay.failures + alone.failures,
            fallbacks=fallbacks,
            replay=replay,
        )

    async def check_tokens(self, runs: Sequence[ModeRun]) -> None:
        """Counts turns whose tokens are exactly those of generation without a cache.

        All modes must have produced the same conversations; each distinct one is checked by one dense pass.
        """
        conversations: dict[tuple[int, bytes], list[tuple[ModeRun, list[tuple[int, int]]]]] = {}
        for run in runs:
            assert run.replay is not None
            for agent, tokens in run.replay.conversations.items():
                spans = [t.output for t in run.replay.turns if t.agent == agent]
                conversations.setdefault((agent, tokens.tobytes()), []).append((run, spans))
            run.exact["ok"] = 0
        step = self.progress.stage(f"{self.topology} check tokens", len(conversations))
        engines = self.cluster.engines

        async def one(i: int, item: Any) -> None:
            (_, raw), users = item
            tokens = np.frombuffer(raw, dtype=np.uint32)
            spans = users[0][1]  # the same for all who said these tokens
            wrong = await engines[i % len(engines)].call("check", tokens=tokens.tolist(), spans=spans)
            for run, _ in users:
                run.exact["ok"] += sum(count == 0 for count in wrong)
            step()

        everything = list(enumerate(conversations.items()))
        await asyncio.gather(*(self._in_turn(one, everything[k :: len(engines)]) for k in range(len(engines))))


@contextlib.contextmanager
def _place(
    options: DemoOptions, topology: Topology, directory: pathlib.Path
) -> Iterator[tuple[Testbed | None, AllToAll | None]]:
    """Where engines run: on nodes of a testbed, or just here."""
    if not options.testbed:
        yield None, None
        return
    nodes = topology.prefill + topology.decode
    with (
        Testbed(nodes, rate=options.cnic_limit, storage=options.snic_limit, path=directory) as bed,
        AllToAll(bed) as high,
    ):
        yield bed, high


async def _run(options: DemoOptions, progress: Progress, directory: pathlib.Path) -> DemoResult:
    runs: list[ModeRun] = []
    for topology in options.topologies:
        place = directory / str(topology)
        place.mkdir()
        with _place(options, topology, place) as (bed, high):
            demo = _Demo(options, topology, place, progress, bed, high)
            async with demo.cluster:
                seed = await demo.populate()
                mine = [await demo.run_mode(mode, seed) for mode in options.modes]
                if options.engine == "torch":
                    await demo.check_tokens(mine)
        shutil.rmtree(place)
        basic = next((run.jct_s for run in mine if run.mode == "basic"), 0.0)
        for run in mine:
            run.speedup = basic / run.jct_s if run.jct_s else 0.0
        runs += mine
    labels = {
        "memory": ", ".join(sorted({gpu.name for gpu in options.gpus()})) or "host",
        "transport": options.transport,
        "snic": ("cgroup" if options.testbed else "bucket") if options.snic_limit else "none",
        "engine": options.engine,
        "topology": ",".join(str(topology) for topology in options.topologies),
        "network": "namespaces, HTB lanes" if options.testbed else "none",
    }
    return DemoResult(labels, runs)


def run_demo(options: DemoOptions, progress: Progress) -> DemoResult:
    """Runs everything; leaves no file and no process behind, however it ends."""
    options.check()
    if options.work_dir:
        os.makedirs(options.work_dir, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="dualkv-demo-", dir=options.work_dir))
    try:
        return asyncio.run(_run(options, progress, directory))
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
