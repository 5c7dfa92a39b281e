"""Every estimator on every problem with known answers: one suite of checks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrlhf import bandit, bilevel, known, objectives, preferences

COUPLED = objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1))

PROBLEMS = {
    "quadratic": known.quadratic,
    "bandit": lambda: known.random_bandit(objective=COUPLED),
    "misspecified bandit": lambda: known.random_bandit(features=3, objective=COUPLED),
    "bandit, policy-policy": lambda: known.random_bandit(objective=objectives.likelihood(), against_reference=False),
    "bandit, network reward": lambda: known.random_bandit(network="reward", objective=COUPLED),
    "bandit, networks": lambda: known.random_bandit(network="both", objective=COUPLED),
    "hard bandit": lambda: known.hard_bandit(objective=COUPLED),
    "episodes": lambda: known.random_mdp(objective=COUPLED),
    "language": lambda: known.small_language(objective=COUPLED),
}
RULES = {
    "forward": lambda: bilevel.forward(0.05),
    "central": lambda: bilevel.central(0.1),
    "five_point": lambda: bilevel.five_point(0.2),
    "balanced": lambda: bilevel.central(bilevel.Balanced()),
    "boltzmann": bilevel.boltzmann,
    "implicit": lambda: bilevel.implicit(iterations=10),
    "neumann": lambda: bilevel.implicit(iterations=30, method="neumann"),
    "zero_order": lambda: bilevel.zero_order(1e-2),
    "common": lambda: bilevel.central(0.3, sampling="common"),
    "independent": lambda: bilevel.central(0.3, sampling="independent"),
}
ONE_STEP = {"boltzmann"}
NEEDS_SAMPLES = {"boltzmann", "common", "independent"}
SLOW = {"language"}  # a transformer's program takes seconds to compile: one rule of each kind
ON_LANGUAGE = {"central", "boltzmann", "implicit"}


def suits(problem, rule):
    if problem == "quadratic" and rule in NEEDS_SAMPLES:
        return False
    if problem == "episodes" and rule in ONE_STEP:
        return False
    return problem not in SLOW or rule in ON_LANGUAGE


PAIRS = [(problem, rule) for problem in PROBLEMS for rule in RULES if suits(problem, rule)]
# Every rule on one problem and one rule on every problem by default; the whole table is marked slow.
QUICK = [(problem, rule) for problem, rule in PAIRS if problem == "bandit" or rule == "central"]
REST = [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in QUICK]


def make(problem, rule, *, solver=None, pairs=None):
    given = PROBLEMS[problem]()
    solver = solver or (given.solver if given.exact_solver else bilevel.gradient(bilevel.shared_adam(0.02), steps=2))
    # At its small beta larger rewards commit the hard bandit's policy to one arm: a plateau, where no draw says more.
    rate, scale = (0.01, 0.05) if problem == "hard bandit" else (1.0, 0.5)
    algorithm = given.algorithm(RULES[rule](), solver, optax.sgd(rate), pairs=pairs)
    state = algorithm.init(jax.random.key(0), *given.start(jax.random.key(1), scale))
    return given, algorithm, state


@pytest.mark.parametrize("problem, rule", QUICK + REST)
def test_contract(problem, rule):
    """Shapes, dtypes, finiteness, determinism, one trace, a live coupling; drawn where there is something to draw."""
    chex.clear_trace_counter()
    given, algorithm, state = make(
        problem, rule, pairs=None if problem == "quadratic" else 64 if problem == "hard bandit" else 4
    )
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1))
    first, info = step(jax.random.key(2), state, given.data, given.frozen)
    again, _ = step(jax.random.key(2), state, given.data, given.frozen)
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
    second, info = step(jax.random.key(3), first, given.data, given.frozen)
    chex.assert_tree_all_finite((second.upper, second.lowers))
    for name, value in info._asdict().items():
        assert value.shape == (), name
    assert float(info.coupling_share) > 1e-6
    assert float(info.hypergradient_norm) > 0
    assert int(second.step) == 2


EXACT = [
    (problem, rule)
    for problem, rule in PAIRS
    if (problem in ("quadratic", "bandit") and rule not in ("forward", "balanced", "common", "neumann"))
    or (problem in ("episodes", "bandit, policy-policy", "bandit, network reward") and rule == "central")
]
TOLERANCE = {"central": 0.02, "five_point": 0.01, "boltzmann": 1e-8, "implicit": 0.03, "independent": 0.05}


@pytest.mark.parametrize("problem, rule", EXACT)
def test_with_exact_lower_policies_the_gradient_is_that_of_phi(problem, rule, x64):
    given, algorithm, state = make(problem, rule)
    # Solved once, so that the sample comes from the answer at this reward.
    solved = jax.jit(algorithm.step)(jax.random.key(0), state, given.data, given.frozen)[0].lowers
    state = state._replace(lowers=solved)
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, given.data, given.frozen)
    estimate = ravel_pytree(jax.tree.map(jnp.subtract, state.upper, after.upper))[0]
    truth = ravel_pytree(jax.jit(jax.grad(given.phi))(state.upper))[0]
    if rule == "zero_order":
        update_key = jax.random.split(jax.random.key(0), 3)[2]
        direction = optax.tree.random_like(jax.random.split(update_key)[1], state.upper, jax.random.normal)
        along = ravel_pytree(direction)[0]
        np.testing.assert_allclose(estimate, (truth @ along) * along, rtol=1e-2, atol=1e-6)
        return
    assert jnp.linalg.norm(estimate - truth) < TOLERANCE[rule] * jnp.linalg.norm(truth)


def test_float32_stands_a_sigma_of_1e_4():
    """With exact lower policies and a shared sample the weights keep their digits: the error stays below 1%."""
    given = known.random_bandit(objective=COUPLED)
    upper, lower = given.start(jax.random.key(1), 0.5)
    truth = jax.jit(jax.grad(given.phi))(upper)
    # Sigma is read from the step number: one compilation serves all.
    rule = bilevel.central(lambda step: jnp.array([1e-2, 1e-3, 1e-4])[step])
    algorithm = given.algorithm(rule, given.solver, optax.sgd(1.0))
    step = jax.jit(algorithm.step)
    for index in range(3):
        state = algorithm.init(jax.random.key(0), upper, lower)._replace(step=jnp.asarray(index, jnp.int32))
        state = state._replace(lowers=step(jax.random.key(0), state, None, given.frozen)[0].lowers)
        assert state.lowers.dtype == jnp.float32
        after, _ = step(jax.random.key(0), state, None, given.frozen)
        assert jnp.linalg.norm(state.upper - after.upper - truth) < 0.01 * jnp.linalg.norm(truth)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_exact_answers_are_consistent(problem):
    """The gradient of Phi against a finite difference; no reward's policy is worth more than the best policy."""
    given = PROBLEMS[problem]()
    phi, exploited = jax.jit(given.phi), jax.jit(given.exploited)
    with jax.enable_x64(False):
        upper, lower = given.start(jax.random.key(4), 0.7)
    direction = optax.tree.random_like(jax.random.key(5), upper, jax.random.normal)
    slope = optax.tree.vdot(jax.jit(jax.grad(given.phi))(upper), direction)
    step = 1e-2

    def moved(size):
        return phi(optax.tree.add_scale(upper, size, direction))

    numeric = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
    np.testing.assert_allclose(numeric, slope, rtol=5e-3, atol=2e-4)
    assert exploited(upper) <= given.best_worth + 1e-5
    assert jax.jit(given.worth)(lower) <= given.best_worth + 1e-5
    if given.optimum is not None:
        assert phi(upper) >= given.optimum - 1e-6


