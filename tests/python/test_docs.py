"""The docs against the code: settings and their defaults, formats re-implemented from the page's tables, links."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import inspect
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import dualkv
import dualkv.node
import dualkv.storage
from dualkv.sizes import parse_size

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
SECRET = "a secret of the tests"

Row: TypeAlias = dict[str, str]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#+ |\Z)", page, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[1]


def tables(page: str, heading: str) -> list[list[Row]]:
    """The tables below a heading, each row by column name."""
    out = []
    for lines in re.findall(r"(?:^\|.*\|$\n?)+", section(page, heading), re.M):
        head, _, *body = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines.splitlines()]
        names = [name.strip("| ") for name in head]
        out.append([dict(zip(names, [cell.strip("| ") for cell in row], strict=True)) for row in body])
    return out


def table(page: str, heading: str) -> list[Row]:
    return tables(page, heading)[0]


def options(heading: str) -> dict[str, Row]:
    return {row["option"].strip("`"): row for row in table(SETTINGS, heading)}


# --- settings


def cpp_defaults(header: str, struct_name: str) -> dict[str, Any]:
    """Defaults of a C++ options struct; members without one are left out."""
    text = (ROOT / "include/dualkv" / header).read_text(encoding="utf-8")
    body = re.search(rf"^struct {struct_name} {{\n(.*?)^}};", text, re.M | re.S)
    assert body, struct_name
    found = re.findall(r"^ +[\w:<>]+ (\w+)(?:\[\w+\])? = (.+?);", body[1], re.M)
    return {name: cpp_value(value) for name, value in found}


def cpp_value(text: str) -> Any:
    text = re.sub(r"std::uint64_t\{(\d+)\}", r"\1", text)
    text = text.replace("true", "True").replace("false", "False").replace("{", "[").replace("}", "]")
    if enumerator := re.fullmatch(r"\w+::k(\w+)", text):
        return enumerator[1].lower()
    shift = re.fullmatch(r"(\d+) << (\d+)", text)
    return int(shift[1]) << int(shift[2]) if shift else ast.literal_eval(text)


def page_default(row: Row) -> Any:
    return ast.literal_eval(row["default"].strip("`"))


def node_defaults() -> dict[str, Any]:
    found = cpp_defaults("node.h", "NodeOptions")
    marks = ("dscp", "so_priority", "service_level")
    for lane, values in zip(("low", "high"), found.pop("lanes"), strict=True):
        found |= {f"{lane}_{mark}": value for mark, value in zip(marks, values, strict=True)}
    gpu = cpp_defaults("gpu.h", "GpuOptions")
    return found | {f"gpu_{name}": value for name, value in gpu.items()}


# The headers name sizes by their unit; Python does not.
CPP_NAMES = {
    "write_frame": "write_frame_bytes",
    "write_window": "write_window_bytes",
    "read_limit": "read_limit_bytes_per_s",
    "quota": "quota_bytes",
    "chunk": "chunk_bytes",
    "lock_limit": "lock_limit_bytes",
    "registered": "registered_bytes",
    "gpu_bounce": "gpu_bounce_bytes",
    "gpu_gds": "gpu_gds_bytes",
    "gpu_rdma": "gpu_rdma_bytes",
}
OPTION_SETS = {
    "Node": (dualkv.node._NODE_OPTIONS, node_defaults()),
    "Store": (dualkv.storage._STORE_OPTIONS, cpp_defaults("store.h", "StoreOptions") | {"faults": {}}),
    "Staging": (dualkv.storage._STAGING_OPTIONS, cpp_defaults("staging.h", "StagingOptions")),
    "RDMA": (dualkv.node._RDMA_OPTIONS, cpp_defaults("rdma.h", "RdmaOptions") | {"devices": ()}),
    "Faults": (dualkv.storage._FAULTS, cpp_defaults("store.h", "ReadFaults")),
}


@pytest.mark.parametrize("heading", OPTION_SETS)
def test_every_option_is_on_the_page_with_its_default(heading: str) -> None:
    known, defaults = OPTION_SETS[heading]
    page = options(heading)
    assert known <= page.keys()
    for name in known:
        value = page_default(page[name])
        if name in CPP_NAMES:
            value = parse_size(value)
        expected = defaults[CPP_NAMES.get(name, name)]
        assert value == expected, name
        assert isinstance(value, bool) == isinstance(expected, bool), name


def test_no_option_on_the_page_is_unknown() -> None:
    arguments = set(inspect.signature(dualkv.Node).parameters) - {"options"}
    for heading, (known, _) in OPTION_SETS.items():
        assert options(heading).keys() == known | (arguments if heading == "Node" else set())


def test_arguments_of_node_have_the_default_of_the_page() -> None:
    page = options("Node")
    for name, parameter in inspect.signature(dualkv.Node).parameters.items():
        if name == "options":
            continue
        required = parameter.default is inspect.Parameter.empty
        assert (page[name]["default"] == "required") == required, name
        assert required or page_default(page[name]) == parameter.default, name
    staging = cpp_defaults("staging.h", "StagingOptions")
    assert parse_size(page_default(page["staging"])) == staging["bytes"]


def test_defaults_of_calls() -> None:
    for call, row in options("Calls").items():
        owner, method, argument = re.fullmatch(r"(\w+)\.(\w+)\((\w+)\)", call).groups()  # type: ignore[union-attr]
        signature = inspect.signature(getattr(getattr(dualkv, owner), method))
        assert signature.parameters[argument].default == page_default(row), call


def test_the_core_accepts_every_default_of_the_page(tmp_path: Path) -> None:
    def given(heading: str) -> dict[str, Any]:
        return {name: page_default(options(heading)[name]) for name in OPTION_SETS[heading][0]}

    store = given("Store") | {"faults": given("Faults")}
    url = f"file://{tmp_path}/store"
    dualkv.Node(
        "n",
        geometry(),
        store=url,
        staging="1MiB",
        store_options=store,
        staging_options=given("Staging"),
        rdma_options=given("RDMA"),
        **given("Node"),
    ).close()


def test_fallbacks_are_those_of_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cpp").rglob("*.[ch]*"))
    counted = set(re.findall(r'(?:fallbacks_\.count|on_fallback|note_?)\("(\w+)"', code))
    assert {row["name"].strip("`") for row in table(SETTINGS, "Fallbacks")} == counted


def test_the_library_reads_no_environment_variable() -> None:
    files = [path for folder in ("cpp", "include", "bindings") for path in (ROOT / folder).rglob("*.*")]
    files += (ROOT / "src/dualkv").glob("*.py")
    assert not [path for path in files if re.search(r"getenv|os\.environ", path.read_text(encoding="utf-8"))]


# --- formats: values and files


def geometry(layer_bytes: tuple[int, ...] = (100, 333, 5000), tokens: int = 4) -> dualkv.KvGeometry:
    return dualkv.KvGeometry(tokens_per_block=tokens, layer_bytes=layer_bytes, namespace="modèle/fp8/tp0")


def blake2b(*parts: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=32, key=key).digest()


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def sizes(g: dualkv.KvGeometry) -> tuple[int, int, int]:
    """block_bytes, payload_bytes, trailer_bytes by the page's formulas."""
    block = sum(g.layer_bytes(i) for i in range(g.layers))
    return block, round_up(block, 4096), round_up(192 + 16 * g.layers + 8, 4096)


