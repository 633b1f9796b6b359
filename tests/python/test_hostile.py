"""Strangers, and peers that know the secret and misbehave, at a listening node. Whatever they send ends their own
connection and nothing else: a load that runs meanwhile arrives, a link that was up stays up.
"""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    LONG_S,
    HostCache,
    assert_all_free,
    error_of,
    eventually,
    filled,
    make_keys,
    open_fds,
    plan,
    resident_bytes,
    threads,
)
from test_docs import (
    LIMITS,
    SECRET,
    TYPES,
    PythonPeer,
    closed_by_node,
    frame,
    geometry,
    header,
    proof,
    receive_frame,
    string,
)

import dualkv

HIT = 8
RIGHT = {block: block + 1 for block in range(HIT)}


class Scene:
    """``node`` listens, ``pe`` is its honest peer, ``python`` the other kind."""

    def __init__(self, tmp_path: Path) -> None:
        self.geometry = geometry()
        options: dict[str, Any] = {
            "staging": 64 * self.geometry.file_bytes,
            "store": f"file://{tmp_path}/store",
            "secret": SECRET,
            "connections_per_lane": 1,
            "handshake_s": 0.5,
            "peer_silence_s": 10,
        }
        limit = {"read_limit": 40 * self.geometry.block_bytes}
        self.node = dualkv.Node("n", self.geometry, listen="tcp://127.0.0.1:0", store_options=limit, **options)
        self.pe = dualkv.Node("pe", self.geometry, **options)
        self.peer = self.pe.connect(self.node.addresses[0])
        self.keys = make_keys(self.geometry, HIT)
        self.pe.save(self.keys, filled(self.geometry, HIT).kv, range(HIT)).wait(LONG_S)
        self.strangers: list[PythonPeer] = []
        assert eventually(lambda: self.connected("pe"))

    def stranger(self) -> PythonPeer:
        self.strangers.append(PythonPeer(self.geometry, self.node.addresses[0], "tcp"))
        return self.strangers[-1]

    def linked(self, name: bytes = b"python") -> tuple[socket.socket, socket.socket]:
        """Control and LOW connection of a peer that knows the secret."""
        peer = self.stranger()
        peer.hello = lambda role, index=0: PythonPeer.hello(peer, role, index, name)  # type: ignore[method-assign]
        connections = peer.open()
        assert eventually(lambda: self.connected(name.decode()))
        return connections

    def connected(self, name: str) -> bool:
        return any(link["peer"] == name and link["connected"] for link in self.node.stats()["links"])

    def count(self, name: str) -> int:
        return int(self.node.stats()[name])

    def close(self) -> None:
        for stranger in self.strangers:
            stranger.close()
        self.pe.close()
        self.node.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A load from node to pe runs while the test does; in the end it has arrived and nothing is left over."""
    s = Scene(tmp_path)
    try:
        cache = HostCache(s.geometry, HIT + 1)
        load = s.pe.load(plan(dualkv.DecodeOnly(), s.keys, s.pe, s.peer), into=cache.kv, block_ids=range(HIT))
        incoming = s.node.incoming(load.id)
        yield s
        for layer in range(s.geometry.layers):
            load.wait(layer, LONG_S)
            load.publish(layer)
        result = load.finish(LONG_S)
        assert result["failovers"] == 0
        assert cache.only_right_bytes(RIGHT)
        assert all(cache.holds(block, tag) for block, tag in RIGHT.items())
        incoming.wait(LONG_S)
        target = HostCache(s.geometry, HIT)
        incoming.copy_to(target.kv, range(HIT))
        assert all(target.holds(block, tag) for block, tag in RIGHT.items())
        incoming.close()
        assert s.connected("pe")
        assert s.peer.connected
        assert s.pe.stats()["frames_hostile"] == 0
        for stranger in s.strangers:
            stranger.close()
        assert_all_free([s.node, s.pe])
    finally:
        s.close()


def closes(connection: socket.socket) -> bool:
    """The node closed it; not before it had time to."""
    connection.settimeout(LONG_S)
    return closed_by_node(connection)


# --- strangers


@pytest.mark.parametrize("seed", range(6))
def test_garbage(scene: Scene, seed: int) -> None:
    noise = random.Random(seed)
    before = scene.count("frames_hostile")
    for count in range(1, 6):
        connection = scene.stranger().connect()
        with contextlib.suppress(ConnectionError):  # closed in the middle of it
            connection.sendall(noise.randbytes(noise.choice([32, 33, 100, 70_000])))
        assert closes(connection)
        assert eventually(lambda count=count: scene.count("frames_hostile") == before + count)  # type: ignore[misc]


@pytest.mark.parametrize("size", [2**32 - 1, 2**31, 1025, 4194305])
def test_huge_lengths_allocate_nothing(scene: Scene, size: int) -> None:
    before = resident_bytes()
    for name, kind in TYPES.items():
        if size <= LIMITS[name]:
            continue
        connection = scene.stranger().connect()
        connection.sendall(header(kind, size=size))
        assert closes(connection), name
    assert resident_bytes() - before < 64 << 20
    assert scene.count("frames_hostile") > 0


@pytest.mark.parametrize("name", TYPES)
def test_a_frame_before_the_handshake(scene: Scene, name: str) -> None:
    """Also of the types that only a peer may send, and with a body that fits the header."""
    connection = scene.stranger().connect()
    connection.sendall(frame(name, bytes(16)))
    assert closes(connection)
    assert eventually(lambda: scene.count("frames_hostile") == 1)


def test_a_recorded_handshake_is_worth_nothing(scene: Scene) -> None:
    honest = scene.stranger()
    connection = honest.connect()
    hello = honest.hello(2)
    connection.sendall(frame("hello", hello))
    _, body = receive_frame(connection)
    recorded = frame("proof", proof(b"dualkv connector v1", hello, body[32:]))
    connection.sendall(recorded)
    assert receive_frame(connection)[0] == "welcome"
    before = scene.count("connections_refused")
    for wait_for_challenge in (True, False):
        replay = scene.stranger().connect()
        replay.sendall(frame("hello", hello) + (b"" if wait_for_challenge else recorded))
        challenge = receive_frame(replay)
        assert challenge[0] == "challenge"
        assert challenge[1] != body
        if wait_for_challenge:
            replay.sendall(recorded)
        assert receive_frame(replay)[0] == "refuse"
        assert closes(replay)
    assert eventually(lambda: scene.count("connections_refused") == before + 2)


def test_a_proof_sent_back_is_refused(scene: Scene) -> None:
    """The acceptor's own proof, reflected."""
    peer = scene.stranger()
    connection = peer.connect()
    connection.sendall(frame("hello", peer.hello(2)))
    _, body = receive_frame(connection)
    connection.sendall(frame("proof", body[:32]))
    assert receive_frame(connection)[0] == "refuse"
    assert not scene.connected("python")


