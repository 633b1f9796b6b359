"""``dualkv sim``: a cluster of any size in discrete events, and the simulator against what was measured."""

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dualkv.cli import values
from dualkv.cli.progress import bars
from dualkv.demo.cluster import split_topology
from dualkv.errors import Error, invalid

if TYPE_CHECKING:
    from dualkv.sim import Outcome, Setup
    from dualkv.sim.validate_local import LocalValidation
    from dualkv.sim.validate_paper import Validation

_WIDTH = 150
_MODELS = ("ds27b", "ds660b", "qwen2.5-32b")
_MODES = ("basic", "layerwise", "dualpath", "scheduled", "split", "nway", "recompute", "oracle")
_PARTS = ("offline", "ratios", "scaling", "ablation", "balance", "capacity", "scale", "online")

_TAKEN = {  # of the options, by those that are commands of their own
    "--validate paper": {"validate", "parts", "seed", "as_json", "html"},
    "--validate local": {"validate", "seed", "as_json"},
    "--beyond": {"beyond", "trace", "seed", "as_json"},
}


def _topology(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    if value is None:
        return 0, 0
    nodes = split_topology(value)
    if nodes is None or not all(nodes):
        raise click.BadParameter(f"{value!r}: give it in nodes, like 2P4D")
    return nodes


@click.command(
    epilog="Example: dualkv sim --model ds660b --dataset 64K --agents 1024 --modes basic,scheduled,nway --html sim.html"
)
@click.option("--model", type=click.Choice(_MODELS), default="ds660b", show_default=True, help="Engine and hardware.")
@click.option(
    "--topology", callback=_topology, metavar="NPMD", help="Prefill and decode nodes; by default the model's."
)
@click.option(
    "--dataset", type=click.Choice(["32K", "48K", "64K"]), default="64K", show_default=True, help="Generated sessions."
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False),
    help="Recorded sessions instead (agentic or Mooncake format, .gz too), with their think times.",
)
@click.option("--agents", type=click.IntRange(1), default=1024, show_default=True, help="That start together.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Agents/s that arrive instead, for --seconds.")
@click.option(
    "--seconds", type=click.FloatRange(1), default=3600.0, show_default=True, help="Of arrivals, with --rate."
)
@click.option(
    "--modes",
    default="basic,scheduled,nway,oracle",
    callback=values.names(*_MODES),
    show_default=True,
    help="Of basic, layerwise, dualpath, scheduled, split, nway, recompute, oracle.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of sessions and arrivals.")
