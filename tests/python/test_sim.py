"""The simulator from Python: modes, workloads, figures, validation against the paper, and the command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dualkv
from dualkv import traces
from dualkv.cli.sim import _MODELS, _MODES, _PARTS, sim
from dualkv.demo.cluster import Topology
from dualkv.demo.run import DemoOptions
from dualkv.sim import MODELS, MODES, Compute, Engine, Hardware, Mode, Setup, Workload, capacity, paper, simulate
from dualkv.sim.beyond import beyond
from dualkv.sim.capacity import Objectives, run_at
from dualkv.sim.validate_local import LocalCell, LocalValidation, predict
from dualkv.sim.validate_paper import PARTS, Cell, Target, Validation, summary, targets, validate_paper

SMALL = Engine(
    name="small",
    layers=10,
    bytes_per_token=1e5,
    compute=Compute(0.01, 1e-5, 1e-7, 1e-10, 0.01),
    hardware=Hardware(engines=2, snic=1e9, staging=0.0),
    group=2,
    memory_tokens=1e6,
    prefill_nodes=1,
    decode_nodes=1,
)


def no_stage(_name: str, _steps: int) -> Any:
    return lambda: None


def storage_bound(agents: int = 8) -> Setup:
    """8,000 tokens of hits a turn: 0.8 s of a storage NIC, and 0.2 s of compute."""
    rows = [[(100 + 8000, 8000, 2)] * 10 for _ in range(agents)]
    return Setup(SMALL, Workload.of(rows, [[0.0] * 10] * agents, agents), fetch_s=0.01, window_s=1.0)


# --- runs


def test_dual_path_reads_with_both_storage_nics() -> None:
    setup = storage_bound()
    basic, split = simulate(setup, "basic"), simulate(setup, "split")
    assert basic.jct_s / split.jct_s == pytest.approx(2, rel=0.05)
    assert basic.bytes["read"] == pytest.approx(8 * 10 * 8000 * 1e5)
    assert split.bytes["read"] == pytest.approx(basic.bytes["read"])
    assert basic.snic_bytes[1] == 0, "only prefill nodes read"
    assert split.snic_bytes[0] == pytest.approx(split.snic_bytes[1], rel=0.05)


def test_idle_nodes_help() -> None:
    setup = dataclasses.replace(storage_bound(2), prefill_nodes=1, decode_nodes=3)
    assert simulate(setup, "split").jct_s / simulate(setup, "nway").jct_s > 1.2


def test_recompute_computes_what_takes_longer_to_load() -> None:
    setup = storage_bound()
    nway, recompute = simulate(setup, "nway"), simulate(setup, "recompute")
    assert nway.bytes["recomputed"] == 0
    assert recompute.bytes["recomputed"] > 0
    assert recompute.bytes["recomputed"] + recompute.bytes["read"] == pytest.approx(nway.bytes["read"])
    assert recompute.jct_s < nway.jct_s


def test_the_oracle_loads_nothing() -> None:
    setup = storage_bound()
    oracle = simulate(setup, "oracle")
    assert oracle.bytes["read"] == oracle.bytes["relayed"] == oracle.bytes["published"] == 0
    assert all(oracle.jct_s <= simulate(setup, mode).jct_s for mode in MODES)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_can_be_repeated(mode: str) -> None:
    load = dataclasses.replace(Workload.generated("32K", 24, sessions=12), agents_per_s=1.0)
    setup = Setup(MODELS["ds27b"], load)
    first, again = simulate(setup, mode), simulate(setup, mode)
    assert first.to_json() == again.to_json()
    assert all(np.array_equal(first.requests[name], again.requests[name]) for name in first.requests)
    other = simulate(dataclasses.replace(setup, workload=dataclasses.replace(load, seed=2)), mode)
    assert not np.array_equal(first.requests["arrival_s"], other.requests["arrival_s"])


def test_every_turn_is_answered_once_and_in_order() -> None:
    load = Workload.generated("32K", 30, sessions=20)
    outcome = simulate(Setup(MODELS["ds27b"], load), "scheduled")
    lengths = np.diff(load.begins.astype(int))
    for agent in range(30):
        turns = outcome.requests["turn"][outcome.requests["agent"] == agent]
        assert list(turns) == list(range(lengths[agent % 20]))
    assert len(outcome.agent_seconds) == 30


def test_figures() -> None:
    outcome = simulate(storage_bound(), "scheduled")
    fields = outcome.to_json()
    assert sum(fields["ttft_share"].values()) == pytest.approx(1)
    assert fields["requests"] == 80
    assert fields["agents_done"] == 8
    assert fields["ttft_s"]["p50"] <= fields["ttft_s"]["p90"] <= fields["ttft_s"]["p99"]
    assert len(outcome.tpot_s) == 0, "nobody has a third token"
    assert fields["tpot_s"]["mean"] == 0
    assert 1 <= outcome.snic_max_avg(outcome.jct_s) <= 2
    assert json.loads(json.dumps(fields)) == fields


@pytest.mark.filterwarnings("error")
def test_figures_of_a_run_that_finished_nothing() -> None:
    outcome = run_at(storage_bound(), "basic", 5.0, 0.1)
    assert outcome.to_json()["requests"] == 0
    assert set(outcome.breakdown().values()) == {0.0}


class Late(dualkv.PathPolicy):
    """A user's policy: the last node reads."""

    def plan(self, keys: Any, *, prefill: Any, decode: Any, helpers: Any) -> Any:
        assert prefill.compute_queue_s is not None
        ranges = [dualkv.PathRange(decode.name, dualkv.Path.DECODE, 0, len(keys))]
        return dualkv.Plan(keys=keys, ranges=ranges)


