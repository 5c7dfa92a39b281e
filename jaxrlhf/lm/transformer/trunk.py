"""The decoder as Flax NNX modules, up to its final norm.

Shapes: N rows, T columns, P prompt columns, C cache columns, D width, K key/value heads, G query heads a key/value
head, H head size, R rank of an adapter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import (
    attend,
    attend_causally,
    frequencies,
    layer_norm,
    positions_of,
    rms_norm,
    rms_norm_from_one,
    rotary,
    rotate,
    split_rows,
    wide,
)

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


SCORES = 2**26
"""Bytes of attention scores, of all layers together, up to which a backward pass has them kept."""

UNROLLED = 8
"""Layers up to which they are written out one after the other; more are one loop."""

REMAT = {
    "layer": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a backward pass keeps of a layer, by name: nothing but its input, or the results of its products with weights."""


class Cache(NamedTuple):
    """Keys and values so far, so that a decoding step writes each in place.

    Attributes:
        layers: of few layers the parameters of each, so that no step takes them out of the stack again; else None.
        keys: already rotated, `[L, N, K, H, C]`; of few layers a tuple of L arrays, which need no slicing, without the
            axis N of a single row: compilers would drop it in products, and copy the cache between the two shapes.
        values: likewise, `[L, N, K, C, H]`.
        valid: `[N, C]`, True where a real token has been written.
        positions: `[N]` int32, position of the next token.
        column: scalar int32, where the next token is written, in every row.
    """

    layers: Any
    keys: Any
    values: Any
    valid: jax.Array
    positions: jax.Array
    column: jax.Array


