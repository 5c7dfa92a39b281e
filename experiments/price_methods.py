"""Methods on the language of replies: bilevel descent with a learned scale, without, and iterated RLHF.

All runs of a method, one per beta and seed, are one compiled program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from price_task import Replies, reward, utility

from jaxrlhf import bandit, bilevel, objectives, preferences
from jaxrlhf.preferences.scale import ScaledReward, learn_scale, scale_optimizer, scaled, with_scale

METHODS = ("bilevel", "decoupled", "fixed_scale")
RATES = {"bilevel": 0.005, "decoupled": 0.1, "fixed_scale": 0.03}
"""Initial rates of Adam for the reward: the best of 0.005, 0.01, 0.03 and 0.1; of `fixed_scale`, of 0.01 and 0.03."""


class Training(NamedTuple):
    """Settings that all runs share.

    Attributes:
        kl_price: kappa, win rate a nat.
        steps, pairs: outer steps, and pairs drawn per request and step.
        utility_weight: weight of the coupled utility beside the uncoupled likelihood.
        reward_learning_rate, scale_learning_rate: initial rates of Adam, for the weights and for the log-scale; both
            decay to 0 (cosine).
    """

    kl_price: float
    steps: int
    pairs: int
    utility_weight: float
    reward_learning_rate: float
    scale_learning_rate: float


class Runs(NamedTuple):
    """Measurements of one method's runs, exact: `[betas, seeds]`, and a curve of one more axis.

    Attributes:
        utility, win_rate, kl: of the last policy.
        curve: `[betas, seeds, steps + 1]`, the utility after each step; the first is the reference's.
        log_scale: the learned alpha; 0 where it is fixed.
        log_policy: `[betas, seeds, C, K]`.
        labels: labels of one run.
    """

    utility: np.ndarray
    win_rate: np.ndarray
    kl: np.ndarray
    curve: np.ndarray
    log_scale: np.ndarray
    log_policy: np.ndarray
    labels: int


def algorithm_of(
    method: str, beta: jax.Array, training: Training
) -> tuple[bilevel.Algorithm, jax.Array | ScaledReward]:
    """Returns a method at one beta, and the upper parameters to start from.

    The lower level is solved in closed form, pi proportional to reference exp(R / beta): what differs between methods is
    the upper level alone.
    """
    objective = objectives.add(
        objectives.likelihood(coupled=False),
        objectives.utility(kl_price=training.kl_price, weight=training.utility_weight),
    )
    problem = bandit.bandit_problem(reward, objective, pairs=training.pairs)
    optimizer = optax.adam(optax.cosine_decay_schedule(training.reward_learning_rate, training.steps))
    rewards, upper = reward, jnp.full(4, 0.01)
    if method == "bilevel":
        problem, rewards, upper = learn_scale(problem, beta=beta), scaled(reward), with_scale(upper)
        rate = optax.cosine_decay_schedule(training.scale_learning_rate, training.steps)
        optimizer = scale_optimizer(optimizer, optax.adam(rate))
    algorithm = bilevel.bilevel_descent(
        problem,
        bilevel.decoupled() if method == "decoupled" else bilevel.boltzmann(),
        bilevel.closed_form(lambda task, _: task.frozen.reference + rewards(task.upper, task.frozen.features) / beta),
        optimizer,
        beta=beta,
        annotate=preferences.gold_annotator(bandit.gold_score),
    )
    return algorithm, upper


@functools.cache
def compiled_runs(method: str, training: Training) -> Callable:
    """Returns the compiled `(betas, keys, frozen, wins) -> measurements` of all runs, as in `Runs`."""

    def run(beta, key, frozen, wins):
        algorithm, upper = algorithm_of(method, beta, training)
        state = algorithm.init(key, upper, frozen.reference)

        def measure(state):
            log_policy = jax.nn.log_softmax(state.policy, axis=-1)
            return utility(log_policy, wins, frozen.reference, training.kl_price)

        def step(state, key):
            state, _ = algorithm.step(key, state, None, frozen)
            return state, measure(state)[0]

        start = measure(state)[0]
        state, curve = jax.lax.scan(step, state, jax.random.split(key, training.steps))
        log_scale = state.upper.log_scale if method == "bilevel" else jnp.zeros(())
        curve = jnp.concatenate([start[None], curve])
        return *measure(state), curve, log_scale, jax.nn.log_softmax(state.policy, axis=-1)

    return jax.jit(jax.vmap(jax.vmap(run, (None, 0, None, None)), (0, None, None, None)))


def train(method: str, replies: Replies, betas: Sequence[float], seeds: Sequence[int], training: Training) -> Runs:
    """Trains one method at every beta with every seed."""
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    measured = compiled_runs(method, training)(jnp.array(betas), keys, replies.frozen, replies.wins)
    return Runs(*map(np.asarray, measured), labels=training.steps * training.pairs * len(replies.requests))
