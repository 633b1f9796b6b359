"""Whole SGLang engines on the CPU, behind sglang_shim: each generates for all prompts, with or without HiCache.

Argument: {models: folder, prompts: {name: tokens}, runs: [{extra_config or null, layout}, ...], damage or null}. One
engine a run; ``damage`` (see sglang_damage) comes before the first. Result: for each run and prompt the output tokens
and where cached ones came from, and what transformers generates.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import sglang_shim
import tiny_models
import torch

PAGE = 16
NEW_TOKENS = 12


def engine_options(model: str, run: dict[str, Any]) -> dict[str, Any]:
    """Of sglang.Engine."""
    options = {
        "model_path": model,
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_total_tokens": 4096,
        "mem_fraction_static": 0.1,
        "page_size": PAGE,
        "random_seed": 1,
        "enable_cache_report": True,
        "log_level": "info",
    }
    if run["extra_config"] is not None:
        options |= {
            "enable_hierarchical_cache": True,
            "hicache_io_backend": "direct",
            "hicache_mem_layout": run["layout"],
            "hicache_write_policy": "write_through",
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config": json.dumps(run["extra_config"]),
        }
    return options


def generate(model: str, run: dict[str, Any], prompts: dict[str, list[int]]) -> dict[str, Any]:
    """One engine, from start to end; its scheduler is a process of its own."""
    import sglang

    began = time.monotonic()
    engine = sglang.Engine(**engine_options(model, run))
    print(f"engine up after {time.monotonic() - began:.1f} s; stand-ins: {sglang_shim.patched()}", flush=True)
    result = {}
    for name, tokens in prompts.items():
        parameters = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = engine.generate(input_ids=tokens, sampling_params=parameters)
        meta = answer["meta_info"]
        print(name, answer["output_ids"], meta, flush=True)
        details = meta.get("cached_tokens_details") or {}
        result[name] = {"tokens": answer["output_ids"], "cached": meta["cached_tokens"], "details": details}
    if run["extra_config"] is not None:
        wait_until_quiet(run["extra_config"]["store"].removeprefix("file://"))
    engine.shutdown()
    return result


def reference(model: str, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """What transformers generates."""
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    result = {}
    for name, tokens in prompts.items():
        output = loaded.generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
        result[name] = output[0, len(tokens) :].tolist()
    return result


def wait_until_quiet(store: str) -> None:
    """Write-through happens behind the answer: wait until no page was added for a while."""
    before, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5:
        count = len(list(pathlib.Path(store).glob("*/??/*.kv")))
        if count != before:
            before, since = count, time.monotonic()
        time.sleep(0.1)


def main() -> None:
    argument = json.loads(sys.argv[1])
    model, prompts = tiny_models.make("llama", argument["models"]), argument["prompts"]
    result: dict[str, Any] = {"reference": reference(model, prompts)}
    if argument["damage"] is not None:
        import sglang_damage

        result["damage"] = sglang_damage.apply(argument["damage"], model, prompts, PAGE)
    result["runs"] = [generate(model, run, prompts) for run in argument["runs"]]
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