def test_the_closed_form_optimum_is_reached(x64):
    given = known.random_bandit()
    optimizer = optax.adam(0.05)
    upper, _ = given.start(jax.random.key(0), 0.5)

    def step(carry, _):
        upper, state = carry
        move, state = optimizer.update(jax.grad(given.phi)(upper), state, upper)
        return (optax.apply_updates(upper, move), state), None

    (upper, _), _ = jax.lax.scan(step, (upper, optimizer.init(upper)), None, length=2000)
    np.testing.assert_allclose(given.phi(upper), given.optimum, atol=1e-6)


def test_a_known_network_bandit_needs_a_known_kind():
    with pytest.raises(ValueError, match="none, reward or both"):
        known.random_bandit(network="wide")


def test_sigma_follows_the_inner_error():
    """Few inner steps leave an error and a large sigma; an exact answer takes it to the smallest."""
    given = known.random_bandit(objective=COUPLED)
    rule = bilevel.central(bilevel.Balanced(smallest=1e-3, largest=0.5))

    def final(solver):
        algorithm = given.algorithm(rule, solver, optax.sgd(0.1))
        state = algorithm.init(jax.random.key(0), *given.start(jax.random.key(1), 0.5))
        for _ in range(3):
            state, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, given.frozen)
        return float(rule.relative_sigma.best(state.inner_error))

    rough, better = (final(bilevel.gradient(optax.sgd(1.0), steps=steps)) for steps in (1, 400))
    assert final(given.solver) < better < rough <= 0.5
    with pytest.raises(ValueError, match="smallest"):
        bilevel.central(bilevel.Balanced(smallest=0.0))


def test_the_theorem_says_how_many():
    schedule = bilevel.theorem(0.01, outer_steps=2.0)
    assert schedule.outer_steps == 2000 and schedule.batch == 10_000
    np.testing.assert_allclose(schedule.relative_sigma, 0.1)
    coarse, fine = (bilevel.theorem(epsilon) for epsilon in (1e-1, 1e-3))
    samples = fine.outer_steps * fine.batch / (coarse.outer_steps * coarse.batch)
    np.testing.assert_allclose(np.log10(samples) / 2, 3.5, atol=0.02)
    with pytest.raises(ValueError, match="epsilon"):
        bilevel.theorem(1.5)


