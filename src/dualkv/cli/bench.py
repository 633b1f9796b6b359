"""``dualkv bench``: the data plane against physical limits and released peers. Commands import what they run."""

import functools
import json
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dualkv.cli import values
from dualkv.errors import Error
from dualkv.fabric.plan import SHARE

if TYPE_CHECKING:
    from dualkv.bench.compare import Comparison
    from dualkv.bench.measure import Stage
    from dualkv.bench.results import BenchResult

    Measurement = Callable[[Stage], BenchResult]

_WIDTH = 120


@click.group()
def bench() -> None:
    """Measure the data plane.

    Every figure stands beside what the machine could do, measured in the same run, in turns.
    """


@dataclass(frozen=True)
class Output:
    """Where a result goes."""

    as_json: bool
    html: str | None
    save: str | None

    def check(self) -> None:
        """Raises Error for what could not be written, before anything is measured."""
        if self.html:
            from dualkv.report.plots import require_matplotlib

            require_matplotlib()
        for path in filter(None, (self.html, self.save)):
            folder = pathlib.Path(path).absolute().parent
            if not os.access(folder, os.W_OK):
                raise Error(f"bench: can't write to {str(folder)!r}", "io")

    def run(self, measure: "Measurement") -> None:
        """Measures with bars on stderr, then writes everything that was asked for."""
        from dualkv.cli.progress import bars

        self.check()
        # Ended from outside, it still removes its files and ends its processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with bars() as shown:
            result = measure(shown.stage)
        result.command = shlex.join(["dualkv", *sys.argv[1:]])
        if self.save:
            result.save(self.save)
        if self.html:
            from dualkv.report.bench import write_bench_report

            write_bench_report(result, self.html)
        if self.as_json:
            click.echo(json.dumps(result.to_json(), indent=2))
        else:
            print_result(result)
        for failure in result.failures:
            click.echo(f"failed: {failure}", err=True)
        if result.failures:
            raise SystemExit(1)


def measured(
    *, repeats: int | None, quick: dict[str, Any]
) -> Callable[[Callable[..., "Measurement"]], Callable[..., None]]:
    """The options that all benchmarks have. The command below it returns what measures, given a stage.

    Args:
        repeats: default; None for what runs once.
        quick: values that ``--quick`` gives to options that were left out.
    """

    def decorate(command: Callable[..., "Measurement"]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(as_json: bool, html: str | None, save: str | None, quickly: bool, **options: Any) -> None:
            if quickly:
                options |= {name: value for name, value in quick.items() if not values.given(name)}
            Output(as_json, html, save).run(command(**options))

        for option in reversed(_common_options(repeats)):
            run = option(run)
        return run

    return decorate


def _common_options(repeats: int | None) -> list[Callable[[Any], Any]]:
    path = click.Path(dir_okay=False)
    repeated = [
        click.option("--repeats", type=click.IntRange(1, 1000), default=repeats, show_default=True),
        click.option("--warmup", type=click.IntRange(0, 100), default=1, show_default=True, help="Repeats to drop."),
    ]
    return [
        *(repeated if repeats is not None else []),
        click.option("--quick", "quickly", is_flag=True, help="Little data, few repeats: to see that it works."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of tables."),
        click.option("--html", type=path, help="Write a report with plots."),
        click.option("--save", type=path, help="Write the result, for compare."),
    ]


def _sizes_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--block-bytes", default=default, callback=values.sizes, show_default=True, metavar="SIZE[,...]"
    )


def _total_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--total", default=default, callback=values.size, show_default=True, metavar="SIZE", help="Of all blocks."
    )


_count = click.option("--count", type=click.IntRange(1, 10_000_000), help="Blocks, instead of --total.")
_path = click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, writable=True, resolve_path=True),
    default=".",
    show_default=True,
    help="Where files are written and read; removed in the end.",
)
_direct = click.option(
    "--direct/--no-direct", default=True, show_default=True, help="O_DIRECT, or through an emptied page cache."
)
_nixl_python = click.option("--nixl-python", metavar="PYTHON", help="Interpreter of an environment with NIXL.")
_depth_help = "Blocks being read at once; 0 = the store chooses."


@bench.command(epilog="Example: dualkv bench storage --path /mnt/kv --block-bytes 256KiB,1MiB --html storage.html")
@measured(repeats=5, quick={"total": 8 << 20, "block_bytes": (64 << 10, 256 << 10), "repeats": 2})
@_path
@_sizes_option("64KiB,256KiB,1MiB,4MiB")
@_total_option("256MiB")
@_count
@click.option("--depth", default="0", callback=values.numbers, show_default=True, metavar="N[,...]", help=_depth_help)
@_direct
@click.option("--fio", is_flag=True, help="fio as a second limit.")
@_nixl_python
def storage(**options: Any) -> "Measurement":
    """Read blocks, a file each and verified, against a bare io_uring loop over one file."""
    from dualkv.bench.storage import StorageOptions, run_storage

    return functools.partial(run_storage, StorageOptions(**options))


