"""The data plane through the public API: groups of layers, shared memory, checksums sent along, lanes, timelines."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import itertools
import json
import os
import random
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeNode
from marks import RDMA
from support import (
    LAYER_BYTES,
    LONG_S,
    HostCache,
    all_free,
    error_of,
    eventually,
    filled,
    layer_block,
    listen_at,
    make_geometry,
    make_keys,
    open_fds,
    plan,
    threads,
)
from test_docs import CODES, SECRET, PythonPeer, closed_by_node, frame, geometry, receive, receive_frame
from test_failures import Child

import dualkv

HIT = 8
PROMPT = HIT + 2
TAGS = {block: block + 1 for block in range(PROMPT)}
POLICIES = {"prefill": dualkv.PrefillOnly, "decode": dualkv.DecodeOnly, "split": dualkv.Split}
LAYERS = len(LAYER_BYTES)


# --- reads by groups of layers


class Pair:
    """A prefill node and a decode node over one root; HIT blocks are stored."""

    def __init__(self, make_node: MakeNode, scheme: str, tmp_path: Path, **options: Any) -> None:
        self.de = make_node("de", listen=listen_at(scheme, tmp_path, "de"), **options)
        self.pe = make_node("pe", **options)
        self.peer = self.pe.connect(self.de.addresses[0])
        self.geometry = self.pe.geometry
        self.keys = make_keys(self.geometry, PROMPT)[:HIT]
        self.pe.save(self.keys, filled(self.geometry, HIT).kv, range(HIT)).wait(LONG_S)

    def run(self, policy: str, **options: Any) -> dict[str, Any]:
        """A whole load with hand-over; every byte of both sides is checked."""
        cache, target = HostCache(self.geometry, PROMPT + 1), HostCache(self.geometry, PROMPT + 1)
        for block in range(HIT, PROMPT):
            cache.fill(block, TAGS[block])
        chosen = plan(POLICIES[policy](), self.keys, self.pe, self.peer)
        load = self.pe.load(chosen, into=cache.kv, block_ids=range(PROMPT), deadline_s=LONG_S, **options)
        incoming = self.de.incoming(load.id)
        for layer in range(self.geometry.layers):
            load.wait(layer, LONG_S)
            assert all(cache.layer_is(layer, block, TAGS[block]) for block in range(HIT))
            load.publish(layer)
            load.release(layer)
        result = load.finish(LONG_S)
        incoming.wait(LONG_S)
        incoming.copy_to(target.kv, range(PROMPT))
        assert all(target.holds(block, tag) for block, tag in TAGS.items())
        assert target.untouched(PROMPT)
        assert cache.untouched(PROMPT)
        incoming.close()
        return result


def check_reads(result: dict[str, Any], block_bytes: Callable[[int, int], int]) -> None:
    """Each side that read has read every layer once, group by group. Other nodes' reports may come too late."""
    for path in result["paths"]:
        if path["blocks"] == 0 or (path["path"] != "pe_path" and not path["reads"]):
            assert path["reads"] == []
            continue
        at = 0
        for read in path["reads"]:
            assert read["first_layer"] == at
            assert read["bytes"] == path["blocks"] * block_bytes(at, read["layers"])
            assert 0 <= read["begin_s"] <= read["end_s"]
            assert 0 <= read["verify_s"] <= read["end_s"] - read["begin_s"]
            at += read["layers"]
        assert at == LAYERS


@pytest.mark.parametrize("scheme", ["loopback", "tcp", "shm", RDMA])
def test_every_number_of_layers_per_read_gives_the_same_bytes(make_node: MakeNode, tmp_path: Path, scheme: str) -> None:
    pair = Pair(make_node, scheme, tmp_path)
    for layers_per_read in range(LAYERS + 1):
        for policy in POLICIES:
            result = pair.run(policy, layers_per_read=layers_per_read)
            check_reads(result, lambda first, count: sum(LAYER_BYTES[first : first + count]))
            reads = result["paths"][0]["reads"]
            sizes = [read["layers"] for read in reads]
            assert not reads or max(sizes) == (layers_per_read or LAYERS)
        pair.run("split", layers_per_read=layers_per_read, window_layers=1 + layers_per_read % LAYERS)


def test_layers_per_read_beyond_the_model_is_an_error(make_node: MakeNode, tmp_path: Path) -> None:
    pair = Pair(make_node, "tcp", tmp_path)
    cache = HostCache(pair.geometry, PROMPT)
    chosen = plan(dualkv.PrefillOnly(), pair.keys, pair.pe)
    error = error_of(lambda: pair.pe.load(chosen, into=cache.kv, block_ids=range(PROMPT), layers_per_read=LAYERS + 1))
    assert error is not None
    assert error.code == "invalid_argument"
    assert "layers_per_read" in error.message
    assert all(cache.untouched(block) for block in range(PROMPT))


# --- shared memory


def open_fds_of(name: str) -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += name in os.readlink(f"/proc/self/fd/{fd}")
    return count


