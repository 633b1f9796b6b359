"""What storage, memory and sockets give to a bare loop: the denominators of benchmarks.

None of dualkv's machinery takes part. As a program, this module is the receiving process of :class:`RawSockets`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dualkv import _dualkv
from dualkv.errors import Error, invalid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_PAGE_BYTES = 4096
_START_S = 30  # an interpreter, and memory to fault in
_STALL_S = 10  # without a byte moved
_END_S = 2


@dataclass(frozen=True)
class Sample:
    """One run of a limit loop.

    Attributes:
        seconds: wall time; memory was allocated, faulted in and registered before.
        cpu_s: CPU seconds of all threads that worked, on both sides.
        bytes: moved in all.
        latencies_us: of each storage read, from submission to reaping, in order of completion; else empty.
    """

    seconds: float
    cpu_s: float
    bytes: int
    latencies_us: tuple[float, ...] = ()

    @property
    def gbps(self) -> float:
        """10**9 bytes a second."""
        return self.bytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for 10**9 bytes."""
        return self.cpu_s / (self.bytes / 1e9)


def _to_sample(core: Any) -> Sample:
    return Sample(core.seconds, core.cpu_s, core.bytes, tuple(core.latencies_us))


def _checked(name: str, value: int, limit: int = 2**63) -> int:
    if not 0 < value < limit:
        raise invalid(f"{name} = {value}: must be at least 1 and less than {limit}")
    return int(value)


def _offsets(name: str, offsets: "ArrayLike") -> "np.ndarray[Any, np.dtype[np.uint64]]":
    array = np.asarray(offsets)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0):
        raise invalid(f"{name}: integers of at least 0 are needed, got {array.dtype}")
    return array.astype(np.uint64, copy=False)


def read_file(
    path: str | os.PathLike[str],
    block_bytes: int,
    offsets: "ArrayLike",
    *,
    depth: int = 32,
    direct: bool = True,
    keep: bool = True,
) -> Sample:
    """Reads one block of ``block_bytes`` at each of ``offsets``, in that order, ``depth`` of them in flight.

    One thread and one io_uring, with registered buffers and a registered file. CPU time is that of the whole process,
    so nothing else should run in it.

    Args:
        block_bytes: of each read, at most 2**30.
        offsets: in bytes, ``[n]``.
        depth: reads in flight, at most 1024.
        keep: each read has memory of its own, as when the data is kept; all of it is registered and must fit the
            memlock limit. False: ``depth`` buffers are used over and over. Where the CPU copies what storage delivers
            (virtual disks, the page cache), they stay in its cache: faster than anything that delivers the data.
        direct: past the page cache; then offsets and ``block_bytes`` are multiples of the device's logical block.

    Raises:
        Error: ``io``, naming the offset, for a failed or a short read; ``unsupported`` without io_uring, or where the
            kernel or the file system refuses what is asked.
    """
    return _to_sample(
        _dualkv.limits.read_file(
            os.fspath(path),
            _checked("block_bytes", block_bytes),
            _offsets("offsets", offsets),
            _checked("depth", depth, 2**32),
            direct,
            keep,
        )
    )


def checksum_memory(bytes: int, block_bytes: int) -> Sample:
    """One pass of dualkv's checksum over ``bytes`` of memory in huge pages, in blocks of ``block_bytes``.

    One thread; the blocks come in a scattered order, each once.
    """
    return _to_sample(_dualkv.limits.checksum_memory(_checked("bytes", bytes), _checked("block_bytes", block_bytes)))


