"""One process, a store with a damaged block: what each way of loading does, and what the tokens are."""

from outcome import code_of
from transformers_model import ARGUMENTS, cache_of, finish, generate, open_node, prompt, tiny_model

import dualkv

model = tiny_model()
ids = prompt(100)
result = {"plain": generate(model, ids)[0].tolist()}
with open_node(model, ARGUMENTS["store"]) as node:
    cache = cache_of(model, ids, node, overlap=ARGUMENTS["overlap"])
    result["offered"] = cache.hit_tokens
    if ARGUMENTS["overlap"]:
        result["raised"] = code_of(generate, model, ids, cache)
        result["raised_again"] = code_of(generate, model, ids, cache)
        result["save"] = code_of(cache.save)
        cache = cache_of(model, ids, node)
        result["offered_next"] = cache.hit_tokens
    result["tokens"] = generate(model, ids, cache)[0].tolist()
    result["failure"] = cache.failure and cache.failure.code
    result["healed"] = cache.save()
    result["stored"] = node.store.match(dualkv.block_keys(ids[0].numpy(), node.geometry))

    # A storage that never answers: without overlap the prompt is computed, with it the call ends by the deadline.
    silent = {"store_options": {"faults": {"drop_rate": 1.0}}}
    with dualkv.Node("silent", node.geometry, store=ARGUMENTS["store"], staging="4MiB", **silent) as other:
        cache = cache_of(model, ids, other, overlap=False, deadline_s=0.3)
        result["silent"] = [cache.hit_tokens, cache.failure.code, generate(model, ids, cache)[0].tolist()]
        late = cache_of(model, ids, other, deadline_s=0.3)
        result["late"] = code_of(generate, model, ids, late)
finish(result)
