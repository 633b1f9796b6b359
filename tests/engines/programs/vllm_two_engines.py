"""Two vLLM engines in one process: vLLM gives the second one's orders to the first one's worker connector.

Argument: {"folder", "connectors": [two]}. Result: {"error": what the second engine's request raised}.
"""

import json
import os
import pathlib
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import tiny_models


def main() -> None:
    asked = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    model = tiny_models.make("llama", asked["folder"])
    error = ""
    try:
        engines = [
            LLM(
                model=model,
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=512,
                enforce_eager=True,
                block_size=32,
                seed=0,
                kv_transfer_config=config,
            )
            for config in asked["connectors"]
        ]
        sampling = SamplingParams(temperature=0, detokenize=False, max_tokens=2)
        engines[1].generate([{"prompt_token_ids": list(range(100))}], sampling, use_tqdm=False)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    pathlib.Path(os.environ["RESULT"]).write_text(json.dumps({"error": error}))
    os._exit(0)  # vLLM's state after this is not ours to tidy


if __name__ == "__main__":
    main()
