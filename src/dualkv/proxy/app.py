"""The router: prefill here, decode there, and what happens when one of them fails."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dualkv.proxy.fleet import Fleet, Server
from dualkv.proxy.requests import can_be_split, for_decode, for_prefill, prefilled, prompt_size

logger = logging.getLogger(__name__)

_PASSED_ON = ("Authorization", "X-Request-Id", "traceparent", "tracestate")
_BROKEN = (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError)
_CHUNK = 64 << 10
_FLEET: web.AppKey[Fleet] = web.AppKey("fleet", Fleet)
_SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)


class _Metrics:
    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dualkv_proxy_requests", "Requests, by how they ended", ["end"], registry=self.registry)
        self.retries = Counter(
            "dualkv_proxy_retries", "Servers that failed a request", ["role"], registry=self.registry
        )
        self.prefill = Histogram("dualkv_proxy_prefill_seconds", "Prefill servers' answers", registry=self.registry)
        self.first = Histogram(
            "dualkv_proxy_ttft_seconds", "Until the first byte of the answer", registry=self.registry
        )
        load = Gauge("dualkv_proxy_outstanding", "Requests at a server", ["server"], registry=self.registry)
        for server in fleet.servers():
            load.labels(server.url).set_function(lambda s=server: s.requests)  # type: ignore[misc]


_METRICS: web.AppKey[_Metrics] = web.AppKey("metrics", _Metrics)


class _RefusedError(Exception):
    """A server's own answer that is not 200: the client's to read, no reason to ask another."""

    def __init__(self, status: int, body: bytes, kind: str) -> None:
        super().__init__(status)
        self.status, self.body, self.kind = status, body, kind


def make_app(fleet: Fleet, *, deadline_s: float = 600, connect_s: float = 2) -> web.Application:
    """The router as an aiohttp application.

    Args:
        deadline_s: a request has ended by then, well or not.
        connect_s: a server that does not accept a connection for so long has failed.
    """
    app = web.Application(client_max_size=256 << 20)
    app[_FLEET] = fleet
    app[_METRICS] = _Metrics(fleet)

    async def session(app: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=connect_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as made:
            app[_SESSION] = made
            yield

    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/completions", _generate)
    app.router.add_post("/v1/chat/completions", _generate)
    app.router.add_get("/health", _health)
    app.router.add_get("/status", _status)
    app.router.add_get("/metrics", _scrape)
    app.router.add_route("*", "/{rest:.*}", _pass_on)
    return app


async def _health(request: web.Request) -> web.Response:
    alive = any(server.up for server in request.app[_FLEET].decode)
    return web.Response(status=200 if alive else 503)


async def _status(request: web.Request) -> web.Response:
    fleet = request.app[_FLEET]
    return web.json_response(
        {
            "policy": fleet.policy,
            "prefill": [server.status() for server in fleet.prefill],
            "decode": [server.status() for server in fleet.decode],
        }
    )


async def _scrape(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(request.app[_METRICS].registry), content_type="text/plain")


def _error(status: int, message: str) -> web.Response:
    """As OpenAI's API words it."""
    return web.json_response({"error": {"message": message, "type": "dualkv_proxy", "code": status}}, status=status)


async def _pass_on(request: web.Request) -> web.StreamResponse:
    """Everything else: any decode server answers."""
    fleet = request.app[_FLEET]
    tried: set[str] = set()
    body = await request.read()
    while (server := fleet.choose(fleet.decode, tried)) is not None:
        tried.add(server.url)
        try:
            return await _stream(request, server, request.rel_url.path_qs, body, lambda: None)
        except _BROKEN as error:
            _note(request, server, "decode", error)
        except _RefusedError as answer:
            return web.Response(status=answer.status, body=answer.body, content_type=answer.kind)
    return _error(503, "no server is up")


async def _generate(request: web.Request) -> web.StreamResponse:
    metrics = request.app[_METRICS]
    began = time.monotonic()
    try:
        body = await request.json()
        if not isinstance(body, dict):
            raise ValueError("not an object")
    except ValueError as error:
        return _error(400, f"the request is not JSON: {error}")
    end = "failed"
    try:
        response = await _route(request, body, lambda: metrics.first.observe(time.monotonic() - began))
        end = "ok" if response.status < 400 else "refused" if response.status < 500 else "failed"
        return response
    except asyncio.CancelledError:
        end = "cancelled"
        raise
    finally:
        metrics.requests.labels(end).inc()


