"""``dualkv bench peers``: transfers and storage reads beside released peers, same blocks, same order, interleaved."""

from dataclasses import dataclass

from dualkv.bench import machine, released, storage, transfer
from dualkv.bench.blocks import check_block_bytes
from dualkv.bench.measure import Peers, Stage
from dualkv.bench.results import BenchResult, Row
from dualkv.bench.storage import StorageOptions
from dualkv.bench.transfer import TransferCase, TransferOptions
from dualkv.errors import Error

NIXL_TCP, NIXL_ALL, MOONCAKE_TCP = "NIXL UCX tcp", "NIXL UCX all", "Mooncake tcp"
_RUNNERS = {"nixl": "nixl-xfer", "mooncake": "mooncake"}
_ALIGNMENT = 4096  # the same blocks are read from storage


@dataclass(frozen=True)
class PeersOptions:
    """What to measure. Sizes in bytes."""

    path: str
    nixl_python: str | None = None
    mooncake_python: str | None = None
    block_bytes: tuple[int, ...] = (64 << 10, 1 << 20)
    total: int = 256 << 20
    count: int | None = None
    connections: int = 2
    depth: int = 0
    direct: bool = True
    repeats: int = 7
    warmup: int = 1

    @property
    def storage(self) -> StorageOptions:
        """Of the part that reads files."""
        return StorageOptions(
            path=self.path,
            block_bytes=self.block_bytes,
            total=self.total,
            count=self.count,
            depth=(self.depth,),
            direct=self.direct,
            repeats=self.repeats,
            warmup=self.warmup,
        )

    @property
    def transfer(self) -> TransferOptions:
        """Of the part that sends blocks."""
        return TransferOptions(
            transport=("tcp", "shm"),
            memory=("shared",),
            checksums=("known",),
            block_bytes=self.block_bytes,
            total=self.total,
            count=self.count,
            connections=(self.connections,),
            repeats=self.repeats,
            warmup=self.warmup,
        )

    def check(self) -> None:
        """Raises Error before anything is touched."""
        check_block_bytes(self.block_bytes, _ALIGNMENT)
        self.storage.check()
        self.transfer.check()


def find_peers(options: PeersOptions, result: BenchResult) -> dict[str, str]:
    """The interpreter of each peer that can be imported; the labels say which version, or why not.

    Raises:
        Error: ``unsupported`` when there is none.
    """
    found: dict[str, str] = {}
    for peer, kind in _RUNNERS.items():
        python = released.python_of(peer, getattr(options, f"{peer}_python"))
        try:
            if python is None:
                raise Error(f"not installed here; give --{peer}-python", "unsupported")
            result.labels[f"peer {peer}"] = released.version(kind, python)
            found[peer] = python
        except Error as error:
            result.labels[f"peer {peer}"] = f"missing: {error}"
    if not found:
        raise Error(
            "peers: " + "; ".join(f"{peer} {result.labels[f'peer {peer}']}" for peer in _RUNNERS), "unsupported"
        )
    return found


def run_peers(options: PeersOptions, stage: Stage) -> BenchResult:
    """All cases; a peer that is missing or fails leaves nulls. Raises Error."""
    options.check()
    topology = "storage: 1 process; transfer: 1 node to another, 2 processes of this machine"
    result = BenchResult("peers", machine.labels(transport="tcp,shm", topology=topology, path=options.path), [])
    found = find_peers(options, result)
    result.labels["idle peers"] = "stopped (SIGSTOP) while others run: some poll"
    for case in options.transfer.cases():
        rows = transfer.measure_case(case, options.warmup, options.repeats, _senders(case, found), result, stage)
        result.rows += _named("transfer", rows)
    for block_bytes in options.block_bytes:
        result.rows += _named("storage", _storage_rows(options.storage, block_bytes, found, result, stage))
    return result


def _storage_rows(
    options: StorageOptions, block_bytes: int, found: dict[str, str], result: BenchResult, stage: Stage
) -> list[Row]:
    with storage.block_files(options.path, block_bytes, options.blocks(block_bytes)) as files:
        reader = storage.Reader(files, options.depth[0], options.direct)
        peers = storage.peers_of(reader, found.get("nixl")) or {storage.NIXL: None}
        rows = storage.measure_case(reader, options, peers, result, stage)
        result.add_fallbacks(reader.fallbacks())
        result.labels["page cache"] = reader.page_cache
        return rows


def _senders(case: TransferCase, found: dict[str, str]) -> Peers:
    """What runs beside this case, the missing included."""
    wanted = {
        "tcp": {NIXL_TCP: ("nixl", {"UCX_TLS": "tcp,self"}), MOONCAKE_TCP: ("mooncake", {})},
        "shm": {NIXL_ALL: ("nixl", {"UCX_TLS": "all"})},
    }[case.transport]
    return {
        name: released.transfer_peer(_RUNNERS[peer], found[peer], case.block_bytes, case.count, env)
        if peer in found
        else None
        for name, (peer, env) in wanted.items()
    }


def _named(bench: str, rows: list[Row]) -> list[Row]:
    for row in rows:
        row.case = {"bench": bench, **row.case}
    return rows
