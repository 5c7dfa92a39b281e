"""The steps of preference learning: choosing pairs, replaying them, ensembles and teachers, against definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms.reward_learning import fit, reward_learning
from jaxrlhf.base.problem import SKIPPED, BilevelProblem, Labelled, PairCost, Sample
from jaxrlhf.control import ensembles, pairs
from jaxrlhf.control.teachers import TEACHERS, Teacher, teacher_annotator
from jaxrlhf.mdp.trajectories import Segments
from jaxrlhf.objectives import brier, likelihood, utility
from jaxrlhf.preferences import buffer as preference_buffer


def sample_of(count=6, steps=4, seed=0):
    """A sample of random segments, whose last step lies outside of the window."""
    draws = np.random.default_rng(seed)
    shape = (1, count, 2, steps)
    window = np.broadcast_to(np.arange(steps) < steps - 1, shape).astype(np.float32)

    def normal(*trailing):
        return draws.normal(size=(*shape, *trailing)).astype(np.float32)

    return jax.tree.map(
        jnp.asarray,
        Sample(
            prompts=np.zeros((1, 0)),
            responses=Segments(normal(3), normal(2), normal(), window),
            behaviour_log_prob=normal(),
            reference_log_prob=normal(),
            cumulative_discount=np.ones(shape, np.float32),
            measure=np.full((1, count), 1 / count, np.float32),
            from_policy=np.array([1.0, 0.0], np.float32),
            num_draws=np.float32(count),
        ),
    )


def linear(member, observations, actions):
    return jnp.concatenate([observations, actions], axis=-1) @ member


def members_of(count=3):
    return jax.random.normal(jax.random.key(3), (count, 5))


def test_the_query_is_where_the_members_differ_or_are_undecided():
    sample, members = sample_of(), members_of()
    reward = ensembles.of_samples(linear)
    found = ensembles.win_probabilities(reward, members, sample)[:, 0]
    steps = np.concatenate([sample.responses.observations, sample.responses.actions], -1)[0, :, :, :3]
    returns = np.einsum("mptf,ef->empt", steps, np.asarray(members)).sum(-1)
    expected = 1 / (1 + np.exp(returns[..., 1] - returns[..., 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mean = expected.mean(0)
    scores = {
        "disagreement": np.std(expected, axis=0),
        "entropy": -mean * np.log(mean) - (1 - mean) * np.log(1 - mean),
    }
    for criterion, score in scores.items():
        chosen = pairs.choose(jax.random.key(0), found, 2, criterion)
        np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(score)[-2:]))
    drawn = [set(np.asarray(pairs.choose(jax.random.key(seed), found, 3, "uniform")).tolist()) for seed in range(8)]
    assert all(len(each) == 3 for each in drawn) and len(set.union(*drawn)) > 3
    mean_reward = ensembles.mean_of(reward)(members, sample, ())
    np.testing.assert_allclose(mean_reward, linear(members.mean(0), *sample.responses[:2]), rtol=1e-4, atol=1e-5)


def test_certain_members_have_no_entropy():
    np.testing.assert_allclose(pairs.entropy(jnp.array([[0.0, 1.0, 0.5]])), [0.0, 0.0, np.log(2)], rtol=1e-6)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: pairs.choose(jax.random.key(0), jnp.ones((2, 3)), 4), "1 to 3 of the 3 candidate pairs, got 4"),
        (lambda: pairs.choose(jax.random.key(0), jnp.ones((2, 3)), 1, "newest"), "no criterion 'newest'"),
        (lambda: pairs.share_labelled(utility(kl_price=0.1), 0.0), "must lie in"),
        (lambda: ensembles.first_members(jax.random.key(0), jax.random.normal, 0), "at least 1 member"),
        (lambda: Teacher(mistake=0.7).check(), "mistake must be a probability up to 1/2, got 0.7"),
        (lambda: teacher_annotator(Teacher(decay=0.0)), "decay must lie in"),
        (lambda: Teacher(rationality=0.0).check(), "rationality must be positive"),
    ],
)
def test_what_is_out_of_range_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_costs_of_labelled_pairs_are_unbiased_for_those_of_all_pairs():
    keys = jax.random.split(jax.random.key(0), 2)
    returns = jax.random.normal(keys[0], (1, 8, 2))
    labels = jax.random.bernoulli(keys[1], 0.5, (1, 8, 2)).astype(float)
    for all_labelled in (utility(kl_price=0.05), brier()):
        objective = pairs.share_labelled(all_labelled, 3 / 8)
        assert objective.kl_price == all_labelled.kl_price

        def cost(key, objective=objective):
            chosen = jnp.zeros(8).at[jax.random.permutation(key, 8)[:3]].set(1.0)
            return jnp.mean(objective.at(returns, jnp.where(chosen[None, :, None] > 0, labels, SKIPPED)).coupled)

        costs = jax.jit(jax.vmap(cost))(jax.random.split(jax.random.key(1), 4000))
        expected = jnp.mean(all_labelled.at(returns, labels).coupled)
        assert abs(costs.mean() - expected) < 5 * costs.std() / np.sqrt(4000)


def test_replay_drops_the_oldest_pairs():
    first, second, third = (sample_of(count=2, seed=seed) for seed in range(3))
    recent = pairs.slide(pairs.slide(pairs.repeated(first, 2), second), third)
    for rows, batch in ((slice(0, 2), second), (slice(2, 4), third)):
        np.testing.assert_array_equal(recent.responses.observations[:, rows], batch.responses.observations)
        np.testing.assert_array_equal(recent.behaviour_log_prob[:, rows], batch.behaviour_log_prob)
    np.testing.assert_allclose(recent.measure, np.full((1, 4), 0.25))
    assert recent.num_draws == 4


def test_every_member_is_fitted_as_it_would_be_alone():
    def cost(upper, reward, labelled, frozen):
        returns = jnp.sum(labelled.sample.responses.window * reward, axis=-1)
        return PairCost(*likelihood(coupled=False).at(returns, labelled.labels))

    unused = ensembles.of_samples(linear)
    algorithm = reward_learning(BilevelProblem(unused, unused, unused, cost), optax.sgd(0.1))
    sample = preference_buffer.rows(sample_of())
    buffer = preference_buffer.empty(sample, labels=1, capacity=6)
    buffer = preference_buffer.add(buffer, Labelled(sample, jnp.ones((6, 1, 1))))
    members = jax.vmap(algorithm.init)(members_of())
    fitted, info = ensembles.fit_members(jax.random.key(1), algorithm, members, buffer, size=4, steps=3)
    assert info.loss.shape == (3, 3)
    for number, key in enumerate(jax.random.split(jax.random.key(1), 3)):
        alone = fit(key, algorithm, algorithm.init(members_of()[number]), buffer, (), size=4, steps=3)[0].upper
        np.testing.assert_allclose(fitted.upper[number], alone, rtol=1e-5)


def reference_label(teacher, gold, window, margin):
    """The label of B-Pref's algorithm 1 for one pair, or its probability of preferring segment 0, in plain numpy."""
    gold = [segment[inside > 0] for segment, inside in zip(gold, window, strict=True)]
    sums = [segment.sum() for segment in gold]
    if teacher.skip and max(sums) < teacher.skip * margin:
        return SKIPPED
    if teacher.equal and abs(sums[0] - sums[1]) < teacher.equal * margin:
        return 0.5
    judged = [np.sum(teacher.decay ** np.arange(len(segment))[::-1] * segment) for segment in gold]
    if np.isinf(teacher.rationality):
        prefers = float(judged[0] > judged[1])
    else:
        prefers = 1 / (1 + np.exp(-teacher.rationality * (judged[0] - judged[1])))
    return prefers * (1 - teacher.mistake) + (1 - prefers) * teacher.mistake


@pytest.mark.parametrize("name", [*TEACHERS, "all at once"])
def test_teachers_judge_as_published(name):
    together = Teacher(rationality=0.5, decay=0.8, mistake=0.2, skip=0.3, equal=0.4)
    teacher = TEACHERS.get(name, together)
    sample, margin, draws = sample_of(count=12), 2.0, 4000
    labels = np.asarray(jax.jit(teacher_annotator(teacher, labels=draws))(jax.random.key(0), sample, margin))
    assert labels.shape == (1, 12, draws)
    for number in range(12):
        gold, window = np.asarray(sample.responses.gold)[0, number], np.asarray(sample.responses.window)[0, number]
        expected = reference_label(teacher, gold, window, margin)
        if expected in (SKIPPED, 0.5, 0.0, 1.0):
            np.testing.assert_array_equal(labels[0, number], expected)
        else:
            np.testing.assert_allclose(labels[0, number].mean(), expected, atol=5 * 0.5 / np.sqrt(draws))
    if name in ("skip", "equal", "all at once"):
        assert np.isin(labels, [SKIPPED, 0.5]).any()
