"""PEBBLE (arXiv 2106.05091) from the parts of this package: preferences on an off-policy learner.

    explore      the policy seeks states far from those in the replay; no labels
    a session    draws segments from the replay, asks about those on which the ensemble disagrees (at first by chance),
                 fits the ensemble to all labels so far until it predicts them, and trains the policy on its mean for an
                 interval, all experience scored anew

In use, with `learner` and `explorer` two `soft_actor_critic`s that differ in their reward only:

    numbers = {"queries": 10, "segment": 50, "interval": 1000, "sessions": 20}
    algorithm = pebble(learner, fit, reward, annotate=teacher_annotator(), **numbers)
    state = algorithm.init(key, members, policy)
    state = explore(key, explorer, learner, state, steps=1000)
    state, info = algorithm.step(key, state, None, policy_return(state, segment=50))      # or propose, ask, update

Departures from the published code: batches of the fit are drawn with replacement, and an ensemble that predicts the labels
before its first step takes none; the state entropy is measured to a sample of the replay and enters by its logarithm
(as in the paper) without being normalised by its deviation (as in its code).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.reward_learning import RewardAlgorithm, RewardState
from jaxrlhf.base.algorithm import Algorithm, Annotator, compose, label_by
from jaxrlhf.base.problem import BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.control import replay as experience_replay
from jaxrlhf.control.collection import Experience
from jaxrlhf.control.ensembles import agreement, fit_until, of_samples, win_probabilities
from jaxrlhf.control.pairs import Criterion, choose
from jaxrlhf.control.replay import Replay
from jaxrlhf.control.soft_actor_critic import Relabel, SoftInfo, SoftState
from jaxrlhf.mdp.exploration import nearest_distance
from jaxrlhf.preferences import buffer as preference_buffer
from jaxrlhf.preferences.buffer import PreferenceBuffer
from jaxrlhf.preferences.objectives import Objective, likelihood


class PebbleState(NamedTuple):
    """What is carried from one session to the next.

    Attributes:
        step: `[]` int32, sessions held.
        learner: the policy, its replay and its environments; its `upper` is that of the members.
        members: states of the reward's fit, leaves `[E, ...]`.
        labels: every label bought.
    """

    step: jax.Array
    learner: SoftState
    members: RewardState
    labels: PreferenceBuffer

    @property
    def policy(self) -> Params:
        """The policy's parameters."""
        return self.learner.policy

    @property
    def upper(self) -> Params:
        """The members' parameters, leaves `[E, ...]`."""
        return self.members.upper


class PebbleInfo(NamedTuple):
    """Diagnostics of one session, all scalars but `learner`.

    Attributes:
        labels: bought, skipped pairs left out.
        predicted: fraction of the new labels that a member predicted before it saw them, averaged over the members; ties
            left out.
        accuracy: the smallest over the members of the fraction of all labels that each predicts after the fit.
        epochs: of `fit_steps` steps that the fit took.
        learner: of the last step of the interval.
    """

    labels: jax.Array
    predicted: jax.Array
    accuracy: jax.Array
    epochs: jax.Array
    learner: SoftInfo


def segment_problem(reward: Callable[[Params, jax.Array, jax.Array], jax.Array], objective: Objective | None = None):
    """Returns reward and cost of segments as a `BilevelProblem`, for `reward_learning`; it draws nothing.

    Args:
        reward: `(upper, observations [..., O], actions) -> [...]`.
        objective: compares returns of segments; the uncoupled likelihood by default.
    """
    chosen = likelihood(coupled=False) if objective is None else objective

    def cost(upper: Params, reward: jax.Array, labelled: Labelled, frozen: Params) -> PairCost:
        del upper, frozen
        return chosen.at(jnp.sum(labelled.sample.responses.window * reward, axis=-1), labelled.labels)

    def drawn(*arguments):
        raise ValueError("This problem has no policy; its segments come from a replay or a file.")

    return BilevelProblem(drawn, drawn, of_samples(reward), cost)


