"""The losses G and -J of the exact problems of `benchmarks.small_problems`, for JAX and for torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import exact
from jaxrlhf.exact.bandit import Bandit
from jaxrlhf.mdp.incentives import incentive_losses
from jaxrlhf.mdp.tabular import TabularMDP

Loss = Callable[[Any, Any], Any]
"""`(upper, lower) -> []`."""
BETA = 0.5
KL_PRICE = BETA / 4
COST = 0.5
DISCOUNT = 0.9


def bandit_losses(bandit: Bandit) -> tuple[tuple[Callable, Callable], dict[str, jax.Array]]:
    """Returns G and -J, `(upper, lower, data, frozen) -> []`, and the tables that they take as `frozen`.

    J is the reward less beta KL; G is a price of KL less the win rate against the reference.
    """
    features, gold, reference = bandit
    wins = exact.row_mean(lambda first, second: jax.nn.sigmoid(first - second), reference, gold)

    def policy_and_kl(lower, tables):
        log_policy = jax.nn.log_softmax(lower)
        policy = jnp.exp(log_policy)
        return policy, jnp.mean(jnp.sum(jnp.exp(log_policy) * (log_policy - tables["reference"]), axis=-1))

    def upper_loss(upper, lower, data, frozen):
        policy, kl = policy_and_kl(lower, frozen)
        return KL_PRICE * kl - jnp.mean(jnp.sum(policy * frozen["wins"], axis=-1))

    def lower_loss(upper, lower, data, frozen):
        policy, kl = policy_and_kl(lower, frozen)
        return BETA * kl - jnp.mean(jnp.sum(policy * (frozen["features"] @ upper), axis=-1))

    return (upper_loss, lower_loss), {"features": features, "wins": wins, "reference": reference}


def torch_bandit_losses(arrays: dict[str, jax.Array]) -> tuple[Loss, Loss]:
    """Returns the losses of `bandit_losses` for torch, from its tables."""
    import torch

    tables = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def policy_and_kl(lower):
        log_policy = torch.log_softmax(lower, dim=-1)
        return log_policy.exp(), (log_policy.exp() * (log_policy - tables["reference"])).sum(dim=-1).mean()

    def upper_loss(upper, lower):
        policy, kl = policy_and_kl(lower)
        return KL_PRICE * kl - (policy * tables["wins"]).sum(dim=-1).mean()

    def lower_loss(upper, lower):
        policy, kl = policy_and_kl(lower)
        return BETA * kl - (policy * (tables["features"] @ upper)).sum(dim=-1).mean()

    return upper_loss, lower_loss


class World(NamedTuple):
    """A random Markov decision process and the rewards of its two players.

    Attributes:
        transition: `[S, A, S]`.
        start: `[S]`, the distribution of the first state.
        follower, leader: `[S, A]`, their rewards; the leader pays for what it adds to the follower's.
    """

    transition: np.ndarray
    start: np.ndarray
    follower: np.ndarray
    leader: np.ndarray


def process_world(states: int, actions: int) -> World:
    """Draws a random process."""
    random = np.random.default_rng(0)
    transition = random.dirichlet(np.full(states, 0.3), (states, actions)).astype(np.float32)
    follower, leader = random.standard_normal((2, states, actions)).astype(np.float32)
    return World(transition, np.full(states, 1.0 / states, np.float32), follower, leader)


class Frozen(NamedTuple):
    """The `frozen` of `incentive_losses`: the process and both rewards, with a leading axis of one context."""

    mdp: TabularMDP
    follower: jax.Array
    leader: jax.Array


class Terms(NamedTuple):
    """The `data` of `incentive_losses`, `[1]`."""

    weight: jax.Array
    entropy_weight: jax.Array


def process_losses(world: World) -> tuple[tuple[Callable, Callable], Terms, Frozen, tuple[Loss, Loss]]:
    """Returns G and -J as `incentive_losses`, their `data` and `frozen`, and both as they are commonly written in JAX."""
    transition, start, follower, leader = world
    states = len(start)
    tables = (transition, start, 0 * start, np.float32(DISCOUNT))
    mdp = TabularMDP(*(jnp.asarray(table)[None] for table in tables))
    frozen = Frozen(mdp, *(jnp.asarray(reward)[None] for reward in (follower, leader)))
    losses = incentive_losses(
        lambda upper, data, frozen: frozen.follower + upper,
        lambda upper, data, frozen: frozen.leader - COST * jnp.square(upper),
    )

    def expected(reward, log_policy):
        moves = jnp.einsum("sa,sat->st", jnp.exp(log_policy), transition)
        visits = jnp.linalg.solve(jnp.eye(states) - DISCOUNT * moves.T, start)
        return visits @ jnp.sum(jnp.exp(log_policy) * reward, axis=-1)

    def upper_loss(upper, lower):
        return -expected(leader - COST * jnp.square(upper), jax.nn.log_softmax(lower[0]))

    def lower_loss(upper, lower):
        log_policy = jax.nn.log_softmax(lower[0])
        return -expected(follower + upper - log_policy, log_policy)

    return losses, Terms(jnp.ones(1), jnp.ones(1)), frozen, (upper_loss, lower_loss)


def torch_process_losses(world: World) -> tuple[Loss, Loss]:
    """Returns the losses of `process_losses` for torch."""
    import torch

    transition, start, follower, leader = map(torch.from_numpy, world)
    states = len(start)

    def expected(reward, log_policy):
        moves = torch.einsum("sa,sat->st", log_policy.exp(), transition)
        visits = torch.linalg.solve(torch.eye(states) - DISCOUNT * moves.T, start)
        return visits @ (log_policy.exp() * reward).sum(dim=-1)

    def upper_loss(upper, lower):
        return -expected(leader - COST * upper.square(), torch.log_softmax(lower[0], dim=-1))

    def lower_loss(upper, lower):
        log_policy = torch.log_softmax(lower[0], dim=-1)
        return -expected(follower + upper - log_policy, log_policy)

    return upper_loss, lower_loss
