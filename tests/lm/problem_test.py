"""The language problem and the enumerable language: the sampler, the trainer and the tables agree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import bilevel, exact, objectives, preferences
from jaxrlhf.lm import language as words
from jaxrlhf.lm import microbatch
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen, RolloutModel, language_problem
from jaxrlhf.lm.reward import reward_model, score_responses
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder

BETA = 0.5
OBJECTIVE = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=BETA / 4))
LANGUAGE = words.alphabet_language(letters=3, length=2, prompts=2, prompt_length=2)
SHAPE = DecoderConfig(
    vocabulary_size=4, width=16, layers=1, query_heads=2, key_value_heads=1, head_size=8, mlp_width=16, context_length=6
)
POLICY = decoder(SHAPE)
REWARD = reward_model(POLICY)


def parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    reward = REWARD.init(keys[2]) | {"head": jax.random.normal(keys[3], (16,))}
    return POLICY.init(keys[0]), POLICY.init(keys[1]), reward


@jax.jit
def table_of_policy(params):
    return words.policy_table(POLICY, params, LANGUAGE)


def make(pairs=4, objective=OBJECTIVE, temperature=1.0, **keywords):
    generation = Generation(max_new_tokens=2, stop_ids=(words.STOP,), temperature=temperature)
    return language_problem(POLICY, REWARD, objective, pairs=pairs, generation=generation, **keywords)


def gold(sample, frozen):
    return words.alphabet_gold(sample.prompts, sample.responses, letters=3)


def test_the_language_lists_every_completion_once():
    tokens, mask = (np.asarray(leaf) for leaf in LANGUAGE.completions)
    assert len(tokens) == 1 + 3 + 9 == len({tuple(row) for row in tokens})
    assert not (mask[:, 1] & ~mask[:, 0]).any()
    assert words.alphabet_language().completions.tokens.shape == (2801, 4)
    policy, _, _ = parameters()
    table = table_of_policy(policy)
    np.testing.assert_allclose(jnp.sum(jnp.exp(table), axis=-1), 1.0, rtol=1e-5)


def test_gold_scores_computed_by_hand():
    prompts = Prompts(jnp.array([[1, 1]]), jnp.ones((1, 2), bool))
    responses = {"bcd": (2, 3, 4, 0), "bb": (2, 2, 0, 0), "": (0, 0, 0, 0), "aceg": (1, 3, 5, 7)}
    tokens = jnp.array([[list(row) for row in responses.values()]])[:, :, None]
    mask = jnp.array([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]], bool)[:, :, None]
    scores = words.alphabet_gold(prompts, Responses(tokens, mask))[0, :, 0]
    np.testing.assert_allclose(scores, [1.5 + 1.0 + 0.5, 1.5 - 1.0 + 0.5, 0.5, 1.5])


@pytest.mark.parametrize("against", ["reference", "policy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_trainer_agree(against, temperature):
    policy, reference, reward = parameters()
    problem = make(objective=objectives.likelihood(), against=against, temperature=temperature)
    frozen = LanguageFrozen(reference)
    sample = jax.jit(problem.sample)(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
    own = jax.jit(problem.log_prob)(policy, sample, frozen)
    slots = 1 if against == "reference" else 2
    np.testing.assert_allclose(own[:, :, :slots], sample.behaviour_log_prob[:, :, :slots], atol=1e-5)
    of_both = make(objective=objectives.likelihood(), against="policy", temperature=temperature)
    reference_log_prob = jax.jit(of_both.log_prob)(reference, sample, frozen)
    np.testing.assert_allclose(sample.reference_log_prob, reference_log_prob, atol=1e-5)
    assert sample.from_policy.tolist() == [1.0, 0.0 if against == "reference" else 1.0]
    assert jax.eval_shape(problem.reward, reward, sample, frozen).shape == (2, 4, 2, 1)


@pytest.mark.parametrize("against", ["reference", "self"])
def test_microbatches_change_nothing_but_memory(against):
    policy, reference, reward = parameters()
    solver, frozen, results = bilevel.tangent(optax.sgd(0.1), optax.sgd(0.1)), LanguageFrozen(reference), []
    for microbatches in (1, 4):
        problem = make(microbatches=microbatches, against=against)
        algorithm = bilevel.bilevel_descent(
            problem, bilevel.central(0.2), solver, optax.sgd(0.1), beta=BETA, annotate=preferences.gold_annotator(gold)
        )
        state = algorithm.init(jax.random.key(3), reward, policy)
        for number in range(2):
            state, info = jax.jit(algorithm.step)(jax.random.key(number), state, LANGUAGE.prompts, frozen)
        results.append((state, info))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="8 rows do not divide into 3 microbatches"):
        jax.eval_shape(make(microbatches=3).sample, jax.random.key(0), policy, LANGUAGE.prompts, frozen)


@pytest.mark.parametrize("rollout", [False, True])
def test_responses_of_the_reference_stand_beside_the_pairs_and_change_nothing_in_them(rollout):
    policy, reference, reward = parameters()
    half = decoder(SHAPE, dtype=jnp.bfloat16)
    keywords = {"against": "self", "microbatches": 4}
    if rollout:
        keywords["rollout"] = RolloutModel(
            half, lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        )
    arguments = (jax.random.key(1), policy, LANGUAGE.prompts, LanguageFrozen(reference))
    plain = jax.jit(make(**keywords).sample)(*arguments)
    problem = make(**keywords, reference_responses=3)
    draw = jax.jit(problem.sample)
    sample = draw(*arguments)
    chex.assert_trees_all_equal(sample._replace(reference_responses=()), plain)
    assert plain.reference_responses == () and make().reference_returns is None
    tokens = sample.reference_responses.tokens
    assert tokens.shape == (2, 3, 2)
    # 4 microbatches do not divide the 6 rows; as many as do are used.
    found = jax.jit(problem.reference_returns)(reward, sample, LanguageFrozen(reference))
    alone = Responses(*(leaf[:, :, None] for leaf in sample.reference_responses))
    np.testing.assert_allclose(
        found, score_responses(REWARD, reward, sample.prompts, alone)[..., 0], rtol=1e-5, atol=1e-6
    )
    other = draw(jax.random.key(2), *arguments[1:])
    assert not np.array_equal(tokens, other.reference_responses.tokens)


def test_responses_of_the_reference_follow_the_reference():
    policy, reference, _ = parameters()
    problem = make(pairs=1, against="self", reference_responses=4000)
    sample = jax.jit(problem.sample)(jax.random.key(3), policy, LANGUAGE.prompts, LanguageFrozen(reference))
    first = np.asarray(sample.reference_responses.tokens)[..., 0]
    share = np.stack([(first == token).mean(axis=1) for token in range(4)], axis=1)
    rows, _ = LANGUAGE.completions
    table = np.exp(np.asarray(table_of_policy(reference)))
    expected = np.stack([table[:, np.asarray(rows)[:, 0] == token].sum(axis=1) for token in range(4)], axis=1)
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(4000))


def test_microbatches_hold_the_activations_of_one_at_a_time(monkeypatch):
    # By default all rows at once, as on an accelerator.
    monkeypatch.setattr(microbatch, "CPU_TOKENS", 2**20)
    policy, reference, _ = parameters()
    frozen, rows = LanguageFrozen(reference), jax.tree.map(lambda leaf: jnp.repeat(leaf, 64, axis=0), LANGUAGE.prompts)
    sizes = []
    for microbatches in (1, 16):
        problem = make(pairs=8, microbatches=microbatches)
        sample = jax.eval_shape(problem.sample, jax.random.key(0), policy, rows, frozen)
        gradient = jax.jit(
            jax.grad(lambda lower, sample, problem=problem: problem.log_prob(lower, sample, frozen).sum())
        )
        sizes.append(gradient.lower(policy, sample).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.25 * sizes[0], sizes


def test_rollouts_in_half_precision_leave_the_ratios_exact(x64):
    """In double precision, which tells a wrong ratio from the rounding of two programs."""
    policy, reference, _ = optax.tree.cast(parameters(), jnp.float64)
    frozen = LanguageFrozen(reference)
    drawn = {}
    for dtype in (jnp.float64, jnp.bfloat16):
        rollout = RolloutModel(decoder(SHAPE, dtype=dtype), lambda params, dtype=dtype: optax.tree.cast(params, dtype))
        problem = make(pairs=64, rollout=rollout)
        drawn[dtype] = jax.jit(problem.sample)(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
        own = jax.jit(problem.log_prob)(policy, drawn[dtype], frozen)
        np.testing.assert_allclose(own[:, :, 0], drawn[dtype].behaviour_log_prob[:, :, 0], atol=1e-12)
    problem = make(pairs=64)
    sample, log_prob = jax.jit(problem.sample), jax.jit(problem.log_prob)
    plain = sample(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
    chex.assert_trees_all_close(drawn[jnp.float64], plain, atol=1e-12)
    # In half precision some tokens differ, and the rollout model's own log-probabilities are imprecise.
    assert np.any(np.asarray(drawn[jnp.bfloat16].responses.tokens != plain.responses.tokens))
    coarse = sample(jax.random.key(1), optax.tree.cast(policy, jnp.bfloat16), LANGUAGE.prompts, frozen)
    precise = log_prob(policy, coarse, frozen)
    assert float(jnp.max(jnp.abs(coarse.behaviour_log_prob - precise)[:, :, 0])) > 1e-3


def test_samples_follow_the_table():
    policy, reference, _ = parameters()
    problem = make(pairs=4000, objective=objectives.likelihood())
    sample = jax.jit(problem.sample)(jax.random.key(2), policy, LANGUAGE.prompts, LanguageFrozen(reference))
    table = np.exp(table_of_policy(policy))
    index = {tuple(row): number for number, row in enumerate(np.asarray(LANGUAGE.completions.tokens).tolist())}
    for prompt in range(2):
        drawn = [index[tuple(row)] for row in np.asarray(sample.responses.tokens[prompt, :, 0]).tolist()]
        counts = np.bincount(drawn, minlength=len(index))
        expected = 4000 * table[prompt]
        statistic = np.sum((counts - expected) ** 2 / expected)
        assert statistic < 12 + 5 * np.sqrt(24)  # chi-square with 12 degrees of freedom, five standard deviations


@jax.jit
def enumerated(policy, reference):
    """Returns the sample that `problem.sample` draws from: every pair with its probability."""
    own, other = (table_of_policy(params) for params in (policy, reference))
    size = own.shape[1]
    first, second = (axis.ravel() for axis in np.indices((size, size)))
    pick = np.stack([first, second], axis=-1)
    responses = Responses(
        *(jnp.broadcast_to(leaf[pick][None], (2, *leaf[pick].shape)) for leaf in LANGUAGE.completions)
    )
    behaviour = jnp.stack([own[:, first], other[:, second]], axis=-1)[..., None]
    return bilevel.Sample(
        prompts=LANGUAGE.prompts,
        responses=responses,
        behaviour_log_prob=behaviour,
        reference_log_prob=other[:, pick][..., None],
        cumulative_discount=jnp.ones_like(behaviour),
        measure=jnp.exp(jnp.sum(behaviour, axis=(-2, -1))) / 2,
        from_policy=jnp.array([1.0, 0.0]),
        num_draws=jnp.asarray(jnp.inf),
    )


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(bilevel.central(0.3), id="central"),
        pytest.param(bilevel.boltzmann(), id="boltzmann", marks=pytest.mark.slow),
    ],
)
def test_drawn_completions_estimate_the_enumerated_hypergradient(rule):
    """With transformers, sampler and drawn labels, within 5 standard errors of enumeration, at fixed policies."""
    policy, reference, reward = parameters()
    frozen = LanguageFrozen(reference)
    no_op = bilevel.LowerSolver(
        lambda lowers: (), lambda key, lowers, state, task: (lowers, state, jnp.zeros(task.indices.shape))
    )
    draw = bilevel.bilevel_descent(
        make(), rule, no_op, optax.sgd(1.0), beta=BETA, annotate=preferences.gold_annotator(gold)
    )
    tilts = len(rule.stencil.offsets)

    def perturb(leaf):
        noise = jax.random.normal(jax.random.key(leaf.size), (tilts, *leaf.shape)).at[0].set(0.0)
        return leaf[None] + 0.02 * noise

    start = draw.init(jax.random.key(0), reward, policy)._replace(lowers=jax.tree.map(perturb, policy))

    def gradient(after):
        return jnp.concatenate(
            [(old - new).ravel() for old, new in zip(*map(jax.tree.leaves, (start.upper, after.upper)), strict=True)]
        )

    sample = enumerated(policy, reference)
    labels = jax.jit(preferences.expected_annotator(gold))(jax.random.key(0), sample, frozen)
    after, info = jax.jit(draw.update)(jax.random.key(0), start, bilevel.Labelled(sample, labels), frozen)
    truth = gradient(after)
    assert info.coupling_fraction > 0.01

    @jax.jit
    def estimates(keys):
        return jax.lax.map(
            lambda key: gradient(draw.step(key, start, LANGUAGE.prompts, frozen)[0]), keys, batch_size=256
        )

    drawn = np.asarray(estimates(jax.random.split(jax.random.key(9), 4096)), np.float64)
    error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert np.all(np.abs(drawn.mean(axis=0) - truth) <= 5 * error + 1e-6)
    assert np.linalg.norm(error) < 0.2 * np.linalg.norm(truth)


@pytest.mark.slow
def test_exact_evaluation_agrees_with_samples():
    policy, reference, reward = parameters()
    own, other = (words.policy_table(POLICY, params, LANGUAGE) for params in (policy, reference))
    golds = words.table_of(lambda *pair: words.alphabet_gold(*pair, letters=3), LANGUAGE)
    learned = words.reward_table(REWARD, reward, LANGUAGE)
    evaluation = jax.jit(lambda *tables: words.evaluate_language(*tables, OBJECTIVE, beta=BETA))(
        own, other, learned, golds
    )
    problem = make(pairs=20_000)
    frozen = LanguageFrozen(reference)
    sample = jax.jit(problem.sample)(jax.random.key(3), policy, LANGUAGE.prompts, frozen)
    scores = gold(sample, frozen)
    log_ratio = (sample.behaviour_log_prob - sample.reference_log_prob)[:, :, 0, 0]
    rewards = score_responses(REWARD, reward, sample.prompts, sample.responses)
    labels = preferences.expected_annotator(gold)(jax.random.key(0), sample, frozen)
    cost = OBJECTIVE.pair_cost(rewards, labels)
    for exactly, values in (
        (evaluation.policy.true_return, scores[..., 0]),
        (evaluation.policy.win_rate, preferences.preference(scores)),
        (evaluation.policy.kl, log_ratio),
        (evaluation.upper_loss, cost.coupled + cost.uncoupled + OBJECTIVE.kl_price * log_ratio),
    ):
        assert abs(float(jnp.mean(values) - exactly)) < 5 * float(jnp.std(values)) / 200
    best = exact.soft_value(golds, other, BETA)
    value = evaluation.policy.true_return - BETA * evaluation.policy.kl
    np.testing.assert_allclose(evaluation.policy.gap, best - value, rtol=1e-4)
    assert exact.evaluate_policy(exact.soft_policy(golds, other, BETA), other, golds, BETA).gap < 1e-5


def test_one_trace_and_the_same_bits():
    policy, reference, reward = parameters()
    solver = bilevel.tangent(optax.adam(1e-3), optax.adam(1e-4))
    algorithm = bilevel.bilevel_descent(
        make(), bilevel.central(0.2), solver, optax.adam(1e-3), beta=BETA, annotate=preferences.gold_annotator(gold)
    )
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1), donate_argnums=1)

    def run():
        state = algorithm.init(jax.random.key(0), reward, policy)
        for index in range(3):
            state, info = step(jax.random.key(index), state, LANGUAGE.prompts, LanguageFrozen(reference))
        return jax.tree.map(np.asarray, (state, info))

    chex.assert_trees_all_equal(run(), run())


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"against": "policy"}, "needs policy-reference pairs"),
        ({"against": "opponent"}, "against the reference, the policy or self, not 'opponent'"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_errors(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


def test_language_errors():
    with pytest.raises(ValueError, match="at most as many prompts"):
        words.alphabet_language(letters=2, prompts=3)
