"""Best known optima of Four-Rooms: annealed restarts, then continuation from every cell's best to every other cell."""

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

    Each round descends at every cell from the best weights of all cells, the terms moved from the source's to the cell's
    own (continuation), or at its own from the first step.
    """
    best: dict = {}
    start = over_seeds(
        lambda key, terms, environment: METHODS["boltzmann"]()(key, terms, environment, Budget(16, steps)), seeds
    )
    for cell in cells:
        outcome = start(jax.random.split(jax.random.key(1), seeds), rooms.terms(*cell), environment)
        index = int(jnp.argmax(outcome.value))
        best[cell] = (float(outcome.value[index]), outcome.upper[index])
        print(f"restarts, cell {cell[0]:g},{cell[1]:g}: {best[cell][0]:.4f}", flush=True)

    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS)

    def descend(source, terms, environment):
        upper, first, rate = source
        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps, 0.01))
        algorithm = bilevel.bilevel_descent_on_losses(
            upper_loss,
            lower_loss,
            incentives.boltzmann(rooms.leader_reward),
            incentives.best_response(*REWARDS),
            optimizer,
        )
        state = algorithm.init(jax.random.key(0), upper, jnp.zeros_like(environment.mdp.transition[..., 0]))

        def one(state, count):
            left = jnp.clip(1.0 - count / (0.6 * steps), 0.0, 1.0)
            data = jax.tree.map(lambda source, own: source**left * own ** (1.0 - left), first, terms)
            before = state.upper
            state, _ = algorithm.step(jax.random.key(0), state, data, environment)
            # Adam's step scaled by the run's own rate.
            return state._replace(upper=before + rate * (state.upper - before)), None

        state, _ = jax.lax.scan(one, state, jnp.arange(steps))
        return exact_value(state.upper, terms, environment), state.upper

    variants = [(cell, continued, rate) for cell in cells for continued in (True, False) for rate in (0.05, 0.3)]
    continued = over_seeds(descend, len(variants))
    for number in range(ROUNDS):
        sources = dict(best)
        for cell in cells:
            given = [
                (sources[other][1], rooms.terms(*(other if follow else cell)), jnp.asarray(rate))
                for other, follow, rate in variants
            ]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
            values, uppers = continued(stacked, rooms.terms(*cell), environment)
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
