"""The decoder against transformers, against itself with a cache, and under the transformations JAX users apply."""

import dataclasses
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.hugging_face.weights import load_decoder
from jaxrlhf.lm.transformer import layers
from jaxrlhf.lm.transformer import model as model_module
from jaxrlhf.lm.transformer.block import LINEAR_MAPS
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder, pad_left


def padded(tokens, left, right):
    """Returns the rows `tokens` between columns of padding, and their mask."""
    rows = tokens.shape[0]
    filled = [np.full((rows, width), token, np.int32) for width, token in ((left, 3), (right, 5))]
    whole = np.concatenate([filled[0], np.asarray(tokens), filled[1]], axis=1)
    columns = np.arange(whole.shape[1])[None, :]
    real = (columns >= left) & (columns < left + tokens.shape[1])
    return jnp.asarray(whole), jnp.asarray(np.broadcast_to(real, whole.shape))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6, "head_dim": 10},
        {"num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 0.1},
    ],
    ids=["grouped", "tied", "ungrouped-wide-heads", "one-key-head"],
)
def test_logits_equal_those_of_transformers(make_llama, tmp_path, settings):
    torch = pytest.importorskip("torch")
    llama = make_llama(**settings)
    llama.save_pretrained(tmp_path)
    config, params = load_decoder(tmp_path)
    model = decoder(config)
    tokens = np.random.default_rng(0).integers(1, 31, (5, 12))
    mask = np.arange(12)[None, :] >= np.array([0, 1, 4, 7, 11])[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        expected = llama(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()
    logits = jax.jit(lambda *rows: model.logits(params, model.hidden(params, *rows)))(tokens, mask)
    logits = np.asarray(logits)
    assert np.std(expected) > 0.5, "the comparison would be vacuous"
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-4)


def test_a_decoder_built_in_double_precision_is_that_of_single_precision(tiny_config):
    """Structures are remembered by configuration alone, so that precision must be no part of them."""
    single = model_module._structure.__wrapped__(tiny_config, frozenset(LINEAR_MAPS))
    with jax.enable_x64(True):
        assert model_module._structure.__wrapped__(tiny_config, frozenset(LINEAR_MAPS)) == single


@pytest.mark.parametrize(("left", "right"), [(0, 4), (2, 5), (17, 0)])
def test_padding_changes_no_state(tiny, left, right):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, 23)
    plain = model.hidden(params, tokens, jnp.ones(tokens.shape, bool))
    whole, mask = padded(tokens, left, right)
    within = model.hidden(params, whole, mask)[:, left : left + 9]
    np.testing.assert_allclose(within, plain, atol=1e-5)


def test_a_gap_in_the_middle_is_padding_too(tiny):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 0, 23)
    plain = model.hidden(params, tokens, jnp.ones(tokens.shape, bool))
    gap = jnp.zeros((3, 4), jnp.int32)
    whole = jnp.concatenate([tokens[:, :5], gap, tokens[:, 5:]], axis=1)
    mask = jnp.concatenate([jnp.ones((3, 5), bool), gap > 0, jnp.ones((3, 3), bool)], axis=1)
    within = model.hidden(params, whole, mask)
    np.testing.assert_allclose(within[:, 9:], plain[:, 5:], atol=1e-5)


def test_a_state_depends_on_earlier_tokens_only(tiny):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(3), (2, 10), 0, 23)
    mask = jnp.ones(tokens.shape, bool)
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % 23)
    before, after = model.hidden(params, tokens, mask), model.hidden(params, changed, mask)
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert float(jnp.min(jnp.max(jnp.abs(before[:, 6:] - after[:, 6:]), axis=-1))) > 1e-3


@pytest.mark.parametrize("rows", [4, 1])
def test_cache_gives_the_states_of_whole_rows(tiny, rows):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(4), (rows, 11), 0, 23)
    mask = jnp.arange(11)[None, :] >= jnp.array([0, 1, 3, 4])[-rows:, None]
    expected = model.hidden(params, tokens, mask)
    state, cache = model.prefill(params, tokens[:, :5], mask[:, :5], 14)
    np.testing.assert_allclose(state, expected[:, 4], atol=1e-5)
    for column in range(5, 11):
        state, cache = model.decode(params, tokens[:, column], cache)
        np.testing.assert_allclose(state, expected[:, column], atol=1e-5)


