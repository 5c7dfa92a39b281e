"""The boundary between language models and this library, and a compact Llama-layout decoder that meets it.

A `LanguageModel` is a few pure functions over a pytree of parameters: whoever brings another architecture
writes those functions and nothing else. `decoder` builds them from a Flax NNX module, split once.

Shapes: N rows, T columns, P prompt columns, C cache columns, D width, V vocabulary, K key/value heads,
G query heads a key/value head, H head size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.lm.layers import attend, positions_of, rms_norm, rotary, rotate, wide


class LanguageModel(NamedTuple):
    """Pure functions that are all this library knows of a language model.

    `mask` is True on real tokens. Rows may be padded on either side, or in between: a token's position is the
    number of real tokens before it, and it attends to the real tokens at or before its own column.

    Attributes:
        init: `(key) -> params`, random, float32; the key is consumed.
        hidden: `(params, tokens [N, T], mask [N, T]) -> [N, T, D]`, states after the final norm.
        logits: `(params, hidden [..., D]) -> [..., V]`, float32, nats.
        prefill: `(params, tokens [N, P], mask [N, P], cache_length) -> (last hidden [N, D], cache)`; rows are
            padded on the left, so that the last column is real; `cache_length` (static) counts the prompt's
            columns too.
        decode: `(params, tokens [N], cache) -> (hidden [N, D], cache)`, one more real token in every row.
        vocabulary_size: V.
        context_length: the largest number of columns that `hidden` and the cache may have.
    """

    init: Callable[[jax.Array], Any]
    hidden: Callable[[Any, jax.Array, jax.Array], jax.Array]
    logits: Callable[[Any, jax.Array], jax.Array]
    prefill: Callable[[Any, jax.Array, jax.Array, int], tuple[jax.Array, Any]]
    decode: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    vocabulary_size: int
    context_length: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-layout decoder.

    Attributes:
        vocabulary_size: number of token ids.
        width: size of the residual stream.
        layers: number of blocks.
        query_heads: number of query heads, a multiple of `key_value_heads`.
        key_value_heads: number of key and of value heads.
        head_size: features a head, even.
        mlp_width: features inside the gated MLP.
        norm_epsilon: added to the mean square in every norm.
        rope_base: base of the rotary frequencies.
        tied_embeddings: whether the logits are products with the embedding.
        context_length: the largest number of columns a sequence may have.

    Raises:
        ValueError: a size is not positive, the query heads are no multiple of the key/value heads, or the
            head size is odd.
    """

    vocabulary_size: int
    width: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_size: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    tied_embeddings: bool = True
    context_length: int = 2048

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "tied_embeddings" and not value > 0:
                raise ValueError(f"DecoderConfig.{field.name} must be positive, got {value}.")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"DecoderConfig.query_heads ({self.query_heads}) must be a multiple of key_value_heads "
                f"({self.key_value_heads})."
            )
        if self.head_size % 2:
            raise ValueError(f"DecoderConfig.head_size must be even for rotary positions, got {self.head_size}.")


class Cache(NamedTuple):
    """Keys and values so far, one array a layer, so that a decoding step writes each in place.

    Attributes:
        keys: a tuple of `[N, K, C, H]`, already rotated.
        values: a tuple of `[N, K, C, H]`.
        valid: `[N, C]`, True where a real token has been written.
        positions: `[N]` int32, position of the next token.
        column: scalar int32, where the next token is written, in every row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    valid: jax.Array
    positions: jax.Array
    column: jax.Array


def pad_left(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the real tokens of every row to its end, in order.

    Args:
        tokens: `[N, P]` int32.
        mask: `[N, P]`, True on real tokens.

    Returns:
        `(tokens [N, P], mask [N, P])` with the padding on the left.
    """
    mask = mask.astype(bool)
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


