"""A storage NIC for a node: the kernel's block layer holds its processes' reads to a rate. Needs root."""

import contextlib
import errno
import os
import pathlib
import time

from dualkv.errors import Error, invalid

_V1 = pathlib.Path("/sys/fs/cgroup/blkio")
_V2 = pathlib.Path("/sys/fs/cgroup")
_BLOCK_DEVICES = pathlib.Path("/sys/dev/block")
_REMOVE_S = 5.0


class ReadLimit:
    """A cgroup whose processes read at most ``rate`` bytes/s, together, from the disk under ``path``.

    A context manager. ``blkio.throttle`` of cgroup v1, ``io.max`` of v2. What comes out of the page cache is not held
    back: read with O_DIRECT.

    Raises:
        Error: ``unsupported``, with the cure, where the kernel can't (no root, no io controller, no disk under
            ``path``); ``invalid_argument``.
    """

    def __init__(self, name: str, path: str | os.PathLike[str], rate: int) -> None:
        if rate < 1:
            raise invalid(f"testbed: storage of {rate} bytes/s: must be 1 or more")
        self._path, self._rate = path, rate
        self._v1 = (_V1 / "blkio.throttle.read_bps_device").exists()
        self._group = (_V1 if self._v1 else _V2) / name

    def prefix(self) -> list[str]:
        """Put before a command, runs it within the limit."""
        return ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh"]

    def __enter__(self) -> "ReadLimit":
        device = _disk_under(self._path)
        try:
            if not self._v1:
                (_V2 / "cgroup.subtree_control").write_text("+io")
            self._group.mkdir()
            if self._v1:
                (self._group / "blkio.throttle.read_bps_device").write_text(f"{device} {self._rate}")
            else:
                (self._group / "io.max").write_text(f"{device} rbps={self._rate}")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._group.rmdir()
            raise Error(
                f"testbed: can't limit reads of {os.fspath(self._path)!r} in {str(self._group)!r}: {error.strerror}; "
                "it needs root and the kernel's io controller",
                "unsupported",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Waits a little for the processes that have just ended."""
        end = time.monotonic() + _REMOVE_S
        while True:
            try:
                self._group.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise Error(f"testbed: {str(self._group)!r} has processes that do not end", "io") from error
                time.sleep(0.02)


def remove_group(name: str) -> None:
    """Removes what a process that is gone has left; what still has processes stays."""
    for root in (_V1, _V2):
        with contextlib.suppress(OSError):
            (root / name).rmdir()


def groups(pattern: str) -> list[str]:
    """Names of groups that are there."""
    return [found.name for root in (_V1, _V2) for found in root.glob(pattern)]


def _disk_under(path: str | os.PathLike[str]) -> str:
    """``MAJOR:MINOR`` of the whole disk: limits are not for partitions."""
    try:
        number = os.stat(path).st_dev
    except OSError as error:
        raise invalid(f"testbed: {os.fspath(path)!r}: {error.strerror}") from error
    name = f"{os.major(number)}:{os.minor(number)}"
    entry = _BLOCK_DEVICES / name
    if not entry.exists():
        raise Error(
            f"testbed: {os.fspath(path)!r} is on no disk of its own (tmpfs, overlay?): choose a folder on one",
            "unsupported",
        )
    real = entry.resolve()
    return (real.parent / "dev").read_text().strip() if (real / "partition").exists() else name
