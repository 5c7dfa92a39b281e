"""Tabular Markov decision processes: soft optima, policy evaluation and visits exactly, rollouts by `lax.scan`.

Shape legend: `S` states, `A` actions, `C` contexts (processes that differ, one a goal say), `N` episodes, `T` steps.
Everything here is written for one context; `jax.vmap` maps it over contexts and seeds.

    V(s) = sum_a pi(a | s) [r(s, a) - b log pi(a | s) + gamma (1 - ends(s)) sum_s' P(s' | s, a) V(s')]

with `b` the entropy's weight. Discounted sums are infinite, cut only by states that end the episode.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Key


class TabularMDP(NamedTuple):
    """A finite process without its reward.

    Attributes:
        transition: `[S, A, S]`, probability of the next state; rows sum to 1.
        start: `[S]`, probability of the first state.
        ends: `[S]`, 1 where the episode is over once a step was taken (and rewarded) there, else 0.
        discount: `[]`, gamma; below 1, or every policy must reach an ending state.
    """

    transition: jax.Array
    start: jax.Array
    ends: jax.Array
    discount: jax.Array


class SoftOptimum(NamedTuple):
    """The policy that maximises reward plus weighted entropy.

    Attributes:
        log_policy: `[S, A]`, log-probabilities in nats.
        value: `[S]`, V, entropy included.
        action_value: `[S, A]`, Q; the policy is softmax(Q / b).
    """

    log_policy: jax.Array
    value: jax.Array
    action_value: jax.Array


class Rollouts(NamedTuple):
    """Drawn episodes, `[N, T]`.

    Attributes:
        states: int.
        actions: int.
        log_prob: of each action under the policy that took it, in nats.
        alive: 1 on the steps taken, 0 after the end.
    """

    states: jax.Array
    actions: jax.Array
    log_prob: jax.Array
    alive: jax.Array


def check(mdp: TabularMDP, *, name: str = "the environment") -> None:
    """Refuses arrays that are no Markov decision process; for concrete values, outside of a trace.

    Raises:
        ValueError: naming the environment and the field whose shape or values are wrong.
    """
    transition, start, ends, discount = (np.asarray(leaf) for leaf in mdp)
    states = transition.shape[-1]
    for field, array, shape in (
        ("transition", transition, (*transition.shape[:-3], states, transition.shape[-2], states)),
        ("start", start, (*transition.shape[:-3], states)),
        ("ends", ends, (*transition.shape[:-3], states)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name}: {field} has the shape {array.shape}, expected {shape}.")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name}: {field} holds values that are not finite.")
    for field, array in (("transition", transition), ("start", start)):
        if np.any(array < 0) or not np.allclose(array.sum(axis=-1), 1.0, atol=1e-5):
            raise ValueError(f"{name}: {field} is no probability; its last axis must be non-negative and sum to 1.")
    if not np.all((discount > 0) & (discount <= 1)):
        raise ValueError(f"{name}: discount must lie in (0, 1], got {discount}.")
    if np.any(discount == 1):
        _check_endings(transition, ends, name)


def _check_endings(transition: np.ndarray, ends: np.ndarray, name: str) -> None:
    """Refuses undiscounted processes in which some policy never ends."""
    safe = ends > 0
    for _ in range(ends.shape[-1]):
        # A state is safe once every action leads to a safe state with positive probability.
        safe = safe | np.all(np.einsum("...sat,...t->...sa", transition, safe.astype(float)) > 0, axis=-1)
    if not np.all(safe):
        state = np.argwhere(~safe)[0].tolist()
        raise ValueError(
            f"{name}: discount is 1 and an episode may never end (from state {state}); discount it or let states end."
        )


def check_reward(reward: jax.Array, mdp: TabularMDP, *, name: str = "the environment") -> None:
    """Refuses a reward that does not fit the process, or holds values that are not finite; for concrete values.

    Raises:
        ValueError: naming the environment and what is wrong.
    """
    expected = mdp.transition.shape[:-1]
    if reward.shape != expected:
        raise ValueError(
            f"{name}: reward has the shape {reward.shape}, expected {expected}, a number a state and action."
        )
    if not np.all(np.isfinite(reward)):
        state = np.argwhere(~np.isfinite(np.asarray(reward)))[0].tolist()
        raise ValueError(f"{name}: reward is not finite at {state}.")


def action_values(reward: jax.Array, value: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `Q(s, a) = r(s, a) + gamma (1 - ends(s)) E V(s')`, `[S, A]`."""
    return reward + (mdp.discount * (1.0 - mdp.ends))[:, None] * (mdp.transition @ value)


