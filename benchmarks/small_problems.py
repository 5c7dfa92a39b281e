"""Outer steps a second where networks play no part: a bandit and a tabular Markov decision process, exact losses.

    python -m benchmarks.small_problems

One and the same algorithm in three ways: the two-policy penalty method (arXiv 2309.01753), K gradient steps for each
policy and one for the reward, all plain gradient descent. Ours is one compiled loop over outer steps. The JAX peer is the
loop as it is commonly written: one jitted step a policy, called from Python. The torch peer is the same with autograd. All
begin alike, and what is checked first is that they end alike.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.sides import (
    Compared,
    Side,
    agree,
    alternate,
    checks,
    machine,
    report,
    side,
    table_of,
    use_all_cores,
    warm_up,
)
from jaxrlhf import exact
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import BilevelAlgorithm, bilevel_descent_on_losses, forward, gradient
from jaxrlhf.known.bandits import random_bandit
from jaxrlhf.mdp.incentives import incentive_losses
from jaxrlhf.mdp.tabular import TabularMDP


@dataclasses.dataclass(frozen=True)
class Config:
    """How long."""

    steps: int = 200
    """Outer steps a call."""
    inner: int = 10
    """Gradient steps of each policy an outer step."""
    contexts: int = 4
    arms: int = 8
    """Of the bandit."""
    states: int = 16
    actions: int = 4
    """Of the Markov decision process."""
    sigma: float = 0.1
    rate: float = 0.2
    upper_learning_rate: float = 0.1
    rounds: int = 7
    output: pathlib.Path = pathlib.Path("runs")


Loss = Callable[[Any, Any], Any]
"""`(upper, lower) -> []`."""


class Problem(NamedTuple):
    """Two losses, G and -J, in both libraries, and where to begin.

    Attributes:
        name: of the problem.
        losses: `(upper, lower, data, frozen) -> []` of JAX, both.
        data, frozen: what they take.
        plain: both as they are commonly written in JAX, `(upper, lower) -> []`.
        in_torch: makes both for torch, likewise.
        upper, lower: the beginning.
    """

    name: str
    losses: tuple[Callable[..., jax.Array], Callable[..., jax.Array]]
    data: Any
    frozen: Any
    plain: tuple[Loss, Loss]
    in_torch: Callable[[], tuple[Loss, Loss]]
    upper: np.ndarray
    lower: np.ndarray


BETA = 0.5
PRICE = BETA / 4


def bandit(config: Config) -> Problem:
    """A linear bandit: J is the reward less beta KL, G a price of KL less the win rate against the reference."""
    known = random_bandit(contexts=config.contexts, arms=config.arms, beta=BETA)
    features, gold, reference = known.frozen
    wins = exact.row_mean(lambda first, second: jax.nn.sigmoid(first - second), reference, gold)
    tables = {"features": features, "wins": wins, "reference": reference}

    def levels(lower, tables):
        own = jax.nn.log_softmax(lower)
        return jnp.exp(own), jnp.mean(jnp.sum(jnp.exp(own) * (own - tables["reference"]), axis=-1))

    def upper_loss(upper, lower, data, frozen):
        own, divergence = levels(lower, frozen)
        return PRICE * divergence - jnp.mean(jnp.sum(own * frozen["wins"], axis=-1))

    def lower_loss(upper, lower, data, frozen):
        own, divergence = levels(lower, frozen)
        return BETA * divergence - jnp.mean(jnp.sum(own * (frozen["features"] @ upper), axis=-1))

    def in_torch():
        import torch

        there = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}

        def levels(lower):
            own = torch.log_softmax(lower, dim=-1)
            return own.exp(), (own.exp() * (own - there["reference"])).sum(dim=-1).mean()

        def upper_loss(upper, lower):
            own, divergence = levels(lower)
            return PRICE * divergence - (own * there["wins"]).sum(dim=-1).mean()

        def lower_loss(upper, lower):
            own, divergence = levels(lower)
            return BETA * divergence - (own * (there["features"] @ upper)).sum(dim=-1).mean()

        return upper_loss, lower_loss

    name = f"bandit, {config.contexts} contexts x {config.arms} arms"
    upper, lower = (np.array(part, np.float32) for part in known.start(jax.random.key(0), 1.0))
    plain = (
        (lambda upper, lower: upper_loss(upper, lower, None, tables)),
        (lambda upper, lower: lower_loss(upper, lower, None, tables)),
    )
    return Problem(name, (upper_loss, lower_loss), None, tables, plain, in_torch, upper, lower)


class World(NamedTuple):
    """A Markov decision process, one context, and what its two players earn, `[1, S, A]`."""

    mdp: TabularMDP
    follower: jax.Array
    leader: jax.Array


class Terms(NamedTuple):
    """The `data` of `incentive_losses`, `[1]`."""

    weight: jax.Array
    entropy_weight: jax.Array


COST = 0.5


def process(config: Config) -> Problem:
    """A random process: the leader pays for what it adds to the follower's rewards."""
    random, (states, actions) = np.random.default_rng(0), (config.states, config.actions)
    transition = random.dirichlet(np.full(states, 0.3), (states, actions)).astype(np.float32)
    start, discount = np.full(states, 1.0 / states, np.float32), 0.9
    earned = random.standard_normal((2, states, actions)).astype(np.float32)
    mdp = TabularMDP(*(jnp.asarray(part)[None] for part in (transition, start, 0 * start, np.float32(discount))))
    world = World(mdp, *(jnp.asarray(part)[None] for part in earned))
    data = Terms(jnp.ones(1), jnp.ones(1))
    losses = incentive_losses(
        lambda upper, data, frozen: frozen.follower + upper,
        lambda upper, data, frozen: frozen.leader - COST * jnp.square(upper),
    )

    def worth(reward, own):
        among = jnp.einsum("sa,sat->st", jnp.exp(own), transition)
        visits = jnp.linalg.solve(jnp.eye(states) - discount * among.T, start)
        return visits @ jnp.sum(jnp.exp(own) * reward, axis=-1)

    def plain_upper(upper, lower):
        return -worth(earned[1] - COST * jnp.square(upper), jax.nn.log_softmax(lower[0]))

    def plain_lower(upper, lower):
        own = jax.nn.log_softmax(lower[0])
        return -worth(earned[0] + upper - own, own)

    def in_torch():
        import torch

        moves, first, follower, leader = map(torch.from_numpy, (transition, start, *earned))

        def expected(reward, own):
            among = torch.einsum("sa,sat->st", own.exp(), moves)
            visits = torch.linalg.solve(torch.eye(states) - discount * among.T, first)
            return visits @ (own.exp() * reward).sum(dim=-1)

        def upper_loss(upper, lower):
            return -expected(leader - COST * upper.square(), torch.log_softmax(lower[0], dim=-1))

        def lower_loss(upper, lower):
            own = torch.log_softmax(lower[0], dim=-1)
            return -expected(follower + upper - own, own)

        return upper_loss, lower_loss

    zero = np.zeros((states, actions), np.float32)
    name, plain = f"process, {states} states x {actions} actions", (plain_upper, plain_lower)
    return Problem(name, losses, data, world, plain, in_torch, zero, zero[None])