class CopyArena:
    """Two private mappings of ``bytes`` each, faulted in, for runs of :meth:`run`. One thread at a time.

    Args:
        huge_pages: transparent huge pages where the machine has them; otherwise 4 KiB pages even if it has.
    """

    def __init__(self, bytes: int, huge_pages: bool = True) -> None:
        self._core = _dualkv.limits.CopyArena(_checked("bytes", bytes), huge_pages)

    def run(self, block_bytes: int, source_offsets: "ArrayLike", target_offsets: "ArrayLike") -> Sample:
        """Copies blocks of ``block_bytes`` from each source to the target beside it, with memcpy on this thread.

        Offsets are in bytes, ``[n]``, the targets' in the other mapping. ``bytes`` of the sample counts what was
        copied once, though memory both reads and writes it.
        """
        sources, targets = _offsets("source_offsets", source_offsets), _offsets("target_offsets", target_offsets)
        return _to_sample(self._core.run(_checked("block_bytes", block_bytes), sources, targets))


class GpuArena:
    """Pinned memory, as much of a GPU's, and ``count`` blocks that go from one to the other in scattered order.

    Every run blocks until the last byte is there. One thread at a time.

    Raises:
        Error: ``unsupported`` without such a GPU; ``io`` where there is not so much memory.
    """

    def __init__(self, block_bytes: int, count: int, *, gpu: int = 0, to_gpu: bool = True) -> None:
        self._core = _dualkv.limits.GpuArena(
            gpu, to_gpu, _checked("block_bytes", block_bytes), _checked("count", count)
        )

    def run(self, engine: str, *, verify: bool = False) -> tuple[Sample, float]:
        """All blocks by one engine (``gpu_copy``), and seconds until the calls for that had returned.

        Args:
            verify: also sum up the blocks in the GPU's memory, as ``gpu_verify`` does.

        Raises:
            Error: ``unsupported`` where the engine can't be had.
        """
        core = self._core.run_verified(engine) if verify else self._core.run(engine)
        return _to_sample(core.sample), float(core.submit_s)

    @property
    def memory(self) -> int:
        """The address of the GPU's memory: blocks one behind the other. Nothing runs while it is used otherwise."""
        return int(self._core.memory)

    def one_copy(self) -> Sample:
        """As many bytes by one call: what the link gives."""
        return _to_sample(self._core.one_copy().sample)

    def moves_the_right_bytes(self, engine: str) -> bool:
        """Fills the source with noise, copies, and compares."""
        return bool(self._core.moves_the_right_bytes(engine))


def copy_memory(
    block_bytes: int, source_offsets: "ArrayLike", target_offsets: "ArrayLike", *, bytes: int, huge_pages: bool = True
) -> Sample:
    """One run of a :class:`CopyArena` of its own."""
    return CopyArena(bytes, huge_pages).run(block_bytes, source_offsets, target_offsets)


def _prepare(stream: socket.socket) -> None:
    stream.setblocking(True)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A process that was stopped must not hang the other one.
    timeout = struct.pack("@ll", _STALL_S, 0)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


def _connected_pairs(count: int, closing: contextlib.ExitStack) -> list[tuple[socket.socket, socket.socket]]:
    """TCP connections over 127.0.0.1, both ends of each."""
    pairs = []
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        for _ in range(count):
            near = closing.enter_context(socket.create_connection(listener.getsockname(), timeout=_STALL_S))
            far, address = listener.accept()
            closing.enter_context(far)
            if address != near.getsockname():
                raise Error(f"a stranger at {address} connected first; try again", "refused")
            _prepare(near)
            _prepare(far)
            pairs.append((near, far))
    return pairs