@pytest.mark.parametrize("sent", [0, 1, 31, 40], ids=lambda sent: f"{sent} bytes")
def test_half_open_connections_end(scene: Scene, sent: int) -> None:
    fds = open_fds()
    peer = scene.stranger()
    hello = frame("hello", peer.hello(2))
    connections = [peer.connect() for _ in range(20)]
    for connection in connections:
        connection.sendall(hello[:sent])
    assert all(closes(connection) for connection in connections)
    peer.close()
    assert eventually(lambda: open_fds() <= fds)


def test_one_byte_at_a_time_buys_no_time(scene: Scene) -> None:
    peer = scene.stranger()
    connection = peer.connect()
    began = time.monotonic()

    def drip() -> None:
        for byte in frame("hello", peer.hello(2)) * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    with pytest.raises(ConnectionError):
        drip()
    assert time.monotonic() - began < LONG_S


def test_a_handshake_without_its_end(scene: Scene) -> None:
    peer = scene.stranger()
    connection = peer.connect()
    connection.sendall(frame("hello", peer.hello(2)))
    assert receive_frame(connection)[0] == "challenge"
    assert closes(connection)


def test_a_link_without_all_its_connections(scene: Scene) -> None:
    """A control connection alone is no link, and ends."""
    connection, kind, _ = scene.stranger().shake(2)
    assert kind == "welcome"
    assert not scene.connected("python")
    assert closes(connection)
    assert error_of(lambda: scene.node.peer("python").view()) is not None


def test_three_hundred_connections_at_once(scene: Scene) -> None:
    fds, running = open_fds(), threads()
    crowd = scene.stranger()
    connections = [crowd.connect() for _ in range(300)]
    assert open_fds() <= fds + 300 + 256 + 8
    assert threads() == running
    assert all(closes(connection) for connection in connections)
    crowd.close()
    assert eventually(lambda: open_fds() <= fds)
    scene.linked()


