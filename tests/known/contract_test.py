"""One suite of checks for every estimator on every problem with a known solution."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
# By default every rule on one problem and one rule on every problem; all other combinations are marked slow.
QUICK = [(problem, rule) for problem, rule in PAIRS if problem == "bandit" or rule == "central"]
SLOW_PAIRS = [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in QUICK]


@functools.cache
def instance_and_gradient(problem, x64):
    """One instance and one compiled Phi with its gradient for all rules in the same precision."""
    assert jax.config.jax_enable_x64 == x64
    instance = PROBLEMS[problem]()
    return instance, jax.jit(jax.value_and_grad(instance.phi))


def make(problem, rule, *, solver=None, pairs=None):
    instance, _ = instance_and_gradient(problem, jax.config.jax_enable_x64)
    solver = solver or (
        instance.solver if instance.exact_solver else bilevel.gradient(bilevel.shared_adam(0.02), steps=2)
    )
    # At its small beta larger rewards make the hard bandit's policy deterministic: a plateau on which all draws are alike.
    rate, scale = (0.01, 0.05) if problem == "hard bandit" else (1.0, 0.5)
    algorithm = instance.algorithm(RULES[rule](), solver, optax.sgd(rate), pairs=pairs)
    start = jax.jit(lambda key: algorithm.init(jax.random.key(0), *instance.start(key, scale)))
    return instance, algorithm, start(jax.random.key(1))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("problem, rule", QUICK + SLOW_PAIRS)
def test_contract(problem, rule):
    """Shapes, dtypes, finiteness, determinism, one trace, a nonzero coupling; on drawn samples where possible."""
    chex.clear_trace_counter()
    instance, algorithm, state = make(
        problem, rule, pairs=None if problem == "quadratic" else 64 if problem == "hard bandit" else 4
    )
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1))
    first, info = step(jax.random.key(2), state, instance.data, instance.frozen)
    again, _ = step(jax.random.key(2), state, instance.data, instance.frozen)
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
    second, info = step(jax.random.key(3), first, instance.data, instance.frozen)
    chex.assert_tree_all_finite((second.upper, second.lowers))
    for name, value in info._asdict().items():
        assert value.shape == (), name
    assert float(info.coupling_fraction) > 1e-6
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
    instance, algorithm, state = make(problem, rule)
    # One step first, so that the sample comes from the best response to this reward.
    solved = jax.jit(algorithm.step)(jax.random.key(0), state, instance.data, instance.frozen)[0].lowers
    state = state._replace(lowers=solved)
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, instance.data, instance.frozen)
    estimate = flat(state.upper) - flat(after.upper)
    _, value_and_gradient = instance_and_gradient(problem, True)
    truth = flat(value_and_gradient(state.upper)[1])
    if rule == "zero_order":
        update_key = jax.random.split(jax.random.key(0), 3)[2]
        along = flat(optax.tree.random_like(jax.random.split(update_key)[1], state.upper, jax.random.normal))
        np.testing.assert_allclose(estimate, (truth @ along) * along, rtol=1e-2, atol=1e-6)
        return
    assert np.linalg.norm(estimate - truth) < TOLERANCE[rule] * np.linalg.norm(truth)


def test_float32_is_accurate_at_a_sigma_of_1e_4():
    """With exact lower policies and a shared sample the weights lose no precision: the error stays below 1%."""
    instance = known.random_bandit(objective=COUPLED)
    upper, lower = instance.start(jax.random.key(1), 0.5)
    truth = jax.jit(jax.grad(instance.phi))(upper)
    # Sigma is read from the step number: one compilation serves all.
    rule = bilevel.central(lambda step: jnp.array([1e-2, 1e-3, 1e-4])[step])
    algorithm = instance.algorithm(rule, instance.solver, optax.sgd(1.0))
    step = jax.jit(algorithm.step)
    for index in range(3):
        state = algorithm.init(jax.random.key(0), upper, lower)._replace(step=jnp.asarray(index, jnp.int32))
        state = state._replace(lowers=step(jax.random.key(0), state, None, instance.frozen)[0].lowers)
        assert state.lowers.dtype == jnp.float32
        after, _ = step(jax.random.key(0), state, None, instance.frozen)
        assert jnp.linalg.norm(state.upper - after.upper - truth) < 0.01 * jnp.linalg.norm(truth)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_exact_values_are_consistent(problem):
    """The gradient of Phi against a finite difference; no policy has a higher gold value than the best one."""
    instance, value_and_gradient = instance_and_gradient(problem, False)
    upper, lower = jax.jit(lambda key: instance.start(key, 0.7))(jax.random.key(4))
    direction = jax.tree.map(np.asarray, optax.tree.random_like(jax.random.key(5), upper, jax.random.normal))
    value, gradient = value_and_gradient(upper)
    derivative = flat(gradient) @ flat(direction)
    step = 1e-2

    def moved(size):
        there = jax.tree.map(lambda leaf, along: (leaf + size * along).astype(leaf.dtype), upper, direction)
        return np.asarray(value_and_gradient(there)[0])

    @jax.jit
    def gold_values(upper, lower):
        return instance.gold_value_of_best_response(upper), instance.gold_value(lower)

    numeric = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
    np.testing.assert_allclose(numeric, derivative, rtol=5e-3, atol=2e-4)
    assert all(float(each) <= instance.best_gold_value + 1e-5 for each in gold_values(upper, lower))
    if instance.optimum is not None:
        assert float(value) >= instance.optimum - 1e-6


def test_the_closed_form_optimum_is_reached(x64):
    instance = known.random_bandit()
    optimizer = optax.adam(0.05)
    upper, _ = instance.start(jax.random.key(0), 0.5)

    def step(carry, _):
        upper, state = carry
        move, state = optimizer.update(jax.grad(instance.phi)(upper), state, upper)
        return (optax.apply_updates(upper, move), state), None

    (upper, _), _ = jax.lax.scan(step, (upper, optimizer.init(upper)), None, length=2000)
    np.testing.assert_allclose(instance.phi(upper), instance.optimum, atol=1e-6)


def test_a_known_network_bandit_needs_a_known_kind():
    with pytest.raises(ValueError, match="none, reward or both"):
        known.random_bandit(network="wide")


def test_sigma_follows_the_inner_error():
    """Few inner steps leave a large error and so a large sigma; an exact solver brings it to the smallest."""
    instance = known.random_bandit(objective=COUPLED)
    rule = bilevel.central(bilevel.Balanced(smallest=1e-3, largest=0.5))

    def final(solver):
        algorithm = instance.algorithm(rule, solver, optax.sgd(0.1))
        state = algorithm.init(jax.random.key(0), *instance.start(jax.random.key(1), 0.5))
        for _ in range(3):
            state, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, instance.frozen)
        return float(rule.relative_sigma.best(state.inner_error))

    rough, better = (final(bilevel.gradient(optax.sgd(1.0), steps=steps)) for steps in (1, 400))
    assert final(instance.solver) < better < rough <= 0.5
    with pytest.raises(ValueError, match="smallest"):
        bilevel.central(bilevel.Balanced(smallest=0.0))


def test_the_theorem_gives_the_sample_sizes():
    schedule = bilevel.theorem(0.01, outer_steps=2.0)
    assert schedule.outer_steps == 2000 and schedule.batch == 10_000
    np.testing.assert_allclose(schedule.relative_sigma, 0.1)
    coarse, fine = (bilevel.theorem(epsilon) for epsilon in (1e-1, 1e-3))
    samples = fine.outer_steps * fine.batch / (coarse.outer_steps * coarse.batch)
    np.testing.assert_allclose(np.log10(samples) / 2, 3.5, atol=0.02)
    with pytest.raises(ValueError, match="epsilon"):
        bilevel.theorem(1.5)


def test_the_choice_of_the_annotator_reaches_the_algorithm():
    instance = known.random_bandit()
    algorithm = instance.algorithm(
        bilevel.central(0.1), instance.solver, optax.sgd(1.0), pairs=64, choice=preferences.Choice(skip_below=0.5)
    )
    state = algorithm.init(jax.random.key(0), *instance.start(jax.random.key(1), 0.5))
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, None, instance.frozen)
    assert 0 < int(info.labels) < 128


def test_a_best_response_from_labels_is_the_exact_one_on_an_enumerated_sample(x64):
    """With every pair listed both give the same tilted policies; policy-policy pairs, where they differ, are refused."""
    instance = known.random_bandit(objective=COUPLED)
    upper, lower = instance.start(jax.random.key(1), 0.5)

    def estimate(solver):
        algorithm = instance.algorithm(bilevel.central(0.1), solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), upper, lower)
        return upper - jax.jit(algorithm.step)(jax.random.key(0), state, None, instance.frozen)[0].upper

    np.testing.assert_allclose(estimate(instance.solver_from_labels), estimate(instance.solver), rtol=1e-10)
    with pytest.raises(ValueError, match="policy-reference pairs"):
        bandit.best_response(
            known.linear_reward, objectives.likelihood(), beta=0.5, against_reference=False, from_labels=True
        )


def test_a_central_step_from_labels_is_boltzmanns_in_the_mean(x64):
    """With tilts solved on the drawn labels it is unbiased up to the baseline's leave-one-out correction, 1 / pairs."""
    instance = known.random_bandit(objective=COUPLED)
    upper, lower = instance.start(jax.random.key(1), 0.5)
    truth = jax.jit(jax.grad(instance.phi))(upper)
    algorithm = instance.algorithm(bilevel.central(1e-2), instance.solver_from_labels, optax.sgd(1.0), pairs=64)
    state = algorithm.init(jax.random.key(0), upper, lower)
    state = state._replace(lowers=jax.jit(algorithm.step)(jax.random.key(0), state, None, instance.frozen)[0].lowers)

    def one(key):
        return upper - jax.jit(algorithm.step)(key, state, None, instance.frozen)[0].upper

    estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 3000))
    error = estimates.std(axis=0) / np.sqrt(3000)
    assert jnp.all(jnp.abs(estimates.mean(axis=0) - truth) < 5 * error + 0.05 * jnp.linalg.norm(truth))


