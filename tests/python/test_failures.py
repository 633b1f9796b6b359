"""Real failures: peers that are killed or stopped, storage that errs, lies, or is full."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode
from marks import RDMA
from support import (
    LONG_S,
    Child,
    HostCache,
    all_free,
    assert_all_free,
    block_path,
    error_of,
    eventually,
    filled,
    listen_at,
    make_geometry,
    make_keys,
    plan,
    tree,
)

import dualkv

HIT = 10
PROMPT = HIT + 2
TAGS = {block: block + 1 for block in range(PROMPT)}
SECRET = "of the failure tests"
# A peer that is stopped is noticed soon; one that is only slow (two busy cores) is not.
LINK = {"peer_silence_s": 1.0, "heartbeat_s": 0.1, "reconnect_max_s": 0.2, "secret": SECRET}


@pytest.fixture(params=["tcp", "shm", RDMA])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return listen_at(request.param, tmp_path, "peer")


def store_prompt(node: dualkv.Node) -> list[bytes]:
    """Blocks 0 to HIT - 1 of the prompt's keys."""
    keys = make_keys(node.geometry, PROMPT)[:HIT]
    node.save(keys, filled(node.geometry, HIT).kv, range(HIT)).wait(LONG_S)
    return keys


def check_prefill_path(node: dualkv.Node, keys: list[bytes]) -> None:
    """The node is as good as new."""
    cache = HostCache(node.geometry, PROMPT + 1)
    load = node.load(plan(dualkv.PrefillOnly(), keys, node), into=cache.kv, block_ids=range(HIT), deadline_s=LONG_S)
    load.finish(LONG_S)
    assert all(cache.holds(block, TAGS[block]) for block in range(HIT))
    assert cache.untouched(HIT)


class KilledDecode:
    """A prefill node here, its decode node in a child."""

    def __init__(self, make_node: MakeNode, children: Callable[[], Child], root: Path, address: str) -> None:
        self.children = children
        self.root = root
        self.node = make_node("pe", **LINK)
        self.keys = store_prompt(self.node)
        self.files = tree(root)
        self.child, self.address = self.start(address)
        self.peer = self.node.connect(self.address)
        self.cache = HostCache(self.node.geometry, PROMPT + 4)
        for block in range(HIT, PROMPT):
            self.cache.fill(block, TAGS[block])  # what prefill computes

    def start(self, address: str, blocks_per_s: float = 20) -> tuple[Child, str]:
        child = self.children()
        limit = int(self.node.geometry.block_bytes * blocks_per_s)
        options = {"store": f"file://{self.root}", "listen": address, "store_options": {"read_limit": limit}, **LINK}
        return child, child.call("open", name="de", **options)[0]

    def load(self, deadline_s: float = 10) -> dualkv.Load:
        chosen = plan(dualkv.DecodeOnly(), self.keys, self.node, self.peer)
        return self.node.load(chosen, into=self.cache.kv, block_ids=range(PROMPT), deadline_s=deadline_s)

    def received(self) -> int:
        return int(self.node.stats()["links"][0]["bytes_received"])

    def check_layers(self, load: dualkv.Load) -> None:
        """Every layer arrives, by another path if need be."""
        for layer in range(self.node.geometry.layers):
            load.wait(layer, LONG_S)
            assert all(self.cache.layer_is(layer, block, TAGS[block]) for block in range(HIT))
            with contextlib.suppress(dualkv.Error):  # the hand-over may have failed already
                load.publish(layer)

    def check_not_handed_over(self, load: dualkv.Load) -> None:
        error = error_of(lambda: load.finish(LONG_S))
        assert error is not None
        assert error.code in ("peer_lost", "cancelled"), error

    def check_nothing_else_changed(self) -> None:
        assert self.cache.only_right_bytes(TAGS)
        assert all(self.cache.untouched(block) for block in range(PROMPT, PROMPT + 4))
        assert tree(self.root) == self.files
        assert_all_free([self.node])
        check_prefill_path(self.node, self.keys)

    def check_reconnected(self, restart: bool = True) -> None:
        """The peer comes back at the same address, is found, and can decode again."""
        if restart:
            assert eventually(lambda: not self.peer.connected)
            self.child, _ = self.start(self.address, blocks_per_s=1000)
        assert eventually(lambda: self.peer.connected)
        self.cache = HostCache(self.node.geometry, PROMPT + 4)
        for block in range(HIT, PROMPT):
            self.cache.fill(block, TAGS[block])
        load = self.load()
        self.child.call("incoming", load_id=load.id)
        self.check_layers(load)
        load.finish(LONG_S)
        assert self.child.call("handed_over", prompt=PROMPT)
        assert self.cache.only_right_bytes(TAGS)


