"""Engine processes and the requests they are sent."""

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualkv.errors import Error
from dualkv.testbed import Testbed

_MAX_LINE_BYTES = 64 << 20
_RDMA_DEVICES = Path("/sys/class/infiniband")


def split_topology(text: str) -> tuple[int, int] | None:
    """Prefill and decode of ``"1P2D"``; None if it is none."""
    prefill, _, decode = text.upper().removesuffix("D").partition("P")
    return (int(prefill), int(decode)) if prefill.isdecimal() and decode.isdecimal() else None


@dataclass(frozen=True)
class Topology:
    """How many prefill and decode engines: ``1P2D``."""

    prefill: int
    decode: int

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From ``"1P2D"``; ValueError names what is wrong."""
        engines = split_topology(text)
        if engines is None or not all(1 <= count <= 8 for count in engines):
            raise ValueError(f"topology {text!r}: give it like 1P1D, with 1 to 8 engines of a kind")
        return cls(*engines)

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


class EngineProcess:
    """One worker process: ``await call(op, ...)``."""

    def __init__(
        self, name: str, role: str, on_sample: Callable[[str, dict[str, Any]], None], prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.role = role
        self.pid = 0
        self._on_sample = on_sample
        self._prefix = prefix
        self._process: asyncio.subprocess.Process | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._ready: asyncio.Future[None] | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, config: dict[str, Any]) -> None:
        """Starts the process and waits until its model is built."""
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *self._prefix,
            sys.executable,
            "-m",
            "dualkv.engines.worker",
            self.role,
            json.dumps(config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid
        self._reader = asyncio.create_task(self._read())
        await self._ready

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._ready is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if message.get("event") == "ready":
                self._ready.set_result(None)
            elif message.get("event") == "sample":
                self._on_sample(self.name, message)
            else:
                future = self._pending.pop(message["id"])
                if future.done():
                    continue
                if "error" in message:
                    future.set_exception(Error(f"{self.name}: {message['error']['message']}", message["error"]["code"]))
                else:
                    future.set_result(message["result"])
        lost = Error(f"{self.name}: the process ended", "peer_lost")
        for future in [self._ready, *self._pending.values()]:
            if not future.done():
                future.set_exception(lost)
        self._pending.clear()

    async def call(self, op: str, **arguments: Any) -> Any:
        """Sends one request; returns its result. Raises Error, ``peer_lost`` if the process is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._last += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[self._last] = future
        try:
            self._process.stdin.write((json.dumps({"id": self._last, "op": op, **arguments}) + "\n").encode())
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Error(f"{self.name}: the process is gone", "peer_lost") from error
        return await future

    async def stop(self) -> None:
        """Ends the process; kills it if it does not end by itself."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            with contextlib.suppress(asyncio.CancelledError, Error):
                await self._reader


class Cluster:
    """Prefill and decode engines of one machine, as processes: with a testbed each on a node of its own.

    ``devices`` are those that torch engines compute on, in turn.
    """

    def __init__(
        self,
        topology: Topology,
        config: dict[str, Any],
        bed: Testbed | None = None,
        devices: Sequence[str] = ("cpu",),
    ) -> None:
        self.topology = topology
        self._devices = devices
        self._config = config
        self.samples: list[tuple[str, float, int]] = []  # engine, time, bytes read
        self._bed = bed
        self._secret = {"secret": secrets.token_hex(16)} if bed else {}  # nodes that others could reach ask for one
        self.prefill = [self._engine("prefill", i, i) for i in range(topology.prefill)]
        self.decode = [self._engine("decode", i, topology.prefill + i) for i in range(topology.decode)]

    def _engine(self, role: str, number: int, node: int) -> EngineProcess:
        prefix = self._bed.prefix(node) if self._bed else ()
        return EngineProcess(f"{role}-{number}", role, self._sample, prefix)

    @property
    def engines(self) -> list[EngineProcess]:
        """All of them, prefill first."""
        return self.prefill + self.decode

    def _sample(self, name: str, sample: dict[str, Any]) -> None:
        self.samples.append((name, sample["t"], sample["bytes_read"]))

    async def __aenter__(self) -> "Cluster":
        try:
            devices = itertools.cycle(self._devices)
            configs = [{**self._config, "device": next(devices)} for _ in self.engines]
            await asyncio.gather(*(engine.start(c) for engine, c in zip(self.engines, configs, strict=True)))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    async def open(self, root: str, transport: str, sockets: str, options: dict[str, Any]) -> None:
        """New nodes over ``root``, linked: each prefill engine to all decode engines and to the other prefills."""
        addresses: dict[str, str] = {}
        devices = sorted(path.name for path in _RDMA_DEVICES.glob("*")) if transport == "rdma" else []
        for node, engine in enumerate(self.engines):
            host = self._bed.address(node) if self._bed else "127.0.0.1"
            listen = f"shm://{sockets}/{engine.name}.sock" if transport == "shm" else f"{transport}://{host}:0"
            node_options: dict[str, Any] = dict(self._secret)
            if devices:  # in turn, as if each node had its own
                node_options["rdma_options"] = {"devices": devices[node % len(devices)]}
            opened = await engine.call(
                "open", name=engine.name, root=root, listen=[listen], node_options=node_options, **options
            )
            addresses[engine.name] = opened["addresses"][0]
        for i, engine in enumerate(self.prefill):
            for peer in self.decode + self.prefill[:i]:
                await engine.call("connect", address=addresses[peer.name])

    async def close_nodes(self) -> None:
        """Ends the nodes; the processes stay."""
        await asyncio.gather(*(engine.call("close") for engine in self.engines))
