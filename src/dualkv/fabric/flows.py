"""TCP flows on a lane, each a process: what a model's collectives and KV would send, without either.

A connection begins with two bytes: what the server does (``e``: sends back what it gets; ``s``: counts it), and the
lane of what it sends.
"""

import contextlib
import json
import os
import socket
import socketserver
import sys
import threading
import time
from typing import Any

from dualkv.lanes import mark

_PIECE = 1 << 18
_CONNECT_S = 10.0
_LANE_BYTES = {"low": b"l", "high": b"h"}
_SO_MAX_PACING_RATE = 47


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        sock: socket.socket = self.request
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = sock.recv(2, socket.MSG_WAITALL)
            lane = {value: name for name, value in _LANE_BYTES.items()}.get(head[1:])
            if lane is None:
                return
            mark(sock, lane)
            if head[:1] == b"e":
                _before_others()
                self._echo(sock)
            elif head[:1] == b"s":
                self._count(sock)

    @staticmethod
    def _echo(sock: socket.socket) -> None:
        while data := sock.recv(_PIECE):
            sock.sendall(data)

    @staticmethod
    def _count(sock: socket.socket) -> None:
        buffer = bytearray(_PIECE)
        total, first, last = 0, 0.0, 0.0
        while got := sock.recv_into(buffer):
            last = time.monotonic()
            first = first or last
            total += got
        sock.sendall(json.dumps({"bytes": total, "seconds": last - first}).encode())


class FlowServer(socketserver.ForkingTCPServer):
    """Answers flows until it is closed. ``host`` "" for all addresses, ``port`` 0 for any.

    A process a connection: threads of one interpreter would wait for each other, and that would look like the network.
    """

    allow_reuse_address = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int = 0) -> None:
        super().__init__((host, port), _Connection)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


def _before_others() -> None:
    """Gets a core before other processes, if root: a message that waits for a core says nothing about the network."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _open(host: str, port: int, kind: bytes, lane: str) -> socket.socket:
    sock = socket.create_connection((host, port), _CONNECT_S)
    mark(sock, lane)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(kind + _LANE_BYTES[lane])
    return sock


def _exchange(sock: socket.socket, message: bytes) -> float:
    """Seconds until all of it is back."""
    begin = time.perf_counter()
    sock.sendall(message)
    left = len(message)
    while left:
        got = len(sock.recv(left))
        if not got:
            raise ConnectionResetError("the server has gone")
        left -= got
    return time.perf_counter() - begin


def echo(host: str, port: int, lane: str, size: int, seconds: float) -> list[float]:
    """Round trips of ``size`` bytes, one after the other, for so long: seconds each."""
    out = []
    message = b"x" * size
    _before_others()
    with _open(host, port, b"e", lane) as sock:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            out.append(_exchange(sock, message))
    return out


def rounds(host: str, port: int, lane: str, size: int, interval_s: float, until: threading.Event) -> list[float]:
    """Exchanges of ``size`` bytes, one every ``interval_s``, until the event: seconds each. A model's collectives."""
    out = []
    message = b"x" * size
    _before_others()
    with _open(host, port, b"e", lane) as sock:
        sock.settimeout(_CONNECT_S)
        begin = time.perf_counter()
        while not until.wait(max(0.0, begin + interval_s - time.perf_counter())):
            begin = time.perf_counter()
            out.append(_exchange(sock, message))
    return out


def flood(host: str, port: int, lane: str, connections: int, seconds: float, rate: int = 0) -> dict[str, float]:
    """As much as goes through, or ``rate`` bytes/s: ``{bytes, seconds}`` as the server counted them."""
    counted: list[dict[str, float]] = []
    end = time.monotonic() + seconds

    def one() -> None:
        data = b"x" * _PIECE
        with _open(host, port, b"s", lane) as sock:
            if rate:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate // connections)
            sock.settimeout(seconds + _CONNECT_S)
            while time.monotonic() < end:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            counted.append(json.loads(sock.makefile("rb").read()))

    threads = [threading.Thread(target=one) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counted) < connections:
        raise ConnectionResetError("a connection was lost")
    return {"bytes": sum(c["bytes"] for c in counted), "seconds": max(c["seconds"] for c in counted)}


def main(arguments: list[str]) -> Any:
    """A flow of this process: ``{"op": "serve" | "echo" | "rounds" | "flood", ...}``.

    A server and rounds go on until stdin ends.
    """
    request = json.loads(arguments[0])
    op = request.pop("op")
    if op == "serve":
        with FlowServer(**request) as server:
            print(json.dumps({"port": server.port}), flush=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            sys.stdin.read()
            return None
    if op == "rounds":
        until = threading.Event()

        def wait() -> None:
            sys.stdin.read()
            until.set()

        threading.Thread(target=wait, daemon=True).start()
        return rounds(**request, until=until)
    return echo(**request) if op == "echo" else flood(**request)


if __name__ == "__main__":
    try:
        answer = main(sys.argv[1:])
    except OSError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)
    if answer is not None:
        print(json.dumps(answer))
