"""The hypergradient against the closed form and finite differences, on an exactly solvable bandit, in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrlhf import bandit, bilevel, exact, objectives, preferences
from jaxrlhf.known.problem import descend

BETA = 0.5
CONTEXTS, ARMS, FEATURES, HIDDEN = 2, 5, 4, 8

pytestmark = pytest.mark.usefixtures("x64")

OBJECTIVES = {
    "likelihood, policy-policy": (lambda: objectives.likelihood(), False),
    "likelihood, policy-reference": (lambda: objectives.likelihood(), True),
    "brier": (lambda: objectives.brier(), True),
    "utility": (lambda: objectives.utility(kl_price=0.3), True),
    "uncoupled likelihood + utility": (
        lambda: objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=BETA / 4)),
        True,
    ),
}


def reward(upper, features):
    return jnp.tanh(features @ upper["in"] + upper["bias"][None, None, :]) @ upper["out"]


def make(seed):
    keys = jax.random.split(jax.random.key(seed), 6)
    frozen = bandit.Bandit(
        features=jax.random.normal(keys[0], (CONTEXTS, ARMS, FEATURES)),
        gold=jax.random.normal(keys[1], (CONTEXTS, ARMS)),
        reference=jax.nn.log_softmax(jax.random.normal(keys[2], (CONTEXTS, ARMS))),
    )
    upper = {
        "in": jax.random.normal(keys[3], (FEATURES, HIDDEN)) * 0.5,
        "bias": jax.random.normal(keys[4], (HIDDEN,)) * 0.1,
        "out": jax.random.normal(keys[5], (HIDDEN,)) * 0.5,
    }
    return frozen, upper


@functools.cache
def exact_gradient(name):
    make_objective, against_reference = OBJECTIVES[name]

    @jax.jit
    def value_and_gradient(frozen, upper):
        def phi(upper):
            rewards = reward(upper, frozen.features)
            tables = (rewards, frozen.gold, frozen.reference)
            return exact.upper_value(make_objective(), *tables, beta=BETA, against_reference=against_reference)

        return jax.value_and_grad(phi)(upper)

    return value_and_gradient


@functools.cache
def one_step(name, make_rule, sigmas=None, pairs=None):
    """One outer step of plain descent with unit rate: the change of the reward is the hypergradient.

    The schedule reads sigma from the step number, so that one compilation serves every sigma.
    """
    make_objective, against_reference = OBJECTIVES[name]
    objective = make_objective()
    rule = make_rule() if sigmas is None else make_rule(lambda step: jnp.asarray(sigmas)[step])
    problem = bandit.bandit_problem(reward, objective, against_reference=against_reference, pairs=pairs)
    solver = bandit.best_response(reward, objective, beta=BETA, against_reference=against_reference)
    annotate = preferences.expected_annotator(bandit.gold_score, labels=objective.labels)
    algorithm = descend(problem, rule, solver, optax.sgd(1.0), beta=BETA, annotate=annotate)
    step = jax.jit(algorithm.step)  # traced once, though it is called twice below

    @jax.jit
    def hypergradient(key, frozen, upper, index):
        policy = exact.soft_policy(reward(upper, frozen.features), frozen.reference, BETA)
        state = algorithm.init(key, upper, policy)._replace(step=index)
        if rule.sampling != "shared":
            # Each tilt samples from its own solved policy, a closed form of the reward that does not depend on the key.
            state = state._replace(lowers=step(jax.random.key(0), state, None, frozen)[0].lowers)
        after, _ = step(key, state, None, frozen)
        return jax.tree.map(jnp.subtract, state.upper, after.upper)

    return hypergradient


def ravel(tree):
    return ravel_pytree(tree)[0]


def distance(left, right):
    return float(jnp.linalg.norm(ravel(left) - ravel(right)) / jnp.linalg.norm(ravel(right)))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "uncoupled" not in name])
def test_exact_gradient_agrees_with_finite_differences(name):
    frozen, upper = make(1)
    _, gradient = exact_gradient(name)(frozen, upper)
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(7), leaf.shape), upper)
    step = 1e-5

    def moved(size):
        along = jax.tree.map(lambda leaf, direction: leaf + size * direction, upper, direction)
        return exact_gradient(name)(frozen, along)[0]

    numeric = (moved(step) - moved(-step)) / (2 * step)
    analytic = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    np.testing.assert_allclose(numeric, analytic, rtol=1e-7)


FORWARD = (bilevel.forward, 1.0, 0.05, (0.003, 0.01, 0.03))
CENTRAL = (bilevel.central, 2.0, 0.1, (0.01, 0.03, 0.1))
FIVE_POINT = (bilevel.five_point, 4.0, 0.3, (0.05, 0.1, 0.2))
PAIR, MIXED = "likelihood, policy-policy", "uncoupled likelihood + utility"


# By default one stencil on every objective, the others where pairs are of both kinds, with and without an uncoupled part;
# all other combinations are marked slow.
ORDERS = [
    pytest.param(name, *stencil, marks=() if stencil is CENTRAL or name in (PAIR, MIXED) else pytest.mark.slow)
    for stencil in (CENTRAL, FORWARD, FIVE_POINT)
    for name in OBJECTIVES
]


@pytest.mark.parametrize("name, make_rule, order, tolerance, sigmas", ORDERS)
def test_stencil_error_falls_with_its_order(name, make_rule, order, tolerance, sigmas):
    frozen, upper = make(0)
    _, gradient = exact_gradient(name)(frozen, upper)
    hypergradient = one_step(name, make_rule, sigmas)
    errors = [distance(hypergradient(jax.random.key(0), frozen, upper, index), gradient) for index in range(3)]
    exponent = np.polyfit(np.log(sigmas), np.log(errors), 1)[0]
    assert abs(exponent - order) <= tolerance, (errors, exponent)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_boltzmann_is_exact(name):
    for seed in range(3):
        frozen, upper = make(seed)
        _, gradient = exact_gradient(name)(frozen, upper)
        estimated = one_step(name, bilevel.boltzmann)(jax.random.key(0), frozen, upper, 0)
        assert distance(estimated, gradient) < 1e-10


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "utility" not in name])
def test_without_the_coupling_the_gradient_is_far_off(name):
    """The coupling part is not zero; a rule that drops it (the mutation `decoupled`) fails the tests above."""
    frozen, upper = make(0)
    _, gradient = exact_gradient(name)(frozen, upper)
    without = one_step(name, bilevel.decoupled)(jax.random.key(0), frozen, upper, 0)
    coupling = one_step(name, bilevel.boltzmann)(jax.random.key(0), frozen, upper, 0)
    size = jnp.linalg.norm(ravel(coupling) - ravel(without)) / jnp.linalg.norm(ravel(gradient))
    assert distance(without, gradient) > 0.02
    assert size > 0.02


@pytest.mark.parametrize("make_rule", [bilevel.forward, bilevel.central, bilevel.five_point])
def test_dropping_the_reward_weights_destroys_the_order(make_rule):
    """The mutation that the public code nearest to this method contains: a penalty without gradient in the reward."""
    name = "uncoupled likelihood + utility"
    frozen, upper = make(0)
    _, gradient = exact_gradient(name)(frozen, upper)

    def mutated(sigma):
        rule = make_rule(sigma)
        return rule._replace(
            weights=lambda evidence: (w := rule.weights(evidence))._replace(reward=jnp.zeros_like(w.reward))
        )

    sigmas = (0.01, 0.03, 0.1)
    hypergradient = one_step(name, mutated, sigmas)
    errors = [distance(hypergradient(jax.random.key(0), frozen, upper, index), gradient) for index in range(3)]
    assert min(errors) > 0.05
    assert abs(np.polyfit(np.log(sigmas), np.log(errors), 1)[0]) < 0.2


@pytest.mark.parametrize("make_rule", [bilevel.central, bilevel.boltzmann])
@pytest.mark.parametrize("name", ["likelihood, policy-policy", "uncoupled likelihood + utility"])
def test_drawn_samples_are_unbiased(name, make_rule):
    """Each coordinate of the mean over many draws lies within 5 standard errors of the enumerated step's gradient."""
    frozen, upper = make(3)
    sigmas = None if make_rule is bilevel.boltzmann else (0.2,)
    truth = ravel(one_step(name, make_rule, sigmas)(jax.random.key(0), frozen, upper, 0))
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = one_step(name, make_rule, sigmas, pairs=3)
    estimates = jax.jit(jax.vmap(lambda key: ravel(draw(key, frozen, upper, 0))))(keys)
    error = estimates.std(axis=0) / np.sqrt(len(keys))
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - truth) < 5 * error)
    # The interval is narrow enough to notice a missing factor.
    assert jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(truth)