@click.option(
    "--validate",
    type=click.Choice(["paper", "local"]),
    help="Compare with the paper's cells, or with real engines on this machine (a demo of each topology).",
)
@click.option(
    "--parts",
    callback=lambda c, p, v: values.names(*_PARTS)(c, p, v) if v else (),
    help=f"With --validate paper: of {', '.join(_PARTS)}; by default all.",
)
@click.option(
    "--beyond", is_flag=True, help="Compare split, nway and recompute with the paper's policy, on all its workloads."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a report with plots.")
def sim(validate: str | None, parts: tuple[str, ...], beyond: bool, **options: Any) -> None:
    """Simulate a cluster: JCT, latencies, what each takes, and how busy the NICs are.

    The same path policies and scheduler as a real cluster's decide. --validate shows how far to believe it: exit code 1
    if a target of what it ran is missed.
    """
    if parts and validate != "paper":
        raise click.UsageError("--parts goes with --validate paper")
    if validate and beyond:
        raise click.UsageError("--validate and --beyond are two commands: give one")
    if options["html"] and (validate == "local" or beyond):
        raise click.UsageError("--html goes with a simulation or --validate paper")
    if validate or beyond:
        _refuse_ignored(f"--validate {validate}" if validate else "--beyond")
    else:
        _refuse_contradictions(options)
    if options["html"]:
        _check_html(options["html"])
    if validate == "paper":
        _validate_paper(parts, options)
    elif validate == "local":
        _validate_local(options)
    elif beyond:
        _beyond(options)
    else:
        _simulate(options)


def _refuse_ignored(command: str) -> None:
    for option in click.get_current_context().command.params:
        if values.given(option.name or "") and option.name not in _TAKEN[command]:
            raise click.UsageError(f"{option.opts[0]} has no effect with {command}")


def _refuse_contradictions(options: dict[str, Any]) -> None:
    if options["trace"] and values.given("dataset"):
        raise click.UsageError("--dataset has no effect with --trace: sessions are generated or recorded")
    if options["rate"] and values.given("agents"):
        raise click.UsageError("--agents has no effect with --rate: agents start together or arrive")
    if not options["rate"] and values.given("seconds"):
        raise click.UsageError("--seconds has no effect without --rate: agents that start together run to their end")


def _check_html(path: str) -> None:
    from dualkv.report.plots import require_matplotlib

    require_matplotlib()
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise Error(f"sim: there is no folder for {path!r}", "io")


def _simulate(options: dict[str, Any]) -> None:
    from dualkv.sim import simulate

    setup = _setup(options)
    outcomes: dict[str, Outcome] = {}
    with bars() as shown:
        step = shown.stage(f"{setup.topology} {setup.engine.name}", len(options["modes"]))
        for mode in options["modes"]:
            outcomes[mode] = simulate(setup, mode)
            if not len(outcomes[mode].ttft_s):
                seconds = f"{setup.workload.end_s:g} s"
                raise invalid(
                    f"sim: no request finished under {mode} in {seconds}: give more --seconds, or another --rate"
                )
            step()
    fields = {
        "labels": _labels(setup, options),
        "runs": {mode: outcome.to_json() for mode, outcome in outcomes.items()},
    }
    if options["html"]:
        from dualkv.report.sim import write_sim_report

        write_sim_report(fields, outcomes, options["html"])
    if options["as_json"]:
        click.echo(json.dumps(fields, indent=2))
        return
    _print_runs(fields)
    _print_report(options["html"])


def _print_report(html: str | None) -> None:
    if html:
        click.echo(f"report: {pathlib.Path(html).resolve()}")


def _setup(options: dict[str, Any]) -> "Setup":
    from dualkv.sim import MODELS, Setup, Workload

    agents, seed = options["agents"], options["seed"]
    if options["trace"]:
        load = Workload.recorded(options["trace"], agents, seed=seed)
    else:
        load = Workload.generated(options["dataset"], agents, seed=seed)
    if options["rate"]:
        load = load.arriving(options["rate"], options["seconds"])
    prefill, decode = options["topology"]
    return Setup(MODELS[options["model"]], load, prefill, decode)


def _labels(setup: "Setup", options: dict[str, Any]) -> dict[str, Any]:
    load = setup.workload
    return {
        "simulated": True,
        "model": setup.engine.name,
        "topology": setup.topology,
        "workload": pathlib.Path(options["trace"]).name if options["trace"] else options["dataset"],
        "agents": f"{load.agents_per_s:g}/s for {load.end_s:g} s" if load.agents_per_s else str(load.agents),
        "seed": options["seed"],
    }


def _print_runs(fields: dict[str, Any]) -> None:
    title = "   ".join(f"{key}: {value}" for key, value in fields["labels"].items())
    headings = ("mode", "JCT s", "TTFT s", "p50", "p99", "TTST s", "TPOT ms", "SNIC P", "SNIC D", "max/avg", "CNIC")
    rows = []
    for mode, run in fields["runs"].items():
        ttft = run["ttft_s"]
        rows.append(
            (
                mode,
                f"{run['jct_s']:.0f}",
                *(f"{ttft[name]:.2f}" for name in ("mean", "p50", "p99")),
                f"{run['ttst_s']['mean']:.3f}",
                f"{1e3 * run['tpot_s']['mean']:.1f}",
                *(f"{run['snic_utilisation'][side]:.0%}" for side in ("prefill", "decode")),
                f"{run['snic_max_avg']:.2f}",
                f"{run['cnic_utilisation']:.0%}",
            )
        )
    _table(title, headings, rows)
    parts = next(iter(fields["runs"].values()))["ttft_share"]
    shares = [(mode, *(f"{run['ttft_share'][p]:.0%}" for p in parts)) for mode, run in fields["runs"].items()]
    _table("of TTFT", ("mode", *parts), shares)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_WIDTH, markup=False, highlight=False)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _validate_paper(parts: tuple[str, ...], options: dict[str, Any]) -> None:
    from dualkv.sim.validate_paper import validate_paper

    with bars() as shown:
        found = validate_paper(shown.stage, parts, options["seed"])
    if options["html"]:
        from dualkv.report.sim import write_validation

        write_validation(found, options["html"])
    if options["as_json"]:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print_validation(found)
        _print_report(options["html"])
    if not all(target.met for target in found.targets):
        raise SystemExit(1)