def test_thousands_of_hostile_connections_leak_nothing(scene: Scene) -> None:
    def attack(count: int) -> None:
        for i in range(count):
            peer = scene.stranger()
            connection = peer.connect()
            connection.sendall(frame("hello", peer.hello(2)) if i % 2 else header(TYPES["message"], size=2**32 - 1))
            if i % 2 == 0:
                assert closes(connection)
            peer.close()
            scene.strangers.pop()

    attack(100)
    gc.collect()
    fds, memory = open_fds(), resident_bytes()
    attack(1000)
    gc.collect()
    assert eventually(lambda: open_fds() <= fds)
    assert resident_bytes() - memory < 32 << 20


# --- peers that know the secret


def message(kind: int, *parts: bytes) -> bytes:
    return frame("message", bytes([kind]) + b"".join(parts))


def view(name: bytes = b"python", tail: bytes = b"", number: int = 1) -> bytes:
    numbers = struct.pack(
        "<QIQQQQQIIQ", *(min(number, 2**bits - 1) for bits in (64, 32, 64, 64, 64, 64, 64, 32, 32, 64))
    )
    return message(0, string(name), numbers, tail)


def open_load(load: int, *, decode: int = 0, left_us: int = 10**6, blocks: int = 1, per_read: int = 1) -> bytes:
    return message(1, struct.pack("<QBQIIIQ", load, decode, left_us, blocks, per_read, 1, 7))


def write(layer: int = 0, count: int = 1, extents: int = 0, zero: int = 0, entries: bytes = bytes(16)) -> bytes:
    return frame("write", struct.pack("<QQIIII", 1, 2, layer, count, extents, zero) + entries)


ON_CONTROL: dict[str, Callable[[], bytes]] = {
    "empty": lambda: frame("message"),
    "unknown message": lambda: message(7),
    "view cut short": lambda: frame("message", view()[32:-1]),
    "view too long": lambda: view(tail=b"\0"),
    "view with a long name": lambda: view(name=bytes(1025)),
    "view with a name beyond the message": lambda: message(0, b"\xff\xff"),
    "load cut short": lambda: frame("message", open_load(1)[32:-1]),
    "load too long": lambda: frame("message", open_load(1)[32:] + b"\0"),
    "key of no bytes": lambda: message(3, struct.pack("<QIB", 1, 0, 0)),
    "key of 33 bytes": lambda: message(3, struct.pack("<QIB", 1, 0, 33), bytes(33)),
    "key cut short": lambda: message(3, struct.pack("<QIB", 1, 0, 32), bytes(31)),
    "failed blocks cut short": lambda: message(5, struct.pack("<QiB", 1, 5, 4), string(b""), bytes(3)),
    "close with a long why": lambda: message(6, struct.pack("<QB", 1, 1), string(bytes(1025))),
    "wrong body checksum": lambda: view()[:-1] + b"\xff",
    "handshake again": lambda: frame("hello", bytes(100)),
    "proof again": lambda: frame("proof", bytes(32)),
    "write on the control connection": lambda: write() + bytes(100),
    "reference on tcp": lambda: frame("write_ref", bytes(32)),
    "noise": lambda: random.Random(1).randbytes(100),
}
ON_LANE: dict[str, Callable[[], bytes]] = {
    "message on a lane": view,
    "layer out of range": lambda: write(layer=3),
    "no entries": lambda: write(count=0, entries=b""),
    "too many entries": lambda: write(count=1025, entries=bytes(16 * 1025)),
    "fewer entries than said": lambda: write(count=2),
    "more entries than said": lambda: write(count=1, entries=bytes(32)),
    "extents on tcp": lambda: write(extents=1, entries=bytes(32)),
    "not zero": lambda: write(zero=1),
    "write_done cut short": lambda: frame("write_done", bytes(15)),
    "write_done of an unknown code": lambda: frame("write_done", struct.pack("<QQ", 1, 11)),
}


@pytest.mark.parametrize("what", [*ON_CONTROL, *ON_LANE])
def test_a_malformed_frame_of_a_peer_ends_its_link_only(scene: Scene, what: str) -> None:
    control, low = scene.linked()
    if what in ON_CONTROL:
        control.sendall(ON_CONTROL[what]())
    else:
        low.sendall(ON_LANE[what]())
    assert closes(control)
    assert closes(low)
    assert eventually(lambda: scene.count("frames_hostile") == 1)
    assert not scene.connected("python")
    assert error_of(lambda: scene.node.peer("python").view()) is not None
    scene.linked()  # and is welcome again