def fingerprint(g: dualkv.KvGeometry) -> int:
    layers = [g.layer_bytes(i) for i in range(g.layers)]
    packed = struct.pack(f"<II{g.layers}Q", g.tokens_per_block, g.layers, *layers)
    return dualkv.checksum(packed + g.namespace.encode())


def fields(data: bytes, rows: list[Row]) -> dict[str, bytes]:
    """The fields of a table whose offset and size are plain numbers."""
    out = {}
    for row in rows:
        if row["offset"].isdigit() and row["size"].isdigit():
            out[row["field"]] = data[int(row["offset"]) :][: int(row["size"])]
    return out


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def keys_of(tokens: Any, g: dualkv.KvGeometry, parent: bytes = b"") -> list[bytes]:
    block = g.tokens_per_block
    last = parent or blake2b(f"dualkv key v1\n{block}\n{g.namespace}".encode())
    keys = []
    for first in range(0, len(tokens) - block + 1, block):
        last = blake2b(last, struct.pack(f"<{block}I", *tokens[first : first + block]))
        keys.append(last)
    return keys


@pytest.mark.parametrize("block", [1, 4, 64])
def test_keys(block: int) -> None:
    g = geometry(tokens=block)
    tokens = np.random.default_rng(7).integers(0, 2**32, 5 * block + block - 1, dtype=np.uint32)
    keys = dualkv.block_keys(tokens, g)
    assert keys == keys_of(tokens.tolist(), g)
    assert len(keys) == (6 * block - 1) // block
    assert dualkv.block_keys(tokens[2 * block :], g, keys[1]) == keys[2:]
    assert keys_of(tokens[2 * block :].tolist(), g, keys[1]) == keys[2:]