@pytest.fixture
def killed_decode(make_node: MakeNode, children: Callable[[], Child], root: Path, address: str) -> KilledDecode:
    return KilledDecode(make_node, children, root, address)


def test_decode_is_killed_before_the_load_opens(killed_decode: KilledDecode) -> None:
    k = killed_decode
    chosen = plan(dualkv.DecodeOnly(), k.keys, k.node, k.peer)
    k.child.signal(signal.SIGKILL)
    try:
        load = k.node.load(chosen, into=k.cache.kv, block_ids=range(PROMPT), deadline_s=10)
    except dualkv.Error as error:
        assert error.code == "peer_lost"  # noticed already  # noqa: PT017
    else:
        k.check_layers(load)
        k.check_not_handed_over(load)
    k.check_nothing_else_changed()
    k.check_reconnected()


def test_decode_is_killed_while_it_reads(killed_decode: KilledDecode) -> None:
    k = killed_decode
    load = k.load()
    k.child.call("stats")  # the load is open by now or soon
    k.child.signal(signal.SIGKILL)
    k.check_layers(load)
    k.check_not_handed_over(load)
    assert load.result()["failovers"] > 0
    k.check_nothing_else_changed()
    k.check_reconnected()


def test_decode_is_killed_while_it_sends(killed_decode: KilledDecode) -> None:
    k = killed_decode
    load = k.load()
    assert eventually(lambda: k.received() >= 2 * k.node.geometry.block_bytes)
    k.child.signal(signal.SIGKILL)
    k.check_layers(load)
    k.check_not_handed_over(load)
    assert 0 < load.result()["failovers"] < HIT
    k.check_nothing_else_changed()
    k.check_reconnected()


def test_decode_is_killed_after_the_layers(killed_decode: KilledDecode) -> None:
    k = killed_decode
    load = k.load()
    for layer in range(k.node.geometry.layers):
        load.wait(layer, LONG_S)
    k.child.signal(signal.SIGKILL)
    k.check_layers(load)
    k.check_not_handed_over(load)
    assert load.result()["failovers"] == 0
    k.check_nothing_else_changed()
    k.check_reconnected()


def test_decode_is_killed_before_it_takes_the_prompt(killed_decode: KilledDecode) -> None:
    k = killed_decode
    load = k.load()
    k.check_layers(load)
    load.finish(LONG_S)
    k.child.signal(signal.SIGKILL)
    k.check_nothing_else_changed()
    k.check_reconnected()


def test_decode_stops_while_it_reads(killed_decode: KilledDecode) -> None:
    """Its sockets stay open: only its silence tells."""
    k = killed_decode
    load = k.load()
    assert eventually(lambda: k.received() >= k.node.geometry.block_bytes)
    k.child.signal(signal.SIGSTOP)
    k.check_layers(load)
    k.check_not_handed_over(load)
    k.check_nothing_else_changed()
    assert eventually(lambda: not k.peer.connected)
    k.child.signal(signal.SIGCONT)
    k.check_reconnected(restart=False)


def test_decode_stops_and_the_deadline_comes_first(killed_decode: KilledDecode) -> None:
    k = killed_decode
    load = k.load(deadline_s=0.5)
    k.child.signal(signal.SIGSTOP)
    began = time.monotonic()
    error = error_of(lambda: load.finish(LONG_S))
    assert error is not None
    assert error.code == "timeout"
    assert time.monotonic() - began < 5
    before = [one.copy() for one in k.cache.arrays]
    k.child.signal(signal.SIGCONT)  # what it sends now is for a load that has ended
    time.sleep(0.3)
    assert all((a == b).all() for a, b in zip(before, k.cache.arrays, strict=True))
    k.check_nothing_else_changed()
    k.check_reconnected(restart=False)


