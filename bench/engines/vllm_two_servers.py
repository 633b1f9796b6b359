"""Prefill and decode on two real vLLM servers: one storage NIC against two, and the hand-over against NIXL's.

    python bench/engines/vllm_two_servers.py --engines .engines --contexts 4 --tokens 2560 --snic-limit 50MB/s

Stores contexts once, then asks for their continuations through routers of two policies, in turns: `prefill_only` reads
everything over the prefill node's storage NIC, `split` over both. The model is tiny and its KV large, so that storage
binds as it does for long contexts. With --nixl DIR (where nixl is installed with pip --target) the same servers run
once more with NixlConnector, without storage, and the time from the prefill server's answer to the first token is
compared: dualkv has handed the KV over layer by layer by then, NIXL begins to.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "engines")]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=".engines", help="where `make engine-vllm` put its environment")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2560, help="of each context")
    parser.add_argument("--appended", type=int, default=24, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=4, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="at once, for throughput")
    parser.add_argument("--snic-limit", default="50MB/s")
    parser.add_argument("--transport", choices=["tcp", "shm"], default="tcp")
    parser.add_argument("--load", choices=["async", "layerwise"], default="async")
    parser.add_argument("--nixl", help="folder with nixl, to compare hand-overs with")
    parser.add_argument("--json", help="write the result there")
    return parser.parse_args()


class Load:
    """Clients that ask for turns of the stored contexts."""

    def __init__(self, contexts: list[list[int]], asked: argparse.Namespace) -> None:
        self.contexts, self.asked = contexts, asked
        self.noise = random.Random(99)
        self.lock = threading.Lock()

    def turn(self, context: int) -> list[int]:
        with self.lock:
            return self.contexts[context] + [self.noise.randrange(512) for _ in range(self.asked.appended)]

    def one_at_a_time(self, url: str) -> list[float]:
        """Seconds to the first token of a turn of each context."""
        from servers import stream

        return [stream(url, self.turn(i), self.asked.answer)[1] for i in range(len(self.contexts))]

    def together(self, url: str) -> tuple[float, list[float]]:
        """Turns a second with all clients at work, and seconds to first tokens."""
        from servers import stream

        firsts: list[float] = []
        todo = list(range(len(self.contexts))) * 2

        def client() -> None:
            while True:
                with self.lock:
                    if not todo:
                        return
                    context = todo.pop()
                firsts.append(stream(url, self.turn(context), self.asked.answer)[1])

        threads = [threading.Thread(target=client) for _ in range(self.asked.clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(firsts) / (time.monotonic() - began), firsts


def storage_runs(asked: argparse.Namespace, model: str, folder: pathlib.Path) -> dict[str, Any]:
    from servers import complete, connector, free_port, router, running, vllm_server

    store = folder / "kv"
    store.mkdir()
    address = f"tcp://127.0.0.1:{free_port()}" if asked.transport == "tcp" else f"shm://{folder}/de.sock"
    common = {"staging": "1GiB", "store_options": {"read_limit": asked.snic_limit.removesuffix("/s")}}
    server = {"no-enable-prefix-caching": True, "max-model-len": 8192, "max-num-batched-tokens": 8192}
    prefill = vllm_server("prefill", model, folder, connector(store, **common, load=asked.load), **server)
    decode = vllm_server("decode", model, folder, connector(store, **common, name="de", listen=address), **server)
    servers = ["--no-helpers"]
    proxies = {
        policy: router(folder, [prefill.url], [f"{decode.url}=de@{address}"], "--policy", policy, *servers, name=policy)
        for policy in ("prefill_only", "split")
    }
    contexts = make_contexts(asked)
    with running(prefill, decode, *proxies.values()):
        say("storing contexts")
        for context in contexts:
            complete(prefill.url, context, 1)
        wait_for_files(store, len(contexts) * (asked.tokens // 32))
        load = Load(contexts, asked)
        out: dict[str, Any] = {policy: {"ttft_s": [], "turns_per_s": [], "loaded_ttft_s": []} for policy in proxies}
        for policy, proxy in proxies.items():  # connections, and whatever happens once
            load.one_at_a_time(proxy.url)
            say(f"warm: {policy}")
        for number in range(asked.rounds):
            for policy, proxy in proxies.items():
                out[policy]["ttft_s"] += load.one_at_a_time(proxy.url)
                rate, firsts = load.together(proxy.url)
                out[policy]["turns_per_s"].append(rate)
                out[policy]["loaded_ttft_s"] += firsts
                say(f"round {number + 1} of {asked.rounds}: {policy}: {rate:.2f} turns/s")
        metrics = prefill.metrics()
        out["bytes"] = {
            path: metrics[f"vllm:dualkv_load_bytes_total/{path}"] for path in ("pe_path", "de_path", "helper_path")
        }
        out["failed"] = metrics["vllm:dualkv_loads_total/failed"]
    return out


def hand_over_runs(asked: argparse.Namespace, model: str, folder: pathlib.Path) -> dict[str, Any]:
    """Fresh prompts, nothing stored: from the prefill server's answer to the first token."""
    from servers import connector, free_port, running, vllm_server

    store = folder / "kv"
    store.mkdir()
    address = f"tcp://127.0.0.1:{free_port()}" if asked.transport == "tcp" else f"shm://{folder}/de.sock"
    server = {"no-enable-prefix-caching": True, "max-model-len": 8192, "max-num-batched-tokens": 8192}
    ours = {"staging": "1GiB", "save": False}
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    pairs = {
        "dualkv": (connector(store, **ours), connector(store, **ours, name="de", listen=address)),
        "nixl": (nixl, nixl),
    }
    params = {
        "dualkv": {"dualkv": {"node": "de", "address": address}},
        "nixl": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    out: dict[str, Any] = {}
    for name, (first, second) in pairs.items():
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
        prefill = vllm_server(f"{name}-prefill", model, folder, first, **server)
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
        decode = vllm_server(f"{name}-decode", model, folder, second, **server)
        with running(prefill, decode):
            connect(prefill.url, decode.url, params[name])
            out[name] = [
                hand_over(prefill.url, decode.url, prompt, params[name]) for prompt in make_contexts(asked) * 2
            ]
            say(f"{name}: {1e3 * statistics.median(out[name]):.1f} ms")
    return out


def connect(prefill: str, decode: str, params: dict[str, Any]) -> None:
    """The first hand-overs make connections, and may take longer than the servers allow."""
    for attempt in range(5):
        try:
            hand_over(prefill, decode, [attempt] * 200, params)
            return
        except AssertionError as error:
            say(f"not connected yet: {error}")


def hand_over(prefill: str, decode: str, prompt: list[int], params: dict[str, Any]) -> float:
    from servers import post, stream

    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0, "kv_transfer_params": params}
    answer = post(prefill, "/v1/completions", body)
    return stream(decode, prompt, 2, kv_transfer_params=answer["kv_transfer_params"])[1]


