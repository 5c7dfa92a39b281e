"""Episodes against independent solutions: the tree, the best responses, the hypergradient, in double precision."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bandit, bilevel, mdp, objectives, preferences

BETA = 0.5
HIDDEN = 5
SIGMAS = (0.003, 0.01, 0.03, 0.1, 0.2)
LARGE = 4

pytestmark = pytest.mark.usefixtures("x64")

PAIR, MIXED = "likelihood of an annotator with habits, policy-policy", "uncoupled likelihood + utility"
HABITS = preferences.Choice(temperature=0.7, mistake=0.1, position=0.3)
OBJECTIVES = {
    PAIR: (objectives.likelihood(), False, HABITS),
    MIXED: (
        objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.3)),
        True,
        preferences.BRADLEY_TERRY,
    ),
}


# The programs run for milliseconds; almost all of the time is compilation.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(params=OBJECTIVES, scope="module")
def name(request):
    """Module scope makes pytest group the tests by objective, so that programs compile once per worker."""
    return request.param


def reward(upper, features):
    return jnp.tanh(features @ upper["in"]) @ upper["out"]


@functools.cache
def instance():
    normal = np.random.default_rng(0).normal
    frozen = compiled(mdp.random_episodes)(jax.random.key(0))
    upper = {
        "in": jnp.asarray(normal(scale=0.5, size=(frozen.features.shape[-1], HIDDEN))),
        "out": jnp.asarray(normal(scale=0.5, size=HIDDEN)),
    }
    return frozen, upper


@functools.cache
def exact_gradient(name):
    objective, against_reference, choice = OBJECTIVES[name]

    def phi(upper, frozen):
        return mdp.upper_value(
            reward, objective, upper, frozen, beta=BETA, against_reference=against_reference, choice=choice
        )

    return compiled(jax.value_and_grad(phi))


def examined(solver):
    """The solver, which stores for each iterate the gradient norm, the least excess of h under perturbations, and h."""

    def step(key, lowers, solver_state, task):
        del solver_state
        solved, _, residuals = solver.step(key, lowers, (), task)
        noise = np.random.default_rng(0).normal(scale=0.1, size=(20, *solved.shape))
        losses = jax.vmap(task.loss)
        solved_losses = losses(solved, task.indices)
        excess = jax.lax.map(lambda change: losses(solved + change, task.indices) - solved_losses, jnp.asarray(noise))
        return solved, (residuals, jnp.min(excess, axis=0), solved_losses), residuals

    return bilevel.LowerSolver(lambda lowers: (), step)


class Outcome(NamedTuple):
    """Results of a step: the estimate, the solved policies and their checks, the info, the soft value at tilt 0."""

    estimate: dict
    lowers: jax.Array
    examined: tuple
    info: bilevel.BilevelInfo
    value: jax.Array


@functools.cache
def one_step(name, make_rule, pairs=None):
    """One outer step of SGD with learning rate 1 from the solved policy: the change of the reward is the estimate.

    The schedule reads sigma from the step number, so that one compilation serves every sigma. With `pairs` it takes
    many keys and draws a new sample for each.
    """
    objective, against_reference, choice = OBJECTIVES[name]
    stencil = make_rule in (bilevel.forward, bilevel.central)
    rule = make_rule(lambda step: jnp.asarray(SIGMAS)[step]) if stencil else make_rule()
    problem = mdp.episode_problem(reward, objective, against_reference=against_reference, pairs=pairs)
    solver = mdp.best_response(
        reward, objective, beta=BETA, against_reference=against_reference, choice=choice, iterations=40
    )
    solver = examined(solver) if make_rule is bilevel.central and pairs is None else solver
    annotate = preferences.expected_annotator(mdp.gold_score, labels=objective.labels, choice=choice)
    algorithm = bilevel.bilevel_descent(problem, rule, solver, optax.sgd(1.0), beta=BETA, annotate=annotate)

    def hypergradient(key, frozen, upper, index):
        policy, value = mdp.soft_policy(reward(upper, frozen.features), frozen, BETA)
        state = algorithm.init(key, upper, policy)._replace(step=index)
        after, info = algorithm.step(key, state, None, frozen)
        change = jax.tree.map(jnp.subtract, state.upper, after.upper)
        return Outcome(change, after.lowers, after.solver, info, jnp.mean(value))

    over_keys = jax.vmap(hypergradient, in_axes=(0, None, None, None))
    return compiled(hypergradient if pairs is None else over_keys)


def estimate(name, make_rule, frozen, upper, index=0):
    return one_step(name, make_rule)(jax.random.key(0), frozen, upper, index).estimate


def ravel(tree, *, batch=()):
    """All leaves in one vector, in NumPy: each new JAX operation would be one more compilation."""
    return np.concatenate([np.reshape(leaf, (*batch, -1)) for leaf in jax.tree.leaves(tree)], axis=-1)


def distance(left, right):
    return np.linalg.norm(ravel(left) - ravel(right)) / np.linalg.norm(ravel(right))


def order_of_error(name, make_rule, indices):
    frozen, upper = instance()
    _, gradient = exact_gradient(name)(upper, frozen)
    errors = [distance(estimate(name, make_rule, frozen, upper, index), gradient) for index in indices]
    return np.polyfit(np.log([SIGMAS[index] for index in indices]), np.log(errors), 1)[0]


def test_the_best_response_minimises_every_tilted_loss(name):
    outcome = one_step(name, bilevel.central)(jax.random.key(0), *instance(), LARGE)
    residuals, excess, losses = map(np.asarray, outcome.examined)
    assert np.all(residuals < 1e-10)
    assert np.all(excess > 1e-4)
    assert outcome.info.value_gap > 0
    # J at tilt 0 is the soft value of the root: both discount reward and KL in the same way.
    np.testing.assert_allclose(-losses[0], outcome.value, rtol=1e-12)


def test_the_central_error_is_of_second_order(name):
    assert abs(order_of_error(name, bilevel.central, (1, 2, 3)) - 2) <= 0.1


def test_exact_gradient_agrees_with_finite_differences():
    """On the objective without an uncoupled part: with one, the estimated field is not a gradient."""
    frozen, upper = instance()
    value_and_gradient = exact_gradient(PAIR)
    direction = jax.tree.map(np.cos, upper)
    step = 1e-5

    def moved(size):
        along = jax.tree.map(lambda leaf, direction: leaf + size * direction, upper, direction)
        return value_and_gradient(along, frozen)[0]

    numeric = (moved(step) - moved(-step)) / (2 * step)
    analytic = ravel(value_and_gradient(upper, frozen)[1]) @ ravel(direction)
    np.testing.assert_allclose(numeric, analytic, rtol=1e-7)


def test_without_the_coupling_the_gradient_is_far_off():
    frozen, upper = instance()
    _, gradient = exact_gradient(PAIR)(upper, frozen)
    assert distance(estimate(PAIR, bilevel.decoupled, frozen, upper), gradient) > 0.05


def test_the_forward_error_is_of_first_order():
    assert abs(order_of_error(PAIR, bilevel.forward, (0, 1, 2)) - 1) <= 0.05


def implicit():
    return bilevel.implicit(iterations=60, damping=1e-9)


def test_implicit_is_exact():
    """Up to its linear solver's tolerance, 1e-5 of the residual, divided by the probability of the rarest histories."""
    frozen, upper = instance()
    _, gradient = exact_gradient(PAIR)(upper, frozen)
    assert distance(estimate(PAIR, implicit, frozen, upper), gradient) < 3e-4


