"""``dualkv proxy``: an OpenAI-compatible router for prefill and decode servers."""

import logging

import click

from dualkv.errors import Error, invalid
from dualkv.policy import POLICIES


@click.command(epilog="Example: dualkv proxy --prefill http://p0:8101 --decode http://d0:8102=decode-0@tcp://d0:7420")
@click.option(
    "--listen", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT", help="Where clients connect."
)
@click.option("--prefill", multiple=True, metavar="URL[=NODE@ADDRESS]", help="A prefill server; again for each.")
@click.option(
    "--decode",
    multiple=True,
    required=True,
    metavar="URL=NODE@ADDRESS",
    help="A decode server, and the name and address of its node (name and listen of its connector); again for each.",
)
@click.option(
    "--policy",
    type=click.Choice(sorted(POLICIES)),
    default="split",
    show_default=True,
    help="Which node reads what of a hit.",
)
@click.option(
    "--helpers/--no-helpers", default=True, show_default=True, help="Whether other servers' nodes may read as well."
)
@click.option("--deadline", default=600.0, show_default=True, help="Seconds after which a request has ended.")
@click.option("--verbose", is_flag=True, help="Log every request.")
def proxy(
    listen: str,
    prefill: tuple[str, ...],
    decode: tuple[str, ...],
    policy: str,
    helpers: bool,
    deadline: float,
    verbose: bool,
) -> None:
    """Route OpenAI requests: prefill on one server, decode on another, KV through dualkv.

    The prefill server loads the stored prefix over both nodes' storage NICs, computes the rest and hands the KV to the
    decode server, which answers. GET /status and /metrics say who does what. A server that fails is left out for a
    while; its requests go to another one, as long as nothing of the answer was sent.
    """
    try:
        from aiohttp import web

        from dualkv.proxy import Fleet, Server, make_app
    except ImportError as error:
        raise Error(f"{error.name} is not installed; pip install 'dualkv[proxy]'", "unsupported") from error
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit():
        raise invalid(f"--listen {listen!r}: give host:port")
    fleet = Fleet(map(Server.parse, prefill), map(Server.parse, decode), policy=policy, helpers=helpers)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
    app = make_app(fleet, deadline_s=deadline)
    click.echo(f"dualkv proxy: http://{listen}, {len(fleet.prefill)} prefill, {len(fleet.decode)} decode, {policy}")
    web.run_app(app, host=host, port=int(port), print=None, handler_cancellation=True)
