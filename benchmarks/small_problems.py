"""Times outer steps without neural networks: a bandit and a tabular Markov decision process with exact losses.

    python -m benchmarks.small_problems

The same algorithm is implemented three times: the two-policy penalty method (arXiv 2309.01753), K gradient steps for each
policy and one for the reward, all plain gradient descent. Ours is one compiled loop over outer steps. "JAX, a Python loop"
is the loop as it is commonly written: one jitted step per policy, called from Python. The torch loop is the same with
autograd. All start from the same point; checked first is that they end at the same point.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.devices import use_all_cores
from benchmarks.reporting import check_notes, comparison_table, machine_info, write_results
from benchmarks.small_losses import (
    BETA,
    Loss,
    bandit_losses,
    process_losses,
    process_world,
    torch_bandit_losses,
    torch_process_losses,
)
from benchmarks.timing import Comparison, Implementation, check_close, if_installed, interleave, warm_up
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Algorithm, bilevel_descent_on_losses, forward, gradient
from jaxrlhf.known.bandits import random_bandit


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates."""

    steps: int = 200
    """Outer steps per call."""
    inner: int = 10
    """Gradient steps of each policy per outer step."""
    contexts: int = 4
    arms: int = 8
    """Of the bandit."""
    states: int = 16
    actions: int = 4
    """Of the Markov decision process."""
    sigma: float = 0.1
    learning_rate: float = 0.2
    upper_learning_rate: float = 0.1
    rounds: int = 7
    output: pathlib.Path = pathlib.Path("runs")


class Problem(NamedTuple):
    """The two losses, G and -J, in both libraries, and the starting point.

    Attributes:
        name: for the table.
        losses: both as `(upper, lower, data, frozen) -> []` in JAX.
        data, frozen: their last arguments.
        plain: both as they are commonly written in JAX, `(upper, lower) -> []`.
        torch_losses: returns both for torch, `(upper, lower) -> []`.
        upper, lower: the starting point.
    """

    name: str
    losses: tuple[Callable[..., jax.Array], Callable[..., jax.Array]]
    data: Any
    frozen: Any
    plain: tuple[Loss, Loss]
    torch_losses: Callable[[], tuple[Loss, Loss]]
    upper: np.ndarray
    lower: np.ndarray


def bandit(config: Config) -> Problem:
    """A linear bandit."""
    known = random_bandit(contexts=config.contexts, arms=config.arms, beta=BETA)
    (upper_loss, lower_loss), tables = bandit_losses(known.frozen)
    upper, lower = (np.array(array, np.float32) for array in known.start(jax.random.key(0), 1.0))
    return Problem(
        name=f"bandit, {config.contexts} contexts x {config.arms} arms",
        losses=(upper_loss, lower_loss),
        data=None,
        frozen=tables,
        plain=(
            lambda upper, lower: upper_loss(upper, lower, None, tables),
            lambda upper, lower: lower_loss(upper, lower, None, tables),
        ),
        torch_losses=lambda: torch_bandit_losses(tables),
        upper=upper,
        lower=lower,
    )


def process(config: Config) -> Problem:
    """A random Markov decision process."""
    world = process_world(config.states, config.actions)
    losses, data, frozen, plain = process_losses(world)
    zero = np.zeros((config.states, config.actions), np.float32)
    return Problem(
        name=f"process, {config.states} states x {config.actions} actions",
        losses=losses,
        data=data,
        frozen=frozen,
        plain=plain,
        torch_losses=lambda: torch_process_losses(world),
        upper=zero,
        lower=zero[None],
    )


def compiled_loop(algorithm: Algorithm, problem: Problem, steps: int) -> Callable[[], Any]:
    """Returns the call of our loop, all outer steps in one program; it returns the final upper parameters."""
    key = jax.random.key(0)

    @jax.jit
    def run(upper: Params, lower: Params, frozen: Any) -> Params:
        def step(state, _):
            return algorithm.step(key, state, problem.data, frozen)[0], None

        return jax.lax.scan(step, algorithm.init(key, upper, lower), None, length=steps)[0].upper

    upper, lower = jnp.asarray(problem.upper), jnp.asarray(problem.lower)
    return lambda: np.asarray(run(upper, lower, problem.frozen))


class Penalty(NamedTuple):
    """The three losses of the penalty method, built from G and -J.

    Attributes:
        policy: `(upper, policy) -> []`, -J.
        tilted: `(upper, tilted) -> []`, -J + sigma G.
        upper: `(upper, policy, tilted) -> []`, whose gradient is the hypergradient.
    """

    policy: Loss
    tilted: Loss
    upper: Callable[[Any, Any, Any], Any]


def penalty_losses(losses: tuple[Loss, Loss], sigma: float) -> Penalty:
    """Returns the losses of the penalty method, in the library of `losses`."""
    outer, inner = losses
    return Penalty(
        policy=inner,
        tilted=lambda upper, tilted: inner(upper, tilted) + sigma * outer(upper, tilted),
        upper=lambda upper, policy, tilted: (
            outer(upper, tilted) + (inner(upper, tilted) - inner(upper, policy)) / sigma
        ),
    )