class Product(nnx.Module):
    """`x W + bias + (x down) up`; the bias and the adapter of rank R only where there is one.

    The adapter's products are computed in float32 at least (LoRA, arXiv 2106.09685, with alpha = R).
    """

    def __init__(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], *, scale: float = 1.0, bias: bool = False, rank: int = 0
    ):
        self.weight = normal(rngs, shape, scale * shape[0] ** -0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[1:]))
        if rank:
            self.down = normal(rngs, (shape[0], rank), shape[0] ** -0.5)
            self.up = nnx.Param(jnp.zeros((rank, *shape[1:])))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[N, T, out]` in x's dtype, what is behind the weight's first axis flattened."""
        weight = self.weight[...]
        out = x @ weight.reshape(weight.shape[0], -1).astype(x.dtype)
        if hasattr(self, "down"):
            precise = x.astype(wide(x.dtype)) @ self.down[...] @ self.up[...].reshape(self.up.shape[0], -1)
            out = (out + precise).astype(x.dtype)
        if hasattr(self, "bias"):
            out = out + self.bias[...].reshape(1, 1, -1).astype(x.dtype)
        return out


class Norm(nnx.Module):
    """One of the norms that `DecoderConfig.norm` names, over the last axis."""

    def __init__(self, config: DecoderConfig, size: int):
        self.config = config
        from_one = config.norm == "rms_from_one"
        self.scale = nnx.Param(jnp.zeros(size) if from_one else jnp.ones(size))
        if config.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, normed, in its dtype."""
        epsilon = self.config.norm_epsilon
        if self.config.norm == "layer":
            return layer_norm(x, self.scale[...], self.bias[...], epsilon)
        norm = rms_norm_from_one if self.config.norm == "rms_from_one" else rms_norm
        return norm(x, self.scale[...], epsilon)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each behind its norm and added to its input."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, rank: int):
        self.config = config
        width, mlp_width, size = config.width, config.mlp_width, config.head_size
        # Products into the residual stream shrink with depth: its size at initialisation does not grow.
        residual = (2 * config.layers) ** -0.5
        self.attention_norm = Norm(config, width)
        # Columns are grouped by key/value head (its queries, its key, its value): heads shard as one axis.
        heads = config.query_heads + 2 * config.key_value_heads
        self.query_key_value = Product(rngs, (width, heads * size), bias=config.query_key_value_bias, rank=rank)
        if config.query_key_norm:
            self.query_norm, self.key_norm = Norm(config, size), Norm(config, size)
        attended = config.query_heads * size
        self.attention_output = Product(rngs, (attended, width), scale=residual, bias=config.output_bias, rank=rank)
        self.mlp_norm = Norm(config, width)
        self.gate_up = Product(rngs, (width, 1 + config.gated, mlp_width), bias=config.mlp_bias, rank=rank)
        self.mlp_output = Product(rngs, (mlp_width, width), scale=residual, bias=config.mlp_bias, rank=rank)
        if config.norm_after:
            self.attention_norm_after, self.mlp_norm_after = Norm(config, width), Norm(config, width)

    def project(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None):
        """Of `x [N, T, D]`: queries `[N, T, K, G, H]` and keys `[N, K, H, T]`, rotated; values `[N, K, T, H]`."""
        config = self.config
        heads, group = config.key_value_heads, config.query_heads // config.key_value_heads
        fused = self.query_key_value(self.attention_norm(x))
        fused = fused.reshape(*x.shape[:2], heads, group + 2, config.head_size)
        turned = fused[..., : group + 1, :]
        if config.query_key_norm:
            query, key = self.query_norm(turned[..., :group, :]), self.key_norm(turned[..., group:, :])
            turned = jnp.concatenate([query, key], axis=-2)
        if rotation is not None:
            shape = turned.shape
            turned = rotate(turned.reshape(*x.shape[:2], -1, config.head_size), rotation).reshape(shape)
        key, value = turned[..., group, :], fused[..., group + 1, :]
        return turned[..., :group, :], jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention's output `[N, T, K * G * H]` and the MLP to the stream `x [N, T, D]`."""
        config = self.config
        attended = self.attention_output(attended)
        x = x + (self.attention_norm_after(attended) if config.norm_after else attended)
        inner = self.gate_up(self.mlp_norm(x))
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            gate, up = jnp.split(inner, 2, axis=-1)
            inner = activation(gate) * up
        else:
            inner = activation(inner)
        out = self.mlp_output(inner)
        return split_rows(x + (self.mlp_norm_after(out) if config.norm_after else out))


class Trunk(nnx.Module):
    """A decoder up to its final norm; with `rank`, every product of its layers has an adapter.

    `layers` is one `Block` whose parameters have the layers as their first axis.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, rank: int = 0):
        self.config = config
        self.embedding = normal(rngs, (config.vocabulary_size, config.width), config.width**-0.5)
        if config.rope_base is None:
            self.positions = normal(rngs, (config.context_length, config.width), 0.1 * config.width**-0.5)
        blocks = [nnx.split(Block(config, rngs, rank)) for _ in range(config.layers)]
        self.layers = nnx.merge(
            blocks[0][0], jax.tree.map(lambda *rows: jnp.stack(rows), *(state for _, state in blocks))
        )
        self.final_norm = Norm(config, config.width)

    def embed(self, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The residual stream `[N, T, D]` before the first layer."""
        config = self.config
        x = self.embedding[...][tokens]
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        x = x.astype(dtype)
        return split_rows(x + self.positions[...][positions].astype(dtype) if config.rope_base is None else x)

    def written_out(self) -> list[Any] | None:
        """The parameters of each layer, taken out of the stack; None where layers are one loop."""
        if self.config.layers > UNROLLED:
            return None
        params = nnx.state(self.layers)
        return [jax.tree.map(lambda leaf, index=index: leaf[index], params) for index in range(self.config.layers)]

    def through(
        self, carry: Any, step: Callable, rows: Any = None, *, checkpoint: Callable | None = None, layers: Any = None
    ) -> tuple[Any, Any]:
        """Carries something through the layers: `step(block, index, near, carry, row) -> (carry, row)`.

        Args:
            carry: such as the residual stream.
            step: `near` says whether the layer has a window: a bool where that is known, else `[]`.
            rows: what each layer has of its own: a list where the layers are written out, else the first axis.
            checkpoint: of a function of the carry, the layer's parameters and its row, what its backward pass keeps.
            layers: of `written_out`, where they are at hand.

        Returns:
            the carry, and the new rows in the same form.
        """
        config = self.config
        structure, params = nnx.split(self.layers)
        near = [index in config.windowed_layers for index in range(config.layers)]

        def one(carry, layer, index, near, row):
            return step(nnx.merge(structure, layer), index, near, carry, row)

        layers = self.written_out() if layers is None else layers
        if layers is not None:
            found = []
            for index, taken in enumerate(layers):
                run = functools.partial(one, index=index, near=near[index])
                run = run if checkpoint is None else checkpoint(run)
                carry, row = run(carry, taken, row=None if rows is None else rows[index])
                found.append(row)
            return carry, found
        alike = len(set(near)) == 1

        def body(carry, each):
            layer, index, is_near, row = each
            run = functools.partial(one, near=near[0] if alike else is_near)
            run = run if checkpoint is None else checkpoint(run)
            return run(carry, layer, index=index, row=row)

        return jax.lax.scan(body, carry, (params, jnp.arange(config.layers), jnp.array(near), rows))

    def rotations(self, positions: jax.Array) -> tuple:
        """Cosines and sines of layers without and with a window; None where there are none."""
        config = self.config
        if config.rope_base is None:
            return None, None
        plain = rotary(positions, frequencies(config.head_size, config.rope_base, config.rope_scaling))
        if config.window_rope_base is None or not config.windowed_layers:
            return plain, plain
        return plain, rotary(positions, frequencies(config.head_size, config.window_rope_base))

    def scoring(self) -> dict[str, float | None]:
        """What `layers.attend` is told of this decoder's scores."""
        return {"scale": self.config.query_scale, "cap": self.config.score_cap}

    def forward(
        self, tokens: jax.Array, mask: jax.Array, dtype: jnp.dtype, *, keep: bool = False, remat: str | None = None
    ) -> tuple[jax.Array, Any]:
        """States `[N, T, D]` of whole rows, and if asked to keep them the layers' keys and values, as `project`'s."""
        columns, positions = jnp.arange(tokens.shape[1]), positions_of(mask)
        # What a padded column sees means nothing; of several texts in a row, each sees itself.
        seen = mask[:, None, :] if mask.dtype == jnp.bool_ else mask[:, None, :] == mask[:, :, None]
        allowed = seen & (columns[None, :, None] >= columns[None, None, :])
        windowed, (plain, turned) = allowed & self.near(positions, positions), self.rotations(positions)
        attention = functools.partial(attend_causally, **self.scoring())
        # Scores are quadratic in T: computing many of them again in the backward pass beats keeping them.
        if not keeps_scores(self.config, *tokens.shape):
            attention = jax.checkpoint(attention)

        def step(block, index, near, x, row):
            del index, row
            query, key, value = block.project(x, _either(near, turned, plain))
            attended = attention(query, key, value, _either(near, windowed, allowed))
            return block.finish(x, attended), (key, value) if keep else None

        checkpoint = None if remat is None else functools.partial(jax.checkpoint, policy=REMAT[remat])
        x, kept = self.through(self.embed(tokens, positions, dtype), step, checkpoint=checkpoint)
        return self.final_norm(x), kept

    def near(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """`[N, T, S]` or broadcast to it: whether a key `[N, S]` lies in the window of a query `[N, T]`."""
        if not self.config.windowed_layers:
            return jnp.ones((1, 1, 1), bool)
        return keys[:, None, :] > queries[:, :, None] - (self.config.window or 0)

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, cache_length: int, dtype: jnp.dtype
    ) -> tuple[jax.Array, Cache]:
        """Last column's state `[N, D]` and a cache of `cache_length` columns that holds the prompts."""
        hidden, kept = self.forward(tokens, mask, dtype, keep=True)
        room = cache_length - tokens.shape[1]

        def longer(leaf, axis):
            padding = [(0, 0)] * leaf.ndim
            padding[axis] = (0, room)
            return jnp.pad(leaf, padding)

        keys, values = zip(*kept, strict=True) if isinstance(kept, list) else kept
        layers = self.written_out()
        if layers is not None and len(tokens) == 1:
            keys, values = jax.tree.map(lambda leaf: leaf[0], (keys, values))
        cache = Cache(
            layers=layers,
            keys=jax.tree.map(lambda leaf: longer(leaf, -1), keys),
            values=jax.tree.map(lambda leaf: longer(leaf, -2), values),
            valid=jnp.pad(mask, ((0, 0), (0, room))),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            column=jnp.int32(tokens.shape[1]),
        )
        return hidden[:, -1], cache

    def decode(self, tokens: jax.Array, cache: Cache, dtype: jnp.dtype) -> tuple[jax.Array, Cache]:
        """State `[N, D]` of one more token in every row, and the cache with it."""
        valid = jax.lax.dynamic_update_slice_in_dim(
            cache.valid, jnp.ones((tokens.shape[0], 1), bool), cache.column, axis=1
        )
        allowed, positions = valid[:, None, :], cache.positions[:, None]
        windowed, (plain, turned) = allowed & self.near(positions, positions_of(valid)), self.rotations(positions)

        def written(kept, new, index, axis):
            """The cache of all layers with one more column in one of them, and that layer's part."""
            if isinstance(kept, tuple):
                line = new.reshape(new.shape[-kept[index].ndim :])
                own = jax.lax.dynamic_update_slice_in_dim(kept[index], line, cache.column, axis=axis)
                return (*kept[:index], own, *kept[index + 1 :]), own.reshape(-1, *own.shape[-3:])
            place = [jnp.zeros((), jnp.int32)] * kept.ndim
            place[0], place[axis] = index, cache.column
            kept = jax.lax.dynamic_update_slice(kept, new[None], place)
            return kept, jax.lax.dynamic_index_in_dim(kept, index, keepdims=False)

        # The cache is carried and not a layer's row: it would be copied whole.
        def step(block, index, near, carry, row):
            x, keys, values = carry
            query, key, value = block.project(x, _either(near, turned, plain))
            (keys, own_keys), (values, own_values) = written(keys, key, index, -1), written(values, value, index, -2)
            attended = attend(query, own_keys, own_values, _either(near, windowed, allowed), **self.scoring())
            return (block.finish(x, attended), keys, values), row

        start = self.embed(tokens[:, None], positions, dtype), cache.keys, cache.values
        (x, keys, values), _ = self.through(start, step, layers=cache.layers)
        new = Cache(cache.layers, keys, values, valid, cache.positions + 1, cache.column + 1)
        return self.final_norm(x)[:, 0], new


def keeps_scores(config: DecoderConfig, rows: int, length: int) -> bool:
    """Returns whether the scores of so many rows are few enough (`SCORES`) for a backward pass to have them kept."""
    return 4 * rows * length**2 * config.query_heads * config.layers <= SCORES


def _either(near: Any, one: Any, other: Any) -> Any:
    """One of two trees of arrays, by a bool or by a `[]`."""
    if isinstance(near, bool) or one is None:
        return one if near is True else other
    return jax.tree.map(lambda yes, no: jnp.where(near, yes, no), one, other)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A normal parameter of mean zero and standard deviation `scale`."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))
