"""``dualkv``: the command line. Exit codes: 0 ok, 1 failed, 2 usage, 77 not supported here."""

import sys

import click

import dualkv
from dualkv.cli.bench import bench
from dualkv.cli.demo import demo
from dualkv.cli.doctor import doctor
from dualkv.cli.fabric import fabric
from dualkv.cli.plan import plan
from dualkv.cli.proxy import proxy
from dualkv.cli.sim import sim
from dualkv.cli.store import store
from dualkv.cli.testbed import testbed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dualkv.__version__)
def cli() -> None:
    """KV-cache transfer for LLM inference over two paths.

    \b
    Example:
      dualkv demo                      basic against dualpath, split and oracle, on this machine
      dualkv bench storage --path /mnt/kv   a figure, and the limit beside it
      dualkv doctor /mnt/kv            what this machine can do, and what to change
      dualkv fabric plan --fabric roce two lanes in the network, line by line
      dualkv testbed --nodes 3         nodes on one machine, with lanes and storage NICs
      dualkv sim --validate paper      the simulator against published figures
      dualkv store verify /mnt/kv ...  check every stored block
    """


cli.add_command(bench)
cli.add_command(demo)
cli.add_command(doctor)
cli.add_command(fabric)
cli.add_command(plan)
cli.add_command(proxy)
cli.add_command(sim)
cli.add_command(store)
cli.add_command(testbed)


def main() -> None:
    """Entry point: dualkv errors become one line and an exit code."""
    try:
        cli()
    except dualkv.Error as error:
        click.echo(f"dualkv: {error}", err=True)
        sys.exit({"invalid_argument": 2, "unsupported": 77}.get(error.code, 1))
