"""The planner: the paper's equations and Table 1, every preset by hand, and what the command prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dualkv
from dualkv.cli import plan_page
from dualkv.cli.plan import plan as command
from dualkv.planner import (
    HARDWARE,
    MODELS,
    Hardware,
    Plan,
    Workload,
    feasible,
    gain,
    links,
    parse_flops,
    parse_rate,
    recommend,
)
from dualkv.planner import plan as planned
from dualkv.planner.models import pairs
from dualkv.planner.traffic import busiest, links_at

PAPER = HARDWARE["paper"]
# Table 2's 64K row.
TRACE = Workload(context=32721, append=429, generate=176)
V32 = MODELS["deepseek-v3.2"]

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def node(gpus: int, s: float, dram_in_snics: float = 10.0) -> Hardware:
    """With B = 50 GB/s."""
    return Hardware(gpus=gpus, cnic=50e9, snic=s * 50e9, dram=dram_in_snics * s * 50e9)


# --- units ---


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400Gb/s", 50e9),
        ("400Gbps", 50e9),
        ("400 Gbit/s", 50e9),
        ("50GB/s", 50e9),
        ("50 GBps", 50e9),
        ("0.5TB/s", 500e9),
        ("46.5GiB/s", 46.5 * 2**30),
        ("8b/s", 1),
        ("8bytes/s", 8),
        ("1.5kB/s", 1500),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "50", "50G", "50GB", "GB/s", "-1GB/s", "5EB/s", "0Gb/s", "1e9B/s", "50GB/m"])
def test_wrong_rates_name_the_value_and_the_cure(text: str) -> None:
    with pytest.raises(dualkv.Error, match=re.escape(repr(text))) as caught:
        parse_rate(text)
    assert caught.value.code == "invalid_argument"
    assert "GB/s" in caught.value.message or "more than 0" in caught.value.message


def test_flops() -> None:
    assert parse_flops("400TFLOPS") == parse_flops("0.4 PFLOP/s") == 4e14
    for wrong in ("400", "400T", "0TFLOPS", "400 TB/s"):
        with pytest.raises(dualkv.Error, match="400TFLOPS"):
            parse_flops(wrong)


@pytest.mark.parametrize("name", ["gpus", "cnic", "snic", "dram", "gpu_flops"])
def test_hardware_must_have_some_of_everything(name: str) -> None:
    for value in (0, -1, math.inf, math.nan):
        with pytest.raises(dualkv.Error, match=name):
            dataclasses.replace(PAPER, **{name: value})


# --- equations ---


@pytest.mark.parametrize(
    ("of", "lower", "upper", "upper_links"),
    [
        # Section 4.2's example: three upper terms 6, 7/2 and 7/2.
        (PAPER, 1 / 7, 7 / 2, ("DE CNIC write", "DE DRAM")),
        # Lower 1/3; upper terms 2, 3/2 and 7/2.
        (node(4, 1), 1 / 3, 3 / 2, ("DE CNIC write",)),
        # Little DRAM: (5 - 3) / 2.
        (node(8, 1, dram_in_snics=5), 1 / 7, 1.0, ("DE DRAM",)),
        # s = 2 at g = 8 is s = 1 at g = 4.
        (node(8, 2), 1 / 3, 3 / 2, ("DE CNIC write",)),
        # Read: (8 - 6) / 3 = 2/3; write: 5/6.
        (node(8, 3), 3 / 5, 2 / 3, ("DE CNIC read",)),
    ],
)
def test_range(of: Hardware, lower: float, upper: float, upper_links: tuple[str, ...]) -> None:
    found = feasible(of)
    assert (found.lower, found.upper) == pytest.approx((lower, upper))
    assert found.lower_links == ("PE CNIC write",)
    assert found.upper_links == upper_links
    assert not found.empty
    assert found.contains(lower)
    assert found.contains(upper)
    assert not found.contains(lower * 0.99)
    assert not found.contains(upper * 1.01)


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (node(4, 2), "DE CNIC read would be full, or more, however few"),
        # s <= g holds, s <= g/2 does not: equation 1 as it should read.
        (node(4, 3), "PE CNIC read would need 150% of its capacity"),
        (node(4, 8), "PE CNIC read would need 400% of its capacity"),
        (node(8, 1, dram_in_snics=1), "PE DRAM would need 200% of its capacity"),
        (node(8, 1, dram_in_snics=2.5), "DE DRAM would be full, or more, however few"),
        (node(8, 3.5), "PE CNIC write needs P/D of at least 0.778, DE CNIC read at most 0.286"),
    ],
)
def test_empty_range(of: Hardware, reason: str) -> None:
    found = feasible(of)
    assert found.empty
    assert found.reason.startswith(reason)
    assert not found.contains(1.0)


@pytest.mark.parametrize(("prefill", "decode", "times"), [(2, 4, 3), (1, 1, 2), (1, 2, 3), (2, 1, 1.5)])
def test_gain(prefill: int, decode: int, times: float) -> None:
    assert gain(prefill, decode) == times
    made = planned(PAPER, V32, TRACE, prefill, decode)
    assert made.turns_storage_dual / made.turns_storage_basic == pytest.approx(times)


def test_loads_are_the_paper_s_sums_over_pairs() -> None:
    """T_p and T_c of each of the Pg * Dg pairs, summed as section 4.2 does, at 2P4D."""
    p, d, g, bandwidth, s = 2, 4, 8, 50e9, 1
    t_p, t_c = bandwidth * s / (d * g * g), bandwidth * s / (p * g * g)
    expected = {
        "PE CNIC read": 2 * t_p * d * g,
        "PE CNIC write": (t_p + t_c) * d * g,
        "DE CNIC read": (t_p + 2 * t_c) * p * g,
        "DE CNIC write": (2 * t_p + t_c) * p * g,
        "PE DRAM": 2 * s * bandwidth,
        "DE DRAM": (3 + 2 * p / d) * s * bandwidth,
        "PE SNIC": s * bandwidth,
        "DE SNIC": s * bandwidth,
    }
    assert {link.name: link.load for link in links(PAPER, p, d)} == pytest.approx(expected)


def test_without_the_second_path_decode_storage_is_idle() -> None:
    loads = {link.name: link.load for link in links(PAPER, 2, 4, dual=False)}
    assert loads["DE SNIC"] == 0
    assert loads["PE SNIC"] == 50e9
    assert loads["PE CNIC write"] == 50e9 / 8
    assert loads["DE CNIC write"] == pytest.approx(2 * 50e9 / 8 * 2 / 4)


# From slow storage NICs to ones that are too fast for any P/D.
nodes = st.builds(
    lambda gpus, share, dram: node(gpus, share * gpus, dram), st.integers(2, 16), st.floats(0.01, 0.6), st.floats(2, 40)
)
properties = settings(deadline=None)


@properties
@given(nodes)
def test_binding_links_are_full_at_the_ends_and_no_other_is_over(of: Hardware) -> None:
    found = feasible(of)
    assume(not found.empty)
    for end, names in ((found.lower, found.lower_links), (found.upper, found.upper_links)):
        shares = {link.name: link.share for link in links_at(of, end)}
        assert all(shares[name] == pytest.approx(1) for name in names)
        assert max(shares.values()) <= 1 + 1e-6


@properties
@given(nodes, st.floats(0.01, 100))
def test_no_link_is_over_exactly_inside_the_range(of: Hardware, ratio: float) -> None:
    share = busiest(links_at(of, ratio)).share
    assume(abs(share - 1) > 1e-6)
    assert feasible(of).contains(ratio) == (share < 1)


@properties
@given(nodes, st.floats(0.001, 1000))
def test_scaling_all_bandwidths_leaves_the_range(of: Hardware, factor: float) -> None:
    scaled = dataclasses.replace(of, cnic=of.cnic * factor, snic=of.snic * factor, dram=of.dram * factor)
    found, expected = feasible(scaled), feasible(of)
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper), rel=1e-6, abs=1e-6)


@properties
@given(nodes, st.integers(1, 50), st.integers(1, 50))
def test_both_paths_are_never_slower_than_one_and_never_beat_the_gain(of: Hardware, prefill: int, decode: int) -> None:
    made = planned(of, V32, TRACE, prefill, decode)
    assert made.turns_storage_basic <= made.turns_storage_dual
    assert made.turns_storage_dual * made.read_bytes_per_turn <= (prefill + decode) * of.snic * (1 + 1e-9)
    if made.range.contains(prefill / decode):
        assert made.binds == "storage NICs"


# --- models ---


@pytest.mark.parametrize(
    ("name", "dtype", "by_hand"),
    [
        # Latent 512 in FP8, 4 scales of 4 bytes, rope 64 in BF16; indexer key 128 in FP8, 1 scale of 4 bytes.
        ("deepseek-v3.2", None, 61 * ((512 + 16 + 128) + (128 + 4))),
        ("deepseek-v3.2", "bf16", 61 * (576 * 2 + 132)),
        ("deepseek-v3.2", "fp8", 61 * (576 + 132)),
        # Latent 512 and rope 64, in BF16.
        ("deepseek-v3", None, 61 * (512 + 64) * 2),
        ("deepseek-v3", "fp8_ds_mla", 61 * 656),
        ("kimi-k2", None, 61 * (512 + 64) * 2),
        # Layers, K and V, KV heads, head dim, bytes.
        ("qwen2.5-32b", None, 64 * 2 * 8 * 128 * 2),
        ("qwen3-32b", None, 64 * 2 * 8 * 128 * 2),
        ("qwen3-235b-a22b", None, 94 * 2 * 4 * 128 * 2),
        ("qwen3-235b-a22b", "fp8", 94 * 2 * 4 * 128),
        ("llama-3-8b", None, 32 * 2 * 8 * 128 * 2),
        ("llama-3-70b", None, 80 * 2 * 8 * 128 * 2),
        # Every second layer has a window, and adds nothing once that is full.
        ("gpt-oss-20b", None, 12 * 2 * 8 * 64 * 2),
        ("gpt-oss-120b", None, 18 * 2 * 8 * 64 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, dtype: str | None, by_hand: int) -> None:
    model = MODELS[name]
    assert model.kv_bytes_per_token(dtype) == by_hand
    assert model.kv_bytes(5001, dtype) - model.kv_bytes(5000, dtype) == by_hand


def test_every_preset_is_checked_by_hand() -> None:
    marks = test_kv_bytes_per_token.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(MODELS)
    assert all(model.source for model in MODELS.values())


def test_windows_hold_their_last_tokens_only() -> None:
    model = MODELS["gpt-oss-20b"]
    assert model.kv_bytes(100) == 24 * 2048 * 100
    assert model.kv_bytes(1000) == 12 * 2048 * 1000 + 12 * 2048 * 128


@pytest.mark.parametrize(
    ("name", "billions"),
    # From the model cards, less the embeddings and the head: active parameters of MoE, all of dense ones.
    [
        ("deepseek-v3", 37 - 2 * 0.93),
        ("kimi-k2", 32 - 2 * 1.17),
        ("qwen2.5-32b", 31.0),
        ("qwen3-235b-a22b", 22 - 2 * 0.62),
        ("llama-3-8b", 8.03 - 2 * 0.53),
        ("llama-3-70b", 70.6 - 2 * 1.05),
        ("gpt-oss-20b", 3.6 - 0.58),
        ("gpt-oss-120b", 5.1 - 0.58),
    ],
)
def test_active_weights_are_the_model_card_s(name: str, billions: float) -> None:
    assert MODELS[name].active_weights() / 1e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize("hit", [0, 1, 5, 9])
@pytest.mark.parametrize("append", [1, 2, 7])
@pytest.mark.parametrize("limit", [None, 1, 6, 8, 100])
def test_pairs_are_what_counting_gives(hit: int, append: int, limit: int | None) -> None:
    counted = sum(min(hit + i, hit + i if limit is None else limit) for i in range(1, append + 1))
    assert pairs(hit, append, limit) == counted


@pytest.mark.parametrize(
    ("name", "dtype", "shortest", "longest", "tolerance"),
    [
        ("qwen2.5-32b", "bf16", 117, 267, 0.01),
        ("qwen3-235b-a22b", "fp8", 39, 60, 0.01),
        ("gpt-oss-120b", "fp8", 47, 95, 0.06),
        ("deepseek-v3.2", "fp8", 13, 36, 0.06),
    ],
)
def test_table_1(name: str, dtype: str, shortest: float, longest: float, tolerance: float) -> None:
    model = MODELS[name]
    assert model.gb_per_pflop(16 << 10, 429, dtype) == pytest.approx(shortest, rel=tolerance)
    assert model.gb_per_pflop(64 << 10, 429, dtype) == pytest.approx(longest, rel=tolerance)


def test_table_1_of_deepseek_v3_agrees_in_shape_only() -> None:
    """The paper has 4.8 and 5.8; ours are lower by the same factor (docs/planner.md)."""
    short, long = (MODELS["deepseek-v3"].gb_per_pflop(context, 429, "fp8") for context in (16 << 10, 64 << 10))
    assert long / short == pytest.approx(5.8 / 4.8, rel=0.03)
    assert (short / 4.8, long / 5.8) == pytest.approx((0.78, 0.78), abs=0.02)


def test_latent_dtype_of_heads_is_refused() -> None:
    with pytest.raises(dualkv.Error, match="'fp8_ds_mla' is for latent attention only: give bf16 or fp8"):
        planned(PAPER, MODELS["llama-3-8b"], TRACE, 1, 1, kv_dtype="fp8_ds_mla")
    with pytest.raises(dualkv.Error, match="'int4': known are bf16"):
        planned(PAPER, V32, TRACE, 1, 1, kv_dtype="int4")


# --- plans ---


def test_turns_by_hand() -> None:
    """32,292 tokens of 48,068 bytes a turn; 2 or 6 storage NICs of 50 GB/s."""
    made = planned(PAPER, V32, TRACE, 2, 4)
    assert made.read_bytes_per_turn == 32292 * 48068
    assert made.turns_storage_basic == pytest.approx(100e9 / (32292 * 48068))
    assert made.turns_storage_dual == pytest.approx(300e9 / (32292 * 48068))
    assert made.written_bytes_per_turn == (429 + 176) * 48068
    assert made.hit_rate == pytest.approx(0.987, abs=1e-3)
    # All reads of a second: a sixth for each node. Whole prompts of a second: a quarter for each decode node.
    assert made.staging_bytes_prefill_node == pytest.approx(50e9)
    assert made.staging_bytes_decode_node == pytest.approx(made.turns * 32721 * 48068 / 4)
    assert made.tokens_in_flight == pytest.approx(made.turns * 32721)


def test_a_link_over_its_capacity_slows_all_reads() -> None:
    made = planned(PAPER, V32, TRACE, 1, 15)
    # PE CNIC write: (1 + 15) / 8.
    assert made.binds == "PE CNIC write"
    assert "200%" in made.why
    assert made.turns_storage_dual == pytest.approx(16 * 50e9 / 2 / made.read_bytes_per_turn)


def test_what_is_asked_for_and_compute_limit_turns() -> None:
    fast = dataclasses.replace(PAPER, gpu_flops=1e15)
    slow = dataclasses.replace(PAPER, gpu_flops=1e14)
    assert planned(fast, V32, TRACE, 2, 4).binds == "storage NICs"
    made = planned(slow, V32, TRACE, 2, 4)
    assert made.binds == "prefill compute"
    assert made.turns == made.turns_compute == pytest.approx(16e14 / made.prefill_flops_per_turn)
    asked = planned(PAPER, V32, dataclasses.replace(TRACE, rate=10.0), 2, 4)
    assert (asked.turns, asked.binds) == (10, "rate")
    few = planned(PAPER, V32, dataclasses.replace(TRACE, agents=3), 2, 4)
    assert few.turns_in_flight == 3


def test_hbm_bounds_the_contexts_of_a_decode_node() -> None:
    made = planned(dataclasses.replace(PAPER, gpu_hbm=141 * 10**9), V32, TRACE, 2, 4)
    assert made.contexts_in_hbm_decode_node == 8 * 141 * 10**9 // ((32721 + 176) * 48068)


def test_most_headroom_is_recommended() -> None:
    """With 6 nodes that is the paper's own 2P4D."""
    best = planned(PAPER, V32, TRACE, 1, 5).recommendation
    assert (best.prefill, best.decode) == (2, 4)
    assert "DE DRAM at 40%" in best.reason
    for other in (1, 3, 4):
        assert busiest(links(PAPER, other, 6 - other)).share > busiest(links(PAPER, 2, 4)).share


