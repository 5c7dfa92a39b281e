"""Tabular Markov decision processes: exact soft optima, policy values and occupancies; rollouts by `lax.scan`.

Shape legend: `S` states, `A` actions, `C` contexts (different processes, for example one per goal), `N` episodes, `T`
steps. Functions are written for one context; use `jax.vmap` over contexts and seeds.

    V(s) = sum_a pi(a | s) [r(s, a) - b log pi(a | s) + gamma (1 - terminal(s)) sum_s' P(s' | s, a) V(s')]

with `b` the weight of the entropy. The horizon is infinite; only terminal states end an episode.
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
        terminal: `[S]`, 1 where the episode ends after a step was taken (and rewarded) in this state, else 0.
        discount: `[]`, gamma; below 1, or every policy must reach a terminal state.
    """

    transition: jax.Array
    start: jax.Array
    terminal: jax.Array
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
        log_prob: of each action under the policy that chose it, in nats.
        alive: 1 until the episode ends, 0 after.
    """

    states: jax.Array
    actions: jax.Array
    log_prob: jax.Array
    alive: jax.Array


def check(mdp: TabularMDP, *, name: str = "the environment") -> None:
    """Checks that the arrays are a Markov decision process; they must be concrete, so call it outside of a trace.

    Raises:
        ValueError: naming the environment and the field whose shape or values are wrong.
    """
    transition, start, terminal, discount = (np.asarray(leaf) for leaf in mdp)
    states = transition.shape[-1]
    for field, array, shape in (
        ("transition", transition, (*transition.shape[:-3], states, transition.shape[-2], states)),
        ("start", start, (*transition.shape[:-3], states)),
        ("terminal", terminal, (*transition.shape[:-3], states)),
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
        _check_termination(transition, terminal, name)


def _check_termination(transition: np.ndarray, terminal: np.ndarray, name: str) -> None:
    """Refuses undiscounted processes in which some policy may never reach a terminal state."""
    terminates = terminal > 0
    for _ in range(terminal.shape[-1]):
        # A state terminates if every action leads to such a state with positive probability.
        reached = np.einsum("...sat,...t->...sa", transition, terminates.astype(float)) > 0
        terminates = terminates | np.all(reached, axis=-1)
    if not np.all(terminates):
        state = np.argwhere(~terminates)[0].tolist()
        raise ValueError(
            f"{name}: discount is 1 and an episode may never end (from state {state}); discount it or let states end."
        )


def check_reward(reward: jax.Array, mdp: TabularMDP, *, name: str = "the environment") -> None:
    """Checks that a concrete reward has the shape `[S, A]` of the process and finite values.

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


def at_actions(log_policy: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns the entries `[...]` of `log_policy` `[..., A]` at integer actions `[...]`."""
    return jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]


def action_values(reward: jax.Array, value: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `Q(s, a) = r(s, a) + gamma (1 - terminal(s)) E V(s')`, `[S, A]`."""
    return reward + (mdp.discount * (1.0 - mdp.terminal))[:, None] * (mdp.transition @ value)


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
    max_iterations: int = 50,
) -> SoftOptimum:
    """Returns the soft optimum by alternating evaluation and improvement: Newton's method on the soft Bellman equation.

    It converges quadratically: about eight linear systems from scratch, two or three from a nearby policy, where value
    iteration needs `log(1 / error) / (1 - gamma)` sweeps. Differentiable in the reward, the process and the weight to any
    order, through the fixed point and not through the iterations.

    Args:
        reward: `[S, A]`.
        mdp: the process.
        entropy_weight: b, positive.
        start: `[S, A]`, log-probabilities of the initial policy; uniform by default.
        max_iterations: it stops earlier once no value changes by more than sqrt(machine epsilon) b: the next step would
            change it by the square of that.
    """
    start = jnp.full_like(reward, -jnp.log(reward.shape[-1])) if start is None else start

    def bellman_error(value):
        return _soft_max(action_values(reward, value, mdp), entropy_weight) - value

    def iterate(_, value):
        # custom_root does not differentiate through this function.
        epsilon = jnp.finfo(value.dtype).eps

        def improve(carry):
            value, _, count = carry
            log_policy = jax.nn.log_softmax(action_values(reward, value, mdp) / entropy_weight)
            improved = soft_policy_value(reward, log_policy, mdp, entropy_weight)
            return improved, jnp.max(jnp.abs(improved - value)), count + 1

        def unfinished(carry):
            value, change, count = carry
            tolerance = jnp.maximum(jnp.sqrt(epsilon) * entropy_weight, 8 * epsilon * jnp.max(jnp.abs(value)))
            return (change > tolerance) & (count < max_iterations)

        return jax.lax.while_loop(unfinished, improve, (value, jnp.asarray(jnp.inf, value.dtype), 0))[0]

    initial = jax.lax.stop_gradient(soft_policy_value(reward, start, mdp, entropy_weight))
    value = jax.lax.custom_root(bellman_error, initial, iterate, _solve_tangent)
    return _optimum(reward, value, mdp, entropy_weight)


def soft_policy_value(
    reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP, entropy_weight: float | jax.Array
) -> jax.Array:
    """Returns V of a policy, entropy included, `[S]`."""
    return policy_value(reward - entropy_weight * log_policy, log_policy, mdp)


