"""The decoder as a Flax NNX module, up to its final norm: forward pass, prefill and cached decoding.

Shapes: N rows, T columns, P prompt columns, C cache columns, D width, L layers, K key/value heads, H head size.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.lm.memory import tree_bytes
from jaxrlhf.lm.transformer.block import KEPT, Block
from jaxrlhf.lm.transformer.cache import Cache, append
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import (
    attend,
    attend_causally,
    attend_completions,
    attend_fused,
    split_rows,
)
from jaxrlhf.lm.transformer.modules import Norm, normal
from jaxrlhf.lm.transformer.positions import frequencies, positions_of, rotary

MAX_SAVED_SCORE_BYTES = 2**26
"""Bytes of attention scores, of all layers together, up to which they are saved for the backward pass, not recomputed."""

MAX_UNROLLED_LAYERS = 8
"""Layers up to which the program unrolls them; more are one scan."""

UNROLLED_DECODING = {"gpu": (64, 2**34, 2**20), "cpu": (32, 2**31, 1)}
"""Layers, bytes of their weights, and rows up to which decoding alone unrolls layers, by backend. A scan copies each
layer's weights, and on a GPU its cache, at every token; unrolled, weights are copied once a sample and the program takes
longer to compile. On a CPU that pays where the weights are most of what a token reads, for a single row."""


REMAT = {
    "layer": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is saved of a layer for the backward pass, by name: only its input, or also the results of its linear maps."""

KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(KEPT)
"""What is saved by default of the layers of a scan on a CPU. A scan stacks what it saves, and on a CPU writing norms,
activations and reshaped weights into the stacks takes longer than computing them again."""

Attention = Literal["xla", "cudnn"]
"""What computes the attention of whole rows: plain products, or cuDNN's fused kernel (`layers.attend_fused`)."""

Kept = Literal["heads", "routing"]
"""What a forward pass keeps of each layer: keys and values (`Block.project`), or its router's probabilities."""


class LayerKind(NamedTuple):
    """What differs between layers: whether one has a window, and positions; a bool where that is static, else `[]`."""

    windowed: Any
    rotated: Any