def test_enough_prefill_compute_comes_before_headroom() -> None:
    def best(flops: float) -> tuple[int | None, str]:
        made = planned(dataclasses.replace(PAPER, gpu_flops=flops), V32, TRACE, 1, 5).recommendation
        return made.prefill, made.reason

    assert best(1e15)[0] == 2
    # 193 turns/s of 60 TFLOP are 3.6 nodes of 8 x 0.4 PFLOP/s.
    assert best(4e14)[0] == 4
    assert "3.64 prefill nodes" in best(4e14)[1]
    # More than all of them: the most that P/D <= 7/2 allows.
    assert best(1e13)[0] == 4
    assert "but binds" in best(1e13)[1]


def test_without_a_ratio_in_range_none_is_recommended() -> None:
    nothing = planned(node(4, 2), V32, TRACE, 1, 1).recommendation
    assert (nothing.prefill, nothing.decode) == (None, None)
    assert "no P:D will do" in nothing.reason
    # 3/5 to 2/3: not with 2 nodes, but with 5 there is 2P3D.
    assert "add nodes" in recommend(node(8, 3), 2, 1, 1).reason
    assert recommend(node(8, 3), 5, 1, 1).prefill == 2


@properties
@given(nodes, st.integers(2, 60), st.one_of(st.none(), st.floats(1e12, 1e16)))
def test_what_is_recommended_is_in_range(of: Hardware, count: int, flops: float | None) -> None:
    of = dataclasses.replace(of, gpu_flops=flops)
    best = recommend(of, count, 10**9, 10**13)
    if best.prefill is not None:
        assert best.decode == count - best.prefill
        assert feasible(of).contains(best.prefill / best.decode)
    else:
        assert not any(feasible(of).contains(p / (count - p)) for p in range(1, count))


