"""One process: puts, gets and look-ups through LMCache's remote backend."""

import asyncio

from lmcache_parts import ARGUMENTS, Engine, finish, key_of

engine = Engine(ARGUMENTS["options"], **ARGUMENTS.get("engine", {}))
loop = engine.loop.get_loop()


def wait(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)


result = {"references": [engine.put(i) for i in ARGUMENTS.get("put", [])]}
result["references_partial"] = [engine.put(i, tokens=5) for i in ARGUMENTS.get("put_partial", [])]
asked = ARGUMENTS.get("ask", [])
keys = [key_of(i) for i in asked]
result["exists"] = [engine.backend.contains(key) for key in keys]
result["exists_sync"] = [engine.connector.exists_sync(key) for key in keys]
result["leading"] = engine.backend.batched_contains(keys)
result["leading_async"] = wait(engine.backend.batched_async_contains("lookup", keys))
result["got"] = [engine.get(i) for i in asked]
result["got_again"] = [engine.get(i) for i in asked]
prefix = wait(engine.backend.batched_get_non_blocking("lookup", keys))
result["prefix"] = len(prefix)
for memory in prefix:
    memory.ref_count_down()
result["others"] = [
    engine.backend.contains(key_of(0, **change))
    for change in (
        {"model_name": "other"},
        {"world_size": 2},
        {"worker_id": 1},
        {"request_configs": {"lmcache.tag.a": "b"}},
    )
]
result["removed"] = [engine.backend.remove(key_of(i)) for i in ARGUMENTS.get("remove", [])]
result["listed"] = len(wait(engine.connector.list()))
result["ping"] = wait(engine.connector.ping())
result["stats"] = engine.connector.stats()
# Whatever was missed or damaged has given its memory back.
result["held_bytes"] = engine.cpu.memory_allocator.pin_allocator.total_allocated_size
wait(engine.connector.close())
result["closed"] = [wait(engine.connector.exists(key_of(0))), wait(engine.connector.get(key_of(0)))]
engine.close()
finish(result)