class Swapped(dualkv.Split):
    """A user's change to a policy of ours."""

    def plan(self, keys: Any, *, prefill: Any, decode: Any, helpers: Any) -> Any:
        plan = super().plan(keys, prefill=prefill, decode=decode, helpers=helpers)
        assert plan.reason.startswith("split")
        return Late().plan(keys, prefill=prefill, decode=decode, helpers=helpers)


class Broken(dualkv.PathPolicy):
    def plan(self, keys: Any, **_: Any) -> Any:
        raise ZeroDivisionError("a policy with a bug")


def test_policies_of_users() -> None:
    outcome = simulate(storage_bound(), Mode("", policy=lambda _: Late()))
    assert outcome.snic_bytes[0] == 0
    assert outcome.snic_bytes[1] == outcome.bytes["read"]
    for policy in (Swapped(), dualkv.Recompute(Swapped())):
        assert simulate(storage_bound(), Mode("", policy=lambda _, policy=policy: policy)).snic_bytes[0] == 0
    with pytest.raises(ZeroDivisionError, match="a policy with a bug"):
        simulate(storage_bound(), Mode("", policy=lambda _: Broken()))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(dualkv.Error, match="mode 'fast' is none of basic") as unknown:
        simulate(storage_bound(), "fast")
    assert unknown.value.code == "invalid_argument"
    small = dataclasses.replace(storage_bound(), engine=dataclasses.replace(SMALL, memory_tokens=5000))
    with pytest.raises(dualkv.Error, match="decode_memory_tokens = 5000"):
        simulate(small, "basic")
    with pytest.raises(dualkv.Error, match="no sessions"):
        Workload.of([], [], 1)
    with pytest.raises(dualkv.Error, match="group"):
        dataclasses.replace(SMALL, group=0)


# --- workloads


def test_generated_workloads_hit_all_that_was_said() -> None:
    load = Workload.generated("64K", 4, sessions=4)
    for begin, end in zip(load.begins[:-1].astype(int), load.begins[1:].astype(int), strict=True):
        turns = load.turns[begin:end].astype(int)
        assert turns[0, 1] == 0
        assert np.array_equal(turns[1:, 1], turns[:-1, 0] + turns[:-1, 2])


def test_longer_rounds_end_at_the_same_length() -> None:
    plain = Workload.generated("32K", 4, sessions=4)
    for changed in (
        Workload.generated("32K", 4, sessions=4, append=3),
        Workload.generated("32K", 4, sessions=4, generate=3),
    ):
        assert len(changed.turns) < len(plain.turns)
        assert int((changed.turns[:, 0] + changed.turns[:, 2]).max()) <= 32 * 1024


def test_recorded_workloads(tmp_path: Path) -> None:
    turns = [{"t": 0, "in": 130, "out": 5, "hash_ids": [1, 2]}, {"t": 9, "in": 200, "out": 1, "hash_ids": [1, 2, 3]}]
    turns[1]["think_time"] = 2.5
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"id": "a", "block_size": 64, "requests": turns}) + "\n")
    load = Workload.recorded(traces.read(path), 1)
    assert load.turns.tolist() == [[130, 0, 5], [200, 128, 1]]
    assert load.think_s.tolist() == [0, 2.5]
    assert Workload.recorded(traces.read(path), 1, think=False).think_s.tolist() == [0, 0]


