"""``dualkv demo``: engines as processes, agents over real files, four modes, one table."""

import json
import pathlib
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dualkv.cli import values
from dualkv.cli.progress import bars
from dualkv.demo.cluster import Topology
from dualkv.demo.results import DemoResult, ModeRun
from dualkv.demo.run import COMPARED, MODES, DemoOptions, run_demo
from dualkv.sizes import format_size


def _topologies(_: click.Context, __: click.Parameter, value: str) -> tuple[Topology, ...]:
    try:
        return tuple(Topology.parse(item) for item in value.split(","))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(epilog="Example: dualkv demo --topology 1P2D --agents 8 --html report.html")
@click.option(
    "--topology",
    default="1P1D",
    callback=_topologies,
    show_default=True,
    metavar="NPMD[,...]",
    help="Prefill and decode engines; several are run one after another.",
)
@click.option(
    "--modes",
    default=",".join(COMPARED),
    callback=values.names(*MODES),
    show_default=True,
    help=f"What to compare: of {', '.join(MODES)}.",
)
@click.option(
    "--engine",
    type=click.Choice(["torch", "modelled"]),
    default="torch",
    show_default=True,
    help="Real model code, or a calibrated wait with all I/O real.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where torch engines compute and keep their caches. cuda: on this machine's GPUs, in turn.",
)
@click.option(
    "--model", type=click.Choice(["gqa", "mla"]), default="gqa", show_default=True, help="Attention of the torch model."
)
@click.option(
    "--transport",
    type=click.Choice(["tcp", "shm", "rdma"]),
    default="tcp",
    show_default=True,
    help="Between the engines. rdma: on this machine's devices, in turn.",
)
@click.option("--agents", type=click.IntRange(1, 256), default=12, show_default=True)
@click.option("--turns", type=click.IntRange(2, 1000), default=9, show_default=True, help="Per agent.")
@click.option(
    "--rate",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Agents that begin per second, at random, for TTFT under a load that does not wait; 0 = all at once.",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False),
    help="Agent sessions to replay (agentic or Mooncake format, .gz too) instead of generated ones.",
)
@click.option(
    "--dataset",
    type=click.Choice(["32K", "48K", "64K"]),
    default="64K",
    show_default=True,
    help="Row of the paper's Table 2 to generate.",
)
@click.option("--scale", type=click.FloatRange(1), default=32.0, show_default=True, help="Divide all token counts by.")
@click.option(
    "--snic-limit",
    default="200MB/s",
    callback=values.size,
    show_default=True,
    help="Read limit of each engine's storage; 0 = none.",
)
@click.option(
    "--testbed",
    is_flag=True,
    help="Each engine on a node of its own: a network namespace with lanes, the SNIC limit by the kernel, and an "
    "all-to-all on the HIGH lane beside. Needs root.",
)
@click.option(
    "--cnic-limit",
    default="125MB/s",
    callback=values.size,
    show_default=True,
    help="Of each node's link on the testbed.",
)
@click.option("--staging", default="auto", show_default=True, help="Staging pool of each engine, like 2GiB.")
@click.option("--work-dir", type=click.Path(file_okay=False), help="Where block files go while it runs.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a report with plots.")
def demo(as_json: bool, html: str | None, topology: tuple[Topology, ...], **others: Any) -> None:
    """Compare load paths on this machine.

    Starts prefill and decode engines as processes, gives each a storage NIC of limited speed, and replays multi-turn
    agents against real files: basic (prefill side reads all), dualpath (the side with the shorter queue reads),
    split (all sides read one request together), recompute (as split, but what takes longer to load than to compute is
    computed), oracle (hits cost nothing).
    """
    if values.given("cnic_limit") and not others["testbed"]:
        raise click.UsageError("--cnic-limit is of a testbed's links: give --testbed too")
    options = DemoOptions(topologies=topology, **others)
    if html:
        _check_report()
    with bars() as shown:
        result = run_demo(options, shown)
    if html:
        from dualkv.report.html import write_demo_report

        write_demo_report(result, html, options)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print_tables(result)
        if html:
            click.echo(f"report: {pathlib.Path(html).resolve()}")
    if any(run.failures or run.exact["ok"] != run.exact["total"] for run in result.runs):
        raise SystemExit(1)


def _check_report() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise click.UsageError("--html needs matplotlib: pip install 'dualkv[report]'") from error


def _print_tables(result: DemoResult) -> None:
    console = Console(width=150)
    for topology in dict.fromkeys(run.topology for run in result.runs):
        table = Table(
            title=f"{topology}   " + "   ".join(f"{k}: {v}" for k, v in result.labels.items() if k != "topology")
        )
        headings = [
            "mode",
            "JCT s",
            "prompt tok/s",
            "TTFT p50 s",
            "p99 s",
            "alone p50 s",
            "PE path",
            "DE path",
            "helpers",
            "SNIC P",
            "SNIC D",
            "speed-up",
            "exact",
            *(("HIGH p99 ms", "of alone") if any(run.high for run in result.runs) else ()),
        ]
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "mode" else "right")
        for run in result.runs:
            if run.topology == topology:
                table.add_row(*_row(run))
        console.print(table)
    for run in result.runs:
        for failure in run.failures:
            console.print(f"[red]{run.topology} {run.mode}: {failure}")
    fallbacks = sorted({what for run in result.runs for what in run.fallbacks})
    if fallbacks:
        console.print(f"fallbacks in force: {', '.join(fallbacks)} (docs/settings.md)")


def _row(run: ModeRun) -> list[str]:
    return [
        run.mode,
        f"{run.jct_s:.2f}",
        f"{run.prompt_tokens_per_s:.0f}",
        f"{run.ttft_s.p50:.3f}",
        f"{run.ttft_s.p99:.3f}",
        f"{run.ttft_alone_s.p50:.3f}",
        *(format_size(run.bytes[path]) for path in ("pe_path", "de_path", "helper_path")),
        f"{run.snic_utilisation['prefill']:.0%}",
        f"{run.snic_utilisation['decode']:.0%}",
        f"{run.speedup:.2f}x",
        f"{run.exact['ok']}/{run.exact['total']}",
        *((f"{1e3 * run.high.beside_s.p99:.2f}", f"{run.high.p99_ratio:.2f}x") if run.high else ()),
    ]