def policy_value(reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns the expected discounted reward from each state, `[S]`, of a policy `[S, A]`, exactly."""
    policy = jnp.exp(log_policy)
    return solve_fixed_point(_discounted_transition(policy, mdp), jnp.sum(policy * reward, axis=-1))


def occupancy(log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `d(s) = sum_t gamma^t P(s_t = s, alive)`, `[S]`: a return is `sum_s d(s) sum_a pi(a | s) r(s, a)`."""
    return solve_fixed_point(_discounted_transition(jnp.exp(log_policy), mdp).T, mdp.start)


def advantage(reward: jax.Array, log_policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `Q - V` of a policy for a reward, without entropy, `[S, A]`."""
    value = policy_value(reward, log_policy, mdp)
    return action_values(reward, value, mdp) - value[:, None]


def roll_out(key: Key, log_policy: jax.Array, mdp: TabularMDP, *, episodes: int, steps: int) -> Rollouts:
    """Draws episodes of at most `steps` steps. Consumes the key.

    Actions and states are drawn by inverting cumulative distributions; steps after the end have `alive` 0.
    """
    action_cdf = jnp.cumsum(jnp.exp(log_policy), axis=-1)
    state_cdf = jnp.cumsum(mdp.transition, axis=-1)

    def draw(cumulative, uniform):
        # Scaled by the last entry, which is 1 only up to rounding, so that the index stays in range.
        return jnp.sum(uniform[:, None] * cumulative[:, -1:] >= cumulative, axis=-1).astype(jnp.int32)

    def step(carry, key):
        state, alive = carry
        uniform = jax.random.uniform(key, (2, episodes), action_cdf.dtype)
        action = draw(action_cdf[state], uniform[0])
        next_state = draw(state_cdf[state, action], uniform[1])
        record = (state, action, log_policy[state, action], alive)
        return (next_state, alive * (1.0 - mdp.terminal[state])), record

    start_key, key = jax.random.split(key)
    start_cdf = jnp.broadcast_to(jnp.cumsum(mdp.start), (episodes, len(mdp.start)))
    start = draw(start_cdf, jax.random.uniform(start_key, (episodes,), start_cdf.dtype))
    alive = jnp.ones(episodes, action_cdf.dtype)
    _, history = jax.lax.scan(step, (start, alive), jax.random.split(key, steps))
    states, actions, log_prob, alive = (leaf.T for leaf in history)
    return Rollouts(states, actions, log_prob * alive, alive)


MAX_UNROLLED_STATES = 24
"""Systems of at most this many states are solved by unrolled elimination, which XLA fuses with the surrounding code."""


def solve_fixed_point(matrix: jax.Array, constant: jax.Array) -> jax.Array:
    """Returns the solution `[S]` of `x = matrix x + constant`, differentiable in both; safe to vmap within jit on a CPU.

    The matrix `[S, S]` must be non-negative with powers that go to 0, as `gamma P` and its transpose are, or `P` where
    every episode ends.
    """
    if len(matrix) <= MAX_UNROLLED_STATES:
        powers = _sum_of_powers(jax.lax.stop_gradient(matrix))
        solve, transpose_solve = (
            lambda constant, powers=powers: constant + powers @ constant for powers in (powers, powers.T)
        )
    else:
        system = jnp.eye(len(matrix), dtype=matrix.dtype) - matrix
        solve, transpose_solve = (functools.partial(_factorise_and_solve, side) for side in (system, system.T))
    return jax.lax.custom_linear_solve(
        lambda vector: vector - matrix @ vector,
        constant,
        solve=lambda _, constant: solve(constant),
        transpose_solve=lambda _, constant: transpose_solve(constant),
    )


def _sum_of_powers(matrix: jax.Array) -> jax.Array:
    """Returns `matrix + matrix^2 + ...`, that is `(I - matrix)^-1 - I`: the total weight of all paths between states.

    Step k adds the paths through state k (Kleene 1956): elimination without pivots, in which every term summed is
    non-negative. It contains no array constants on purpose: the compiler makes a separate constant at each use, and then
    does not see that a loop computes the same inverse twice.
    """
    for state in range(len(matrix)):
        matrix = matrix + jnp.outer(matrix[:, state], matrix[state] / (1.0 - matrix[state, state]))
    return matrix


@jax.custom_batching.sequential_vmap
def _solve_sequentially(system: jax.Array, constant: jax.Array) -> jax.Array:
    return jnp.linalg.solve(system, constant)


def _factorise_and_solve(system: jax.Array, constant: jax.Array) -> jax.Array:
    # A batched factorisation can deadlock in XLA's thread pool on CPUs with few cores (jax-ml/jax#24219); solving one
    # after another is as fast.
    return jax.lax.platform_dependent(system, constant, cpu=_solve_sequentially, default=jnp.linalg.solve)


def _solve_tangent(linear_error, constant: jax.Array) -> jax.Array:
    # linear_error is a linearised Bellman error, `matrix x - x`; its matrix is that of discounted next values.
    return solve_fixed_point(jax.jacfwd(lambda vector: linear_error(vector) + vector)(constant), -constant)


def _discounted_transition(policy: jax.Array, mdp: TabularMDP) -> jax.Array:
    """Returns `gamma diag(1 - terminal) P_pi`, `[S, S]`."""
    transition = jnp.einsum("sa,sat->st", policy, mdp.transition)
    return mdp.discount * (transition - mdp.terminal[:, None] * transition)


def _soft_max(values: jax.Array, entropy_weight: float | jax.Array) -> jax.Array:
    return entropy_weight * jax.nn.logsumexp(values / entropy_weight, axis=-1)


def _optimum(reward: jax.Array, value: jax.Array, mdp: TabularMDP, entropy_weight: float | jax.Array) -> SoftOptimum:
    action_value = action_values(reward, value, mdp)
    return SoftOptimum(jax.nn.log_softmax(action_value / entropy_weight, axis=-1), value, action_value)
