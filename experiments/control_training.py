"""The training loop of `control.py`, which every method shares.

An outer step draws pairs of episodes by the policy and by a copy of it, buys labels for some, fits the reward to all
labels so far, and trains the policy on the learned reward by a critic's advantages. Bilevel methods then also move the
reward along the hypergradient of their upper objective.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from control_methods import (
    Budget,
    Method,
    collecting_steps,
    descent_on,
    policy_reward,
    problem_of,
)
from control_tasks import Task

from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.algorithms.reward_learning import RewardAlgorithm, RewardState, reward_learning
from jaxrlhf.bilevel import Labelled, Sample
from jaxrlhf.control import ensembles
from jaxrlhf.control.exploration import entropy_reward
from jaxrlhf.control.pairs import choose, repeated, slide, unlabelled
from jaxrlhf.mdp.trajectories import FrozenPolicies, gold_score
from jaxrlhf.preferences import buffer as preference_buffer


class Curves(NamedTuple):
    """What a run reports, leaves `[outer_steps]`; measured before the step's updates.

    Attributes:
        returns: true undiscounted return of the policy's episodes.
        steps: environment steps taken, in both episodes of all pairs.
        labels: labels bought.
        agreement: fraction of the drawn pairs that the learned reward orders as the true one does.
        kl: to the reference, in nats.
        ess_fraction: of the tilts.
        coupling_fraction: of the hypergradient.
    """

    returns: jax.Array
    steps: jax.Array
    labels: jax.Array
    agreement: jax.Array
    kl: jax.Array
    ess_fraction: jax.Array
    coupling_fraction: jax.Array


class Learner(NamedTuple):
    """The state carried from one outer step to the next.

    Attributes:
        members: states of the reward's fit, leaves `[members, ...]`.
        buffer: every label bought.
        descent: reward (the members again) and policy.
        recent: the latest batches of episodes, `[1, replay * pairs, ...]`.
    """

    members: RewardState
    buffer: preference_buffer.PreferenceBuffer
    descent: bilevel.BilevelState
    recent: Sample


class Loop(NamedTuple):
    """What stays the same over the outer steps of a run.

    Attributes:
        task, method, budget: what is run.
        annotate: the annotator, `method.labels_per_pair` labels per pair.
        problem: draws the pairs; its objective is the uncoupled likelihood, which the reward is fitted by.
        member_reward: the reward of one member of the ensemble.
        reward_fit: the reward's fit to the buffer.
        reward: the reward that the policy is trained on.
        descent: trains the policy on that reward, and the reward by the method's rule.
        exploring: trains the policy on state entropy.
    """

    task: Task
    method: Method
    budget: Budget
    annotate: preferences.Annotator
    problem: bilevel.BilevelProblem
    member_reward: ensembles.SampleReward
    reward_fit: RewardAlgorithm
    reward: ensembles.SampleReward
    descent: bilevel.Algorithm
    exploring: bilevel.Algorithm


def self_opponent(state: bilevel.BilevelState) -> FrozenPolicies:
    """Returns the frozen policies of a step: the opponent is the policy itself."""
    return FrozenPolicies((), state.policy)


def curves_row(loop: Loop, upper, sample: Sample, info: bilevel.BilevelInfo, labels: int) -> Curves:
    """Returns a step's row of the curves; `upper` is the reward before the step's updates."""
    gold, predicted = gold_score(sample, ()), ensembles.segment_returns(loop.reward, upper, sample)
    differ = gold[..., 0] != gold[..., 1]
    same = (gold[..., 0] > gold[..., 1]) == (predicted[..., 0] > predicted[..., 1])
    return Curves(
        returns=jnp.mean(jnp.sum(sample.responses.gold[:, :, 0], axis=-1)),
        steps=jnp.sum(sample.cumulative_discount > 0),
        labels=jnp.asarray(labels),
        agreement=jnp.sum(same & differ) / jnp.sum(differ),
        kl=info.kl,
        ess_fraction=info.ess_fraction,
        coupling_fraction=info.coupling_fraction,
    )


def draw_pairs(loop: Loop, learner: Learner, key) -> Sample:
    """Draws a step's pairs of episodes."""
    return loop.problem.sample(key, learner.descent.policy, None, self_opponent(learner.descent))


def buy_labels(loop: Loop, learner: Learner, key, sample: Sample, indices) -> tuple[Learner, jax.Array]:
    """Has some pairs labelled; returns the learner with them in its buffer, and the labels `[N, labels_per_pair]`."""
    rows = preference_buffer.take(preference_buffer.rows(sample), indices)
    labels = loop.annotate(key, rows, ())
    buffer = preference_buffer.add(learner.buffer, Labelled(rows, labels))
    return learner._replace(buffer=buffer), labels[:, 0]


def update(
    algorithm: bilevel.Algorithm, learner: Learner, key, labelled: Labelled
) -> tuple[Learner, bilevel.BilevelInfo]:
    """Updates policy and reward by one of the loop's algorithms; the sample becomes the learner's recent one."""
    state, info = algorithm.update(key, learner.descent, labelled, self_opponent(learner.descent))
    return learner._replace(descent=state, recent=labelled.sample), info