@bench.command(epilog="Example: dualkv bench transfer --transport tcp --block-bytes 64KiB --count 15000")
@measured(repeats=7, quick={"total": 8 << 20, "block_bytes": (64 << 10,), "connections": (1, 2), "repeats": 2})
@click.option(
    "--transport",
    default="tcp,shm,loopback",
    callback=values.names("tcp", "shm", "loopback", "rdma"),
    show_default=True,
    metavar="NAME[,...]",
    help="rdma too, where there is a device.",
)
@_sizes_option("64KiB,256KiB,1MiB")
@_total_option("512MiB")
@_count
@click.option(
    "--connections",
    default="1,2,4",
    callback=values.numbers,
    show_default=True,
    metavar="N[,...]",
    help="Of tcp; of rdma, queue pairs.",
)
@click.option(
    "--memory",
    default="shared,private",
    callback=values.names("shared", "private"),
    show_default=True,
    metavar="NAME[,...]",
    help="Of shm: what is sent from, Node.allocate() or any memory.",
)
@click.option(
    "--checksums",
    default="known,made",
    callback=values.names("known", "made"),
    show_default=True,
    metavar="NAME[,...]",
    help="Whether the sender has them (as of blocks from storage) or makes them; they are verified either way.",
)
@click.option(
    "--rdma-devices",
    default="",
    callback=lambda _, __, value: tuple(filter(None, value.split(","))),
    metavar="NAME[,NAME]",
    help="The sender's and the receiver's; else the machine's first and last.",
)
def transfer(**options: Any) -> "Measurement":
    """Send blocks to another node, which verifies them.

    Limits: bare sockets (tcp), ib_write_bw (rdma), memcpy (shm, loopback).
    """
    from dualkv.bench.transfer import TransferOptions, run_transfer

    return functools.partial(run_transfer, TransferOptions(**options))


# Of dualkv.bench.copy, which --help need not import.
_COPY_ENGINES = ("cpu", "nic", "gpu-kernel", "gpu-batch", "gpu-memcpy", "gpu-verified", "gpu-nic")


@bench.command(epilog="Example: dualkv bench copy --engine nic --block-bytes 64KiB --counts 1000")
@measured(repeats=7, quick={"counts": (1, 64), "block_bytes": (64 << 10,), "repeats": 2})
@click.option(
    "--engine",
    default=",".join(_COPY_ENGINES),
    callback=values.names(*_COPY_ENGINES),
    show_default=True,
    metavar="NAME[,...]",
    help="Options copy, gpu_copy and gpu_verify of a node; one that this machine has not is named and left out.",
)
@_sizes_option("4KiB,64KiB,1MiB,4MiB")
@click.option("--counts", default="1,64,1000,15000", callback=values.numbers, show_default=True, metavar="N[,...]")
@click.option(
    "--most", default="1GiB", callback=values.size, show_default=True, metavar="SIZE", help="Larger cases are left out."
)
@click.option("--rdma-device", default="", metavar="NAME", help="Of nic and gpu-nic; else the nearest.")
@click.option("--gpu", type=int, default=0, show_default=True, help="Of the gpu- engines.")
def copy(**options: Any) -> "Measurement":
    """Copy blocks within a node by its CPU or its NIC, against memcpy; to a GPU and back, against one pinned copy."""
    from dualkv.bench.copy import CopyOptions, run_copy

    return functools.partial(run_copy, CopyOptions(**options))


@bench.command(epilog="Example: dualkv bench peers --nixl-python ~/nixl/bin/python --mooncake-python ~/mc/bin/python")
@measured(repeats=7, quick={"total": 8 << 20, "block_bytes": (64 << 10,), "repeats": 2})
@_nixl_python
@click.option("--mooncake-python", metavar="PYTHON", help="Interpreter of an environment with Mooncake.")
@_path
@_sizes_option("64KiB,1MiB")
@_total_option("256MiB")
@_count
@click.option("--connections", type=int, default=2, show_default=True, help="Of tcp; the default is the node's.")
@click.option("--depth", type=int, default=0, show_default=True, help=_depth_help)
@_direct
def peers(**options: Any) -> "Measurement":
    """Transfers and storage reads beside NIXL and Mooncake: same blocks, same order.

    Peers run in their own Python environments. One that is missing or fails is named; with none at all, exit 77.
    """
    from dualkv.bench.peers import PeersOptions, run_peers

    return functools.partial(run_peers, PeersOptions(**options))


def _size_option(name: str, default: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, default=default, callback=values.size, show_default=True, metavar="SIZE", help=help)


