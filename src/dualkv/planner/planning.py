"""A plan: bytes and compute of a turn, turns per second on P and D nodes, what binds, and a better P:D."""

from dataclasses import asdict, dataclass
from typing import Any

from dualkv.errors import invalid
from dualkv.planner.hardware import Hardware
from dualkv.planner.models import KV_DTYPES, Model
from dualkv.planner.traffic import Link, Range, busiest, feasible, gain, links


@dataclass(frozen=True)
class Workload:
    """Turns that are all alike.

    Attributes:
        context: tokens of the prompt, the new ones included.
        append: new tokens of the prompt; the KV of all others is in storage.
        generate: tokens generated.
        agents: turns at a time at most; None: as many as fit.
        rate: turns/s asked for; None: as many as go.
        hold_s: how long a turn's KV stays in staging, from its read to its copy into the decode engine's cache.
    """

    context: int
    append: int
    generate: int
    agents: int | None = None
    rate: float | None = None
    hold_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.append < self.context:
            cure = "give at least 1 new token, and fewer than the context has"
            raise invalid(f"workload: {self.append} new tokens of a context of {self.context}: {cure}")
        if self.generate < 0 or self.hold_s <= 0:
            raise invalid(f"workload: generate {self.generate} and hold_s {self.hold_s}: not below 0, and above 0")
        if (self.agents is not None and self.agents < 1) or (self.rate is not None and self.rate <= 0):
            raise invalid(f"workload: agents {self.agents}, rate {self.rate}: more than 0, or leave them out")

    @property
    def hit(self) -> int:
        """Tokens read from storage."""
        return self.context - self.append

    @property
    def hit_rate(self) -> float:
        """Of the prompt's tokens."""
        return self.hit / self.context


@dataclass(frozen=True)
class Recommendation:
    """P:D for a number of nodes; both None, with the reason, where none will do."""

    prefill: int | None
    decode: int | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """All that ``dualkv plan`` prints. Rates are per second and of all nodes together, unless the name says a node.

    ``turns_storage_basic`` and ``turns_storage_dual`` are what storage and links allow, ``turns_compute`` what prefill
    GPUs do (None: their FLOP/s are not known), ``turns`` what comes of it.
    """

    model: str
    kv_dtype: str
    prefill: int
    decode: int
    hardware: Hardware
    workload: Workload
    range: Range
    links: tuple[Link, ...]
    ideal_gain: float
    hit_rate: float
    kv_bytes_per_token: int
    read_bytes_per_turn: int
    written_bytes_per_turn: int
    prefill_flops_per_turn: int
    gb_per_pflop: float
    turns_storage_basic: float
    turns_storage_dual: float
    turns_compute: float | None
    turns: float
    turns_in_flight: float
    tokens_in_flight: float
    staging_bytes_prefill_node: float
    staging_bytes_decode_node: float
    contexts_in_hbm_decode_node: int | None
    binds: str
    why: str
    recommendation: Recommendation

    def to_json(self) -> dict[str, Any]:
        """The same, for json.dumps."""
        out = asdict(self)
        out["links"] = [{**asdict(link), "share": link.share} for link in self.links]
        out["range"] |= {"empty": self.range.empty}
        if self.range.lower == float("inf"):
            out["range"]["lower"] = None
        return out