# --- capacity


def test_capacity_is_where_the_objectives_end() -> None:
    setup = storage_bound()
    loose = Objectives(ttft_s=30.0, tpot_s=1.0)
    dual = capacity(setup, "split", most=1.0, objectives=loose, precision=0.1)
    basic = capacity(setup, "basic", most=1.0, objectives=loose, precision=0.1)
    # 8 s of reading an agent on one NIC.
    assert basic == pytest.approx(1 / 8, rel=0.2)
    assert 1.6 < dual / basic < 2.4
    assert loose.hold(run_at(setup, "basic", basic))
    assert not loose.hold(run_at(setup, "basic", 2 * basic))


LOOSE = Objectives(ttft_s=30.0, tpot_s=1.0)


def test_a_run_that_finished_nothing_does_not_hold() -> None:
    assert not LOOSE.hold(run_at(storage_bound(), "basic", 5.0, 0.1))


def test_capacity_is_zero_where_no_rate_holds() -> None:
    never = Objectives(ttft_s=0.0)
    for near in (None, 0.0, 0.2, 5.0):
        assert capacity(storage_bound(), "basic", most=0.3, near=near, objectives=never) == 0.0


@pytest.mark.parametrize("near", [None, 0.12, 0.2, 0.01])
def test_capacity_may_be_above_what_was_believed_to_be_the_most(near: float | None) -> None:
    setup = storage_bound()
    found = capacity(setup, "basic", most=0.04, near=near, objectives=LOOSE, precision=0.1)
    assert found == pytest.approx(1 / 8, rel=0.2)
    assert LOOSE.hold(run_at(setup, "basic", found))


def test_capacity_ends_where_every_rate_holds() -> None:
    always = Objectives(ttft_s=math.inf, tpot_s=math.inf)
    assert capacity(storage_bound(), "basic", most=0.01, objectives=always) == pytest.approx(0.16)


# --- beyond the paper


