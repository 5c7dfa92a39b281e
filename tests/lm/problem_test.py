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
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses, RolloutModel, language_problem, reward_of
from jaxrlhf.lm.reward import reward_model
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


def make(pairs=4, objective=OBJECTIVE, **keywords):
    return language_problem(
        POLICY, REWARD, objective, pairs=pairs, max_new_tokens=2, stop_ids=(words.STOP,), **keywords
    )


def gold(sample, frozen):
    return words.alphabet_gold(sample.prompts, sample.responses, letters=3)


def test_the_language_lists_every_completion_once():
    tokens, mask = (np.asarray(part) for part in LANGUAGE.completions)
    assert len(tokens) == 1 + 3 + 9 == len({tuple(row) for row in tokens})
    assert not (mask[:, 1] & ~mask[:, 0]).any()
    assert words.alphabet_language().completions.tokens.shape == (2801, 4)
    policy, _, _ = parameters()
    table = jax.jit(lambda params: words.policy_table(POLICY, params, LANGUAGE))(policy)
    np.testing.assert_allclose(jnp.sum(jnp.exp(table), axis=-1), 1.0, rtol=1e-5)


def test_gold_score_of_words_worked_out_by_hand():
    prompts = Prompts(jnp.array([[1, 1]]), jnp.ones((1, 2), bool))
    responses = {"bcd": (2, 3, 4, 0), "bb": (2, 2, 0, 0), "": (0, 0, 0, 0), "aceg": (1, 3, 5, 7)}
    tokens = jnp.array([[list(row) for row in responses.values()]])[:, :, None]
    mask = jnp.array([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]], bool)[:, :, None]
    scores = words.alphabet_gold(prompts, Responses(tokens, mask))[0, :, 0]
    np.testing.assert_allclose(scores, [1.5 + 1.0 + 0.5, 1.5 - 1.0 + 0.5, 0.5, 1.5])