def _limit_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    return 0 if value == "auto" else values.size(context, parameter, value)


def _transport_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--transport",
        type=click.Choice(["tcp", "shm"]),
        default=default,
        show_default=True,
        help="To the second node.",
    )


@bench.command(epilog="Example: dualkv bench layers --path /mnt/kv --layers-per-read 0,4 --trace layers-trace.json")
@measured(repeats=5, quick={"layers": 8, "layer_bytes": 16 << 10, "blocks": 8, "read_limit": 10**8, "repeats": 2})
@_path
@click.option("--layers", type=int, default=32, show_default=True)
@_size_option("--layer-bytes", "64KiB", "Of a layer of a block.")
@click.option("--blocks", type=int, default=64, show_default=True, help="Of the hit.")
@click.option(
    "--layers-per-read",
    default="0,2,4,8",
    callback=values.numbers,
    show_default=True,
    metavar="N[,...]",
    help="Layers that storage reads at once; 0 is whole blocks.",
)
@click.option(
    "--read-limit",
    default="1GB/s",
    callback=_limit_size,
    show_default=True,
    metavar="RATE",
    help="Token bucket of each node, that stands in for a storage NIC; 0 or auto: none.",
)
@click.option("--decode", is_flag=True, help="A decode node in a process of its own reads half, and gets the prompt.")
@_transport_option("tcp")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a timeline of the last loads, for Perfetto.")
def layers(**options: Any) -> "Measurement":
    """Load layer by layer: how much of it compute hides, and what reading by groups of layers does."""
    from dualkv.bench.layers import LayersOptions, run_layers

    return functools.partial(run_layers, LayersOptions(**options))


@bench.command(epilog="Example: dualkv bench register --size 4GiB --lazy")
@measured(repeats=3, quick={"size": (16 << 20, 32 << 20), "repeats": 2})
@_path
@click.option("--size", default="256MiB,1GiB,4GiB", callback=values.sizes, show_default=True, metavar="SIZE[,...]")
@click.option("--lazy", is_flag=True, help="Also pools that open before all of it is ready.")
def register(**options: Any) -> "Measurement":
    """Open staging, locked or not, in huge pages or not, against one thread that populates as much memory."""
    from dualkv.bench.register import RegisterOptions, run_register

    return functools.partial(run_register, RegisterOptions(**options))


@bench.command("async", epilog="Example: dualkv bench async --loads 1000,10000,100000")
@measured(repeats=3, quick={"loads": (10, 100), "idle_s": 0.5, "repeats": 2})
@_path
@click.option(
    "--loads", default="1000,10000", callback=values.numbers, show_default=True, metavar="N[,...]", help="At a time."
)
@click.option("--layers", type=int, default=2, show_default=True)
@_size_option("--layer-bytes", "4KiB", "Of a layer of a block.")
@click.option("--blocks", type=int, default=2, show_default=True, help="Of each load.")
@click.option("--idle-s", type=click.FloatRange(0.1, 600), default=5.0, show_default=True, help="Of idling, seconds.")
def async_(**options: Any) -> "Measurement":
    """Await many loads on one event loop; then do nothing, and see what that costs."""
    from dualkv.bench.async_loads import AsyncOptions, run_async

    return functools.partial(run_async, AsyncOptions(**options))


@bench.command(epilog="Example: dualkv bench policy --engines 1152 --requests 10000000")
@measured(repeats=None, quick={"engines": 64, "requests": 2000})
@click.option("--engines", type=click.IntRange(2, 1_000_000), default=1152, show_default=True)
@click.option("--group", type=click.IntRange(1, 10_000), default=8, show_default=True, help="Engines of a group.")
@click.option("--requests", type=click.IntRange(1), default=1_000_000, show_default=True)
def policy(**options: Any) -> "Measurement":
    """Schedule requests on many engines: microseconds each, and whether memory stays flat."""
    from dualkv.bench.policy import PolicyOptions, run_policy

    return functools.partial(run_policy, PolicyOptions(**options))


@bench.command(epilog="Example: sudo dualkv bench lanes --rate 125MB/s --html lanes.html")
@measured(repeats=3, quick={"seconds": 0.3, "repeats": 1, "warmup": 0})
@_size_option("--rate", "125MB/s", "Of each link, bytes.")
@click.option(
    "--share",
    type=click.FloatRange(0.5, 1, max_open=True),
    default=SHARE,
    show_default=True,
    help="Of a link for HIGH while both lanes want it.",
)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=3.0, show_default=True, help="Of each flow.")
def lanes(**options: Any) -> "Measurement":
    """Does LOW delay HIGH? On a testbed of network namespaces (root), with lanes and with one queue for all."""
    from dualkv.bench.lanes import LanesOptions, run_lanes

    return functools.partial(run_lanes, LanesOptions(**options))