@pytest.mark.parametrize("layers", [1, 3, 243, 245, 1024])
def test_sizes_and_fingerprint(layers: int) -> None:
    g = geometry(tuple(range(1, layers + 1)))
    block, payload, trailer = sizes(g)
    assert (g.block_bytes, g.file_bytes, g.fingerprint) == (block, payload + trailer, fingerprint(g))


class Saved:
    """Three blocks in a store, and what the page says of them."""

    def __init__(self, root: Path, g: dualkv.KvGeometry) -> None:
        self.geometry = g
        self.root = root
        self.store = dualkv.Store(f"file://{root}", g, staging="4MiB")
        self.arrays = cache(g, 3, seed=11)
        self.keys = dualkv.block_keys(np.arange(3 * g.tokens_per_block), g)
        self.store.save(self.keys, dualkv.PagedKv(g, self.arrays), [2, 0, 1]).wait(10)
        self.namespace = root / f"{dualkv.checksum(g.namespace.encode()):016x}"

    def path(self, key: bytes) -> Path:
        return self.namespace / key.hex()[:2] / f"{key.hex()}.kv"


def cache(g: dualkv.KvGeometry, blocks: int, seed: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (blocks, g.layer_bytes(i)), dtype=np.uint8) for i in range(g.layers)]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path / "store", geometry())


def check_block_file(data: bytes, saved: Saved, index: int) -> None:
    g = saved.geometry
    block, payload, trailer_bytes = sizes(g)
    assert len(data) == payload + trailer_bytes == g.file_bytes
    assert not any(data[block:payload])

    trailer = data[payload:]
    rows, entry_rows = tables(FORMATS, "Trailer")
    found = fields(trailer, rows)
    assert found["magic"] == b"DLKVBLK1"
    numbers = {name: number(value) for name, value in found.items()}
    expected = {"version": 1, "layers": g.layers, "fingerprint": fingerprint(g), "block_bytes": block}
    expected |= {"payload_bytes": payload, "trailer_bytes": trailer_bytes, "tokens_per_block": g.tokens_per_block}
    parent = saved.keys[index - 1] if index else b""
    expected |= {"key_size": 32, "parent_size": len(parent), "reserved": 0, "zero": 0}
    assert {name: numbers[name] for name in expected} == expected
    assert (found["key"], found["parent"]) == (saved.keys[index], parent.ljust(32, b"\0"))

    at = 0
    for layer in range(g.layers):
        entry = {name: number(value) for name, value in fields(trailer[192 + 16 * layer :], entry_rows).items()}
        size = g.layer_bytes(layer)
        layer_block = data[at : at + size]
        assert layer_block == saved.arrays[layer][[2, 0, 1][index]].tobytes()
        assert entry == {"bytes": size, "checksum": dualkv.checksum(layer_block)}
        at += size
    assert not any(trailer[192 + 16 * g.layers : -8])
    assert number(trailer[-8:]) == dualkv.checksum(trailer[:-8])


def test_block_files(saved: Saved) -> None:
    for index, key in enumerate(saved.keys):
        check_block_file(saved.path(key).read_bytes(), saved, index)


