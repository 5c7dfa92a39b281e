"""Online RLHF on episodes as a `BilevelProblem`, with pairs of trajectories listed or drawn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.base.problem import BilevelProblem, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.mdp.episodes import Episodes, Trajectories, at_steps
from jaxrlhf.mdp.tabular import at_actions
from jaxrlhf.mdp.tree import Tree, history_tree, nodes_of
from jaxrlhf.preferences.objectives import Objective


class Decision(NamedTuple):
    """The situation in which the policy chooses an action; integer arrays of one shape `[...]`.

    Attributes:
        prompt: index of the start, in [0, B).
        node: the history so far, numbered as in `jaxrlhf.mdp.tree`.
        state: the current state, in [0, S).
        step: the current step, in [0, T).
    """

    prompt: jax.Array
    node: jax.Array
    state: jax.Array
    step: jax.Array


Policy = Callable[[Params, Decision, Episodes], jax.Array]
"""`(lower, decision [...], frozen) -> [..., A]`, log-probabilities of the actions in nats."""


class TrajectoryPairs(NamedTuple):
    """The part of a `Sample` that depends on how pairs are obtained.

    Attributes:
        responses: states and actions `[B, M, 2, T]`.
        behaviour_log_prob: `[B, M, 2, T]`.
        measure: `[B, M]`.
        num_draws: `[]`, pairs drawn per prompt; infinity where all are listed.
    """

    responses: Trajectories
    behaviour_log_prob: jax.Array
    measure: jax.Array
    num_draws: jax.Array


def history_table(lower: Params, decision: Decision, frozen: Episodes) -> jax.Array:
    """The general policy: logits `[B, N, A]`, a row for every history of every prompt.

    The cost in the tilted problem s G - J depends on whole trajectories, so its solution depends on the history, although
    the environment is Markov and so is the untilted solution.
    """
    del frozen
    return jax.nn.log_softmax(lower, axis=-1)[decision.prompt, decision.node]


def markov_table(lower: Params, decision: Decision, frozen: Episodes) -> jax.Array:
    """A policy of step and state: logits `[T, S, A]`. It can represent the untilted solution, but not the tilted ones."""
    del frozen
    return jax.nn.log_softmax(lower, axis=-1)[decision.step, decision.state]


def _reference_policy(lower: Params, decision: Decision, frozen: Episodes) -> jax.Array:
    del lower
    return frozen.reference[decision.state]


def reference_logits(frozen: Episodes) -> jax.Array:
    """Returns the reference as a `history_table`, `[B, N, A]`: the usual initial policy."""
    return frozen.reference[history_tree(frozen).states]


def at_nodes(policy: Policy, lower: Params, tree: Tree, frozen: Episodes) -> jax.Array:
    """Returns the policy's log-probabilities at every node, `[B, N, A]`."""
    prompts, nodes = tree.states.shape
    prompt, node = jnp.indices((prompts, nodes))
    step = jnp.broadcast_to(jnp.asarray(tree.steps), (prompts, nodes))
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

    Returns and KL are discounted by step, `R = sum_t gamma^t r(s_t, a_t)`. Log-probabilities are those of the policy
    alone: transition probabilities cancel in density ratios, and enter the measure of an enumerated sample.

    Args:
        reward: `(upper, features [S, A, F]) -> [S, A]`, the reward of a step.
        objective: the upper objective; it compares discounted returns.
        against_reference: whether the second trajectory of a pair comes from the reference.
        pairs: pairs drawn per prompt and step; None lists all P^2 with their probabilities.
        policy: `history_table`, `markov_table` or any function of the same signature.

    Raises:
        ValueError: the objective does not suit the pairs (`Objective.check`), or pairs < 1; at trace time, when there
            are too many trajectories to enumerate.
    """
    objective.check(against_reference=against_reference, exact=pairs is None)
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs must be at least 1, or None to enumerate, got {pairs}.")
    policies = (policy, _reference_policy if against_reference else policy)

    def sample(key: Key, lower: Params, data, frozen: Episodes) -> Sample:
        del data
        if pairs is None:
            obtained = _list_pairs(policies, lower, frozen)
        else:
            obtained = _draw_pairs(key, policies, lower, pairs, frozen)
        behaviour = obtained.behaviour_log_prob
        return Sample(
            prompts=jnp.arange(len(frozen.starts)),
            responses=obtained.responses,
            behaviour_log_prob=behaviour,
            reference_log_prob=at_steps(frozen.reference, obtained.responses),
            cumulative_discount=jnp.broadcast_to(frozen.discount, behaviour.shape),
            measure=obtained.measure,
            from_policy=jnp.array([1.0, 0.0 if against_reference else 1.0], behaviour.dtype),
            num_draws=obtained.num_draws,
        )

    def log_prob(lower: Params, sample: Sample, frozen: Episodes) -> jax.Array:
        trajectories = sample.responses
        prompt, _, _, step = jnp.indices(trajectories.states.shape)
        decision = Decision(prompt, nodes_of(trajectories, frozen), trajectories.states, step)
        return at_actions(policy(lower, decision, frozen), trajectories.actions)

    return BilevelProblem(
        sample=sample,
        log_prob=log_prob,
        reward=lambda upper, sample, frozen: at_steps(reward(upper, frozen.features), sample.responses),
        cost=objective.cost,
        kl_price=objective.kl_price,
    )


def _list_pairs(policies: tuple[Policy, Policy], lower: Params, frozen: Episodes) -> TrajectoryPairs:
    """Lists all P^2 pairs of trajectories with their probabilities."""
    tree = history_tree(frozen)
    tables = [at_nodes(policy, lower, tree, frozen) for policy in policies]
    log_probs = [tree.log_prob(table) for table in tables]
    first, second = (axis.ravel() for axis in jnp.indices((len(tree.nodes), len(tree.nodes))))

    def pair(of_first, of_second):
        return jnp.stack([of_first[:, first], of_second[:, second]], axis=2)

    trajectories = tree.trajectories()
    measure = jnp.exp(log_probs[0][:, first] + log_probs[1][:, second]) / len(frozen.starts)
    return TrajectoryPairs(
        responses=jax.tree.map(pair, trajectories, trajectories),
        behaviour_log_prob=pair(*(tree.along(table) for table in tables)),
        measure=measure,
        num_draws=jnp.asarray(jnp.inf, measure.dtype),
    )


def _draw_pairs(
    key: Key, policies: tuple[Policy, Policy], lower: Params, pairs: int, frozen: Episodes
) -> TrajectoryPairs:
    """Draws `pairs` pairs of trajectories per prompt. Consumes the key."""
    slots = [
        _roll_out(key, policy, lower, pairs, frozen)
        for key, policy in zip(jax.random.split(key), policies, strict=True)
    ]
    responses, behaviour = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=2), *slots)
    measure, num_draws = uniform_measure(len(frozen.starts), pairs, dtype=behaviour.dtype)
    return TrajectoryPairs(responses, behaviour, measure, num_draws)


def _roll_out(key: Key, policy: Policy, lower: Params, count: int, frozen: Episodes) -> tuple[Trajectories, jax.Array]:
    """Draws `count` trajectories per prompt; returns them and their log-probabilities, `[B, count, T]`."""
    shape = (len(frozen.starts), count)
    num_actions, branches = frozen.successors.shape[1:]
    prompt = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
    log_transition = jnp.log(frozen.transition)

    def advance(carry, key_and_step):
        state, node = carry
        key, step = key_and_step
        action_key, branch_key = jax.random.split(key)
        log_policy = policy(lower, Decision(prompt, node, state, jnp.broadcast_to(step, shape)), frozen)
        action = jax.random.categorical(action_key, log_policy)
        branch = jax.random.categorical(branch_key, log_transition[state, action])
        child = num_actions * branches * node + 1 + action * branches + branch
        return (frozen.successors[state, action, branch], child), (state, action, at_actions(log_policy, action))

    horizon = len(frozen.discount)
    start = jnp.broadcast_to(frozen.starts[:, None], shape)
    steps = (jax.random.split(key, horizon), jnp.arange(horizon))
    _, history = jax.lax.scan(advance, (start, jnp.zeros(shape, prompt.dtype)), steps)
    states, actions, log_prob = (jnp.moveaxis(leaf, 0, -1) for leaf in history)
    return Trajectories(states, actions), log_prob