def make_contexts(asked: argparse.Namespace) -> list[list[int]]:
    noise = random.Random(5)
    return [[noise.randrange(512) for _ in range(asked.tokens)] for _ in range(asked.contexts)]


def wait_for_files(store: pathlib.Path, wanted: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(store.glob("*/??/*.kv"))) < wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(list(store.glob('*/??/*.kv')))} of {wanted} blocks were saved")
        time.sleep(0.5)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    asked = options()
    os.environ["DUALKV_ENGINES"] = str(pathlib.Path(asked.engines).resolve())
    from conftest import environment, python_of

    result: dict[str, Any] = {
        "labels": {"memory": "host", "snic": f"bucket {asked.snic_limit}", "transport": asked.transport},
        "arguments": vars(asked),
    }
    with tempfile.TemporaryDirectory(prefix="dualkv-vllm-") as made:
        folder = pathlib.Path(made)
        code = f"import tiny_models; tiny_models.make('wide', {made!r}, 8192)"
        import subprocess

        subprocess.run([python_of("vllm"), "-c", code], env=environment(), check=True)
        runs = folder / "storage"
        runs.mkdir()
        result["storage"] = storage = storage_runs(asked, str(folder / "wide"), runs)
        basic, split = storage["prefill_only"], storage["split"]
        for name, key in (("TTFT, one client", "ttft_s"), ("TTFT, all clients", "loaded_ttft_s")):
            a, b = statistics.median(basic[key]), statistics.median(split[key])
            print(f"{name}: basic {a:.3f} s, split {b:.3f} s: {b / a:.2f}x")
        a, b = statistics.median(basic["turns_per_s"]), statistics.median(split["turns_per_s"])
        print(f"turns a second: basic {a:.3f}, split {b:.3f}: {b / a:.2f}x")
        print(f"bytes by path: {storage['bytes']}, failed loads: {storage['failed']}")
        if asked.nixl:
            os.environ["DUALKV_ENGINE_PATH"] = asked.nixl
            runs = folder / "hand-over"
            runs.mkdir()
            result["hand_over_s"] = taken = hand_over_runs(asked, str(folder / "wide"), runs)
            a, b = statistics.median(taken["nixl"]), statistics.median(taken["dualkv"])
            print(f"hand-over to first token: NIXL {1e3 * a:.1f} ms, dualkv {1e3 * b:.1f} ms: {b / a:.2f}x")
    if asked.json:
        pathlib.Path(asked.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
