"""transformers: a cache whose prompt prefix comes from storage, layer by layer (docs/engines/transformers.md)."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicLayer

import dualkv
from dualkv.errors import Error, invalid
from dualkv.node import Load

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Of a config, but without influence on keys and values; the name and the dtype have places of their own.
_NOT_KV = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "transformers_version",
    "use_cache",
}
_USAGE_ERRORS = {"invalid_argument", "unsupported"}
_READ_FAILURES = {"not_found", "corrupt", "io"}  # the block is not advertised again: a shorter hit may work
_SAVE_BYTES = 32 << 20  # copied to host memory at once when blocks are saved


class _Shape:
    """What a model keeps for one token and layer: K and V of ``[heads, head_dim]`` each."""

    def __init__(self, config: Any, dtype: torch.dtype | None) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise Error("encoder-decoder models are not supported", "unsupported")
        text = config.get_text_config(decoder=True)
        layers = transformers.DynamicCache(config=config).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
        if others or not layers:
            raise Error(
                f"this model caches in {', '.join(others) or 'no layers'}: only full attention in every layer is "
                "supported, without sliding windows or linear attention",
                "unsupported",
            )
        if getattr(text, "kv_lora_rank", None) is not None:
            raise Error(
                "latent attention (MLA), whose keys and values differ in shape, is not supported", "unsupported"
            )
        self.layers = len(layers)
        self.heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        self.head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        self.dtype = dtype or getattr(text, "dtype", None) or torch.float32
        if self.dtype not in _DTYPES:
            raise Error(f"{self.dtype} is not supported; {', '.join(map(str, _DTYPES))} are", "unsupported")
        self.config = _fingerprint(config)

    def layer_bytes(self, tokens: int) -> int:
        return 2 * self.heads * self.head_dim * self.dtype.itemsize * tokens

    def of_namespace(self, tokens: int) -> str:
        """The part of the namespace that config, dtype and block size fix."""
        return f"/{self.config}/{_DTYPES[self.dtype]}/{self.layers}x{self.heads}x{tokens}x{self.head_dim}"


def _fingerprint(config: Any) -> str:
    kept = {name: value for name, value in config.to_dict().items() if name not in _NOT_KV}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def kv_geometry(
    config: Any, *, model: str | None = None, dtype: torch.dtype | None = None, tokens_per_block: int = 16
) -> dualkv.KvGeometry:
    """The geometry of a model's KV, for the node that stores it.

    A Layer Block holds ``[2, heads, tokens_per_block, head_dim]``: K, then V.

    Args:
        config: of the model (``model.config``).
        model: names the weights; if left out, the name or path that they were loaded from. **It must change whenever
            the weights do** (another revision, fine-tuning, an adapter): nothing else tells their KV apart.
        dtype: of the KV, that is ``model.dtype``; the config's if left out.
        tokens_per_block: smaller blocks lose fewer tokens at the end of a prompt, larger ones read faster.

    Raises:
        Error: ``unsupported`` for models with other than full attention, encoder-decoders, MLA and other dtypes;
            ``invalid_argument`` if nothing names the weights.
    """
    shape = _Shape(config, dtype)
    name = model or "@".join(filter(None, (config.name_or_path, getattr(config, "_commit_hash", None))))
    if not name:
        raise invalid("the config does not say where the weights came from: name them with model=")
    return dualkv.KvGeometry(
        layers=shape.layers,
        tokens_per_block=tokens_per_block,
        layer_bytes=shape.layer_bytes(tokens_per_block),
        namespace=f"transformers/{name}{shape.of_namespace(tokens_per_block)}",
    )


class _Prefix:
    """A load in progress, and the memory it fills: per layer ``[blocks, 2, heads, tokens_per_block, head_dim]``."""

    def __init__(self, load: Load, planes: list[torch.Tensor]) -> None:
        blocks, _, _, block_tokens, _ = planes[0].shape
        self.tokens = blocks * block_tokens
        self.result: dict[str, Any] | None = None
        self._load: Load | None = load
        self._planes = planes
        self._left = len(planes)
        self._failure: Error | None = None

    def take(self, layer: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the layer, ``[1, heads, tokens, head_dim]`` each. Blocks until they are there, and right."""
        if self._load is None:
            raise self._failure or invalid("the prefix was closed")
        try:
            self._load.wait(layer)
        except Error as error:
            self._failure = Error(
                f"the stored prefix of {self.tokens} tokens could not be loaded, so this forward pass is void "
                f"({error.message}). Call again with a new DualKVCache: a block that is missing or damaged is not "
                "offered again. Or with overlap=False: what can't be loaded is then computed",
                error.code,
                error.os_errno,
            )
            self.close()
            raise self._failure from error
        plane = self._planes[layer]
        blocks, _, heads, block_tokens, head_dim = plane.shape
        kv = plane.permute(1, 2, 0, 3, 4).reshape(2, 1, heads, blocks * block_tokens, head_dim).to(device)
        self._left -= 1
        if self._left == 0:
            self.result = self._load.finish()
            self.close()
        return kv[0], kv[1]

    def wait(self) -> None:
        """Blocks until every layer is there."""
        if self._load is not None:
            self._load.finish()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def close(self) -> None:
        if self._load is not None:
            self._load.cancel()
        self._load, self._planes = None, []


