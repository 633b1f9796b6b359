"""One vLLM in this process: generates for rounds of prompts, and says what came from where.

Argument: {"model", "folder", "connector" (kv_transfer_config or null), "rounds": [[token ids, ...], ...], "tokens",
"llm": {more arguments of LLM}}. Result: {"rounds": [[{"tokens", "cached", "reason"}, ...], ...], "stats", "step_us"}.
"""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import tiny_models


def main() -> None:
    asked = json.loads(sys.argv[1])
    model = tiny_models.make(asked["model"], asked["folder"])

    from vllm import LLM, SamplingParams

    settings = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "max_num_seqs": 16,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
        "disable_log_stats": False,
        **asked.get("llm", {}),
    }
    if asked.get("connector"):
        settings["kv_transfer_config"] = asked["connector"]
    llm = LLM(model=model, **settings)
    rounds = []
    for prompts in asked["rounds"]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=asked.get("tokens", 12))
        began = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        rounds.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens,
                    "reason": output.outputs[0].finish_reason,
                    "seconds": time.monotonic() - began,
                }
                for output in outputs
            ]
        )
        if asked.get("forget"):  # the next round finds nothing in vLLM's own cache
            deadline = time.monotonic() + 20
            while not llm.reset_prefix_cache() and time.monotonic() < deadline:
                llm.llm_engine.step()
    metrics = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", getattr(metric, "count", None))
        kind = metric.labels.get("kind")
        metrics[metric.name + (f"/{kind}" if kind else "")] = value
    llm.llm_engine.engine_core.shutdown()
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps({"rounds": rounds, "metrics": metrics}))


if __name__ == "__main__":
    main()
