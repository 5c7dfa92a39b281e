"""Log-probabilities against the sampler, transformers, finite differences, and themselves in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm import log_probs
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.weights import load_decoder
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.transformer.model import decoder


def jitted(model, **settings):
    return jax.jit(functools.partial(completion_log_probs, model, **settings))


@pytest.fixture(scope="module")
def rows(tiny):
    """Prompts of several lengths and sampled completions of several lengths."""
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(7), (6, 5), 1, 23)
    mask = jnp.arange(5)[None, :] >= jnp.array([0, 1, 2, 3, 4, 0])[:, None]
    sample = functools.partial(generate, model, max_new_tokens=11, stop_ids=(3, 11))
    out = jax.jit(sample)(params, jax.random.key(3), tokens, mask)
    assert int(jnp.sum(~out.mask)) > 0
    return tokens, mask, out.tokens, out.mask


@pytest.fixture(scope="module")
def plain(tiny, rows):
    """Log-probabilities of `rows` in one chunk."""
    model, params = tiny
    return jitted(model)(params, *rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_trainer_agree(tiny, temperature):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(8), (32, 5), 1, 23)
    mask = jnp.arange(5)[None, :] >= jnp.arange(32)[:, None] % 5
    sample = functools.partial(generate, model, max_new_tokens=20, stop_ids=(3,), temperature=temperature)
    out = jax.jit(sample)(params, jax.random.key(0), tokens, mask)
    replay = jitted(model, temperature=temperature)(params, tokens, mask, out.tokens, out.mask)
    np.testing.assert_allclose(out.log_prob, replay, atol=1e-5)
    assert np.std(replay) > 0.3


def test_a_real_model_equals_transformers_and_its_sampler(stories):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = load_decoder(stories)
    model = decoder(config)
    tokens = jnp.ones((16, 3), jnp.int32)
    mask = jnp.broadcast_to(jnp.array([[False, False, True]]), tokens.shape)
    sample = functools.partial(generate, model, max_new_tokens=100, stop_ids=(1, 2))
    out = jax.jit(sample)(params, jax.random.key(0), tokens, mask)
    ours = jitted(model)(params, tokens, mask, out.tokens, out.mask)
    llama = transformers.LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32)
    text = torch.tensor(np.concatenate([tokens[:, 2:], out.tokens], axis=1)).long()
    with torch.no_grad():
        theirs = torch.log_softmax(llama(text).logits[:, :-1], dim=-1).gather(-1, text[:, 1:, None])[..., 0]
    np.testing.assert_allclose(ours, np.where(out.mask, theirs.numpy(), 0.0), atol=1e-4)
    np.testing.assert_allclose(ours, out.log_prob, atol=5e-5)


@pytest.mark.parametrize(("left", "right"), [(0, 4), (3, 9)])
def test_padding_of_the_prompt_changes_nothing(tiny, rows, plain, left, right):
    model, params = tiny
    tokens, mask, completions, completion_mask = rows
    wide = jnp.pad(tokens, ((0, 0), (left, right)), constant_values=13)
    wide_mask = jnp.pad(mask, ((0, 0), (left, right)))
    padded = jitted(model)(params, wide, wide_mask, completions, completion_mask)
    np.testing.assert_allclose(padded, plain, atol=1e-5)


def test_padding_of_the_completion_changes_nothing(tiny, rows, plain):
    model, params = tiny
    tokens, mask, completions, completion_mask = rows
    wide = jnp.pad(jnp.where(completion_mask, completions, 19), ((0, 0), (0, 6)), constant_values=19)
    wide_mask = jnp.pad(completion_mask, ((0, 0), (0, 6)))
    padded = jitted(model)(params, tokens, mask, wide, wide_mask)
    np.testing.assert_allclose(padded[:, :11], plain, atol=1e-5)
    assert not np.any(padded[~np.asarray(wide_mask)])


def test_chunks_change_neither_value_nor_gradient(tiny, rows):
    model, params = tiny

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_value(params, chunk_size):
        log_prob = completion_log_probs(model, params, *rows, temperature=0.8, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(log_prob)), log_prob

    whole_gradient, whole = gradient_and_value(params, 11)
    for chunk_size in (1, 4):  # 4 does not divide 11
        gradient, chunked = gradient_and_value(params, chunk_size)
        np.testing.assert_allclose(chunked, whole, atol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, whole_gradient)


def test_a_frozen_head_has_the_gradient_of_a_trained_one_from_fewer_products(tiny, rows):
    model, params = tiny

    def value(layers, rest, chunk_size=4):
        log_prob = completion_log_probs(model, rest | {"layers": layers}, *rows, temperature=0.8, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(log_prob)), log_prob

    @jax.jit
    def both(params):
        frozen = jax.grad(value, has_aux=True)(params["layers"], params)
        (whole, _), log_prob = jax.grad(value, argnums=(0, 1), has_aux=True)(params["layers"], params)
        return frozen, (whole, log_prob)

    frozen, trained = both(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), frozen, trained)

    def scored(hidden, params):
        tokens = jnp.ones(hidden.shape[:2], jnp.int32)
        return jnp.sum(log_probs.token_log_probs(model, params, hidden, tokens, 1.0, chunk_size=4).log_prob)

    def products(argnums):
        program = jax.make_jaxpr(jax.value_and_grad(scored, argnums))(jnp.ones((2, 9, 16)), params)
        return head_products(program.jaxpr, (23, 16))

    # The logits and the gradient of the states; a head that is trained has its logits computed twice.
    assert products(0) == 2 < products((0, 1))


def inner_programs(equation):
    """Yields the programs within an equation."""
    values = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
    )
    yield from (part for part in (getattr(each, "jaxpr", each) for each in values) if hasattr(part, "eqns"))


def head_products(jaxpr, shape):
    """Returns how many products have an operand of this shape or its transpose, each in a loop once."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        count += equation.primitive.name == "dot_general" and (shape in shapes or shape[::-1] in shapes)
        count += sum(head_products(part, shape) for part in inner_programs(equation))
    return count