@pytest.mark.parametrize(
    "wrong",
    [{"append": 0}, {"append": 32721}, {"generate": -1}, {"agents": 0}, {"rate": 0.0}, {"hold_s": 0.0}],
)
def test_wrong_workloads(wrong: dict[str, Any]) -> None:
    with pytest.raises(dualkv.Error, match="workload"):
        dataclasses.replace(TRACE, **wrong)


def test_nodes_of_both_kinds_are_needed() -> None:
    with pytest.raises(dualkv.Error, match="0 prefill and 3 decode nodes"):
        links(PAPER, 0, 3)
    with pytest.raises(dualkv.Error, match="1 nodes: at least 2"):
        recommend(PAPER, 1, 1, 1)


# --- the command ---


def run(*args: str) -> Result:
    return CliRunner().invoke(command, args)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_table_says_what_binds() -> None:
    done = run("--model", "deepseek-v3.2")
    assert done.exit_code == 0, done.output
    out = flat(done.output)
    assert "2P4D deepseek-v3.2, KV in fp8_ds_mla" in out
    assert "DE DRAM 200.0 500.0 40%" in out
    assert "P/D may be from 0.143 to 3.5 (full at the ends: PE CNIC write; DE CNIC write and DE DRAM)." in out
    assert "Storage NICs bind: at P/D 0.5 the busiest other link, DE DRAM, is at 40%." in out
    assert "For 6 nodes: 2P4D, busiest link DE DRAM at 40%." in out


