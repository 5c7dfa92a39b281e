"""One layer of the decoder as a Flax NNX module: attention and an MLP behind their norms.

Shapes: N rows, T columns, D width, K key/value heads, G query heads a key/value head, H head size, R rank of an adapter.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import layer_norm, low_rank, rms_norm, rms_norm_from_one, rotate, split_rows, wide

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


LINEAR_MAPS = ("query_key_value", "attention_output", "gate_up", "mlp_output")
"""Names of a block's linear maps."""


KEPT = "kept"
"""Name of what `trunk` keeps of a layer for the backward pass on a CPU: results of linear maps and of attention."""


class Linear(nnx.Module):
    """`x W + bias + (x down) up`, where bias and adapter of rank R are optional.

    The adapter is computed in float32 at least (LoRA, arXiv 2106.09685, with alpha = R).
    """

    def __init__(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], *, scale: float = 1.0, bias: bool = False, adapted: bool = False
    ):
        self.weight = normal(rngs, shape, scale * shape[0] ** -0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[1:]))
        if adapted:
            # Of rank 1: only the names count, and parameters of any rank take their place.
            self.down = normal(rngs, (shape[0], 1), shape[0] ** -0.5)
            self.up = nnx.Param(jnp.zeros((1, *shape[1:])))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[N, T, out]` in x's dtype; the weight's output axes are flattened into one."""
        weight = self.weight[...]
        out = x @ weight.reshape(weight.shape[0], -1).astype(x.dtype)
        if hasattr(self, "down"):
            precise = low_rank(x.astype(wide(x.dtype)), self.down[...], self.up[...].reshape(self.up.shape[0], -1))
            out = (out + precise).astype(x.dtype)
        if hasattr(self, "bias"):
            out = out + self.bias[...].reshape(1, 1, -1).astype(x.dtype)
        return out


class Norm(nnx.Module):
    """The norm that `DecoderConfig.norm` names, over the last axis."""

    def __init__(self, config: DecoderConfig, size: int):
        self.config = config
        from_one = config.norm == "rms_from_one"
        self.scale = nnx.Param(jnp.zeros(size) if from_one else jnp.ones(size))
        if config.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised x in its dtype."""
        epsilon = self.config.norm_epsilon
        if self.config.norm == "layer":
            return layer_norm(x, self.scale[...], self.bias[...], epsilon)
        norm = rms_norm_from_one if self.config.norm == "rms_from_one" else rms_norm
        return norm(x, self.scale[...], epsilon)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each with norms before or after it and a residual connection around it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, adapted: frozenset[str]):
        self.config = config
        width, mlp_width, size = config.width, config.mlp_width, config.head_size
        # Weights into the residual stream shrink with depth, so that its scale at initialisation does not grow.
        residual = (2 * config.layers) ** -0.5
        if config.norm_before:
            self.attention_norm, self.mlp_norm = Norm(config, width), Norm(config, width)
        # Columns are grouped by key/value head (its queries, its key, its value), so that heads shard as one axis.
        heads = config.query_heads + 2 * config.key_value_heads
        self.query_key_value = Linear(
            rngs, (width, heads * size), bias=config.query_key_value_bias, adapted="query_key_value" in adapted
        )
        if config.query_key_norm:
            queries, keys = (config.query_heads, config.key_value_heads) if config.norm_heads_together else (1, 1)
            self.query_norm, self.key_norm = Norm(config, queries * size), Norm(config, keys * size)
        attended = config.query_heads * size
        self.attention_output = Linear(
            rngs, (attended, width), scale=residual, bias=config.output_bias, adapted="attention_output" in adapted
        )
        self.gate_up = Linear(
            rngs, (width, 1 + config.gated, mlp_width), bias=config.mlp_bias, adapted="gate_up" in adapted
        )
        self.mlp_output = Linear(
            rngs, (mlp_width, width), scale=residual, bias=config.mlp_bias, adapted="mlp_output" in adapted
        )
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

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Returns the stream `x [N, T, D]` plus the projected attention `[N, T, K * G * H]` plus the MLP."""
        config = self.config
        attended = self.attention_output(checkpoint_name(attended, KEPT))
        x = x + (self.attention_norm_after(attended) if config.norm_after else attended)
        x = checkpoint_name(x, KEPT)
        inner = checkpoint_name(self.gate_up(self.mlp_norm(x) if config.norm_before else x), KEPT)
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            gate, up = jnp.split(inner, 2, axis=-1)
            inner = activation(gate) * up
        else:
            inner = activation(inner)
        out = self.mlp_output(inner)
        return split_rows(x + (self.mlp_norm_after(out) if config.norm_after else out))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """Returns a normally distributed parameter of mean zero and standard deviation `scale`."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))
