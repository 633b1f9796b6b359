"""RDMA between nodes on real devices: the marks on the wire, and the demo. `make rdma` runs these in a VM."""

from __future__ import annotations

import collections
import json
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import MakeNode
from marks import needs_rdma
from support import LAYER_BYTES, LONG_S, RDMA_DEVICES, HostCache, eventually, filled

import dualkv
from dualkv.cli.main import cli

pytestmark = needs_rdma
WIRE = "d0"  # the interface under the first device
ROCE_PORT = 4791
WRITES = range(6, 12)  # opcodes of a reliable connection's RDMA writes (InfiniBand architecture, 9.2)
WITH_ADDRESS = (6, 10, 11)  # the first packet of each names the memory
WITH_IMMEDIATE = (9, 11)


def rdma_node(make_node: MakeNode, name: str, device: str, **options: Any) -> dualkv.Node:
    return make_node(name, listen="rdma://127.0.0.1:0", rdma_options={"devices": device}, **options)


def link_stats(node: dualkv.Node) -> dict[str, Any]:
    links = [link for link in node.stats()["links"] if link["connected"]]
    return dict(links[0]["rdma"]) if links else {}


def all_up(node: dualkv.Node) -> bool:
    stats = link_stats(node)
    return bool(stats) and stats["queue_pairs_up"] == stats["queue_pairs"] > 0


def send(pe: dualkv.Node, de: dualkv.Node, source: HostCache, blocks: int, lane: str) -> None:
    target = HostCache(de.geometry, blocks + 1)
    grant = de.grant("pe", into=target.kv, block_ids=range(blocks), deadline_s=LONG_S)
    pe.peer("de").send_layers(grant.id, source.kv, range(blocks), lane=lane, deadline_s=LONG_S).wait(LONG_S)
    grant.wait(de.geometry.layers - 1, LONG_S)
    assert all(target.holds(block, block + 1) for block in range(blocks))
    assert target.untouched(blocks)


class Capture:
    """RoCE v2 packets of a network interface: KV bytes and messages with immediate data by traffic class."""

    def __init__(self, interface: str) -> None:
        self.bytes: collections.Counter[int] = collections.Counter()
        self.announced: collections.Counter[int] = collections.Counter()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.2)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                packet, address = self._socket.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] == socket.PACKET_OUTGOING:
                self._take(packet)

    def _take(self, packet: bytes) -> None:
        if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_UDP:
            return
        udp = 14 + (packet[14] & 15) * 4
        if struct.unpack_from(">H", packet, udp + 2)[0] != ROCE_PORT:
            return
        opcode = packet[udp + 8]
        if opcode not in WRITES:
            return
        padding = packet[udp + 9] >> 4 & 3
        headers = 8 + 12 + 16 * (opcode in WITH_ADDRESS) + 4 * (opcode in WITH_IMMEDIATE)
        payload = struct.unpack_from(">H", packet, udp + 4)[0] - headers - 4 - padding
        traffic_class = packet[15]
        self.bytes[traffic_class] += payload
        self.announced[traffic_class] += opcode in WITH_IMMEDIATE


@pytest.mark.root
def test_each_lane_carries_its_mark_on_the_wire(make_node: MakeNode) -> None:
    if not Path(f"/sys/class/net/{WIRE}").exists() or len(RDMA_DEVICES) < 2:
        pytest.skip(f"no interface {WIRE} between two devices")
    pe = rdma_node(make_node, "pe", RDMA_DEVICES[0])
    de = rdma_node(make_node, "de", RDMA_DEVICES[1])
    pe.connect(de.addresses[0])
    assert eventually(lambda: all_up(pe) and all_up(de)), link_stats(pe)["last_failure"]
    blocks, low, high = 8, 8 << 2, 46 << 2
    source = filled(pe.geometry, blocks)
    size = blocks * sum(LAYER_BYTES)
    with Capture(WIRE) as capture:
        send(pe, de, source, blocks, "low")
        assert eventually(lambda: capture.bytes[low] >= size)
    assert dict(capture.bytes) == {low: size}
    assert capture.announced[low] == link_stats(pe)["batches"]
    with Capture(WIRE) as capture:
        send(pe, de, source, blocks, "high")
        assert eventually(lambda: capture.bytes[high] >= size)
    assert dict(capture.bytes) == {high: size}
    stats = link_stats(pe)
    assert (stats["traffic_class_low"], stats["traffic_class_high"]) == (low, high)
    assert (stats["bytes_written_low"], stats["bytes_written_high"]) == (size, size)
    assert stats["inline_batches"] == 0


def test_two_rails_share_the_work(make_node: MakeNode) -> None:
    if len(RDMA_DEVICES) < 2:
        pytest.skip("one device only")
    options = {"rdma_options": {"devices": RDMA_DEVICES}, "write_frame": 4096, "listen": "rdma://127.0.0.1:0"}
    pe, de = make_node("pe", **options), make_node("de", **options)
    pe.connect(de.addresses[0])
    assert eventually(lambda: all_up(pe) and all_up(de)), link_stats(pe)["last_failure"]
    counters = [Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts") for device in RDMA_DEVICES]
    before = [int(counter.read_text()) for counter in counters]
    blocks = 8
    send(pe, de, filled(pe.geometry, blocks), blocks, "low")
    sent = [int(counter.read_text()) - first for counter, first in zip(counters, before, strict=True)]
    assert all(count > 0 for count in sent), sent
    assert link_stats(pe)["rails"] == [f"{device}:1" for device in RDMA_DEVICES] * 2


def test_an_unknown_device_is_an_error_that_leaves_nothing(make_node: MakeNode) -> None:
    with pytest.raises(dualkv.Error, match="no device 'mlx5_9'") as caught:
        rdma_node(make_node, "pe", "mlx5_9")
    assert caught.value.code == "unsupported"


@pytest.mark.torch
@pytest.mark.parametrize("model", ["gqa", "mla"])
def test_the_demo_is_exact_over_rdma(tmp_path: Path, model: str) -> None:
    small = ["--agents", "1", "--turns", "2", "--scale", "512", "--snic-limit", "400MB/s", "--staging", "256MiB"]
    command = ["demo", *small, "--work-dir", str(tmp_path), "--json", "--transport", "rdma", "--model", model]
    result = CliRunner().invoke(cli, [*command, "--modes", "split"])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    out = json.loads(result.stdout)
    assert out["labels"]["transport"] == "rdma"
    for run in out["runs"]:
        assert run["exact"]["ok"] == run["exact"]["total"] > 0, run
        assert run["failures"] == []
        # What prefill got from the other side, and what it published to it; the first frames go before queue pairs
        # are up.
        assert run["bytes"]["by_rdma"] > 0.8 * (run["bytes"]["de_path"] + run["bytes"]["published"])
        assert run["bytes"]["de_path"] > 0 < run["bytes"]["pe_path"]