def test_a_single_arm_leaves_every_rule_finite():
    """There is nothing to choose: gradients are zero, and nothing divides by them."""
    instance = known.random_bandit(contexts=1, arms=1)
    for rule in (bilevel.central(bilevel.Balanced()), bilevel.implicit(), bilevel.zero_order()):
        algorithm = instance.algorithm(rule, instance.solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), *instance.start(jax.random.key(1), 0.5))
        for _ in range(2):
            state, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, instance.frozen)
        chex.assert_tree_all_finite((state.upper, state.lowers))


def test_a_pair_that_cannot_be_drawn_does_not_poison_a_listed_sample():
    """Far from the sampling policy the weights of pairs of measure 0 overflow; they must not enter the estimate."""
    instance = known.hard_bandit()
    algorithm = instance.algorithm(bilevel.central(0.1), instance.solver, optax.sgd(1.0))
    state = algorithm.init(
        jax.random.key(0), jnp.array([3.0, -3.0, 0.0, 3.0]), instance.best_response_at(jnp.array([0.0, 9.0, 0.0, -9.0]))
    )
    after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, instance.frozen)
    chex.assert_tree_all_finite(after.upper)


@pytest.mark.slow
def test_double_precision_with_parameters_in_single(x64):
    instance = known.random_bandit(objective=COUPLED)
    upper, lower = (leaf.astype(jnp.float32) for leaf in instance.start(jax.random.key(1), 0.5))
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), instance.frozen)
    for rule in (bilevel.central(bilevel.Balanced()), bilevel.forward(0.1)):
        for solver in (
            instance.solver,
            bilevel.gradient(optax.sgd(0.1)),
            bilevel.tangent(optax.sgd(0.1), optax.sgd(0.1)),
        ):
            algorithm = instance.algorithm(rule, solver, optax.sgd(1.0))
            state = algorithm.init(jax.random.key(0), upper, lower)
            after, _ = jax.jit(algorithm.step)(jax.random.key(0), state, None, frozen)
            assert after.upper.dtype == after.lowers.dtype == jnp.float32


def test_counted_draws_count_as_labels_and_boltzmann_learns_nothing_from_one_draw():
    instance = known.random_bandit(objective=COUPLED)
    algorithm = instance.algorithm(bilevel.boltzmann(), instance.solver_from_labels, optax.sgd(1.0), counts=True)
    state = algorithm.init(jax.random.key(0), *instance.start(jax.random.key(1), 0.5))
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, 1000, instance.frozen)
    assert int(info.labels) == 2000
    _, info = jax.jit(algorithm.step)(jax.random.key(2), state, 1, instance.frozen)
    assert int(info.labels) == 2 and float(info.coupling_fraction) == 0