def compiled_loop(algorithm: BilevelAlgorithm, problem: Problem, steps: int) -> Callable[[], Any]:
    """Returns the call of our loop: all outer steps compiled as one; it returns the last upper parameters."""
    key = jax.random.key(0)

    @jax.jit
    def run(upper: Params, lower: Params, frozen: Any) -> Params:
        def step(state, _):
            return algorithm.step(key, state, problem.data, frozen)[0], None

        return jax.lax.scan(step, algorithm.init(key, upper, lower), None, length=steps)[0].upper

    upper, lower = jnp.asarray(problem.upper), jnp.asarray(problem.lower)
    return lambda: np.asarray(run(upper, lower, problem.frozen))


def python_loop(config: Config, problem: Problem, sigma: float) -> Callable[[], Any]:
    """Returns the call of the loop as it is commonly written in JAX."""
    outer, inner = problem.plain

    @jax.jit
    def policy_step(upper, lower):
        return lower - config.rate * jax.grad(inner, argnums=1)(upper, lower)

    @jax.jit
    def penalty_step(upper, lower):
        def penalised(lower):
            return inner(upper, lower) + sigma * outer(upper, lower)

        return lower - config.rate * jax.grad(penalised)(lower)

    @jax.jit
    def upper_step(upper, policy, tilted):
        def surrogate(upper):
            return outer(upper, tilted) + (inner(upper, tilted) - inner(upper, policy)) / sigma

        return upper - config.upper_learning_rate * jax.grad(surrogate)(upper)

    def call():
        upper = jnp.asarray(problem.upper)
        policy = tilted = jnp.asarray(problem.lower)
        for _ in range(config.steps):
            for _ in range(config.inner):
                policy = policy_step(upper, policy)
            for _ in range(config.inner):
                tilted = penalty_step(upper, tilted)
            upper = upper_step(upper, policy, tilted)
        return np.asarray(upper)

    return call


