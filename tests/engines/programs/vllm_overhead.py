"""What the connector costs a step when nothing hits: time in its methods beside the time of all steps.

Argument: {"model", "folder", "connector", "tokens"}. Result: {"steps", "step_us", "connector_us", "share",
"idle": {"steps", "connector_us"}, "by_method": {name: us a step}}; ``idle`` are steps while a load is waited for.
"""

import functools
import json
import os
import pathlib
import sys
import time
from collections import Counter
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import tiny_models

METHODS = (
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "build_connector_meta",
    "update_connector_output",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "request_finished",
)


def main() -> None:
    asked = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    from dualkv.integrations.vllm import DualKVConnector

    spent: Counter[str] = Counter()

    def timed(name: str, method: Any) -> Any:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return method(*arguments, **named)
            finally:
                spent[name] += time.perf_counter_ns() - began

        return call

    for name in METHODS:
        setattr(DualKVConnector, name, timed(name, getattr(DualKVConnector, name)))
    llm = LLM(
        model=tiny_models.make(asked["model"], asked["folder"]),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        max_num_seqs=16,
        block_size=32,
        seed=0,
        kv_transfer_config=asked["connector"],
    )
    engine = llm.llm_engine

    def generate(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=tokens)
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        spent.clear()
        steps = 0
        began = time.perf_counter_ns()
        while engine.has_unfinished_requests():
            engine.step()
            steps += 1
        seconds = time.perf_counter_ns() - began
        return {
            "steps": steps,
            "step_us": seconds / steps / 1e3,
            "connector_us": sum(spent.values()) / steps / 1e3,
            "share": sum(spent.values()) / seconds,
            "by_method": {name: round(ns / steps / 1e3, 2) for name, ns in spent.most_common(6)},
        }

    prompts = [[(7 * i + number) % 512 for i in range(40)] for number in range(8)]
    generate(prompts, 20)  # warm
    result = generate([[(5 * i + number + 3) % 512 for i in range(40)] for number in range(8)], asked["tokens"])
    if asked.get("stored"):
        llm.reset_prefix_cache()
        result["idle"] = generate([asked["stored"]], 1)
    engine.engine_core.shutdown()
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
