"""A learned scale of the reward, and mixtures of given scores, against exact answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxrlhf import bandit, bilevel, exact, known, mdp, objectives
from jaxrlhf.algorithms.replay import replayed
from jaxrlhf.base.problem import Labelled
from jaxrlhf.known.language import small_language_setting
from jaxrlhf.known.problem import annotator, descend
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.language import STOP, listed_pairs
from jaxrlhf.lm.problem import language_problem
from jaxrlhf.preferences.mixture import MixtureReward, Scored, attach_scores, mixture_problem, without_scores
from jaxrlhf.preferences.scale import ScaledReward, learn_scale, marginal_price, scale_optimizer, scaled, with_scale

KAPPA, BETA = 0.03, 0.5
OBJECTIVE = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=KAPPA))
RULES = {
    "boltzmann": bilevel.boltzmann,
    "central": lambda: bilevel.central(0.01),
    "implicit": lambda: bilevel.implicit(iterations=20, damping=1e-6),
}


@functools.cache
def setting():
    """A bandit of 3 contexts and 5 arms, and reward parameters that do not hold the truth."""
    keys = jax.random.split(jax.random.key(3), 4)
    features = jax.random.normal(keys[0], (3, 5, 4))
    truth = jax.random.normal(keys[1], (4,))
    gold = features @ truth + jax.random.normal(keys[2], (3, 5))
    reference = jax.nn.log_softmax(jax.random.normal(keys[3], (3, 5)), axis=-1)
    return bandit.Bandit(features, gold, reference), 0.2 * truth + jnp.array([0.1, -0.1, 0.0, 0.1])


def algorithm(rule, reward, problem, upper_optimizer, score=bandit.gold_score):
    solver = bandit.best_response(reward, OBJECTIVE, beta=BETA)
    annotate = annotator(score, labels=1, pairs=None)
    return descend(problem, rule, solver, upper_optimizer, beta=BETA, annotate=annotate)


def scaled_bandit(rule, upper_optimizer):
    problem = learn_scale(bandit.bandit_problem(known.linear_reward, OBJECTIVE), beta=BETA)
    return algorithm(rule, scaled(known.linear_reward), problem, upper_optimizer)


def utility_along_ray(rewards, frozen, log_scale, kappa=KAPPA):
    """E[win] - kappa KL of the best response to exp(log_scale) rewards, exact."""
    policy = exact.soft_policy(jnp.exp(log_scale) * rewards, frozen.reference, BETA)
    result = exact.evaluate_policy(policy, frozen.reference, frozen.gold, BETA)
    return result.win_rate - kappa * result.kl


def gradient_of(make, frozen, start):
    """One exact step's gradient at the best response, and its diagnostics."""
    steps = make(optax.sgd(1.0))
    step = jax.jit(steps.step)
    state = jax.jit(steps.init)(jax.random.key(0), start, frozen.reference)
    solved = step(jax.random.key(0), state, None, frozen)[0].lowers
    after, info = step(jax.random.key(0), state._replace(lowers=solved), None, frozen)
    return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), start, after.upper), info


@pytest.mark.parametrize("rule, tolerance", [("boltzmann", 1e-10), ("implicit", 2e-2), ("central", 1e-4)])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_the_gradient_is_that_of_the_closed_form(rule, tolerance, scale, x64):
    frozen, reward = setting()
    start = with_scale(reward, scale)

    def phi(upper):
        rewards = known.linear_reward(upper.reward, frozen.features)
        # The fit sees the reward without its scale, on the pairs of a policy that is held fixed.
        policy = exact.soft_policy(jnp.exp(upper.log_scale) * rewards, frozen.reference, BETA)
        fit = exact.expected_cost(
            OBJECTIVE, jax.lax.stop_gradient(policy), frozen.reference, rewards, frozen.gold, against_reference=True
        ).uncoupled
        return fit - utility_along_ray(rewards, frozen, upper.log_scale)

    truth = jax.jit(jax.grad(phi))(start)
    gradient, info = gradient_of(functools.partial(scaled_bandit, RULES[rule]()), frozen, start)
    np.testing.assert_allclose(gradient.log_scale, truth.log_scale, rtol=tolerance, atol=tolerance * 1e-2)
    np.testing.assert_allclose(gradient.reward, truth.reward, rtol=tolerance, atol=tolerance)
    # The reported slopes are the same derivative, whatever the rule.
    np.testing.assert_allclose(info.coupled_slope + KAPPA * info.kl_slope, truth.log_scale, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_fixed_point_maximises_the_utility_along_the_ray(scale, x64):
    frozen, reward = setting()
    rewards = known.linear_reward(reward, frozen.features)
    best = scipy.optimize.minimize_scalar(
        jax.jit(lambda a: -utility_along_ray(rewards, frozen, a)), bounds=(-4, 4), options={"xatol": 1e-12}
    ).x
    # The reward stays: only the scale is learned. Rates fall from 0.2 to 1e-9.
    upper_optimizer = scale_optimizer(optax.sgd(0.0), optax.adam(optax.exponential_decay(0.2, 20, 0.74)))
    method = scaled_bandit(bilevel.boltzmann(), upper_optimizer)
    state = jax.jit(method.init)(jax.random.key(0), with_scale(reward, scale), frozen.reference)

    def step(state, key):
        return method.step(key, state, None, frozen)

    state, infos = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 1000)))(state)
    np.testing.assert_allclose(state.upper.log_scale, best, atol=1e-6)
    price = marginal_price(*(np.asarray(slopes)[-1] for slopes in (infos.coupled_slope, infos.kl_slope)))
    np.testing.assert_allclose(price, KAPPA, rtol=1e-5)
    assert np.exp(best) > 1.5  # beta is not what the price asks for, so that there is something to learn


