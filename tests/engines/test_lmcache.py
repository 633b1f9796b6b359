"""dualkv behind LMCache: its own checks, its remote backend, its L2 adapter interface, and its MP server's storage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
PLUGIN = "remote_storage_plugin.dualkv."


@pytest.fixture
def run(run_program: Run) -> Run:
    return lambda name, **arguments: run_program("lmcache", f"lmcache_{name}", arguments)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"store": f"file://{tmp_path}/kv", "staging": "4MiB"}


def damage_one(root: Path) -> None:
    """Flips a bit in one of the chunks."""
    path = sorted(root.rglob("*.kv"))[0]
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def without_one(values: list[bool]) -> bool:
    return sorted(values) == [False] + [True] * (len(values) - 1)


# --- LMCache's own checks


@pytest.mark.parametrize("mode", ["test_remote", "test_storage_manager", "test_l2_adapter"])
def test_checks_that_come_with_lmcache(run: Run, options: dict[str, Any], mode: str) -> None:
    plugin = {"module_path": "dualkv.integrations.lmcache", "class_name": "DualKVAdapter", **options}
    config = {
        "local_cpu": False,  # so that what comes back comes from dualkv
        "max_local_cpu_size": 0.1,
        "remote_storage_plugins": ["dualkv"],
        "extra_config": {PLUGIN + name: value for name, value in plugin.items()},
    }
    if mode == "test_remote":  # this check knows the older form only
        config["remote_url"] = "plugin://dualkv"
    adapter = {
        "type": "plugin",
        "module_path": "dualkv.integrations.lmcache",
        "class_name": "DualKVL2Adapter",
        "adapter_params": options,
    }
    # 512 elements: a full chunk of 256 tokens.
    wanted = {"model": "org/model", "num_keys": 7, "obj_size": 512, "l2_adapter": [json.dumps(adapter)]}
    result = run("checks", mode=mode, config=config, options=wanted)
    names = {"EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET"}
    if mode == "test_l2_adapter":
        names = {"LOOKUP (absent)", "STORE", "LOOKUP (exist)", "LOAD"}
    assert result["passed"] == dict.fromkeys(names, "7/7"), result["printed"]


# --- the remote backend


@pytest.mark.parametrize("mla", [False, True])
def test_a_second_process_gets_what_the_first_put(run: Run, options: dict[str, Any], tmp_path: Path, mla: bool) -> None:
    asked = [0, 1, 2, 3, 4, 7]  # 3 was never put, 7 is a partly filled chunk
    there = [True, True, True, False, True, False]
    first = run("remote", options=options, engine={"mla": mla}, put=[0, 1, 2, 4], put_partial=[7], ask=asked)
    assert first["references"] == [1] * 4
    assert first["references_partial"] == [1]
    assert first["stats"]["stored"] == 4
    assert first["stats"]["skipped"] == 1
    assert len(list(tmp_path.rglob("*.kv"))) == 4

    second = run("remote", options=options, engine={"mla": mla}, ask=asked, remove=[1, 9])
    for result in (first, second):
        assert result["exists"] == result["exists_sync"] == there
        assert result["leading"] == result["leading_async"] == result["prefix"] == 3
        assert result["got"] == result["got_again"] == [stored or None for stored in there]
        assert result["others"] == [False] * 4
        assert result["ping"] == 0
        assert result["held_bytes"] == 0
        assert result["closed"] == [False, None]
    assert second["stats"] == {"stored": 0, "loaded": 12, "missed": 6, "corrupt": 0, "failed": 0, "skipped": 0}
    assert second["removed"] == [True, False]
    assert (first["listed"], second["listed"]) == (4, 3)


def test_failures_of_the_remote_backend_are_misses(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    run("remote", options=options, put=[0, 1, 2, 3, 4, 5])
    damage_one(tmp_path)
    result = run("failures", options=options)
    assert without_one([got is True for got in result["damaged"]])
    assert None in result["damaged"]
    assert result["exists"] == [got is True for got in result["damaged"]]
    assert result["corrupt"] == 1
    assert result["healed"] == [True] * 6

    assert result["full_pool"] == [True, True, None]
    assert result["freed_pool"] == [0, True]

    assert result["silent"] is None
    assert 0.4 < result["silent_s"] < 5
    assert result["silent_stats"]["failed"] == 1
    assert result["silent_held"] == 0
    assert [result["reading"], result["given_up"], result["reading_again"]] == [True] * 3
    assert result["closed_while_reading"] == [None, 0]
    assert result["close_s"] < 5

    expected = {
        "option": ("invalid_argument", "stagin; known are deadline_s"),
        "store_option": ("invalid_argument", "qouta; known are"),
        "no_store": ("invalid_argument", "store is missing"),
        "no_url": ("invalid_argument", "file:///directory"),
        "deadline": ("invalid_argument", "deadline_s = 0"),
        "layerwise": ("unsupported", "use_layerwise"),
        "serde": ("unsupported", "use 'naive'"),
    }
    for name, (code, words) in expected.items():
        found, message, without_backend = result["refused"][name]
        assert found == code, name
        assert words in message, name
        assert without_backend, name  # LMCache itself logs it, and goes on
    assert result["refused"]["nothing"] == [None, None, False]
    assert result["named"] == [True, True]
    assert result["parsed"] == [True, True, False, False]


# --- the MP server


def test_l2_adapter_stores_looks_up_and_loads(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    first = run("l2", options=options, phase="write")
    assert first["distinct"] == 3
    assert first["before"] == [["lookup"], [False, False], True]
    chunk = 2 * 4 * 16 * 64 * 4
    assert first["stored"] == [["store"], True, 4 * chunk, True]
    assert first["stored_again"] == [["store"], True, chunk, True]
    assert first["unknown_task"] == [None, None]
    assert first["others"] == {name: [False] for name in ("model", "rank", "group", "salt", "type", "size")}
    assert first["no_layout"] == [True, False]
    assert first["half"] == [[True], True]
    assert first["many"] == [0, 0]
    assert first["deleted"] == [True, False]
    assert first["listener"] == {"stored": 6, "accessed": 1, "deleted": 1}
    assert first["usage"] == 4 * chunk + chunk // 2
    assert first["status"]["is_healthy"] is True
    assert first["status"]["stored"] == 6
    closed, healthy = first["closed"]
    assert closed[0] == "cancelled"
    assert healthy is False

    # Of chunks 0, 1, 2 and 4, which are stored in single precision, one is damaged.
    for path in tmp_path.rglob("*.kv"):
        if path.stat().st_size < chunk:
            path.unlink()
    damage_one(tmp_path)
    second = run("l2", options=options, phase="read")
    assert second["looked_up"] == [["lookup"], [True, True, True, False, True], True]
    came, bits, once = second["loaded"]
    assert (came, once) == (["load"], True)
    assert bits[3] is False
    assert without_one(bits[:3] + bits[4:])
    assert second["right"] == bits
    assert second["untouched"] == [not bit for bit in bits]
    assert second["looked_up_next"] == bits
    assert second["corrupt"] == 1
    assert second["healed"] == [["store"], True, 2 * chunk, True]
    assert second["loaded_next"] == second["right_next"] == [True] * 5

    assert second["silent"] == [False] * 5
    assert 0.4 < second["silent_s"] < 5
    assert second["in_progress"] is None
    assert second["close_s"] < 5
    assert second["closed_untouched"] is True
    assert second["no_room"] == [[False] * 5, [False] * 5, -1, True]
    expected = {
        "option": ("invalid_argument", "stagin; known are"),
        "store_option": ("invalid_argument", "qouta; known are"),
        "no_store": ("invalid_argument", "store is missing"),
        "no_parent": ("io", "parent directory"),
        "deadline": ("invalid_argument", "deadline_s"),
    }
    for name, (code, words) in expected.items():
        assert second["refused"][name][0] == code, name
        assert words in second["refused"][name][1], name


def test_storage_of_the_mp_server(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    first = run("server", options=options, phase="write")
    assert first["status"]["stored"] == 8
    second = run("server", options=options, phase="read")
    assert second["ended"] is True
    assert (second["from_l1"], second["from_l2"]) == (0, 8)
    assert second["right"] == [True] * 8

    # The server prefetches prefixes: it uses what comes before the damaged chunk, and none of that is wrong.
    damage_one(tmp_path)
    third = run("server", options=options, phase="read")
    assert third["ended"] is True
    assert third["from_l2"] < 8
    assert third.get("right", []) == [True] * third["from_l2"]
    assert third["status"]["corrupt"] == 1
    assert [result["healthy"] for result in (first, second, third)] == [True] * 3
    assert [result["closed"] for result in (first, second, third)] == [False] * 3