class Trunk(nnx.Module):
    """A decoder up to its final norm; the linear maps of its layers named in `adapted` have adapters.

    `layers` is one `Block` whose parameters have the layers as their first axis.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, adapted: frozenset[str] = frozenset()):
        self.config = config
        self.embedding = normal(rngs, (config.vocabulary_size, config.width), config.width**-0.5)
        if config.rope_base is None:
            self.positions = normal(rngs, (config.context_length, config.width), 0.1 * config.width**-0.5)
        blocks = [nnx.split(Block(config, rngs, adapted)) for _ in range(config.layers)]
        self.layers = nnx.merge(
            blocks[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in blocks))
        )
        self.final_norm = Norm(config, config.width)

    def embed(self, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Returns the residual stream `[N, T, D]` before the first layer."""
        config = self.config
        x = self.embedding[...][tokens]
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        x = x.astype(dtype)
        return split_rows(x + self.positions[...][positions].astype(dtype) if config.rope_base is None else x)

    def unstacked_layers(self, *, decoded_rows: int | None = None) -> list[Any] | None:
        """Returns the parameters of each layer, sliced from the stack; None where layers are one scan.

        Args:
            decoded_rows: for decoding that many rows, more layers are unrolled (`UNROLLED_DECODING`).
        """
        params = nnx.state(self.layers)
        limits = UNROLLED_DECODING.get(jax.default_backend())
        decodes = False
        if limits is not None and decoded_rows is not None:
            sizes = self.config.layers, tree_bytes(params), decoded_rows
            decodes = all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        if self.config.layers > MAX_UNROLLED_LAYERS and not decodes:
            return None
        return [jax.tree.map(lambda leaf, index=index: leaf[index], params) for index in range(self.config.layers)]

    def apply_layers(
        self, carry: Any, step: Callable, inputs: Any = None, *, checkpoint: Callable | None = None, layers: Any = None
    ) -> tuple[Any, Any]:
        """Applies `step(block, index, kind, carry, input) -> (carry, output)` layer by layer.

        Args:
            carry: such as the residual stream.
            step: `kind` is a `LayerKind`.
            inputs: one a layer: a list where layers are unrolled, else stacked along the first axis.
            checkpoint: wraps a function of the carry, the layer's parameters and its input, such as `jax.checkpoint`.
            layers: result of `unstacked_layers`, if the caller has it.

        Returns:
            the carry, and the outputs, arranged like `inputs`.
        """
        config = self.config
        structure, params = nnx.split(self.layers)
        windowed = [index in config.windowed_layers for index in range(config.layers)]
        rotated = [index not in config.unrotated_layers for index in range(config.layers)]

        def apply(carry, layer, index, kind, layer_input):
            return step(nnx.merge(structure, layer), index, kind, carry, layer_input)

        layers = self.unstacked_layers() if layers is None else layers
        if layers is not None:
            outputs = []
            for index, layer in enumerate(layers):
                run = functools.partial(apply, index=index, kind=LayerKind(windowed[index], rotated[index]))
                run = run if checkpoint is None else checkpoint(run)
                carry, output = run(carry, layer, layer_input=None if inputs is None else inputs[index])
                outputs.append(output)
            return carry, outputs
        uniform = [len(set(of_layers)) == 1 for of_layers in (windowed, rotated)]

        def body(carry, scanned):
            layer, index, *kinds, layer_input = scanned
            static = zip(uniform, (windowed[0], rotated[0]), kinds, strict=True)
            kind = LayerKind(*(value if same else traced for same, value, traced in static))
            run = functools.partial(apply, kind=kind)
            run = run if checkpoint is None else checkpoint(run)
            return run(carry, layer, index=index, layer_input=layer_input)

        kinds = jnp.array(windowed), jnp.array(rotated)
        return jax.lax.scan(body, carry, (params, jnp.arange(config.layers), *kinds, inputs))

    def rotations(self, positions: jax.Array) -> tuple:
        """Returns cosines and sines for layers without and with a window; None for learned positions."""
        config = self.config
        if config.rope_base is None:
            return None, None
        factor = getattr(config.rope_scaling, "attention_factor", 1.0)
        full = rotary(positions, frequencies(config.rotated, config.rope_base, config.rope_scaling), factor)
        if config.window_rope_base is None or not config.windowed_layers:
            return full, full
        return full, rotary(positions, frequencies(config.rotated, config.window_rope_base))

    def score_settings(self) -> dict[str, float | None]:
        """Returns keyword arguments of `layers.attend`: scale and cap of this decoder's attention scores."""
        return {"scale": self.config.query_scale, "cap": self.config.score_cap}

    def forward(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        dtype: jnp.dtype,
        *,
        keep: Kept | None = None,
        remat: str | None = None,
        kernel: Attention = "xla",
    ) -> tuple[jax.Array, Any]:
        """Returns states `[N, T, D]` of whole rows, and what is kept of each layer."""
        columns, positions = jnp.arange(tokens.shape[1]), positions_of(mask)
        # Outputs at padding are meaningless, whatever it attends to; packed texts attend within themselves only.
        real = mask[:, None, :] if mask.dtype == jnp.bool_ else mask[:, None, :] == mask[:, :, None]
        allowed = real & (columns[None, :, None] >= columns[None, None, :])
        allowed = allowed, allowed & self.in_window(positions, positions)
        attend_rows = attend_fused if kernel == "cudnn" else attend_causally
        attention = functools.partial(attend_rows, **self.score_settings())
        if kernel == "xla" and not keeps_scores(self.config, *tokens.shape):
            attention = jax.checkpoint(attention)
        return self._through_layers(tokens, positions, dtype, attention, allowed, keep=keep, remat=remat)

    def forward_completions(
        self,
        prompts: jax.Array,
        prompt_mask: jax.Array,
        completions: jax.Array,
        mask: jax.Array,
        dtype: jnp.dtype,
        *,
        remat: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns states of prompts `[N, P, D]` and of their completions `[N, C, L, D]`, the prompts computed once.

        The same as `forward` of every completion after its prompt.

        Args:
            prompts, prompt_mask: `[N, P]`.
            completions, mask: `[N, C, L]`, C completions of each prompt.
            dtype, remat: as in `forward`.
        """
        (rows, prompt_length), (count, length) = prompts.shape, completions.shape[1:]
        whole = jnp.concatenate([jnp.repeat(prompt_mask, count, axis=0), mask.reshape(-1, length)], axis=1)
        whole_positions = positions_of(whole)
        columns = jnp.arange(prompt_length + length)
        allowed = whole[:, None, :] & (columns[None, :, None] >= columns[None, None, :])
        # Of the first completion's row the prompt's columns, of every row the completion's.
        of_prompt = allowed[::count, :prompt_length, :prompt_length]
        of_completions = allowed[:, prompt_length:]
        prompt_positions = whole_positions[::count, :prompt_length]
        own_positions = whole_positions[:, prompt_length:]
        windowed = (
            of_prompt & self.in_window(prompt_positions, prompt_positions),
            of_completions & self.in_window(own_positions, whole_positions),
        )
        attention = functools.partial(attend_completions, completions=count, **self.score_settings())
        if not keeps_scores(self.config, rows * count, prompt_length + length):
            attention = jax.checkpoint(attention)
        x, _ = self._through_layers(
            jnp.concatenate([prompts, completions.reshape(rows, -1)], axis=1),
            jnp.concatenate([prompt_positions, own_positions.reshape(rows, -1)], axis=1),
            dtype,
            attention,
            ((of_prompt, of_completions), windowed),
            remat=remat,
        )
        return x[:, :prompt_length], x[:, prompt_length:].reshape(rows, count, length, -1)

    def _through_layers(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        dtype: jnp.dtype,
        attention: Callable,
        allowed: tuple[Any, Any],
        *,
        keep: Kept | None = None,
        remat: str | None = None,
    ) -> tuple[jax.Array, Any]:
        """Does as `forward`, with `attention(query, key, value, allowed)`, allowed without and with a window."""
        rotations = self.rotations(positions)

        def step(block, index, kind, x, layer_input):
            del index, layer_input
            query, key, value = block.project(x, _rotation(kind, *rotations))
            attended = attention(query, key, value, _select(kind.windowed, *allowed))
            x, routing = block.finish(x, attended)
            return x, {None: None, "heads": (key, value), "routing": routing}[keep]

        x, kept = self.apply_layers(self.embed(tokens, positions, dtype), step, checkpoint=self._checkpoint(remat))
        return self.final_norm(x), kept

    def _checkpoint(self, remat: str | None) -> Callable | None:
        """Returns what wraps a layer, so that the backward pass recomputes what `remat` says."""
        if remat is not None:
            return functools.partial(jax.checkpoint, policy=REMAT[remat])
        if self.config.layers > MAX_UNROLLED_LAYERS and jax.default_backend() == "cpu":
            return functools.partial(jax.checkpoint, policy=KEEP_PRODUCTS)
        return None

    def in_window(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns whether keys at `[N, S]` are in the window of queries at `[N, T]`; `[N, T, S]` or broadcasts to it."""
        if not self.config.windowed_layers:
            return jnp.ones((1, 1, 1), bool)
        return keys[:, None, :] > queries[:, :, None] - (self.config.window or 0)

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, cache_length: int, dtype: jnp.dtype, *, kernel: Attention = "xla"
    ) -> tuple[jax.Array, Cache]:
        """Returns the last column's state `[N, D]` and a cache of `cache_length` columns that holds the prompts."""
        hidden, kept = self.forward(tokens, mask, dtype, keep="heads", kernel=kernel)
        room = cache_length - tokens.shape[1]

        def lengthened(leaf, axis):
            padding = [(0, 0)] * leaf.ndim
            padding[axis] = (0, room)
            return jnp.pad(leaf, padding)

        layers = self.unstacked_layers(decoded_rows=len(tokens))
        if layers is not None and not isinstance(kept, list):
            kept = [jax.tree.map(lambda leaf, index=index: leaf[index], kept) for index in range(len(layers))]
        keys, values = zip(*kept, strict=True) if isinstance(kept, list) else kept
        if layers is not None and len(tokens) == 1:
            keys, values = jax.tree.map(lambda leaf: leaf[0], (keys, values))
        cache = Cache(
            layers=layers,
            keys=jax.tree.map(lambda leaf: lengthened(leaf, -1), keys),
            values=jax.tree.map(lambda leaf: lengthened(leaf, -2), values),
            valid=jnp.pad(mask, ((0, 0), (0, room))),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            column=jnp.int32(tokens.shape[1]),
        )
        return hidden[:, -1], cache

    def decode(self, tokens: jax.Array, cache: Cache, dtype: jnp.dtype) -> tuple[jax.Array, Cache]:
        """Returns the state `[N, D]` of one more token in every row, and the cache that includes it."""
        valid = jax.lax.dynamic_update_slice_in_dim(
            cache.valid, jnp.ones((tokens.shape[0], 1), bool), cache.column, axis=1
        )
        allowed, positions = valid[:, None, :], cache.positions[:, None]
        allowed = allowed, allowed & self.in_window(positions, positions_of(valid))
        rotations = self.rotations(positions)

        # The cache is part of the carry: as a layer's input and output it would be copied whole.
        def step(block, index, kind, carry, layer_input):
            x, keys, values = carry
            query, key, value = block.project(x, _rotation(kind, *rotations))
            keys, layer_keys = append(keys, key, index, cache.column, axis=-1)
            values, layer_values = append(values, value, index, cache.column, axis=-2)
            attended = attend(
                query, layer_keys, layer_values, _select(kind.windowed, *allowed), **self.score_settings()
            )
            x, _ = block.finish(x, attended)
            return (x, keys, values), layer_input

        start = self.embed(tokens[:, None], positions, dtype), cache.keys, cache.values
        (x, keys, values), _ = self.apply_layers(start, step, layers=cache.layers)
        new = Cache(cache.layers, keys, values, valid, cache.positions + 1, cache.column + 1)
        return self.final_norm(x)[:, 0], new


def keeps_scores(config: DecoderConfig, rows: int, length: int) -> bool:
    """Returns whether the attention scores of these rows are saved for the backward pass (`MAX_SAVED_SCORE_BYTES`).

    Scores are quadratic in the length: recomputing many of them beats saving them.
    """
    return 4 * rows * length**2 * config.query_heads * config.layers <= MAX_SAVED_SCORE_BYTES


def _rotation(kind: LayerKind, full: Any, within: Any) -> Any:
    """Returns cosines and sines for a layer; None where nothing is rotated."""
    chosen = _select(kind.windowed, full, within)
    if isinstance(kind.rotated, bool) or chosen is None:
        return chosen if kind.rotated is not False else None
    cosine, sine = chosen
    return jnp.where(kind.rotated, cosine, 1.0), jnp.where(kind.rotated, sine, 0.0)


def _select(windowed: Any, full: Any, within: Any) -> Any:
    """Returns one of two trees of arrays, for a layer without or with a window; `windowed` is a bool or `[]`."""
    if isinstance(windowed, bool) or full is None:
        return within if windowed is True else full
    return jax.tree.map(lambda yes, no: jnp.where(windowed, yes, no), within, full)
