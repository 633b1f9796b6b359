"""Generates with transformers; the KV of a prompt seen before comes from storage, also after a restart.

Run it twice: python examples/engines/transformers_cache.py MODEL file:///tmp/dualkv-example "Once upon a time ..."
"""

import sys

import transformers

import dualkv
from dualkv.integrations.transformers import DualKVCache, kv_geometry

name, store, prompt = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(name)
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
ids = tokenizer(prompt, return_tensors="pt").input_ids

with dualkv.Node("engine", kv_geometry(model.config, dtype=model.dtype), store=store) as node:
    cache = DualKVCache(model.config, ids, node=node, dtype=model.dtype)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    saved = cache.save(out)

print(tokenizer.decode(out[0]))
print(f"{cache.hit_tokens} of {ids.shape[1]} tokens came from storage; {saved} blocks are new there", file=sys.stderr)
