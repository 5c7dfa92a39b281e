"""A follower that learns: a policy network moved by sampled gradients, no value iteration; how far from the best response?

    python experiments/four_rooms_follower.py

The leader's charges are those of `results/four_rooms/optima.json` for the cell. The follower knows neither the rooms nor
the charges: it draws episodes, and moves by regularised policy gradient with a critic. Reported along the way: what it
misses of the best response's regularised return, and what the leader gets from it, both exact.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from four_rooms import OPTIMA
from networks import forward, network

from jaxrlhf import bilevel
from jaxrlhf.algorithms.actor_critic import actor_critic
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives, tabular
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table, write_report
from jaxrlhf.training.run_folder import RunFolder

REWARDS = (rooms.follower_reward, rooms.leader_reward)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    entropy_weight: float = 0.003
    regulariser: float = 1.0
    outer_steps: int = 600
    episodes: int = 64
    """Drawn a goal and step."""
    length: int = 200
    """Steps of an episode at most."""
    inner_steps: int = 4
    """Policy steps on each batch of episodes."""
    rate: float = 3e-3
    critic_learning_rate: float = 1e-2
    width: int = 64
    seeds: int = 5
    output: pathlib.Path = pathlib.Path("runs")


def features() -> jax.Array:
    """Returns what the networks see, `[C, S, F]`: row, column and their Fourier features, and which goal."""
    places = jnp.asarray(rooms.CELLS, float) / (len(rooms.GRID) - 1)
    waves = [wave(np.pi * order * places) for order in (1, 2, 4, 8) for wave in (jnp.sin, jnp.cos)]
    seen = jnp.concatenate([places, *waves], axis=-1)
    goals = jnp.eye(len(rooms.GOALS))
    return jnp.stack([jnp.concatenate([seen, jnp.tile(goal, (len(seen), 1))], axis=-1) for goal in goals])


def known_charges(cell: tuple[float, float]) -> jax.Array:
    """Returns the leader's best known weights of a cell.

    Raises:
        ValueError: the cell is not one of the published table's.
    """
    for entry in json.loads(OPTIMA.read_text())["cells"]:
        if (entry["entropy weight"], entry["regulariser"]) == cell:
            return jnp.asarray(entry["weights"])
    raise ValueError(f"No charges are known for the cell {cell[0]:g},{cell[1]:g}; take one of the published table.")


def trainer(config: Config, upper: jax.Array, terms: rooms.Terms, environment: rooms.FourRooms):
    """Returns `key -> (J in units of the entropy weight, the leader's return)`, exact, `[outer_steps]` each."""
    seen, scale = features(), 1.0 / config.entropy_weight

    def policy(lower, frozen):
        del frozen
        return jax.nn.log_softmax(forward(lower, seen))

    def value(critic, sample, frozen):
        del frozen
        table = scale * forward(critic, seen)[..., 0]
        return jax.vmap(lambda table, states: table[states])(table, sample.responses.states)

    problem = incentives.incentive_problem(*REWARDS, episodes=config.episodes, steps=config.length, policy=policy)
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS, policy=policy)

    def train(key):
        policy_key, critic_key, key = jax.random.split(key, 3)
        lower = network(policy_key, seen.shape[-1], config.width, len(rooms.MOVES))
        critic = network(critic_key, seen.shape[-1], config.width, 1)
        rate = optax.linear_schedule(config.rate, 0.0, config.outer_steps * config.inner_steps)
        slope = actor_critic(problem, value, critic, optax.adam(config.critic_learning_rate), beta=1.0)
        # The leader stands still, so the tangent is not needed and not moved.
        solver = bilevel.tangent(optax.adam(rate), optax.sgd(0.0), steps=config.inner_steps, slope=slope)
        algorithm = bilevel.bilevel_descent(
            problem, bilevel.central(0.05), solver, optax.set_to_zero(), beta=1.0, annotate=incentives.unlabelled
        )

        def one(state, count):
            own = state.policy
            worth = -lower_loss(upper, own, terms, environment), -upper_loss(upper, own, terms, environment)
            state, _ = algorithm.step(jax.random.fold_in(key, count), state, terms, environment)
            return state, worth

        return jax.lax.scan(one, algorithm.init(key, upper, lower), jnp.arange(config.outer_steps))[1]

    return train


def best_return(upper: jax.Array, terms: rooms.Terms, environment: rooms.FourRooms) -> float:
    """Returns the best response's regularised return, exact."""
    reward = jax.vmap(lambda data, here: rooms.follower_reward(upper, data, here))(terms, environment)
    optimum = jax.vmap(tabular.soft_policy_iteration)(reward, environment.mdp, terms.entropy_weight)
    return float(jnp.sum(terms.weight * jnp.sum(environment.mdp.start * optimum.value, axis=-1)))


def draw(path: pathlib.Path, missed: np.ndarray, leader: np.ndarray, exact: float) -> None:
    """Draws both curves, `[seeds, steps]`, a line a seed."""
    steps = list(range(0, missed.shape[1], max(1, missed.shape[1] // 50)))

    def lines(curves):
        return {f"seed {seed}": (steps, curve[steps].tolist()) for seed, curve in enumerate(curves)}

    best = {"with the best response": (steps, [exact] * len(steps))}
    panels = {
        "What the follower misses": ("outer step", "of the best regularised return", lines(missed)),
        "What the leader gets": ("outer step", "return", lines(leader) | best),
    }
    draw_curves(path, panels)


def main(config: Config) -> None:
    """Trains the follower for every seed at once, and reports."""
    cell = (config.entropy_weight, config.regulariser)
    try:
        upper = known_charges(cell)
        folder = RunFolder(config.output, "four_rooms_follower")
    except ValueError as error:
        print(f"four_rooms_follower: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    environment, terms = rooms.four_rooms(), rooms.terms(*cell)
    began = time.monotonic()
    keys = jax.random.split(jax.random.key(0), config.seeds)
    worth, leader = jax.tree.map(np.asarray, jax.jit(jax.vmap(trainer(config, upper, terms, environment)))(keys))
    seconds = time.monotonic() - began
    best = best_return(upper, terms, environment)
    exact = float(incentives.leader_value(*REWARDS, upper, terms, environment))
    missed = best - config.entropy_weight * worth
    final = {
        "best response's regularised return": best,
        "missed by the network, mean of the last 50 steps": float(missed[:, -50:].mean()),
        "missed by seed": missed[:, -50:].mean(axis=1).tolist(),
        "leader's return with the best response": exact,
        "leader's return with the network": float(leader[:, -50:].mean()),
        "leader's return by seed": leader[:, -50:].mean(axis=1).tolist(),
        "seconds": seconds,
    }
    folder.write_json("results.json", {"config": config, "final": final, "missed": missed, "leader": leader})
    draw(folder.path / "follower.png", missed, leader, exact)
    told = [(name, value) for name, value in final.items() if isinstance(value, float)]
    write_report(
        folder.path,
        title="A network follower in Four-Rooms",
        summary=f"{config.seeds} seeds in {seconds:.0f} s.",
        tables=[Table("After training", ("", "value"), told)],
        figures=["follower.png"],
        config=config,
    )
    for name, result in final.items():
        print(f"{name}: {np.round(result, 4)}")
    print(folder.path)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
