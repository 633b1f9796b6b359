"""``dualkv testbed``: nodes on one machine, for as long as the command runs."""

import json
import shlex
import signal
import subprocess
from types import FrameType

import click

from dualkv.cli import values


@click.command(epilog="Example: sudo dualkv testbed --nodes 3 --rate 125MB/s --storage 40MB/s --path /mnt/kv")
@click.option("--nodes", type=click.IntRange(2, 64), default=2, show_default=True)
@click.option("--rate", default="125MB/s", callback=values.size, show_default=True, help="Of each link.")
@click.option("--lanes/--no-lanes", default=True, show_default=True, help="HIGH and LOW on each link, or one queue.")
@click.option(
    "--storage", default="0", callback=values.size, show_default=True, help="Read limit of each node; 0 = none."
)
@click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    default=".",
    show_default=True,
    help="On the disk that is limited.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the nodes as one line of JSON.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def testbed(
    nodes: int, rate: int, lanes: bool, storage: int, path: str, as_json: bool, command: tuple[str, ...]
) -> None:
    """Make nodes of network namespaces with a switch between them, until Ctrl-C or the end of COMMAND.

    Prints each node's address, and what to put before a command that is to run on it. COMMAND runs on this machine
    with DUALKV_TESTBED set to the nodes as JSON; its exit code is this command's.
    """
    from dualkv.testbed import Testbed

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    with Testbed(nodes, rate=rate, lanes=lanes, storage=storage, path=path) as bed:
        told = json.dumps([{"address": bed.address(i), "prefix": bed.prefix(i)} for i in range(nodes)])
        if command:
            code = subprocess.run(["env", f"DUALKV_TESTBED={told}", *command], check=False).returncode
            raise SystemExit(code if code >= 0 else 128 - code)
        if as_json:
            click.echo(told)
        else:
            for i in range(nodes):
                click.echo(f"node {i}   {bed.address(i)}   {shlex.join(bed.prefix(i))}")
            click.echo("Ctrl-C ends it.", err=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return
