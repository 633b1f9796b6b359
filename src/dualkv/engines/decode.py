"""A decode engine: takes a prompt from staging, decodes, and saves each Full Block as soon as it is complete."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dualkv
from dualkv.engines.blocks import BlockPool, ResidentPrefixes
from dualkv.engines.prefill import Compute


@dataclass
class Decoded:
    """One decode: all output tokens, the first included, and how much was persisted."""

    tokens: list[int]
    wrong_blocks: int
    saved_blocks: int


class DecodeEngine:
    """One decode engine."""

    def __init__(self, node: dualkv.Node, compute: Compute, *, resident: bool = False, deadline_s: float = 30) -> None:
        self.node = node
        self.compute = compute
        self.deadline_s = deadline_s
        self.resident = ResidentPrefixes() if resident else None
        self.blocks = BlockPool(compute.block_count)
        self._gpu = asyncio.Lock()

    async def decode(
        self,
        load_id: int,
        prompt: "np.ndarray[Any, Any]",
        first_token: int,
        output_tokens: int,
        *,
        hit_blocks: int,
        resident_blocks: int = 0,
    ) -> Decoded:
        """Decodes greedily until there are ``output_tokens`` tokens, ``first_token`` included.

        ``hit_blocks`` after the ``resident_blocks`` are in storage already. Raises dualkv.Error by the deadline.
        """
        per_block = self.node.geometry.tokens_per_block
        keys = dualkv.block_keys(prompt, self.node.geometry)
        kept = self.resident.match(keys[:resident_blocks]) if self.resident else []
        with self.node.incoming(load_id, self.deadline_s) as incoming:
            await incoming.ready()
            arrived = incoming.block_count
            total = -(-(len(prompt) + output_tokens) // per_block)
            ids = kept + await self.blocks.take(max(total - len(kept), arrived))
            new_ids = ids[len(kept) :]
            try:
                await asyncio.to_thread(incoming.copy_to, self.compute.kv, new_ids[:arrived])
                stored = len(kept) + hit_blocks
                saves = [self._save_prompt(incoming, keys, stored, len(kept))]
                incoming.close()  # staging is free as soon as the saves have written it
                wrong = await asyncio.to_thread(self.compute.wrong_blocks, prompt, ids[: len(kept) + arrived])
                tokens = await self._generate(prompt, first_token, output_tokens, ids, keys, saves)
                await asyncio.gather(*saves)
                if self.resident:
                    new_ids = self.resident.keep(keys[len(kept) :], new_ids)
                full = (len(prompt) + output_tokens - 1) // per_block
                return Decoded(tokens, wrong, full - stored)
            finally:
                await self.blocks.give_back(new_ids)

    def _save_prompt(
        self, incoming: dualkv.Incoming, keys: Sequence[bytes], stored: int, base: int
    ) -> dualkv.Operation:
        parent = keys[stored - 1] if stored > 0 else b""
        return incoming.save(keys[stored:], first_block=stored - base, parent=parent)

    async def _generate(
        self,
        prompt: "np.ndarray[Any, Any]",
        first_token: int,
        output_tokens: int,
        ids: list[int],
        keys: list[bytes],
        saves: list[dualkv.Operation],
    ) -> list[int]:
        per_block = self.node.geometry.tokens_per_block
        tokens = np.append(prompt, np.uint32(first_token)).astype(np.uint32)
        last_key = keys[-1] if keys else b""
        while len(tokens) < len(prompt) + output_tokens:
            async with self._gpu:
                token = await asyncio.to_thread(self.compute.decode, tokens, ids)
            if len(tokens) % per_block == 0:  # decode() has just completed this block's KV
                block = len(tokens) // per_block - 1
                [key] = dualkv.block_keys(tokens[block * per_block :], self.node.geometry, last_key)
                saves.append(self.node.save([key], self.compute.kv, [ids[block]], parent=last_key))
                last_key = key
            tokens = np.append(tokens, np.uint32(token))
        return [int(token) for token in tokens[len(prompt) :]]