def test_stacked_parameters_under_vmap_equal_a_loop(tiny):
    model, params = tiny
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 0.9 * leaf, 1.2 * leaf]), jax.tree.map(np.asarray, params))
    tokens = jax.random.randint(jax.random.key(5), (2, 7), 0, 23)
    mask = jnp.ones(tokens.shape, bool)

    def loss(params):
        return jnp.sum(model.logits(params, model.hidden(params, tokens, mask)) ** 2)

    together = jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.grad(loss)))(stacked))
    gradient = jax.jit(jax.grad(loss))
    for index in range(3):
        one = jax.tree.map(operator.itemgetter(index), together)
        alone = gradient(jax.tree.map(operator.itemgetter(index), stacked))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), one, alone)


def test_bfloat16_parameters_give_float32_logits_near_the_exact_ones(tiny):
    model, params = tiny
    tokens = jax.random.randint(jax.random.key(6), (3, 9), 0, 23)
    mask = jnp.arange(9)[None, :] >= jnp.array([0, 2, 5])[:, None]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden = model.hidden(half, tokens, mask)
    logits = model.logits(half, hidden)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = model.logits(params, model.hidden(params, tokens, mask))
    error = jnp.where(mask[..., None], logits - exact, 0.0)
    assert 0 < float(jnp.sqrt(jnp.mean(error**2))) < 0.03 * float(jnp.std(exact))


def test_products_of_a_gradient_in_half_precision_read_half_precision(tiny_config, lively):
    model = decoder(tiny_config, dtype=jnp.bfloat16)
    params = lively(model)
    tokens, mask = jax.random.randint(jax.random.key(6), (3, 9), 0, 23), jnp.ones((3, 9), bool)

    def loss(params, model):
        log_probs = jax.nn.log_softmax(model.logits(params, model.hidden(params, tokens, mask)))
        return -jnp.mean(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1))

    program = jax.make_jaxpr(jax.value_and_grad(functools.partial(loss, model=model)))(params)
    products = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) > 30
    assert {value.aval.dtype for product in products for value in product.invars} == {jnp.dtype(jnp.bfloat16)}
    found, exact = (
        jax.jit(jax.grad(functools.partial(loss, model=model)))(params) for model in (model, decoder(tiny_config))
    )
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert float(jnp.linalg.norm(leaf - expected)) < 0.05 * float(jnp.linalg.norm(expected))


def equations(program):
    """Yields the equations of a program and of those inside it."""
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_an_empty_row_has_finite_gradients(tiny):
    model, params = tiny
    tokens = jnp.zeros((2, 5), jnp.int32)
    mask = jnp.array([[True] * 5, [False] * 5])
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.hidden(params, tokens, mask))))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_only_logits_need_the_output_head(tiny_config):
    model = decoder(dataclasses.replace(tiny_config, tied_embeddings=False))
    params = jax.eval_shape(model.init, jax.random.key(0))
    trunk = {name: leaf for name, leaf in params.items() if name != "output_head"}
    tokens, mask = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    hidden = jax.eval_shape(model.hidden, trunk, tokens, mask)
    assert params["output_head"].shape == (16, 23)
    assert jax.eval_shape(model.logits, params, hidden).shape == (1, 4, 23)


def test_init_follows_the_key_and_is_float32(tiny_config):
    init = jax.jit(decoder(tiny_config).init)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(one))
    assert bool(jnp.all(one["embedding"] == same["embedding"]))
    assert not bool(jnp.any(one["embedding"] == other["embedding"]))


def test_parameters_of_another_structure_are_refused(tiny):
    model, params = tiny
    renamed = {"embeddings" if name == "embedding" else name: leaf for name, leaf in params.items()}
    deeper = params | {"layers": jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params["layers"])}
    for wrong in (renamed, deeper):
        with pytest.raises(ValueError, match="not the parameters of a decoder of 2 layers"):
            model.hidden(wrong, jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool))


def test_pad_left_keeps_the_order_of_real_tokens():
    tokens = jnp.array([[1, 2, 3, 0, 0], [0, 4, 0, 5, 0], [6, 7, 8, 9, 10]])
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    moved, moved_mask = pad_left(tokens, mask)
    np.testing.assert_array_equal(
        jnp.where(moved_mask, moved, -1), [[-1, -1, 1, 2, 3], [-1, -1, -1, 4, 5], [6, 7, 8, 9, 10]]
    )


WINDOWS = {"window": 4, "windowed_layers": (0, 2), "window_rope_base": 100.0}


