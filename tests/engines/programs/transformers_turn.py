"""One process: turns of a conversation through a store, each beside generation without a store."""

import torch
from transformers_model import ARGUMENTS, cache_of, finish, generate, open_node, prompt, tiny_model

model = tiny_model(ARGUMENTS.get("dtype", "float32"))
turns, out = [], None
with open_node(model, ARGUMENTS["store"]) as node:
    for turn in ARGUMENTS["turns"]:
        ids = prompt(turn["length"], turn.get("seed", 1))
        if turn.get("continues"):
            ids = torch.cat([out, ids], dim=1)
        cache = cache_of(model, ids, node, **turn.get("options", {}))
        out = generate(model, ids, cache)
        turns.append(
            {
                "tokens": out[0].tolist(),
                "plain": generate(model, ids)[0].tolist(),
                "hit": cache.hit_tokens,
                "saved": cache.save(out),
                "saved_again": cache.save(out),
                "read": sum(path["blocks"] for path in (cache.result or {}).get("paths", [])),
            }
        )
        cache.close()
finish(turns)
