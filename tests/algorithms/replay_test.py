"""Labels used again: by importance weights, by the reward alone, from what existed before."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, exact, objectives, preferences
from jaxrlhf.algorithms.replay import refitted, replayed
from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.base import importance
from jaxrlhf.bilevel import Labelled
from jaxrlhf.preferences import buffer as preference_buffer

BETA = 0.5


@jax.jit
def make():
    keys = jax.random.split(jax.random.key(0), 2)
    gold = 2 * jax.random.normal(keys[0], (3, 4))
    reference = jax.nn.log_softmax(jax.random.normal(keys[1], (3, 4)))
    return bandit.Bandit(jnp.zeros((3, 4, 1)), gold, reference)


def problem_of(pairs):
    return bandit.bandit_problem(lambda upper, features: upper, objectives.likelihood(coupled=False), pairs=pairs)


def descent(problem, *, policy_learning_rate=0.02, reward_learning_rate=0.02):
    solver = bilevel.tangent(optax.adam(policy_learning_rate), optax.set_to_zero())
    return bilevel.bilevel_descent(problem, bilevel.decoupled(), solver, optax.adam(reward_learning_rate), beta=BETA)


def annotate(key, sample, frozen):
    return preferences.gold_annotator(bandit.gold_score)(key, sample, frozen)


def shapes(problem, frozen):
    return jax.eval_shape(lambda: problem.sample(jax.random.key(0), frozen.reference, None, frozen))


def test_labels_are_counted_once_and_age_is_the_buffers():
    frozen, problem = make(), problem_of(5)
    algorithm = replayed(descent(problem), shapes(problem, frozen), capacity=6, size=4, updates=3, annotate=annotate)
    state = jax.jit(algorithm.init)(jax.random.key(0), jnp.zeros((3, 4)), frozen.reference)
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1), donate_argnums=1)
    ages = []
    for index in range(4):
        state, info = step(jax.random.key(index), state, None, frozen)
        assert info.labels == 15
        ages.append(float(info.age))
    # Two batches of three prompts fit: this step's and the last's.
    np.testing.assert_allclose(ages, [0.0, 0.5, 0.5, 0.5])
    assert state.step == 4 and state.inner.step == 16 and state.buffer.added == 12
    assert 0 < info.ess_fraction <= 1
    assert np.array_equal(state.policy, state.inner.policy)


def test_importance_weights_correct_old_pairs(x64):
    """An update from the buffer has the gradient of fresh pairs in the mean, though another policy gave its pairs."""
    frozen = jax.tree.map(lambda leaf: leaf.astype(float), make())
    problem = problem_of(4)
    algorithm = bilevel.bilevel_descent(
        problem,
        bilevel.decoupled(),
        bilevel.tangent(optax.sgd(1.0), optax.set_to_zero()),
        optax.set_to_zero(),
        beta=BETA,
    )
    state = jax.jit(algorithm.init)(jax.random.key(0), frozen.gold, frozen.reference + 0.5 * frozen.gold)
    older = frozen.reference

    def move(key, policy):
        sample_key, label_key, draw_key = jax.random.split(key, 3)
        sample = problem.sample(sample_key, policy, None, frozen)
        buffer = preference_buffer.empty(sample, labels=1, capacity=3)
        buffer = preference_buffer.add(buffer, Labelled(sample, annotate(label_key, sample, frozen)))
        drawn = preference_buffer.draw(draw_key, buffer, size=9)
        moved, _ = algorithm.update(key, state, drawn, frozen)
        return (state.policy - moved.policy).ravel()

    keys = jax.random.split(jax.random.key(1), 40000)
    moves_of = jax.jit(jax.vmap(move, in_axes=(0, None)))
    means, errors = [], []
    for policy in (state.policy, older):
        moves = np.asarray(moves_of(keys, policy))
        means.append(moves.mean(axis=0))
        errors.append(moves.std(axis=0) / np.sqrt(len(keys)))
    assert np.all(np.abs(means[0] - means[1]) < 5 * np.hypot(*errors))
    assert np.linalg.norm(np.hypot(*errors)) < 0.1 * np.linalg.norm(means[0])


def test_a_refitted_reward_uses_its_labels_better():
    frozen, problem = make(), problem_of(4)

    def missed(again, key):
        algorithm = descent(problem, reward_learning_rate=0.05)
        if again:
            learning = reward_learning(problem, optax.adam(0.05))
            algorithm = refitted(
                algorithm, learning, shapes(problem, frozen), capacity=300, size=24, updates=4, annotate=annotate
            )
        else:
            algorithm = replayed(
                algorithm, shapes(problem, frozen), capacity=300, size=24, updates=0, annotate=annotate
            )
        state = algorithm.init(key, jnp.zeros((3, 4)), frozen.reference)
        state, info = jax.lax.scan(
            lambda state, key: algorithm.step(key, state, None, frozen), state, jax.random.split(key, 100)
        )
        upper = state.upper if again else state.inner.upper
        error = upper - frozen.gold
        return jnp.mean(jnp.square(error - error.mean(axis=1, keepdims=True))), info.labels.sum()

    keys = jax.random.split(jax.random.key(3), 8)
    (once, paid), (again, paid_again) = (
        jax.jit(jax.vmap(lambda key, way=way: missed(way, key)))(keys) for way in (0, 1)
    )
    assert np.all(np.asarray(paid) == 1200) and np.all(np.asarray(paid_again) == 1200)
    assert again.mean() < 0.7 * once.mean()


@pytest.mark.parametrize("held_out", [False, True])
def test_the_update_sees_a_reward_that_was_fitted_to_its_labels_or_not(held_out):
    frozen, problem = make(), problem_of(4)
    settings = {"capacity": 30, "size": 3, "updates": 5, "held_out": held_out}
    plain = descent(problem)
    algorithm = refitted(plain, reward_learning(problem, optax.sgd(1.0)), shapes(problem, frozen), **settings)
    state = jax.jit(algorithm.init)(jax.random.key(0), jnp.zeros((3, 4)), frozen.reference)
    sample = jax.jit(problem.sample)(jax.random.key(1), frozen.reference, None, frozen)
    labelled = Labelled(sample, jax.jit(annotate)(jax.random.key(2), sample, frozen))
    after, info = jax.jit(algorithm.update)(jax.random.key(3), state, labelled, frozen)
    alone, alone_info = jax.jit(plain.update)(jax.random.key(9), state.inner, labelled, frozen)
    # The policy moves with the reward that the update saw: at a reward of 0 not at all along it.
    assert np.allclose(after.policy, alone.policy, atol=1e-6) == held_out
    assert np.allclose(info.fresh.upper_loss, alone_info.upper_loss, atol=1e-6) == held_out
    assert not np.allclose(after.upper, alone.upper, atol=1e-3)


@pytest.mark.slow
def test_it_starts_from_labels_that_exist():
    frozen, problem = make(), problem_of(4)
    learning = reward_learning(problem, optax.adam(0.05))
    algorithm = refitted(
        descent(problem), learning, shapes(problem, frozen), capacity=30, size=24, updates=60, annotate=annotate
    )
    state = algorithm.init(jax.random.key(0), jnp.zeros((3, 4)), frozen.reference)
    buffer = state.buffer
    for key in jax.random.split(jax.random.key(5), 9):
        sample = problem.sample(key, frozen.reference, None, frozen)
        buffer = preference_buffer.add(buffer, Labelled(sample, annotate(key, sample, frozen)))
    with_labels, _ = algorithm.step(jax.random.key(1), state._replace(buffer=buffer), None, frozen)
    without, _ = algorithm.step(jax.random.key(1), state, None, frozen)

    def agreement(state):
        return np.corrcoef(np.ravel(state.upper - state.upper.mean(1, keepdims=True)), np.ravel(frozen.gold))[0, 1]

    assert agreement(with_labels) > 0.8 > agreement(without)


def test_both_sides_of_a_pair():
    frozen = make()
    sample = bandit.bandit_problem(
        lambda upper, features: upper, objectives.likelihood(coupled=False), pairs=2, against_reference=False
    ).sample(jax.random.key(0), frozen.gold, None, frozen)
    labels = jnp.array([[1.0, 0.0], [0.5, bilevel.SKIPPED], [1.0, 1.0]])[..., None]
    both = preferences.from_both_sides(Labelled(sample, labels))
    np.testing.assert_array_equal(both.labels[..., 0], [[1, 0, 0, 1], [0.5, -1, 0.5, -1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(both.sample.responses[:, 2:], sample.responses[:, :, ::-1])
    np.testing.assert_allclose(both.sample.measure.sum(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(both.sample.from_policy, [1, 0])
    assert both.sample.num_draws == 4


def test_self_play_pushes_towards_winning_against_itself(x64):
    """The coupled gradient of `utility` is that of the win rate against the policy held fixed, up to 2M / (2M - 1)."""
    frozen = jax.tree.map(lambda leaf: leaf.astype(float), make())
    pairs, start = 3, 0.3 * frozen.gold
    problem = bandit.bandit_problem(
        lambda upper, features: upper, objectives.add(objectives.utility(kl_price=0.1)), pairs=pairs
    )
    drawn = bandit.bandit_problem(
        lambda upper, features: upper, objectives.likelihood(), pairs=pairs, against_reference=False
    )

    def slope(key):
        sample = drawn.sample(key, start, None, frozen)
        labelled = preferences.from_both_sides(Labelled(sample, annotate(key, sample, frozen)))

        def cost(policy):
            nothing = jnp.zeros_like(labelled.sample.behaviour_log_prob)
            return importance.evaluate(
                problem.log_prob(policy, labelled.sample, frozen), nothing,
                problem.cost((), nothing, labelled, frozen), labelled.sample, beta=0.0,
            ).upper  # fmt: skip

        return jax.grad(cost)(start).ravel()

    slopes = np.asarray(jax.jit(jax.vmap(slope))(jax.random.split(jax.random.key(1), 40000)))
    opponent = jax.nn.log_softmax(start)
    beats = exact.row_mean(lambda own, other: jax.nn.sigmoid(own - other), opponent, frozen.gold)
    slope_of_the_win_rate = jax.jit(
        jax.grad(lambda policy: jnp.mean(exact.mean_under(jax.nn.log_softmax(policy), beats)))
    )
    truth = -np.asarray(slope_of_the_win_rate(start)).ravel()
    error = slopes.std(axis=0) / np.sqrt(len(slopes))
    assert np.all(np.abs(slopes.mean(axis=0) - 2 * pairs / (2 * pairs - 1) * truth) < 5 * error)
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(truth)


def test_what_cannot_be_is_refused():
    frozen, problem = make(), problem_of(2)
    given = shapes(problem, frozen)
    with pytest.raises(ValueError, match="updates of at least 0 and a size of at least 1, got -1 and 4"):
        replayed(descent(problem), given, capacity=4, size=4, updates=-1)
    with pytest.raises(ValueError, match="updates and a size of at least 1, got 0 and 4"):
        refitted(descent(problem), reward_learning(problem, optax.sgd(1.0)), given, capacity=4, size=4, updates=0)
    with pytest.raises(ValueError, match="needs an annotator"):
        algorithm = replayed(descent(problem), given, capacity=4, size=4)
        algorithm.step(None, None, None, None)
