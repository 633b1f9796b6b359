"""The servers behind the router, and which of them takes a request."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dualkv.errors import invalid


@dataclass
class Server:
    """An inference server, and where its dualkv node listens.

    Args:
        url: of its OpenAI API, ``http://host:port``.
        node: name of its node; empty where nobody hands anything to it.
        address: of its node, like ``tcp://host:port``.
    """

    url: str
    node: str = ""
    address: str = ""
    requests: int = 0
    load: int = 0  # outstanding prompt characters: what is asked of it and not answered
    failures: int = 0  # in a row
    out_until: float = 0

    @classmethod
    def parse(cls, text: str) -> "Server":
        """``http://host:port`` or ``http://host:port=node@tcp://host:port``.

        Raises:
            Error: ``invalid_argument``.
        """
        url, _, rest = text.partition("=")
        node, at, address = rest.partition("@")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or (rest and not (node and at and address)):
            raise invalid(f"server {text!r}: give http://host:port or http://host:port=node@tcp://host:port")
        return cls(url.rstrip("/"), node, address)

    @property
    def up(self) -> bool:
        """Whether it is asked; one that failed is left alone for a while."""
        return time.monotonic() >= self.out_until

    def failed(self) -> None:
        """It could not be reached, or broke off."""
        self.failures += 1
        self.out_until = time.monotonic() + min(30.0, 0.5 * 2 ** min(self.failures, 6))

    def answered(self) -> None:
        """It is well."""
        self.failures = 0
        self.out_until = 0

    @contextmanager
    def busy(self, load: int) -> Iterator[None]:
        """Counts a request of ``load`` prompt characters as long as it lasts."""
        self.requests += 1
        self.load += load
        try:
            yield
        finally:
            self.requests -= 1
            self.load -= load

    def status(self) -> dict[str, Any]:
        """For ``/status``."""
        return {
            "url": self.url,
            "node": self.node,
            "up": self.up,
            "requests": self.requests,
            "load": self.load,
            "failures": self.failures,
        }


class Fleet:
    """Prefill and decode servers of one model.

    Args:
        prefill: may be empty: decode servers then do everything.
        decode: at least one.
        policy: of dualkv.policy.POLICIES; which node reads what.
        helpers: whether the nodes of servers that have no part in a request may read for it.
    """

    def __init__(
        self, prefill: Iterable[Server], decode: Iterable[Server], *, policy: str = "split", helpers: bool = True
    ) -> None:
        self.prefill, self.decode = list(prefill), list(decode)
        self.policy = policy
        self.helpers = helpers
        if not self.decode:
            raise invalid("proxy: give at least one decode server")
        for server in self.decode:
            if self.prefill and not server.node:
                raise invalid(f"proxy: decode server {server.url} needs its node: {server.url}=NODE@ADDRESS")

    def servers(self) -> list[Server]:
        """All of them."""
        return self.prefill + self.decode

    def choose(self, among: list[Server], tried: set[str]) -> Server | None:
        """The least loaded server that is up and was not tried; None if there is none."""
        able = [server for server in among if server.up and server.url not in tried]
        return min(able, key=lambda server: (server.load, server.requests), default=None)

    def hand_over_params(self, decode: Server, prefill: Server) -> dict[str, Any]:
        """``kv_transfer_params`` for the prefill server."""
        others = [s for s in self.servers() if self.helpers and s.up and s.address and s not in (decode, prefill)]
        return {
            "dualkv": {
                "node": decode.node,
                "address": decode.address,
                "policy": self.policy,
                "helpers": [server.address for server in others],
            }
        }