# 192 + 16 * 244 is a multiple of a page: the seal needs a page of its own.
@pytest.mark.parametrize(
    "layers",
    [243, 244, 245],
)
def test_a_trailer_full_of_layers_keeps_its_last_checksum(tmp_path: Path, layers: int) -> None:
    saved = Saved(tmp_path / "store", geometry((8,) * layers))
    check_block_file(saved.path(saved.keys[1]).read_bytes(), saved, 1)
    assert saved.store.verify() == (3, [])


def test_fixed_part_of_the_trailer_has_no_gap() -> None:
    rows = [row for row in table(FORMATS, "Trailer") if row["offset"].isdigit() and row["size"].isdigit()]
    at = 0
    for row in rows:
        assert int(row["offset"]) == at, row
        at += int(row["size"])
    assert at == 192


def test_names_in_the_directory(saved: Saved) -> None:
    g = saved.geometry
    assert [path.name for path in saved.root.iterdir()] == [saved.namespace.name]
    folders = {path.name for path in saved.namespace.iterdir() if stat.S_ISDIR(path.stat().st_mode)}
    assert folders == {f"{i:02x}" for i in range(256)} | {"tmp"}
    lines = (saved.namespace / "geometry").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"{fingerprint(g):016x}"
    assert len(lines) == 2
    assert list((saved.namespace / "tmp").iterdir()) == []
    files = {path for path in saved.namespace.rglob("*") if path.is_file()}
    assert files == {saved.namespace / "geometry", *map(saved.path, saved.keys)}

    assert saved.store.quarantine(saved.keys[2])
    assert saved.path(saved.keys[2]).with_suffix(".corrupt").is_file()
    assert saved.store.match(saved.keys) == 2
    assert saved.store.collect("1GiB") == 0
    assert [path.name for path in (saved.namespace / "tmp").iterdir()] == [".collector"]


def test_another_geometry_of_the_namespace_is_refused(saved: Saved) -> None:
    with pytest.raises(dualkv.Error) as caught:
        dualkv.Store(f"file://{saved.root}", geometry((1, 2)), staging="4MiB")
    assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize(
    ("field", "reason"),
    [("magic", "magic"), ("version", "format version"), ("key", "trailer checksum"), ("zero", "trailer checksum")],
)
def test_a_changed_trailer_is_corrupt(saved: Saved, field: str, reason: str) -> None:
    row = next(row for row in table(FORMATS, "Trailer") if row["field"] == field)
    path = saved.path(saved.keys[1])
    data = bytearray(path.read_bytes())
    data[sizes(saved.geometry)[1] + int(row["offset"])] ^= 1
    path.write_bytes(data)
    blocks, bad = saved.store.verify()
    assert (blocks, len(bad)) == (3, 1)
    assert reason in bad[0]


def test_a_changed_padding_is_not(saved: Saved) -> None:
    path = saved.path(saved.keys[1])
    data = bytearray(path.read_bytes())
    data[sizes(saved.geometry)[0]] ^= 1
    path.write_bytes(data)
    assert saved.store.verify() == (3, [])


def test_a_file_of_another_size_is_not_stored(saved: Saved) -> None:
    path = saved.path(saved.keys[2])
    path.write_bytes(path.read_bytes()[:-1])
    assert not saved.store.contains(saved.keys[2])
    saved.store.save(saved.keys, dualkv.PagedKv(saved.geometry, saved.arrays), [2, 0, 1]).wait(10)
    check_block_file(path.read_bytes(), saved, 2)


def test_the_collector_removes_old_temporary_files(saved: Saved) -> None:
    old, young = (saved.namespace / "tmp" / f"{i:016x}" for i in range(2))
    for path in (old, young):
        path.write_bytes(b"")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    saved.store.collect("1GiB")
    assert {path.name for path in old.parent.iterdir()} == {young.name, ".collector"}


# --- formats: wire, handshake, messages, spoken by a peer written from the page

TYPES = {row["name"]: int(row["type"]) for row in table(FORMATS, "Frame types")}
LIMITS = {row["name"]: int(row["largest body"]) for row in table(FORMATS, "Frame types")}
CODES = {int(row["code"]): row["name"] for row in table(FORMATS, "Codes")}


