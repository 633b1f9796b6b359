"""Lanes in the network: the plan line by line, and the testbed, where marks decide which queue a byte waits in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import LAYER_BYTES, Child

import dualkv
from dualkv.cli.main import cli
from dualkv.fabric import FABRICS, LaneReport, local_settings, measure_lanes, plan_fabric
from dualkv.fabric.measure import Flow
from dualkv.lanes import LANES
from dualkv.testbed import AllToAll, Testbed, remove_leftovers
from dualkv.testbed.storage import groups

DOC = (Path(__file__).parents[2] / "docs" / "lanes.md").read_text()
RATE = 50_000_000
NAMESPACES = Path("/run/netns")


def texts(fabric: str, **options: Any) -> list[str]:
    return [line.text for section in plan_fabric(fabric, **options) for line in section.lines]


# --- the plan


def test_the_papers_infiniband_settings() -> None:
    lines = texts("infiniband")
    for wanted in (
        "qos TRUE",
        "qos_max_vls 4",
        "qos_high_limit 240",
        "qos_vlarb_high 0:192,1:192,2:0,3:192",
        "qos_vlarb_low 0:192,1:192,2:64,3:192",
    ):
        assert wanted in lines
    mapping = next(line for line in lines if line.startswith("qos_sl2vl")).split()[1].split(",")
    assert len(mapping) == 16, "a lane for each service level"
    assert mapping[2] == "2", "KV's"


@pytest.mark.parametrize(("share", "limit"), [(0.5, 1), (0.9, 9), (0.99, 99), (0.9999, 254)])
def test_the_high_limit_is_the_share(share: float, limit: int) -> None:
    assert f"qos_high_limit {limit}" in texts("infiniband", share=share), "and never 255, which shuts LOW out"


@pytest.mark.parametrize("share", [None, 0.5, 0.9, 0.999])
def test_roce_weights_add_up_and_leave_low_something(share: float | None) -> None:
    lines = "\n".join(texts("roce", share=share, interface="eth2"))
    found = re.search(r"--tcbw ([\d,]+)", lines)
    assert found
    weights = [int(weight) for weight in found[1].split(",")]
    assert sum(weights) == 100
    assert weights[LANES["low"].dscp >> 3] >= 1
    assert weights[LANES["high"].dscp >> 3] == max(weights) or share == 0.5
    assert f"NCCL_IB_TC={LANES['high'].tos}" in lines
    assert "eth0" not in lines


def test_ethernet_classes_share_the_link() -> None:
    lines = texts("ethernet", interface="eth3", rate=125_000_000)
    rates = [int(rate) for line in lines for rate in re.findall(r"htb rate (\d+)kbit", line)]
    assert rates == [1_000_000, 990_000, 10_000]


@pytest.mark.parametrize("fabric", FABRICS)
def test_every_line_has_its_reason_here_and_in_the_docs(fabric: str) -> None:
    for section in plan_fabric(fabric):
        for line in section.lines:
            assert line.why.endswith("."), line.text
            key = re.sub(r"dev \w+|-i \w+", "", line.text.removeprefix("export ").removeprefix("# ")).split("=")[0]
            words = key.split()
            name = " ".join(words[:2]) if words[0] in ("tc", "ip", "mlnx_qos", "smpquery") else words[0]
            assert name in DOC, f"docs/lanes.md does not speak of {name!r}"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fabric": "token ring"}, "token ring"),
        ({"fabric": "roce", "share": 1.0}, "share 1.0"),
        ({"fabric": "infiniband", "share": 0.2}, "share 0.2"),
        ({"fabric": "ethernet", "rate": 10}, "rate 10"),
    ],
)
def test_plans_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(dualkv.Error, match=named) as refused:
        plan_fabric(**options)
    assert refused.value.code == "invalid_argument"


def test_plan_command() -> None:
    shown = CliRunner().invoke(
        cli, ["fabric", "plan", "--fabric", "ethernet", "--interface", "eth9", "--rate", "1GB/s"]
    )
    told = CliRunner().invoke(
        cli, ["fabric", "plan", "--fabric", "ethernet", "--interface", "eth9", "--rate", "1GB/s", "--json"]
    )
    assert shown.exit_code == told.exit_code == 0, shown.output
    for section in json.loads(told.stdout)["sections"]:
        assert section["place"] in shown.stdout
        for line in section["lines"]:
            assert line["text"] in shown.stdout
            assert line["why"] in shown.stdout


def test_a_report_says_what_real_lanes_would_do() -> None:
    good = LaneReport(100, 200, 110, 290, 9e7, 1e8, 9.6e7, 4.6e7, 5e7)
    assert good.isolated
    assert good.missed() == []
    assert good.leakage == pytest.approx(0.04)
    assert good.low_of_rest == pytest.approx(0.92)
    bad = LaneReport(100, 200, 160, 310, 9e7, 1e8, 9.4e7, 1e7, 5e7)
    assert not bad.isolated
    assert len(bad.missed()) == 3
    assert bad.to_json()["missed"] == bad.missed()


# --- the testbed


@pytest.fixture
def bed() -> Iterator[Testbed]:
    before = set(NAMESPACES.glob("dualkv-*"))
    testbed = Testbed(2, rate=RATE)
    try:
        testbed.__enter__()
    except dualkv.Error as error:
        if error.code != "unsupported" or set(NAMESPACES.glob("dualkv-*")) - before:
            raise  # or what failed left something behind
        pytest.skip(str(error))
    try:
        yield testbed
    finally:
        testbed.__exit__()
    assert set(NAMESPACES.glob("dualkv-*")) <= before


def sent(bed: Testbed, node: int, lane: str) -> int:
    """Bytes that the node's NIC has sent on a lane."""
    shown = subprocess.run(
        [*bed.prefix(node), "tc", "-s", "class", "show", "dev", "nic"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(rf"class htb 1:{'10' if lane == 'high' else '20'} .*?Sent (\d+) bytes", shown, re.DOTALL)
    assert found, shown
    return int(found[1])


@pytest.mark.root
def test_flows_wait_in_the_queue_of_their_lane(bed: Testbed) -> None:
    with Flow(bed.prefix(1), op="serve", host=bed.address(1), port=0) as server:
        at = {"host": bed.address(1), "port": server.first_line()["port"]}
        for lane, other in (("low", "high"), ("high", "low")):
            before = {name: sent(bed, 0, name) for name in LANES}
            with Flow(bed.prefix(0), op="flood", lane=lane, connections=2, seconds=0.3, rate=0, **at) as flow:
                counted = flow.result(60)["bytes"]
            assert counted > 0
            assert sent(bed, 0, lane) - before[lane] >= counted
            assert sent(bed, 0, other) - before[other] < 4096, "of the other lane, next to nothing"


@pytest.mark.root
def test_a_prompts_kv_waits_in_the_queue_of_low(bed: Testbed, children: Callable[..., Child], tmp_path: Path) -> None:
    blocks = 32
    prefill, decode = (children(bed.prefix(node)) for node in range(2))
    options = {"store": f"file://{tmp_path / 'store'}", "secret": "of the testbed"}
    prefill.call("open", name="p", listen=[], **options)
    (address,) = decode.call("open", name="d", listen=[f"tcp://{bed.address(1)}:0"], **options)
    prefill.call("connect", address=address)
    before = {name: sent(bed, 0, name) for name in LANES}
    load = prefill.call("load", decode="d", policy="prefill_only", hit=0, prompt=blocks, deadline_s=30)
    decode.call("incoming", load_id=load)
    prefill.call("publish", layers=len(LAYER_BYTES))
    prefill.call("finish")
    assert decode.call("handed_over", prompt=blocks), "every byte of it"
    kv = blocks * sum(LAYER_BYTES)
    assert sent(bed, 0, "low") - before["low"] >= kv
    control = sent(bed, 0, "high") - before["high"]
    assert 0 < control < kv / 10, "messages are HIGH, KV is not"


@pytest.mark.root
def test_settings_of_this_node_are_read(bed: Testbed) -> None:
    found = {one.name: one for one in local_settings(bed.address(1), prefix=bed.prefix(0))}
    assert found["interface"].found == "nic"
    assert found["tc"].found == "htb: low in 1:20 (prio 7), high in 1:10 (prio 0)"
    assert found["tc"].ok is True
    for name in ("trust", "pfc"):  # a veth pair has none
        assert found[name].ok is None
        assert found[name].found.startswith("not read: "), found[name]
    # What has no rule goes where LOW goes: no lanes any more.
    subprocess.run([*bed.prefix(0), "tc", "filter", "del", "dev", "nic"], check=True)
    found = {one.name: one for one in local_settings(bed.address(1), prefix=bed.prefix(0))}
    assert found["tc"].ok is False


def test_settings_of_a_card(tmp_path: Path) -> None:
    """As iproute2 prints them; the card is made up."""
    answers = {
        "ip": [{"dev": "ib0"}],
        "tc": [{"kind": "mq", "root": True}],
        "dcb app": {"dscp_prio": [[46, 6], [8, 1]]},
        "dcb pfc": {"prio_pfc": [False, True, False, False, False, False, True, False]},
    }
    script = tmp_path / "as-if"
    script.write_text(
        '#!/bin/sh\ncase "$1 $3" in\n'
        + f"'ip route') echo '{json.dumps(answers['ip'])}';;\n"
        + f"'tc qdisc') echo '{json.dumps(answers['tc'])}';;\n"
        + f"'dcb app') echo '{json.dumps(answers['dcb app'])}';;\n"
        + f"'dcb pfc') echo '{json.dumps(answers['dcb pfc'])}';;\n"
        + "*) echo 'no such thing' >&2; exit 3;;\nesac\n"
    )
    script.chmod(0o755)
    found = {one.name: one for one in local_settings("127.0.0.1", prefix=[str(script)])}
    assert found["tc"].ok is None
    assert (found["trust"].found, found["trust"].ok) == ("high to priority 6, low to priority 1", True)
    assert found["pfc"].found == "priorities without loss: [1, 6]"
    assert "no such thing" in found["sl2vl"].found
    script.write_text(script.read_text().replace("[8, 1]", "[8, 6]").replace("prio_pfc", "other"))
    found = {one.name: one for one in local_settings("127.0.0.1", prefix=[str(script)])}
    assert found["trust"].ok is False
    assert found["pfc"].found.startswith("not read: unexpected")
    assert found["pfc"].ok is None


@pytest.mark.root
def test_without_lanes_the_check_says_so() -> None:
    try:
        with Testbed(2, rate=RATE, lanes=False) as bed, Flow(bed.prefix(1), op="serve", host=bed.address(1)) as server:
            port = server.first_line()["port"]
            report = measure_lanes(bed.address(1), port, prefix=bed.prefix(0), seconds=0.5)
    except dualkv.Error as error:
        if error.code != "unsupported":
            raise
        pytest.skip(str(error))
    # LOW's queue holds 1000 packets: HIGH waits 30 ms behind them.
    assert not report.isolated, report.to_json()


@pytest.mark.root
def test_bench_lanes(bed: Testbed) -> None:  # the fixture skips where there can be no testbed
    ran = CliRunner().invoke(cli, ["bench", "lanes", "--quick", "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    lanes, none = told["rows"]
    assert (lanes["lanes"], none["lanes"]) == (True, False)
    assert "HTB" in told["labels"]["topology"]
    # However busy the machine: behind LOW's queue HIGH waits for milliseconds, in its own it does not.
    assert none["measures"]["p50_ratio"] > lanes["measures"]["p50_ratio"]
    assert none["measures"]["isolated"] == 0
    for row in (lanes, none):
        assert row["measures"]["high_alone"] > 0
        assert row["measures"]["low_of_rest"] > 0
    assert CliRunner().invoke(cli, ["bench", "lanes", "--rate", "1"]).exit_code == 1


@pytest.mark.root
def test_leftovers_of_a_dead_process_are_removed(bed: Testbed) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"dualkv-{ended.pid}-0-1"
    subprocess.run(["ip", "netns", "add", name], check=True)
    remove_leftovers()
    assert not (NAMESPACES / name).exists()
    assert len(list(NAMESPACES.glob("dualkv-*"))) >= 3, "those of living processes are not"


@pytest.mark.root
def test_a_nodes_reads_are_held_back_and_no_others(bed: Testbed, tmp_path: Path) -> None:
    size, rate = 8 << 20, 8_000_000
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    os.sync()
    read = ["dd", f"if={file}", "of=/dev/null", "bs=1M", "iflag=direct", "status=none"]
    try:
        with Testbed(2, rate=RATE, storage=rate, path=tmp_path) as slow:
            began = time.monotonic()
            subprocess.run([*slow.prefix(1), *read], check=True)
            held = time.monotonic() - began
            began = time.monotonic()
            subprocess.run([*bed.prefix(1), *read], check=True)
            free = time.monotonic() - began
            assert groups(f"dualkv-{os.getpid()}-*")
    except dualkv.Error as error:
        if error.code != "unsupported":
            raise
        pytest.skip(str(error))
    finally:
        assert not groups(f"dualkv-{os.getpid()}-*")
    assert held > 0.8 * size / rate
    assert free < held


@pytest.mark.root
def test_storage_that_is_no_disk(bed: Testbed) -> None:
    before = set(NAMESPACES.glob("dualkv-*"))
    with pytest.raises(dualkv.Error, match="/proc") as refused, Testbed(2, storage=1000, path="/proc"):
        pass
    assert refused.value.code == "unsupported"
    assert set(NAMESPACES.glob("dualkv-*")) == before
    assert not groups(f"dualkv-{os.getpid()}-*")


@pytest.mark.root
def test_an_all_to_all_goes_by_high(bed: Testbed) -> None:
    with AllToAll(bed, size=1000, interval_s=0.001) as traffic:
        traffic.start()
        time.sleep(1.5)
        first = traffic.stop()
        traffic.start()
        time.sleep(1.5)
        assert len(traffic.stop()) > 10
    assert len(first) > 50
    assert sent(bed, 0, "high") > 1000 * len(first) // 2
    assert sent(bed, 0, "low") < sent(bed, 0, "high") / 10, "handshakes and ARP"


@pytest.mark.root
def test_testbed_command(bed: Testbed) -> None:
    before = set(NAMESPACES.glob("dualkv-*"))
    code = "import json, os; print(len(json.loads(os.environ['DUALKV_TESTBED']))); raise SystemExit(7)"
    command = [str(Path(sys.executable).parent / "dualkv"), "testbed", "--nodes", "3"]
    ran = subprocess.run([*command, "--", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (7, "3\n"), ran.stderr
    assert set(NAMESPACES.glob("dualkv-*")) == before
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        nodes = json.loads(held.stdout.readline())
        shown = subprocess.run([*nodes[2]["prefix"], "ip", "-br", "addr"], capture_output=True, text=True, check=True)
        assert nodes[2]["address"] in shown.stdout
        held.send_signal(signal.SIGTERM)
        held.wait(30)
    assert set(NAMESPACES.glob("dualkv-*")) == before


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(dualkv.Error, match="fabric serve") as lost:
        measure_lanes("127.0.0.1", 1, seconds=0.1)
    assert lost.value.code == "io"


@pytest.mark.parametrize(
    ("options", "named"), [({"nodes": 1}, "nodes"), ({"share": 1.0}, "share"), ({"rate": 1}, "rate")]
)
def test_testbeds_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(dualkv.Error, match=named):
        Testbed(**options)
