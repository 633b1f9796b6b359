"""``dualkv doctor``: what this machine can do for dualkv, what is in force, and the cures."""

import json

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualkv.doctor import Report, default_path, examine

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}


@click.command(epilog="Example: dualkv doctor /mnt/kv --strict")
@click.argument("path", type=click.Path(exists=True, file_okay=False, resolve_path=True), default=default_path)
@click.option("--strict", is_flag=True, help="Warnings give exit code 1 too.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def doctor(path: str, strict: bool, as_json: bool) -> None:
    """Say what this machine can do for dualkv, what is really in force, and the cure for what is not.

    PATH is where blocks would be stored, by default the directory for temporary files. One block is written there,
    read back and compared; nothing stays behind. Exit code 1 if a check failed; warnings and what is absent are fine.
    """
    report = examine(path)
    if as_json:
        click.echo(json.dumps(report.to_json(strict), indent=2))
    else:
        _print(report)
    if not report.ok(strict):
        raise SystemExit(1)


def _print(report: Report) -> None:
    console = Console(highlight=False)
    console.print(Text("   ".join(f"{name}: {value}" for name, value in report.labels.items())))
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("check", "status", "detail"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row(Text(check.name), Text(check.status, _COLOURS[check.status]), Text(check.detail))
    console.print(table)
    for number, (cure, names) in enumerate(report.cures().items(), 1):
        console.print(Text(f"{number}. {', '.join(names)}: {cure}"))
    console.print(", ".join(f"{status}: {report.count(status)}" for status in _COLOURS))