def header(kind: int, body: bytes = b"", size: int | None = None) -> bytes:
    checked = struct.pack("<4sHHIIQ", b"DLKP", 2, kind, len(body) if size is None else size, 0, dualkv.checksum(body))
    return checked + struct.pack("<Q", dualkv.checksum(checked))


def frame(name: str, body: bytes = b"") -> bytes:
    return header(TYPES[name], body) + body


def string(text: bytes) -> bytes:
    return struct.pack("<H", len(text)) + text


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = connection.recv(size - len(data))
        assert got, f"closed after {len(data)} of {size} bytes"
        data += got
    return data


def receive_frame(connection: socket.socket) -> tuple[str, bytes]:
    raw = receive(connection, 32)
    found = fields(raw, table(FORMATS, "Header"))
    kind = {number: name for name, number in TYPES.items()}[number(found["type"])]
    body = receive(connection, number(found["body_bytes"]))
    assert raw == header(TYPES[kind], body)
    assert len(body) <= LIMITS[kind]
    return kind, body


def parse(body: bytes, rows: list[Row]) -> dict[str, bytes]:
    """Fields in order; a size is a number of bytes or "string". Nothing may be left over."""
    out = {}
    for row in rows:
        if row["size"] == "string":
            size, body = number(body[:2]), body[2:]
        else:
            size = int(row["size"])
        assert len(body) >= size, row
        out[row["field"]], body = body[:size], body[size:]
    assert not body
    return out


def proof(label: bytes, connector: bytes, acceptor: bytes, secret: str = SECRET) -> bytes:
    said = string(label) + struct.pack("<I", len(connector)) + connector + acceptor
    return blake2b(said, key=blake2b(secret.encode()))


class PythonPeer:
    """A node that knows nothing but the page: opens connections to a dualkv node."""

    def __init__(self, g: dualkv.KvGeometry, address: str, scheme: str) -> None:
        self.geometry = g
        self.address = address
        self.scheme = scheme
        self.connections: list[socket.socket] = []
        self.probe = ctypes.c_uint64(0x1234567890ABCDEF)

    def connect(self) -> socket.socket:
        if self.scheme == "tcp":
            host, port = self.address.removeprefix("tcp://").rsplit(":", 1)
            connection = socket.create_connection((host, int(port)), 10)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(10)
            connection.connect(self.address.removeprefix("shm://"))
        self.connections.append(connection)
        return connection

    def hello(self, role: int, index: int = 0, name: bytes = b"python") -> bytes:
        where = (ctypes.addressof(self.probe), self.probe.value) if self.scheme == "shm" else (0, 0)
        head = string(name) + struct.pack("<Q", fingerprint(self.geometry)) + string(b"a geometry")
        return head + struct.pack("<QBBB", 99, role, index, 1) + bytes(range(32)) + struct.pack("<QQ", *where)

    def shake(self, role: int, secret: str = SECRET) -> tuple[socket.socket, str, bytes]:
        """The whole handshake; returns the last frame's name and body."""
        connection = self.connect()
        mine = self.hello(role)
        connection.sendall(frame("hello", mine))
        kind, body = receive_frame(connection)
        assert kind == "challenge"
        theirs = body[32:]
        hello = parse(theirs, table(FORMATS, "Hello"))
        assert (hello["name"], number(hello["fingerprint"])) == (b"n", fingerprint(self.geometry))
        assert (number(hello["session"]), number(hello["role"]), number(hello["index"])) == (99, role, 0)
        assert number(hello["channels_per_lane"]) == 1
        assert (number(hello["probe_address"]) > 0) == (self.scheme == "shm")
        assert body[:32] == proof(b"dualkv acceptor v1", mine, theirs)
        connection.sendall(frame("proof", proof(b"dualkv connector v1", mine, theirs, secret)))
        return connection, *receive_frame(connection)

    def open(self) -> tuple[socket.socket, socket.socket]:
        """Control and LOW connection of a complete link."""
        out = []
        for role in (2, 0, 1):
            connection, kind, body = self.shake(role)
            assert (kind, body) == ("welcome", b"")
            out.append(connection)
        return out[0], out[1]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