def plan(
    node: Hardware, model: Model, workload: Workload, prefill: int, decode: int, *, kv_dtype: str | None = None
) -> Plan:
    """What P prefill and D decode nodes do with a workload; recommends a P:D for as many nodes."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise invalid(f"KV dtype {kv_dtype!r}: known are {', '.join(KV_DTYPES)}")
    dtype = kv_dtype or model.kv_dtype
    read = model.kv_bytes(workload.hit, dtype)
    flops = model.prefill_flops(workload.hit, workload.append)
    of = links(node, prefill, decode)
    basic = _storage_turns(links(node, prefill, decode, dual=False), prefill * node.snic, read)
    # Where a link would be over its capacity, reads on the DE path can be left out; it never gets worse than basic.
    dual = max(basic, _storage_turns(of, (prefill + decode) * node.snic, read))
    compute = None if node.gpu_flops is None else prefill * node.gpus * node.gpu_flops / flops
    turns = min(turns for turns in (dual, compute, workload.rate) if turns is not None)
    binds, why = _what_binds(node, of, prefill / decode, dual, compute, workload.rate)
    prompt = model.kv_bytes(workload.context, dtype)
    in_flight = min(turns * workload.hold_s, float("inf") if workload.agents is None else workload.agents)
    held = model.kv_bytes(workload.context + workload.generate, dtype)
    return Plan(
        model=model.name,
        kv_dtype=dtype,
        prefill=prefill,
        decode=decode,
        hardware=node,
        workload=workload,
        range=feasible(node),
        links=of,
        ideal_gain=gain(prefill, decode),
        hit_rate=workload.hit_rate,
        kv_bytes_per_token=model.kv_bytes_per_token(dtype),
        read_bytes_per_turn=read,
        written_bytes_per_turn=model.layers * model.layer_bytes(dtype) * (workload.append + workload.generate),
        prefill_flops_per_turn=flops,
        gb_per_pflop=model.gb_per_pflop(workload.context, workload.append, dtype),
        turns_storage_basic=basic,
        turns_storage_dual=dual,
        turns_compute=compute,
        turns=turns,
        turns_in_flight=in_flight,
        tokens_in_flight=in_flight * workload.context,
        # Each node reads as much as any other, so the PE path has P/(P+D) of all hits.
        staging_bytes_prefill_node=in_flight * read / (prefill + decode),
        staging_bytes_decode_node=in_flight * prompt / decode,
        contexts_in_hbm_decode_node=None if node.gpu_hbm is None else node.gpus * node.gpu_hbm // held,
        binds=binds,
        why=why,
        recommendation=recommend(node, prefill + decode, read, flops),
    )


def _storage_turns(of: tuple[Link, ...], read_rate: float, read_bytes: int) -> float:
    """Turns/s, all slowed down alike where a link is over its capacity."""
    return read_rate / max(1.0, busiest(of).share) / read_bytes


def recommend(node: Hardware, nodes: int, read_bytes: int, flops: int) -> Recommendation:
    """P:D of ``nodes`` nodes.

    Every P:D in the range reads equally fast: all storage NICs are full. So, of those in the range: keep the ones
    whose prefill GPUs keep up with that, where the GPUs' FLOP/s are known (if none does, the one with the most prefill
    nodes); then take the one whose busiest link has the most headroom.
    """
    if nodes < 2:
        raise invalid(f"{nodes} nodes: at least 2, a prefill and a decode node")
    allowed = feasible(node)
    if allowed.empty:
        return Recommendation(None, None, "no P:D will do: slower storage NICs or faster compute NICs and DRAM would")
    fitting = [p for p in range(1, nodes) if allowed.contains(p / (nodes - p))]
    if not fitting:
        ends = f"from {allowed.lower:.3g} to {allowed.upper:.3g}"
        return Recommendation(None, None, f"no P:D of {nodes} nodes is in the range {ends}: add nodes")
    keep, reason = fitting, ""
    if node.gpu_flops is not None:
        needed = nodes * node.snic / read_bytes * flops / (node.gpus * node.gpu_flops)
        keep = [p for p in fitting if p >= needed] or fitting[-1:]
        enough = "keeps up with storage" if keep[0] >= needed else "comes nearest to storage, but binds"
        reason = f"prefill compute {enough} (it takes {needed:.3g} prefill nodes); "
    best = min(keep, key=lambda p: busiest(links(node, p, nodes - p)).share)
    link = busiest(links(node, best, nodes - best))
    return Recommendation(best, nodes - best, f"{reason}busiest link {link.name} at {link.share:.0%}")


def _what_binds(
    node: Hardware, of: tuple[Link, ...], ratio: float, dual: float, compute: float | None, rate: float | None
) -> tuple[str, str]:
    """The name of what limits turns/s, and a sentence."""
    if rate is not None and rate < min(dual, dual if compute is None else compute):
        return "rate", f"Nothing binds: the {rate:.3g} turns/s asked for are less than the nodes can do."
    if compute is not None and compute < dual:
        why = f"Prefill compute binds: the GPUs do {compute:.3g} turns/s, storage and links {dual:.3g}."
        return "prefill compute", f"{why} More storage bandwidth won't help, more prefill nodes will."
    link = busiest(of)
    if link.share > 1 + 1e-9:
        allowed = feasible(node)
        ends = "no P/D avoids that" if allowed.empty else f"P/D must be from {allowed.lower:.3g} to {allowed.upper:.3g}"
        why = f"{link.name} binds: with all storage NICs full at P/D {ratio:.3g} it would carry {link.share:.0%}"
        return link.name, f"{why} of its capacity ({ends})."
    return "storage NICs", (
        f"Storage NICs bind: at P/D {ratio:.3g} the busiest other link, {link.name}, is at {link.share:.0%}."
    )
