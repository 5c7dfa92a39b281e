"""PEBBLE: its queries, its fit, and a whole run against its parts; a task solved from comparisons alone."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms.reward_learning import reward_learning
from jaxrlhf.base.problem import SKIPPED, Labelled
from jaxrlhf.control import ensembles, soft_policies
from jaxrlhf.control.pebble import explore, learn_offline, nearest_states, pebble, policy_return, segment_problem
from jaxrlhf.control.preference_files import read_preferences, write_preferences
from jaxrlhf.control.soft_actor_critic import relabelled, soft_actor_critic
from jaxrlhf.control.teachers import teacher_annotator
from jaxrlhf.mdp import tabular
from jaxrlhf.mdp.environments import tabular_environment

GOLD = jnp.array([[0.03, -0.05], [1.0, -0.9], [-1.1, 0.93]])


def reward(upper, observations, actions):
    return jnp.sum((observations @ upper) * jax.nn.one_hot(actions, 2), axis=-1)


def learners(**settings):
    """A tabular learner of the reward above, and an explorer, with 2 environments."""
    mdp = tabular.TabularMDP(jnp.full((3, 2, 3), 1 / 3), jnp.full(3, 1 / 3), jnp.zeros(3), jnp.asarray(0.9))
    environment = tabular_environment(mdp, GOLD)
    soft = soft_policies.discrete(
        lambda policy, observed: observed @ policy, lambda one, observed: observed @ one, environment
    )
    make = functools.partial(
        soft_actor_critic, environment, soft, lambda key: jnp.zeros((3, 2)), optimizer=optax.adam(0.03), gamma=0.5,
        temperature=0.2, target_rate=0.1, environments=2, horizon=4, batch_size=64, random_steps=8, capacity=4000,
        episode_steps=20, **settings,
    )  # fmt: skip
    return make(reward=relabelled(ensembles.mean_of(reward))), make(reward=nearest_states(neighbours=1, particles=8))


FIT = reward_learning(segment_problem(reward), optax.adam(0.05))
NUMBERS = {
    "queries": 8,
    "segment": 3,
    "interval": 20,
    "sessions": 6,
    "fit_size": 16,
    "fit_steps": 10,
    "epochs": 5,
    "kept": 8,
}


@pytest.fixture(scope="module")
def run():
    """Six sessions: the algorithm, the state after exploring, that at the end, and the infos."""
    learner, explorer = learners()
    algorithm = pebble(learner, FIT, reward, **NUMBERS)
    algorithm = algorithm._replace(propose=jax.jit(algorithm.propose), update=jax.jit(algorithm.update))
    annotate = teacher_annotator()

    @jax.jit
    def first(key):
        state = algorithm.init(key, 0.1 * jax.random.normal(key, (3, 3, 2)), jnp.zeros((3, 2)))
        return state, explore(key, explorer, learner, state, steps=20)

    begun, explored = first(jax.random.key(0))
    state, infos = explored, []
    for number in range(6):
        keys = jax.random.split(jax.random.key(number), 3)
        queries = algorithm.propose(keys[0], state, None, ())
        state, info = algorithm.update(keys[2], state, Labelled(queries, annotate(keys[1], queries, ())), ())
        infos.append(info)
    return algorithm, begun, explored, state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)


def test_comparisons_alone_teach_the_policy(run):
    _, _, _, final, infos = run
    np.testing.assert_array_equal(infos.labels, np.full(6, 8))
    assert int(final.labels.filled) == 48 and int(final.step) == 6
    assert np.all(np.argmax(final.policy, axis=1)[1:] == np.argmax(GOLD, axis=1)[1:])
    assert infos.accuracy[-1] > 0.9 and np.all(infos.epochs <= 5)
    # The environment's state is drawn afresh at each step: a return over 3 steps is 3 times the mean reward, 2/3 at best.
    assert 1.2 < policy_return(final, segment=3, recent=40) < 2.2
    np.testing.assert_array_equal(final.learner.upper, final.members.upper)


def test_exploring_keeps_the_policy_and_its_experience_only(run):
    _, begun, explored, _, _ = run
    assert int(explored.learner.step) == 80 and int(explored.learner.replay.filled) == 80
    assert not np.allclose(explored.policy, begun.policy)
    np.testing.assert_array_equal(explored.learner.learned.critics, begun.learner.learned.critics)
    np.testing.assert_array_equal(explored.upper, begun.upper)
    assert int(explored.labels.filled) == 0


def test_the_query_is_what_the_ensemble_disagrees_on_after_the_first_session(run):
    algorithm, _, explored, _, _ = run
    spread = []
    for step in (0, 1):
        queries = algorithm.propose(
            jax.random.key(2), explored._replace(labels=explored.labels._replace(added=jnp.asarray(step))), None, ()
        )
        assert queries.responses.observations.shape == (8, 1, 2, 3, 3)
        probabilities = ensembles.win_probabilities(ensembles.of_samples(reward), explored.upper, queries)
        spread.append(float(jnp.mean(jnp.std(probabilities, axis=0))))
    assert spread[1] > 1.3 * spread[0]


def test_labels_may_come_from_outside(run):
    algorithm, _, explored, _, _ = run
    queries = algorithm.propose(jax.random.key(2), explored, None, ())
    labels = jnp.full((8, 1, 1), SKIPPED).at[:3].set(1.0)
    state, info = algorithm.update(jax.random.key(3), explored, Labelled(queries, labels), ())
    assert int(info.labels) == 3 and int(state.labels.filled) == 8
    with pytest.raises(ValueError, match="step needs an annotator"):
        algorithm.step(jax.random.key(0), explored, None, ())


def test_ties_and_skipped_pairs_are_left_out_of_the_agreement(run):
    algorithm, _, explored, _, _ = run
    queries = algorithm.propose(jax.random.key(2), explored, None, ())
    sums = np.asarray(jnp.sum(queries.responses.gold, axis=-1))[:, 0]
    right = (sums[:, 0] > sums[:, 1]).astype(float)
    labels = np.concatenate([right[:4], 1 - right[4:6], [0.5, SKIPPED]])[:, None, None]
    found = ensembles.agreement(ensembles.of_samples(reward), GOLD[None], Labelled(queries, jnp.asarray(labels)))
    np.testing.assert_allclose(found, [4 / 6], rtol=1e-6)
    nobody = Labelled(queries, jnp.full((8, 1, 1), SKIPPED))
    np.testing.assert_array_equal(ensembles.agreement(ensembles.of_samples(reward), GOLD[None], nobody), [1.0])


def test_labels_from_a_file_come_first_and_sessions_go_on(run, tmp_path):
    algorithm, begun, explored, final, _ = run
    bought = jax.tree.map(lambda leaf: leaf[:8], final.labels.pairs._replace(
        sample=final.labels.pairs.sample._replace(from_policy=None, num_draws=None)
    ))  # fmt: skip
    write_preferences(tmp_path / "pairs.npz", bought)
    labelled = read_preferences(tmp_path / "pairs.npz")
    np.testing.assert_array_equal(labelled.labels, bought.labels)
    for name in ("observations", "actions", "gold", "window"):
        np.testing.assert_array_equal(getattr(labelled.sample.responses, name), getattr(bought.sample.responses, name))
    before = ensembles.agreement(ensembles.of_samples(reward), explored.upper, labelled)
    state, accuracy = learn_offline(jax.random.key(0), FIT, reward, explored, labelled, size=16, steps=20, epochs=3)
    assert int(state.labels.filled) == 8 and int(state.step) == 0 and accuracy > np.min(before)
    np.testing.assert_array_equal(state.policy, explored.policy)
    np.testing.assert_array_equal(state.learner.upper, state.members.upper)
    queries = algorithm.propose(jax.random.key(2), state, None, ())
    state, _ = algorithm.update(jax.random.key(3), state, Labelled(queries, jnp.ones((8, 1, 1))), ())
    assert int(state.labels.filled) == 16 and int(state.step) == 1
    longer = labelled._replace(labels=jnp.concatenate([labelled.labels] * 2, axis=-1))
    with pytest.raises(ValueError, match="they must agree"):
        learn_offline(jax.random.key(0), FIT, reward, begun, longer)


@pytest.mark.parametrize(
    "wrong, message",
    [({"queries": 0}, "queries must be at least 1, got 0"), ({"enough": 1.5}, "enough must be a fraction")],
)
def test_what_is_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        pebble(learners()[0], FIT, reward, **NUMBERS | wrong)


def test_the_problem_of_segments_draws_nothing():
    with pytest.raises(ValueError, match="its segments come from a replay or a file"):
        segment_problem(reward).sample(None, None, None, None)


@pytest.mark.slow
def test_the_example_swings_a_pendulum_up_from_comparisons():
    """A swing from the bottom costs about 120 to 400; doing nothing costs about 1200."""
    pytest.importorskip("gymnax", reason="needs the extra control")
    path = pathlib.Path(__file__).resolve().parents[2] / "examples" / "preferences_on_control.py"
    # As a user runs it: with the optimisations of XLA that the tests do without.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    returns = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(returns) == 12 and np.mean(returns[-4:]) > -400 > -1000 > np.mean(returns[:3])
