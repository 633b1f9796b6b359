"""DualKVCache in transformers' own generate(): tokens against generation without a store, in other processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Any]


@pytest.fixture
def run(run_program: Run) -> Run:
    return lambda name, **arguments: run_program("transformers", f"transformers_{name}", arguments)


def block_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.kv"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(255 - byte for byte in content[100:200])
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_second_process_loads_what_the_first_saved(run: Run, tmp_path: Path, dtype: str) -> None:
    store = f"file://{tmp_path}/kv"
    (first,) = run("turn", store=store, dtype=dtype, turns=[{"length": 100}])
    assert (first["hit"], first["read"], first["saved"], first["saved_again"]) == (0, 0, 6, 0)
    # 111 tokens have KV: 6 full blocks of 16. The partly filled one stays out.
    assert len(block_files(tmp_path)) == 6

    turns = [{"length": 100}, {"length": 100, "options": {"overlap": False}}]
    second = run("turn", store=store, dtype=dtype, turns=turns)
    assert first["tokens"] == first["plain"]
    for turn in second:
        assert turn["tokens"] == turn["plain"] == first["tokens"]
        assert (turn["hit"], turn["read"], turn["saved"]) == (96, 6, 0)
    assert len(block_files(tmp_path)) == 6


def test_turns_of_a_conversation_hit_what_earlier_turns_generated(run: Run, tmp_path: Path) -> None:
    turns = [{"length": 100}, {"length": 50, "seed": 2, "continues": True}, {"length": 7, "seed": 3, "continues": True}]
    results = run("turn", store=f"file://{tmp_path}/kv", turns=turns)
    assert [turn["tokens"] == turn["plain"] for turn in results] == [True] * 3
    # A hit ends at the last block that the turn before completed, generated tokens included.
    held = [(len(turn["tokens"]) - 1) // 16 * 16 for turn in results]
    assert [turn["hit"] for turn in results] == [0, held[0], held[1]]
    assert len(block_files(tmp_path)) == held[2] // 16


def test_noise_with_right_checksums_changes_the_tokens(run: Run, tmp_path: Path) -> None:
    result = run("noise", store=f"file://{tmp_path}/kv")
    assert result["hit"] == 96
    assert result["tokens"] != result["plain"]


@pytest.mark.parametrize("overlap", [True, False])
def test_damage_is_never_used_and_is_healed(run: Run, tmp_path: Path, overlap: bool) -> None:
    run("turn", store=f"file://{tmp_path}/kv", turns=[{"length": 100}])
    good = {path: path.read_bytes() for path in block_files(tmp_path)}
    damage(block_files(tmp_path)[0])  # of six, by key: some block of the hit

    result = run("damaged", store=f"file://{tmp_path}/kv", overlap=overlap)
    assert result["tokens"] == result["plain"]
    if overlap:
        assert result["offered"] == 96
        assert result["raised"][0] == result["raised_again"][0] == "corrupt"
        assert "Call again with a new DualKVCache" in result["raised"][1]
        assert result["save"][0] == "invalid_argument"
        assert result["offered_next"] < 96
    else:
        assert result["offered"] < 96
        assert result["failure"] == "corrupt"
    assert result["healed"] > 0
    assert result["stored"] == 6
    assert {path: path.read_bytes() for path in block_files(tmp_path)} == good
    assert len(list(tmp_path.rglob("*.corrupt"))) == 1
    # Storage that never answers: the call ends by its deadline, or the prompt is computed.
    assert result["silent"] == [0, "timeout", result["plain"]]
    assert result["late"][0] == "timeout"


def test_layers_are_used_while_later_ones_are_read_and_helpers_read_a_part(run: Run, tmp_path: Path) -> None:
    result = run("layers", store=f"file://{tmp_path}/kv")
    layered = result["layered"]
    assert layered["tokens"] == result["plain"]
    used, ready = layered["layer_wait_end_s"], layered["layer_ready_s"]
    for layer in range(3):
        assert ready[layer] <= used[layer] < ready[3]
    assert [turn["tokens"] == result["plain"] for turn in result["shared"]] == [True] * 3
    assert [sorted(turn["blocks"]) for turn in result["shared"]] == [["engine"], ["helper"], ["engine", "helper"]]
    assert [sum(turn["blocks"].values()) for turn in result["shared"]] == [49] * 3


def test_wrong_use_is_refused_with_its_reason(run: Run, tmp_path: Path) -> None:
    result = run("usage", store=f"file://{tmp_path}/kv")
    expected = {
        "unnamed": ("invalid_argument", "model="),
        "dtype": ("unsupported", "torch.float64"),
        "sliding": ("unsupported", "DynamicSlidingWindowLayer"),
        "linear": ("unsupported", "LinearAttention"),
        "latent": ("unsupported", "MLA"),
        "encoder_decoder": ("unsupported", "encoder-decoder"),
        "batch": ("invalid_argument", "one sequence"),
        "empty": ("invalid_argument", "[n] or [1, n]"),
        "nowhere": ("invalid_argument", "give a node, or a store"),
        "option": ("invalid_argument", "stagin; known are deadline_s"),
        "node_and_store": ("invalid_argument", "store; known are"),
        "store_option": ("invalid_argument", "stagin; known are"),
        "other_dtype": ("invalid_argument", "kv_geometry"),
        "other_model": ("invalid_argument", "kv_geometry"),
        "beams": ("invalid_argument", "no beams"),
        "other_tokens": ("invalid_argument", "don't begin with the prompt"),
        "longer_prompt": ("invalid_argument", "the prompt has 100"),
        "chunked": ("invalid_argument", "prefill_chunk_size"),
        "crop": ("invalid_argument", "before the first forward pass"),
        "reset": ("unsupported", "make a new one"),
        "closed": ("invalid_argument", "closed"),
    }
    refused = result["refused"]
    assert refused.keys() == expected.keys()
    for name, (code, words) in expected.items():
        assert refused[name] is not None, name
        assert refused[name][0] == code, name
        assert words in refused[name][1], name
    assert result["accepted"] == {
        "short_hit": 0,
        "length": 111,
        "same_cache": True,
        "cropped": [91, 0],
        "own": [96, True],
        "namespaces": 4,
    }


def test_example(run: Run, tmp_path: Path) -> None:
    example = str(ROOT / "examples/engines/transformers_cache.py")
    first = run("example", folder=str(tmp_path), example=example)
    second = run("example", folder=str(tmp_path), example=example)
    assert first["text"] == second["text"]
    assert first["text"].startswith("Once upon a time")
    assert "0 of 180 tokens came from storage; 13 blocks are new there" in first["report"]
    assert "176 of 180 tokens came from storage; 0 blocks are new there" in second["report"]
