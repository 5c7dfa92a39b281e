"""Advantages against their definition; the critic's policy gradient against the exact one, and its noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bilevel
from jaxrlhf.algorithms.actor_critic import actor_critic, advantages
from jaxrlhf.base import Labelled, importance
from jaxrlhf.bilevel.solvers import LowerTask
from jaxrlhf.bilevel.stencil import ALONE
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives, tabular


def test_advantages_are_their_definition(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    reward, value = jax.random.normal(keys[0], (3, 6)), jax.random.normal(keys[1], (3, 6))
    lengths, gamma = np.array([6, 3, 1]), 0.8
    discount = jnp.asarray(np.where(np.arange(6) < lengths[:, None], gamma ** np.arange(6), 0.0))
    for trace in (0.0, 0.7, 1.0):
        found = advantages(reward, value, discount, trace=trace)
        for row, length in enumerate(lengths):
            later = 0.0
            for step in reversed(range(length)):
                following = value[row, step + 1] if step + 1 < length else 0.0
                later = reward[row, step] + gamma * following - value[row, step] + gamma * trace * later
                np.testing.assert_allclose(found[row, step], later, rtol=1e-12)
            assert jnp.all(found[row, length:] == 0)


def design():
    keys = jax.random.split(jax.random.key(3), 4)
    mdp = tabular.TabularMDP(
        transition=jax.nn.softmax(2.0 * jax.random.normal(keys[0], (1, 4, 3, 4))),
        start=jax.nn.softmax(jax.random.normal(keys[1], (1, 4))),
        terminal=(jnp.arange(4) < 1).astype(float)[None],
        discount=jnp.full(1, 0.9),
    )
    frozen = rooms.FourRooms(mdp, goal=jnp.zeros((1, 4)), target=jnp.zeros((1, 4)))
    data = rooms.Coefficients(jnp.ones(1), jnp.full(1, 0.5), jnp.zeros(1))
    upper, lower = jax.random.normal(keys[2], (4, 3)), jax.random.normal(keys[3], (1, 4, 3))
    return (lambda upper, data, frozen: upper), upper, lower, data, frozen


def task_of(problem, key):
    """The lower task on fresh episodes of `lower`, as the algorithm would give it to a solver."""
    _, upper, lower, data, frozen = design()
    sample = problem.sample(key, lower, data, frozen)
    labelled = Labelled(sample, incentives.unlabelled(key, sample, frozen))

    def loss(lower, index):
        log_prob = problem.log_prob(lower, sample, frozen)
        rewards = problem.reward(upper, sample, frozen)
        cost = problem.cost(upper, rewards, labelled, frozen)
        return -importance.evaluate(log_prob, rewards, cost, sample, beta=1.0).lower

    return LowerTask(
        loss=loss,
        upper=upper,
        tilts=jnp.zeros(1),
        stencil=ALONE,
        sigma=jnp.ones(()),
        labelled=labelled,
        frozen=frozen,
    )


def draw_policy_gradients(estimators, problem, count):
    """Each estimate of the gradient of -J at `lower`, from the same fresh episodes, `[count, 1, 4, 3]`."""
    keys = jax.random.split(jax.random.key(5), count)

    def draw(key):
        task = task_of(problem, key)
        return {name: estimator(task) for name, estimator in estimators.items()}

    return jax.jit(jax.vmap(draw))(keys)


def test_the_policy_gradient_is_unbiased_and_a_critic_reduces_its_noise(x64):
    reward, upper, lower, data, frozen = design()
    problem = incentives.incentive_problem(reward, reward, episodes=16, steps=60)
    _, lower_loss = incentives.incentive_losses(reward, reward)
    truth = jax.jit(jax.grad(lambda lower: lower_loss(upper, lower, data, frozen)))(lower)
    log_policy = jax.nn.log_softmax(lower)[0]
    here = jax.tree.map(lambda leaf: leaf[0], frozen.mdp)
    exact = tabular.policy_value(upper / 0.5 - log_policy, log_policy, here)

    def value(critic, sample, frozen):
        return critic[sample.responses.states]

    def with_critic(critic, trace):
        given = actor_critic(problem, value, critic, optax.sgd(0.0), beta=1.0, trace=trace)
        return lambda task: given.step(lower, given.init(), task)[0]

    estimators = {
        "loss": lambda task: bilevel.loss_gradient().step(lower, (), task)[0],
        "no critic": with_critic(jnp.zeros(4), 1.0),
        "exact critic": with_critic(exact, 1.0),
        "exact critic, short trace": with_critic(exact, 0.0),
    }
    spread = {}
    for name, drawn in draw_policy_gradients(estimators, problem, 1000).items():
        error = drawn.std(axis=0) / np.sqrt(1000)
        assert jnp.all(jnp.abs(drawn.mean(axis=0) - truth) < 5 * error + 0.02 * jnp.linalg.norm(truth)), name
        spread[name] = float(jnp.sum(drawn.var(axis=0)))
    assert spread["exact critic, short trace"] < 0.7 * min(spread["loss"], spread["no critic"])


def test_opponents_episodes_are_learned_from_like_the_policys(x64):
    reward, _, lower, *_ = design()
    problem = incentives.incentive_problem(reward, reward, episodes=8, steps=20)

    def with_slots(task, flags):
        # Slot 1 repeats the first episode of slot 0.
        sample = jax.tree.map(
            lambda leaf: leaf if leaf.ndim < 3 else leaf.at[:, :, 1].set(leaf[:, :1, 0]), task.labelled.sample
        )
        return task._replace(labelled=task.labelled._replace(sample=sample._replace(from_policy=flags)))

    def value(critic, sample, frozen):
        return critic[sample.responses.states]

    @functools.partial(jax.jit, static_argnames="every_response")
    def gradient(flags, every_response=False):
        given = actor_critic(problem, value, jnp.zeros(4), optax.sgd(0.0), beta=1.0, every_response=every_response)
        task = task_of(problem, jax.random.key(0))
        return given.step(lower, given.init(), with_slots(task, flags))[0], task.labelled.sample.from_policy

    both, first = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])
    policys, from_policy = gradient(both)
    assert jnp.sum(from_policy) == 1
    np.testing.assert_allclose(gradient(first, every_response=True)[0], policys, rtol=1e-12)
    assert jnp.any(jnp.abs(gradient(first)[0] - policys) > 1e-3)


@pytest.mark.slow
def test_the_critic_learns_the_value(x64):
    reward, upper, lower, _, frozen = design()
    problem = incentives.incentive_problem(reward, reward, episodes=256, steps=60)
    given = actor_critic(
        problem, lambda critic, sample, frozen: critic[sample.responses.states], jnp.zeros(4), optax.sgd(0.1), beta=1.0
    )

    def one(state, key):
        _, state = given.step(lower, state, task_of(problem, key))
        return state, state.critic

    _, critics = jax.jit(lambda keys: jax.lax.scan(one, given.init(), keys))(jax.random.split(jax.random.key(0), 800))
    log_policy = jax.nn.log_softmax(lower)[0]
    here = jax.tree.map(lambda leaf: leaf[0], frozen.mdp)
    exact = tabular.policy_value(upper / 0.5 - log_policy, log_policy, here)
    np.testing.assert_allclose(critics[-400:].mean(axis=0), exact, atol=0.05)


def test_settings_out_of_range_are_refused():
    reward, *_ = design()
    problem = incentives.incentive_problem(reward, reward, episodes=2, steps=2)
    with pytest.raises(ValueError, match="trace must lie"):
        actor_critic(problem, lambda *_: None, jnp.zeros(1), optax.sgd(0.1), beta=1.0, trace=1.5)
    with pytest.raises(ValueError, match="clip must be positive"):
        actor_critic(problem, lambda *_: None, jnp.zeros(1), optax.sgd(0.1), beta=1.0, clip=0.0)
