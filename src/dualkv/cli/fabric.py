"""``dualkv fabric``: configuration of two lanes, and whether they are real."""

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING

import click

from dualkv.cli import values
from dualkv.cli.progress import bars
from dualkv.fabric.plan import FABRICS, Section, plan_fabric

if TYPE_CHECKING:
    from dualkv.fabric import LaneReport

_PORT = 18515


@click.group()
def fabric() -> None:
    """Lanes in the network: KV on LOW never delays the model's own traffic on HIGH.

    \b
    Example:
      dualkv fabric plan --fabric roce --interface eth2     what to set, and why
      dualkv fabric serve                                   on one node
      dualkv fabric check 10.0.0.7                          on another: are the lanes real?
    """


@fabric.command(epilog="Example: dualkv fabric plan --fabric ethernet --interface eth0 --rate 3GB/s")
@click.option("--fabric", "kind", type=click.Choice(FABRICS), required=True, help="What joins the nodes.")
@click.option(
    "--share",
    type=click.FloatRange(0.5, 1, max_open=True),
    help="Of a link for HIGH while both lanes want it; by default the paper's, about 0.99.",
)
@click.option("--interface", default="eth0", show_default=True, help="Network card, where it is named.")
@click.option(
    "--rate", default="12.5GB/s", show_default=True, callback=values.size, help="Of its link (ethernet), bytes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def plan(kind: str, share: float | None, interface: str, rate: int, as_json: bool) -> None:
    """Print ready configuration of two lanes, every line with its reason. Nothing is changed.

    docs/lanes.md says more about each line.
    """
    sections = plan_fabric(kind, share=share, interface=interface, rate=rate)
    if as_json:
        told = [
            {"place": section.place, "lines": [{"text": line.text, "why": line.why} for line in section.lines]}
            for section in sections
        ]
        click.echo(json.dumps({"fabric": kind, "sections": told}, indent=2))
        return
    for section in sections:
        click.echo(_text(section))


def _text(section: Section) -> str:
    lines = [f"## {section.place}", ""]
    for line in section.lines:
        lines += [f"# {line.why}", line.text, ""]
    return "\n".join(lines)


@fabric.command(epilog="Example: dualkv fabric serve --port 18515")
@click.option("--host", default="", help="Address to listen on; by default all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=_PORT, show_default=True)
def serve(host: str, port: int) -> None:
    """Answer the flows of `dualkv fabric check` until Ctrl-C. Stop it then: who reaches the port can fill the link."""
    from dualkv.errors import Error
    from dualkv.fabric.flows import FlowServer

    try:
        server = FlowServer(host, port)
    except OSError as error:
        raise Error(
            f"fabric: can't listen on {host!r} port {port}: {error.strerror}", "io", error.errno or 0
        ) from error
    with server:
        click.echo(f"listening on port {server.port}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@fabric.command(epilog="Example: dualkv fabric check 10.0.0.7 --seconds 5 --json")
@click.argument("host")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=_PORT, show_default=True, help="Of `dualkv fabric serve`."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True, help="Of each of six flows."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def check(host: str, port: int, seconds: float, as_json: bool) -> None:
    """Measure the lanes between this node and HOST, where `dualkv fabric serve` runs; it fills the link for a while.

    What this node's settings say, as far as they can be read. Then HIGH's latency and throughput alone and beside a
    saturated LOW, and what LOW gets of the rest. Exit code 1 if the lanes are not real.
    """
    from dualkv.fabric import local_settings, measure_lanes
    from dualkv.fabric.measure import FLOWS

    settings = local_settings(host)
    with bars() as shown:
        report = measure_lanes(host, port, seconds=seconds, step=shown.stage("lanes", FLOWS))
    if as_json:
        click.echo(
            json.dumps({**report.to_json(), "settings": [dataclasses.asdict(one) for one in settings]}, indent=2)
        )
    else:
        for one in settings:
            click.echo(f"{one.name:<24}{one.found}{' (WRONG)' if one.ok is False else ''}")
        _print(report)
    if not report.isolated:
        raise SystemExit(1)


def _print(report: "LaneReport") -> None:
    def speed(rate: float) -> str:
        return f"{rate / 1e6:.1f} MB/s"

    for name, text in (
        ("HIGH latency, idle", f"p50 {report.idle_p50_us:.0f} us, p99 {report.idle_p99_us:.0f} us"),
        (
            "beside a saturated LOW",
            f"p50 {report.loaded_p50_us:.0f} us ({report.p50_ratio:.2f}x), "
            f"p99 {report.loaded_p99_us:.0f} us ({report.p99_ratio:.2f}x)",
        ),
        ("HIGH throughput, alone", speed(report.high_alone)),
        ("beside a saturated LOW", f"{speed(report.high_beside)} ({report.high_share:.2f})"),
        ("LOW throughput, alone", speed(report.low_alone)),
        ("beside half a HIGH", f"{speed(report.low_beside_half)} ({report.low_of_rest:.2f} of what is left)"),
    ):
        click.echo(f"{name:<24}{text}")
    click.echo("isolated" if report.isolated else "NOT ISOLATED: " + "; ".join(report.missed()))