class _Layer(DynamicLayer):
    """One layer: the prefix as soon as it is there, then what the model computes."""

    def __init__(self, index: int, shape: _Shape, prompt_tokens: int, prefix: _Prefix | None) -> None:
        super().__init__()
        self._index = index
        self._shape = shape
        self._prompt_tokens = prompt_tokens
        self._prefix = prefix

    def get_seq_length(self) -> int:
        """Tokens of this layer, those that are still being loaded among them."""
        if not self.is_initialized and self._prefix is not None:
            return self._prefix.tokens
        return int(super().get_seq_length())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Waits for the prefix of this layer."""
        loaded = self._prefix.take(self._index, key_states.device) if self._prefix is not None else None
        super().lazy_initialization(key_states, value_states)
        if loaded is not None:
            self.keys, self.values = loaded

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[1, heads, new tokens, head_dim]``, and returns everything so far."""
        self._check(key_states, "keys")
        self._check(value_states, "values")
        held, new = self.get_seq_length(), key_states.shape[-2]
        if self._prefix is not None and held < self._prompt_tokens < held + new:
            raise invalid(
                f"{new} tokens came on top of {held}, but the prompt has {self._prompt_tokens}: give generate() the "
                "tokens this cache was made for, without prefill_chunk_size and without an assistant model"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def _check(self, states: torch.Tensor, what: str) -> None:
        shape = self._shape
        if states.shape[0] != 1:
            raise invalid(f"{what} of batch size {states.shape[0]}: one sequence a cache is supported, no beams")
        found = (states.shape[1], states.shape[3], states.dtype)
        if found != (shape.heads, shape.head_dim, shape.dtype):
            raise invalid(
                f"layer {self._index} has {what} of {found[0]} heads, {found[1]} wide, {found[2]}; the cache is for "
                f"{shape.heads} heads, {shape.head_dim} wide, {shape.dtype}: give it config and dtype of this model"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end; not before the first forward pass."""
        if not self.is_initialized and self._prefix is not None:
            raise invalid("crop() before the first forward pass")
        super().crop(tokens_to_remove)


class DualKVCache(transformers.Cache):
    """The KV of one sequence: the longest stored prefix of its prompt, and what the model computes on top.

    Give it to ``model.generate(input_ids, past_key_values=cache)`` with the same token ids. The prefix is loaded while
    the model computes: layer ``i`` waits for its own KV only. At least one token is left to compute. After
    ``generate``, :meth:`save` stores the blocks that were not stored yet.

    Args:
        config: of the model (``model.config``).
        tokens: ids of the prompt, ``[n]`` or ``[1, n]``, without padding.
        node: a node whose geometry is :func:`kv_geometry` of this model; it may serve any number of caches.
        store: instead of ``node``: ``file:///directory``, for a node of the cache's own, which :meth:`close` ends.
            ``model``, ``tokens_per_block`` (see :func:`kv_geometry`) and ``node_options`` (``staging``,
            ``store_options`` and all others of :class:`dualkv.Node`) are for it.
        dtype: of the model (``model.dtype``); the config's if left out.
        overlap: load while the model computes. A load that fails then raises from the forward pass, and the call must
            be repeated with a new cache. ``False``: the constructor blocks until the prefix is there and verified; what
            can't be read shortens the hit, and is computed.
        deadline_s: the load has ended by then, well or not.
        layers_per_read: as in :meth:`dualkv.Node.load`.
        helpers: nodes whose storage NICs read a part of the prefix.
        policy: which node reads what; :class:`dualkv.Split` with helpers, else :class:`dualkv.PrefillOnly`.

    Raises:
        Error: ``unsupported`` (see :func:`kv_geometry`), ``invalid_argument``; with ``overlap`` also what
            :meth:`dualkv.Node.load` raises.

    Not thread-safe. One sequence, no beams, no assistant model, no ``prefill_chunk_size``.
    """

    def __init__(
        self,
        config: Any,
        tokens: Any,
        *,
        node: dualkv.Node | None = None,
        store: str | None = None,
        model: str | None = None,
        tokens_per_block: int | None = None,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
        deadline_s: float = 30,
        layers_per_read: int = 0,
        helpers: Sequence[dualkv.Peer] = (),
        policy: dualkv.PathPolicy | None = None,
        **node_options: Any,
    ) -> None:
        self._tokens = _flat(tokens)
        self._shape = _Shape(config, dtype)
        self._own: dualkv.Node | None = None
        if node is None:
            if store is None:
                raise invalid("give a node, or a store for a node of the cache's own")
            block = 16 if tokens_per_block is None else tokens_per_block
            geometry = kv_geometry(config, model=model, dtype=dtype, tokens_per_block=block)
            node = self._own = dualkv.Node(f"transformers-{os.getpid()}", geometry, store=store, **node_options)
        else:
            given = {"store": store, "model": model, "tokens_per_block": tokens_per_block, **node_options}
            extra = sorted(name for name, value in given.items() if value is not None)
            if extra:
                raise invalid(
                    f"unknown option with a node: {', '.join(extra)}; known are deadline_s, dtype, helpers, "
                    "layers_per_read, overlap, policy"
                )
            _check_geometry(node.geometry, self._shape)
        self._node = node
        self._policy = policy or (dualkv.Split() if helpers else dualkv.PrefillOnly())
        self._helpers = helpers
        self._layers_per_read = layers_per_read
        self._failure: Error | None = None
        try:
            self._prefix = self._start(deadline_s) if overlap else self._load_all(deadline_s)
        except BaseException:
            if self._own is not None:
                self._own.close()
            raise
        super().__init__(
            layers=[_Layer(i, self._shape, len(self._tokens), self._prefix) for i in range(self._shape.layers)]
        )

    @property
    def hit_tokens(self) -> int:
        """Tokens of the prompt whose KV comes from storage."""
        return self._prefix.tokens if self._prefix is not None else 0

    @property
    def result(self) -> dict[str, Any] | None:
        """What the load did (:meth:`dualkv.Load.finish`), once every layer has been used; None without a hit."""
        return self._prefix.result if self._prefix is not None else None

    @property
    def failure(self) -> Error | None:
        """With ``overlap=False``: why the last attempt failed that made the hit shorter; else None."""
        return self._failure

    @property
    def _block_tokens(self) -> int:
        return int(self._node.geometry.tokens_per_block)

    def _start(self, deadline_s: float) -> _Prefix | None:
        """Starts the load of the longest stored prefix that leaves a token to compute; None without a hit."""
        geometry, shape = self._node.geometry, self._shape
        keys = dualkv.block_keys(self._tokens, geometry)[: max(0, len(self._tokens) - 1) // self._block_tokens]
        hit = self._node.store.match(keys)
        if hit == 0:
            return None
        planes = [
            torch.empty(hit, 2, shape.heads, self._block_tokens, shape.head_dim, dtype=shape.dtype, device="cpu")
            for _ in range(shape.layers)
        ]
        plan = self._policy.plan(
            keys[:hit],
            prefill=self._node.view(),
            helpers=[helper.view() for helper in self._helpers if helper.connected],
        )
        load = self._node.load(
            plan,
            into=dualkv.PagedKv(geometry, planes),
            block_ids=np.arange(hit),
            deadline_s=deadline_s,
            layers_per_read=self._layers_per_read,
        )
        return _Prefix(load, planes)

    def _load_all(self, deadline_s: float) -> _Prefix | None:
        """Blocks until the prefix is there; what can't be read shortens it, in the end to nothing."""
        deadline = time.monotonic() + deadline_s
        prefix = None
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                prefix = self._start(left_s)
                if prefix is not None:
                    prefix.wait()
                break
            except Error as error:
                if error.code in _USAGE_ERRORS:
                    raise
                prefix, self._failure = None, error
                if error.code not in _READ_FAILURES:
                    break
        return prefix

    def save(self, tokens: Any = None, *, timeout_s: float = 30) -> int:
        """Stores the complete blocks that are not stored yet. Blocks until they are on disk.

        Args:
            tokens: everything the model has seen, ``[n]`` or ``[1, n]``: what ``generate`` returned. If left out, the
                prompt: generated tokens are not stored then. The cache holds no KV of the last generated token.
            timeout_s: for all of it.

        Returns:
            How many blocks that are.

        Raises:
            Error: ``no_space``, ``io``, ``timeout``: some blocks may be stored, none of them wrong;
                ``invalid_argument`` if ``tokens`` don't begin with the prompt, or after a failed load.
        """
        deadline = time.monotonic() + timeout_s
        if self._prefix is not None and self._prefix.failed:
            raise invalid("save() after a failed load: the forward pass is void")
        known = self._tokens if tokens is None else _flat(tokens)
        if not np.array_equal(known[: len(self._tokens)], self._tokens):
            raise invalid("save(): the tokens don't begin with the prompt that this cache was made for")
        block_tokens, geometry = self._block_tokens, self._node.geometry
        end = min(len(known), *(layer.get_seq_length() for layer in self.layers)) // block_tokens
        keys = dualkv.block_keys(known[: end * block_tokens], geometry)
        step = max(1, _SAVE_BYTES // int(geometry.block_bytes))
        stored = self._node.store.match(keys)
        saves = []
        for first in range(stored, end, step):
            count = min(step, end - first)
            left_s = max(0.001, deadline - time.monotonic())
            parent = keys[first - 1] if first else b""
            kv = dualkv.PagedKv(geometry, [self._blocks(layer, first, count) for layer in self.layers])
            saves.append(
                self._node.save(keys[first : first + count], kv, np.arange(count), parent=parent, deadline_s=left_s)
            )
        for save in saves:
            save.wait(max(0.001, deadline - time.monotonic()))
        return end - stored

    def _blocks(self, layer: Any, first: int, count: int) -> torch.Tensor:
        """Blocks of a layer as the store has them: ``[count, 2, heads, tokens_per_block, head_dim]`` in host memory."""
        shape, block_tokens = self._shape, self._block_tokens
        out = torch.empty(count, 2, shape.heads, block_tokens, shape.head_dim, dtype=shape.dtype, device="cpu")
        for plane, states in enumerate((layer.keys, layer.values)):
            part = states[0, :, first * block_tokens : (first + count) * block_tokens].detach()
            out[:, plane] = part.unflatten(1, (count, block_tokens)).transpose(0, 1)
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end. What was cropped of the prompt is not part of :meth:`save` any more."""
        super().crop(tokens_to_remove)
        self._tokens = self._tokens[: self.get_seq_length()]

    def reset(self) -> None:
        """Not supported: a cache belongs to one prompt.

        Raises:
            Error: ``unsupported``.
        """
        raise Error("a DualKVCache belongs to one prompt: make a new one instead of reset()", "unsupported")

    def close(self) -> None:
        """Ends the load if it is in progress, and the cache's own node. Saves nothing. Idempotent."""
        if self._prefix is not None:
            self._prefix.close()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> "DualKVCache":
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        """Saves the prompt's blocks unless an exception is on its way, then closes."""
        try:
            if exception is None:
                self.save()
        finally:
            self.close()


def _flat(tokens: Any) -> "np.ndarray[Any, Any]":
    """Token ids as ``[n]``. Raises Error for a batch of several sequences."""
    array = np.asarray(tokens.detach().cpu() if isinstance(tokens, torch.Tensor) else tokens)
    if array.ndim == 2 and array.shape[0] != 1:
        raise invalid(f"token ids of shape {array.shape}: one sequence a cache is supported")
    if array.ndim not in (1, 2) or array.size == 0:
        raise invalid(f"token ids of shape {array.shape}: [n] or [1, n] is needed")
    return array.reshape(-1)


def _check_geometry(geometry: dualkv.KvGeometry, shape: _Shape) -> None:
    tokens = int(geometry.tokens_per_block)
    expected = shape.of_namespace(tokens)
    fits = geometry.layers == shape.layers and geometry.layer_bytes(0) == shape.layer_bytes(tokens)
    if not fits or not geometry.namespace.endswith(expected):
        raise invalid(
            f"the node's geometry ('{geometry.namespace}') is not this model's ('...{expected}'): make the node with "
            "kv_geometry(config, dtype=model.dtype), and give the cache the same config and dtype"
        )