class KilledPrefill:
    """A decode node here, its prefill node in a child."""

    def __init__(self, make_node: MakeNode, child: Child, root: Path, address: str, blocks_per_s: float) -> None:
        limit = {"read_limit": int(make_geometry().block_bytes * blocks_per_s)}
        self.node = make_node("de", listen=address, store_options=limit, **LINK)
        self.keys = store_prompt(self.node)
        self.root = root
        self.files = tree(root)
        self.child = child
        child.call("open", name="pe", store=f"file://{root}", store_options=limit, **LINK)
        child.call("connect", address=self.node.addresses[0])

    def load(self, policy: str = "split", deadline_s: float = 10) -> dualkv.Incoming:
        load_id = self.child.call("load", decode="de", policy=policy, hit=HIT, prompt=PROMPT, deadline_s=deadline_s)
        return self.node.incoming(load_id, deadline_s)

    def check_failed(self, incoming: dualkv.Incoming) -> None:
        error = error_of(lambda: incoming.wait(LONG_S))
        assert error is not None
        assert error.code in ("peer_lost", "cancelled"), error
        target = HostCache(self.node.geometry, PROMPT)
        assert error_of(lambda: incoming.copy_to(target.kv, range(PROMPT))) is not None
        assert all(target.untouched(block) for block in range(PROMPT))
        self.check_nothing_else_changed()

    def check_nothing_else_changed(self) -> None:
        assert_all_free([self.node])
        assert tree(self.root) == self.files
        check_prefill_path(self.node, self.keys)


MakeKilledPrefill = Callable[[float], KilledPrefill]


@pytest.fixture
def killed_prefill(make_node: MakeNode, children: Callable[[], Child], root: Path, address: str) -> MakeKilledPrefill:
    return lambda blocks_per_s: KilledPrefill(make_node, children(), root, address, blocks_per_s)


@pytest.mark.parametrize("policy", ["decode_only", "split"])
def test_prefill_is_killed_while_both_read(killed_prefill: MakeKilledPrefill, policy: str) -> None:
    k = killed_prefill(20)
    incoming = k.load(policy)
    assert eventually(lambda: k.node.stats()["loads_served"] == 1)
    k.child.signal(signal.SIGKILL)
    k.check_failed(incoming)


@pytest.mark.parametrize("published", [0, 2, 5])
def test_prefill_is_killed_while_it_publishes(killed_prefill: MakeKilledPrefill, published: int) -> None:
    k = killed_prefill(1000)
    incoming = k.load()
    k.child.call("publish", layers=published)
    k.child.signal(signal.SIGKILL)
    if published == 5 and error_of(lambda: incoming.wait(LONG_S)) is None:
        check_prompt(k, incoming)  # the last byte was sent before it died
    else:
        k.check_failed(incoming)


def check_prompt(k: KilledPrefill, incoming: dualkv.Incoming) -> None:
    target = HostCache(k.node.geometry, PROMPT + 1)
    incoming.copy_to(target.kv, range(PROMPT))
    assert all(target.holds(block, TAGS[block]) for block in range(PROMPT))
    assert target.untouched(PROMPT)
    incoming.close()
    k.check_nothing_else_changed()


def test_prefill_is_killed_after_the_hand_over(killed_prefill: MakeKilledPrefill) -> None:
    """The prompt is here: its prefill node is not needed any more."""
    k = killed_prefill(1000)
    incoming = k.load()
    k.child.call("publish", layers=5)
    k.child.call("finish")
    incoming.wait(LONG_S)
    k.child.signal(signal.SIGKILL)
    assert eventually(lambda: not k.node.peer("pe").connected)
    check_prompt(k, incoming)


def test_prefill_stops_while_both_read(killed_prefill: MakeKilledPrefill) -> None:
    k = killed_prefill(20)
    incoming = k.load()
    assert eventually(lambda: k.node.stats()["loads_served"] == 1)
    k.child.signal(signal.SIGSTOP)
    k.check_failed(incoming)
    k.child.signal(signal.SIGCONT)
    assert error_of(lambda: k.child.call("finish")) is not None
    assert eventually(lambda: k.node.peer("pe").connected)
    again = k.load()
    k.child.call("publish", layers=5)
    again.wait(LONG_S)
    check_prompt(k, again)


def test_prefill_stops_and_the_deadline_comes_first(killed_prefill: MakeKilledPrefill) -> None:
    k = killed_prefill(1000)
    incoming = k.load(deadline_s=0.5)
    k.child.signal(signal.SIGSTOP)
    error = error_of(lambda: incoming.wait(LONG_S))
    assert error is not None
    assert error.code == "timeout"
    k.check_nothing_else_changed()


