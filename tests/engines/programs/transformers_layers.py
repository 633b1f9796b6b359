"""One process: slow storage read layer by layer while the model computes, and two nodes reading one prefix."""

from transformers_model import ARGUMENTS, cache_of, finish, generate, geometry_of, open_node, prompt, tiny_model

import dualkv

model = tiny_model()
store = ARGUMENTS["store"]
ids = prompt(800)
plain = generate(model, ids)[0].tolist()
with open_node(model, store) as node, cache_of(model, ids, node) as first:
    generate(model, ids, first)  # the prompt's blocks are saved on leaving

with open_node(model, store, store_options={"read_limit": "4MB/s"}) as slow:
    cache = cache_of(model, ids, slow, layers_per_read=1)
    layered = {"tokens": generate(model, ids, cache)[0].tolist(), **cache.result}

with (
    dualkv.Node("helper", geometry_of(model), store=store, staging="4MiB", listen="loopback://helper"),
    open_node(model, store) as node,
):
    helper = node.connect("loopback://helper")
    turns = dualkv.RoundRobin()
    shared = []
    for policy in (turns, turns, None):
        cache = cache_of(model, ids, node, helpers=[helper], policy=policy)
        tokens = generate(model, ids, cache)[0].tolist()
        blocks = {path["node"]: path["blocks"] for path in cache.result["paths"] if path["blocks"]}
        shared.append({"tokens": tokens, "blocks": blocks})
finish({"plain": plain, "layered": layered, "shared": shared})
