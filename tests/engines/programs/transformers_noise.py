"""One process: noise with right checksums in the place of KV must change the tokens, or the KV is not used."""

import numpy as np
import torch
from transformers_model import ARGUMENTS, BLOCK, cache_of, finish, generate, open_node, prompt, tiny_model

import dualkv

model = tiny_model()
ids = prompt(100)
blocks = 100 // BLOCK
with open_node(model, ARGUMENTS["store"]) as node:
    noise = [torch.randn(blocks, 2, 2, BLOCK, 32) for _ in range(4)]
    keys = dualkv.block_keys(ids[0].numpy(), node.geometry)
    node.save(keys, dualkv.PagedKv(node.geometry, noise), np.arange(blocks)).wait(10)
    cache = cache_of(model, ids, node)
    tokens = generate(model, ids, cache)[0].tolist()
finish({"hit": cache.hit_tokens, "tokens": tokens, "plain": generate(model, ids)[0].tolist()})
