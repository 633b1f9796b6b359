"""``dualkv bench policy``: what the scheduler costs a request, its bookkeeping and this language's calls included."""

import collections
import random
import time
from dataclasses import dataclass

import dualkv
from dualkv.bench import machine
from dualkv.bench.measure import Stage
from dualkv.bench.results import BenchResult, CaseValue, Row
from dualkv.bench.second_node import resident_bytes
from dualkv.errors import invalid

_CONTEXT_TOKENS = 32_768
_MEMORY_TOKENS = 2_000_000  # of a decode engine
_IN_FLIGHT = 16  # requests an engine has at a time, on average
_SAMPLES = 64  # of memory


@dataclass(frozen=True)
class PolicyOptions:
    """What to measure."""

    engines: int = 1152
    group: int = 8
    requests: int = 1_000_000

    def check(self) -> None:
        """Raises Error for what makes no sense."""
        if self.engines < 2 * self.group or self.engines % (2 * self.group):
            raise invalid(f"--engines {self.engines}: must be a multiple of two groups, {2 * self.group}")


class _Cluster:
    """Engines that finish requests in the order they came, and report as they fetch."""

    def __init__(self, options: PolicyOptions) -> None:
        self.noise = random.Random(1)
        self.scheduler = dualkv.Scheduler(short_queue_tokens=4_000_000, full_tokens=1_000_000)
        self.groups: list[tuple[str, list[str]]] = []
        for first in range(0, options.engines, options.group):
            role = "prefill" if len(self.groups) % 2 == 0 else "decode"
            name = f"{role}-group-{len(self.groups)}"
            names = [f"{role}-{first + i}" for i in range(options.group)]
            for engine in names:
                self.scheduler.join(engine, role, group=name, node=name)  # type: ignore[arg-type]
            self.groups.append((name, names))
        self.seen: collections.defaultdict[str, int] = collections.defaultdict(int)
        self.tokens: collections.defaultdict[str, int] = collections.defaultdict(int)
        self.count: collections.defaultdict[str, int] = collections.defaultdict(int)
        self.placed: collections.deque[tuple[int, str, str, int]] = collections.deque()
        self.sizes: dict[int, int] = {}
        self.spent_s = 0.0  # in the scheduler, what it keeps included
        self.around_s = 0.0  # making reports, reading answers
        self.done = 0
        self.next = 0

    def submit(self, count: int) -> None:
        """New requests: tens of thousands of tokens, nearly all of them stored."""
        asked = []
        for _ in range(count):
            self.next += 1
            tokens = self.noise.randrange(_CONTEXT_TOKENS // 4, _CONTEXT_TOKENS)
            self.sizes[self.next] = tokens
            asked.append((self.next, tokens))
        began = time.perf_counter()
        for request, tokens in asked:
            self.scheduler.submit(request, tokens, tokens - 400)
        self.spent_s += time.perf_counter() - began

    def fetch(self, name: str, engines: list[str]) -> None:
        """A group's turn: reports are made, answers read and taken in."""
        at = [time.perf_counter()]
        reports = [
            dualkv.EngineReport(
                engine,
                requests=self.count[engine],
                tokens=self.tokens[engine],
                free_tokens=_MEMORY_TOKENS - self.tokens[engine],
                seen=self.seen[engine],
            )
            for engine in engines
        ]
        at.append(time.perf_counter())
        got = self.scheduler.fetch(name, reports)
        assignments, placements = got.assignments, got.placements
        at.append(time.perf_counter())
        for one in assignments:
            engine = one.engine
            self.seen[engine] = one.number
            self.tokens[engine] += self.sizes[one.request]
            self.count[engine] += 1
        for one in placements:
            request, prefill, decode = one.request, one.prefill, one.decode
            reader = decode if one.read == dualkv.Path.DECODE else prefill
            self.seen[reader] = max(self.seen[reader], one.number)
            self.placed.append((request, prefill, decode, self.sizes[request]))
        at.append(time.perf_counter())
        self.spent_s += at[2] - at[1]
        self.around_s += at[1] - at[0] + at[3] - at[2]

    def finish(self, keep: int) -> None:
        """All but the newest ``keep`` are computed and decoded."""
        ended = [self.placed.popleft() for _ in range(max(0, len(self.placed) - keep))]
        began = time.perf_counter()
        for request, *_ in ended:
            self.scheduler.prefilled(request)
            self.scheduler.finished(request)
        self.spent_s += time.perf_counter() - began
        for request, *engines, tokens in ended:
            del self.sizes[request]
            for engine in engines:
                self.tokens[engine] -= tokens
                self.count[engine] -= 1
        self.done += len(ended)


def run_policy(options: PolicyOptions, stage: Stage) -> BenchResult:
    """Requests come, are assigned, placed, and end; the calls are timed, and the work around them. Raises Error."""
    options.check()
    cluster = _Cluster(options)
    keep = options.engines * _IN_FLIGHT // 2
    step = stage(f"{options.requests} requests", _SAMPLES)
    resident: list[float] = []
    shown = 0
    while cluster.done < options.requests:
        cluster.submit(options.engines)
        for name, engines in cluster.groups:
            cluster.fetch(name, engines)
        cluster.finish(keep)
        while shown < _SAMPLES and cluster.done * _SAMPLES >= options.requests * (shown + 1):
            resident.append(resident_bytes() / (1 << 20))
            shown += 1
            step()
    measures: dict[str, CaseValue] = {
        "us_per_request": cluster.spent_s / cluster.next * 1e6,
        "around_us_per_request": cluster.around_s / cluster.next * 1e6,
        "requests": cluster.done,
        "waiting": cluster.scheduler.stats()["waiting_prefill"] + cluster.scheduler.stats()["waiting_decode"],
        "rss_first_mib": resident[len(resident) // 4],
        "rss_last_mib": resident[-1],
    }
    labels = machine.labels(transport="none", topology="1 process", path=".")
    case: dict[str, CaseValue] = {"engines": options.engines, "group": options.group}
    row = Row(case, repeats=1, measures=measures, curves={"rss_mib": resident})
    return BenchResult("policy", labels, [row])