def test_annotators_who_err_reach_the_algorithm():
    given = known.random_bandit()
    algorithm = given.algorithm(
        bilevel.central(0.1), given.solver, optax.sgd(1.0), pairs=64, choice=preferences.Choice(skip_below=0.5)
    )
    state = algorithm.init(jax.random.key(0), *given.start(jax.random.key(1), 0.5))
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, None, given.frozen)
    assert 0 < int(info.labels) < 128


def test_a_best_response_from_labels_is_the_exact_one_on_an_enumerated_sample(x64):
    """With every pair listed it has the same tilted policies; policy-policy pairs, where it would not, are refused."""
    given = known.random_bandit(objective=COUPLED)
    upper, lower = given.start(jax.random.key(1), 0.5)

    def estimate(solver):
        algorithm = given.algorithm(bilevel.central(0.1), solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), upper, lower)
        return upper - jax.jit(algorithm.step)(jax.random.key(0), state, None, given.frozen)[0].upper

    np.testing.assert_allclose(estimate(given.solver_from_labels), estimate(given.solver), rtol=1e-10)
    with pytest.raises(ValueError, match="policy-reference pairs"):
        bandit.best_response(
            known.linear_reward, objectives.likelihood(), beta=0.5, against_reference=False, from_labels=True
        )


def test_a_central_step_from_labels_is_boltzmanns_in_the_mean(x64):
    """Tilts solved on the drawn labels: unbiased up to the leave-one-out correction of the baseline, 1 / pairs."""
    given = known.random_bandit(objective=COUPLED)
    upper, lower = given.start(jax.random.key(1), 0.5)
    truth = jax.jit(jax.grad(given.phi))(upper)
    algorithm = given.algorithm(bilevel.central(1e-2), given.solver_from_labels, optax.sgd(1.0), pairs=64)
    state = algorithm.init(jax.random.key(0), upper, lower)
    state = state._replace(lowers=jax.jit(algorithm.step)(jax.random.key(0), state, None, given.frozen)[0].lowers)

    def one(key):
        return upper - jax.jit(algorithm.step)(key, state, None, given.frozen)[0].upper

    estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 3000))
    error = estimates.std(axis=0) / np.sqrt(3000)
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - truth) < 5 * error + 0.05 * jnp.linalg.norm(truth))


def test_an_arm_alone_leaves_every_rule_finite():
    """Nothing to choose and nothing to answer: zero gradients, no division by them."""
    given = known.random_bandit(contexts=1, arms=1)
    for rule in (bilevel.central(bilevel.Balanced()), bilevel.implicit(), bilevel.zero_order()):
        algorithm = given.algorithm(rule, given.solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), *given.start(jax.random.key(1), 0.5))
        for _ in range(2):
            state, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, given.frozen)
        chex.assert_tree_all_finite((state.upper, state.lowers))


def test_a_pair_that_cannot_be_drawn_does_not_poison_a_listed_sample():
    """Far from the policy that sampled, weights of pairs of measure 0 overflow; they count for nothing."""
    given = known.hard_bandit()
    algorithm = given.algorithm(bilevel.central(0.1), given.solver, optax.sgd(1.0))
    state = algorithm.init(
        jax.random.key(0), jnp.array([3.0, -3.0, 0.0, 3.0]), given.best_response_at(jnp.array([0.0, 9.0, 0.0, -9.0]))
    )
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, given.frozen)
    chex.assert_tree_all_finite(after.upper)


@pytest.mark.slow
def test_double_precision_with_parameters_in_single(x64):
    given = known.random_bandit(objective=COUPLED)
    upper, lower = (leaf.astype(jnp.float32) for leaf in given.start(jax.random.key(1), 0.5))
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), given.frozen)
    for rule in (bilevel.central(bilevel.Balanced()), bilevel.forward(0.1)):
        for solver in (given.solver, bilevel.gradient(optax.sgd(0.1)), bilevel.tangent(optax.sgd(0.1), optax.sgd(0.1))):
            algorithm = given.algorithm(rule, solver, optax.sgd(1.0))
            state = algorithm.init(jax.random.key(0), upper, lower)
            after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, frozen)
            assert after.upper.dtype == after.lowers.dtype == jnp.float32


def test_counted_draws_are_counted_as_labels_and_one_draw_says_nothing_to_boltzmann():
    given = known.random_bandit(objective=COUPLED)
    algorithm = given.algorithm(bilevel.boltzmann(), given.solver_from_labels, optax.sgd(1.0), counts=True)
    state = algorithm.init(jax.random.key(0), *given.start(jax.random.key(1), 0.5))
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, 1000, given.frozen)
    assert int(info.labels) == 2000
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, 1, given.frozen)
    assert int(info.labels) == 2 and float(info.coupling_share) == 0
