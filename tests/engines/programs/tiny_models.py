"""Small models with random weights: enough for tokens that depend on every layer's KV."""

import json
import pathlib
from typing import Any

import torch
import transformers

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "qwen": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    # Much KV for little compute, so that storage binds: 64 KiB a token in fp32.
    "wide": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def make(kind: str, folder: str, positions: int = 2048) -> str:
    """Writes the model, once; returns its folder."""
    target = pathlib.Path(folder) / kind
    if (target / "config.json").exists():
        return str(target)
    torch.manual_seed(7)
    common = {"vocab_size": 512, "max_position_embeddings": positions, "tie_word_embeddings": False}
    if kind == "qwen":
        config = transformers.Qwen3Config(**common, **SHAPES[kind])
        model = transformers.Qwen3ForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**common, **SHAPES[kind])
        model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # flat logits would give the same token whatever the KV
    model.to(torch.float32).save_pretrained(target)
    _write_tokenizer(target)
    return str(target)


def _write_tokenizer(target: pathlib.Path) -> None:
    """Token i is the text "ti": servers want one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0")
    fast.save_pretrained(target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