def test_a_socket_may_lie_deeper_than_the_kernel_has_room_for(
    make_node: MakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:  # of a process that was killed
        dead.bind("de.sock")
    pair = Pair(make_node, "shm", deep)
    assert pair.de.addresses == [f"shm://{deep}/de.sock"]
    check_reads(pair.run("split"), lambda first, count: sum(LAYER_BYTES[first : first + count]))
    assert open_fds_of(str(deep)) == 0
    pair.pe.close()
    pair.de.close()
    assert list(deep.iterdir()) == []
    error = error_of(lambda: make_node("n", listen=f"shm://{deep}/{'n' * 81}"))
    assert error is not None
    assert error.code == "invalid_argument"
    assert "at most 80" in error.message
    error = error_of(lambda: make_node("n", listen=f"shm://{deep}/missing/n.sock"))
    assert error is not None
    assert error.code == "io"
    assert list(deep.iterdir()) == []


def mappings(name: str = "memfd:dualkv") -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(name)


def shared_fds() -> int:
    return open_fds_of("memfd:dualkv")


@pytest.fixture
def sharing(make_node: MakeNode, tmp_path: Path) -> tuple[dualkv.Node, dualkv.Node]:
    """A node that sends and one that receives, both with shared staging."""
    pe = make_node("pe", listen=f"shm://{tmp_path}/pe.sock")
    de = make_node("de", listen=f"shm://{tmp_path}/de.sock")
    pe.connect(de.addresses[0])
    assert eventually(lambda: bool(de.stats()["links"]))
    return pe, de


def test_allocated_memory_is_zeroed_writable_and_freed_with_the_last_array(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node("n", listen=f"shm://{tmp_path}/n.sock")
    gc.collect()
    before = (shared_fds(), mappings(), open_fds())
    for size in (1, 4095, 4096, 12345, "3MiB", 2**21 + 1):
        array = node.allocate(size)
        assert array.dtype == np.uint8
        assert array.nbytes == (size if isinstance(size, int) else 3 << 20)
        assert array.flags.writeable
        assert not array.any()
        array[:] = 7
        assert (shared_fds(), mappings()) == (before[0] + 1, before[1] + 1)
        view = array[1:].reshape(-1) if array.nbytes > 1 else array.view()
        del array
        gc.collect()
        assert shared_fds() == before[0] + 1, "a view keeps it"
        assert bool((view == 7).all())
        del view
        gc.collect()
        assert (shared_fds(), mappings(), open_fds()) == before
    error = error_of(lambda: node.allocate(0))
    assert error is not None
    assert error.code == "invalid_argument"


def test_allocated_memory_outlives_its_node(make_node: MakeNode, tmp_path: Path) -> None:
    before = shared_fds()
    node = make_node("n", listen=f"shm://{tmp_path}/n.sock")
    array = node.allocate("1MiB")
    array[:] = 3
    node.close()
    assert bool((array == 3).all())
    del array
    error = error_of(lambda: node.allocate("1MiB"))
    assert error is not None
    assert error.code == "cancelled"
    gc.collect()
    assert shared_fds() == before + 1, "the node's staging is all that is left"


@pytest.mark.parametrize("listens", [True, False])
def test_as_many_allocations_as_there_are_shared_regions(make_node: MakeNode, tmp_path: Path, listens: bool) -> None:
    node = make_node("n", listen=f"shm://{tmp_path}/n.sock" if listens else ())
    gc.collect()
    before = (shared_fds(), mappings(), open_fds())
    room = 63 if listens else 64  # of 64 shared regions; a node that listens shares its staging
    arrays = [node.allocate(4096) for _ in range(room)]
    for _ in range(3):
        error = error_of(lambda: node.allocate(4096))
        assert error is not None
        assert error.code == "no_space"
    gc.collect()
    assert (shared_fds(), mappings()) == (before[0] + room, before[1] + room)
    arrays[7] = node.allocate(4096) if arrays.pop() is not None else None
    del arrays[7]
    gc.collect()
    arrays.append(node.allocate(4096))
    arrays.clear()
    gc.collect()
    assert (shared_fds(), mappings(), open_fds()) == before


def test_too_much_is_no_space_and_leaks_nothing(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node("n", listen=f"shm://{tmp_path}/n.sock")
    gc.collect()
    before = (shared_fds(), mappings(), open_fds())
    for size in (2**50, 10**17):
        error = error_of(lambda size=size: node.allocate(size))  # type: ignore[misc]
        assert error is not None
        assert error.code == "no_space"
    assert (shared_fds(), mappings(), open_fds()) == before


def test_a_node_that_listens_on_shm_shares_its_staging(make_node: MakeNode, tmp_path: Path) -> None:
    gc.collect()
    before = shared_fds()
    make_node("private", listen="tcp://127.0.0.1:0")
    assert shared_fds() == before
    make_node("shared", listen=["tcp://127.0.0.1:0", f"shm://{tmp_path}/n.sock"])
    assert shared_fds() == before + 1
    make_node("wanted", staging_options={"shared": True})
    assert shared_fds() == before + 2


class Sent:
    """A cache in memory of ``pe``, sent to a cache of ``de``."""

    def __init__(self, pe: dualkv.Node, de: dualkv.Node, planes: int, target_planes: int, blocks: int = 6) -> None:
        self.pe, self.de, self.blocks = pe, de, blocks
        self.geometry = pe.geometry
        self.memory = pe.allocate(self.geometry.block_bytes * blocks + 64)
        self.source, self.arrays = self.cache(planes, self.memory)
        plain = np.zeros(self.geometry.block_bytes * blocks + 64, np.uint8)
        self.target, self.target_arrays = self.cache(target_planes, plain)

    def cache(self, planes: int, memory: np.ndarray[Any, Any]) -> tuple[dualkv.PagedKv, list[list[Any]]]:
        """Planes cut out of the memory, one behind the other, at odd addresses."""
        at, layers = 1, []
        for layer in range(self.geometry.layers):
            size, parts = self.geometry.layer_bytes(layer), []
            cuts = [size * i // planes for i in range(planes + 1)]
            for first, last in itertools.pairwise(cuts):
                count = (last - first) * self.blocks
                parts.append(memory[at : at + count].reshape(self.blocks, last - first))
                at += count
            layers.append(parts)
        return dualkv.PagedKv(self.geometry, layers), layers

    def fill(self, tag: int) -> None:
        for block in range(self.blocks):
            for layer, parts in enumerate(self.arrays):
                data, at = layer_block(tag + block, layer, self.geometry.layer_bytes(layer)), 0
                for part in parts:
                    part[block] = data[at : at + part.shape[1]]
                    at += part.shape[1]

    def arrived(self, tag: int) -> bool:
        return all(
            bool(
                (
                    np.concatenate([part[block] for part in parts])
                    == layer_block(tag + block, layer, self.geometry.layer_bytes(layer))
                ).all()
            )
            for layer, parts in enumerate(self.target_arrays)
            for block in range(self.blocks)
        )

    def send(self, **options: Any) -> tuple[dualkv.Operation, dualkv.Grant]:
        grant = self.de.grant(self.pe.name, self.target, range(self.blocks))
        peer = self.pe.peer(self.de.name)
        return peer.send_layers(grant.id, self.source, range(self.blocks), **options), grant


@pytest.mark.parametrize("target_planes", [1, 2, 4])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_sends_from_allocated_memory(sharing: tuple[dualkv.Node, dualkv.Node], planes: int, target_planes: int) -> None:
    pe, de = sharing
    sent = Sent(pe, de, planes, target_planes)
    for tag in (10, 100):
        sent.fill(tag)
        operation, grant = sent.send(lane="high" if tag == 100 else "low")
        operation.wait(LONG_S)
        grant.wait(LAYERS - 1, LONG_S)
        assert sent.arrived(tag)
    assert "shm_not_mapped" not in de.stats()["fallbacks"]


def test_memory_at_the_address_of_freed_memory_is_not_the_freed_memory(
    sharing: tuple[dualkv.Node, dualkv.Node],
) -> None:
    """Freed right after the operation ended, and what comes next lies at the same address."""
    pe, de = sharing
    addresses = []
    for round_ in range(40):
        sent = Sent(pe, de, 1 + round_ % 2, 1)
        addresses.append(sent.memory.ctypes.data)
        sent.fill(10 * round_)
        operation, grant = sent.send()
        operation.wait(LONG_S)
        assert sent.arrived(10 * round_), round_
        grant.revoke()
        del sent, operation, grant
        gc.collect()
    assert len(set(addresses)) < len(addresses), "no address came back: the test shows nothing"
    assert eventually(lambda: shared_fds() == 2)
    assert eventually(lambda: mappings() == 2 + 2), "both nodes' staging, here and as the other maps it"


def test_memory_that_comes_and_goes_during_sends(sharing: tuple[dualkv.Node, dualkv.Node]) -> None:
    """Regions are announced on one connection and used on another: in which order they come must not matter."""
    pe, de = sharing
    kept = [Sent(pe, de, 1, 1, blocks=40) for _ in range(3)]
    for round_ in range(20):
        running, passing = [], []  # what is gone before the peer has heard of it can't be mapped, and need not be
        for i, sent in enumerate(kept):
            sent.fill(1000 * round_ + 100 * i)
            running.append(sent.send())
            passing.append(pe.allocate(1 + 5000 * i))
            passing[-1][:] = 1
        for i, (sent, (operation, _)) in enumerate(zip(kept, running, strict=True)):
            operation.wait(LONG_S)
            assert sent.arrived(1000 * round_ + 100 * i)
    assert pe.stats()["frames_hostile"] == de.stats()["frames_hostile"] == 0
    assert "shm_not_mapped" not in de.stats()["fallbacks"], "all that was announced could be mapped"


def arrived(grant: dualkv.Grant, layer: int) -> bool:
    return error_of(lambda: grant.wait(layer, 0)) is None


def test_withdrawn_sends_write_nothing_wrong(sharing: tuple[dualkv.Node, dualkv.Node]) -> None:
    """The memory is written to as soon as the operation is dropped: ready layers are right all the same."""
    pe, de = sharing
    sent = Sent(pe, de, 2, 1, blocks=60)
    for round_ in range(30):
        sent.fill(100)
        for parts in sent.target_arrays:
            for part in parts:
                part[:] = 0
        operation, grant = sent.send()
        time.sleep(0.0002 * (round_ % 5))
        del operation
        sent.memory[:] = 0xEE
        for layer, parts in enumerate(sent.target_arrays):
            if arrived(grant, layer):
                for block in range(sent.blocks):
                    expected = layer_block(100 + block, layer, LAYER_BYTES[layer])
                    assert bool((np.concatenate([part[block] for part in parts]) == expected).all())
        grant.revoke()


class KilledSender:
    """A child that sends from allocated memory until it is killed."""

    def __init__(self, tmp_path: Path, node: dualkv.Node) -> None:
        self.child = Child()
        options = {"store": f"file://{tmp_path}/store", "listen": f"shm://{tmp_path}/child.sock"}
        self.child.call("open", name="child", **options)
        self.child.call("connect", address=node.addresses[0])


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 8])
def test_a_sender_killed_in_the_middle(make_node: MakeNode, tmp_path: Path, delay_ms: int) -> None:
    blocks = 400
    node = make_node("de", listen=f"shm://{tmp_path}/de.sock", peer_silence_s=2)
    gc.collect()
    before = mappings()
    sender = KilledSender(tmp_path, node)
    try:
        target = HostCache(node.geometry, blocks)
        rounds = 40
        grants = [node.grant("child", target.kv, range(blocks)) for _ in range(rounds)]
        sender.child.call("send_allocated", peer="de", grants=[grant.id for grant in grants], blocks=blocks)
        time.sleep(delay_ms / 1e3)
        sender.child.signal(signal.SIGKILL)
        assert eventually(lambda: not node.peer("child").connected)
        ended = [error_of(lambda grant=grant: grant.wait(LAYERS - 1, LONG_S)) for grant in grants]  # type: ignore[misc]
        assert {error.code for error in ended if error is not None} <= {"peer_lost"}
        for layer in range(LAYERS):
            if not any(arrived(grant, layer) for grant in grants):
                continue
            for block in range(blocks):  # every grant had the same bytes
                assert target.layer_is(layer, block, block + 1)
    finally:
        sender.child.end()
    assert eventually(lambda: mappings() == before)


# --- regions of a peer that misbehaves


class Shared:
    """A listening node, and a peer written from the page."""

    def __init__(self, tmp_path: Path, scheme: str = "shm") -> None:
        self.geometry = geometry()
        listen = f"shm://{tmp_path}/n.sock" if scheme == "shm" else "tcp://127.0.0.1:0"
        self.node = dualkv.Node(
            "n",
            self.geometry,
            store=f"file://{tmp_path}/store",
            staging="1MiB",
            listen=listen,
            secret=SECRET,
            connections_per_lane=1,
            peer_silence_s=30,
            write_frame="16KiB",
            write_window="16KiB",
        )
        self.peer = PythonPeer(self.geometry, self.node.addresses[0], scheme)
        self.control, self.low = self.peer.open()
        self.high = self.peer.connections[-1]
        assert eventually(lambda: any(link["connected"] for link in self.node.stats()["links"]))
        self.fds: list[int] = []
        self.target = np.zeros((4, 333), np.uint8)
        others = [np.zeros((4, self.geometry.layer_bytes(layer)), np.uint8) for layer in (0, 2)]
        self.target_kv = dualkv.PagedKv(self.geometry, [others[0], self.target, others[1]])

    def memory(self, size: int = 8192, seals: int = fcntl.F_SEAL_SHRINK) -> int:
        """The fd of a memfd filled with bytes that depend on where they are."""
        fd = os.memfd_create("tester", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        self.fds.append(fd)
        os.write(fd, self.content(size))
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    @staticmethod
    def content(size: int = 8192) -> bytes:
        return np.random.default_rng(9).integers(0, 256, size, dtype=np.uint8).tobytes()

    def announce(self, *regions: tuple[int, int, int, int, int]) -> None:
        self.control.sendall(frame("regions", b"".join(struct.pack("<IIQQQ", *region) for region in regions)))

    def entry(self, fd: int, *, number: int = 1, base: int = 1 << 20, size: int = 8192) -> tuple[int, ...]:
        return number, fd, base, size, os.fstat(fd).st_ino

    def write(self, extents: list[tuple[int, int]], content: bytes, *, region: int = 1) -> tuple[str, bool]:
        """Sends one block of layer 1 by reference: the answer, and whether the bytes are in place."""
        self.target[:] = 0
        grant = self.node.grant("python", self.target_kv, [2])
        body = struct.pack("<QQIIII", 41, grant.id, 1, 1, len(extents), region)
        body += struct.pack("<IIQ", 0, 0, dualkv.checksum(content))
        body += b"".join(struct.pack("<QQ", *extent) for extent in extents)
        self.low.sendall(frame("write_ref", body))
        kind, answer = receive_frame(self.low)
        assert kind == "write_done"
        code = CODES[struct.unpack("<QQ", answer)[1]]
        assert arrived(grant, 1) == (code == "ok")
        return code, self.target[2].tobytes() == content

    def write_own_memory(self, region: int = 1) -> tuple[str, bool]:
        """From this process's memory, said to be in the region."""
        content = ctypes.create_string_buffer(os.urandom(333), 333)
        return self.write([(ctypes.addressof(content), 333)], content.raw, region=region)

    def fallbacks(self) -> int:
        return int(self.node.stats()["fallbacks"].get("shm_not_mapped", 0))

    def close(self) -> None:
        self.peer.close()
        self.node.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    made = Shared(tmp_path)
    yield made
    made.close()


BASE = 1 << 20  # no address of this process: bytes from there can only come from a mapping


def test_a_write_from_a_region_is_read_from_its_mapping(shared: Shared) -> None:
    content = shared.content()
    shared.announce(shared.entry(shared.memory()))  # type: ignore[arg-type]
    assert eventually(lambda: mappings("memfd:tester") == 1)
    assert shared.write([(BASE, 333)], content[:333]) == ("ok", True)
    assert shared.write([(BASE + 8192 - 333, 333)], content[-333:]) == ("ok", True)
    pieces = [(BASE + 5000, 100), (BASE, 200), (BASE + 7, 33)]
    assert shared.write(pieces, content[5000:5100] + content[:200] + content[7:40]) == ("ok", True)
    assert shared.write([(BASE, 333), (BASE + 400, 0)], content[:333]) == ("ok", True)
    assert shared.write([(BASE + 1, 333)], content[:333])[0] == "corrupt"
    assert shared.fallbacks() == 0
    shared.announce()
    assert eventually(lambda: mappings("memfd:tester") == 0), "no longer shared, no longer mapped"
    assert shared.write([(BASE, 333)], content[:333])[0] == "corrupt"
    assert shared.write_own_memory() == ("ok", True)
    assert shared.node.stats()["frames_hostile"] == 0


@pytest.mark.parametrize(
    "extents",
    [
        [(BASE - 1, 333)],
        [(BASE - 333, 333)],
        [(0, 333)],
        [(BASE + 8192, 333)],
        [(BASE + 8192 - 332, 333)],
        [(2**64 - 1, 333)],
        [(2**64 - 333, 333)],
        [(BASE, 332), (BASE + 8192, 1)],
        [(BASE + 2**63, 333)],
        [(BASE, 100), (BASE, 100), (BASE, 100), (BASE + 8160, 33)],
    ],
    ids=str,
)
def test_extents_outside_of_their_region_are_corrupt(shared: Shared, extents: list[tuple[int, int]]) -> None:
    content = shared.content()
    shared.announce(shared.entry(shared.memory()))  # type: ignore[arg-type]
    assert eventually(lambda: mappings("memfd:tester") == 1)
    assert shared.write(extents, content[:333])[0] == "corrupt"
    assert shared.write([(BASE, 333)], content[:333]) == ("ok", True)
    link = shared.node.stats()["links"][0]
    assert (link["connected"], link["writes_corrupt"]) == (True, 1)


def fifo(shared: Shared, tmp_path: Path) -> tuple[int, ...]:
    os.mkfifo(tmp_path / "fifo")
    return shared.entry(os.open(tmp_path / "fifo", os.O_RDWR))


def regular(shared: Shared, tmp_path: Path) -> tuple[int, ...]:
    (tmp_path / "file").write_bytes(bytes(8192))
    return shared.entry(os.open(tmp_path / "file", os.O_RDWR))


def wrong_inode(shared: Shared, _: Path) -> tuple[int, ...]:
    number, fd, base, size, inode = shared.entry(shared.memory())
    return number, fd, base, size, inode + 1


UNMAPPABLE: dict[str, Callable[[Shared, Path], tuple[int, ...]]] = {
    "a FIFO": fifo,
    "a regular file": regular,
    "a file of /dev/shm": lambda s, _: s.entry(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)),
    "/dev/zero": lambda s, _: s.entry(os.open("/dev/zero", os.O_RDWR)),
    "a directory": lambda s, path: s.entry(os.open(path, os.O_RDONLY)),
    "a socket": lambda s, _: s.entry(socket.socket().detach()),
    "an eventfd": lambda s, _: s.entry(os.eventfd(0)),
    "a closed fd": lambda s, _: (1, 2**20 - 1, BASE, 8192, 5),
    "an fd beyond all": lambda s, _: (1, 2**31 - 1, BASE, 8192, 5),
    "no seals": lambda s, _: s.entry(s.memory(seals=0)),
    "only another seal": lambda s, _: s.entry(s.memory(seals=fcntl.F_SEAL_GROW)),
    "wrong inode": wrong_inode,
    "beyond the file": lambda s, _: s.entry(s.memory(), size=8193),
    "far beyond the file": lambda s, _: s.entry(s.memory(), size=2**62),
    "no bytes": lambda s, _: s.entry(s.memory(), size=0),
}


@pytest.mark.parametrize("what", UNMAPPABLE)
def test_memory_that_can_not_be_mapped_is_counted_and_read_the_slow_way(
    shared: Shared, tmp_path: Path, what: str
) -> None:
    region = UNMAPPABLE[what](shared, tmp_path)
    if what not in ("a closed fd", "an fd beyond all"):
        shared.fds.append(region[1]) if region[1] not in shared.fds else None
    fds = open_fds()
    shared.announce(region)  # type: ignore[arg-type]
    assert eventually(lambda: shared.fallbacks() == 1)
    assert shared.write_own_memory() == ("ok", True)
    assert mappings("memfd:tester") == 0
    # What can be mapped beside it is.
    shared.announce(region, shared.entry(shared.memory(), number=2))  # type: ignore[arg-type]
    assert eventually(lambda: mappings("memfd:tester") == 1)
    assert shared.write([(BASE, 333)], shared.content()[:333], region=2) == ("ok", True)
    assert shared.write_own_memory() == ("ok", True)
    assert open_fds() == fds + 1
    stats = shared.node.stats()
    assert (stats["frames_hostile"], stats["links"][0]["connected"]) == (0, True)


MALFORMED_REGIONS: dict[str, Callable[[Shared], bytes]] = {
    "half an entry": lambda s: bytes(16),
    "an entry and a byte": lambda s: struct.pack("<IIQQQ", *s.entry(s.memory())) + b"\0",
    "id 0": lambda s: struct.pack("<IIQQQ", *s.entry(s.memory(), number=0)),
    "id 0 behind a good one": lambda s: (
        struct.pack("<IIQQQ", *s.entry(s.memory())) + struct.pack("<IIQQQ", *s.entry(s.memory(), number=0))
    ),
    "65 entries": lambda s: b"".join(struct.pack("<IIQQQ", i, 1, BASE, 1, 1) for i in range(1, 66)),
    "beyond the address space": lambda s: struct.pack("<IIQQQ", *s.entry(s.memory(), base=2**64 - 4096)),
}


@pytest.mark.parametrize("what", MALFORMED_REGIONS)
def test_malformed_regions_end_the_link(shared: Shared, what: str) -> None:
    shared.control.sendall(frame("regions", MALFORMED_REGIONS[what](shared)))
    assert closed_by_node(shared.control)
    assert closed_by_node(shared.low)
    assert eventually(lambda: shared.node.stats()["frames_hostile"] == 1)
    assert eventually(lambda: mappings("memfd:tester") == 0)


def test_regions_on_a_lane_end_the_link(shared: Shared) -> None:
    shared.low.sendall(frame("regions", struct.pack("<IIQQQ", *shared.entry(shared.memory()))))
    assert closed_by_node(shared.control)
    assert eventually(lambda: shared.node.stats()["frames_hostile"] == 1)
    assert mappings("memfd:tester") == 0


@pytest.mark.parametrize("entries", [0, 1])
def test_regions_on_tcp_end_the_link(tmp_path: Path, entries: int) -> None:
    shared = Shared(tmp_path, "tcp")
    try:
        shared.control.sendall(frame("regions", struct.pack("<IIQQQ", *shared.entry(shared.memory())) * entries))
        assert closed_by_node(shared.control)
        assert eventually(lambda: shared.node.stats()["frames_hostile"] == 1)
        assert mappings("memfd:tester") == 0
    finally:
        shared.close()


def test_regions_of_a_peer_that_leaves_are_unmapped(shared: Shared) -> None:
    shared.announce(*(shared.entry(shared.memory(), number=i) for i in range(1, 65)))  # type: ignore[arg-type]
    assert eventually(lambda: mappings("memfd:tester") == 64)
    assert shared.fallbacks() == 0
    shared.peer.close()
    assert eventually(lambda: mappings("memfd:tester") == 0)


def test_a_node_tells_what_it_shares(shared: Shared) -> None:
    def regions() -> list[tuple[int, ...]]:
        kind = ""
        while kind != "regions":
            kind, body = receive_frame(shared.control)
        return list(struct.iter_unpack("<IIQQQ", body))

    def check(region: tuple[int, ...], content: bytes) -> None:
        number, fd, base, size, inode = region
        info = os.fstat(fd)
        assert (info.st_ino, stat.S_ISREG(info.st_mode)) == (inode, True)
        assert info.st_size >= size
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        assert ctypes.string_at(base, len(content)) == os.pread(fd, len(content), 0) == content
        assert number > 0

    (staging,) = regions()
    assert staging[3] >= 1 << 19
    check(staging, ctypes.string_at(staging[2], 100))
    first = shared.node.allocate(5000)
    first[:3] = [1, 2, 3]
    kept, one = regions()
    assert kept == staging
    check(one, b"\1\2\3\0")
    assert (one[2], one[3]) == (first.ctypes.data, 5000)
    second = shared.node.allocate(6000)
    _, _, two = regions()
    check(two, bytes(10))
    del first
    gc.collect()
    assert regions() == [staging, two]
    third = shared.node.allocate(7000)
    ids = [region[0] for region in regions()]
    assert ids[:2] == [staging[0], two[0]]
    assert ids[2] not in (staging[0], one[0], two[0]), "an id is never used twice"
    del second, third


# --- checksums that come along


@pytest.fixture(params=["loopback", "tcp", "shm", "shm, allocated", RDMA])
def linked(request: pytest.FixtureRequest, make_node: MakeNode, tmp_path: Path) -> tuple[dualkv.Node, dualkv.Node, Any]:
    """Sender, receiver, and a filled cache of the sender."""
    scheme = request.param.split(",")[0]
    de = make_node("de", listen=listen_at(scheme, tmp_path, "de"))
    pe = make_node("pe")
    pe.connect(de.addresses[0])
    blocks = 5
    cache = filled(pe.geometry, blocks)
    if "allocated" in request.param:
        memory = [pe.allocate(array.nbytes).reshape(array.shape) for array in cache.arrays]
        for mine, array in zip(memory, cache.arrays, strict=True):
            mine[:] = array
        cache.arrays = memory
        cache.kv = dualkv.PagedKv(pe.geometry, memory)
    assert eventually(lambda: bool(de.stats()["links"]))
    return pe, de, cache


def test_checksums_are_those_of_the_concatenated_planes(small: dualkv.KvGeometry) -> None:
    rng = np.random.default_rng(3)
    for planes in (1, 2, 3, 4):
        layers = []
        for size in LAYER_BYTES:
            cuts = [size * i // planes for i in range(planes + 1)]
            parts = [rng.integers(0, 256, (4, b - a), dtype=np.uint8) for a, b in itertools.pairwise(cuts)]
            layers.append(parts)
        cache = dualkv.PagedKv(small, layers)
        sums = cache.checksums([3, 0, 3])
        assert sums.shape == (LAYERS, 3)
        assert sums.dtype == np.uint64
        for layer, parts in enumerate(layers):
            for at, block in enumerate([3, 0, 3]):
                assert sums[layer, at] == dualkv.checksum(b"".join(part[block].tobytes() for part in parts))
        assert (cache.checksums([1], layers=(2, 2)) == cache.checksums([1])[2:4]).all()
        assert cache.checksums([], layers=(1, 1)).shape == (1, 0)


@pytest.mark.parametrize(
    ("blocks", "layers"), [([4], None), ([0], (0, LAYERS + 1)), ([0], (LAYERS, 1)), ([0], (1, 2**32 - 1))]
)
def test_checksums_of_what_is_not_there(
    small: dualkv.KvGeometry, blocks: list[int], layers: tuple[int, int] | None
) -> None:
    cache = HostCache(small, 4)
    error = error_of(lambda: cache.kv.checksums(blocks, layers=layers))
    assert error is not None
    assert error.code == "invalid_argument"


def test_right_checksums_are_accepted(linked: tuple[dualkv.Node, dualkv.Node, HostCache]) -> None:
    pe, de, cache = linked
    for layers, ids in ((None, [4, 2, 0]), ((1, 3), [1]), ((4, 1), [3, 4])):
        target = HostCache(pe.geometry, 5)
        grant = de.grant("pe", target.kv, range(len(ids)))
        sums = cache.kv.checksums(ids, layers=layers)
        first, count = layers or (0, LAYERS)
        sent = pe.peer("de").send_layers(grant.id, cache.kv, ids, layers=layers, checksums=sums)
        sent.wait(LONG_S)
        for layer in range(first, first + count):
            grant.wait(layer, LONG_S)
            assert all(target.layer_is(layer, at, block + 1) for at, block in enumerate(ids))
    # As a list, and of another integer type.
    target = HostCache(pe.geometry, 5)
    grant = de.grant("pe", target.kv, [0])
    sums = [[int(value)] for value in cache.kv.checksums([0])[:, 0]]
    pe.peer("de").send_layers(grant.id, cache.kv, [0], checksums=sums).wait(LONG_S)
    assert target.holds(0, 1)


@pytest.mark.parametrize(("bad_layer", "bad_block"), [(0, 0), (0, 2), (2, 1), (4, 2)])
def test_a_wrong_checksum_is_corrupt_and_marks_nothing_ready(
    linked: tuple[dualkv.Node, dualkv.Node, HostCache], bad_layer: int, bad_block: int
) -> None:
    pe, de, cache = linked
    target = HostCache(pe.geometry, 5)
    grant = de.grant("pe", target.kv, range(3))
    sums = cache.kv.checksums(range(3))
    sums[bad_layer, bad_block] ^= np.uint64(1)
    error = error_of(lambda: pe.peer("de").send_layers(grant.id, cache.kv, range(3), checksums=sums).wait(LONG_S))
    assert error is not None
    # Writes behind the bad one find no grant any more; whichever answer comes first.
    assert error.code in ("corrupt", "refused")
    failure = error_of(lambda: grant.wait(bad_layer, LONG_S))
    assert failure is not None
    assert failure.code == "corrupt"
    for layer in range(LAYERS):
        if arrived(grant, layer):
            assert layer < bad_layer
            assert all(target.layer_is(layer, block, block + 1) for block in range(3))
    assert eventually(lambda: sum(link["writes_corrupt"] for link in de.stats()["links"]) == 1)
    # The same bytes with their right checksums, through a new grant.
    again = de.grant("pe", target.kv, range(3))
    pe.peer("de").send_layers(again.id, cache.kv, range(3), checksums=cache.kv.checksums(range(3))).wait(LONG_S)
    assert all(target.holds(block, block + 1) for block in range(3))


@pytest.mark.parametrize("shape", [(LAYERS, 2), (LAYERS - 1, 3), (3, LAYERS), (LAYERS * 3,), (0,), (LAYERS, 3, 1)])
def test_checksums_of_the_wrong_shape_are_refused(
    linked: tuple[dualkv.Node, dualkv.Node, HostCache], shape: tuple[int, ...]
) -> None:
    pe, de, cache = linked
    target = HostCache(pe.geometry, 5)
    grant = de.grant("pe", target.kv, range(3))
    sums = np.zeros(shape, np.uint64)
    error = error_of(lambda: pe.peer("de").send_layers(grant.id, cache.kv, range(3), checksums=sums))
    assert error is not None
    assert error.code == "invalid_argument"
    assert sum(link["bytes_sent_low"] for link in pe.stats()["links"]) == 0
    assert all(target.untouched(block) for block in range(3))


# --- lanes


@pytest.mark.parametrize("scheme", ["tcp", "shm"])
def test_high_does_not_wait_behind_a_low_lane_that_is_full(tmp_path: Path, scheme: str) -> None:
    """The receiver takes nothing from LOW and answers nothing there: HIGH goes on, one send after the other."""
    shared = Shared(tmp_path, scheme)
    try:
        cache = filled(shared.geometry, 64)
        peer = shared.node.peer("python")
        low = [peer.send_layers(7, cache.kv, range(64), lane="low") for _ in range(20)]
        assert eventually(lambda: int(shared.node.stats()["links"][0]["bytes_sent_low"]) > 0)
        for round_ in range(10):
            high = peer.send_layers(8, cache.kv, [round_], lane="high")
            for layer in range(shared.geometry.layers):
                kind, body = receive_frame(shared.high)
                assert kind == ("write" if scheme == "tcp" else "write_ref")
                number, grant, got_layer, count = struct.unpack_from("<QQII", body)
                assert (grant, got_layer, count) == (8, layer, 1)
                if scheme == "tcp":
                    data = receive(shared.high, shared.geometry.layer_bytes(layer))
                    assert data == layer_block(round_ + 1, layer, len(data)).tobytes()
                shared.high.sendall(frame("write_done", struct.pack("<QQ", number, 0)))
            high.wait(LONG_S)
        assert not any(operation.done for operation in low)
        window, sent = 16 << 10, int(shared.node.stats()["links"][0]["bytes_sent_low"])
        assert sent <= window, "no more than the window is on its way"
        del low
    finally:
        shared.close()


# --- timelines and results


def check_trace(trace: dict[str, Any], loads: int) -> dict[str, list[dict[str, Any]]]:
    """Valid by the format's rules; events by category."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert trace["displayTimeUnit"] in ("ms", "ns")
    by_category: dict[str, list[dict[str, Any]]] = {}
    begins: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = set()
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        assert event["name"]
        if event["ph"] == "M":
            rows.add((event["name"], event["pid"]))
            continue
        by_category.setdefault(event["cat"], []).append(event)
        assert event["ts"] > 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        elif event["ph"] == "b":
            key = (event["pid"], event["cat"], event["id"])
            assert key not in begins, "one id, two spans at once"
            begins[key] = event
        else:
            assert event["ph"] == "e"
            begin = begins.pop((event["pid"], event["cat"], event["id"]))
            assert event["name"] == begin["name"]
            assert begin["ts"] <= event["ts"]
    assert not begins, "spans without an end"
    assert {pid for name, pid in rows if name == "process_name"} == set(range(1, loads + 1))
    check_slices(trace)
    return by_category


def check_slices(trace: dict[str, Any]) -> None:
    """Complete events of one thread are nested or apart; the engine does one thing at a time."""
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for row in {(event["pid"], event["tid"]) for event in slices}:
        mine = sorted(
            (event["ts"], event["ts"] + event["dur"], event["name"])
            for event in slices
            if (event["pid"], event["tid"]) == row
        )
        for (_, end, name), (begin, _, next_name) in itertools.pairwise(mine):
            assert end <= begin + 0.002, f"{name} ends {end - begin:.0f} us after {next_name} has begun"


@pytest.mark.parametrize("layers_per_read", [0, 1, 2])
@pytest.mark.parametrize("policy", ["prefill", "decode", "split"])
def test_trace_of_loads_with_a_decode_node(
    make_node: MakeNode, tmp_path: Path, policy: str, layers_per_read: int
) -> None:
    pair = Pair(make_node, "tcp", tmp_path)
    results = [pair.run(policy, layers_per_read=layers_per_read) for _ in range(2)]
    trace = dualkv.chrome_trace(results, names=["one", "two"])
    events = check_trace(trace, 2)
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"one", "two"}
    assert len([event for event in events["publish"] if event["ph"] == "b"]) == 2 * LAYERS
    assert {event["name"] for event in events["compute"]} == {f"compute layer {i}" for i in range(LAYERS)}
    if policy != "decode":
        reads = [event for event in events["pe read"] if event["ph"] == "b"]
        groups = -(-LAYERS // (layers_per_read or LAYERS))
        assert len(reads) == 2 * groups
        total = sum(path["bytes"] for result in results for path in result["paths"] if path["node"] == "pe")
        assert sum(event["args"]["bytes"] for event in reads) == total
    for result in results:
        for path in result["paths"]:
            stream = [e for e in events.get(f"{path['node']} stream", []) if e["ph"] == "b"]
            assert bool(stream) == any(p["blocks"] for r in results for p in r["paths"] if p["node"] == path["node"])


def local_load(node: dualkv.Node, keys: list[bytes], **options: Any) -> tuple[dualkv.Load, HostCache]:
    cache = HostCache(node.geometry, max(len(keys), 1))
    chosen = plan(dualkv.PrefillOnly(), keys, node)
    return node.load(chosen, into=cache.kv, block_ids=range(len(keys)), **options), cache


def stored_node(make_node: MakeNode, **options: Any) -> tuple[dualkv.Node, list[bytes]]:
    node = make_node("pe", **options)
    keys = make_keys(node.geometry, HIT)
    node.save(keys, filled(node.geometry, HIT).kv, range(HIT)).wait(LONG_S)
    return node, keys


def test_trace_of_loads_without_a_decode_node(make_node: MakeNode) -> None:
    node, keys = stored_node(make_node)
    results = []
    for waits in (True, False):
        load, _ = local_load(node, keys)
        for layer in range(LAYERS if waits else 0):
            load.wait(layer, LONG_S)
        results.append(load.finish(LONG_S))
    results.append(local_load(node, [])[0].finish(LONG_S))
    events = check_trace(dualkv.chrome_trace(results), 3)
    assert "publish" not in events
    assert check_trace(dualkv.chrome_trace([]), 0) == {}


def test_an_engine_computes_one_layer_at_a_time(make_node: MakeNode, tmp_path: Path) -> None:
    """All layers are there long before they are wanted; each is computed for a while, then published."""
    pair = Pair(make_node, "tcp", tmp_path)
    cache = HostCache(pair.geometry, PROMPT)
    chosen = plan(dualkv.PrefillOnly(), pair.keys, pair.pe, pair.peer)
    load = pair.pe.load(chosen, into=cache.kv, block_ids=range(PROMPT))
    incoming = pair.de.incoming(load.id)
    assert eventually(lambda: load.ready(LAYERS - 1))
    for layer in range(LAYERS):
        load.wait(layer, LONG_S)
        time.sleep(0.01)
        load.publish(layer)
    result = load.finish(LONG_S)
    incoming.wait(LONG_S)
    incoming.close()
    events = check_trace(dualkv.chrome_trace([result]), 1)
    for event in events["compute"]:
        assert 9_000 < event["dur"] < 1_000_000, event


def test_an_engine_that_publishes_all_layers_in_the_end(make_node: MakeNode, tmp_path: Path) -> None:
    pair = Pair(make_node, "tcp", tmp_path)
    cache = HostCache(pair.geometry, PROMPT)
    chosen = plan(dualkv.PrefillOnly(), pair.keys, pair.pe, pair.peer)
    load = pair.pe.load(chosen, into=cache.kv, block_ids=range(PROMPT))
    incoming = pair.de.incoming(load.id)
    for layer in range(LAYERS):
        load.wait(layer, LONG_S)
        time.sleep(0.002)
    for layer in range(LAYERS):
        load.publish(layer)
    result = load.finish(LONG_S)
    incoming.wait(LONG_S)
    incoming.close()
    check_trace(dualkv.chrome_trace([result]), 1)


def test_trace_of_a_load_that_failed(make_node: MakeNode, root: Path) -> None:
    node, keys = stored_node(make_node)
    node.store.remove(keys[3])
    load, _ = local_load(node, keys)
    assert error_of(lambda: load.finish(LONG_S)) is not None
    check_trace(dualkv.chrome_trace([load.result()]), 1)
    assert root.exists()


def test_a_layer_is_published_when_publish_is_called(make_node: MakeNode, tmp_path: Path) -> None:
    pair = Pair(make_node, "tcp", tmp_path)
    cache = HostCache(pair.geometry, PROMPT)
    chosen = plan(dualkv.PrefillOnly(), pair.keys, pair.pe, pair.peer)
    load = pair.pe.load(chosen, into=cache.kv, block_ids=range(PROMPT))
    incoming = pair.de.incoming(load.id)
    calls = []
    for layer in range(LAYERS):
        load.wait(layer, LONG_S)
        before = time.monotonic()
        load.publish(layer)
        calls.append((before, time.monotonic()))
    result = load.finish(LONG_S)
    incoming.wait(LONG_S)
    incoming.close()
    for layer, (before, after) in enumerate(calls):
        assert before - 1e-6 <= result["started_s"] + result["layer_published_s"][layer] <= after + 1e-6
        assert result["layer_published_s"][layer] <= result["layer_publish_done_s"][layer] <= result["seconds"]


def test_times_of_a_result_are_on_the_monotonic_clock(make_node: MakeNode) -> None:
    node, keys = stored_node(make_node)
    before = time.monotonic()
    load, _ = local_load(node, keys)
    after = time.monotonic()
    for layer in range(LAYERS):
        load.wait(layer, LONG_S)
    result = load.finish(LONG_S)
    ended = time.monotonic()
    assert before <= result["started_s"] <= after
    latest = ended - result["started_s"]
    lists = ("layer_ready_s", "layer_wait_begin_s", "layer_wait_end_s", "layer_published_s", "layer_publish_done_s")
    for name in lists:
        assert len(result[name]) == LAYERS
        assert all(0 <= value <= latest for value in result[name]), name
    assert all(value > 0 for value in result["layer_ready_s"])
    assert 0 < result["seconds"] <= latest
    assert max(result["layer_ready_s"]) <= result["seconds"]
    assert not any(result["layer_published_s"] + result["layer_publish_done_s"])


@pytest.mark.parametrize("how", ["wait", "await"])
def test_the_first_wait_of_a_layer_is_recorded_once(make_node: MakeNode, how: str) -> None:
    small = make_geometry()
    node, keys = stored_node(make_node, store_options={"read_limit": 20 * HIT * small.file_bytes})
    load, _ = local_load(node, keys)
    began = time.monotonic()
    if how == "wait":
        load.wait(2, LONG_S)
    else:

        async def both() -> None:
            await asyncio.gather(load.layer(2), load.layer(2))

        asyncio.run(both())
    ended = time.monotonic()
    first = load.result()
    time.sleep(0.01)
    load.wait(2, LONG_S)
    asyncio.run(load.layer(2))
    again = load.finish(LONG_S)
    for name, low in (("layer_wait_begin_s", began), ("layer_wait_end_s", began)):
        value = first[name][2] + first["started_s"]
        assert low - 1e-6 <= value <= ended + 1e-6
        assert again[name][2] == first[name][2]
        assert [at for at in range(LAYERS) if again[name][at] != 0] == [2], "nobody waited for the others"
    assert first["layer_wait_begin_s"][2] < first["layer_wait_end_s"][2]
    assert first["layer_wait_end_s"][2] >= first["layer_ready_s"][2]


# --- staging


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk": 0}, "chunk"),
        ({"chunk": "0"}, "chunk"),
        ({"chunk": -1}, ""),
        ({"chunk": "much"}, ""),
        ({"prepare_threads": 0}, "prepare_threads"),
        ({"prepare_threads": 65}, "prepare_threads"),
        ({"prepare_threads": -1}, "prepare_threads"),
        ({"prepare_threads": "2"}, "prepare_threads"),
        ({"lazy": "yes"}, "lazy"),
        ({"lock_limit": -5}, ""),
        ({"numa_node": "0"}, "numa_node"),
        ({"numa_node": -2}, "numa_node"),
        ({"numa_node": 2**40}, "numa_node"),
        ({"chunks": "1MiB"}, "chunks"),
    ],
    ids=str,
)
def test_bad_staging_options_are_named(small: dualkv.KvGeometry, options: dict[str, Any], named: str) -> None:
    error = error_of(lambda: dualkv.StagingPool(small, "8MiB", **options))
    assert error is not None
    assert error.code == "invalid_argument"
    assert named in error.message


@pytest.mark.parametrize("options", [{}, {"lazy": True}, {"prepare_threads": 8, "lazy": True}, {"prepare_threads": 1}])
def test_a_pool_in_chunks_gives_every_slot(small: dualkv.KvGeometry, options: dict[str, Any]) -> None:
    before = threads()
    pool = dualkv.StagingPool(small, "40MiB", chunk="2MiB", huge_pages=False, **options)
    stats = pool.stats()
    assert stats["chunks"] == 20
    acquired = pool.acquire(stats["slots"])
    acquired.wait(LONG_S)
    assert len(acquired.slots()) == stats["slots"]
    while stats["ready_chunks"] < 20:
        stats = pool.stats()
    assert stats["prepare_s"] > 0
    if stats["locked"]:
        assert stats["locked_bytes"] == 40 << 20
    del pool, acquired
    gc.collect()
    assert eventually(lambda: threads() <= before)


def test_a_node_with_lazy_staging_loads_at_once(make_node: MakeNode, small: dualkv.KvGeometry) -> None:
    slots = (256 << 20) // small.file_bytes
    node, keys = stored_node(
        make_node, slots=slots, staging_options={"lazy": True, "chunk": "2MiB", "prepare_threads": 1}
    )
    for _ in range(5):
        load, cache = local_load(node, keys, layers_per_read=2)
        load.finish(LONG_S)
        assert all(cache.holds(block, block + 1) for block in range(HIT))
    assert eventually(lambda: node.stats()["staging"]["ready_chunks"] == node.stats()["staging"]["chunks"])
    assert eventually(lambda: all_free(node))


def test_random_loads_of_all_kinds(make_node: MakeNode, tmp_path: Path) -> None:
    """Seeded: groups, windows, paths and transports in any order, on nodes that live on."""
    seed = 20240229
    noise = random.Random(seed)
    pair = Pair(make_node, "shm", tmp_path, store_options={"depth": 3}, spin_us=0)
    for round_ in range(25):
        choice = {
            "policy": noise.choice(sorted(POLICIES)),
            "layers_per_read": noise.randrange(LAYERS + 1),
            "window_layers": noise.randrange(LAYERS + 2),
        }
        try:
            pair.run(**choice)
        except (dualkv.Error, AssertionError) as error:
            raise AssertionError(f"seed {seed}, round {round_}: {choice}") from error
