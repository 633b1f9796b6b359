"""Checks of storage: io_uring, the file system at the path, one block written, read and compared."""

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import dualkv
from dualkv.doctor.check import GEOMETRY, STAGING_BYTES, Check, Context, explain, read_text
from dualkv.doctor.cures import FALLBACKS
from dualkv.sizes import format_size

_OPERATION_S = 5.0
_LITTLE_SPACE_BYTES = 1 << 30
_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "virtiofs"}
_SECCOMP = {"0": "off", "1": "strict", "2": "a filter"}


def _kernel_permissions(context: Context) -> str:
    """The two usual reasons why a kernel refuses io_uring."""
    sysctl = context.sysctl("kernel.io_uring_disabled")
    found = re.search(r"^Seccomp:\s+(\d)", read_text(context.proc / "self/status") or "", re.MULTILINE)
    return (
        f"kernel.io_uring_disabled={'absent' if sysctl is None else sysctl}, "
        f"seccomp: {_SECCOMP.get(found[1], found[1]) if found else 'unknown'}"
    )


def check_io_uring(context: Context) -> Iterator[Check]:
    """Opens a store that insists on io_uring."""
    names = ("io_uring build", "io_uring", "registered buffers")
    if context.any_root is None:
        yield from (Check(name, "absent", "not known: no directory can be written") for name in names)
        return
    try:
        store = dualkv.Store(f"file://{context.any_root}/uring", GEOMETRY, staging=STAGING_BYTES, backend="uring")
    except dualkv.Error as error:
        if error.code != "unsupported":
            raise
        yield from _io_uring_refused(context, error)
        return
    yield Check("io_uring build", "ok", "in this build")
    yield Check("io_uring", "ok", f"the kernel permits it; {_kernel_permissions(context)}")
    if store.stats()["registered"]:
        yield Check("registered buffers", "ok", f"{format_size(STAGING_BYTES)} of staging registered with the ring")
    else:
        fallback = FALLBACKS["uring_buffers_not_registered"]
        yield Check("registered buffers", "warn", f"refused: {fallback.what}", fallback.cure)


def _io_uring_refused(context: Context, error: dualkv.Error) -> Iterator[Check]:
    fact, cure = explain(error)
    cure = cure or FALLBACKS["no_uring"].cure
    if error.os_errno == 0:  # the kernel was not asked
        yield Check("io_uring build", "warn", fact, cure)
        yield Check("io_uring", "absent", f"not tried; {_kernel_permissions(context)}", cure)
    else:
        yield Check("io_uring build", "ok", "in this build")
        yield Check("io_uring", "warn", f"{fact}; {_kernel_permissions(context)}", cure)
    yield Check("registered buffers", "absent", "only with io_uring")


@dataclasses.dataclass(frozen=True)
class Mount:
    """A line of ``/proc/self/mountinfo``."""

    point: Path
    kind: str
    source: str

    @property
    def network(self) -> bool:
        """Whether its bytes are on another host, as far as the type tells; of FUSE it does not."""
        return self.kind in _NETWORK

    def describe(self) -> str:
        """``ext4 on / (/dev/sda1)``."""
        notes = {"tmpfs": ", in memory", "ramfs": ", in memory"}
        note = ", a network file system" if self.network else notes.get(self.kind, "")
        return f"{self.kind} on {self.point} ({self.source}){note}"


def mount_of(path: Path, mountinfo: str) -> Mount | None:
    """The mount that ``path`` (resolved) lies in: the longest point that holds it, of equals the last."""
    best = None
    for line in mountinfo.splitlines():
        left, found, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if not found or len(fields) < 5 or len(rest) < 2:
            continue
        unescaped = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text) for text in (fields[4], rest[1])]
        point = Path(unescaped[0])
        if path.is_relative_to(point) and (best is None or len(point.parts) >= len(best.point.parts)):
            best = Mount(point, rest[0], unescaped[1])
    return best


def check_file_system(context: Context) -> Iterator[Check]:
    """Type, read-only or not, and free space at the path."""
    mount = mount_of(context.path.resolve(), read_text(context.proc / "self/mountinfo") or "")
    described = mount.describe() if mount else "unknown file system"
    info = os.statvfs(context.path)
    if info.f_flag & os.ST_RDONLY:
        cure = f"`mount -o remount,rw {mount.point if mount else context.path}`, or another directory"
        yield Check("file system", "fail", f"{described}, read-only", cure)
    else:
        yield Check("file system", "ok", described)
    free, total = info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize
    detail = f"{format_size(free)} of {format_size(total)}"
    little = free < _LITTLE_SPACE_BYTES
    cure = "remove files or `dualkv store collect`; set the store's `quota`" if little else ""
    yield Check("free space", "warn" if little else "ok", detail, cure)


def check_store(context: Context) -> Iterator[Check]:
    """Opens a store at the path, saves a block, finds it, reads it, compares every byte."""
    names = ("O_DIRECT", "round trip")
    if context.store_root is None:
        cure = "check its permissions, or give another directory"
        yield Check(names[0], "absent", "not known: no store can be made here")
        yield Check(names[1], "fail", f"'{context.path}' can't be written: {context.refusal}", cure)
        return
    try:
        store = dualkv.Store(f"file://{context.store_root}/store", GEOMETRY, staging=4 * GEOMETRY.file_bytes)
        yield _direct(store)
        yield _round_trip(store)
    except dualkv.Error as error:
        fact, cure = explain(error)
        yield Check(names[1], "fail", fact, cure or "check the device and the kernel log (`dmesg`)")


def _direct(store: dualkv.Store) -> Check:
    stats = store.stats()
    if stats["direct"]:
        return Check("O_DIRECT", "ok", f"honoured, alignment {stats['alignment']} bytes")
    return Check("O_DIRECT", "warn", FALLBACKS["no_direct"].what, FALLBACKS["no_direct"].cure)


def _round_trip(store: dualkv.Store) -> Check:
    rng = np.random.default_rng()
    layers = [rng.integers(0, 256, (1, GEOMETRY.layer_bytes(i)), dtype=np.uint8) for i in range(GEOMETRY.layers)]
    keys = dualkv.block_keys(range(GEOMETRY.tokens_per_block), GEOMETRY)
    began = time.monotonic()
    store.save(keys, dualkv.PagedKv(GEOMETRY, layers), [0], deadline_s=_OPERATION_S).wait(_OPERATION_S)
    saved = time.monotonic()
    hit = store.match(keys)
    acquisition = store.staging.acquire(1)
    acquisition.wait(_OPERATION_S)
    slots = acquisition.slots()
    store.read(keys, slots, deadline_s=_OPERATION_S).wait(_OPERATION_S)
    ended = time.monotonic()
    image = np.asarray(memoryview(slots[0]))
    offsets = [GEOMETRY.layer_offset(i) for i in range(GEOMETRY.layers)]
    wrong = [i for i, at in enumerate(offsets) if not np.array_equal(image[at : at + layers[i].size], layers[i][0])]
    blocks, bad = store.verify()
    if hit != 1 or wrong or bad or blocks != 1:
        detail = f"saved 1 block, found {hit}, wrong layers {wrong}, verify: {blocks} blocks, bad {bad}"
        return Check("round trip", "fail", detail, "check the device and the kernel log (`dmesg`)")
    detail = (
        f"{format_size(GEOMETRY.file_bytes)} saved in {(saved - began) * 1e3:.1f} ms, found and read in "
        f"{(ended - saved) * 1e3:.1f} ms ({store.stats()['backend']}), every byte right"
    )
    return Check("round trip", "ok", detail)