@pytest.fixture(params=["tcp", "shm"])
def joined(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dualkv.Node, PythonPeer]]:
    """A node that listens, and a peer that may connect."""
    scheme = request.param
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else f"shm://{tmp_path}/n.sock"
    store = f"file://{tmp_path}/store"
    g = geometry()
    with dualkv.Node(
        "n", g, store=store, staging="1MiB", listen=listen, secret=SECRET, connections_per_lane=1, peer_silence_s=30
    ) as node:
        peer = PythonPeer(g, node.addresses[0], scheme)
        yield node, peer
        peer.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_link(node: dualkv.Node, peer: PythonPeer) -> tuple[socket.socket, socket.socket]:
    connections = peer.open()
    eventually(lambda: any(link["connected"] for link in node.stats()["links"]))
    if peer.scheme == "shm":
        kind, body = receive_frame(connections[0])
        assert kind == "regions"
        check_region(node, body)
    return connections


def check_region(node: dualkv.Node, body: bytes) -> None:
    """One: the staging of a node that listens on shm. The node is in this process, so its fd can be looked at."""
    rows = [row for row in table(FORMATS, "regions") if row["field"] != "zero"]
    region = {name: number(value) for name, value in fields(body, rows).items()}
    info = os.stat(f"/proc/self/fd/{region['fd']}")
    assert region["id"] != 0
    assert (region["inode"], len(body)) == (info.st_ino, 32)
    assert 0 < node.stats()["staging"]["slots"] * node.geometry.file_bytes <= region["bytes"] <= info.st_size


def write_frame(peer: PythonPeer, grant: int, blocks: list[bytes], wrong: int = 0) -> bytes:
    """Layer 1 of the blocks: inline on tcp, two extents each on shm."""
    entries, payload = b"", b""
    keep = peer.__dict__.setdefault("keep", [])
    for i, block in enumerate(blocks):
        entries += struct.pack("<IIQ", i, 0, dualkv.checksum(block) ^ wrong)
        if peer.scheme == "tcp":
            payload += block
            continue
        memory = ctypes.create_string_buffer(block, len(block))
        keep.append(memory)
        at = ctypes.addressof(memory)
        entries += struct.pack("<QQQQ", at, 7, at + 7, len(block) - 7)
    extents = 0 if peer.scheme == "tcp" else 2
    body = struct.pack("<QQIIII", 41, grant, 1, len(blocks), extents, 0) + entries
    return frame("write" if peer.scheme == "tcp" else "write_ref", body) + payload


def done(connection: socket.socket) -> str:
    kind, body = receive_frame(connection)
    found = {name: number(value) for name, value in fields(body, table(FORMATS, "write_done")).items()}
    assert (kind, len(body), found["id"]) == ("write_done", 16, 41)
    return CODES[found["code"]]


Joined: TypeAlias = tuple[dualkv.Node, PythonPeer]


def test_a_peer_written_from_the_page_connects_and_writes(joined: Joined) -> None:
    node, peer = joined
    control, low = open_link(node, peer)
    kind, body = receive_frame(control)
    assert (kind, body[0]) == ("message", 0)
    view = parse(body[1:], table(FORMATS, "0 View: either to the other"))
    assert view["name"] == b"n"
    assert number(view["block_bytes"]) == peer.geometry.block_bytes
    assert number(view["tokens_per_block"]) == peer.geometry.tokens_per_block
    assert number(view["free_slots"]) == node.stats()["staging"]["free_slots"]
    assert number(view["prompt_slots"]) == node.stats()["staging"]["prompt_limit"]

    target = cache(peer.geometry, 4, seed=1)
    blocks = [block.tobytes() for block in cache(peer.geometry, 2, seed=2)[1]]
    grant = node.grant("python", dualkv.PagedKv(peer.geometry, target), [3, 1])
    low.sendall(write_frame(peer, grant.id, blocks))
    assert done(low) == "ok"
    grant.wait(1, 10)
    assert [target[1][3].tobytes(), target[1][1].tobytes()] == blocks

    low.sendall(write_frame(peer, grant.id, blocks, wrong=1))  # there already: not wanted
    assert done(low) == "ok"
    low.sendall(write_frame(peer, grant.id ^ 1, blocks))
    assert done(low) == "refused"
    again = node.grant("python", dualkv.PagedKv(peer.geometry, target), [3, 1])
    low.sendall(write_frame(peer, again.id, blocks[:1], wrong=1))
    assert done(low) == "corrupt"
    link = node.stats()["links"][0]
    assert (link["writes_rejected"], link["writes_corrupt"], link["connected"]) == (1, 1, True)


