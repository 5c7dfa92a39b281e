"""Sampling against exact distributions, exact text and a sampler without a cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.generate import (
    CPU_CACHE_BYTES,
    STOP_CHECK_INTERVAL,
    generate,
    inverse_cdf,
    nucleus,
    sampling_microbatches,
)
from jaxrlhf.lm.hugging_face.weights import load_decoder, load_tokenizer
from jaxrlhf.lm.transformer.model import DecoderConfig, LanguageModel, decoder

GREEDY_TEXT = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play \
with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, \
"Don't worry, Lily. We can help you."""


@pytest.fixture
def prompts():
    tokens = jax.random.randint(jax.random.key(7), (6, 5), 1, 23)
    mask = jnp.arange(5)[None, :] >= jnp.array([0, 1, 2, 3, 4, 0])[:, None]
    return tokens, mask


@pytest.fixture
def five_tokens(lively):
    """A model with a vocabulary of five tokens, so that its pairs can be counted."""
    model = decoder(DecoderConfig(5, 8, 1, 2, 1, 4, 8, context_length=8))
    return model, lively(model, scale=0.25)


def pair_probabilities(model, params, temperature):
    """Exact probability of each of the 25 two-token completions of the prompt (1)."""
    pairs = np.array(list(itertools.product(range(5), repeat=2)))
    rows = jnp.concatenate([jnp.ones((25, 1), jnp.int32), jnp.asarray(pairs, jnp.int32)], axis=1)
    hidden = jax.jit(model.hidden)(params, rows, jnp.ones(rows.shape, bool))
    logits = np.asarray(model.logits(params, hidden), np.float64) / temperature
    log_prob = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return np.exp([log_prob[row, 0, first] + log_prob[row, 1, second] for row, (first, second) in enumerate(pairs)])


def chi_square(tokens, probabilities):
    """Pearson's statistic of observed pairs `[N, 2]`; 24 degrees of freedom."""
    counts = np.bincount(np.asarray(tokens[:, 0] * 5 + tokens[:, 1]), minlength=25)
    expected = probabilities / probabilities.sum() * len(tokens)
    return float(np.sum((counts - expected) ** 2 / expected))


def test_sampling_frequencies_are_the_probabilities(five_tokens):
    model, params = five_tokens
    prompt = jnp.ones((20000, 1), jnp.int32)
    sample = functools.partial(generate, model, max_new_tokens=2, stop_ids=(), temperature=0.8)
    out = jax.jit(sample)(params, jax.random.key(5), prompt, jnp.ones(prompt.shape, bool))
    exact = pair_probabilities(model, params, 0.8)
    assert exact.min() * len(prompt) > 5, "the statistic needs counts"
    # With 24 degrees of freedom, 66 is exceeded once in 100,000 seeds; a temperature that is off by 0.1 exceeds it.
    assert chi_square(out.tokens, exact) < 66
    assert chi_square(out.tokens, pair_probabilities(model, params, 0.9)) > 66


@pytest.mark.parametrize("size", [1, 2, 5, 30, 257, 1000])
def test_inverse_cdf_equals_a_search_in_double_precision(size):
    source = np.random.default_rng(size)
    weights = source.gamma(0.3, size=(400, size)).astype(np.float32)
    weights *= source.uniform(size=weights.shape) < 0.6
    weights[:, source.integers(size)] += 0.5
    uniforms = source.uniform(size=400).astype(np.float32)
    chosen = np.asarray(jax.jit(inverse_cdf)(weights, uniforms))
    cumulative = np.cumsum(weights.astype(np.float64), axis=1)
    target = uniforms * cumulative[:, -1]
    rows = np.arange(400)
    assert np.all(weights[rows, chosen] > 0)
    slack = 1e-5 * cumulative[:, -1]
    assert np.all(cumulative[rows, chosen] >= target - slack)
    assert np.all(cumulative[rows, chosen] - weights[rows, chosen] <= target + slack)


def test_inverse_cdf_at_the_edges():
    weights = jnp.array([[0.0, 0.2, 0.0, 0.8, 0.0, 0.0, 0.0]])
    draw = jax.jit(inverse_cdf)
    assert int(draw(weights, jnp.array([0.0]))[0]) == 1
    assert int(draw(weights, jnp.array([1.0]))[0]) == 3


def test_nucleus_is_the_smallest_set_that_reaches_the_mass():
    weights = jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15], [0.25, 0.25, 0.25, 0.25, 0.0]])
    np.testing.assert_array_equal(nucleus(weights, 0.65)[0], [False, True, False, True, False])
    np.testing.assert_array_equal(nucleus(weights, 0.75)[0], [False, True, False, True, True])
    np.testing.assert_array_equal(nucleus(3 * weights, 0.1)[0], [False, True, False, False, False])
    np.testing.assert_array_equal(nucleus(weights, 0.1)[1], [True, True, True, True, False])