def nearest_states(units: jax.Array | float = 1.0, *, neighbours: int = 5, particles: int = 512) -> Relabel:
    """Returns the reward `log(1 + distance to the k-th nearest of the replay's states)`, for a `soft_actor_critic`.

    Args:
        units: factors `[O]` on the observations, in which distances are meaningful.
        neighbours: k, the state itself not counted.
        particles: states drawn from the replay that distances are measured to.
    """

    def reward(upper: Params, batch: Experience, replay: Replay) -> jax.Array:
        del upper
        # Any fixed key will do: the replay itself changes from step to step.
        drawn = experience_replay.draw(jax.random.fold_in(jax.random.key(0), replay.added), replay, size=particles)
        factors = jnp.broadcast_to(jnp.asarray(units), batch.next_observations.shape[-1:])[None]
        states, others = factors * batch.next_observations, factors * drawn.next_observations
        distance = nearest_distance(states, others, jnp.ones(particles, bool), neighbours=neighbours + 1)
        return jnp.log1p(distance)

    return reward


def explore(key: Key, explorer: Algorithm, learner: Algorithm, state: PebbleState, *, steps: int) -> PebbleState:
    """Returns the state after `steps` steps of the explorer; of what it learned only policy and experience are kept.

    Critics, temperature and optimisers start afresh, as published. Consumes the key.

    Args:
        key: consumed.
        explorer: a `soft_actor_critic` on `nearest_states`.
        learner: the one on the learned reward.
        state: before any session.
        steps: of the explorer.
    """
    explore_key, init_key = jax.random.split(key)

    def advance(soft: SoftState, key: Key) -> tuple[SoftState, None]:
        return explorer.step(key, soft, None, ())[0], None

    explored, _ = jax.lax.scan(advance, state.learner, jax.random.split(explore_key, steps))
    fresh = learner.init(init_key, state.upper, explored.policy)
    return state._replace(learner=explored._replace(upper=fresh.upper, learned=fresh.learned))


def pebble(
    learner: Algorithm,
    fit: RewardAlgorithm,
    reward: Callable[[Params, jax.Array, jax.Array], jax.Array],
    *,
    queries: int,
    segment: int,
    interval: int,
    sessions: int,
    kept: int = 0,
    annotate: Annotator | None = None,
    candidates: int = 10,
    criterion: Criterion = "disagreement",
    labels: int = 1,
    fit_size: int = 128,
    fit_steps: int = 20,
    epochs: int = 50,
    enough: float = 0.97,
) -> Algorithm:
    """Returns the algorithm, with `PebbleState` and `PebbleInfo`; a step is a session with the interval behind it.

    `init` takes the members' parameters `[E, ...]` as `upper`. `propose` returns the query, a sample of `queries` rows
    `[queries, 1, 2, segment]`; `update` takes it with its labels. The replay must hold segments before the first session:
    `explore`, or take steps of the learner.

    Args:
        learner: a `soft_actor_critic` whose reward is `relabelled(mean_of(reward))`.
        fit: `reward_learning(segment_problem(reward), optimizer)`.
        reward: of one member, `(upper, observations [..., O], actions) -> [...]`.
        queries: pairs asked about in a session.
        segment: steps of a segment.
        interval: steps of the learner in a session.
        sessions: how many there will be at most: room for labels; later ones overwrite the oldest.
        kept: room for pairs that are labelled before the first session (`learn_offline`).
        annotate: labels a query; its `frozen` is that of `step`. Without it only `propose` and `update` remain.
        candidates: pairs drawn for each that is asked about.
        criterion: how the query is chosen from the candidates, once there are labels; at first it is drawn.
        labels: labels a pair.
        fit_size: batch size of the fit.
        fit_steps: steps of an epoch of the fit.
        epochs: at most.
        enough: the fit stops where every member predicts more than this fraction of all labels.

    Raises:
        ValueError: naming a number that is below 1, or `enough` outside of [0, 1].
    """
    numbers = {
        "queries": queries, "segment": segment, "interval": interval, "sessions": sessions, "candidates": candidates,
        "labels": labels, "fit_size": fit_size, "fit_steps": fit_steps, "epochs": epochs,
    }  # fmt: skip
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if not 0 <= enough <= 1:
        raise ValueError(f"enough must be a fraction in [0, 1], got {enough:g}.")
    sample_reward = of_samples(reward)

    def init(key: Key, upper: Params, lower: Params) -> PebbleState:
        soft = learner.init(key, upper, lower)
        members = jax.vmap(fit.init)(upper)
        rows = jax.eval_shape(lambda key, replay: query(key, replay, upper, jnp.asarray(True)), key, soft.replay)
        buffer = preference_buffer.empty(rows, labels=labels, capacity=sessions * queries + kept)
        return PebbleState(jnp.zeros((), jnp.int32), soft, members, buffer)

    def query(key: Key, replay: Replay, upper: Params, by_chance: jax.Array) -> Sample:
        draw_key, chance_key, choose_key = jax.random.split(key, 3)
        drawn = experience_replay.draw_segments(draw_key, replay, pairs=candidates * queries, steps=segment)
        probabilities = win_probabilities(sample_reward, upper, drawn)[:, 0]
        at_random = choose(chance_key, probabilities, queries, "uniform")
        indices = jnp.where(by_chance, at_random, choose(choose_key, probabilities, queries, criterion))
        return preference_buffer.take(preference_buffer.rows(drawn), indices)

    def propose(key: Key, state: PebbleState, data: Batch, frozen: Params) -> Sample:
        del data, frozen
        return query(key, state.learner.replay, state.upper, state.labels.added == 0)

    def update(key: Key, state: PebbleState, labelled: Labelled, frozen: Params) -> tuple[PebbleState, PebbleInfo]:
        del frozen
        fit_key, train_key = jax.random.split(key)
        buffer = preference_buffer.add(state.labels, labelled, step=state.step)
        predicted = jnp.mean(agreement(sample_reward, state.upper, labelled))
        members, accuracy, count = fit_until(
            fit_key,
            fit,
            state.members,
            sample_reward,
            buffer,
            size=fit_size,
            steps=fit_steps,
            epochs=epochs,
            enough=enough,
        )
        soft, infos = jax.lax.scan(
            lambda soft, key: learner.step(key, soft, None, ()),
            state.learner._replace(upper=members.upper),
            jax.random.split(train_key, interval),
        )
        last = jax.tree.map(lambda leaf: leaf[-1], infos)
        info = PebbleInfo(jnp.sum(labelled.labels >= 0), predicted, accuracy, count, last)
        return PebbleState(state.step + 1, soft, members, buffer), info

    return Algorithm(init, compose(propose, label_by(annotate), update), propose, update)