class RawSockets:
    """What ``streams`` TCP connections over 127.0.0.1 carry to another process. A context manager; one thread.

    Each side has one blocking thread a stream, which sends from, or receives into, its own part of ``memory_bytes`` of
    faulted-in memory (huge pages), ``chunk_bytes`` a call.

    Raises:
        Error: ``io`` when the sockets or the process can't be made.
    """

    def __init__(self, streams: int, chunk_bytes: int = 1 << 20, memory_bytes: int = 256 << 20) -> None:
        _checked("streams", streams, 1024)
        self._chunk_bytes = _checked("chunk_bytes", chunk_bytes)
        if memory_bytes < streams * _PAGE_BYTES:
            raise invalid(f"memory_bytes = {memory_bytes}: must hold {_PAGE_BYTES} bytes a stream")
        self._core = _dualkv.limits.SocketLimit(_checked("memory_bytes", memory_bytes))
        with contextlib.ExitStack() as closing:
            try:
                pairs = _connected_pairs(streams, closing)
                far = [theirs.fileno() for _, theirs in pairs]
                self._child = _start_receiver(far, chunk_bytes, memory_bytes)
            except OSError as error:
                raise Error(f"{streams} streams to another process: {error}", "io", error.errno or 0) from error
            closing.callback(_end, self._child)
            self._answer(_START_S)
            for _, theirs in pairs:
                theirs.close()  # so that the receiver's end is the connection's end
            self._streams = [ours for ours, _ in pairs]
            self._closing = closing.pop_all()

    @property
    def pid(self) -> int:
        """The receiving process."""
        return self._child.pid

    def run(self, bytes: int) -> Sample:
        """Sends ``bytes`` in all; timed from the first send until the receiver has said that it has every byte.

        Raises:
            Error: ``peer_lost`` when the receiver ended, ``timeout`` when it stopped moving, ``invalid_argument`` when
                this is closed. After the first two it is closed.
        """
        if not self._streams:
            raise invalid("sockets: closed; make another RawSockets")
        _checked("bytes", bytes)
        try:
            self._ask(bytes)
            sent = self._core.send([stream.fileno() for stream in self._streams], bytes, self._chunk_bytes)
            received = self._answer(_STALL_S)
        except BaseException:
            self.close()
            raise
        return Sample(sent.seconds, sent.cpu_s + received["cpu_s"], sent.bytes)

    def close(self) -> None:
        """Ends the receiver: by closing what it listens to, and if that is not enough in 2 s, by killing it."""
        for stream in self._streams:
            stream.close()
        self._streams = []
        self._closing.close()

    def __enter__(self) -> "RawSockets":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, bytes: int) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{bytes}\n")
            self._child.stdin.flush()
        except OSError as error:
            raise Error("sockets: the receiver ended", "peer_lost", error.errno or 0) from error
        self._answer(_STALL_S)

    def _answer(self, timeout_s: float) -> Any:
        """The receiver's next line: it answers one at a time, so none waits behind another."""
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], timeout_s)
        if not ready:
            raise Error(f"sockets: the receiver did not answer within {timeout_s} s", "timeout")
        line = self._child.stdout.readline()
        if not line:
            raise Error("sockets: the receiver ended; its last words are on stderr", "peer_lost")
        return json.loads(line)


def _start_receiver(fds: list[int], chunk_bytes: int, memory_bytes: int) -> "subprocess.Popen[str]":
    settings = json.dumps({"fds": fds, "chunk_bytes": chunk_bytes, "memory_bytes": memory_bytes})
    return subprocess.Popen(
        [sys.executable, "-m", "dualkv.bench.limits", settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        text=True,
    )


def _end(child: "subprocess.Popen[str]") -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(OSError):  # it may have ended with a line unread
        child.stdin.close()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _receive(fds: list[int], chunk_bytes: int, memory_bytes: int) -> None:
    """Answers ``{}`` when it is ready, and for each line of bytes to come: ``{}`` at once, and then its CPU seconds."""
    core = _dualkv.limits.SocketLimit(memory_bytes)
    print("{}", flush=True)
    for line in sys.stdin:
        print("{}", flush=True)
        sample = core.receive(fds, int(line), chunk_bytes)
        print(json.dumps({"cpu_s": sample.cpu_s}), flush=True)


def main() -> None:
    """The receiving process. It ends when its input or a stream does."""
    # Python would note Ctrl-C only after the transfer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _receive(**json.loads(sys.argv[1]))
    except (Error, BrokenPipeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
