"""The two losses against torch and by hand, and their invariance to padding, packing, microbatches and order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data.batches import Demonstrations, Pairs, padded_demonstrations
from jaxrlhf.data.encode import Encoded
from jaxrlhf.lm import lora
from jaxrlhf.lm.learning import learning, preference_loss, supervised_loss
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.preferences import Choice

SEEDS = st.integers(0, 10_000)


def texts(seed, count):
    """Returns rows of 2 to 9 tokens with completion masks, each of at least one token."""
    source = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(source.integers(2, 10))
        learned = np.arange(length) >= source.integers(1, length)
        rows.append(Encoded(source.integers(1, 23, length).astype(np.int32), learned))
    return rows


def packed(rows, length):
    """Returns all rows packed into one."""
    tokens, segments, learned = (np.zeros((1, length), kind) for kind in (np.int32, np.int32, bool))
    begin = 0
    for number, row in enumerate(rows, start=1):
        here = slice(begin, begin + len(row.tokens))
        tokens[0, here], segments[0, here] = row.tokens, number
        learned[0, here] = row.completion_mask & (np.arange(len(row.tokens)) > 0)
        begin = here.stop
    return Demonstrations(tokens, segments, learned)


def pairs(seed, count, length=9):
    source = np.random.default_rng(seed)
    mask = np.arange(length)[None, None, :] < source.integers(1, length + 1, (count, 2, 1))
    tokens = np.where(mask, source.integers(1, 23, (count, 2, length)), 0).astype(np.int32)
    labels = source.choice([0.0, 0.5, 1.0], count).astype(np.float32)
    margins = source.uniform(0, 1, count).astype(np.float32)
    return Pairs(tokens, mask, mask, labels, margins, np.ones(count, np.float32))


def mean(loss, params, batch):
    totals = loss(params, batch, ())
    return float(totals.loss / totals.weight)


@pytest.fixture(scope="module")
def supervised(tiny):
    model, params = tiny
    return jax.jit(supervised_loss(model)), params


@pytest.fixture(scope="module")
def rewarded(tiny):
    model, trunk = tiny
    reward = reward_model(model)
    head = 0.3 * jax.random.normal(jax.random.key(0), (16,))
    return reward, {"trunk": trunk, "head": head}


def test_the_supervised_loss_equals_that_of_transformers(make_llama, tmp_path):
    torch = pytest.importorskip("torch")
    from jaxrlhf.lm.hugging_face.weights import load_decoder
    from jaxrlhf.lm.transformer.model import decoder

    llama = make_llama()
    llama.save_pretrained(tmp_path)
    config, params = load_decoder(tmp_path)
    batch = padded_demonstrations(texts(0, 6), 12)
    labels = np.where(batch.loss_mask, batch.tokens, -100)
    with torch.no_grad():
        theirs = llama(
            torch.tensor(batch.tokens),
            attention_mask=torch.tensor(batch.segments),
            labels=torch.tensor(labels).long(),
        )
    totals = jax.jit(supervised_loss(decoder(config)))(params, batch, ())
    np.testing.assert_allclose(totals.loss / totals.weight, theirs.loss.item(), rtol=1e-5)
    correct = theirs.logits.argmax(-1).numpy()[:, :-1] == batch.tokens[:, 1:]
    assert int(totals.correct) == int((correct & batch.loss_mask[:, 1:]).sum())
    assert int(totals.weight) == int(batch.loss_mask.sum())


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS)
def test_padding_packing_and_order_do_not_change_the_supervised_loss(supervised, seed):
    loss, params = supervised
    rows = texts(seed, 6)
    plain = mean(loss, params, padded_demonstrations(rows, 9))
    order = np.random.default_rng(seed).permutation(6)
    for other in (
        padded_demonstrations(rows, 31),
        packed(rows, 60),
        padded_demonstrations([rows[index] for index in order], 9),
    ):
        assert mean(loss, params, other) == pytest.approx(plain, rel=1e-5)


@pytest.fixture(scope="module")
def whole_and_split(tiny, rewarded):
    """For both losses: parameters, a batch by seed, and the algorithms with 1 and 3 microbatches."""
    model, params = tiny
    reward, reward_params = rewarded
    cases = (
        (supervised_loss(model), params, lambda seed: padded_demonstrations(texts(seed, 6), 9)),
        (preference_loss(reward), reward_params, lambda seed: pairs(seed, 6)),
    )
    return [
        (start, batch, [jitted(learning(loss, optax.sgd(1.0), microbatches=microbatches)) for microbatches in (1, 3)])
        for loss, start, batch in cases
    ]


def jitted(algorithm):
    return algorithm._replace(update=jax.jit(algorithm.update))


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS)
def test_microbatches_give_the_gradient_of_the_whole_batch(whole_and_split, seed):
    for start, batch_of, (whole, split) in whole_and_split:
        state, info = whole.update(whole.init(start), batch_of(seed))
        split_state, split_info = split.update(split.init(start), batch_of(seed))
        np.testing.assert_allclose(info.loss, split_info.loss, rtol=1e-5)
        np.testing.assert_allclose(info.gradient_norm, split_info.gradient_norm, rtol=1e-5)
        assert float(info.weight) == float(split_info.weight)
        difference = optax.tree.norm(optax.tree.sub(state.params, split_state.params))
        # Parameters of about 1 are rounded to 6e-8.
        assert float(difference) <= 1e-5 * float(info.gradient_norm) + 2e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_preference_loss_follows_its_formula(rewarded, smoothing):
    reward, params = rewarded
    batch = pairs(3, 12)
    scores = np.asarray(reward.score(params, batch.tokens.reshape(-1, 9), batch.mask.reshape(-1, 9))).reshape(-1, 2)
    difference = scores[:, 0].astype(float) - scores[:, 1] - batch.margins
    wins = batch.labels * (1 - smoothing) + (1 - batch.labels) * smoothing
    expected = wins * np.log1p(np.exp(-difference)) + (1 - wins) * np.log1p(np.exp(difference))
    assert mean(preference_loss(reward, smoothing=smoothing), params, batch) == pytest.approx(expected.mean(), rel=1e-5)
    centred = preference_loss(reward, smoothing=smoothing, centre=0.3)
    extra = 0.3 * (scores.sum(axis=1) ** 2).mean()
    assert mean(centred, params, batch) == pytest.approx(expected.mean() + extra, rel=1e-5)


def test_ties_are_the_outcome_of_rao_and_kupper(rewarded):
    reward, params = rewarded
    batch = pairs(4, 16)._replace(margins=np.zeros(16, np.float32))
    scores = np.asarray(reward.score(params, batch.tokens.reshape(-1, 9), batch.mask.reshape(-1, 9))).reshape(-1, 2)
    difference = scores[:, 0].astype(float) - scores[:, 1]
    wins, loses = 1 / (1 + np.exp(-difference + 0.4)), 1 / (1 + np.exp(difference + 0.4))
    probability = np.select([batch.labels == 1, batch.labels == 0], [wins, loses], 1 - wins - loses)
    loss = preference_loss(reward, choice=Choice(tie=0.4))
    assert mean(loss, params, batch) == pytest.approx(-np.log(probability).mean(), rel=1e-5)


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS)
def test_order_padding_and_pairs_without_weight_do_not_change_the_preference_loss(rewarded, seed):
    reward, params = rewarded
    loss = preference_loss(reward, smoothing=0.1, margins=False)
    batch = pairs(seed, 5)
    plain = mean(loss, params, batch)
    swapped = batch._replace(tokens=batch.tokens[:, ::-1], mask=batch.mask[:, ::-1], labels=1 - batch.labels)
    wide = batch._replace(
        tokens=np.pad(batch.tokens, ((0, 0), (0, 0), (0, 7))), mask=np.pad(batch.mask, ((0, 0), (0, 0), (0, 7)))
    )
    filled = jax.tree.map(lambda *leaves: np.concatenate(leaves), batch, pairs(seed + 1, 3))
    filled = filled._replace(weight=np.array([1] * 5 + [0] * 3, np.float32))
    for other in (swapped, wide, filled):
        assert mean(loss, params, other) == pytest.approx(plain, rel=1e-5)


def test_both_losses_can_be_minimised(tiny, rewarded):
    model, params = tiny
    reward, reward_params = rewarded
    cases = [
        (supervised_loss(model), params, padded_demonstrations(texts(1, 4), 9)),
        (preference_loss(reward), reward_params, pairs(1, 4)._replace(labels=np.array([1, 1, 1, 1], np.float32))),
    ]
    for loss, start, batch in cases:
        algorithm = jitted(learning(loss, optax.adam(3e-3)))
        update, state = algorithm.update, algorithm.init(start)
        first = None
        for _ in range(60):
            state, info = update(state, batch)
            first = info if first is None else first
        assert float(info.loss) < 0.5 * float(first.loss)
        assert float(info.accuracy) == 1.0
        assert int(state.step) == 60


def test_adapters_learn_and_the_base_stays(tiny):
    model, base = tiny
    batch = padded_demonstrations(texts(2, 4), 9)
    loss = supervised_loss(model, params_of=lambda adapter, frozen: lora.attach(frozen, adapter))
    algorithm = jitted(learning(loss, optax.adam(1e-2)))
    adapter = lora.init_adapter(jax.random.key(0), base, rank=4)
    update, state = algorithm.update, algorithm.init(adapter)
    losses = []
    for _ in range(40):
        state, info = update(state, batch, base)
        losses.append(float(info.loss))
    assert losses[-1] < 0.5 * losses[0]
    merged = lora.merge(base, state.params)
    plain = jax.jit(supervised_loss(model))
    assert mean(plain, merged, batch) < 0.5 * mean(plain, base, batch)


def test_a_batch_of_weight_zero_changes_nothing(tiny):
    model, params = tiny
    batch = padded_demonstrations(texts(2, 4), 9)
    batch = batch._replace(loss_mask=np.zeros_like(batch.loss_mask))
    algorithm = jitted(learning(supervised_loss(model), optax.sgd(1.0)))
    state, info = algorithm.update(algorithm.init(params), batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert float(info.loss) == 0.0


def test_errors(tiny, rewarded):
    model, params = tiny
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        learning(supervised_loss(model), optax.sgd(1.0), microbatches=0)
    algorithm = learning(supervised_loss(model), optax.sgd(1.0), microbatches=4)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 microbatches"):
        algorithm.update(algorithm.init(params), jnp_batch(padded_demonstrations(texts(0, 6), 9)))
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1/2\), got 0.5"):
        preference_loss(rewarded[0], smoothing=0.5)
    with pytest.raises(ValueError, match="centre must not be negative, got -1"):
        preference_loss(rewarded[0], centre=-1)


def jnp_batch(batch):
    return jax.tree.map(jnp.asarray, batch)
