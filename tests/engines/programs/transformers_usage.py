"""One process: what is refused, and how."""

import torch
import transformers
from outcome import code_of
from transformers_model import (
    ARGUMENTS,
    BLOCK,
    cache_of,
    finish,
    generate,
    geometry_of,
    open_node,
    prompt,
    tiny_config,
    tiny_model,
)

from dualkv.integrations.transformers import DualKVCache, kv_geometry

model = tiny_model()
config, ids, store = model.config, prompt(100), ARGUMENTS["store"]


def named(other):
    return code_of(kv_geometry, other, model="tiny")


refused = {
    "unnamed": code_of(kv_geometry, config),
    "dtype": code_of(kv_geometry, config, model="tiny", dtype=torch.float64),
    "sliding": named(transformers.MistralConfig(sliding_window=64)),
    "linear": named(transformers.Qwen3NextConfig()),
    "latent": named(transformers.DeepseekV3Config()),
    "encoder_decoder": named(transformers.T5Config()),
}
with open_node(model, store) as node:
    refused |= {
        "batch": code_of(cache_of, model, ids.repeat(2, 1), node),
        "empty": code_of(cache_of, model, ids[:, :0], node),
        "nowhere": code_of(DualKVCache, config, ids),
        "option": code_of(cache_of, model, ids, node, stagin="1MiB"),
        "node_and_store": code_of(cache_of, model, ids, node, store=store),
        "store_option": code_of(DualKVCache, config, ids, store=store, model="tiny", stagin="1MiB"),
        "other_dtype": code_of(DualKVCache, config, ids, node=node, dtype=torch.bfloat16),
        "other_model": code_of(DualKVCache, tiny_config(rms_norm_eps=1e-3), ids, node=node),
        "beams": code_of(model.generate, ids, past_key_values=cache_of(model, ids, node), num_beams=2),
    }
    first = cache_of(model, ids, node)
    out = generate(model, ids, first)
    first.save(out)
    other = prompt(100, seed=2)
    refused["other_tokens"] = code_of(first.save, other)
    refused["longer_prompt"] = code_of(generate, model, torch.cat([ids, other], 1), cache_of(model, ids, node))
    refused["chunked"] = code_of(
        model.generate, ids, past_key_values=cache_of(model, ids, node), prefill_chunk_size=32, max_new_tokens=2
    )
    refused["crop"] = code_of(cache_of(model, ids, node).crop, -1)
    refused["reset"] = code_of(first.reset)
    closed = cache_of(model, ids, node)
    closed.close()
    closed.close()
    refused["closed"] = code_of(generate, model, ids, closed)

    short = cache_of(model, ids[:, :BLOCK], node)  # a prompt of exactly one block: a token must be left to compute
    accepted = {"short_hit": short.hit_tokens, "length": first.get_seq_length()}
    longer = torch.cat([out, other], dim=1)  # transformers' own way: the same cache, all tokens so far
    accepted["same_cache"] = torch.equal(generate(model, longer, first), generate(model, longer))
    first.save(longer)
    first.crop(91 - first.get_seq_length())
    accepted["cropped"] = [first.get_seq_length(), first.save()]

# A node of the cache's own, and a list of ints for tokens.
with DualKVCache(config, ids[0].tolist(), store=store, model="tiny", staging="4MiB") as own:
    accepted["own"] = [own.hit_tokens, generate(model, ids, own).tolist() == out.tolist()]
accepted["namespaces"] = len(
    {geometry_of(model, name).namespace for name in ("a", "b")}
    | {kv_geometry(tiny_config(rms_norm_eps=1e-3), model="a", dtype=torch.float32).namespace}
    | {kv_geometry(config, model="a", dtype=torch.float16).namespace}
    | {kv_geometry(tiny_config(name_or_path="a"), dtype=torch.float32).namespace}
)
finish({"refused": refused, "accepted": accepted})
