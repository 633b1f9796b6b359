"""``dualkv plan``: link loads, what binds, turns per second and P:D, by arithmetic (docs/planner.md)."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dualkv.cli import plan_page
from dualkv.errors import Error
from dualkv.planner import HARDWARE, KV_DTYPES, MODELS, Hardware, Plan, Workload, parse_flops, parse_rate
from dualkv.planner import plan as planned
from dualkv.sizes import parse_size

_WIDTH = 120
_T = TypeVar("_T")


def _value(parse: Callable[[str], _T]) -> Callable[[click.Context, click.Parameter, str | None], _T | None]:
    """A callback; errors become usage errors that name the option."""

    def callback(_: click.Context, __: click.Parameter, value: str | None) -> _T | None:
        try:
            return None if value is None else parse(value)
        except Error as error:
            raise click.BadParameter(error.message) from error

    return callback


def _model(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and value not in MODELS:
        raise click.BadParameter(f"{value!r} is not known; known are {', '.join(MODELS)} (--list-models)")
    return value


def _list_models(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        _print_models()
        context.exit()


_nodes = click.IntRange(1, 100_000)
_tokens = click.IntRange(1, 100_000_000)


@click.command(
    epilog="Example: dualkv plan --hardware paper --model deepseek-v3.2 --prefill 2 --decode 4 --html p.html"
)
@click.option("--hardware", type=click.Choice(list(HARDWARE)), default="paper", show_default=True, help="Of each node.")
@click.option("--gpus", type=click.IntRange(1, 64), help="GPUs of a node, each with a CNIC.")
@click.option("--cnic", callback=_value(parse_rate), metavar="RATE", help="Of one GPU, like 400Gb/s.")
@click.option("--snic", callback=_value(parse_rate), metavar="RATE", help="Of a node, all SNICs, like 50GB/s.")
@click.option("--dram", callback=_value(parse_rate), metavar="RATE", help="Of a node, like 500GB/s.")
@click.option("--gpu-flops", callback=_value(parse_flops), metavar="FLOPS", help="One GPU really does, like 400TFLOPS.")
@click.option("--gpu-hbm", callback=_value(parse_size), metavar="SIZE", help="Memory of a GPU, like 141GB.")
@click.option("--model", callback=_model, metavar="NAME", help="One of --list-models.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Of the cache; by default what engines use.")
@click.option("--prefill", type=_nodes, default=2, show_default=True, help="Nodes.")
@click.option("--decode", type=_nodes, default=4, show_default=True, help="Nodes.")
@click.option(
    "--context", type=_tokens, default=32721, show_default=True, help="Tokens of a prompt, new ones included."
)
@click.option("--append", type=_tokens, default=429, show_default=True, help="New tokens; the others are read.")
@click.option("--generate", type=click.IntRange(0), default=176, show_default=True, help="Tokens.")
@click.option("--agents", type=click.IntRange(1), help="Turns at a time at most.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Turns/s asked for.")
@click.option(
    "--hold-s",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="How long a turn's KV stays in staging.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a report with a plot of link loads over P/D.")
@click.option(
    "--list-models", is_flag=True, is_eager=True, expose_value=False, callback=_list_models, help="And their KV."
)
def plan(
    hardware: str,
    model: str | None,
    kv_dtype: str | None,
    prefill: int,
    decode: int,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> None:
    """Say what P prefill and D decode nodes do with a workload, what binds, and which P:D would be better.

    Arithmetic only: nothing is measured, no device is touched. It takes links at their full speed and load spread
    evenly (DualPath, section 4.2), so it is a bound. Defaults are the 64K traces of the paper on 2P4D.
    """
    if model is None:
        raise click.UsageError("--model is missing: give one of --list-models, like --model deepseek-v3.2")
    result = _planned(hardware, model, kv_dtype, prefill, decode, options)
    if html:
        plan_page.write(result, html)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)
        if html:
            click.echo(f"report: {pathlib.Path(html).resolve()}")


def _planned(
    hardware: str, model: str, kv_dtype: str | None, prefill: int, decode: int, options: dict[str, Any]
) -> Plan:
    node_fields = {field.name for field in dataclasses.fields(Hardware)}
    changed = {name: value for name, value in options.items() if name in node_fields and value is not None}
    rest = {name: value for name, value in options.items() if name not in node_fields}
    try:
        node = dataclasses.replace(HARDWARE[hardware], **changed)
        return planned(node, MODELS[model], Workload(**rest), prefill, decode, kv_dtype=kv_dtype)
    except Error as error:
        raise click.UsageError(error.message) from error


def _print(result: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_WIDTH, markup=False, highlight=False)
    console.print(f"{result.prefill}P{result.decode}D   {result.model}, KV in {result.kv_dtype}")
    links = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in plan_page.LINK_HEADINGS:
        links.add_column(heading, justify="left" if heading == "link" else "right")
    for row in plan_page.link_rows(result):
        links.add_row(*row)
    console.print(links)
    console.print()
    values = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for row in plan_page.value_rows(result):
        values.add_row(*row)
    console.print(values)
    console.print()
    for line in plan_page.sentences(result):
        console.print(line)


def _print_models() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("model", "KV", "bytes/token", "of windows", "active weights", "source"):
        table.add_column(heading, justify="left" if heading in ("model", "KV", "source") else "right", overflow="fold")
    for model in MODELS.values():
        windows = model.window_layers * model.layer_bytes() * (model.window or 0)
        weights = f"{model.active_weights() / 1e9:.1f}e9"
        table.add_row(
            model.name, model.kv_dtype, str(model.kv_bytes_per_token()), str(windows or ""), weights, model.source
        )
    Console(width=_WIDTH, markup=False, highlight=False).print(table)
