"""The tables of benchmarks that measure more than speed against a limit."""

from dualkv.bench.columns import PEERS, SPEED, Column, View, number, own
from dualkv.sizes import format_size


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _us(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _share(share: float) -> str:
    return f"{share:.1%}"


def _whole(count: float) -> str:
    return f"{count:.0f}"


def _two(value: float) -> str:
    return number(value)


def _said(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


_LAYERS = View(
    "a load layer by layer",
    (
        own("transfer\nms", "transfer_s", _ms),
        Column("\nGB/s", lambda row: number(row.gbps)),
        Column("ours/\nlimit", lambda row: number(row.ratio)),
        own("\ncost", "cost", lambda share: f"{share:+.1%}"),
        own("layer 0\nms", "first_layer_s", _ms),
        own("layer 0\nspeed-up", "first_layer_speedup", lambda times: f"{times:.1f}x"),
        own("compute\nms", "compute_s", _ms),
        own("both\nms", "total_s", _ms),
        own("\noverlap", "overlap", _share),
        own("but one\nlayer", "overlap_one_layer", _share),
        own("hand over\nms", "hand_over_s", _ms),
    ),
    names_limits=True,
    note="transfer: the load alone; compute: as much again, spread over the layers; both: until the last layer is "
    "computed; overlap: the longer of the two against both; but one layer: against the longer one and one layer of "
    "it, which nothing can hide; cost: of the transfer, against whole blocks; hand over: from the last layer's compute "
    "until the decode node has the prompt. Medians over the repeats, each against its own.",
)

_REGISTER = View(
    "staging from nothing",
    (
        own("open\nms", "open_s", _ms),
        own("all ready\nms", "ready_s", _ms),
        own("store\nopen ms", "store_open_s", _ms),
        own("of it, re-\ngister ms", "register_s", _ms),
        Column("in all\nGB/s", lambda row: number(row.gbps)),
        Column("limit\nGB/s", lambda row: number(row.limit_gbps)),
        Column("ours/\nlimit", lambda row: number(row.ratio)),
        own("\npages", "pages", _said),
        own("\nlocked", "locked", _said),
        own("\nchunks", "chunks", _whole),
        own("prepare\nms", "prepare_s", _ms),
    ),
    names_limits=True,
    note="open: until the call returns; all ready: until all of it is; store open: of one on top; register: what that "
    "takes longer than on the least staging (what was not locked is faulted in only now); in all: all ready and "
    "registered; pages and locked: what the kernel gave.",
)

_ASYNC = View(
    "loads at a time on one event loop",
    (
        own("\nloads/s", "loads_per_s", _whole),
        own("\ndone", "completed", _whole),
        own("wake-up\np50 µs", "wake_us_p50", _us),
        own("\np99 µs", "wake_us_p99", _us),
        own("one at a time\np50 µs", "alone_wake_us_p50", _us),
        own("\np99 µs", "alone_wake_us_p99", _us),
        own("limit\np50 µs", "limit_wake_us_p50", _us),
        own("\np99 µs", "limit_wake_us_p99", _us),
        own("threads\nbefore", "threads_before", _whole),
        own("in\nflight", "threads_in_flight", _whole),
        own("\nafter", "threads_after", _whole),
        own("RSS\na load", "rss_per_load_bytes", format_size),
    ),
    wanted=lambda row: "loads" in row.case,
    names_limits=True,
    note="wake-up: from a layer being in place until the coroutine that awaits it runs, of layers that were waited "
    "for; with many loads at a time it is the loop's own backlog.",
)

_IDLE = View(
    "nodes with nothing to do",
    (
        own("CPU, share\nof a core", "idle_cpu_share", lambda share: f"{share:.3%}"),
        own("\nthreads", "threads", _whole),
    ),
    wanted=lambda row: "idle_s" in row.case,
)

_SOAK = View(
    "what was moved, and what went wrong",
    (
        own("read\nGB/s", "read_gbps", _two),
        own("written\nGB/s", "written_gbps", _two),
        own("by the\nhelper", "helped_share", _share),
        own("\nloads", "loads", _whole),
        own("\nfailed", "failed", _whole),
        own("blocks\nevicted", "evicted_blocks", _whole),
        own("blocks\nlost", "lost", _whole),
        own("bytes\nwrong", "wrong_bytes", _whole),
    ),
    note="lost: saved, within what quota or grace keep, and neither matched nor read; must be 0, as wrong bytes.",
)

_SOAK_PROCESS = View(
    "what it held",
    (
        own("RSS\nstart", "rss_start_bytes", format_size),
        own("\nmax", "rss_max_bytes", format_size),
        own("\nend", "rss_end_bytes", format_size),
        own("slope\nMiB/min", "rss_slope_mib_per_min", _two),
        own("2nd node\nMiB/min", "second_rss_slope_mib_per_min", _two),
        own("fds\nstart", "fds_start", _whole),
        own("\nend", "fds_end", _whole),
        own("fallbacks\nstart", "fallbacks_start", _whole),
        own("\nend", "fallbacks_end", _whole),
    ),
    note="RSS of the measured process from the end of the warm-up on; fds and fallbacks of both processes, before and "
    "after.",
)

_POLICY = View(
    "what scheduling costs",
    (
        own("µs a\nrequest", "us_per_request", _two),
        own("around\nthem", "around_us_per_request", _two),
        own("\nrequests", "requests", _whole),
        own("waiting\nat the end", "waiting", _whole),
        own("RSS MiB, a\nquarter in", "rss_first_mib", _two),
        own("\nat the end", "rss_last_mib", _two),
    ),
    note="a request: submit, assignment to both engines, choice of the reading side, end; reports of every engine "
    "with every fetch of its group. Around them: making the reports and reading the answers, in Python.",
)


def _rate(value: float) -> str:
    return f"{value / 1e6:.1f}"


_LANES = View(
    "HIGH beside a saturated LOW",
    (
        own("idle\np50 µs", "idle_p50_us", _us),
        own("\np99 µs", "idle_p99_us", _us),
        own("loaded\np50 µs", "loaded_p50_us", _us),
        own("\np99 µs", "loaded_p99_us", _us),
        own("loaded/idle\np50", "p50_ratio", _two),
        own("\np99", "p99_ratio", _two),
        own("HIGH alone\nMB/s", "high_alone", _rate),
        own("beside\nLOW", "high_beside", _rate),
        own("\nshare", "high_share", _two),
        own("LOW beside\nhalf a HIGH", "low_beside_half", _rate),
        own("of what\nis left", "low_of_rest", _two),
        own("runs\nisolated", "isolated", _whole),
    ),
    note="latency: round trips of 64 bytes on HIGH; loaded: beside four connections that fill LOW; share: of HIGH's "
    "throughput alone; 1 less it is the leakage. Isolated: both ratios at most 1.5 and the share at least "
    "0.95. Medians over the repeats.",
)

_OWN: dict[str, tuple[View, ...]] = {
    "policy": (_POLICY,),
    "lanes": (_LANES,),
    "layers": (_LAYERS,),
    "register": (_REGISTER,),
    "async": (_ASYNC, _IDLE),
    "soak": (_SOAK, _SOAK_PROCESS),
}


def views_of(bench: str) -> tuple[View, ...]:
    """Of a benchmark, by its name."""
    return _OWN.get(bench, (SPEED, PEERS))


def notes_of(bench: str) -> list[str]:
    """How to read its tables."""
    return [view.note for view in views_of(bench) if view.note]
