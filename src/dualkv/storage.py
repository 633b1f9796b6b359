"""The block store and the staging pool on their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from dualkv import _dualkv
from dualkv.errors import Error, invalid
from dualkv.geometry import KvGeometry
from dualkv.paged import PagedKv, block_ids_array
from dualkv.sizes import parse_size
from dualkv.waiting import Operation

_STORE_OPTIONS = {
    "backend",
    "direct",
    "depth",
    "read_limit",
    "quota",
    "in_use_grace_s",
    "forget_s",
    "durable",
    "save_queue",
    "fail_on_fallback",
    "faults",
}
_FAULTS = {"seed", "error_rate", "short_rate", "corrupt_rate", "drop_rate", "delay_rate", "delay_s"}
_STAGING_OPTIONS = {
    "transit_share",
    "lock_memory",
    "huge_pages",
    "shared",
    "chunk",
    "prepare_threads",
    "lazy",
    "lock_limit",
    "numa_node",
}


def root_of(url: str) -> str:
    """The directory of ``file:///directory``."""
    if not url.startswith("file:///"):
        raise invalid(f"store {url!r}: give file:///directory")
    return url.removeprefix("file://")


def check_options(given: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raises Error for a name that is not an option."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise invalid(f"{what}: unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def to_store_options(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the store as the core takes them: sizes in bytes."""
    check_options(options, _STORE_OPTIONS, "store")
    out = {"root": root_of(url), **options}
    for name in ("read_limit", "quota"):
        if name in out:
            out[name] = parse_size(out[name])
    check_options(out.get("faults", {}), _FAULTS, "store faults")
    return out


def to_staging_options(size: int | str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the staging pool as the core takes them."""
    check_options(options, _STAGING_OPTIONS, "staging")
    out = {"bytes": parse_size(size), **options}
    for name in ("chunk", "lock_limit"):
        if name in out:
            out[name] = parse_size(out[name])
    return out


class Acquisition(Operation):
    """Staging slots that were asked for."""

    def slots(self) -> list[Any]:
        """The slots, once: each is a writable buffer of one block file. They return to the pool when dropped."""
        return list(self._core.slots())

    def wait(self, timeout_s: float | None = None) -> None:
        """As :meth:`Operation.wait`; after a timeout the place in line is given up."""
        try:
            super().wait(timeout_s)
        except Error:
            self._core.withdraw()
            raise


class StagingPool:
    """Registered, page-aligned slots of one Full Block (with its trailer) each.

    Args:
        geometry: fixes the size of a slot.
        size: of the pool, at least two slots: bytes or like ``"64MiB"``.
        options: ``transit_share``, ``lock_memory``, ``huge_pages``, ``shared``, ``lazy`` ... (docs/settings.md).
    """

    def __init__(self, geometry: KvGeometry, size: int | str, **options: Any) -> None:
        self._core = _dualkv.StagingPool(geometry, to_staging_options(size, options))

    def acquire(self, count: int) -> Acquisition:
        """Asks for slots, all or nothing, first come first served.

        Raises:
            Error: ``invalid_argument`` if the pool can never give so many.
        """
        return Acquisition(self._core.acquire(count))

    def stats(self) -> dict[str, Any]:
        """Slots in all and free, who waits, what kind of memory it is."""
        return dict(self._core.stats())

    @classmethod
    def _of(cls, core: Any) -> "StagingPool":
        pool = cls.__new__(cls)
        pool._core = core
        return pool


class Store:
    """Full Blocks as files under a root that any number of nodes may share (docs/formats.md).

    Args:
        url: ``file:///directory``; created if its parent exists.
        geometry: of the blocks.
        staging: the pool that reads and saves go through, or the size of a new one.
        options: ``backend``, ``direct``, ``depth``, ``read_limit``, ``quota`` ... (docs/settings.md).

    Raises:
        Error: ``io`` when the root can't be written, ``invalid_argument`` when it holds another geometry.
    """

    def __init__(
        self, url: str, geometry: KvGeometry, *, staging: "StagingPool | int | str" = "64MiB", **options: Any
    ) -> None:
        checked = to_store_options(url, options)
        pool = staging if isinstance(staging, StagingPool) else StagingPool(geometry, staging)
        self._core = _dualkv.Store(geometry, checked, pool._core)

    @classmethod
    def _of(cls, core: Any) -> "Store":
        store = cls.__new__(cls)
        store._core = core
        return store

    @property
    def staging(self) -> StagingPool:
        """The pool reads go through."""
        return StagingPool._of(self._core.pool)

    def match(self, keys: Sequence[bytes]) -> int:
        """Length in blocks of the longest stored prefix of ``keys``. O(log n) look-ups; marks the hit as used."""
        return int(self._core.match(list(keys)))

    def contains(self, key: bytes) -> bool:
        """Whether the block is stored."""
        return bool(self._core.contains(key))

    def read(
        self,
        keys: Sequence[bytes],
        slots: Sequence[Any],
        *,
        layers: tuple[int, int] | None = None,
        deadline_s: float = 30,
    ) -> Operation:
        """Reads a block into each slot and verifies it. Layer ``i`` lies at ``geometry.layer_offset(i)``.

        Args:
            layers: (first, count); all if left out.
            deadline_s: after this the operation fails with ``timeout``; the slots stay out of use until the kernel
                is done with them.
        """
        first, count = layers if layers is not None else (0, self._core.geometry.layers)
        return Operation(self._core.read(list(keys), list(slots), first, count, deadline_s))

    def save(
        self,
        keys: Sequence[bytes],
        source: PagedKv,
        block_ids: ArrayLike,
        *,
        parent: bytes = b"",
        deadline_s: float = 30,
    ) -> Operation:
        """Saves blocks ``block_ids[i]`` of ``source`` under ``keys[i]``; those stored already are skipped.

        The bytes are copied before the call returns (it may wait for staging, up to the deadline), so the cache may
        change at once; the operation ends when the files are published.

        Args:
            parent: the key before ``keys[0]`` in its chain.
        """
        return Operation(self._core.save(list(keys), source, block_ids_array(block_ids), parent, deadline_s))

    def save_slots(self, keys: Sequence[bytes], slots: Sequence[Any], *, parent: bytes = b"") -> Operation:
        """Saves Full Blocks that lie in slots, without a copy."""
        return Operation(self._core.save_slots(list(keys), list(slots), parent))

    def remove(self, key: bytes) -> bool:
        """Removes one block; False if it was not there. What continues it becomes unreachable."""
        return bool(self._core.remove(key))

    def quarantine(self, key: bytes) -> bool:
        """Moves a block aside as ``<key>.corrupt``: a miss for every node, healed by the next save."""
        return bool(self._core.quarantine(key))

    def verify(self) -> tuple[int, list[str]]:
        """Reads every block of the namespace: how many there are, and ``"key: reason"`` of the bad ones."""
        blocks, bad = self._core.verify()
        return int(blocks), list(bad)

    def collect(self, quota: int | str) -> int | None:
        """Evicts by last use until the namespace fits, children before parents, never a block in use.

        Returns:
            Blocks evicted; None if another process is collecting.
        """
        evicted = self._core.collect(parse_size(quota))
        return None if evicted is None else int(evicted)

    def stats(self) -> dict[str, Any]:
        """Counters, what the file descriptors really are (``direct``, ``backend``), and fallbacks."""
        return dict(self._core.stats())