# "common" is "independent" with one key for all tilts.
@pytest.mark.parametrize(
    "name, sampling",
    [
        (PAIR, "independent"),
        (MIXED, "independent"),
        (MIXED, "common"),
        pytest.param(PAIR, "common", marks=pytest.mark.slow),
    ],
)
def test_samples_of_their_own_are_unbiased_too(name, sampling):
    frozen, upper = make(3)
    truth = ravel(one_step(name, bilevel.central, (0.5,))(jax.random.key(0), frozen, upper, 0))
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = one_step(name, functools.partial(bilevel.central, sampling=sampling), (0.5,), pairs=24)
    estimates = jax.jit(jax.vmap(lambda key: ravel(draw(key, frozen, upper, 0))))(keys)
    error = estimates.std(axis=0) / np.sqrt(len(keys))
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - truth) < 5 * error)
    assert jnp.linalg.norm(error) < 0.15 * jnp.linalg.norm(truth)


def test_separate_samples_enumerate_to_the_shared_one():
    name = "uncoupled likelihood + utility"
    frozen, upper = make(1)
    shared = one_step(name, bilevel.central, (0.2,))(jax.random.key(0), frozen, upper, 0)
    own = one_step(name, functools.partial(bilevel.central, sampling="independent"), (0.2,))
    assert distance(own(jax.random.key(0), frozen, upper, 0), shared) < 1e-9


