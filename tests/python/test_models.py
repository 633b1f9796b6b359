"""The paged, layer-wise pass of the reference decoders against their cache-free pass."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from dualkv.engines import models

KINDS = ("gqa", "mla")
TOKENS_PER_BLOCK = 8
NUM_BLOCKS = 24
# The two passes round differently (about 1e-5 here); logits have a standard deviation of about 8.
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(kind: Any, **changes: Any) -> models.ModelConfig:
    config = models.ModelConfig(
        kind=kind,
        layers=3,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        latent_dim=24,
        rope_dim=8,
        mlp_hidden=96,
        vocab=97,
        seed=5,
    )
    return dataclasses.replace(config, **changes)


def random_tokens(config: models.ModelConfig, count: int, seed: int = 0) -> Any:
    return torch.randint(config.vocab, (count,), generator=torch.Generator().manual_seed(seed))


def scattered(seed: int = 1) -> Any:
    return torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed))


def nan_cache(config: models.ModelConfig) -> list[Any]:
    """A cache in which reading any slot that was not written first spoils the logits."""
    cache = config.new_cache(NUM_BLOCKS, TOKENS_PER_BLOCK)
    for layer in cache:
        layer.fill_(float("nan"))
    return cache


def decode(
    model: models.Decoder, logits: Any, start: int, steps: int, table: Any, cache: list[Any]
) -> tuple[list[int], list[Any]]:
    """Greedy steps from logits: the tokens chosen and the logits after each of them."""
    tokens, seen = [], []
    for position in range(start, start + steps):
        tokens.append(models.greedy(model, logits))
        logits = model.decode(tokens[-1], position, table, cache)
        seen.append(logits)
    return tokens, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(scattered(), id="scattered"),
        pytest.param(torch.arange(3, NUM_BLOCKS), id="run"),
        pytest.param(torch.arange(NUM_BLOCKS - 1, -1, -1), id="backwards"),
    ],
)
@pytest.mark.parametrize(
    "splits",
    [
        pytest.param([101], id="whole"),  # longer than a query chunk
        pytest.param([48, 16, 8], id="block-boundaries"),
        pytest.param([48, 15, 9, 1], id="across-boundaries"),
        pytest.param([1, 7, 1, 30, 5], id="odd"),
        pytest.param([40, 65], id="chunk-plus-one"),
    ],
)
def test_incremental_equals_dense(kind: str, table: Any, splits: list[int]) -> None:
    config = small(kind)
    model = models.build(config)
    prompt = random_tokens(config, sum(splits))
    cache = nan_cache(config)
    found: dict[int, Any] = {}
    start = 0
    for size in splits:
        found[start + size - 1] = logits = model.prefill(prompt[start : start + size], start, table, cache)
        start += size
    new, seen = decode(model, logits, start, 12, table, cache)
    found.update(enumerate(seen, start))

    oracle = model.all_logits(torch.cat((prompt, torch.tensor(new))))
    assert oracle.shape == (start + 12, config.vocab)
    for position, got in found.items():
        torch.testing.assert_close(got, oracle[position], **CLOSE)
        assert models.greedy(model, got) == models.greedy(model, oracle[position])
    assert new == oracle[start - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_no_loop_and_has_no_near_ties(kind: str) -> None:
    config = small(kind)
    model = models.build(config)
    prompt, table = random_tokens(config, 64), scattered()
    cache = nan_cache(config)
    new, _ = decode(model, model.prefill(prompt, 0, table, cache), 64, 64, table, cache)
    assert len(set(new)) > 16
    best = model.all_logits(torch.cat((prompt, torch.tensor(new)))).topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_only_own_slots_are_written(kind: str) -> None:
    config = small(kind)
    model = models.build(config)
    table, count = scattered(), 2 * TOKENS_PER_BLOCK + 3
    cache = nan_cache(config)
    model.prefill(random_tokens(config, count), 0, table, cache)
    for layer in cache:
        planes = list(layer) if kind == "gqa" else [layer]
        for plane in planes:
            slots = plane[table].flatten(0, 1)
            assert slots[:count].isfinite().all()
            assert slots[count:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_that_gather_and_tables_that_do_not_agree(kind: str) -> None:
    config = small(kind)
    model = models.build(config)
    tokens = random_tokens(config, 50)
    results = []
    for table in (torch.arange(NUM_BLOCKS), scattered()):
        cache = nan_cache(config)
        model.prefill(tokens[:41], 0, table, cache)
        results.append(model.prefill(tokens[41:], 41, table, cache))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_surround_each_layer(kind: str) -> None:
    config = small(kind)
    model = models.build(config)
    table, tokens = scattered(), random_tokens(config, 30)
    reference = nan_cache(config)
    model.prefill(tokens[:20], 0, table, reference)
    loaded = [layer.clone() for layer in reference]
    want = model.prefill(tokens[20:], 20, table, reference)

    # Each layer arrives only inside before_layer; what after_layer sees is already complete.
    cache = nan_cache(config)
    calls: list[tuple[str, int]] = []

    def arrive(layer: int) -> None:
        calls.append(("before", layer))
        assert cache[layer].isnan().all()
        cache[layer].copy_(loaded[layer])

    def publish(layer: int) -> None:
        calls.append(("after", layer))
        torch.testing.assert_close(cache[layer], reference[layer], equal_nan=True, **CLOSE)

    got = model.prefill(tokens[20:], 20, table, cache, arrive, publish)
    assert calls == [(side, i) for i in range(config.layers) for side in ("before", "after")]
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_prefix_changes_the_result(kind: str) -> None:
    """The control: had the cached prefix not mattered, the comparisons above would mean little."""
    config = small(kind)
    model = models.build(config)
    table, tokens = scattered(), random_tokens(config, 80)
    cache = config.new_cache(NUM_BLOCKS, TOKENS_PER_BLOCK)
    model.prefill(tokens[:72], 0, table, cache)

    def finish(damage: Callable[[list[Any]], None]) -> tuple[list[int], Any]:
        copy = [layer.clone() for layer in cache]
        damage(copy)
        logits = model.prefill(tokens[72:], 72, table, copy)
        return decode(model, logits, 80, 16, table, copy)[0], logits

    def noise(copy: list[Any]) -> None:
        generator = torch.Generator().manual_seed(3)
        for layer in copy:
            layer.copy_(torch.randn(layer.shape, generator=generator))

    def lose_one_block(copy: list[Any]) -> None:
        for layer in copy:
            layer[..., table[4], :, :, :].zero_() if kind == "gqa" else layer[table[4]].zero_()

    def lose_one_layer(copy: list[Any]) -> None:
        copy[1].zero_()

    want_tokens, want = finish(lambda copy: None)
    assert finish(lambda copy: None)[0] == want_tokens
    for damage in (noise, lose_one_block, lose_one_layer):
        got_tokens, got = finish(damage)
        assert (got - want).abs().max() > 100 * CLOSE["atol"], damage.__name__
        assert got_tokens != want_tokens, damage.__name__


def all_weights(model: models.Decoder) -> list[Any]:
    """Every weight of a model, in an order that is the same for equal configs."""
    layers = [layer[name] for layer in model.layers for name in sorted(layer)]
    return [model.embedding, model.head, *layers]


def digest(weights: list[Any]) -> str:
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_depend_on_the_config_alone(kind: str) -> None:
    config = small(kind)
    torch.manual_seed(1)
    one = models.build(config)
    torch.manual_seed(2)
    two = models.build(config)
    assert len(all_weights(one)) == len(all_weights(two))
    assert all(map(torch.equal, all_weights(one), all_weights(two)))
    tokens = random_tokens(config, 20)
    assert torch.equal(one.all_logits(tokens), two.all_logits(tokens))
    other = models.build(dataclasses.replace(config, seed=6))
    assert not torch.equal(other.embedding, one.embedding)

    script = "import sys, test_models as t; print(t.digest(t.all_weights(t.models.build(t.small("
    script += "sys.argv[1])))))"
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert elsewhere.stdout.strip() == digest(all_weights(one))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens_per_block", [1, 16, 33])
def test_sizes_match_the_tensors(kind: str, tokens_per_block: int) -> None:
    config = small(kind)
    cache = config.new_cache(5, tokens_per_block)
    assert len(cache) == config.layers
    for layer in cache:
        assert layer.dtype == torch.float32
        assert layer.nbytes == 5 * config.layer_bytes(tokens_per_block)
        assert layer.nbytes == 5 * tokens_per_block * config.token_bytes
    if kind == "gqa":
        assert cache[0].shape == (2, 5, tokens_per_block, config.kv_heads, config.head_dim)
    else:
        assert cache[0].shape == (5, tokens_per_block, config.latent_dim + config.rope_dim)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        small("mha")
    with pytest.raises(ValueError, match="multiple"):
        small("gqa", kv_heads=3)
    config = small("gqa")
    cache = config.new_cache(NUM_BLOCKS, TOKENS_PER_BLOCK)
    with pytest.raises(ValueError, match="3 blocks, got 2"):
        models.build(config).prefill(random_tokens(config, 17), 0, torch.arange(2), cache)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("in_a_row", [True, False])
def test_all_of_a_pass_is_on_the_models_device(kind: Any, in_a_row: bool) -> None:
    """Shown with a device that computes nothing, and whose tensors don't mix with those of the CPU."""
    config = small(kind)
    model = models.build(config, "meta")
    cache = config.new_cache(NUM_BLOCKS, TOKENS_PER_BLOCK, "meta")
    tokens = random_tokens(config, 2 * TOKENS_PER_BLOCK + 1)
    table = torch.arange(NUM_BLOCKS) if in_a_row else scattered()
    assert model.prefill(tokens, TOKENS_PER_BLOCK, table, cache).device.type == "meta"
    assert model.all_logits(tokens).device.type == "meta"