def test_a_malformed_load_is_answered_with_close(joined: Joined) -> None:
    node, peer = joined
    control, _ = open_link(node, peer)
    rows = table(FORMATS, "1 OpenLoad: PE to side")
    values = {"load": 5, "layers_per_read": 0}
    body = b"\1" + b"".join(values.get(row["field"], 0).to_bytes(int(row["size"]), "little") for row in rows)
    control.sendall(frame("message", body))
    kind, body = receive_frame(control)
    while body[0] == 0:  # views
        kind, body = receive_frame(control)
    assert (kind, body[0]) == ("message", 6)
    close = parse(body[1:], table(FORMATS, "6 CloseLoad: either to the other"))
    assert (number(close["load"]), CODES[number(close["code"])]) == (5, "invalid_argument")
    assert close["why"]


def test_the_wrong_secret_is_refused(joined: Joined) -> None:
    node, peer = joined
    _, kind, body = peer.shake(2, secret="guess")
    assert (kind, body) == ("refuse", b"the secrets differ")
    assert node.stats()["connections_refused"] == 1


def closed_by_node(connection: socket.socket) -> bool:
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def changed(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def hostile_starts(peer: PythonPeer) -> dict[str, bytes]:
    """First bytes of a connection that no peer sends."""
    hello = frame("hello", peer.hello(2))
    starts = {row["field"]: changed(hello, int(row["offset"])) for row in table(FORMATS, "Header")}
    starts |= {f"{name} too long": header(kind, size=LIMITS[name] + 1) for name, kind in TYPES.items()}
    starts |= {
        "unknown type": header(15),
        "body": changed(hello, 40),
        "not hello": frame("proof", bytes(32)),
        "left over": frame("hello", peer.hello(2) + b"\0"),
        "no name": frame("hello", peer.hello(2, name=b"")),
        "long name": frame("hello", peer.hello(2, name=bytes(129))),
        "index": frame("hello", peer.hello(0, index=1)),
        "role": frame("hello", peer.hello(3)),
    }
    return starts


def test_violations_close_the_connection(joined: Joined) -> None:
    node, peer = joined
    starts = hostile_starts(peer)
    for count, (what, start) in enumerate(starts.items(), 1):
        connection = peer.connect()
        connection.sendall(start)
        assert closed_by_node(connection), what
        eventually(lambda count=count: node.stats()["frames_hostile"] == count)  # type: ignore[misc]
    assert peer.shake(2)[1] == "welcome"


def test_a_malformed_message_closes_the_link(joined: Joined) -> None:
    node, peer = joined
    control, low = open_link(node, peer)
    control.sendall(frame("message", b"\7"))
    assert closed_by_node(control)
    assert closed_by_node(low)
    assert node.stats()["frames_hostile"] == 1


def test_frame_types_and_codes_are_those_of_the_code() -> None:
    wire = (ROOT / "cpp/transport/wire.h").read_text(encoding="utf-8")
    found = {snake(name): int(value) for name, value in re.findall(r"^  k(\w+) = (\d+),", wire, re.M)}
    assert found == TYPES
    status = (ROOT / "include/dualkv/status.h").read_text(encoding="utf-8")
    enum = re.search(r"enum class Code.*?{(.*?)};", status, re.S)
    assert enum
    assert [snake(name) for name in re.findall(r"^  k(\w+)", enum[1], re.M)] == list(CODES.values())
    assert list(CODES) == list(range(len(CODES)))


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


# --- links


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\[[^\]\n]*\]\(<?([^)>\s]+)", text):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target