# --- storage


class Pair:
    """A prefill and a decode node in this process."""

    def __init__(self, make_node: MakeNode, pe: dict[str, Any], de: dict[str, Any], name: str = "pair") -> None:
        self.pe = make_node("pe", store_options={"in_use_grace_s": 0, **pe})
        self.de = make_node("de", store_options={"in_use_grace_s": 0, **de}, listen=f"loopback://{name}")
        self.peer = self.pe.connect(self.de.addresses[0])
        self.keys = store_prompt(self.pe)
        self.cache = HostCache(self.pe.geometry, HIT + 2)
        self.started: list[tuple[dualkv.Load, dualkv.Incoming]] = []

    def load(self, policy: dualkv.PathPolicy, deadline_s: float = 10) -> dualkv.Load:
        chosen = plan(policy, self.keys, self.pe, self.peer)
        load = self.pe.load(chosen, into=self.cache.kv, block_ids=range(HIT), deadline_s=deadline_s)
        self.started.append((load, self.de.incoming(load.id, deadline_s)))
        return load

    def end(self) -> None:
        """The engines want none of it: staging must not wait for deadlines."""
        for load, incoming in self.started:
            load.cancel()
            incoming.close()
        assert_all_free([self.pe, self.de])

    def layers(self, load: dualkv.Load) -> dualkv.Error | None:
        for layer in range(self.pe.geometry.layers):
            error = error_of(functools.partial(load.wait, layer, LONG_S))
            if error is not None:
                return error
        return None

    def check_cache(self) -> None:
        assert self.cache.only_right_bytes({block: TAGS[block] for block in range(HIT)})
        assert all(self.cache.untouched(block) for block in range(HIT, HIT + 2))

    def complete(self) -> bool:
        return all(self.cache.holds(block, TAGS[block]) for block in range(HIT))


FAULTS = {"error": "error_rate", "short": "short_rate", "corrupt": "corrupt_rate", "drop": "drop_rate"}
POLICIES = [dualkv.PrefillOnly, dualkv.DecodeOnly, dualkv.Split]