def soft_value_iteration(
    reward: jax.Array, mdp: TabularMDP, entropy_weight: float | jax.Array, *, sweeps: int = 500
) -> SoftOptimum:
    """Returns the soft optimum by repeated backups `V <- b logsumexp(Q / b)` from 0; the error falls by gamma a sweep."""

    def sweep(value, _):
        return _soft_max(action_values(reward, value, mdp), entropy_weight), None

    value, _ = jax.lax.scan(sweep, jnp.zeros_like(mdp.start), None, length=sweeps)
    return _optimum(reward, value, mdp, entropy_weight)


def soft_policy_iteration(
    reward: jax.Array,
    mdp: TabularMDP,
    entropy_weight: float | jax.Array,
    *,
    start: jax.Array | None = None,
    most: int = 50,
) -> SoftOptimum:
    """Returns the soft optimum by evaluation and improvement in turns, Newton's method on the soft Bellman equation.

    It converges quadratically: from scratch about eight linear systems, from a policy near by two or three, where value
    iteration needs `log(1 / error) / (1 - gamma)` sweeps. Differentiable in the reward, the process and the weight to any
    order, through the fixed point and not through the iterations.

    Args:
        reward: `[S, A]`.
        mdp: the process.
        entropy_weight: b, positive.
        start: `[S, A]`, log-probabilities of the policy to begin at; uniform by default.
        most: iterations at most. It stops where a step changes no value by more than sqrt(machine epsilon) b, and the
            next would change it by the square of that.
    """
    start = jnp.full_like(reward, -jnp.log(reward.shape[-1])) if start is None else start

    def bellman_error(value):
        return _soft_max(action_values(reward, value, mdp), entropy_weight) - value

    def solve(_, value):
        # Within custom_root nothing is differentiated.
        epsilon = jnp.finfo(value.dtype).eps

        def improve(carry):
            value, _, count = carry
            log_policy = jax.nn.log_softmax(action_values(reward, value, mdp) / entropy_weight)
            better = soft_policy_value(reward, log_policy, mdp, entropy_weight)
            return better, jnp.max(jnp.abs(better - value)), count + 1

        def unfinished(carry):
            value, change, count = carry
            enough = jnp.maximum(jnp.sqrt(epsilon) * entropy_weight, 8 * epsilon * jnp.max(jnp.abs(value)))
            return (change > enough) & (count < most)

        return jax.lax.while_loop(unfinished, improve, (value, jnp.asarray(jnp.inf, value.dtype), 0))[0]

    first = jax.lax.stop_gradient(soft_policy_value(reward, start, mdp, entropy_weight))
    value = jax.lax.custom_root(bellman_error, first, solve, _solve_dense)
    return _optimum(reward, value, mdp, entropy_weight)


def soft_policy_value(
    reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP, entropy_weight: float | jax.Array
) -> jax.Array:
    """Returns V of a policy, entropy included, `[S]`."""
    return policy_value(reward - entropy_weight * log_policy, log_policy, mdp)