@bench.command(epilog="Example: dualkv bench soak --path /mnt/kv --seconds 3600 --html soak.html")
@measured(
    repeats=None,
    quick={
        "seconds": 3.0,
        "block_bytes": 64 << 10,
        "quota": 32 << 20,
        "staging": 4 << 20,
        "write_limit": 16 * 10**6,
        "grace_s": 1.0,
        "pressure": 32 << 20,
    },
)
@_path
@click.option("--seconds", type=float, default=120.0, show_default=True, help="How long.")
@_size_option("--block-bytes", "256KiB", "Of a block.")
@_size_option("--quota", "1GiB", "Of the store; older blocks are evicted.")
@_size_option("--staging", "16MiB", "Of each node.")
@_size_option("--write-limit", "64MB/s", "How fast new blocks are saved.")
@click.option("--grace-s", type=float, default=4.0, show_default=True, help="Blocks used this recently are kept.")
@click.option("--readers", type=click.IntRange(1, 64), default=4, show_default=True, help="Threads that load.")
@_size_option("--pressure", "256MiB", "Memory that another process holds and touches; 0: none.")
@_transport_option("shm")
def soak(**options: Any) -> "Measurement":
    """Read, save and evict for long, two nodes together; exit 1 if anything is lost or wrong."""
    from dualkv.bench.soak import SoakOptions, run_soak

    return functools.partial(run_soak, SoakOptions(**options))


@bench.command(epilog="Example: dualkv bench compare before.json after.json --fail-above 10")
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("--fail-above", type=click.FloatRange(0), metavar="PCT", help="Exit 1 if a case got slower by more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(before: str, after: str, fail_above: float | None, as_json: bool) -> None:
    """Compare two saved results. A change counts when it is beyond the spread of both."""
    from dualkv.bench.compare import compare as compared
    from dualkv.bench.results import load

    comparison = compared(load(before), load(after))
    failed = [] if fail_above is None else comparison.failed(fail_above / 100)
    if as_json:
        click.echo(json.dumps({**comparison.to_json(), "failed": [case.case for case in failed]}, indent=2))
    else:
        print_comparison(comparison)
        for case in failed:
            click.echo(f"slower by {case.slower_by():.1%}: {_case_text(case.case)}")
    if failed:
        raise SystemExit(1)


def _case_text(case: dict[str, Any]) -> str:
    from dualkv.bench.columns import case_text

    return ", ".join(f"{name} {case_text(name, value)}" for name, value in case.items())


def _console() -> Any:
    from rich.console import Console

    return Console(width=_WIDTH, markup=False, highlight=False)


def filled(items: Sequence[str], gap: str = "   ") -> list[str]:
    """Items in lines of the tables' width, none broken that fits."""
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(gap) + len(item) > _WIDTH:
            lines.append("")
        lines[-1] += (gap if lines[-1] else "") + item
    return lines


def print_result(result: "BenchResult") -> None:
    """Tables, then what they were measured on."""
    from rich.table import Table

    from dualkv.bench.columns import tables
    from dualkv.bench.views import notes_of, views_of

    console = _console()
    for table in tables(result.rows, views_of(result.bench)):
        console.print(table.title)
        shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for column in table.columns:
            shown.add_column(column.heading, justify="right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(column.cell(row) for column in table.columns))
        console.print(shown)
        console.print()
    for note in notes_of(result.bench):
        console.print(note)
    for line in filled([f"{name}: {value}" for name, value in result.labels.items()]):
        console.print(line)
    if result.fallbacks:
        console.print(f"fallbacks in force: {', '.join(sorted(result.fallbacks))} (docs/settings.md)")


def print_comparison(comparison: "Comparison") -> None:
    """A line for each measure of each case."""
    from rich.table import Table

    from dualkv.bench.columns import UNKNOWN, number

    def share(value: float | None, sign: str) -> str:
        return UNKNOWN if value is None else f"{value:{sign}.1%}"

    console = _console()
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("case", "measure", "before", "after", "change", "spread", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("case", "measure", "verdict") else "right")
    for case in comparison.cases:
        for i, one in enumerate(case.changes):
            name = "" if i else _case_text(case.case)
            told = (number(one.before), number(one.after), share(one.change, "+"), share(one.spread, ""))
            shown.add_row(name, one.measure, *told, one.verdict if one.verdict != "unknown" else UNKNOWN)
    console.print(shown)
    for what, cases in (("first", comparison.only_before), ("second", comparison.only_after)):
        for missing in cases:
            console.print(f"only in the {what}: {_case_text(missing)}")
    for label, (old, new) in comparison.labels.items():
        console.print(f"{label}: {old or UNKNOWN} -> {new or UNKNOWN}")
