"""SGLang: dualkv as its HiCache storage backend (docs/engines/sglang.md).

The engine runs on the CPU behind programs/sglang_shim.py, which stands in for CUDA wheels and three copy kernels.
"""

import pathlib
import random
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)

_OBSERVED: dict[str, Any] = {}


@pytest.fixture
def observed(run_program: Any, tmp_path: pathlib.Path) -> dict[str, Any]:
    """What programs/sglang_adapter.py saw; it runs once."""
    if not _OBSERVED:
        _OBSERVED.update(run_program("sglang", "sglang_adapter", {"store": str(tmp_path / "adapter")}))
    return _OBSERVED


LAYOUTS = [
    "layer_first",
    "page_first",
    "page_first_direct",
    "page_head",
    "page_first_direct, bfloat16",
    "page_first, wider V",
    "page_first_direct, wider V",
    "layer_first, MLA",
    "page_first, MLA",
    "page_first_direct, MLA",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_byte_by_byte(observed: dict[str, Any], layout: str) -> None:
    seen = observed["round_trips"][layout]
    assert seen == {
        "saved": [True] * 6,
        "hit": 6,
        "got": [True] * 6,
        "same": [True] * 6,
        "others_zero": True,  # nothing was written beside the pages asked for
        "files": 6,
    }


def test_layouts_of_one_order_share_pages(observed: dict[str, Any]) -> None:
    assert observed["layouts"] == {"got": [True] * 4, "same": [True] * 4, "page_first_sees": 0}


def test_what_is_missing_ends_the_hit(observed: dict[str, Any]) -> None:
    seen = observed["missing"]
    assert (seen["hit"], seen["none"], seen["empty"]) == (5, 0, 0)
    assert seen["got"] == [True] * 5 + [False] * 3
    assert seen["same"] == [True] * 5
    # The search looks at a few files, so it may promise what lies behind a hole. Reading finds out, and is remembered.
    assert seen["hit_over_hole"] >= 1
    assert seen["got_over_hole"] == [True] + [False] * 4
    assert seen["same_before_hole"] == [True]
    assert seen["hit_after"] == 1
    assert seen["counters"] == {"load_not_found": 1, "pages_loaded": 1, "bytes_loaded": 1536}


def test_a_corrupt_page_is_never_reported(observed: dict[str, Any]) -> None:
    seen = observed["corrupt"]
    assert seen["hit"] == 6
    assert seen["got"] == [True] * 3 + [False] * 3
    assert seen["same"] == [True] * 3
    assert seen["hit_after"] == 3
    assert seen["exists_after"] == [True, True, True, False, True, True]
    assert seen["again"] == [True] * 3 + [False] * 3
    assert (seen["moved_aside"], seen["fresh_sees"]) == (1, 3)
    assert seen["counters"]["load_corrupt"] == 1
    assert seen["healed"] == seen["got_healed"] == seen["same_healed"] == [True] * 6


def test_who_can_not_share_does_not_see(observed: dict[str, Any]) -> None:
    seen = observed["apart"]
    assert seen.pop("same") == 3
    differing = ("tp_rank", "tp_size", "pp_rank", "cp_rank", "model", "salt", "dtype", "mla")
    assert {name: seen[name] for name in differing} == dict.fromkeys(differing, 0)
    assert seen["fp8"] == [3, 0]  # e4m3 and e5m2 both lie in uint8
    # MLA: every rank has the same KV; rank 0 saves it, the others read it.
    assert seen["mla_rank_1_set"] == [True] * 3
    assert (seen["mla_rank_1_files"], seen["mla_rank_0_files"], seen["mla_rank_1_sees"]) == (0, 3, 3)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown", "unknown option stagin; known are clear_removes, deadline_s"),
        ("no_store", "store is missing"),
        ("bad_store", "give file:///directory"),
        ("bad_deadline", "deadline_s = 0: must be more than 0"),
        ("bad_store_option", "unknown option durabel"),
        ("small_staging", "at least 2 are needed"),
        ("no_kv", "SimpleNamespace does not keep plain KV"),
        ("mamba", "MambaPoolHost does not keep plain KV"),
        (
            "wrong_shape",
            "layout 'page_first': (17, 3, 4, 2, 8) on cpu; contiguous (68, 3, 2, 8) on the CPU is expected",
        ),
        ("wrong_layout", "layout 'page_first_kv_split' is not one of layer_first"),
        ("more_state", "hold 26112 of its 26248 bytes"),
        ("dcp", "dcp_size = 2"),
        ("fp8", "the meaning of the KV's uint8 is not known"),
        ("mha_under_mla", "split over TP ranks"),
    ],
)
def test_what_can_not_work_is_refused_with_its_name(observed: dict[str, Any], case: str, words: str) -> None:
    assert words in observed["options"][case]


def test_pages_as_tensors(observed: dict[str, Any]) -> None:
    seen = observed["tensors"]
    assert seen["set"] == [True]
    assert seen["batch_set"] is True
    assert seen["exists"] == seen["got"] == [True, True, True, False]
    assert seen["same"] == [True] * 3
    assert seen["new_memory"] is True
    assert (seen["wrong_size"], seen["not_a_tensor"]) == (None, False)
    assert seen["v1"] == seen["v1_same"] == [True] * 3
    assert (seen["page_head_set"], seen["page_head_same"], seen["page_head_corrupt"]) == (True, True, None)