def python_loop(config: Config, problem: Problem, sigma: float) -> Callable[[], Any]:
    """Returns the call of the loop as it is commonly written in JAX."""
    losses = penalty_losses(problem.plain, sigma)

    @jax.jit
    def policy_step(upper, lower):
        return lower - config.learning_rate * jax.grad(losses.policy, argnums=1)(upper, lower)

    @jax.jit
    def tilted_step(upper, lower):
        return lower - config.learning_rate * jax.grad(losses.tilted, argnums=1)(upper, lower)

    @jax.jit
    def upper_step(upper, policy, tilted):
        return upper - config.upper_learning_rate * jax.grad(losses.upper)(upper, policy, tilted)

    def call():
        upper = jnp.asarray(problem.upper)
        policy = tilted = jnp.asarray(problem.lower)
        for _ in range(config.steps):
            for _ in range(config.inner):
                policy = policy_step(upper, policy)
            for _ in range(config.inner):
                tilted = tilted_step(upper, tilted)
            upper = upper_step(upper, policy, tilted)
        return np.asarray(upper)

    return call


def torch_loop(config: Config, problem: Problem, sigma: float) -> Callable[[], Any]:
    """Returns the call of the same loop in torch."""
    import torch

    losses = penalty_losses(problem.torch_losses(), sigma)

    def updated(value, loss, learning_rate):
        value = value.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(value), value)
        return (value - learning_rate * gradient).detach()

    def upper_loss(policy, tilted, upper):
        return losses.upper(upper, policy, tilted)

    def call():
        upper = torch.from_numpy(problem.upper.copy())
        policy = tilted = torch.from_numpy(problem.lower.copy())
        for _ in range(config.steps):
            for _ in range(config.inner):
                policy = updated(policy, functools.partial(losses.policy, upper), config.learning_rate)
            for _ in range(config.inner):
                tilted = updated(tilted, functools.partial(losses.tilted, upper), config.learning_rate)
            upper = updated(upper, functools.partial(upper_loss, policy, tilted), config.upper_learning_rate)
        return upper.numpy()

    return call


def compare(config: Config, problem: Problem, ours: Callable[[], Any], sigma: float, *, method: str) -> Comparison:
    """Checks and times one problem."""
    implementations = (
        Implementation("ours", ours),
        Implementation("JAX, a Python loop", python_loop(config, problem, sigma)),
        if_installed("torch loop", lambda: torch_loop(config, problem, sigma)),
    )
    warm_ups = warm_up(implementations, calls=1)
    agreed = ", ".join(
        check_close(
            f"the final reward is that of {other.name}", warm_ups[0].results[0], warmed.results[0], tolerance=1e-3
        )
        for other, warmed in zip(implementations[1:], warm_ups[1:], strict=True)
        if warmed.results
    )
    task = f"{problem.name}, {method}, {config.steps} outer steps of 2 x {config.inner} inner ones"
    return Comparison(task, interleave(implementations, rounds=config.rounds, warm_ups=warm_ups), agreed, goal=5.0)


def throughput(comparison: Comparison, steps: int) -> str:
    """Returns the outer steps per second of every implementation."""
    return ", ".join(f"{each.name} {steps / each.median:,.0f}" for each in comparison.timings if each.seconds)


def main(config: Config) -> pathlib.Path:
    """Prints and writes the table; returns its folder."""
    use_all_cores()
    machine, comparisons = machine_info(), []
    solver = gradient(optax.sgd(config.learning_rate), steps=config.inner)
    for problem in (bandit(config), process(config)):
        algorithm = bilevel_descent_on_losses(
            *problem.losses, forward(config.sigma), solver, optax.sgd(config.upper_learning_rate), beta=1.0
        )
        ours = compiled_loop(algorithm, problem, config.steps)
        comparisons.append(compare(config, problem, ours, config.sigma, method="two losses"))
    # The same bandit as a problem of enumerated pairs, which is what an algorithm that learns from labels runs on.
    problem = bandit(config)
    known = random_bandit(contexts=config.contexts, arms=config.arms, beta=BETA)
    algorithm = known.algorithm(forward(config.sigma / BETA), solver, optax.sgd(config.upper_learning_rate))
    ours = compiled_loop(algorithm, problem._replace(frozen=known.frozen), config.steps)
    comparisons.append(compare(config, problem, ours, config.sigma, method="all pairs enumerated"))
    rates = [f"Outer steps per second, {each.task}: {throughput(each, config.steps)}." for each in comparisons]
    tables, notes = [comparison_table("Exact problems", comparisons)], [*rates, *check_notes(comparisons)]
    return write_results(config, "small_problems", tables, comparisons, machine, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