def test_drawn_samples_are_unbiased(name):
    """Each coordinate of the mean over many draws lies within 5 standard errors of the enumerated step's gradient."""
    frozen, upper = instance()
    truth = ravel(estimate(name, bilevel.central, frozen, upper, LARGE))
    keys = jax.random.split(jax.random.key(5), 800)
    drawn = one_step(name, bilevel.central, pairs=16)(keys, frozen, upper, LARGE).estimate
    estimates = ravel(drawn, batch=(len(keys),))
    error = estimates.std(axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(estimates.mean(axis=0) - truth) < 5 * error)
    # The interval is narrow enough to detect a missing factor.
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(truth)


def test_one_step_without_discount_is_the_bandit():
    """Prompts are contexts: two of them start in the same state."""
    frozen, upper = instance()
    frozen = frozen._replace(discount=jnp.ones(1), starts=jnp.array([2, 0, 1, 1]))
    objective, against_reference, choice = OBJECTIVES[PAIR]
    arms = bandit.Bandit(*(table[frozen.starts] for table in (frozen.features, frozen.gold, frozen.reference)))
    algorithm = bilevel.bilevel_descent(
        bandit.bandit_problem(reward, objective, against_reference=against_reference),
        bilevel.central(SIGMAS[LARGE]),
        bandit.best_response(reward, objective, beta=BETA, against_reference=against_reference, choice=choice),
        optax.sgd(1.0),
        beta=BETA,
        annotate=preferences.expected_annotator(bandit.gold_score, labels=objective.labels, choice=choice),
    )
    state = algorithm.init(jax.random.key(0), upper, arms.reference + reward(upper, arms.features) / BETA)
    after, info = compiled(algorithm.step)(jax.random.key(0), state, None, arms)
    own = one_step(PAIR, bilevel.central)(jax.random.key(0), frozen, upper, LARGE)
    np.testing.assert_allclose(ravel(own.estimate), ravel(state.upper) - ravel(after.upper), rtol=1e-9, atol=1e-12)
    for field in ("upper_loss", "kl", "entropy", "collision_rate"):
        np.testing.assert_allclose(getattr(own.info, field), getattr(info, field), rtol=1e-10, err_msg=field)