async def _route(request: web.Request, body: dict[str, Any], on_first: Callable[[], None]) -> web.StreamResponse:
    """Tries until a server has begun to answer: what the client has seen can't be taken back."""
    fleet = request.app[_FLEET]
    size = prompt_size(body)
    failed: set[str] = set()
    while (decode := fleet.choose(fleet.decode, failed) or fleet.choose(fleet.prefill, failed)) is not None:
        try:
            with decode.busy(size):
                params = None
                if decode.node and decode not in fleet.prefill and can_be_split(body):
                    params = await _prefill(request, body, decode, size, failed)
                made = json.dumps(for_decode(body, params)).encode()
                return await _stream(request, decode, request.path, made, on_first)
        except _RefusedError as answer:
            return web.Response(status=answer.status, body=answer.body, content_type=answer.kind)
        except _BROKEN as error:
            failed.add(decode.url)
            _note(request, decode, "decode", error)
    return _error(503, "no server is up that has not failed this request")


async def _prefill(
    request: web.Request, body: dict[str, Any], decode: Server, size: int, failed: set[str]
) -> dict[str, Any] | None:
    """What the decode server is told; None if no prefill server could help: it prefills itself then."""
    fleet = request.app[_FLEET]
    while (server := fleet.choose(fleet.prefill, failed)) is not None:
        asked = for_prefill(body, fleet.hand_over_params(decode, server))
        began = time.monotonic()
        try:
            with server.busy(size):
                async with request.app[_SESSION].post(
                    server.url + request.path, json=asked, headers=_headers(request)
                ) as answer:
                    content = await answer.read()
                    if answer.status >= 500:
                        raise aiohttp.ClientError(f"status {answer.status}")
                    if answer.status != 200:
                        raise _RefusedError(answer.status, content, answer.content_type)
                    params = prefilled(json.loads(content))
            server.answered()
            request.app[_METRICS].prefill.observe(time.monotonic() - began)
            if params is not None:
                return params
            error: Exception = ValueError("no hand-over in its answer")
        except (*_BROKEN, ValueError) as broken:
            error = broken
        failed.add(server.url)
        _note(request, server, "prefill", error)
    return None


def _note(request: web.Request, server: Server, role: str, error: BaseException) -> None:
    if not isinstance(error, ValueError):
        server.failed()
    request.app[_METRICS].retries.labels(role).inc()
    logger.warning("%s server %s: %s: %s", role, server.url, type(error).__name__, error)


def _headers(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in _PASSED_ON if name in request.headers}


async def _stream(
    request: web.Request, server: Server, path: str, body: bytes, on_first: Callable[[], None]
) -> web.StreamResponse:
    """Passes a server's answer on as it comes. Raises what a broken server raises, as long as nothing was passed on."""
    headers = {**_headers(request), "Content-Type": request.headers.get("Content-Type", "application/json")}
    async with request.app[_SESSION].request(request.method, server.url + path, data=body, headers=headers) as answer:
        if answer.status >= 500:
            raise aiohttp.ClientError(f"status {answer.status}")
        if answer.status != 200:
            raise _RefusedError(answer.status, await answer.read(), answer.content_type)
        content = answer.content
        first = await content.readany()
        response = web.StreamResponse(headers={"Content-Type": answer.headers.get("Content-Type", "")})
        on_first()
        server.answered()
        await response.prepare(request)
        await response.write(first)
        try:
            async for piece in content.iter_chunked(_CHUNK):
                await response.write(piece)
        except _BROKEN as error:
            _note(request, server, "decode", error)
            await _break_off(response, answer.content_type, error)
        await response.write_eof()
        return response


async def _break_off(response: web.StreamResponse, kind: str, error: BaseException) -> None:
    """Says so in the stream, or breaks the connection: half an answer must not look like a whole one."""
    if kind != "text/event-stream":
        raise ConnectionResetError("the server broke off") from error
    message = {"error": {"message": f"the server broke off: {error}", "type": "dualkv_proxy", "code": 502}}
    await response.write(f"data: {json.dumps(message)}\n\n".encode())