@pytest.mark.parametrize("policy", [dualkv.DecodeOnly, dualkv.Split], ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("side", ["pe", "de"])
@pytest.mark.parametrize("fault", FAULTS)
def test_storage_of_one_side_fails(
    make_node: MakeNode, root: Path, fault: str, side: str, policy: type[dualkv.PathPolicy]
) -> None:
    """The other reads for it. Nothing is wrong with the files."""
    faults = {"faults": {FAULTS[fault]: 1, "seed": 5}}
    pair = Pair(make_node, faults if side == "pe" else {}, faults if side == "de" else {})
    files = tree(root)
    assert pair.layers(load := pair.load(policy())) is None
    assert pair.complete()
    pair.check_cache()
    if (side, policy) != ("pe", dualkv.DecodeOnly):
        assert load.result()["failovers"] > 0
    if fault == "drop":
        (pair.pe if side == "pe" else pair.de).close()  # frees what its storage never answered
    pair.end()
    assert tree(root) == files


CODES = {"error": {"io"}, "short": {"io", "corrupt"}, "corrupt": {"corrupt"}, "drop": {"timeout"}}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_storage_of_both_sides_fails(make_node: MakeNode, fault: str, policy: type[dualkv.PathPolicy]) -> None:
    faults = {"faults": {FAULTS[fault]: 1, "seed": 6}}
    pair = Pair(make_node, faults, faults)
    error = pair.layers(load := pair.load(policy(), deadline_s=2))
    assert error is not None
    assert error.code in CODES[fault], error
    assert all(pair.cache.untouched(block) for block in range(HIT + 2))
    if fault in ("error", "short", "corrupt"):
        assert load.failed_block is not None
        assert pair.keys[load.failed_block].hex() in str(error)
    else:
        pair.pe.close()
        pair.de.close()
    assert_all_free([pair.pe, pair.de])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_storage_of_both_sides_fails_now_and_then(
    make_node: MakeNode, seed: int, policy: type[dualkv.PathPolicy]
) -> None:
    rates = {"error_rate": 0.1, "short_rate": 0.1, "corrupt_rate": 0.1, "delay_rate": 0.2, "delay_s": 0.02}
    pair = Pair(make_node, {"faults": {**rates, "seed": seed}}, {"faults": {**rates, "seed": seed + 100}})
    for _ in range(3):
        error = pair.layers(pair.load(policy()))
        if error is None:
            assert pair.complete()
        else:
            assert error.code in ("io", "corrupt", "not_found"), error
            pair.keys = pair.keys[: pair.pe.store.match(pair.keys)]
        pair.check_cache()
        if error is not None:
            break
    pair.end()


def flipped_bits() -> list[int]:
    """Bits all over a block file, seeded; its first and last among them."""
    geometry = make_geometry()
    places = random.Random(20250)
    payload = [places.randrange(8 * geometry.block_bytes) for _ in range(10)]
    trailer_from = geometry.file_bytes - (-(-(192 + 16 * geometry.layers + 8) // 4096) * 4096)
    trailer = [8 * trailer_from + places.randrange(8 * (192 + 16 * geometry.layers)) for _ in range(8)]
    zero = [8 * trailer_from + places.randrange(8 * 4096) for _ in range(4)]
    return [0, 8 * geometry.block_bytes - 1, 8 * trailer_from, 8 * geometry.file_bytes - 1, *payload, *trailer, *zero]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("bit", flipped_bits())
def test_one_flipped_bit_on_disk(make_node: MakeNode, root: Path, bit: int) -> None:
    pair = Pair(make_node, {}, {})
    bad = bit % HIT
    path = block_path(root, pair.pe.geometry, pair.keys[bad])
    flip(path, bit)
    files = tree(root)
    policy = POLICIES[bit % 3]()
    error = pair.layers(load := pair.load(policy))
    assert error is not None
    assert error.code == "corrupt", error
    assert load.failed_block == bad
    assert pair.keys[bad].hex() in str(error)
    assert pair.cache.untouched(bad)
    pair.check_cache()
    assert_all_free([pair.pe, pair.de])
    # A miss from now on, for everybody; the other blocks are as they were.
    assert pair.pe.store.match(pair.keys) <= bad
    assert not path.exists()
    files.pop(path.name)
    assert tree(root) == files
    # The next save heals it.
    store_prompt(pair.pe)
    assert pair.de.store.match(pair.keys) == HIT
    assert pair.layers(pair.load(policy)) is None
    assert pair.complete()
    pair.end()


def test_a_flipped_bit_of_the_padding_does_no_harm(make_node: MakeNode, root: Path) -> None:
    pair = Pair(make_node, {}, {})
    flip(block_path(root, pair.pe.geometry, pair.keys[3]), 8 * pair.pe.geometry.block_bytes)
    assert pair.layers(pair.load(dualkv.Split())) is None
    assert pair.complete()
    pair.end()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("size", [0, 1, 4096, -4096, -1])
def test_a_truncated_file(make_node: MakeNode, root: Path, size: int, policy: type[dualkv.PathPolicy]) -> None:
    pair = Pair(make_node, {}, {})
    chosen = plan(policy(), pair.keys, pair.pe, pair.peer)
    assert pair.pe.store.match(pair.keys) == HIT
    path = block_path(root, pair.pe.geometry, pair.keys[4])
    os.truncate(path, size % pair.pe.geometry.file_bytes)
    load = pair.pe.load(chosen, into=pair.cache.kv, block_ids=range(HIT))
    error = pair.layers(load)
    assert error is not None
    assert error.code == "corrupt", error
    assert load.failed_block == 4
    assert pair.cache.untouched(4)
    pair.check_cache()
    assert_all_free([pair.pe, pair.de])
    assert not pair.de.store.contains(pair.keys[4])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_a_block_is_deleted_between_match_and_load(
    make_node: MakeNode, root: Path, policy: type[dualkv.PathPolicy]
) -> None:
    pair = Pair(make_node, {}, {})
    chosen = plan(policy(), pair.keys, pair.pe, pair.peer)
    block_path(root, pair.pe.geometry, pair.keys[7]).unlink()
    files = tree(root)
    load = pair.pe.load(chosen, into=pair.cache.kv, block_ids=range(HIT))
    error = pair.layers(load)
    assert error is not None
    assert error.code == "not_found", error
    assert load.failed_block == 7
    assert pair.cache.untouched(7)
    pair.check_cache()
    assert_all_free([pair.pe, pair.de])
    assert tree(root) == files
    assert pair.pe.store.match(pair.keys) <= 7
    pair.keys = pair.keys[:7]
    assert pair.layers(pair.load(policy())) is None
    pair.end()


def test_a_file_of_another_geometry(make_node: MakeNode, root: Path, tmp_path: Path) -> None:
    """As large as ours, and right for its own geometry."""
    pair = Pair(make_node, {}, {})
    other = make_geometry(tuple(reversed([pair.pe.geometry.layer_bytes(i) for i in range(5)])))
    assert other.file_bytes == pair.pe.geometry.file_bytes
    strange_root = tmp_path / "strange"
    strange = make_node("x", geometry=other, store=f"file://{strange_root}")
    strange.save(pair.keys, filled(other, HIT).kv, range(HIT)).wait(LONG_S)
    path = block_path(root, pair.pe.geometry, pair.keys[2])
    shutil.copy(block_path(strange_root, other, pair.keys[2]), path)
    error = pair.layers(load := pair.load(dualkv.Split()))
    assert error is not None
    assert (error.code, load.failed_block) == ("corrupt", 2)
    assert pair.cache.untouched(2)
    pair.check_cache()


def test_a_block_under_the_name_of_another(make_node: MakeNode, root: Path) -> None:
    pair = Pair(make_node, {}, {})
    g = pair.pe.geometry
    shutil.copy(block_path(root, g, pair.keys[5]), block_path(root, g, pair.keys[6]))
    error = pair.layers(load := pair.load(dualkv.Split()))
    assert error is not None
    assert (error.code, load.failed_block) == ("corrupt", 6)
    assert pair.cache.untouched(6)
    pair.check_cache()


def test_a_root_that_cannot_be(tmp_path: Path, small: dualkv.KvGeometry) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    for root in (file, file / "below", tmp_path / "no" / "parent"):
        error = error_of(lambda root=root: dualkv.Node("n", small, store=f"file://{root}", staging="1MiB"))  # type: ignore[misc]
        assert error is not None
        assert error.code == "io"
        assert str(root) in str(error)
        assert error.os_errno
    assert file.read_text() == "not a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@contextlib.contextmanager
def tmpfs(where: Path, options: str) -> Iterator[None]:
    """Mounted, and unmounted in the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a tmpfs")
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(where)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"root may not mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        gc.collect()  # a store that is still referenced keeps its root open
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.root
def test_a_read_only_root(tmp_path: Path, small: dualkv.KvGeometry) -> None:
    with tmpfs(tmp_path / "disk", "size=1m,ro"):
        root = tmp_path / "disk" / "store"
        error = error_of(lambda: dualkv.Node("n", small, store=f"file://{root}", staging="1MiB"))
        assert error is not None
        assert (error.code, str(root) in str(error)) == ("io", True), error


@pytest.mark.root
def test_a_full_disk(tmp_path: Path, small: dualkv.KvGeometry) -> None:
    """What was stored stays good; what did not fit is not there at all."""
    disk = tmp_path / "disk"
    with tmpfs(disk, f"size={6 * small.file_bytes // 1024}k"):
        check_full_disk(disk, small)


def check_full_disk(disk: Path, small: dualkv.KvGeometry) -> None:
    root = disk / "store"
    with dualkv.Node("n", small, store=f"file://{root}", staging=32 * small.file_bytes) as node:
        keys = make_keys(small, HIT)
        error = error_of(lambda: node.save(keys, filled(small, HIT).kv, range(HIT)).wait(LONG_S))
        assert error is not None
        assert error.code == "no_space", error
        assert error.os_errno
        assert eventually(lambda: all_free(node))
        stored = node.store.match(keys)
        assert 0 < stored < HIT
        assert node.store.verify()[1] == []
        assert [path for path in root.glob("*/tmp/*") if path.stat().st_size] == []
        cache = HostCache(small, HIT)
        load = node.load(plan(dualkv.PrefillOnly(), keys[:stored], node), into=cache.kv, block_ids=range(stored))
        load.finish(LONG_S)
        assert all(cache.holds(block, block + 1) for block in range(stored))
        assert all(cache.untouched(block) for block in range(stored, HIT))
        # Space again: the same save succeeds.
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        node.save(keys, filled(small, HIT).kv, range(HIT)).wait(LONG_S)
        assert (node.store.match(keys), node.store.verify()) == (HIT, (HIT, []))
