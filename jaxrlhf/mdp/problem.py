"""Online RLHF on episodes as a `BilevelProblem`, its pairs of trajectories listed or drawn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.mdp.episodes import Episodes, Trajectories, at_steps
from jaxrlhf.mdp.tree import Tree, grow, nodes_of
from jaxrlhf.preferences.objectives import Objective


class Decision(NamedTuple):
    """Where the policy is asked for an action; integer arrays of one shape `[...]`.

    Attributes:
        prompt: which start, in [0, B).
        node: the history so far, numbered as in `jaxrlhf.mdp.tree`.
        state: the present state, in [0, S).
        step: the present step, in [0, T).
    """

    prompt: jax.Array
    node: jax.Array
    state: jax.Array
    step: jax.Array


Policy = Callable[[Params, Decision, Episodes], jax.Array]
"""`(lower, decision [...], frozen) -> [..., A]`, log-probabilities of the actions in nats."""


def history_table(lower: Params, decision: Decision, frozen: Episodes) -> jax.Array:
    """The general policy: logits `[B, N, A]`, a row for every history of every prompt.

    The tilted problem s G - J charges whole trajectories, so its solution depends on the history although the
    environment is Markov and the untilted solution is too.
    """
    del frozen
    return jax.nn.log_softmax(lower, axis=-1)[decision.prompt, decision.node]


def markov_table(lower: Params, decision: Decision, frozen: Episodes) -> jax.Array:
    """A policy of the step and the state: logits `[T, S, A]`. It holds the untilted solution, not the tilted ones."""
    del frozen
    return jax.nn.log_softmax(lower, axis=-1)[decision.step, decision.state]


def reference_logits(frozen: Episodes) -> jax.Array:
    """Returns the reference as a `history_table`, `[B, N, A]`: where to start from."""
    return frozen.reference[grow(frozen).states]


def at_nodes(policy: Policy, lower: Params, tree: Tree, frozen: Episodes) -> jax.Array:
    """Returns the policy's log-probabilities at every node, `[B, N, A]`."""
    batch, count = tree.states.shape
    prompt, node = jnp.indices((batch, count))
    step = jnp.broadcast_to(jnp.asarray(tree.steps), (batch, count))
    return policy(lower, Decision(prompt, node, tree.states, step), frozen)


def episode_problem(
    reward: Callable[[Params, jax.Array], jax.Array],
    objective: Objective,
    *,
    against_reference: bool = True,
    pairs: int | None = None,
    policy: Policy = history_table,
) -> BilevelProblem:
    """Returns the problem; its `frozen` is `Episodes`, its `data` is ignored.

    Returns and KL are discounted by step, `R = sum_t gamma^t r(s_t, a_t)`. Log-probabilities are the policy's alone:
    the environment's cancel in density ratios, and stand in the measure of an enumerated sample.

    Args:
        reward: `(upper, features [S, A, F]) -> [S, A]`, the reward of a step.
        objective: the upper objective; it compares discounted returns.
        against_reference: whether the second trajectory of a pair comes from the reference.
        pairs: pairs drawn a prompt and step; None lists all P^2 with their probabilities.
        policy: `history_table`, `markov_table` or any function of its kind.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), or pairs < 1; at trace time, when there
            are too many trajectories to enumerate.
    """
    objective.check(against_reference=against_reference, exact=pairs is None)
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, or None to enumerate, got {pairs}.")

    def sample(key: Key, lower: Params, data, frozen: Episodes) -> Sample:
        del data

        def reference(lower, decision, frozen):
            return frozen.reference[decision.state]

        policies = (policy, reference if against_reference else policy)
        if pairs is None:
            responses, behaviour, measure, num_draws = _list_pairs(policies, lower, frozen)
        else:
            slots = [
                _roll_out(key, policy, lower, pairs, frozen)
                for key, policy in zip(jax.random.split(key), policies, strict=True)
            ]
            responses, behaviour = jax.tree.map(lambda *parts: jnp.stack(parts, axis=2), *slots)
            measure, num_draws = uniform_measure(len(frozen.starts), pairs, dtype=behaviour.dtype)
        return Sample(
            prompts=jnp.arange(len(frozen.starts)),
            responses=responses,
            behaviour_log_prob=behaviour,
            reference_log_prob=at_steps(frozen.reference, responses),
            cumulative_discount=jnp.broadcast_to(frozen.discount, behaviour.shape),
            measure=measure,
            from_policy=jnp.array([1.0, 0.0 if against_reference else 1.0], behaviour.dtype),
            num_draws=num_draws,
        )

    def log_prob(lower: Params, sample: Sample, frozen: Episodes) -> jax.Array:
        trajectories = sample.responses
        prompt, _, _, step = jnp.indices(trajectories.states.shape)
        decision = Decision(prompt, nodes_of(trajectories, frozen), trajectories.states, step)
        return _taken(policy(lower, decision, frozen), trajectories.actions)

    return BilevelProblem(
        sample=sample,
        log_prob=log_prob,
        reward=lambda upper, sample, frozen: at_steps(reward(upper, frozen.features), sample.responses),
        cost=objective.cost,
        kl_price=objective.kl_price,
    )


def _list_pairs(policies: tuple[Policy, Policy], lower: Params, frozen: Episodes):
    """Every pair of trajectories with its log-probabilities `[B, P^2, 2, T]` and its measure `[B, P^2]`."""
    tree = grow(frozen)
    tables = [at_nodes(policy, lower, tree, frozen) for policy in policies]
    totals = [tree.log_prob(table) for table in tables]
    first, second = (axis.ravel() for axis in jnp.indices((len(tree.nodes), len(tree.nodes))))

    def pair(of_first, of_second):
        return jnp.stack([of_first[:, first], of_second[:, second]], axis=2)

    listed = tree.trajectories()
    responses = jax.tree.map(pair, listed, listed)
    behaviour = pair(*(tree.along(table) for table in tables))
    measure = jnp.exp(totals[0][:, first] + totals[1][:, second]) / len(frozen.starts)
    return responses, behaviour, measure, jnp.asarray(jnp.inf, measure.dtype)


def _roll_out(key: Key, policy: Policy, lower: Params, count: int, frozen: Episodes):
    """Draws `count` trajectories a prompt; returns them and their log-probabilities, `[B, count, T]`."""
    shape = (len(frozen.starts), count)
    actions_count, branches = frozen.successors.shape[1:]
    prompt = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
    chance = jnp.log(frozen.transition)

    def act(carry, now):
        state, node = carry
        key, step = now
        action_key, branch_key = jax.random.split(key)
        log_policy = policy(lower, Decision(prompt, node, state, jnp.broadcast_to(step, shape)), frozen)
        action = jax.random.categorical(action_key, log_policy)
        branch = jax.random.categorical(branch_key, chance[state, action])
        child = actions_count * branches * node + 1 + action * branches + branch
        return (frozen.successors[state, action, branch], child), (state, action, _taken(log_policy, action))

    horizon = len(frozen.discount)
    start = jnp.broadcast_to(frozen.starts[:, None], shape)
    steps = (jax.random.split(key, horizon), jnp.arange(horizon))
    _, history = jax.lax.scan(act, (start, jnp.zeros(shape, prompt.dtype)), steps)
    states, actions, log_prob = (jnp.moveaxis(part, 0, -1) for part in history)
    return Trajectories(states, actions), log_prob


def _taken(log_policy: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]