def torch_loop(config: Config, problem: Problem, sigma: float) -> Callable[[], Any]:
    """Returns the call of the same in torch."""
    import torch

    outer, inner = problem.in_torch()

    def moved(value, loss, rate):
        value = value.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(value), value)
        return (value - rate * slope).detach()

    def call():
        upper = torch.from_numpy(problem.upper.copy())
        policy = tilted = torch.from_numpy(problem.lower.copy())
        for _ in range(config.steps):
            for _ in range(config.inner):
                policy = moved(policy, lambda lower, upper=upper: inner(upper, lower), config.rate)
            for _ in range(config.inner):
                tilted = moved(
                    tilted, lambda lower, upper=upper: inner(upper, lower) + sigma * outer(upper, lower), config.rate
                )
            upper = moved(
                upper,
                lambda upper, policy=policy, tilted=tilted: (
                    outer(upper, tilted) + (inner(upper, tilted) - inner(upper, policy)) / sigma
                ),
                config.upper_learning_rate,
            )
        return upper.numpy()

    return call


def compare(config: Config, problem: Problem, ours: Callable[[], Any], sigma: float, *, how: str) -> Compared:
    """Checks and times one problem."""
    sides = (
        Side("ours", ours),
        Side("JAX, a Python loop", python_loop(config, problem, sigma)),
        side("torch loop", lambda: torch_loop(config, problem, sigma)),
    )
    warmed = warm_up(sides, calls=1)
    agreed = ", ".join(
        agree(f"the last reward is that of {peer.name}", warmed[0].results[0], seen.results[0], tolerance=1e-3)
        for peer, seen in zip(sides[1:], warmed[1:], strict=True)
        if seen.results
    )
    what = f"{problem.name}, {how}, {config.steps} outer steps of 2 x {config.inner} inner ones"
    return Compared(what, alternate(sides, rounds=config.rounds, warmed=warmed), agreed, goal=5.0)


def rates_of(line: Compared, steps: int) -> str:
    """Returns every side's outer steps a second."""
    return ", ".join(f"{each.name} {steps / each.median:,.0f}" for each in line.sides if each.seconds)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores()
    seen, found = machine(), []
    solver = gradient(optax.sgd(config.rate), steps=config.inner)
    for problem in (bandit(config), process(config)):
        algorithm = bilevel_descent_on_losses(
            *problem.losses, forward(config.sigma), solver, optax.sgd(config.upper_learning_rate), beta=1.0
        )
        ours = compiled_loop(algorithm, problem, config.steps)
        found.append(compare(config, problem, ours, config.sigma, how="two losses"))
    # The same bandit as a problem of pairs, every pair listed: what a learner with labels runs.
    problem = bandit(config)
    known = random_bandit(contexts=config.contexts, arms=config.arms, beta=BETA)
    algorithm = known.algorithm(forward(config.sigma / BETA), solver, optax.sgd(config.upper_learning_rate))
    ours = compiled_loop(algorithm, problem._replace(frozen=known.frozen), config.steps)
    found.append(compare(config, problem, ours, config.sigma, how="all pairs listed"))
    rates = [f"Outer steps a second, {line.what}: {rates_of(line, config.steps)}." for line in found]
    tables = [table_of("Exact problems", found)]
    return report(config, "small_problems", tables, found, seen, notes=[*rates, *checks(found)])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