def test_well_formed_messages_about_nothing_are_ignored(scene: Scene) -> None:
    control, low = scene.linked()
    for body in (
        message(2, struct.pack("<QQB", 5, 6, 0), string(b"")),
        message(3, struct.pack("<Q", 5)),
        message(3, struct.pack("<QIB", 5, 2**32 - 1, 1), b"k"),
        message(4, struct.pack("<QI", 5, 2**32 - 1)),
        message(5, struct.pack("<QiB", 5, -1, 200), string(b"why"), struct.pack("<I", 2**32 - 1)),
        message(6, struct.pack("<QB", 5, 200), string(b"why")),
    ):
        control.sendall(body)
    low.sendall(frame("write_done", struct.pack("<QQ", 2**64 - 1, 0)))
    # Also about the load of somebody else: ids are no rights.
    served = scene.pe.stats()["loads_active"]
    assert served == 1
    assert scene.connected("python")
    assert scene.count("frames_hostile") == 0


def test_a_view_of_absurd_numbers_breaks_no_policy(scene: Scene) -> None:
    control, _ = scene.linked()
    for number in (0, 1, 2**64 - 1):
        control.sendall(view(number=number))
        time.sleep(0.05)
        seen = scene.node.peer("python").view()
        assert seen.name == "python"
        for policy in (dualkv.Split(), dualkv.ShortestQueue(), dualkv.RoundRobin(), dualkv.DecodeOnly()):
            made = policy.plan(scene.keys, prefill=scene.node.view(), decode=seen, helpers=[seen])
            assert sum(part.count for part in made.ranges) == HIT


def test_absurd_loads_are_answered_and_reserve_nothing(scene: Scene) -> None:
    control, _ = scene.linked()
    free = scene.node.stats()["staging"]["free_slots"]
    for i, body in enumerate(
        [
            open_load(100, per_read=0),
            open_load(101, per_read=4),
            open_load(102, left_us=2**64 - 1),
            open_load(103, decode=1, blocks=2**32 - 1),
            open_load(104, decode=1, blocks=1000),
        ]
    ):
        control.sendall(body)
        kind, answer = receive_frame(control)
        while answer[0] == 0:  # views
            kind, answer = receive_frame(control)
        assert (kind, answer[0]) == ("message", 6)
        assert struct.unpack_from("<Q", answer, 1)[0] == 100 + i
    assert scene.connected("python")
    assert scene.node.stats()["staging"]["free_slots"] <= free + HIT
    assert scene.count("loads_served") <= 1


def test_prompts_of_a_peer_that_leaves_are_freed(scene: Scene) -> None:
    """It reserves what it can and dies; the honest load's staging is the fixture's to check."""
    control, low = scene.linked()
    for load in range(20):
        control.sendall(open_load(200 + load, decode=1, blocks=10, left_us=60 * 10**6))
    assert eventually(lambda: scene.node.stats()["staging"]["waiting"] > 0)
    control.close()
    low.close()
    assert eventually(lambda: not scene.connected("python"))
    assert eventually(lambda: scene.count("loads_served") <= 1)
    assert eventually(lambda: scene.node.stats()["staging"]["waiting"] == 0)


def test_a_peer_that_reads_nothing_is_lost(scene: Scene) -> None:
    """Each of its messages asks for an answer; the answers are not kept for ever."""
    control, _ = scene.linked()
    memory = resident_bytes()
    control.settimeout(LONG_S)
    batch = open_load(5, per_read=0) * 4096

    def flood() -> None:
        for _ in range(1000):
            control.sendall(batch)

    with pytest.raises(ConnectionError):
        flood()
    assert eventually(lambda: not scene.connected("python"))
    assert resident_bytes() - memory < 128 << 20


def test_a_peer_of_the_same_name_takes_nothing_with_it(scene: Scene) -> None:
    """A name is not proven. Who leaves under somebody's name must not end what that somebody was granted."""
    target = HostCache(scene.geometry, 2)
    grant = scene.node.grant("pe", target.kv, [0, 1])
    control, _ = scene.linked(b"pe")
    control.sendall(message(7))
    assert closes(control)
    assert eventually(lambda: scene.count("frames_hostile") == 1)
    to_node = scene.pe.peer("n")
    to_node.send_layers(grant.id, filled(scene.geometry, 2).kv, [0, 1]).wait(LONG_S)
    grant.wait(scene.geometry.layers - 1, LONG_S)
    assert target.holds(0, 1)
    assert target.holds(1, 2)