@pytest.mark.parametrize(
    "name, method, iterations",
    [
        ("likelihood, policy-policy", "conjugate_gradient", 30),
        ("uncoupled likelihood + utility", "conjugate_gradient", 30),
        ("utility", "neumann", 3000),
    ],
)
def test_implicit_is_exact_once_its_system_is_solved(name, method, iterations):
    frozen, upper = make(2)
    _, gradient = exact_gradient(name)(frozen, upper)
    rule = functools.partial(bilevel.implicit, iterations=iterations, method=method, damping=1e-9, neumann_rate=8.0)
    assert distance(one_step(name, rule)(jax.random.key(0), frozen, upper, 0), gradient) < 1e-5


def test_implicit_with_few_iterations_is_not():
    frozen, upper = make(2)
    name = "likelihood, policy-policy"
    _, gradient = exact_gradient(name)(frozen, upper)
    rule = functools.partial(bilevel.implicit, iterations=1, method="neumann", neumann_rate=1.0)
    assert distance(one_step(name, rule)(jax.random.key(0), frozen, upper, 0), gradient) > 1e-3


@pytest.mark.parametrize("name", ["likelihood, policy-policy", "utility"])
def test_zero_order_is_the_derivative_along_its_direction(name):
    """The estimate is <grad Phi, u> u; over many u its mean is grad Phi."""
    frozen, upper = make(2)
    _, gradient = exact_gradient(name)(frozen, upper)
    draw = one_step(name, bilevel.zero_order, (1e-3,))
    estimate = draw(jax.random.key(0), frozen, upper, 0)
    update_key = jax.random.split(jax.random.key(0), 3)[2]
    direction = optax.tree.random_like(jax.random.split(update_key)[1], upper, jax.random.normal)
    derivative = optax.tree.vdot(gradient, direction)
    assert distance(estimate, jax.tree.map(lambda leaf: derivative * leaf, direction)) < 1e-4
    keys = jax.random.split(jax.random.key(1), 4000)
    estimates = jax.jit(jax.vmap(lambda key: ravel(draw(key, frozen, upper, 0))))(keys)
    error = estimates.std(axis=0) / np.sqrt(4000)
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - ravel(gradient)) < 5 * error)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bilevel.implicit(method="inverse"), "conjugate_gradient or neumann"),
        (lambda: bilevel.implicit(iterations=0), "at least 1 iteration"),
        (lambda: bilevel.zero_order(0.0), "must be positive"),
        (lambda: bilevel.central(0.1, sampling="both"), "shared, common or independent"),
        (lambda: bilevel.zero_order(0.1, sampling="both"), "shared, common or independent"),
        (lambda: bilevel.zero_order(bilevel.Balanced()), "no tilt"),
    ],
)
def test_rules_name_the_thing_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bound_of_the_weights_is_off_by_default_and_acts_when_set():
    frozen, upper = make(0)
    objective = OBJECTIVES["uncoupled likelihood + utility"][0]()
    problem = bandit.bandit_problem(reward, objective)
    solver = bandit.best_response(reward, objective, beta=BETA)
    annotate = preferences.expected_annotator(bandit.gold_score)

    def change(bound):
        algorithm = bilevel.bilevel_descent(
            problem,
            bilevel.central(0.2),
            solver,
            optax.sgd(1.0),
            beta=BETA,
            annotate=annotate,
            max_importance_weight=bound,
        )
        # The sample comes from the reference, far from the solved policies: weights above 1.5 exist.
        state = algorithm.init(jax.random.key(0), upper, frozen.reference)
        return ravel(jax.jit(algorithm.step)(jax.random.key(0), state, None, frozen)[0].upper)

    free = change(None)
    np.testing.assert_allclose(change(1e6), free, rtol=1e-12)
    assert bool(jnp.all(jnp.isfinite(change(1.0))))
    assert jnp.linalg.norm(change(1.5) - free) > 1e-3
    with pytest.raises(ValueError, match="at least 1"):
        change(0.5)