def test_top_p_stays_in_the_nucleus_and_renormalises(tiny):
    model, params = tiny
    prompt = jnp.tile(jnp.array([[4, 9]]), (3000, 1))
    sample = functools.partial(generate, model, max_new_tokens=1, stop_ids=(), temperature=1.3, top_p=0.6)
    out = jax.tree.map(np.asarray, jax.jit(sample)(params, jax.random.key(1), prompt, prompt > 0))
    hidden = model.hidden(params, prompt[:1], prompt[:1] > 0)[0, -1]
    probability = np.exp(np.asarray(model.logits(params, hidden)) / 1.3)
    probability /= probability.sum()
    order = np.argsort(-probability)
    inside = order[: int(np.sum(np.cumsum(probability[order]) < 0.6)) + 1]
    assert 1 < len(inside) < 20
    assert set(np.unique(out.tokens)) == set(inside)
    expected = np.log(probability / probability[inside].sum())
    np.testing.assert_allclose(out.log_prob[:, 0], expected[out.tokens[:, 0]], atol=1e-5)


def test_greedy_with_a_cache_equals_greedy_without(tiny, prompts):
    model, params = tiny
    sample = functools.partial(generate, model, max_new_tokens=9, stop_ids=(), temperature=0.0)
    out = jax.jit(sample)(params, jax.random.key(0), *prompts)
    tokens, mask = (np.pad(leaf, ((0, 0), (0, 9))) for leaf in prompts)
    for column in range(9):
        logits = np.asarray(model.logits(params, model.hidden(params, tokens, mask)))[:, 4 + column]
        chosen = np.argmax(logits, axis=-1)
        log_prob = np.max(logits, axis=-1) - np.log(np.sum(np.exp(logits), axis=-1))
        np.testing.assert_array_equal(out.tokens[:, column], chosen)
        np.testing.assert_allclose(out.log_prob[:, column], log_prob, atol=1e-5)
        tokens[:, 5 + column], mask[:, 5 + column] = chosen, True


def test_greedy_text_of_a_real_model(stories):
    config, params = load_decoder(stories)
    sample = functools.partial(generate, decoder(config), max_new_tokens=256, stop_ids=(), temperature=0.0)
    bos = jnp.ones((1, 1), jnp.int32)
    out = jax.jit(sample)(params, jax.random.key(0), bos, bos > 0)
    assert load_tokenizer(stories).decode(out.tokens[0].tolist()) == GREEDY_TEXT


def test_a_stop_token_ends_its_row_and_is_counted_once(tiny, prompts):
    model, params = tiny

    def sample(**settings):
        program = jax.jit(functools.partial(generate, model, max_new_tokens=30, **settings))
        return jax.tree.map(np.asarray, program(params, jax.random.key(2), *prompts))

    free = sample(stop_ids=())
    out = sample(stop_ids=(3, 11), pad_id=7)
    for row in range(6):
        hits = np.flatnonzero(np.isin(free.tokens[row], (3, 11)))
        end = int(hits[0]) + 1 if len(hits) else 30
        np.testing.assert_array_equal(out.tokens[row], [*free.tokens[row, :end], *[7] * (30 - end)])
        np.testing.assert_array_equal(out.mask[row], np.arange(30) < end)
        np.testing.assert_allclose(out.log_prob[row, :end], free.log_prob[row, :end], atol=1e-5)
        assert not np.any(out.log_prob[row, end:])
    lengths = np.sum(out.mask, axis=1)
    assert lengths.min() < 30
    assert len(set(lengths.tolist())) > 1, "the rows should end at different times"


@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_microbatches_sample_the_same_rows(tiny, prompts, microbatches):
    model, params = tiny
    sample = functools.partial(generate, model, params, jax.random.key(3), *prompts, max_new_tokens=7, stop_ids=(3,))
    whole, split = (jax.jit(functools.partial(sample, microbatches=number))() for number in (1, microbatches))
    np.testing.assert_array_equal(split.tokens, whole.tokens)
    np.testing.assert_array_equal(split.mask, whole.mask)
    np.testing.assert_allclose(split.log_prob, whole.log_prob, atol=1e-5)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 microbatches"):
        sample(microbatches=4)


def test_default_microbatches_on_a_cpu_follow_the_size_of_the_cache():
    def microbatches(rows, columns=64, width=128):
        model = decoder(DecoderConfig(64, 64, 2, 4, 4, 16, width, context_length=512))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return sampling_microbatches(model, params, jnp.ones((rows, columns), jnp.int32), 64)

    # 2 layers x keys and values x 64 numbers x 128 columns x 4 bytes: a little over 128 KiB a row, 31 rows in 4 MiB.
    assert CPU_CACHE_BYTES == 2**22
    assert [microbatches(rows) for rows in (8, 31, 32, 64, 60, 248, 37, 62)] == [1, 1, 2, 4, 2, 8, 1, 2]
    assert microbatches(32, columns=16) == 1
    # With 50 MB of weights, the limit is the size of the weights.
    assert microbatches(256, width=2**15) == 1


