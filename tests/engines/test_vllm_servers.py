"""Two vLLM servers and the router: prefill on one, decode on the other, KV from storage over both."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import ProgramFailedError, python_of
from servers import Process, complete, connector, free_port, post, router, stream, vllm_server

TOKENS = 10


def noise(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(512) for _ in range(length)]


# What is appended to each session at each turn.
SESSIONS = [[noise(100 * session + turn, 130 if turn == 0 else 45) for turn in range(4)] for session in range(2)]


def ids(texts: list[str]) -> list[int]:
    return [int(text[1:]) for text in texts]


class Cluster:
    """One prefill and one decode server that share storage, and a router."""

    def __init__(self, model: str, folder: pathlib.Path) -> None:
        self.model, self.folder = model, folder
        self.store = folder / "kv"
        self.store.mkdir()
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.servers: list[Process] = []
        # vLLM's own cache would have it all: here every turn comes from storage.
        self.options: dict[str, Any] = {"no-enable-prefix-caching": True}
        self.prefill = self.start_prefill()
        self.decode = self.start_decode()
        self.proxy = router(folder, [self.prefill.url], [f"{self.decode.url}=decode-0@{self.address}"])

    def start_prefill(self, port: int = 0) -> Process:
        name = f"prefill-{len(self.servers)}"
        config = connector(self.store, name=name, deadline_s=10)
        return self.start(name, config, port)

    def start_decode(self, port: int = 0) -> Process:
        config = connector(self.store, name="decode-0", listen=self.address, deadline_s=10)
        return self.start(f"decode-{len(self.servers)}", config, port)

    def start(self, name: str, config: dict[str, Any], port: int) -> Process:
        self.servers.append(vllm_server(name, self.model, self.folder, config, port, **self.options))
        return self.servers[-1]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.servers, self.proxy]:
            process.kill()


@pytest.fixture(scope="module", params=["llama", "qwen"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: str) -> pathlib.Path:
    return tmp_path_factory.mktemp(model)


@pytest.fixture(scope="module")
def made(folder: pathlib.Path, model: str) -> str:
    python_of("vllm")
    return str(folder / model)


def expected_turns(run_program: Callable[..., Any], folder: pathlib.Path, model: str) -> list[list[list[int]]]:
    """Sessions of one vLLM without a connector; makes the model as well."""
    steps = [{"session": session, "tokens": TOKENS} for session in SESSIONS]
    asked = {"model": model, "folder": str(folder), "connector": None, "steps": steps}
    return [[turn["tokens"] for turn in turns] for turns in run_program("vllm", "vllm_generate", asked)["steps"]]


def test_sessions_over_two_servers(
    run_program: Callable[..., Any], folder: pathlib.Path, made: str, model: str
) -> None:
    expected = expected_turns(run_program, folder, model)
    with Cluster(made, folder) as cluster:
        for process in (cluster.prefill, cluster.decode, cluster.proxy):
            process.wait_until_up()
        contexts: list[list[int]] = [[] for _ in SESSIONS]
        for turn in range(len(SESSIONS[0])):
            threads_answers: dict[int, list[int]] = {}

            def ask(session: int, turn: int = turn, out: dict[int, list[int]] = threads_answers) -> None:
                contexts[session] += SESSIONS[session][turn]
                out[session] = ids(complete(cluster.proxy.url, contexts[session], TOKENS))

            threads = [threading.Thread(target=ask, args=(session,)) for session in range(len(SESSIONS))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for session in range(len(SESSIONS)):
                assert threads_answers[session] == expected[session][turn], (session, turn)
                contexts[session] += threads_answers[session]
        check_metrics(cluster, len(SESSIONS) * len(SESSIONS[0]))
        check_streams(cluster, contexts[0])
        if model == "llama":
            check_phantom_hand_over(cluster, contexts[1])
            check_noise(cluster, contexts[1])
            check_dead_decode_server(cluster, contexts[1])
            check_dead_prefill_server(cluster, contexts[1])
        assert "Traceback" not in cluster.proxy.tail()


def check_metrics(cluster: Cluster, turns: int) -> None:
    """Both storage NICs carried their share; every prompt was handed over; both sides saved."""
    prefill, decode = cluster.prefill.metrics(), cluster.decode.metrics()
    assert prefill["vllm:external_prefix_cache_hits_total"] > 0
    over_prefill = prefill["vllm:dualkv_load_bytes_total/pe_path"]
    over_decode = prefill["vllm:dualkv_load_bytes_total/de_path"]
    assert over_decode > 0
    assert over_prefill > 0
    assert 0.25 < over_decode / (over_decode + over_prefill) < 0.75
    assert prefill["vllm:dualkv_hand_overs_total/sent"] == turns
    assert decode["vllm:dualkv_hand_overs_total/received"] == turns
    assert decode["vllm:external_prefix_cache_hits_total"] > 0
    assert prefill["vllm:dualkv_loads_total/failed"] == 0
    assert prefill["vllm:dualkv_saved_blocks_total/ok"] > 0
    assert decode["vllm:dualkv_saved_blocks_total/ok"] > 0, "a block that decoding completed is the decode server's"
    routed = cluster.proxy.metrics()
    assert routed["dualkv_proxy_requests_total"] == turns
    with urllib.request.urlopen(cluster.proxy.url + "/status", timeout=5) as answer:
        status = json.load(answer)
    assert [server["up"] for server in status["prefill"] + status["decode"]] == [True, True]


def check_streams(cluster: Cluster, context: list[int]) -> None:
    """The same tokens streamed; chat and other paths pass through; a bad request stays the client's."""
    want = complete(cluster.decode.url, context, TOKENS)
    assert stream(cluster.proxy.url, context, TOKENS)[0] == want
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": " ".join(f"t{token}" for token in context)}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    sent = cluster.prefill.metrics()["vllm:dualkv_hand_overs_total/sent"]
    answers = [post(url, "/v1/chat/completions", chat) for url in (cluster.proxy.url, cluster.decode.url)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
    assert cluster.prefill.metrics()["vllm:dualkv_hand_overs_total/sent"] == sent + 1
    with urllib.request.urlopen(cluster.proxy.url + "/v1/models", timeout=5) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(cluster.proxy.url, "/v1/completions", {"model": "no such model", "prompt": "t1"})
    assert refused.value.code == 404
    refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as malformed:
        post(cluster.proxy.url, "/v1/completions", ["not", "an", "object"])  # type: ignore[arg-type]
    assert malformed.value.code == 400
    malformed.value.close()
    # Malformed hints are ignored, whoever sends them.
    for hint in ({"dualkv": 7}, {"dualkv": {"load_id": -1}}, {"dualkv": {"node": "x"}}, {"other": 1}):
        assert complete(cluster.decode.url, context, TOKENS, kv_transfer_params=hint) == want


def check_phantom_hand_over(cluster: Cluster, context: list[int]) -> None:
    """A hand-over that nobody makes, asked for twice: a deadline or a refusal ends the wait, and tokens are right."""
    want = complete(cluster.decode.url, context, TOKENS)
    hint = {"dualkv": {"load_id": 4711, "blocks": -(-len(context) // 32), "first": 0, "hit": 0}}
    asked = [
        in_background(lambda: complete(cluster.decode.url, context, TOKENS, kv_transfer_params=hint)) for _ in range(2)
    ]
    for thread, answer in asked:
        thread.join(60)
        assert answer == [want]
    failed = cluster.decode.metrics()["vllm:dualkv_hand_overs_total/receive_failed"]
    assert failed == 2


def check_noise(cluster: Cluster, context: list[int]) -> None:
    """Random bytes in stored blocks: found, computed again, and right."""
    want = complete(cluster.decode.url, context, TOKENS)
    files = sorted(cluster.store.glob("*/??/*.kv"))
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[200:3000] = random.Random(number).randbytes(2800)
        path.write_bytes(data)
    assert complete(cluster.proxy.url, context, TOKENS) == want
    prefill = cluster.prefill.metrics()
    assert prefill["vllm:dualkv_loads_total/failed"] > 0
    assert list(cluster.store.glob("*/??/*.corrupt"))
    assert complete(cluster.proxy.url, context, TOKENS) == want


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(call())
        except (OSError, ProgramFailedError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def check_dead_decode_server(cluster: Cluster, context: list[int]) -> None:
    """Half an answer is an error; no answer yet is another server's to give; the prefill server goes on."""
    want = complete(cluster.prefill.url, context, TOKENS)
    streamed, half = in_background(lambda: stream(cluster.proxy.url, context, 1500))
    whole, answer = in_background(lambda: complete(cluster.proxy.url, context, 400))
    time.sleep(1.0)
    cluster.decode.kill()
    began = time.monotonic()
    streamed.join(60)
    whole.join(60)
    assert not streamed.is_alive()
    assert not whole.is_alive()
    assert isinstance(half[0], ProgramFailedError | OSError | ValueError), half
    assert isinstance(answer[0], OSError) or answer[0][:TOKENS] == want
    assert complete(cluster.proxy.url, context, TOKENS) == want, "the prefill server answers alone"
    assert complete(cluster.prefill.url, context, TOKENS) == want
    assert time.monotonic() - began < 90
    # It comes back, at the same place.
    port = int(cluster.decode.url.rpartition(":")[2])
    cluster.decode = cluster.start_decode(port)
    cluster.decode.wait_until_up()


def check_dead_prefill_server(cluster: Cluster, context: list[int]) -> None:
    """Killed in the middle of a hand-over or before: the decode server loads and computes for itself."""
    want = complete(cluster.decode.url, context, TOKENS)
    deadline = time.monotonic() + 60
    while cluster.decode.metrics()["vllm:dualkv_hand_overs_total/received"] == 0 and time.monotonic() < deadline:
        assert complete(cluster.proxy.url, context, TOKENS) == want
        time.sleep(0.5)
    assert cluster.decode.metrics()["vllm:dualkv_hand_overs_total/received"] > 0, "the new server has a part again"
    asked = [in_background(lambda: complete(cluster.proxy.url, context, TOKENS)) for _ in range(3)]
    time.sleep(0.05)
    cluster.prefill.kill()
    for thread, answer in asked:
        thread.join(60)
        assert not thread.is_alive()
        assert isinstance(answer[0], OSError) or answer[0] == want, answer
    assert complete(cluster.proxy.url, context, TOKENS) == want
    with contextlib.suppress(KeyError):
        assert cluster.proxy.metrics()["dualkv_proxy_retries_total"] > 0


@pytest.fixture(scope="module", autouse=True)
def _leave_no_server(folder: pathlib.Path) -> Iterator[None]:
    yield
    for log in folder.glob("*.log"):
        log.unlink()
