"""Dual-path loading from dualkv's parts: storage reads, staging, grants and layer-wise sends, no Load around them.

An engine that has its own orchestration uses the parts like this. Here both sides live in one process, and a method
call stands in for the engine's own RPC; the parts are the same between machines.

Run it: python examples/engine_from_parts.py
"""

import asyncio
import tempfile

import numpy as np

import dualkv

LAYERS, BLOCKS = 8, 12
GEOMETRY = dualkv.KvGeometry(layers=LAYERS, tokens_per_block=16, layer_bytes=16384, namespace="example/parts")


def new_cache() -> list[np.ndarray]:
    """Per layer one plane: [blocks, bytes]."""
    return [np.zeros((BLOCKS, GEOMETRY.layer_bytes(layer)), np.uint8) for layer in range(LAYERS)]


def layers_of(slot: object) -> list[np.ndarray]:
    """A staging slot as a cache of one block: its Layer Blocks, in place."""
    image = np.asarray(slot)
    offsets = [GEOMETRY.layer_offset(layer) for layer in range(LAYERS + 1)]
    return [image[offsets[layer] : offsets[layer + 1]].reshape(1, -1) for layer in range(LAYERS)]


class DecodeSide:
    """Reads its share into its own staging and writes it, layer by layer, into the prefill side's cache."""

    def __init__(self, root: str) -> None:
        self.node = dualkv.Node(
            "decode", GEOMETRY, store=root, staging="4MiB", listen="tcp://127.0.0.1:0", secret="example"
        )

    async def read_and_send(self, keys: list[bytes], first_block: int, grant: int) -> None:
        """What the prefill side asks for over the engine's RPC."""
        acquisition = self.node.staging.acquire(len(keys))
        await acquisition
        slots = acquisition.slots()
        await self.node.store.read(keys, slots, deadline_s=5)
        peer = self.node.peer("prefill")
        sends = [
            peer.send_layers(grant, dualkv.PagedKv(GEOMETRY, layers_of(slot)), [0], first_block=first_block + i)
            for i, slot in enumerate(slots)
        ]
        await asyncio.gather(*sends)  # the slots go back to the pool when this returns


class PrefillSide:
    """Splits a hit by hand: the first blocks itself, the rest through the decode side's storage NIC."""

    def __init__(self, root: str, decode: DecodeSide) -> None:
        self.node = dualkv.Node("prefill", GEOMETRY, store=root, staging="4MiB", secret="example")
        self.node.connect(decode.node.addresses[0])
        self.decode = decode
        self.cache = new_cache()

    async def load(self, keys: list[bytes]) -> None:
        """Loads block i of the hit to block i of the cache; uses each layer as soon as it is there."""
        hit = self.node.store.match(keys)
        mine = hit // 2
        kv = dualkv.PagedKv(GEOMETRY, self.cache)
        grant = self.node.grant("decode", kv, np.arange(hit), deadline_s=5)
        theirs = asyncio.create_task(self.decode.read_and_send(keys[mine:hit], mine, grant.id))
        await self.read_here(keys[:mine], grant)
        await theirs
        grant.revoke()

    async def read_here(self, keys: list[bytes], grant: dualkv.Grant) -> None:
        """The prefill path: storage, own staging, own cache."""
        acquisition = self.node.staging.acquire(len(keys))
        await acquisition
        slots = acquisition.slots()
        await self.node.store.read(keys, slots, deadline_s=5)
        for block, slot in enumerate(slots):
            for layer, data in enumerate(layers_of(slot)):
                self.cache[layer][block] = data[0]


async def main() -> None:
    """Stores a context, loads it over both paths, checks every byte."""
    with tempfile.TemporaryDirectory() as directory:
        root = f"file://{directory}/kv"
        decode = DecodeSide(root)
        prefill = PrefillSide(root, decode)
        rng = np.random.default_rng(1)
        stored = [rng.integers(0, 256, layer.shape, dtype=np.uint8) for layer in new_cache()]
        keys = dualkv.block_keys(np.arange(BLOCKS * GEOMETRY.tokens_per_block), GEOMETRY)
        await prefill.node.save(keys, dualkv.PagedKv(GEOMETRY, stored), np.arange(BLOCKS))

        await prefill.load(keys)

        right = all(np.array_equal(a, b) for a, b in zip(prefill.cache, stored, strict=True))
        read = {side.node.name: side.node.store.stats()["blocks_read"] for side in (prefill, decode)}
        print(f"every byte right: {right}; blocks read by each side: {read}")
        prefill.node.close()
        decode.node.close()
        if not right:
            raise SystemExit(1)


if __name__ == "__main__":
    asyncio.run(main())
