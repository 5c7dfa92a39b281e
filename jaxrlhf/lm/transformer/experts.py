"""A mixture of experts: several MLPs a layer, of which a router chooses a few for each token.

    y = sum over the k experts e of largest p_e of  w_e output_e (activation(gate_e x) * up_e x),    p = softmax(router x)

where w is p, or p divided by the chosen experts' sum (Shazeer et al., arXiv 1701.06538; Mixtral, arXiv 2401.04088). Every
expert computes every token, and those that were not chosen count 0: one product of ordinary shape that every mesh splits
and every transformation takes, for E / k times the arithmetic. On a CPU grouped products (`jax.lax.ragged_dot`) are masked
products themselves and take 1.3 to 4.5 times as long (`benchmarks/experts.py`).

Shapes: N rows, T columns, L layers, D width, E experts, M features of an expert, k experts a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.lm.transformer.config import DecoderConfig, Experts
from jaxrlhf.lm.transformer.layers import wide
from jaxrlhf.lm.transformer.modules import ACTIVATIONS, KEPT, normal


class MixtureOfExperts(nnx.Module):
    """The experts of a layer and their router, which is computed in float32 at least."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, scale: float):
        assert config.experts is not None
        self.config, self.settings = config, config.experts
        width, count, inner = config.width, config.experts.count, config.mlp_width
        self.router = normal(rngs, (width, count), width**-0.5)
        self.gate_up = normal(rngs, (width, count, 2, inner), width**-0.5)
        self.output = normal(rngs, (count, inner, width), scale * inner**-0.5)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the experts' sum `[N, T, D]` in x's dtype, and the router's probabilities `[N, T, E]`."""
        precise = x.astype(wide(x.dtype))
        probabilities = jax.nn.softmax(precise @ self.router[...].astype(precise.dtype), axis=-1)
        weights = chosen_weights(probabilities, self.settings).astype(x.dtype)
        width, count, _, inner = self.gate_up[...].shape
        fused = checkpoint_name(x @ self.gate_up[...].reshape(width, -1).astype(x.dtype), KEPT)
        fused = fused.reshape(*x.shape[:2], count, 2, inner)
        inside = ACTIVATIONS[self.config.activation](fused[..., 0, :]) * fused[..., 1, :] * weights[..., None]
        output = self.output[...].reshape(-1, width).astype(x.dtype)
        return inside.reshape(*x.shape[:2], -1) @ output, probabilities


def chosen_weights(probabilities: jax.Array, settings: Experts) -> jax.Array:
    """Returns what each expert counts, `[..., E]` from the router's probabilities: 0 where it was not chosen."""
    largest, chosen = jax.lax.top_k(probabilities, settings.chosen)
    if settings.normalised:
        largest = largest / jnp.sum(largest, axis=-1, keepdims=True)
    experts = jax.nn.one_hot(chosen, settings.count, dtype=probabilities.dtype)
    return jnp.sum(largest[..., None] * experts, axis=-2)


class Load(NamedTuple):
    """How tokens were spread over experts; of several batches the sum.

    Attributes:
        chosen: `[L, E]`, how often each was chosen.
        probability: `[L, E]`, sum of its probabilities.
        tokens: `[]`.
    """

    chosen: jax.Array
    probability: jax.Array
    tokens: jax.Array


def load_of(probabilities: jax.Array, mask: Any, settings: Experts) -> Load:
    """Returns the load of probabilities `[L, N, T, E]`, for the real tokens of a mask or of segment ids `[N, T]`."""
    real = (mask > 0).astype(probabilities.dtype)
    chosen = (chosen_weights(jax.lax.stop_gradient(probabilities), settings) > 0).astype(real.dtype)
    by_layer = [jnp.einsum("lnte,nt->le", each, real) for each in (chosen, probabilities)]
    return Load(by_layer[0], by_layer[1], jnp.sum(real))


def balance_loss(load: Load) -> jax.Array:
    """Returns `E sum over e of (choices of e a token) (mean probability of e)`, which is k at balance.

    Pooled over layers, as in transformers (Fedus et al., arXiv 2101.03961, equation 4).
    """
    layers, count = load.chosen.shape
    tokens = jnp.maximum(load.tokens * layers, 1.0)
    return count * jnp.sum(jnp.sum(load.chosen, 0) / tokens * jnp.sum(load.probability, 0) / tokens)