def _print_validation(found: "Validation") -> None:
    headings = ("part", "cell", "figure", "paper", "ours", "error", "")
    rows = [
        (
            cell.part,
            cell.name,
            cell.what,
            f"{cell.paper:.4g}",
            f"{cell.ours:.4g}",
            _error(cell.part, cell.error),
            "calibrated on" if cell.calibrated else "",
        )
        for cell in found.cells
    ]
    _table("against the paper", headings, rows, left=3)
    targets = [
        (target.name, f"{target.value:.3g}", f"<= {target.limit:g}", "met" if target.met else "missed")
        for target in found.targets
    ]
    _table("targets", ("error of", "is", "target", ""), targets)
    click.echo(f"calibrated on: {found.inputs['calibrated_on']}: {', '.join(found.inputs['basic_cells'].values())}")


def _error(part: str, error: float) -> str:
    if part == "ablation":
        return f"{error:+.1f} points"
    return f"{error:+.2f}" if part == "balance" else f"{error:+.1%}"


def _validate_local(options: dict[str, Any]) -> None:
    from dualkv.sim.validate_local import validate_local

    with bars() as shown:
        found = validate_local(shown, options["seed"])
    if options["as_json"]:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print_local(found)
    if not (found.exact and found.met):
        raise SystemExit(1)


def _print_local(found: "LocalValidation") -> None:
    from dualkv.sim.validate_local import TARGET

    rows = [
        (
            cell.topology,
            cell.mode,
            f"{cell.measured_jct_s:.2f}",
            f"{cell.predicted_jct_s:.2f}",
            f"{cell.measured:.2f}x",
            f"{cell.predicted:.2f}x",
            f"{cell.error:+.1%}",
        )
        for cell in found.cells
    ]
    labels = "   ".join(f"{key}: {value}" for key, value in found.labels.items())
    headings = ("topology", "mode", "JCT s", "predicted", "speed-up", "predicted", "error")
    _table(f"real engines against the simulator   {labels}", headings, rows, left=2)
    met = "met" if found.met else "missed"
    click.echo(f"worst error of a speed-up: {found.worst_error:.1%} (target {TARGET:.0%}): {met}")
    if not found.exact:
        click.echo("real engines failed, or loaded other bytes than were stored: do not trust these figures")


def _beyond(options: dict[str, Any]) -> None:
    from dualkv.sim.beyond import beyond

    with bars() as shown:
        found = beyond(shown.stage, trace=options["trace"], seed=options["seed"])
    if options["as_json"]:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [
        (
            row["workload"],
            row["figure"],
            _value(row["scheduled"]),
            *(_value(row[mode], row[f"{mode}_gain"]) for mode in ("split", "nway", "recompute")),
        )
        for row in found["rows"]
    ]
    headings = ("workload", "figure", "scheduled", "split", "nway", "recompute")
    _table("beyond the paper's policy; better is positive", headings, rows, left=2)
    for name, count in found["dropped_sessions"].items():
        if count:
            which = "1 session was" if count == 1 else f"{count} sessions were"
            click.echo(f"{name}: {which} left out, with a turn that does not fit half a decode engine's memory")


def _value(value: float | None, gain: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if gain is None else f"{value:.4g} ({gain:+.1%})"