def test_the_fit_does_not_move_the_scale(x64):
    """Without coupling the scale stays, and the reward's gradient is the plain problem's under the same policy."""
    frozen, reward = setting()
    gradient, _ = gradient_of(functools.partial(scaled_bandit, bilevel.decoupled()), frozen, with_scale(reward, 3.0))
    assert abs(float(gradient.log_scale)) < 1e-14

    def plain(upper_optimizer):
        problem = bandit.bandit_problem(known.linear_reward, OBJECTIVE)
        # The policy of the scaled reward: the same one at a third of beta.
        return algorithm(bilevel.decoupled(), lambda u, f: 3.0 * known.linear_reward(u, f), problem, upper_optimizer)

    np.testing.assert_allclose(gradient.reward, gradient_of(plain, frozen, reward)[0], rtol=1e-10)


def test_the_marginal_price_is_the_exact_derivative_of_wins_by_kl(x64):
    frozen, reward = setting()
    _, info = gradient_of(functools.partial(scaled_bandit, bilevel.boltzmann()), frozen, with_scale(reward, 2.0))
    rewards = known.linear_reward(reward, frozen.features)

    def evaluate(a):
        policy = exact.soft_policy(jnp.exp(a) * rewards, frozen.reference, BETA)
        result = exact.evaluate_policy(policy, frozen.reference, frozen.gold, BETA)
        return jnp.stack([result.win_rate, result.kl])

    win, kl = np.asarray(jax.jit(jax.jacfwd(evaluate))(jnp.log(2.0)))
    np.testing.assert_allclose(marginal_price(info.coupled_slope, info.kl_slope), win / kl, rtol=1e-10)


def test_the_gradient_is_unbiased_on_drawn_pairs(x64):
    """The mean over many draws of 4 pairs is within 4 standard errors of the exact gradient in the scale."""
    frozen, reward = setting()
    start = with_scale(reward, 1.0)
    exact_gradient, _ = gradient_of(functools.partial(scaled_bandit, bilevel.boltzmann()), frozen, start)
    problem = learn_scale(bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=4), beta=BETA)
    method = bilevel.bilevel_descent(
        problem, bilevel.boltzmann(), bandit.best_response(scaled(known.linear_reward), OBJECTIVE, beta=BETA),
        optax.sgd(1.0), beta=BETA, annotate=annotator(bandit.gold_score, labels=1, pairs=4),
    )  # fmt: skip
    policy = exact.soft_policy(known.linear_reward(reward, frozen.features), frozen.reference, BETA)
    state = jax.jit(method.init)(jax.random.key(0), start, policy)

    def one(key):
        return start.log_scale - method.step(key, state, None, frozen)[0].upper.log_scale

    drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), 4000)))
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(float(np.mean(drawn) - exact_gradient.log_scale)) < 4 * float(error)
    assert float(error) < 0.2 * abs(float(exact_gradient.log_scale))


