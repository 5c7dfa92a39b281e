"""The lower problems of one outer step, and what solves them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.types import Key, Params
from jaxrlhf.bilevel.estimate.objectives import SampledObjectives
from jaxrlhf.bilevel.stencil import Index, Stencil


class LowerTask(NamedTuple):
    """The lower problems of one outer step, one for each iterate, which its index names; given to a solver inside a trace.

    Attributes:
        loss: `(lower, index) -> []`, h(phi, lower; tilt) = tilt G - J of that problem.
        upper: the reward parameters phi.
        tilts: `[S]`, `offset * sigma` of each problem, 0 first.
        stencil: the tilts' offsets and coefficients, static.
        sigma: `[]`, the perturbation: relative_sigma * beta.
        labelled: the step's labelled sample (leaves `[S, ...]` where every tilt has its own), or its data.
        frozen: what no gradient touches.
        shared: the objectives that `loss` is made of, where all problems share one sample; else None.
        map: maps a function over problems, as `jax.vmap` does: all at once, or one after another.
    """

    loss: Callable[[Params, Index], jax.Array]
    upper: Params
    tilts: jax.Array
    stencil: Stencil
    sigma: jax.Array
    labelled: Any
    frozen: Params
    shared: SampledObjectives | None = None
    map: Callable[[Callable], Callable] = jax.vmap

    @property
    def indices(self) -> jax.Array:
        """`[S]`, 0 to S - 1."""
        return jnp.arange(len(self.stencil.offsets))

    def gradients(self, lowers: Params) -> Params:
        """Returns each iterate's gradient of its tilted loss, leaves `[S, ...]`."""
        return self.map(jax.grad(self.loss))(lowers, self.indices)


class LowerSolver(NamedTuple):
    """A pair of pure functions on the stacked iterates, leaves `[S, ...]`, tilt 0 first.

    Attributes:
        init: `(lowers) -> solver_state`.
        step: `(key, lowers, solver_state, task) -> (lowers, solver_state, residuals)`, where the residuals `[S]` are the
            gradient norms of the loss used for each iterate, before the last step; under `tangent` of the proximal losses,
            of which only the stencil's combination is driven to 0. Consumes the key.
    """

    init: Callable[[Params], Any]
    step: Callable[[Key, Params, Any, LowerTask], tuple[Params, Any, jax.Array]]


def check_steps(steps: int) -> None:
    """Raises ValueError unless a solver takes at least one step."""
    if steps < 1:
        raise ValueError(f"The lower solver needs at least 1 step, got {steps}.")