def policy_value(reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns the expected discounted reward from each state, `[S]`, of a policy `[S, A]`: exact evaluation."""
    policy = jnp.exp(log_policy)
    return solve(_discounted_chain(policy, mdp), jnp.sum(policy * reward, axis=-1))


def occupancy(log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `d(s) = sum_t gamma^t P(s_t = s, alive)`, `[S]`: a return is `sum_s d(s) sum_a pi(a | s) r(s, a)`."""
    return solve(_discounted_chain(jnp.exp(log_policy), mdp).T, mdp.start)


def advantage(reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `Q - V` of a policy for a reward, without entropy, `[S, A]`."""
    value = policy_value(reward, log_policy, mdp)
    return action_values(reward, value, mdp) - value[:, None]


def roll_out(key: Key, log_policy: jax.Array, mdp: TabularMDP, *, episodes: int, steps: int) -> Rollouts:
    """Draws episodes of at most `steps` steps. Consumes the key.

    A step costs two draws by inverse distribution functions; the steps of an episode that has ended count as none.
    """
    of_actions = jnp.cumsum(jnp.exp(log_policy), axis=-1)
    of_states = jnp.cumsum(mdp.transition, axis=-1)

    def draw(cumulative, uniform):
        # The last entry is 1 up to rounding, so the search stays within the axis.
        return jnp.sum(uniform[:, None] * cumulative[:, -1:] >= cumulative, axis=-1).astype(jnp.int32)

    def step(carry, key):
        state, alive = carry
        uniform = jax.random.uniform(key, (2, episodes), of_actions.dtype)
        action = draw(of_actions[state], uniform[0])
        following = draw(of_states[state, action], uniform[1])
        seen = (state, action, log_policy[state, action], alive)
        return (following, alive * (1.0 - mdp.ends[state])), seen

    start_key, key = jax.random.split(key)
    of_starts = jnp.broadcast_to(jnp.cumsum(mdp.start), (episodes, len(mdp.start)))
    first = draw(of_starts, jax.random.uniform(start_key, (episodes,), of_starts.dtype))
    alive = jnp.ones(episodes, of_actions.dtype)
    _, seen = jax.lax.scan(step, (first, alive), jax.random.split(key, steps))
    states, actions, log_prob, alive = (leaf.T for leaf in seen)
    return Rollouts(states, actions, log_prob * alive, alive)


ELIMINATED = 24
"""States up to which a system is solved by elimination written out, which fuses with what is around it."""


def solve(chain: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the solution `[S]` of `x = chain x + right`, differentiable in both; safe to vmap within jit on a CPU.

    The chain `[S, S]` is non-negative and dies out (its powers go to 0), as `gamma P` and its transpose do, or `P` where
    every episode ends.
    """
    if len(chain) <= ELIMINATED:
        among = _powers(jax.lax.stop_gradient(chain))
        solve, transpose_solve = (lambda right, paths=paths: right + paths @ right for paths in (among, among.T))
    else:
        matrix = jnp.eye(len(chain), dtype=chain.dtype) - chain
        solve, transpose_solve = (functools.partial(_factorise_and_solve, each) for each in (matrix, matrix.T))
    return jax.lax.custom_linear_solve(
        lambda vector: vector - chain @ vector,
        right,
        solve=lambda _, right: solve(right),
        transpose_solve=lambda _, right: transpose_solve(right),
    )


def _powers(chain: jax.Array) -> jax.Array:
    """Returns `chain + chain^2 + ...`, that is `(I - chain)^-1 - I`: what all paths from state to state are worth.

    Step k lets paths go through state k too (Kleene 1956): elimination without pivots, in sums of numbers that are not
    negative. Nothing in it is a constant: of those a compiler makes one for each place, and no longer sees that a loop
    computes the same inverse twice.
    """
    for state in range(len(chain)):
        chain = chain + jnp.outer(chain[:, state], chain[state] / (1.0 - chain[state, state]))
    return chain


@jax.custom_batching.sequential_vmap
def _one_by_one(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.linalg.solve(matrix, right)


def _factorise_and_solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    # A batched factorisation waits for itself in XLA's thread pool on CPUs of few cores (jax-ml/jax#24219); one after
    # the other they are as fast.
    return jax.lax.platform_dependent(matrix, right, cpu=_one_by_one, default=jnp.linalg.solve)


def _solve_dense(linear, right: jax.Array) -> jax.Array:
    # The function is that of a Bellman error: discounted next values less the value.
    return solve(jax.jacfwd(lambda vector: linear(vector) + vector)(right), -right)


def _discounted_chain(policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `gamma diag(1 - ends) P_pi`, `[S, S]`."""
    chain = jnp.einsum("sa,sat->st", policy, mdp.transition)
    return mdp.discount * (chain - mdp.ends[:, None] * chain)


def _soft_max(values: jax.Array, entropy_weight: float | jax.Array) -> jax.Array:
    return entropy_weight * jax.nn.logsumexp(values / entropy_weight, axis=-1)


def _optimum(reward: jax.Array, value: jax.Array, mdp: TabularMDP, entropy_weight: float | jax.Array) -> SoftOptimum:
    values = action_values(reward, value, mdp)
    return SoftOptimum(jax.nn.log_softmax(values / entropy_weight, axis=-1), value, values)