def test_json_has_all_fields_and_so_has_the_table() -> None:
    args = ("--model", "gpt-oss-120b", "--prefill", "1", "--decode", "2", "--agents", "7", "--gpu-flops", "400TFLOPS")
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert set(found) == {field.name for field in dataclasses.fields(Plan)}
    made = planned(
        dataclasses.replace(PAPER, gpu_flops=4e14), MODELS["gpt-oss-120b"], dataclasses.replace(TRACE, agents=7), 1, 2
    )
    assert found == json.loads(json.dumps(made.to_json()))
    table = flat(run(*args).output)
    for name, value in plan_page.value_rows(made):
        assert flat(f"{name} {value}") in table
    for row in plan_page.link_rows(made):
        assert " ".join(row) in table
    for line in plan_page.sentences(made):
        assert line in table


def test_empty_range_is_told() -> None:
    args = ("--model", "llama-3-8b", "--gpus", "4", "--snic", "800Gb/s")
    out = flat(run(*args).output)
    assert "No P/D keeps all links below capacity: DE CNIC read would be full" in out
    assert "For 6 nodes: no P:D will do" in out
    found = json.loads(run(*args, "--json").output)
    assert found["range"]["empty"] is True
    assert found["recommendation"]["prefill"] is None


def test_storage_as_fast_as_all_compute_nics_is_valid_json() -> None:
    done = run("--model", "llama-3-8b", "--gpus", "4", "--snic", "200GB/s", "--json")
    assert json.loads(done.output, parse_constant=pytest.fail)["range"]["lower"] is None