@pytest.mark.parametrize("against_reference", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_trainer_agree(against_reference, temperature):
    policy, reference, reward = parameters()
    problem = make(objective=objectives.likelihood(), against_reference=against_reference, temperature=temperature)
    frozen = LanguageFrozen(reference)
    sample = jax.jit(problem.sample)(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
    own = problem.log_prob(policy, sample, frozen)
    slots = 1 if against_reference else 2
    np.testing.assert_allclose(own[:, :, :slots], sample.behaviour_log_prob[:, :, :slots], atol=1e-5)
    theirs = make(objective=objectives.likelihood(), against_reference=False, temperature=temperature)
    reference_log_prob = theirs.log_prob(reference, sample, frozen)
    np.testing.assert_allclose(sample.reference_log_prob, reference_log_prob, atol=1e-5)
    assert sample.from_policy.tolist() == [1.0, 0.0 if against_reference else 1.0]
    assert problem.reward(reward, sample, frozen).shape == (2, 4, 2, 1)


@pytest.mark.parametrize("self_play", [False, True])
def test_parts_change_nothing_but_memory(self_play):
    policy, reference, reward = parameters()
    solver, frozen, results = bilevel.tangent(optax.sgd(0.1), optax.sgd(0.1)), LanguageFrozen(reference), []
    for microbatches in (1, 4):
        problem = make(microbatches=microbatches, self_play=self_play, against_reference=not self_play)
        algorithm = bilevel.bilevel_descent(
            problem, bilevel.central(0.2), solver, optax.sgd(0.1), beta=BETA, annotate=preferences.gold_annotator(gold)
        )
        state = algorithm.init(jax.random.key(3), reward, policy)
        for number in range(2):
            state, info = jax.jit(algorithm.step)(jax.random.key(number), state, LANGUAGE.prompts, frozen)
        results.append((state, info))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="8 rows do not divide into 3 microbatches"):
        make(microbatches=3).sample(jax.random.key(0), policy, LANGUAGE.prompts, frozen)


def test_parts_hold_the_activations_of_one_at_a_time(monkeypatch):
    # As on a machine that reads all rows at once, if not told otherwise.
    monkeypatch.setattr(microbatch, "TOKENS", 2**20)
    policy, reference, _ = parameters()
    frozen, rows = LanguageFrozen(reference), jax.tree.map(lambda leaf: jnp.repeat(leaf, 64, axis=0), LANGUAGE.prompts)
    sizes = []
    for microbatches in (1, 16):
        problem = make(pairs=8, microbatches=microbatches)
        sample = jax.eval_shape(problem.sample, jax.random.key(0), policy, rows, frozen)
        slope = jax.jit(jax.grad(lambda lower, sample, problem=problem: problem.log_prob(lower, sample, frozen).sum()))
        sizes.append(slope.lower(policy, sample).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.25 * sizes[0], sizes


def test_a_writer_in_half_precision_leaves_the_ratios_exact():
    policy, reference, _ = parameters()
    frozen = LanguageFrozen(reference)
    drawn = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        writer = RolloutModel(decoder(SHAPE, dtype=dtype), lambda params, dtype=dtype: optax.tree.cast(params, dtype))
        problem = make(pairs=64, writer=writer)
        drawn[dtype] = jax.jit(problem.sample)(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
        own = problem.log_prob(policy, drawn[dtype], frozen)
        np.testing.assert_allclose(own[:, :, 0], drawn[dtype].behaviour_log_prob[:, :, 0], atol=1e-6)
    plain = jax.jit(make(pairs=64).sample)(jax.random.key(1), policy, LANGUAGE.prompts, frozen)
    chex.assert_trees_all_close(drawn[jnp.float32], plain, atol=1e-5)
    # In half precision some tokens come out otherwise, and what the writer itself would record is coarse.
    assert np.any(np.asarray(drawn[jnp.bfloat16].responses.tokens != plain.responses.tokens))
    half = make(pairs=64, writer=None)
    coarse = jax.jit(half.sample)(
        jax.random.key(1), optax.tree.cast(policy, jnp.bfloat16), LANGUAGE.prompts, frozen
    ).behaviour_log_prob
    exact_ones = half.log_prob(policy, plain, frozen)[:, :, 0]
    assert float(jnp.max(jnp.abs(coarse[:, :, 0] - exact_ones))) > 1e-3


def test_samples_follow_the_table():
    policy, reference, _ = parameters()
    problem = make(pairs=4000, objective=objectives.likelihood())
    sample = jax.jit(problem.sample)(jax.random.key(2), policy, LANGUAGE.prompts, LanguageFrozen(reference))
    table = np.exp(words.policy_table(POLICY, policy, LANGUAGE))
    index = {tuple(row): number for number, row in enumerate(np.asarray(LANGUAGE.completions.tokens).tolist())}
    for prompt in range(2):
        drawn = [index[tuple(row)] for row in np.asarray(sample.responses.tokens[prompt, :, 0]).tolist()]
        counts = np.bincount(drawn, minlength=len(index))
        expected = 4000 * table[prompt]
        statistic = np.sum((counts - expected) ** 2 / expected)
        assert statistic < 12 + 5 * np.sqrt(24)  # chi-square with 12 degrees of freedom, five standard deviations


def enumerated(policy, reference):
    """The same sample as `problem.sample` draws, with every pair and its probability."""
    own, other = (words.policy_table(POLICY, params, LANGUAGE) for params in (policy, reference))
    size = own.shape[1]
    first, second = (axis.ravel() for axis in np.indices((size, size)))
    pick = np.stack([first, second], axis=-1)
    responses = Responses(
        *(jnp.broadcast_to(part[pick][None], (2, *part[pick].shape)) for part in LANGUAGE.completions)
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
    """Transformers, sampler, labels and all: within 5 standard errors of enumeration, at fixed policies."""
    policy, reference, reward = parameters()
    frozen = LanguageFrozen(reference)
    still = bilevel.LowerSolver(
        lambda lowers: (), lambda key, lowers, state, task: (lowers, state, jnp.zeros(task.indices.shape))
    )
    draw = bilevel.bilevel_descent(
        make(), rule, still, optax.sgd(1.0), beta=BETA, annotate=preferences.gold_annotator(gold)
    )
    tilts = len(rule.stencil.offsets)

    def nudge(leaf):
        noise = jax.random.normal(jax.random.key(leaf.size), (tilts, *leaf.shape)).at[0].set(0.0)
        return leaf[None] + 0.02 * noise

    start = draw.init(jax.random.key(0), reward, policy)._replace(lowers=jax.tree.map(nudge, policy))

    def gradient(after):
        return jnp.concatenate(
            [(old - new).ravel() for old, new in zip(*map(jax.tree.leaves, (start.upper, after.upper)), strict=True)]
        )

    sample = enumerated(policy, reference)
    labels = preferences.expected_annotator(gold)(jax.random.key(0), sample, frozen)
    after, info = jax.jit(draw.update)(jax.random.key(0), start, bilevel.Labelled(sample, labels), frozen)
    truth = gradient(after)
    assert info.coupling_share > 0.01

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
def test_exact_judgement_agrees_with_samples():
    policy, reference, reward = parameters()
    own, other = (words.policy_table(POLICY, params, LANGUAGE) for params in (policy, reference))
    golds = words.table_of(lambda *pair: words.alphabet_gold(*pair, letters=3), LANGUAGE)
    learned = words.reward_table(REWARD, reward, LANGUAGE)
    verdict = jax.jit(lambda *tables: words.evaluate_language(*tables, OBJECTIVE, beta=BETA))(
        own, other, learned, golds
    )
    problem = make(pairs=20_000)
    frozen = LanguageFrozen(reference)
    sample = jax.jit(problem.sample)(jax.random.key(3), policy, LANGUAGE.prompts, frozen)
    scores = gold(sample, frozen)
    log_ratio = (sample.behaviour_log_prob - sample.reference_log_prob)[:, :, 0, 0]
    rewards = reward_of(REWARD, reward, sample.prompts, sample.responses)
    labels = preferences.expected_annotator(gold)(jax.random.key(0), sample, frozen)
    cost = OBJECTIVE.pair_cost(rewards, labels)
    for exactly, values in (
        (verdict.policy.true_return, scores[..., 0]),
        (verdict.policy.win_rate, preferences.preference(scores)),
        (verdict.policy.kl, log_ratio),
        (verdict.upper_loss, cost.coupled + cost.uncoupled + OBJECTIVE.kl_price * log_ratio),
    ):
        assert abs(float(jnp.mean(values) - exactly)) < 5 * float(jnp.std(values)) / 200
    best = exact.soft_value(golds, other, BETA)
    value = verdict.policy.true_return - BETA * verdict.policy.kl
    np.testing.assert_allclose(verdict.policy.gap, best - value, rtol=1e-4)
    assert exact.evaluate_policy(exact.soft_policy(golds, other, BETA), other, golds, BETA).gap < 1e-5


def test_one_trace_and_the_same_bits():
    policy, reference, reward = parameters()
    solver = bilevel.tangent(optax.adam(1e-3), optax.adam(1e-4))
    algorithm = bilevel.bilevel_descent(
        make(), bilevel.central(0.2), solver, optax.adam(1e-3), beta=BETA, annotate=preferences.gold_annotator(gold)
    )
    step = jax.jit(chex.assert_max_traces(algorithm.step, n=1), donate_argnums=1)

    def whole():
        state = algorithm.init(jax.random.key(0), reward, policy)
        for index in range(3):
            state, info = step(jax.random.key(index), state, LANGUAGE.prompts, LanguageFrozen(reference))
        return jax.tree.map(np.asarray, (state, info))

    chex.assert_trees_all_equal(whole(), whole())


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"against_reference": False}, "needs policy-reference pairs"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.9}, "top_p 0.9 cannot be trained with"),
    ],
)
def test_errors(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


def test_language_errors():
    with pytest.raises(ValueError, match="at most as many prompts"):
        words.alphabet_language(letters=2, prompts=3)