def explore(loop: Loop, learner: Learner, key) -> tuple[Learner, Curves]:
    """One outer step that trains the policy to visit many states; the reward stays as it is."""
    sample = draw_pairs(loop, learner, key)
    recent = slide(learner.recent, sample)
    moved, info = update(loop.exploring, learner, key, unlabelled(recent, labels=loop.method.labels_per_pair))
    upper = learner.descent.upper
    return moved._replace(descent=moved.descent._replace(upper=upper)), curves_row(loop, upper, sample, info, 0)


def collect(loop: Loop, learner: Learner, key) -> tuple[Learner, Curves]:
    """One outer step that labels every pair, and updates nothing."""
    sample_key, label_key = jax.random.split(key)
    sample = draw_pairs(loop, learner, sample_key)
    recent = slide(learner.recent, sample)
    # Only the diagnostics of the update are kept.
    _, info = update(loop.descent, learner, key, unlabelled(recent, labels=loop.method.labels_per_pair))
    num_pairs = loop.budget.pairs // loop.method.labels_per_pair
    learner, _ = buy_labels(loop, learner, label_key, sample, jnp.arange(num_pairs))
    row = curves_row(loop, learner.descent.upper, sample, info, num_pairs * loop.method.labels_per_pair)
    return learner, row


def learn(loop: Loop, learner: Learner, key) -> tuple[Learner, Curves]:
    """One outer step that buys labels, fits the reward to all of them, and trains the policy (and the coupled reward)."""
    method, budget = loop.method, loop.budget
    sample_key, choose_key, label_key, fit_key, update_key = jax.random.split(key, 5)
    sample = draw_pairs(loop, learner, sample_key)
    upper, members, bought = learner.descent.upper, learner.members, 0
    labelled = unlabelled(slide(learner.recent, sample), labels=method.labels_per_pair)
    if method.reward == "learned":
        num_pairs = budget.labels // method.labels_per_pair
        probabilities = ensembles.win_probabilities(loop.member_reward, upper, sample)[:, 0]
        indices = choose(choose_key, probabilities, num_pairs, method.query)
        learner, labels = buy_labels(loop, learner, label_key, sample, indices)
        # The fresh pairs are the last ones of the replay.
        labelled = labelled._replace(labels=labelled.labels.at[0, indices - budget.pairs].set(labels))
        bought = num_pairs * method.labels_per_pair
    if method.reward != "gold":
        members, _ = ensembles.fit_members(
            fit_key, loop.reward_fit, members, learner.buffer, size=budget.fit_size, steps=budget.fit_steps
        )
    learner = learner._replace(descent=learner.descent._replace(upper=members.upper))
    learner, info = update(loop.descent, learner, update_key, labelled)
    # The rule may have moved the reward once more.
    members = members._replace(upper=learner.descent.upper)
    return learner._replace(members=members), curves_row(loop, upper, sample, info, bought)


def trainer(task: Task, method: Method, budget: Budget, annotator: Callable[[int], preferences.Annotator]):
    """Returns `key -> Curves`, one run; `annotator` makes an annotator of so many labels per pair."""
    collecting = collecting_steps(task, method, budget)
    annotate, reward = annotator(method.labels_per_pair), policy_reward(task, method)
    member_reward = ensembles.of_samples(task.reward)
    problem = problem_of(task, budget, objectives.likelihood(coupled=False), member_reward)
    reward_fit = reward_learning(problem, optax.adam(budget.fit_learning_rate))

    def train(key):
        first_key, key = jax.random.split(key)
        _, lower, critic = task.first(first_key)
        members = ensembles.first_members(first_key, lambda key: task.first(key)[0], method.members)
        descent = descent_on(task, method, budget, reward, critic)
        exploring = descent_on(task, method, budget, entropy_reward(task.units), critic)
        loop = Loop(task, method, budget, annotate, problem, member_reward, reward_fit, reward, descent, exploring)
        start_key, explore_key, collect_key, learn_key = jax.random.split(key, 4)
        learner = first_learner(loop, key, start_key, members, lower, collecting)
        phases = (
            (explore, explore_key, method.exploration),
            (collect, collect_key, collecting),
            (learn, learn_key, task.outer_steps - method.exploration - collecting),
        )
        curves = []
        for step, phase_key, count in phases:
            if count:
                keys = jax.random.split(phase_key, count)
                learner, rows = jax.lax.scan(functools.partial(step, loop), learner, keys)
                curves.append(rows)
            if step is explore:
                # Of the exploration only the policy is kept: optimisers and critic start afresh.
                learner = learner._replace(descent=descent.init(key, members, learner.descent.policy))
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *curves)

    return train


def first_learner(loop: Loop, init_key, sample_key, members, lower, collecting: int) -> Learner:
    """Returns the learner before the first step, with a buffer for every label of the run.

    Args:
        loop: what is run.
        init_key: of the descent's state.
        sample_key: of the episodes that fill the replay.
        members: initial rewards, leaves `[members, ...]`.
        lower: initial policy.
        collecting: outer steps that label every pair.
    """
    method, budget = loop.method, loop.budget
    state = loop.descent.init(init_key, members, lower)
    example = loop.problem.sample(sample_key, lower, None, self_opponent(state))
    collected, bought = budget.pairs // method.labels_per_pair, budget.labels // method.labels_per_pair
    return Learner(
        members=jax.vmap(loop.reward_fit.init)(members),
        buffer=preference_buffer.empty(
            preference_buffer.rows(example),
            labels=method.labels_per_pair,
            capacity=collecting * collected + loop.task.outer_steps * bought,
        ),
        descent=state,
        recent=repeated(example, method.replay),
    )