def test_units_of_overrides() -> None:
    found = json.loads(
        run("--model", "kimi-k2", "--cnic", "200Gb/s", "--snic", "25GB/s", "--dram", "1TB/s", "--json").output
    )
    hardware = found["hardware"]
    assert (hardware["cnic"], hardware["snic"], hardware["dram"]) == (25e9, 25e9, 1e12)


def test_models_are_listed_with_their_bytes() -> None:
    done = run("--list-models")
    assert done.exit_code == 0
    for model in MODELS.values():
        assert re.search(rf"^{re.escape(model.name)} .* {model.kv_bytes_per_token()} ", done.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--model is missing: give one of --list-models"),
        (("--model", "gpt-5"), "'gpt-5' is not known; known are deepseek-v3.2"),
        (("--model", "kimi-k2", "--snic", "50"), "'50': give a number with a unit, 400Gb/s in bits or 50GB/s in bytes"),
        (("--model", "kimi-k2", "--gpu-flops", "fast"), "'fast': give a number with a unit, like 400TFLOPS"),
        (("--model", "kimi-k2", "--gpu-hbm", "141"), None),
        (("--model", "kimi-k2", "--gpu-hbm", "141XB"), "'141XB'"),
        (("--model", "kimi-k2", "--prefill", "0"), "0 is not in the range"),
        (("--model", "kimi-k2", "--context", "100"), "429 new tokens of a context of 100: give at least 1 new token"),
        (("--model", "llama-3-8b", "--kv-dtype", "fp8_ds_mla"), "give bf16 or fp8"),
        (("--model", "kimi-k2", "--hardware", "mine"), "'mine' is not"),
    ],
)
def test_errors_name_the_value_and_the_cure(args: tuple[str, ...], said: str | None) -> None:
    done = run(*args)
    assert done.exit_code == (2 if said else 0)
    if said:
        assert said in flat(done.output)


def test_help_shows_an_example() -> None:
    out = flat(run("--help").output)
    assert "Example: dualkv plan --hardware paper --model deepseek-v3.2 --prefill 2 --decode 4" in out


@needs_matplotlib
@pytest.mark.parametrize("more", [(), ("--gpus", "4", "--snic", "100GB/s")])
def test_html_has_the_plot_and_the_data(tmp_path: Path, more: tuple[str, ...]) -> None:
    path = tmp_path / "plan.html"
    done = run("--model", "deepseek-v3.2", "--html", str(path), *more)
    assert done.exit_code == 0, done.output
    assert "plan.html" in done.output.replace("\n", "")
    page = path.read_text(encoding="utf-8")
    svg = page[page.index("<svg") : page.index("</svg>")]
    for link in links(PAPER, 2, 4):
        assert (link.name in svg) == (not link.name.endswith("SNIC"))
    assert ("in range" in svg) == (not more)
    assert "2P4D" in svg
    assert ">1/4<" in svg
    assert "mathdefault" not in svg
    assert "http" not in svg.replace("http://www.w3.org", "")
    assert '"binds"' in page.replace("&quot;", '"')