def counting_model(calls):
    """A foreign model: it generates 0, 1, 2, ... for any prompt, and records each decoding step in `calls`."""

    def one_hot(step, rows):
        return 100.0 * jnp.broadcast_to(jax.nn.one_hot(step, 20)[None, :], (rows, 20))

    def decode(params, tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return one_hot(cache + 1, tokens.shape[0]), cache + 1

    return LanguageModel(
        init=lambda key: {},
        hidden=lambda params, tokens, mask: jnp.zeros((*tokens.shape, 20)),
        logits=lambda params, hidden: hidden,
        prefill=lambda params, tokens, mask, length: (one_hot(0, tokens.shape[0]), jnp.int32(0)),
        decode=decode,
        vocabulary_size=20,
        context_length=100,
    )


@pytest.mark.parametrize(
    "stop, length, decoded",
    [
        (4, 5, STOP_CHECK_INTERVAL),
        (STOP_CHECK_INTERVAL - 1, STOP_CHECK_INTERVAL, STOP_CHECK_INTERVAL),
        (STOP_CHECK_INTERVAL, STOP_CHECK_INTERVAL + 1, 2 * STOP_CHECK_INTERVAL),
        (19, 18, 18),
    ],
)
def test_the_loop_ends_at_the_check_after_the_last_row_and_accepts_any_model(stop, length, decoded):
    calls, prompt = [], jnp.ones((3, 2), jnp.int32)
    settings = {"max_new_tokens": 18, "stop_ids": (stop,)}
    out = generate(counting_model(calls), {}, jax.random.key(0), prompt, prompt > 0, **settings)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.tokens[0], [*range(length), *[0] * (18 - length)])
    np.testing.assert_array_equal(jnp.sum(out.mask, axis=1), [length] * 3)
    assert len(calls) == decoded


@pytest.fixture(scope="module")
def twelve(tiny):
    """A compiled sampler of at most twelve tokens."""
    return jax.jit(functools.partial(generate, tiny[0], max_new_tokens=12, stop_ids=(3,)))


def test_a_row_depends_neither_on_other_rows_nor_on_padding(tiny, prompts, twelve):
    _, params = tiny
    tokens, mask = prompts

    def sample(tokens, mask):
        return jax.tree.map(np.asarray, twelve(params, jax.random.key(4), tokens, mask))

    out = sample(tokens, mask)
    others = sample(tokens.at[1:].set(tokens[1:, ::-1]), mask.at[1:].set(True))
    np.testing.assert_array_equal(out.tokens[0], others.tokens[0])
    assert np.any(out.tokens[1:] != others.tokens[1:])
    wide = sample(jnp.pad(tokens, ((0, 0), (6, 3)), constant_values=9), jnp.pad(mask, ((0, 0), (6, 3))))
    np.testing.assert_array_equal(out.tokens, wide.tokens)
    np.testing.assert_allclose(out.log_prob, wide.log_prob, atol=1e-5)


def test_samples_depend_on_the_key_and_not_on_jit(tiny, prompts, twelve):
    model, params = tiny
    eager = generate(model, params, jax.random.key(1), *prompts, max_new_tokens=12, stop_ids=(3,))
    np.testing.assert_array_equal(eager.tokens, twelve(params, jax.random.key(1), *prompts).tokens)
    other = twelve(params, jax.random.key(2), *prompts)
    assert np.any(np.asarray(eager.tokens) != np.asarray(other.tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"max_new_tokens": 60}, "5 prompt columns and 60 new tokens exceed the model's context of 64"),
        ({"stop_ids": (2, 23)}, "Token id 23 lies outside the vocabulary of 23"),
        ({"pad_id": -1}, "Token id -1 lies outside the vocabulary of 23"),
    ],
)
def test_impossible_arguments_are_refused_while_tracing(tiny, prompts, change, message):
    model, params = tiny
    sample = functools.partial(generate, model, **({"max_new_tokens": 4, "stop_ids": (2,)} | change))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sample, params, jax.random.key(0), *prompts)


def test_an_empty_prompt_is_refused_outside_jit(tiny, prompts):
    model, params = tiny
    tokens, mask = prompts
    with pytest.raises(ValueError, match="A prompt is empty"):
        generate(model, params, jax.random.key(0), tokens, mask.at[2].set(False), max_new_tokens=2, stop_ids=())
