"""A process of the benchmark that answers JSON lines; it never outlives, nor blocks, the one that started it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dualkv.errors import Error

_END_S = 5.0


class JsonProcess:
    """Calls of a child, one at a time. Use it as a context manager: the child is killed if it does not end by itself.

    The child reads ``{"op": ..., **arguments}`` a line and answers ``{"result": ...}`` or ``{"error": text}``; it ends
    with its standard input. A request must fit into a pipe (64 KiB). Not thread-safe.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._unread = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(env or {})},
                bufsize=0,
            )
        except OSError as error:
            self._errors.close()
            raise Error(f"{name}: can't start {command[0]!r}: {error.strerror}", "io", error.errno or 0) from error

    def call(self, op: str, *, timeout_s: float = 60, **arguments: Any) -> Any:
        """The child's answer.

        Raises:
            Error: ``io`` with what the child says went wrong, ``peer_lost`` if it ended, ``timeout``.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"op": op, **arguments}) + "\n").encode())
        except BrokenPipeError as error:
            raise self._lost() from error
        answer = json.loads(self._line(op, time.monotonic() + timeout_s))
        if "error" in answer:
            raise Error(f"{self._name}: {answer['error']}", "io")
        return answer["result"]

    def _line(self, op: str, deadline: float) -> bytes:
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1e3):
                self._process.kill()
                raise Error(f"{self._name}: no answer to {op!r} in time; killed", "timeout")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise self._lost()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _lost(self) -> Error:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return Error(f"{self._name}: ended with {code}{': ' + said[-1] if said else ''}", "peer_lost")

    def pause(self) -> None:
        """Stops it (SIGSTOP) until :meth:`resume`: a peer that polls while it is idle must not slow the others."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the child: asks by closing its input, then kills. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.resume()
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "JsonProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answer_calls(target: Any) -> None:
    """The child's side: each call is a method of ``target``. Returns when standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(target, request.pop("op"))(**request)}
        except (Error, MemoryError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