def table_problem(setting):
    """The language with its transformer reward, and a policy that is a table `[B, N]` over completions."""
    inner = language_problem(
        setting.policy,
        setting.reward,
        setting.objective,
        pairs=1,
        generation=Generation(max_new_tokens=2, stop_ids=(STOP,)),
    )
    listed = listed_pairs(setting.policy, setting.language, against="reference")(
        jax.random.key(0), setting.frozen.reference, setting.language.prompts, setting.frozen
    )
    count = setting.reference.shape[1]
    first = jnp.repeat(jnp.arange(count), count)

    def log_prob(lower, sample, frozen):
        chosen = jax.nn.log_softmax(lower, axis=-1)[:, first]
        return jnp.stack([chosen, jnp.zeros_like(chosen)], axis=-1)[..., None]

    def sample(key, lower, data, frozen):
        behaviour = listed.behaviour_log_prob.at[:, :, 0].set(log_prob(lower, listed, frozen)[:, :, 0])
        return listed._replace(
            behaviour_log_prob=behaviour, measure=jnp.exp(jnp.sum(behaviour, axis=(2, 3))) / len(behaviour)
        )

    return inner._replace(sample=sample, log_prob=log_prob)


def test_on_an_enumerable_language_the_scale_ends_at_the_best_price(x64):
    """A transformer's reward, fixed: from a tenth and from ten times its scale, exact expectations."""
    kappa = 0.15  # at a lower price the best policy is nearly deterministic, and ten times its scale a plateau
    objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=kappa))
    setting = small_language_setting(objective=objective, beta=BETA)
    upper, _ = setting.start(jax.random.key(1), 1.0)
    # The random trunk's best head for the gold reward, so that a larger scale wins more, up to a point.
    states = jax.jit(jax.jacobian(lambda head: setting.rewards(upper | {"head": head})))(upper["head"])
    states, gold = (leaf - np.mean(leaf, axis=1, keepdims=True) for leaf in map(np.asarray, (states, setting.gold)))
    head = np.linalg.lstsq(states.reshape(-1, states.shape[-1])[:, :4], gold.ravel())[0]
    upper |= {"head": jnp.asarray(np.pad(head, (0, states.shape[-1] - 4)))}
    rewards = jax.jit(setting.rewards)(upper)
    frozen = bandit.Bandit(jnp.zeros((1, 1, 1)), setting.gold, setting.reference)
    best = scipy.optimize.minimize_scalar(
        jax.jit(lambda a: -utility_along_ray(rewards, frozen, a, kappa)), bounds=(-4, 6), options={"xatol": 1e-12}
    ).x
    solver = bilevel.closed_form(
        lambda task, index: (
            setting.reference + jnp.exp(task.upper.log_scale) * setting.rewards(task.upper.reward) / BETA
        )
    )
    optimizer = scale_optimizer(optax.sgd(0.0), optax.chain(optax.scale(-12.0), optax.clip(0.5)))
    method = bilevel.bilevel_descent(
        learn_scale(table_problem(setting), beta=BETA), bilevel.boltzmann(), solver, optimizer, beta=BETA,
        annotate=annotator(setting.gold_score, labels=1, pairs=None),
    )  # fmt: skip

    def step(state, key):
        return method.step(key, state, None, setting.frozen)[0], None

    init = jax.jit(method.init)
    descend_from = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 80))[0])
    for scale in (0.1, 10.0):
        start = with_scale(upper, scale * float(jnp.exp(best)))
        state = descend_from(init(jax.random.key(0), start, setting.reference))
        np.testing.assert_allclose(state.upper.log_scale, best, atol=1e-6)


@pytest.mark.parametrize("rule", ["central", "implicit"])
def test_on_a_decision_process_the_gradient_is_that_of_phi(rule, x64):
    """Several steps, random transitions, all trajectories listed; a linear reward's scale is that of its weights."""
    objective = objectives.utility(kl_price=KAPPA)
    instance = known.random_mdp(objective=objective, beta=BETA)
    upper, lower = instance.start(jax.random.key(1), 0.7)

    def linear(upper, features):
        return features @ upper

    problem = learn_scale(mdp.episode_problem(linear, objective), beta=BETA)
    method = bilevel.bilevel_descent(
        problem, RULES[rule](), mdp.best_response(scaled(linear), objective, beta=BETA), optax.sgd(1.0), beta=BETA,
        annotate=annotator(mdp.gold_score, labels=1, pairs=None),
    )  # fmt: skip
    start = with_scale(upper, 1.5)
    state, step = jax.jit(method.init)(jax.random.key(0), start, lower), jax.jit(method.step)
    state = state._replace(lowers=step(jax.random.key(0), state, None, instance.frozen)[0].lowers)
    after, _ = step(jax.random.key(0), state, None, instance.frozen)
    truth = jax.jit(jax.grad(lambda log_scale: instance.phi(jnp.exp(log_scale) * upper)))(start.log_scale)
    np.testing.assert_allclose(start.log_scale - after.upper.log_scale, truth, rtol=2e-3)


