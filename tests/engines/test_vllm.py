"""dualkv's connector in a real, unmodified vLLM on CPUs: one process a run."""

from __future__ import annotations

import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from servers import connector

BLOCK = 32
Run = Callable[..., Any]


def _tokens(seed: int, length: int) -> list[int]:
    noise = random.Random(seed)
    return [noise.randrange(512) for _ in range(length)]


def tokens_of(step: list[dict[str, Any]]) -> list[list[int]]:
    return [one["tokens"] for one in step]


def cached(step: list[dict[str, Any]]) -> list[int]:
    return [one["cached"] for one in step]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(run_program: Run, models: str) -> Run:
    """``run(steps, connector or None, model="llama", llm={...})`` -> result of programs/vllm_generate.py."""

    def call(
        steps: list[dict[str, Any]],
        config: dict[str, Any] | None = None,
        model: str = "llama",
        llm: dict[str, Any] | None = None,
        **settings: str,
    ) -> Any:
        asked = {"model": model, "folder": models, "connector": config, "steps": steps, "llm": llm or {}}
        return run_program("vllm", "vllm_generate", asked, **settings)

    return call


PROMPTS = [_tokens(1, 300), _tokens(2, 97), _tokens(1, 200) + _tokens(3, 60), _tokens(4, 20)]
SESSION = [_tokens(10, 150), _tokens(11, 40), _tokens(12, 3), _tokens(13, 120)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: what vLLM answers without a connector."""
    return {}


@pytest.fixture
def expected(run: Run, plain: dict[str, Any]) -> Any:
    if "llama" not in plain:
        plain["llama"] = run([{"generate": PROMPTS}, {"session": SESSION}])["steps"]
    return plain["llama"]


@pytest.fixture
def stored(run: Run, plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store that holds the blocks of PROMPTS; to be copied."""
    if "stored" not in plain:
        plain["stored"] = tmp_path_factory.mktemp("stored")
        run([{"generate": PROMPTS}], connector(plain["stored"]))
    return pathlib.Path(plain["stored"])


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_what_one_process_saved_another_loads(run: Run, expected: Any, tmp_path: pathlib.Path, load: str) -> None:
    config = connector(tmp_path, load=load)
    first = run([{"generate": PROMPTS}, {"session": SESSION}], config)
    assert list(map(tokens_of, first["steps"])) == list(map(tokens_of, expected))
    assert first["metrics"]["dualkv_saved_blocks/ok"] > 0
    again = run([{"generate": PROMPTS}, {"session": SESSION}], config)
    assert list(map(tokens_of, again["steps"])) == list(map(tokens_of, expected))
    assert cached(again["steps"][0]) == [(len(one) - 1) // BLOCK * BLOCK for one in PROMPTS]
    metrics = again["metrics"]
    assert metrics["external_prefix_cache_hits"] > 0
    assert metrics["dualkv_load_bytes/pe_path"] > 0
    assert metrics["dualkv_loads/ok"] > 0
    assert metrics["dualkv_loads/failed"] == 0


def test_scheduler_and_worker_in_processes_of_their_own(run: Run, expected: Any, tmp_path: pathlib.Path) -> None:
    steps = [{"generate": PROMPTS}, {"forget": True}, {"generate": PROMPTS}]
    result = run(steps, connector(tmp_path), VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert tokens_of(result["steps"][0]) == tokens_of(expected[0])
    assert tokens_of(result["steps"][2]) == tokens_of(expected[0])
    assert result["metrics"]["dualkv_loads/ok"] > 0


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_damaged_blocks_are_computed_again(run: Run, expected: Any, tmp_path: pathlib.Path, load: str) -> None:
    """First, last and middle block of a hit: never used, computed, healed by the next save."""
    config = connector(tmp_path, load=load)
    ask = {"generate": [PROMPTS[0]]}
    steps: list[dict[str, Any]] = [ask]
    for block in (0, 8, 4):
        steps += [{"forget": True}, {"damage": "noise", "block": block}, ask, {"forget": True}, ask]
    result = run(steps, config)
    answers = [step for step in result["steps"] if step]
    assert all(tokens_of(answer) == tokens_of(expected[0])[:1] for answer in answers)
    assert all(answer[0]["reason"] == "length" for answer in answers)
    # Healed: the whole hit is there again.
    assert [cached(answer)[0] for answer in answers[2::2]] == [288] * 3
    assert result["metrics"]["dualkv_loads/failed"] == 3


@pytest.mark.parametrize("load", ["async", "layerwise"])
def test_policy_fail_fails_the_request_and_nothing_else(
    run: Run, expected: Any, tmp_path: pathlib.Path, load: str
) -> None:
    config = connector(tmp_path, load=load) | {"kv_load_failure_policy": "fail"}
    steps = [
        {"generate": PROMPTS[:1]},
        {"forget": True},
        {"damage": "noise", "block": 3},
        {"generate": [PROMPTS[0], PROMPTS[3]]},
        {"generate": PROMPTS[:1]},
    ]
    result = run(steps, config)["steps"]
    assert result[3][0]["reason"] == "error"
    assert tokens_of(result[3])[1] == tokens_of(expected[0])[3]
    assert tokens_of(result[4]) == tokens_of(expected[0])[:1], "the block is not advertised again"


@pytest.mark.parametrize(
    ("load", "faults"),
    [
        ("async", {"error_rate": 1.0}),
        ("layerwise", {"error_rate": 1.0}),
        ("async", {"drop_rate": 1.0}),
        ("layerwise", {"corrupt_rate": 1.0}),
    ],
    ids=["async-errors", "layerwise-errors", "async-never", "layerwise-corrupt"],
)
def test_storage_that_lists_what_it_cannot_read(
    run: Run, expected: Any, stored: pathlib.Path, tmp_path: pathlib.Path, load: str, faults: dict[str, float]
) -> None:
    """The first block of a hit can't be read, again and again: no livelock, no hang, right tokens."""
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    faulty = connector(tmp_path, load=load, deadline_s=2, store_options={"faults": faults})
    result = run([{"generate": PROMPTS[:1]}, {"forget": True}, {"generate": PROMPTS[:2]}], faulty)
    assert tokens_of(result["steps"][0]) == tokens_of(expected[0])[:1]
    assert tokens_of(result["steps"][2]) == tokens_of(expected[0])[:2]
    assert 1 <= result["metrics"]["dualkv_loads/failed"] <= 4


def test_chunked_prefill_and_preemption(run: Run, tmp_path: pathlib.Path) -> None:
    """Blocks come in pieces, and are taken away and computed again: same tokens, same keys."""
    prompts = [_tokens(100 + i, 180) for i in range(6)]
    tight = {"max_num_batched_tokens": 64, "max_model_len": 512, "num_gpu_blocks_override": 40}
    ask = {"generate": prompts, "tokens": 70}
    want = run([ask])["steps"][0]
    config = connector(tmp_path)
    first = run([ask], config, llm=tight)
    assert tokens_of(first["steps"][0]) == tokens_of(want)
    assert first["metrics"]["num_preemptions"] > 0
    for load in ("async", "layerwise"):
        again = run([ask], connector(tmp_path, load=load), llm=tight)
        assert tokens_of(again["steps"][0]) == tokens_of(want)
        assert again["metrics"]["dualkv_loads/ok"] > 0
        assert again["metrics"]["dualkv_saved_blocks/failed_calls"] == 0


def test_quantised_kv(run: Run, tmp_path: pathlib.Path) -> None:
    fp8 = {"kv_cache_dtype": "fp8"}
    want = run([{"generate": PROMPTS}], llm=fp8)["steps"][0]
    for hits in (False, True):
        result = run([{"generate": PROMPTS}], connector(tmp_path), llm=fp8)
        assert tokens_of(result["steps"][0]) == tokens_of(want)
        assert (result["metrics"]["dualkv_loads/ok"] > 0) == hits
    # The same prompts in full precision find nothing of it.
    other = run([{"generate": PROMPTS}], connector(tmp_path))
    assert other["metrics"]["dualkv_loads/ok"] == 0


def test_compiled_model(run: Run, expected: Any, stored: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    result = run([{"generate": PROMPTS}], connector(tmp_path, load="layerwise"), llm={"enforce_eager": False})
    assert tokens_of(result["steps"][0]) == tokens_of(expected[0])
    assert result["metrics"]["dualkv_loads/ok"] > 0


def test_two_connectors_under_one_roof(run: Run, expected: Any, tmp_path: pathlib.Path) -> None:
    """MultiConnector: what the second child stores is found through it, and the first one's failure is its own."""
    children = [connector(tmp_path / name, name=name, namespace=name) for name in ("a", "b")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run([{"generate": PROMPTS[:1]}], children[1])
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children, "store": f"file://{tmp_path}/b"},
    }
    result = run([{"generate": PROMPTS}], multi)
    assert tokens_of(result["steps"][0]) == tokens_of(expected[0])
    assert cached(result["steps"][0])[0] == 288


def test_two_engines_in_one_process_are_refused(run_program: Run, models: str, tmp_path: pathlib.Path) -> None:
    """The second engine's block ids mean nothing in the first one's cache."""
    configs = [connector(tmp_path, name=name) | {"engine_id": name} for name in ("one", "two")]
    result = run_program("vllm", "vllm_two_engines", {"folder": models, "connectors": configs})
    assert "each in its own" in result["error"], result


def test_wrong_options_are_named(run_program: Run) -> None:
    store = {"store": "file:///tmp"}
    extras = [store, {}, store | {"sotre": 1}, store | {"load": "eager"}, store | {"policy": "fastest"}]
    fine, missing, unknown, load, policy = run_program("vllm", "vllm_options", extras)
    assert fine == ""
    assert "store" in missing
    assert "sotre" in unknown
    assert "min_hit_blocks" in unknown, "the known ones are listed"
    assert "async or layerwise" in load
    assert "prefill_only" in policy


@pytest.mark.parametrize("model", ["llama", "wide"])
def test_cost_of_a_step(run_program: Run, models: str, tmp_path: pathlib.Path, capsys: Any, model: str) -> None:
    """Printed, for the record; what is asserted holds on any machine."""
    stored = _tokens(50, 600)
    ask = {"model": model, "folder": models, "connector": connector(tmp_path), "steps": [{"generate": [stored]}]}
    run_program("vllm", "vllm_generate", ask)
    slow = connector(tmp_path, store_options={"read_limit": {"llama": "1MiB", "wide": "16MiB"}[model]})
    result = run_program(
        "vllm",
        "vllm_overhead",
        {"model": model, "folder": models, "connector": slow, "tokens": 200, "stored": stored},
    )
    with capsys.disabled():
        print(
            f"\n{model}: connector: {result['connector_us']:.1f} us of a step of {result['step_us']:.0f} us "
            f"({100 * result['share']:.2f} %), 8 requests decoding, nothing hits; waiting for a load: "
            f"{result['idle']['connector_us']:.1f} us of {result['idle']['step_us']:.0f} us; {result['by_method']}"
        )
    assert result["steps"] >= 200
    assert result["idle"]["steps"] > 100, "vLLM spins while it waits"
    assert result["share"] < 0.2