def sizes(jaxpr):
    """Yields the number of elements of every value that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for part in inner_programs(equation):
            yield from sizes(part)


def test_many_logits_are_never_materialised_at_once(tiny_config, rows, monkeypatch):
    model = decoder(tiny_config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    # A vocabulary much larger than the rest: 6 rows, 11 columns.
    model = model._replace(
        logits=lambda params, hidden: jnp.repeat(hidden @ params["embedding"].T, 200, axis=-1),
        vocabulary_size=4600,
    )

    def largest_array():
        program = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(completion_log_probs(model, p, *rows))))(params)
        return max(sizes(program.jaxpr))

    assert largest_array() >= 6 * 11 * 4600
    monkeypatch.setattr(log_probs, "MAX_LOGITS", 2 * 6 * 4600)
    assert largest_array() <= 2 * 6 * 4600


def test_gradient_equals_finite_differences(tiny, rows, x64):
    model, params = tiny
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
    keys = jax.random.split(jax.random.key(5), len(jax.tree.leaves(params)))
    direction = jax.tree.unflatten(
        jax.tree.structure(params),
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(params), strict=True)],
    )

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
        return jnp.sum(completion_log_probs(model, moved, *rows, chunk_size=4))

    reverse = jax.jit(jax.grad(loss))(0.0)
    forward = jax.jit(jax.jacfwd(loss))(0.0)
    difference = (loss(3e-6) - loss(-3e-6)) / 6e-6
    np.testing.assert_allclose(reverse, difference, rtol=1e-6)
    np.testing.assert_allclose(forward, difference, rtol=1e-6)


def test_masked_tokens_have_no_gradient(tiny, rows):
    model, params = tiny
    tokens, mask, completions, completion_mask = rows
    none = jnp.zeros(completion_mask.shape, bool)

    def loss(params):
        return jnp.sum(completion_log_probs(model, params, tokens, mask, completions, none))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == 0
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive to have log-probabilities, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive to have log-probabilities, got -1.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused(tiny, rows, change, message):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        completion_log_probs(model, params, *rows, **change)


def test_rows_longer_than_the_context_are_refused(tiny, rows):
    model, params = tiny
    tokens, mask, *completion = rows
    wide = (jnp.pad(leaf, ((0, 0), (50, 0))) for leaf in (tokens, mask))
    with pytest.raises(
        ValueError, match="55 prompt columns and 11 completion columns exceed the model's context of 64"
    ):
        completion_log_probs(model, params, *wide, *completion)