@pytest.mark.parametrize("sampling", ["independent", "common"])
def test_a_sample_for_each_tilt_learns_the_scale_too(sampling, x64):
    frozen, reward = setting()
    start = with_scale(reward, 2.0)
    truth, _ = gradient_of(functools.partial(scaled_bandit, bilevel.boltzmann()), frozen, start)
    rule = bilevel.central(0.3, sampling=sampling)
    gradient, _ = gradient_of(functools.partial(scaled_bandit, rule), frozen, start)
    np.testing.assert_allclose(gradient.log_scale, truth.log_scale, rtol=0.05)


def test_old_pairs_learn_the_scale_too(x64):
    """From a buffer: every update is finite and moves the scale, and the state keeps its structure."""
    frozen, reward = setting()
    problem = learn_scale(bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=4), beta=BETA)
    solver = bilevel.tangent(optax.adam(0.05), optax.set_to_zero())
    descent = bilevel.bilevel_descent(
        problem, bilevel.boltzmann(), solver, scale_optimizer(optax.adam(0.02), optax.adam(0.05)), beta=BETA
    )
    annotate = annotator(bandit.gold_score, labels=1, pairs=4)
    shapes = jax.eval_shape(lambda: problem.sample(jax.random.key(0), frozen.reference, None, frozen))
    method = replayed(descent, shapes, capacity=30, size=3, updates=2, annotate=annotate)
    state = jax.jit(method.init)(jax.random.key(0), with_scale(reward), frozen.reference)
    step = jax.jit(method.step)
    for key in jax.random.split(jax.random.key(1), 5):
        state, info = step(key, state, None, frozen)
    assert np.isfinite(state.upper.log_scale) and abs(float(state.upper.log_scale)) > 0.01
    assert np.isfinite(info.fresh.kl_slope)


def test_mixtures_need_their_scores(x64):
    problem = mixture_problem(bandit.bandit_problem(known.linear_reward, OBJECTIVE, pairs=2))
    frozen, _ = setting()
    sample = problem.sample(jax.random.key(0), frozen.reference, None, frozen)
    with pytest.raises(ValueError, match="attach_scores"):
        problem.reward(MixtureReward(jnp.ones(2)), sample, frozen)
    labelled = attach_scores(Labelled(sample, jnp.ones((3, 2, 1))), jnp.ones((3, 2, 2, 2)))
    np.testing.assert_allclose(problem.reward(MixtureReward(jnp.array([1.0, 2.0])), labelled.sample, frozen), 3.0)


@pytest.mark.parametrize("with_network", [False, True])
def test_a_mixture_is_the_linear_reward_of_its_scores(with_network, x64):
    """Hypergradient, diagnostics and next policies equal those of the problem that has the scores as features."""
    frozen, reward = setting()

    def scores(sample, frozen):
        index = sample.prompts[:, None, None]
        assert not isinstance(sample.responses, Scored)
        return frozen.features[index, sample.responses]

    inner = bandit.bandit_problem(known.linear_reward, OBJECTIVE)
    problem = mixture_problem(inner, scores, with_network=with_network)

    def table_of(upper, features):
        rewards = known.linear_reward(upper.weights, features)
        return rewards + known.linear_reward(upper.network, features) if with_network else rewards

    start = MixtureReward(0.25 * reward, 0.75 * reward) if with_network else MixtureReward(reward)
    mixed, info = gradient_of(
        functools.partial(algorithm, bilevel.boltzmann(), table_of, problem, score=without_scores(bandit.gold_score)),
        frozen,
        start,
    )
    plain, expected = gradient_of(
        functools.partial(algorithm, bilevel.boltzmann(), known.linear_reward, inner), frozen, reward
    )
    np.testing.assert_allclose(mixed.weights, plain, rtol=1e-10)
    if with_network:
        np.testing.assert_allclose(mixed.network, plain, rtol=1e-10)
    for name in ("upper_loss", "kl", "coupled_slope", "kl_slope", "hypergradient_norm"):
        if name != "hypergradient_norm" or not with_network:
            np.testing.assert_allclose(getattr(info, name), getattr(expected, name), rtol=1e-9, err_msg=name)


def test_each_part_has_its_own_optimiser():
    optimizer = scale_optimizer(optax.sgd(1.0), optax.adam(0.5))
    upper = ScaledReward({"head": jnp.ones(2)}, jnp.zeros(()))
    updates, _ = optimizer.update(
        ScaledReward({"head": jnp.full(2, 3.0)}, jnp.full((), 1e-3)), optimizer.init(upper), upper
    )
    np.testing.assert_allclose(updates.reward["head"], -3.0)
    np.testing.assert_allclose(updates.log_scale, -0.5, rtol=1e-3)
    with pytest.raises(ValueError, match="positive"):
        with_scale(upper, 0.0)