def test_the_tilted_policy_depends_on_the_history_and_the_untilted_one_does_not():
    frozen, upper = instance()
    lowers = one_step(PAIR, bilevel.central)(jax.random.key(0), frozen, upper, LARGE).lowers
    tree = mdp.history_tree(frozen)
    spread = []
    for log_policy in np.asarray(lowers)[:, 0]:
        where = (tree.steps, np.asarray(tree.states[0]))
        highest = np.full((len(frozen.discount), *frozen.gold.shape), -np.inf)
        np.maximum.at(highest, where, log_policy)
        spread.append(np.max(highest[where] - log_policy))
    assert spread[0] < 1e-12
    assert min(spread[1:]) > 1e-3


def test_evaluation_agrees_with_the_info_and_finds_no_gap_at_the_optimum():
    frozen, upper = instance()
    outcome = one_step(PAIR, bilevel.central)(jax.random.key(0), frozen, upper, LARGE)

    @compiled
    def evaluate(learned):
        best, _ = mdp.soft_policy(frozen.gold, frozen, BETA)
        policies = jnp.stack([learned, best, mdp.reference_logits(frozen)])
        return jax.vmap(lambda lower: mdp.evaluate_policy(lower, frozen, beta=BETA))(policies)

    evaluations = evaluate(outcome.lowers[0])
    np.testing.assert_allclose(evaluations.kl[0], outcome.info.kl, rtol=1e-10)
    np.testing.assert_allclose(evaluations.entropy[0], outcome.info.entropy, rtol=1e-10)
    assert evaluations.gap[0] > 0.01
    assert evaluations.true_return[1] > evaluations.true_return[0]
    np.testing.assert_allclose([evaluations.gap[1], evaluations.kl[2]], 0.0, atol=1e-12)
    np.testing.assert_allclose(evaluations.win_rate[2], 0.5, rtol=1e-12)


def test_the_listed_pairs_are_complete_and_their_probabilities_sum_to_one():
    frozen, _ = instance()
    problem = mdp.episode_problem(reward, objectives.likelihood(), against_reference=False)
    lower = jnp.asarray(np.random.default_rng(1).normal(size=mdp.reference_logits(frozen).shape))
    sample = compiled(problem.sample)(jax.random.key(0), lower, None, frozen)
    assert sample.behaviour_log_prob.shape == (2, 32**2, 2, 3)
    np.testing.assert_allclose(sample.measure.sum(axis=1), 0.5, rtol=1e-12)
    trajectories = np.concatenate([*sample.responses], axis=-1)
    for slot in (0, 1):
        assert all(len(np.unique(rows, axis=0)) == 32 for rows in trajectories[:, :, slot])
    # The nodes computed from states and actions are those that the pairs were listed with.
    again = compiled(problem.log_prob)(lower, sample, frozen)
    np.testing.assert_allclose(again, sample.behaviour_log_prob, rtol=1e-12)


