"""Search for optima of Four-Rooms: annealed restarts, then continuation from each cell's best to every other cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from four_rooms_methods import METHODS, REWARDS, Budget, exact_value

from jaxrlhf import bilevel
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives

ROUNDS = 3


def search(
    cells: list[tuple[float, float]], seeds: int, steps: int, over_seeds, environment: rooms.FourRooms
) -> list[dict]:
    """Returns `{entropy weight, regulariser, value, weights}` of each cell.

    Each round descends at every cell from the best weights of all cells. The coefficients start either at the source
    cell's and move to the cell's own (continuation), or are the cell's own from the first step.
    """
    best: dict = {}
    start = over_seeds(functools.partial(METHODS["boltzmann"](), budget=Budget(16, steps)), seeds)
    for cell in cells:
        outcome = start(jax.random.split(jax.random.key(1), seeds), rooms.coefficients(*cell), environment)
        index = int(jnp.argmax(outcome.value))
        best[cell] = (float(outcome.value[index]), outcome.upper[index])
        print(f"restarts, cell {cell[0]:g},{cell[1]:g}: {best[cell][0]:.4f}", flush=True)

    variants = [(cell, continued, rate) for cell in cells for continued in (True, False) for rate in (0.05, 0.3)]
    descend = over_seeds(continuation(steps), len(variants))
    for number in range(ROUNDS):
        sources = dict(best)
        for cell in cells:
            starts = [
                (sources[source][1], rooms.coefficients(*(source if continued else cell)), jnp.asarray(rate))
                for source, continued, rate in variants
            ]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
            values, uppers = descend(stacked, rooms.coefficients(*cell), environment)
            index = int(jnp.argmax(values))
            if float(values[index]) > best[cell][0]:
                best[cell] = (float(values[index]), uppers[index])
            print(f"continuation {number + 1}/{ROUNDS}, cell {cell[0]:g},{cell[1]:g}: {best[cell][0]:.4f}", flush=True)
    return [
        {
            "entropy weight": cell[0],
            "regulariser": cell[1],
            "value": value,
            "weights": [round(float(weight), 4) for weight in np.asarray(upper)],
        }
        for cell, (value, upper) in best.items()
    ]


def continuation(steps: int):
    """Returns `((upper, initial coefficients, rate), coefficients, environment) -> (value, upper)`, one descent."""
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)

    def descend(start, coefficients, environment):
        upper, initial, rate = start
        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps, 0.01))
        algorithm = bilevel.bilevel_descent_on_losses(
            upper_loss,
            lower_loss,
            incentives.boltzmann(rooms.leader_reward),
            incentives.best_response(*REWARDS),
            optimizer,
        )
        state = algorithm.init(jax.random.key(0), upper, jnp.zeros_like(environment.mdp.transition[..., 0]))

        def outer_step(state, count):
            remaining = jnp.clip(1.0 - count / (0.6 * steps), 0.0, 1.0)
            data = jax.tree.map(lambda first, last: first**remaining * last ** (1.0 - remaining), initial, coefficients)
            before = state.upper
            state, _ = algorithm.step(jax.random.key(0), state, data, environment)
            # Adam's step, scaled by this run's learning rate.
            return state._replace(upper=before + rate * (state.upper - before)), None

        state, _ = jax.lax.scan(outer_step, state, jnp.arange(steps))
        return exact_value(state.upper, coefficients, environment), state.upper

    return descend
