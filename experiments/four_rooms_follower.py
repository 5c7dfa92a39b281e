"""How close a policy network trained on sampled episodes comes to the follower's best response in Four-Rooms.

    python experiments/four_rooms_follower.py

The leader's charges are fixed to those of `results/four_rooms/optima.json` for the cell. The follower knows neither the
rooms nor the charges: it draws episodes and follows a regularised policy gradient with a critic. Reported at every step,
both exact: how far its regularised return is below the best response's, and the leader's return.
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
    """Episodes per goal and step."""
    length: int = 200
    """Maximum length of an episode."""
    inner_steps: int = 4
    """Policy steps per batch of episodes."""
    rate: float = 3e-3
    critic_learning_rate: float = 1e-2
    width: int = 64
    seeds: int = 5
    output: pathlib.Path = pathlib.Path("runs")


def features() -> jax.Array:
    """Returns the networks' inputs, `[C, S, F]`: row and column with their Fourier features, and the goal's one-hot."""
    positions = jnp.asarray(rooms.CELLS, float) / (len(rooms.GRID) - 1)
    waves = [wave(np.pi * order * positions) for order in (1, 2, 4, 8) for wave in (jnp.sin, jnp.cos)]
    of_cell = jnp.concatenate([positions, *waves], axis=-1)
    goals = jnp.eye(len(rooms.GOALS))
    return jnp.stack([jnp.concatenate([of_cell, jnp.tile(goal, (len(of_cell), 1))], axis=-1) for goal in goals])


def known_charges(cell: tuple[float, float]) -> jax.Array:
    """Returns the leader's best known weights of a cell.

    Raises:
        ValueError: the cell is not in the published table.
    """
    for entry in json.loads(OPTIMA.read_text())["cells"]:
        if (entry["entropy weight"], entry["regulariser"]) == cell:
            return jnp.asarray(entry["weights"])
    raise ValueError(f"No charges are known for the cell {cell[0]:g},{cell[1]:g}; take one of the published table.")


def trainer(config: Config, upper: jax.Array, coefficients: rooms.Coefficients, environment: rooms.FourRooms):
    """Returns `key -> (J / entropy weight, the leader's return)`, exact, `[outer_steps]` each."""
    inputs, scale = features(), 1.0 / config.entropy_weight

    def policy(lower, frozen):
        del frozen
        return jax.nn.log_softmax(forward(lower, inputs))

    def value(critic, sample, frozen):
        del frozen
        table = scale * forward(critic, inputs)[..., 0]
        return jax.vmap(lambda table, states: table[states])(table, sample.responses.states)

    problem = incentives.incentive_problem(*REWARDS, episodes=config.episodes, steps=config.length, policy=policy)
    upper_loss, lower_loss = incentives.incentive_losses(*REWARDS, policy=policy)

    def train(key):
        policy_key, critic_key, key = jax.random.split(key, 3)
        lower = network(policy_key, inputs.shape[-1], config.width, len(rooms.MOVES))
        critic = network(critic_key, inputs.shape[-1], config.width, 1)
        rate = optax.linear_schedule(config.rate, 0.0, config.outer_steps * config.inner_steps)
        policy_gradient = actor_critic(problem, value, critic, optax.adam(config.critic_learning_rate), beta=1.0)
        # The leader is fixed, so the tangent is not needed and not updated.
        solver = bilevel.tangent(
            optax.adam(rate), optax.sgd(0.0), steps=config.inner_steps, policy_gradient=policy_gradient
        )
        algorithm = bilevel.bilevel_descent(
            problem, bilevel.central(0.05), solver, optax.set_to_zero(), beta=1.0, annotate=incentives.unlabelled
        )

        def outer_step(state, count):
            losses = (loss(upper, state.policy, coefficients, environment) for loss in (lower_loss, upper_loss))
            follower, leader = (-loss for loss in losses)
            state, _ = algorithm.step(jax.random.fold_in(key, count), state, coefficients, environment)
            return state, (follower, leader)

        return jax.lax.scan(outer_step, algorithm.init(key, upper, lower), jnp.arange(config.outer_steps))[1]

    return train


def best_return(upper: jax.Array, coefficients: rooms.Coefficients, environment: rooms.FourRooms) -> float:
    """Returns the best response's regularised return, exact."""
    reward = jax.vmap(lambda data, frozen: rooms.follower_reward(upper, data, frozen))(coefficients, environment)
    optimum = jax.vmap(tabular.soft_policy_iteration)(reward, environment.mdp, coefficients.entropy_weight)
    return float(jnp.sum(coefficients.weight * jnp.sum(environment.mdp.start * optimum.value, axis=-1)))


def draw(path: pathlib.Path, missed: np.ndarray, leader: np.ndarray, exact: float) -> None:
    """Draws both curves, `[seeds, steps]`, one line per seed."""
    steps = list(range(0, missed.shape[1], max(1, missed.shape[1] // 50)))

    def lines(curves):
        return {f"seed {seed}": (steps, curve[steps].tolist()) for seed, curve in enumerate(curves)}

    best = {"with the best response": (steps, [exact] * len(steps))}
    panels = {
        "Follower's gap": ("outer step", "gap to the best regularised return", lines(missed)),
        "Leader's return": ("outer step", "return", lines(leader) | best),
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
    environment, coefficients = rooms.four_rooms(), rooms.coefficients(*cell)
    began = time.monotonic()
    keys = jax.random.split(jax.random.key(0), config.seeds)
    follower, leader = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(trainer(config, upper, coefficients, environment)))(keys)
    )
    seconds = time.monotonic() - began
    best = best_return(upper, coefficients, environment)
    exact = float(incentives.leader_value(*REWARDS, upper, coefficients, environment))
    missed = best - config.entropy_weight * follower
    final = {
        "best response's regularised return": best,
        "gap of the network, mean of the last 50 steps": float(missed[:, -50:].mean()),
        "gap by seed": missed[:, -50:].mean(axis=1).tolist(),
        "leader's return with the best response": exact,
        "leader's return with the network": float(leader[:, -50:].mean()),
        "leader's return by seed": leader[:, -50:].mean(axis=1).tolist(),
        "seconds": seconds,
    }
    folder.write_json("results.json", {"config": config, "final": final, "missed": missed, "leader": leader})
    draw(folder.path / "follower.png", missed, leader, exact)
    rows = [(name, value) for name, value in final.items() if isinstance(value, float)]
    write_report(
        folder.path,
        title="A network follower in Four-Rooms",
        summary=f"{config.seeds} seeds in {seconds:.0f} s.",
        tables=[Table("After training", ("", "value"), rows)],
        figures=["follower.png"],
        config=config,
    )
    for name, result in final.items():
        print(f"{name}: {np.round(result, 4)}")
    print(folder.path)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
