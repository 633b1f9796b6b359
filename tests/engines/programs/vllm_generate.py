"""One vLLM in this process, or in its own where VLLM_ENABLE_V1_MULTIPROCESSING=1: does what it is told, step by step.

Argument: {"model", "folder", "connector" (kv_transfer_config or null), "llm": {more arguments of LLM}, "steps": [...]}.
A step is one of
  {"generate": [token ids, ...], "tokens": n}      all at once; its result is [{"tokens", "cached", "reason"}, ...]
  {"session": [token ids, ...], "tokens": n}       one after another, each behind the answer before: the same
  {"damage": "noise" | "swap" | "remove", "block": i}   of the stored blocks, in the order they were saved
  {"forget": true}                                 vLLM's own cache
Result: {"steps": [result or null, ...], "metrics": {name: value}}.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import tiny_models


class Program:
    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm import LLM

        settings = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 2048,
            "enforce_eager": True,
            "max_num_seqs": 16,
            "block_size": 32,
            "seed": 0,
            "disable_log_stats": False,
            **asked.get("llm", {}),
        }
        if asked.get("connector"):
            settings["kv_transfer_config"] = asked["connector"]
            self.store = pathlib.Path(asked["connector"]["kv_connector_extra_config"]["store"].removeprefix("file://"))
        self.llm = LLM(model=tiny_models.make(asked["model"], asked["folder"]), **settings)

    def run(self, step: dict[str, Any]) -> Any:
        [kind] = step.keys() & {"generate", "session", "damage", "forget"}
        return getattr(self, kind)(step)

    def generate(self, step: dict[str, Any]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=step.get("tokens", 12))
        prompts = [{"prompt_token_ids": prompt} for prompt in step["generate"]]
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
                "reason": output.outputs[0].finish_reason,
            }
            for output in self.llm.generate(prompts, sampling, use_tqdm=False)
        ]

    def session(self, step: dict[str, Any]) -> list[dict[str, Any]]:
        context: list[int] = []
        turns = []
        for appended in step["session"]:
            context = context + appended
            turns += self.generate({"generate": [context], "tokens": step.get("tokens", 12)})
            context = context + turns[-1]["tokens"]
        return turns

    def damage(self, step: dict[str, Any]) -> None:
        """``noise``: random bytes. ``swap``: the KV of the next block under this one's key, all checksums right."""
        import random

        self._settle()
        files = sorted(self.store.glob("*/??/*.kv"), key=lambda path: path.stat().st_mtime_ns)
        for index in step["block"] if isinstance(step["block"], list) else [step["block"]]:
            path = files[index]
            if step["damage"] == "remove":
                path.unlink()
            elif step["damage"] == "noise":
                data = bytearray(path.read_bytes())
                data[100:5000] = random.Random(index).randbytes(4900)
                path.write_bytes(data)
            else:
                raise ValueError(step["damage"])

    def forget(self, _: dict[str, Any]) -> None:
        self._settle()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still holds blocks")

    def _settle(self) -> None:
        """Until saves are done: vLLM gives their blocks back, and the files stop growing in number."""
        deadline = time.monotonic() + 20
        known = -1
        while time.monotonic() < deadline:
            if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
                self.llm.llm_engine.step()
            count = len(list(self.store.glob("*/??/*.kv")))
            if count == known:
                return
            known = count
            time.sleep(0.2)

    def metrics(self) -> dict[str, float]:
        out = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", getattr(metric, "count", None))
            kind = metric.labels.get("kind")
            out[metric.name.removeprefix("vllm:") + (f"/{kind}" if kind else "")] = value
        return out


def main() -> None:
    asked = json.loads(sys.argv[1])
    program = Program(asked)
    steps = [program.run(step) for step in asked["steps"]]
    result = {"steps": steps, "metrics": program.metrics()}
    program.llm.llm_engine.engine_core.shutdown()
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
