"""How a mixture of experts spreads tokens over its experts, measured on held-out texts."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.lm.learning import ParamsOf
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.experts import Load, load_of
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import gathered

MEASURED_ROWS = 32
"""Texts on which the load is measured."""

LoadOf = Callable[[Params], dict[str, float]]
Evaluate = Callable[[Params, Params], dict[str, float]]
"""`(params, frozen) -> ` metrics."""


def expert_load(config: DecoderConfig, rows: Sequence[np.ndarray]) -> LoadOf:
    """Returns `(params) -> ` the load of a model's experts on the first texts; empty without experts.

    Under `busiest_expert` the largest share of tokens that an expert of any layer has, 1 if it were even; under
    `idle_experts` how many experts, over all layers, no token chose.

    Args:
        config: of the model.
        rows: texts as tokens `[T]`.
    """
    model, rows = decoder(config), list(rows[:MEASURED_ROWS])
    routing, experts = model.routing, config.experts
    if routing is None or experts is None or not rows:
        return lambda params: {}
    tokens, mask = padded_prompts(rows, max(map(len, rows)))
    measure = jax.jit(lambda params: load_of(routing(params, jnp.asarray(tokens), jnp.asarray(mask))[1], mask, experts))

    def load(params: Params) -> dict[str, float]:
        found = Load(*gathered(tuple(measure(params))))
        even = found.tokens * experts.chosen / experts.count
        return {
            "busiest_expert": float(found.chosen.max() / even),
            "idle_experts": float((found.chosen == 0).sum()),
        }

    return load


def with_load(evaluate: Evaluate, load: LoadOf, params_of: ParamsOf) -> Evaluate:
    """Returns an evaluation whose metrics include the load of the model that is evaluated."""
    return lambda params, frozen: evaluate(params, frozen) | load(params_of(params, frozen))