def test_further_pools(observed: dict[str, Any]) -> None:
    seen = observed["pools"]
    assert seen["set"] == {"draft": [True] * 4}
    assert seen["all_pages"] == [4, {"kv": 6, "draft": 4}]
    assert seen["trailing"] == [4, [1, 4]]  # windows of two pages; the draft's page 1 is gone
    assert (seen["got"], seen["same"]) == ({"draft": [True, True]}, [True, True])
    assert seen["unknown_pool"] == {"mamba": [False]}
    assert seen["unknown_policy"] == 0
    assert "'draft' is registered already" in seen["again"]


def test_late_storage_is_a_miss_by_the_deadline(observed: dict[str, Any]) -> None:
    seen = observed["late"]
    assert (seen["hit"], seen["got"]) == (3, [False] * 3)
    assert 0.3 < seen["seconds"] < 3
    assert (seen["hit_after"], seen["hit_later"]) == (0, 3)  # not advertised for forget_failed_s
    assert seen["counters"] == {"load_timeout": 1}


def test_errors_are_misses(observed: dict[str, Any]) -> None:
    seen = observed["errors"]
    assert (seen["got"], seen["hit_after"]) == ([False] * 3, 0)
    assert seen["misaligned"] == seen["too_few"] == [False] * 3
    assert seen["scattered"] == [False]
    assert seen["counters"] == {"load_io": 1, "call_invalid_argument": 3}
    assert seen["no_folder"] == [[False, False], 0]


def test_threads_and_close(observed: dict[str, Any]) -> None:
    seen = observed["threads"]
    assert seen["saved_some"]
    assert (seen["wrong"], seen["missed_early"], seen["internal_errors"]) == ([], [], [])
    assert (seen["ended"], seen["closed_in_between"]) == (True, 4)


def test_the_rest_of_the_interface(observed: dict[str, Any]) -> None:
    seen = observed["end"]
    assert seen["parent"]
    assert seen["metrics"] == [[2, 2], [4], True]
    assert seen["metrics_again"] == []
    assert "nothing was removed" in seen["clear_refused"]
    assert seen["hit_after_refusal"] == 4
    assert (seen["cleared"], seen["hit_after_clear"]) == (True, [0, 4])
    assert seen["after_close"] == [[False] * 4, [False] * 4, None]


def test_whole_engines(run_program: Any, tmp_path: pathlib.Path) -> None:
    """One engine writes; storage is changed; another one, in another process and host layout, reads."""
    numbers = random.Random(3)
    kinds = ("whole", "noise", "raw", "missing")
    prompts = {kind: [numbers.randrange(10, 500) for _ in range(300)] for kind in kinds}
    store = tmp_path / "kv"
    extra = {
        "backend_name": "dualkv",
        "module_path": "dualkv.integrations.sglang",
        "class_name": "DualKVHiCache",
        "interface_v1": 1,
        "store": f"file://{store}",
        "staging": "16MiB",
        "prefetch_threshold": 16,
        "hicache_storage_pass_prefix_keys": True,
    }
    argument = {"models": str(tmp_path / "models"), "prompts": prompts, "damage": None}

    runs = [{"extra_config": None}, {"extra_config": extra, "layout": "page_first_direct"}]
    one = run_program("sglang", "sglang_engine", {**argument, "runs": runs}, timeout_s=500)
    plain, first = one["runs"]
    right = {kind: plain[kind]["tokens"] for kind in kinds}
    assert right == one["reference"]  # transformers': the stand-ins compute what the kernels would
    assert {kind: first[kind]["tokens"] for kind in kinds} == right
    assert [first[kind]["cached"] for kind in kinds] == [0] * 4
    stored = len(list(store.glob("*/??/*.kv")))
    assert stored == 4 * (311 // 16)  # the last of 12 new tokens was not an input

    runs = [{"extra_config": extra, "layout": "layer_first"}]
    damage = {"store": str(store), "page": 5}
    two = run_program("sglang", "sglang_engine", {**argument, "runs": runs, "damage": damage}, timeout_s=500)
    assert two["damage"]["rewritten"]
    second = two["runs"][0]
    from_storage = {kind: second[kind]["details"].get("storage", 0) for kind in kinds}
    # A whole prompt's KV comes from storage, and is used: with noise in its place the tokens differ.
    assert from_storage == {"whole": 288, "noise": 288, "raw": 80, "missing": 80}
    assert second["whole"]["tokens"] == right["whole"]
    assert second["noise"]["tokens"] != right["noise"]
    # Damage ends the hit before it; the rest is computed, and the page is stored again.
    assert second["raw"]["tokens"] == right["raw"]
    assert second["missing"]["tokens"] == right["missing"]
    assert len(list(store.glob("*/??/*.corrupt"))) == 1
    assert len(list(store.glob("*/??/*.kv"))) == stored + 1  # noise made other tokens, and so another last page
    assert pathlib.Path(two["damage"]["damaged"]).exists()
