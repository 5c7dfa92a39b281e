"""Parts of a decoder's layer as Flax NNX modules: linear maps with their adapters, and norms.

Shapes: N rows, T columns, R rank of an adapter.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import layer_norm, low_rank, rms_norm, rms_norm_from_one, wide

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

KEPT = "kept"
"""Name of what `trunk` keeps of a layer for the backward pass on a CPU: results of linear maps and of attention."""


DROPOUT = "dropout"
"""Beside the names of linear maps with adapters: their parameters have a dropout, of `lora.with_dropout`."""


class Linear(nnx.Module):
    """`x W + bias + (dropout(x) down) up`, where bias, adapter of rank R and its dropout are optional.

    The adapter is computed in float32 at least (LoRA, arXiv 2106.09685, with alpha = R).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        *,
        scale: float = 1.0,
        bias: bool = False,
        adapted: bool = False,
        dropout: bool = False,
    ):
        self.weight = normal(rngs, shape, scale * shape[0] ** -0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[1:]))
        if adapted:
            # Of rank 1: only the names count, and parameters of any rank take their place.
            self.down = normal(rngs, (shape[0], 1), shape[0] ** -0.5)
            self.up = nnx.Param(jnp.zeros((1, *shape[1:])))
        if adapted and dropout:
            self.dropout_key, self.dropout_rate = nnx.Param(jnp.zeros(2, jnp.uint32)), nnx.Param(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[N, T, out]` in x's dtype; the weight's output axes are flattened into one."""
        weight = self.weight[...]
        out = x @ weight.reshape(weight.shape[0], -1).astype(x.dtype)
        if hasattr(self, "down"):
            inputs = self._dropped(x.astype(wide(x.dtype)))
            precise = low_rank(inputs, self.down[...], self.up[...].reshape(self.up.shape[0], -1))
            out = (out + precise).astype(x.dtype)
        if hasattr(self, "bias"):
            out = out + self.bias[...].reshape(1, 1, -1).astype(x.dtype)
        return out

    def _dropped(self, x: jax.Array) -> jax.Array:
        if not hasattr(self, "dropout_key"):
            return x
        rate = self.dropout_rate[...].astype(x.dtype)
        kept = jax.random.uniform(jax.random.wrap_key_data(self.dropout_key[...]), x.shape) >= rate
        return jnp.where(kept, x / (1 - rate), 0.0)


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


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """Returns a normally distributed parameter of mean zero and standard deviation `scale`."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))
