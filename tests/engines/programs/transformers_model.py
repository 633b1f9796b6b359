"""A small Llama with random weights, the same in every process, and what the programs have in common."""

import json
import os
import sys

import torch
import transformers

import dualkv
from dualkv.integrations.transformers import DualKVCache, kv_geometry

BLOCK = 16
ARGUMENTS = json.loads(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1][:1] in "{[n" else None


def tiny_config(**changes):
    known = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return transformers.LlamaConfig(**(known | changes))


def tiny_model(dtype="float32", **changes):
    torch.manual_seed(7)
    return transformers.LlamaForCausalLM(tiny_config(**changes)).eval().to(getattr(torch, dtype))


def prompt(length, seed=1):
    return torch.randint(1, 512, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache=None, new=12):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


def geometry_of(model, name="tiny"):
    return kv_geometry(model.config, model=name, dtype=model.dtype, tokens_per_block=BLOCK)


def open_node(model, store, **options):
    return dualkv.Node("engine", geometry_of(model), store=store, staging="4MiB", **options)


def cache_of(model, ids, node, **options):
    return DualKVCache(model.config, ids, node=node, dtype=model.dtype, **options)


def finish(result):
    with open(os.environ["RESULT"], "w", encoding="utf-8") as file:
        json.dump(result, file)
