"""vLLM servers and the router as processes, and a client of the OpenAI API."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from conftest import ProgramFailedError, environment, python_of

START_S = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def connector(store: pathlib.Path, **extra: Any) -> dict[str, Any]:
    """A kv_transfer_config."""
    return {
        "kv_connector": "DualKVConnector",
        "kv_connector_module_path": "dualkv.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": f"file://{store}", "staging": "64MiB", **extra},
    }


class Process:
    """A process with an HTTP port; its output goes to a file."""

    def __init__(self, name: str, command: list[Any], port: int, folder: pathlib.Path) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ProgramFailedError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.25)
        raise ProgramFailedError(f"{self.name} is not up after {START_S} s:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def kill(self) -> None:
        """The whole process group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """``name{kind}`` -> value, of its Prometheus endpoint."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        out: dict[str, float] = {}
        for line in lines:
            if line.startswith("#"):
                continue
            name, _, value = line.rpartition(" ")
            base, _, labels = name.partition("{")
            kind = labels.partition('kind="')[2].partition('"')[0]
            key = base + (f"/{kind}" if kind else "")
            out[key] = out.get(key, 0) + float(value)
        return out


def vllm_server(
    name: str,
    model: str,
    folder: pathlib.Path,
    connector_config: dict[str, Any] | None,
    port: int = 0,
    **options: Any,
) -> Process:
    """``vllm.entrypoints.openai.api_server``, as it is."""
    port = port or free_port()
    settings = {
        "model": model,
        "served-model-name": "tiny",
        "port": port,
        "host": "127.0.0.1",
        "dtype": "float32",
        "max-model-len": 2048,
        "block-size": 32,
        "max-num-seqs": 16,
        "seed": 0,
        **options,
    }
    if connector_config is not None:
        settings["kv-transfer-config"] = json.dumps(connector_config)
    flags = [
        part for key, value in settings.items() for part in ((f"--{key}",) if value is True else (f"--{key}", value))
    ]
    command = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *flags]
    return Process(name, command, port, folder)


def router(folder: pathlib.Path, prefill: list[str], decode: list[str], *options: str, name: str = "proxy") -> Process:
    """``dualkv proxy`` of the tests' own environment."""
    port = free_port()
    servers = [part for url in prefill for part in ("--prefill", url)]
    servers += [part for url in decode for part in ("--decode", url)]
    command = [
        pathlib.Path(sys.executable).with_name("dualkv"),
        "proxy",
        "--listen",
        f"127.0.0.1:{port}",
        *servers,
        *options,
    ]
    return Process(name, command, port, folder)


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """They are up inside, and gone afterwards."""
    try:
        for process in processes:
            process.wait_until_up()
        yield
    finally:
        for process in processes:
            process.kill()


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 120) -> dict[str, Any]:
    """The JSON answer; raises urllib.error.HTTPError."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return dict(json.loads(answer.read()))


def complete(url: str, prompt: list[int], tokens: int = 8, **more: Any) -> list[str]:
    """Greedy continuation of a prompt of token ids, as texts."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
    answer = post(url, "/v1/completions", body)
    return str(answer["choices"][0]["text"]).split()


def stream(url: str, prompt: list[int], tokens: int = 8, **more: Any) -> tuple[list[str], float, float]:
    """The same, streamed: texts, seconds to the first one, seconds in all."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **more,
    }
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + "/v1/completions", data, {"Content-Type": "application/json"})
    began = time.monotonic()
    first = 0.0
    text = ""
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ProgramFailedError(str(chunk["error"]))
            first = first or time.monotonic() - began
            text += chunk["choices"][0]["text"]
    return text.split(), first, time.monotonic() - began