def test_a_listed_trajectory_has_the_probability_of_its_steps():
    """Against a product over steps, with dense transition tables."""
    frozen, _ = instance()
    tree = mdp.history_tree(frozen)
    lower = jax.nn.log_softmax(np.random.default_rng(1).normal(size=mdp.reference_logits(frozen).shape))
    totals = tree.log_prob(lower)
    states, actions = map(np.asarray, tree.trajectories())
    dense = np.zeros((3, 2, 3))
    np.put_along_axis(dense, np.asarray(frozen.successors), np.asarray(frozen.transition), axis=-1)
    np.testing.assert_allclose(dense.sum(axis=-1), 1.0)
    for prompt, row in [(0, 0), (1, 13), (0, 31)]:
        path, chosen = states[prompt, row], actions[prompt, row]
        assert path[0] == frozen.starts[prompt]
        environment = [dense[path[step], chosen[step], path[step + 1]] for step in range(2)]
        policy = [lower[prompt, tree.nodes[row, step], chosen[step]] for step in range(3)]
        np.testing.assert_allclose(totals[prompt, row], np.sum(np.log(environment)) + np.sum(policy), rtol=1e-12)


def test_a_markov_policy_stands_in_for_the_table():
    """The same policy in both forms gives the same pairs and probabilities; it also draws where listing is impossible."""
    frozen, _ = instance()
    tree = mdp.history_tree(frozen)
    markov = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2)))

    def sample_and_log_prob(policy, lower):
        problem = mdp.episode_problem(reward, objectives.likelihood(), policy=policy)
        sample = problem.sample(jax.random.key(0), lower, None, frozen)
        return sample, problem.log_prob(lower, sample, frozen)

    history = markov[tree.steps, tree.states]
    both = compiled(
        lambda: (sample_and_log_prob(mdp.markov_table, markov), sample_and_log_prob(mdp.history_table, history))
    )()
    np.testing.assert_allclose(both[0][0].measure.sum(), 1.0, rtol=1e-12)
    for left, right in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10)

    frozen = frozen._replace(discount=jnp.ones(30))
    problem = mdp.episode_problem(reward, objectives.likelihood(), pairs=8, policy=mdp.markov_table)
    sample = compiled(problem.sample)(jax.random.key(0), jnp.zeros((30, 3, 2)), None, frozen)
    states, actions = map(np.asarray, sample.responses)
    allowed = np.asarray(frozen.successors)[states[..., :-1], actions[..., :-1]] == states[..., 1:, None]
    assert np.all(np.any(allowed, axis=-1))
    np.testing.assert_allclose(np.asarray(sample.behaviour_log_prob)[:, :, 0], np.log(0.5), rtol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mdp.random_episodes(jax.random.key(0), successors=4), "must not exceed states"),
        (lambda: mdp.random_episodes(jax.random.key(0), gamma=0.0), "gamma must lie"),
        (lambda: mdp.random_episodes(jax.random.key(0), horizon=0), "horizon must be"),
        (lambda: mdp.history_tree(instance()[0]._replace(discount=jnp.ones(6))), "draw pairs, or shorten"),
        (lambda: mdp.episode_problem(reward, objectives.likelihood(), pairs=0), "pairs must be at least 1"),
        (lambda: mdp.episode_problem(reward, objectives.brier(), against_reference=False), "policy-reference"),
        (lambda: mdp.episode_problem(reward, objectives.excess_likelihood(), pairs=4), "probability of each label"),
        (lambda: estimate(PAIR, bilevel.boltzmann, *instance()), "one-step responses"),
    ],
)
def test_errors_name_the_thing_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
