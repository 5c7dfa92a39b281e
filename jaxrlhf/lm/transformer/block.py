"""One layer of the decoder as a Flax NNX module: attention and an MLP, or a mixture of experts, behind their norms.

Shapes: N rows, T columns, D width, K key/value heads, G query heads a key/value head, H head size, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.experts import MixtureOfExperts
from jaxrlhf.lm.transformer.layers import split_rows
from jaxrlhf.lm.transformer.modules import ACTIVATIONS, DROPOUT, KEPT, Linear, Norm
from jaxrlhf.lm.transformer.positions import rotate

LINEAR_MAPS = ("query_key_value", "attention_output", "gate_up", "mlp_output")
"""Names of a block's linear maps."""


class Block(nnx.Module):
    """One layer: attention, then an MLP, each with norms before or after it and a residual connection around it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, adapted: frozenset[str]):
        self.config = config
        width, mlp_width, size = config.width, config.mlp_width, config.head_size
        # Weights into the residual stream shrink with depth, so that its scale at initialisation does not grow.
        residual = (2 * config.layers) ** -0.5
        if config.norm_before:
            self.attention_norm, self.mlp_norm = Norm(config, width), Norm(config, width)

        def linear(name: str, *shape: int, **settings: Any) -> Linear:
            return Linear(rngs, shape, adapted=name in adapted, dropout=DROPOUT in adapted, **settings)

        # Columns are grouped by key/value head (its queries, its key, its value), so that heads shard as one axis.
        heads = config.query_heads + 2 * config.key_value_heads
        self.query_key_value = linear("query_key_value", width, heads * size, bias=config.query_key_value_bias)
        if config.query_key_norm:
            queries, keys = (config.query_heads, config.key_value_heads) if config.norm_heads_together else (1, 1)
            self.query_norm, self.key_norm = Norm(config, queries * size), Norm(config, keys * size)
        attended = config.query_heads * size
        self.attention_output = linear("attention_output", attended, width, scale=residual, bias=config.output_bias)
        if config.experts is not None:
            self.experts = MixtureOfExperts(config, rngs, scale=residual)
        else:
            self.gate_up = linear("gate_up", width, 1 + config.gated, mlp_width, bias=config.mlp_bias)
            self.mlp_output = linear("mlp_output", mlp_width, width, scale=residual, bias=config.mlp_bias)
        if config.norm_after:
            self.attention_norm_after, self.mlp_norm_after = Norm(config, width), Norm(config, width)

    def project(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None):
        """Returns of `x [N, T, D]` the queries `[N, T, K, G, H]`, the keys `[N, K, H, T]` and the values `[N, K, T, H]`.

        Queries and keys are rotated unless `rotation` is None.
        """
        config = self.config
        heads, group = config.key_value_heads, config.query_heads // config.key_value_heads
        fused = checkpoint_name(self.query_key_value(self.attention_norm(x) if config.norm_before else x), KEPT)
        fused = fused.reshape(*x.shape[:2], heads, group + 2, config.head_size)
        query_key = fused[..., : group + 1, :]
        if config.query_key_norm:
            query, key = query_key[..., :group, :], query_key[..., group:, :]
            query, key = self._normalised(self.query_norm, query), self._normalised(self.key_norm, key)
            query_key = jnp.concatenate([query, key], axis=-2)
        if rotation is not None:
            shape = query_key.shape
            query_key = rotate(query_key.reshape(*x.shape[:2], -1, config.head_size), rotation).reshape(shape)
        key, value = query_key[..., group, :], fused[..., group + 1, :]
        return query_key[..., :group, :], jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)

    def _normalised(self, norm: Norm, heads: jax.Array) -> jax.Array:
        """Returns queries or keys `[N, T, K, G, H]` normalised over each head, or over all together."""
        if not self.config.norm_heads_together:
            return norm(heads)
        return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)

    def finish(self, x: jax.Array, attended: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the stream `x [N, T, D]` plus the projected attention `[N, T, K * G * H]` plus the MLP.

        And the router's probabilities `[N, T, E]`; None without experts.
        """
        config = self.config
        attended = self.attention_output(checkpoint_name(attended, KEPT))
        x = x + (self.attention_norm_after(attended) if config.norm_after else attended)
        x = checkpoint_name(x, KEPT)
        out, probabilities = self._mlp(self.mlp_norm(x) if config.norm_before else x)
        return split_rows(x + (self.mlp_norm_after(out) if config.norm_after else out)), probabilities

    def _mlp(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        config = self.config
        if config.experts is not None:
            return self.experts(x)
        inner = checkpoint_name(self.gate_up(x), KEPT)
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            gate, up = jnp.split(inner, 2, axis=-1)
            inner = activation(gate) * up
        else:
            inner = activation(inner)
        return self.mlp_output(inner), None