@pytest.mark.parametrize(
    "windows", [{}, WINDOWS, {"window": 3, "windowed_layers": (0, 1, 2)}], ids=["none", "some", "all"]
)
def test_scanned_layers_equal_unrolled_ones(tiny_config, limit, windows):
    config = dataclasses.replace(tiny_config, layers=3, **windows)
    params = decoder(config).init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, 23)
    mask = jnp.arange(9)[None] >= jnp.array([[0], [2], [5]])

    def everything():
        model = decoder(config)

        def loss(params):
            return jnp.sum(jnp.sin(model.hidden(params, tokens, mask)) * mask[..., None])

        def steps(params):
            state, cache = model.prefill(params, tokens, mask, 12)
            states = [state]
            for token in range(2):
                state, cache = model.decode(params, jnp.full(3, token), cache)
                states.append(state)
            return jnp.stack(states)

        return jax.jit(lambda params: (jax.grad(loss)(params), steps(params)))(params)

    unrolled = everything()
    limit("MAX_UNROLLED_LAYERS", 1)
    chex.assert_trees_all_close(everything(), unrolled, atol=2e-5)


@pytest.mark.parametrize("columns", [31, 32, 33, 511, 512, 515])
def test_attention_in_blocks_equals_that_of_the_whole_square(columns, x64):
    source = np.random.default_rng(6)
    query = source.normal(size=(2, columns, 2, 3, 4))
    key, value = source.normal(size=(2, 2, 4, columns)), source.normal(size=(2, 2, columns, 4))
    positions = np.arange(columns)
    real = (source.uniform(size=(2, columns)) < 0.7) | (positions == 0)[None, :]
    allowed = real[:, None, :] & (positions[:, None] >= positions[None, :])[None]

    def output_and_gradients(attend, *inputs):
        attention = functools.partial(attend, allowed=allowed, scale=0.7, cap=5.0)
        output, pullback = jax.vjp(attention, *inputs)
        return output, pullback(jnp.cos(output))

    both = jax.jit(
        lambda *inputs: [output_and_gradients(attend, *inputs) for attend in (layers.attend_causally, layers.attend)]
    )(query, key, value)
    chex.assert_trees_all_close(*both, atol=1e-12)
    widths = [end - begin for begin, end in layers.query_blocks(columns)]
    assert sum(widths) == columns and len(widths) == (1 if columns < 32 else 2 if columns < 512 else 4)


def test_recomputed_scores_change_no_gradient(tiny, tiny_config, limit):
    _, params = tiny
    tokens, mask = jax.random.randint(jax.random.key(2), (3, 9), 0, 23), jnp.ones((3, 9), bool)

    def program():
        model = decoder(tiny_config)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.hidden(params, tokens, mask)))))

    saved = program()
    expected, recomputes = saved(params), "remat" in str(jax.make_jaxpr(saved)(params))
    limit("MAX_SAVED_SCORE_BYTES", 0)
    assert not recomputes and "remat" in str(jax.make_jaxpr(program())(params))
    chex.assert_trees_all_close(program()(params), expected, atol=2e-5)


@pytest.mark.parametrize("unrolled", [1, 8])
@pytest.mark.parametrize("remat", ["layer", "products"])
def test_rematerialisation_changes_no_gradient(tiny, tiny_config, limit, remat, unrolled):
    limit("MAX_UNROLLED_LAYERS", unrolled)
    _, params = tiny
    tokens, mask = jax.random.randint(jax.random.key(2), (3, 9), 0, 23), jnp.ones((3, 9), bool)

    def gradient(**options):
        model = decoder(tiny_config, **options)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.hidden(params, tokens, mask)))))(params)

    chex.assert_trees_all_close(gradient(remat=remat), gradient(), atol=2e-5)
    with pytest.raises(ValueError, match="remat is one of layer, products, or None, not 'all'"):
        decoder(tiny_config, remat="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "DecoderConfig.width must be positive, got 0"),
        ({"layers": -1}, "DecoderConfig.layers must be positive, got -1"),
        ({"norm_epsilon": float("nan")}, "DecoderConfig.norm_epsilon must be a number, got nan"),
        ({"query_heads": 5}, r"query_heads \(5\) must be a multiple of key_value_heads \(2\)"),
        ({"head_size": 7}, "head_size must be even for rotary positions, got 7"),
    ],
)
def test_impossible_configurations_are_refused(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(dataclasses.asdict(tiny_config) | change))