@pytest.fixture
def quick_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one small model, with figures that cost nothing and an online run in which nothing finishes."""
    module = importlib.import_module("dualkv.sim.beyond")
    monkeypatch.setattr(module, "MODELS", {"ds27b": dataclasses.replace(MODELS["ds27b"], memory_tokens=150e3)})
    monkeypatch.setattr(module, "simulate", lambda setup, mode: simulate(storage_bound(1), mode))
    monkeypatch.setattr(module, "capacity", lambda setup, mode, **_: 0.5)
    monkeypatch.setattr(module, "run_at", lambda setup, mode, rate, seconds: run_at(setup, mode, rate, 0.01))


def write_trace(path: Path, *input_tokens: int) -> Path:
    """A session of one turn each."""
    sessions = [
        {"id": str(i), "block_size": n, "requests": [{"t": 0, "in": n, "out": 5, "hash_ids": [i]}]}
        for i, n in enumerate(input_tokens)
    ]
    path.write_text("".join(json.dumps(session) + "\n" for session in sessions))
    return path


@pytest.mark.usefixtures("quick_beyond")
def test_what_was_not_measured_is_no_gain() -> None:
    found = beyond(no_stage)
    tails = [row for row in found["rows"] if row["figure"].startswith("TTFT")]
    assert len(tails) == 2
    assert all(row[name] is None for row in tails for name in ("scheduled", "nway", "nway_gain"))
    assert found["summary"]["nway"]["worst_p99_ttft_gain"] is None
    assert found["summary"]["nway"]["worst_gain"] is not None
    assert found["dropped_sessions"] == {}


@pytest.mark.usefixtures("quick_beyond")
def test_no_capacity_is_nothing_to_gain_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("dualkv.sim.beyond"), "capacity", lambda *_, **__: 0.0)
    found = beyond(no_stage)
    assert found["rows"][-1]["figure"] == "capacity, agents/s"
    assert found["rows"][-1]["split_gain"] is None


@pytest.mark.usefixtures("quick_beyond")
def test_sessions_that_do_not_fit_a_model_are_counted(tmp_path: Path) -> None:
    found = beyond(no_stage, trace=str(write_trace(tmp_path / "some.jsonl", 130, 90_000, 80_000)))
    assert found["dropped_sessions"] == {"ds27b trace": 2}
    assert any(row["workload"].startswith("ds27b trace") for row in found["rows"])
    found = beyond(no_stage, trace=str(write_trace(tmp_path / "none.jsonl", 90_000)))
    assert found["dropped_sessions"] == {"ds27b trace": 1}
    assert not any(row["workload"].startswith("ds27b trace") for row in found["rows"])


@pytest.mark.usefixtures("quick_beyond")
def test_beyond_prints_what_is_missing(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "some.jsonl", 130, 90_000)
    shown = CliRunner().invoke(sim, ["--beyond", "--trace", str(trace)])
    assert shown.exit_code == 0, shown.output
    assert "ds27b trace: 1 session was left out" in shown.output
    tail = next(line for line in shown.stdout.splitlines() if "TTFT p99 s" in line)
    assert tail.split()[-4:] == ["-"] * 4
    as_json = CliRunner().invoke(sim, ["--beyond", "--trace", str(trace), "--json"])
    assert json.loads(as_json.stdout)["dropped_sessions"] == {"ds27b trace": 1}


# --- validation


def test_published_cells() -> None:
    assert len(paper.OFFLINE) == 33
    assert len(paper.RATIOS) == 27
    assert max(row.basic / row.ours for row in paper.RATIOS.values()) == pytest.approx(2.46, rel=0.01)
    by_model = [row.basic / row.ours for where, row in paper.OFFLINE.items() if where.model == "ds660b"]
    assert max(by_model) == pytest.approx(1.87, abs=0.005)
    for model, where in paper.BASIC_CELLS.items():
        assert where in paper.OFFLINE
        assert where.model == model


def test_the_balance_of_storage_nics_is_as_published() -> None:
    found = validate_paper(no_stage, ["balance"])
    assert [cell.part for cell in found.cells] == ["balance"] * 2
    round_robin = found.summary["snic_max_avg"]["round_robin"]
    assert round_robin == pytest.approx(1.53, abs=0.1)
    assert found.summary["snic_max_avg"]["scheduled"] < round_robin
    assert found.summary["ratio_mae"] is None
    assert {target.name for target in found.targets} == {"SNIC max/avg, round_robin", "SNIC max/avg, scheduled"}
    assert json.loads(json.dumps(found.to_json()))["inputs"]["basic_cells"].keys() == MODELS.keys()


def test_summary_and_targets() -> None:
    cells = [
        Cell("offline", "a 32K", "basic/ours", 2.0, 2.2, 0.1),
        Cell("ratios", "b 32K", "basic/ours", 2.0, 1.4, -0.3),
        Cell("offline", "a", "JCT s, ours", 1.0, 9.0, 8.0),
        Cell("ablation", "c", "% of JCT cut", 17.0, 10.0, -7.0),
        Cell("capacity", "ds27b 64K", "ours/basic", 1.67, 1.7, 0.018),
        Cell("scale", "48P96D / 2P4D", "JCT ratio", 1.01, 1.04, 0.03),
    ]
    found = summary(cells)
    assert found["ratio_mae"] == pytest.approx(0.2)
    assert found["ratio_worst"] == 0.3
    assert found["ratio_mae_by_model"] == {"a": 0.1, "b": 0.3}
    assert found["ablation_worst_points"] == 7.0
    assert found["capacity"] == {"ds27b": 1.7, "ds660b": None}
    assert {target.name: target.met for target in targets(found)} == {
        "mean error of basic/ours": False,
        "worst error of basic/ours": False,
        "worst ablation step, points": False,
        "48P96D against 2P4D": True,
        "capacity, ds27b": True,
    }


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(dualkv.Error, match="part 'weather' is none of offline"):
        validate_paper(no_stage, ["weather"])


def test_the_demo_is_predicted_from_its_options() -> None:
    options = DemoOptions(engine="modelled", agents=4, turns=3)
    basic = predict(options, Topology(1, 1), "basic")
    assert basic / predict(options, Topology(1, 1), "split") == pytest.approx(1.9, abs=0.2)
    assert basic / predict(options, Topology(1, 2), "split") > 2.3


# --- the command


def test_the_command_knows_what_there_is() -> None:
    assert set(_MODELS) == set(MODELS)
    assert tuple(MODES) == _MODES
    assert tuple(PARTS) == _PARTS


def test_command(tmp_path: Path) -> None:
    report = tmp_path / "sim.html"
    arguments = ["--model", "ds27b", "--dataset", "32K", "--agents", "16", "--modes", "basic,split"]
    shown = CliRunner().invoke(sim, [*arguments, "--html", str(report)])
    assert shown.exit_code == 0, shown.output
    assert "basic" in shown.output
    assert "scheduling" in shown.output
    assert report.read_text().count("<svg") == 4
    as_json = CliRunner().invoke(sim, [*arguments, "--json"])
    fields = json.loads(as_json.stdout)
    assert fields["labels"]["simulated"] is True
    assert list(fields["runs"]) == ["basic", "split"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modes", "fast"], "unknown fast"),
        (["--topology", "2P"], "like 2P4D"),
        (["--topology", "0P1D"], "like 2P4D"),
        (["--parts", "offline"], "--parts goes with --validate paper"),
        (["--validate", "paper", "--parts", "weather"], "unknown weather"),
        (["--validate", "local", "--beyond"], "two commands"),
        (["--rate", "0"], "0"),
        (["--model", "gpt"], "ds27b"),
        (["--trace", __file__, "--dataset", "64K"], "--dataset has no effect with --trace"),
        (["--rate", "1", "--agents", "8"], "--agents has no effect with --rate"),
        (["--seconds", "60"], "--seconds has no effect without --rate"),
        (["--beyond", "--html", "x.html"], "--html goes with a simulation or --validate paper"),
        (["--validate", "local", "--html", "x.html"], "--html goes with a simulation or --validate paper"),
        *(
            ([*action.split(), *option], f"{option[0]} has no effect with {action}")
            for action in ("--beyond", "--validate paper", "--validate local")
            for option in (
                ["--model", "ds660b"],
                ["--topology", "2P4D"],
                ["--dataset", "64K"],
                ["--agents", "1024"],
                ["--rate", "1"],
                ["--seconds", "3600"],
                ["--modes", "basic"],
            )
        ),
        (["--validate", "paper", "--trace", __file__], "--trace has no effect with --validate paper"),
        (["--validate", "local", "--trace", __file__], "--trace has no effect with --validate local"),
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(sim, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize("output", [[], ["--json"], ["--html"]])
def test_a_run_that_finishes_nothing_is_an_error(tmp_path: Path, output: list[str]) -> None:
    output = [*output, str(tmp_path / "sim.html")] if output == ["--html"] else output
    result = CliRunner().invoke(sim, ["--rate", "0.001", "--seconds", "1", "--modes", "split", *output])
    assert isinstance(result.exception, dualkv.Error)
    assert result.exception.code == "invalid_argument"
    assert "no request finished under split in 1 s" in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize(("value", "status"), [(0.05, 0), (0.2, 1)])
def test_a_missed_target_of_the_paper_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, status: int
) -> None:
    cells = [Cell("offline", "a 32K", "basic/ours", 2.0, 2 * (1 + value), value)]
    found = Validation(cells, {}, [Target("error", value, 0.1, value <= 0.1)], {"calibrated_on": "", "basic_cells": {}})
    module = importlib.import_module("dualkv.sim.validate_paper")
    monkeypatch.setattr(module, "validate_paper", lambda *_: found)
    report = tmp_path / "paper.html"
    result = CliRunner().invoke(sim, ["--validate", "paper", "--html", str(report)])
    assert result.exit_code == status, result.output
    assert f"report: {report.resolve()}" in result.output
    assert report.exists()
    as_json = CliRunner().invoke(sim, ["--validate", "paper", "--json"])
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout)["targets"][0]["met"] is (status == 0)


@pytest.mark.parametrize(
    ("predicted", "exact", "status"), [(2.1, True, 0), (2.3, True, 1), (1.7, True, 1), (2.1, False, 1)]
)
def test_a_missed_target_of_real_engines_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, predicted: float, exact: bool, status: int
) -> None:
    found = LocalValidation({}, [LocalCell("1P1D", "split", 1.0, 1.0, 2.0, predicted)], exact)
    module = importlib.import_module("dualkv.sim.validate_local")
    monkeypatch.setattr(module, "validate_local", lambda *_: found)
    result = CliRunner().invoke(sim, ["--validate", "local"])
    assert result.exit_code == status, result.output
    as_json = CliRunner().invoke(sim, ["--validate", "local", "--json"])
    assert as_json.exit_code == status
    fields = json.loads(as_json.stdout)
    assert fields["target"] == 0.1
    assert (fields["met"] and fields["exact"]) is (status == 0)


def test_help_shows_an_example() -> None:
    assert "Example: dualkv sim" in CliRunner().invoke(sim, ["--help"]).output