def learn_offline(
    key: Key,
    fit: RewardAlgorithm,
    reward: Callable[[Params, jax.Array, jax.Array], jax.Array],
    state: PebbleState,
    labelled: Labelled,
    *,
    size: int = 128,
    steps: int = 20,
    epochs: int = 50,
    enough: float = 0.97,
) -> tuple[PebbleState, jax.Array]:
    """Returns the state with labels that exist among its own and the ensemble fitted to them, and `fit_until`'s accuracy.

    Sessions go on from there, online. Consumes the key.

    Args:
        key: consumed.
        fit, reward: of `pebble`.
        state: of `pebble`, with room for the pairs (`kept`).
        labelled: rows `[N, 1, 2, segment]`, such as `preference_files.read_preferences` returns.
        size, steps, epochs, enough: of `fit_until`.

    Raises:
        ValueError: the rows are not shaped like the state's, or there are more than it has room for.
    """
    stored = jax.tree.map(lambda leaf: leaf.shape[1:], state.labels.pairs.sample.responses)
    given = jax.tree.map(lambda leaf: leaf.shape[1:], labelled.sample.responses)
    if stored != given or labelled.labels.shape[1:] != state.labels.pairs.labels.shape[1:]:
        raise ValueError(
            f"The labelled segments have the shapes {given}, those of the sessions {stored}; they must agree."
        )
    buffer = preference_buffer.add(state.labels, labelled)
    sample_reward = of_samples(reward)
    members, accuracy, _ = fit_until(
        key, fit, state.members, sample_reward, buffer, size=size, steps=steps, epochs=epochs, enough=enough
    )
    learner = state.learner._replace(upper=members.upper)
    return state._replace(labels=buffer, members=members, learner=learner), accuracy


def policy_return(state: PebbleState, *, segment: int, recent: int = 1000) -> jax.Array:
    """Returns the policy's mean true return over a segment's length, `[]`, from its latest steps: the teachers' `frozen`.

    Args:
        state: for the replay.
        segment: steps of a segment.
        recent: steps of each environment that are averaged, at most those of the replay.
    """
    replay = state.learner.replay
    recent = min(recent, replay.capacity)
    places = (replay.added - 1 - jnp.arange(recent)) % replay.capacity
    held = (jnp.arange(recent) < replay.filled).astype(replay.steps.reward.dtype)[:, None]
    count = jnp.maximum(jnp.sum(held) * replay.steps.reward.shape[1], 1.0)
    return segment * jnp.sum(held * replay.steps.reward[places]) / count