class Block(nnx.Module):
    """One layer: attention, then a gated MLP, each behind its norm and added to its input."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        width, mlp_width = config.width, config.mlp_width
        heads = config.query_heads + 2 * config.key_value_heads
        # Products into the residual stream shrink with depth: its size at initialisation does not grow.
        residual = (2 * config.layers) ** -0.5
        self.attention_norm = nnx.Param(jnp.ones(width))
        # Columns are grouped by key/value head (its queries, its key, its value): heads shard as one axis.
        self.query_key_value = normal(rngs, (width, heads * config.head_size), width**-0.5)
        attended = config.query_heads * config.head_size
        self.attention_output = normal(rngs, (attended, width), residual * attended**-0.5)
        self.mlp_norm = nnx.Param(jnp.ones(width))
        self.gate_up = normal(rngs, (width, 2, mlp_width), width**-0.5)
        self.mlp_output = normal(rngs, (mlp_width, width), residual * mlp_width**-0.5)

    def project(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]):
        """Of `x [N, T, D]`: queries `[N, T, K, G, H]` and keys `[N, K, T, H]`, rotated; values `[N, K, T, H]`."""
        config = self.config
        heads, group = config.key_value_heads, config.query_heads // config.key_value_heads
        normed = rms_norm(x, self.attention_norm[...], config.norm_epsilon)
        fused = normed @ self.query_key_value[...]
        fused = fused.reshape(*x.shape[:2], heads, group + 2, config.head_size)
        turned = fused[..., : group + 1, :].reshape(*x.shape[:2], heads * (group + 1), config.head_size)
        turned = rotate(turned, rotation).reshape(*x.shape[:2], heads, group + 1, config.head_size)
        key, value = turned[..., group, :], fused[..., group + 1, :]
        return turned[..., :group, :], jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention's output `[N, T, K * G * H]` and the MLP to the stream `x [N, T, D]`."""
        x = x + attended @ self.attention_output[...]
        normed = rms_norm(x, self.mlp_norm[...], self.config.norm_epsilon)
        gate, up = jnp.split(normed @ self.gate_up[...].reshape(x.shape[-1], -1), 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ self.mlp_output[...]


class Trunk(nnx.Module):
    """Llama-layout decoder up to its final norm: rotary positions, grouped queries, RMSNorm, SwiGLU."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = normal(rngs, (config.vocabulary_size, config.width), config.width**-0.5)
        self.layers = nnx.Dict({str(index): Block(config, rngs) for index in range(config.layers)})
        self.final_norm = nnx.Param(jnp.ones(config.width))

    def __call__(self, tokens: jax.Array, positions: jax.Array, attention: Callable) -> jax.Array:
        """Final-norm states `[N, T, D]`; `attention(index, query, key, value)` gives `[N, T, K * G * H]`."""
        config = self.config
        rotation = rotary(positions, config.head_size, config.rope_base)
        x = self.embedding[...][tokens]
        for index in range(config.layers):
            layer = self.layers[str(index)]
            x = layer.finish(x, attention(index, *layer.project(x, rotation)))
        return rms_norm(x, self.final_norm[...], config.norm_epsilon)

    def forward(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, list, list]:
        """States `[N, T, D]` of whole rows, and each layer's keys and values `[N, K, T, H]`."""
        columns = jnp.arange(tokens.shape[1])
        allowed = mask[:, None, :] & (columns[None, :, None] >= columns[None, None, :])
        keys, values = [], []

        def attention(index, query, key, value):
            keys.append(key)
            values.append(value)
            # Scores are quadratic in T: computing them again in the backward pass beats keeping them.
            return jax.checkpoint(attend)(query, key, value, allowed)

        return self(tokens, positions_of(mask), attention), keys, values

    def prefill(self, tokens: jax.Array, mask: jax.Array, cache_length: int) -> tuple[jax.Array, Cache]:
        """Last column's state `[N, D]` and a cache of `cache_length` columns that holds the prompts."""
        hidden, keys, values = self.forward(tokens, mask)
        room = cache_length - tokens.shape[1]
        pads = ((0, 0), (0, 0), (0, room), (0, 0))
        cache = Cache(
            keys=tuple(jnp.pad(key, pads) for key in keys),
            values=tuple(jnp.pad(value, pads) for value in values),
            valid=jnp.pad(mask, ((0, 0), (0, room))),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            column=jnp.int32(tokens.shape[1]),
        )
        return hidden[:, -1], cache

    def decode(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """State `[N, D]` of one more token in every row, and the cache with it."""
        write = jax.lax.dynamic_update_slice_in_dim
        valid = write(cache.valid, jnp.ones((tokens.shape[0], 1), bool), cache.column, axis=1)
        keys, values = list(cache.keys), list(cache.values)

        def attention(index, query, key, value):
            keys[index] = write(keys[index], key, cache.column, axis=2)
            values[index] = write(values[index], value, cache.column, axis=2)
            return attend(query, keys[index], values[index], valid[:, None, :])

        hidden = self(tokens[:, None], cache.positions[:, None], attention)
        cache = Cache(tuple(keys), tuple(values), valid, cache.positions + 1, cache.column + 1)
        return hidden[:, 0], cache


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A normal parameter of mean zero and standard deviation `scale`."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def decoder(config: DecoderConfig) -> LanguageModel:
    """Pure functions of a Llama-layout decoder.

    The parameters are a nested dict: `embedding [V, D]`, `layers` (by number, as text), `final_norm [D]` and,
    unless the embeddings are tied, `output_head [D, V]`, which `logits` alone reads: the other functions do
    without it. Products follow the parameters' dtype; norms, attention weights and logits are float32 at least.

    Args:
        config: the decoder's shape.

    Returns:
        The `LanguageModel`. Its functions raise ValueError for parameters of another structure.
    """
    structure, state = nnx.split(nnx.eval_shape(lambda: Trunk(config, nnx.Rngs(0))))
    expected = jax.tree.structure(nnx.to_pure_dict(state))

    def trunk(params) -> Trunk:
        params = {name: leaf for name, leaf in params.items() if name != "output_head"}
        # Merging goes by order alone: parameters of other names would be taken silently.
        if jax.tree.structure(params) != expected:
            raise ValueError(
                f"These are not the parameters of a decoder of {config.layers} layers: they have "
                f"{len(jax.tree.leaves(params))} arrays instead of {expected.num_leaves}, or other names."
            )
        return nnx.merge(structure, params)

    def init(key):
        trunk_key, head_key = jax.random.split(key)
        params = nnx.to_pure_dict(nnx.state(Trunk(config, nnx.Rngs(trunk_key))))
        if not config.tied_embeddings:
            shape = (config.width, config.vocabulary_size)
            params["output_head"] = config.width**-0.5 * jax.random.normal(head_key, shape)
        return params

    def hidden(params, tokens, mask):
        return trunk(params).forward(tokens, mask.astype(bool))[0]

    def logits(params, hidden):
        weights = params["embedding"].T if config.tied_embeddings else params["output_head"]
        return jnp.matmul(hidden, weights, preferred_element_type=wide(hidden.dtype))

    def prefill(params, tokens, mask, cache_length):
        return trunk(params).prefill(tokens, mask.astype(bool), cache_length)

    def decode(params, tokens, cache):
        return trunk(params).decode(tokens, cache)

    return LanguageModel(init, hidden, logits, prefill, decode, config.vocabulary_size, config.context_length)
