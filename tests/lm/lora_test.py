"""Adapters: the base at initialisation, the sum when merged, small in memory, and the same algorithm."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.bilevel import bilevel_descent, central, tangent
from jaxrlhf.data.batches import Demonstrations
from jaxrlhf.lm import lora
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.hugging_face.weights import load_decoder, save_decoder
from jaxrlhf.lm.language import (
    alphabet_gold,
    alphabet_language,
    evaluate_language,
    policy_table,
    reward_table,
    table_of,
)
from jaxrlhf.lm.learning import learning, supervised_loss
from jaxrlhf.lm.memory import plan_bilevel, plan_of, tree_bytes
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer import layers
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.objectives import add, likelihood, utility
from jaxrlhf.preferences import gold_annotator

LLAMA_1B = DecoderConfig(
    vocabulary_size=128256,
    width=2048,
    layers=16,
    query_heads=32,
    key_value_heads=8,
    head_size=64,
    mlp_width=8192,
    rope_base=500000.0,
)
"""Llama 3.2 1B."""


def lively_adapter(base, rank, seed=0, scale=0.2):
    adapter = lora.init_adapter(jax.random.key(seed), base, rank=rank)
    return optax.tree.random_like(jax.random.key(seed), adapter, functools.partial(_scaled, scale))


def _scaled(scale, key, shape, dtype):
    return scale * jax.random.normal(key, shape, dtype)


def logits_of(model, params, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (2, 7), 0, 23)
    return model.logits(params, model.hidden(params, tokens, jnp.ones(tokens.shape, bool)))


def test_a_new_adapter_is_the_base_and_a_merged_one_the_sum(tiny, tiny_config, tmp_path):
    model, params = tiny
    new = lora.init_adapter(jax.random.key(0), params, rank=3)
    np.testing.assert_array_equal(logits_of(model, lora.attach(params, new)), logits_of(model, params))
    adapter = lively_adapter(params, 3)
    attached, merged = logits_of(model, lora.attach(params, adapter)), lora.merge(params, adapter)
    assert float(jnp.max(jnp.abs(attached - logits_of(model, params)))) > 0.5
    np.testing.assert_allclose(logits_of(model, merged), attached, atol=2e-4)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    save_decoder(tmp_path, tiny_config, merged)
    np.testing.assert_array_equal(logits_of(model, load_decoder(tmp_path)[1]), logits_of(model, merged))


def test_adapters_are_vmapped_over_one_base(tiny):
    model, params = tiny
    several = [lively_adapter(params, 2, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    together = jax.vmap(lambda adapter: logits_of(model, lora.attach(params, adapter)))(stacked)
    for logits, adapter in zip(together, several, strict=True):
        np.testing.assert_allclose(logits, logits_of(model, lora.merge(params, adapter)), atol=5e-4)


def test_dropout_keeps_the_mean_of_what_it_drops():
    """Through an adapter that is the identity: zeros at the rate, all else scaled up, and layers differ."""
    from flax import nnx

    from jaxrlhf.lm.transformer.modules import Linear

    structure, _ = nnx.split(nnx.eval_shape(lambda: Linear(nnx.Rngs(0), (16, 16), adapted=True, dropout=True)))
    layers = {"down": jnp.stack([jnp.eye(16)] * 2), "up": jnp.stack([jnp.eye(16)] * 2)}
    dropped = lora.with_dropout({"map": layers}, jax.random.key(0), 0.25)["map"]
    x = jax.random.normal(jax.random.key(1), (20, 30, 16))
    first, second = (
        nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], dropped) | {"weight": jnp.zeros((16, 16))})(x)
        for i in range(2)
    )
    zeros = first == 0
    assert abs(float(jnp.mean(zeros)) - 0.25) < 0.02
    np.testing.assert_allclose(first[~zeros], x[~zeros] / 0.75, rtol=1e-6)
    assert not np.array_equal(zeros, second == 0)


def test_training_with_dropout_depends_on_the_step_and_its_microbatches(tiny):
    """Each step and microbatch has noise of its own, the same after a resumption; the gradient flows through it."""
    model, params = tiny
    adapter = lively_adapter(params, 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 23, (2, 6)).astype(np.int32))
    batch = Demonstrations(*(jnp.concatenate([leaf] * 2) for leaf in (tokens, tokens * 0 + 1, tokens > 0)))
    loss = supervised_loss(model, params_of=lambda adapter, base: lora.attach(base, adapter))
    noise = functools.partial(lora.with_dropout, rate=0.5)
    algorithm = learning(loss, optax.sgd(0.0), microbatches=2, noise=noise, seed=3)
    update = jax.jit(algorithm.update)
    state = algorithm.init(adapter)
    (later, first), (_, same) = update(state, batch, params), update(state, batch, params)
    _, second = update(later, batch, params)
    assert float(first.loss) == float(same.loss) != float(second.loss)
    by_hand, compute = [], jax.jit(loss)
    for part in range(2):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), part)
        rows = jax.tree.map(lambda leaf, part=part: leaf[part::2], batch)
        totals = compute(noise(adapter, key), rows, params)
        by_hand.append(float(totals.loss / totals.weight))
    assert float(first.loss) == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert by_hand[0] != by_hand[1] and float(first.gradient_norm) > 0


def test_float32_adapters_keep_small_differences_on_a_bfloat16_base(tiny):
    model, params = tiny
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapter = lively_adapter(params, 2)
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-4), adapter)
    before, after = (logits_of(model, lora.attach(half, each)) for each in (adapter, moved))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    exact_before, exact_after = (logits_of(model, lora.attach(wide, each)) for each in (adapter, moved))
    assert before.dtype == jnp.float32
    np.testing.assert_allclose(after - before, exact_after - exact_before, atol=2e-5)
    assert float(jnp.max(jnp.abs(exact_after - exact_before))) > 1e-4


def test_an_untrained_policy_equals_its_reference_on_a_bfloat16_base():
    shape = DecoderConfig(5, 16, 2, 2, 1, 8, 32, context_length=8)
    gold = gold_annotator(lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses, letters=4))
    algorithm, start = assembled(shape, jnp.bfloat16, 2, annotate=gold)
    base, upper, adapter = start(jax.random.key(0))
    prompts = alphabet_language(letters=4, length=3, prompts=2).prompts
    state = algorithm.init(jax.random.key(0), upper, adapter)
    sample = jax.jit(algorithm.propose)(jax.random.key(1), state, prompts, LanguageFrozen(base))
    np.testing.assert_allclose(sample.behaviour_log_prob[:, :, 0], sample.reference_log_prob[:, :, 0], atol=1e-5)


def test_other_models_and_ranks_are_refused(tiny):
    _, params = tiny
    with pytest.raises(ValueError, match="rank of an adapter must be at least 1, got 0"):
        lora.init_adapter(jax.random.key(0), params, rank=0)
    with pytest.raises(ValueError, match="no layers with products"):
        lora.init_adapter(jax.random.key(0), {"weights": jnp.ones(3)}, rank=1)


def assembled(shape, base_dtype, rank, **settings):
    """Returns the algorithm with adapters on a base, as in `align`."""
    policy = decoder(shape, dtype=jnp.float32)
    reward = reward_model(policy)
    problem = language_problem(
        policy,
        reward,
        add(likelihood(coupled=False), utility(kl_price=0.05)),
        pairs=4,
        generation=Generation(3, stop_ids=(0,)),
        policy_params=lora.policy_on_reference,
        reward_params=lora.reward_on_reference,
    )
    solver = tangent(optax.adam(5e-3), optax.adam(1e-3))
    algorithm = bilevel_descent(problem, central(relative_sigma=0.2), solver, optax.adam(1e-2), beta=0.3, **settings)

    def start(key):
        base = jax.tree.map(lambda leaf: leaf.astype(base_dtype), policy.init(key))
        adapter = lora.init_adapter(key, base, rank=rank)
        upper = {
            "adapter": lora.init_adapter(jax.random.fold_in(key, 1), base, rank=rank),
            "head": jnp.zeros(shape.width),
        }
        return base, upper, adapter

    return algorithm, start


def test_the_state_of_a_1b_llama_takes_at_most_a_quarter_more_than_its_base():
    algorithm, start = assembled(LLAMA_1B, jnp.bfloat16, 16)
    base, upper, adapter = jax.eval_shape(start, jax.random.key(0))
    plan = plan_bilevel(algorithm.init, jax.random.key(0), upper, adapter, LanguageFrozen(base))
    assert 2.4e9 < plan.sizes["reference"] < 2.5e9
    assert plan.relative_to() <= 1.25


def test_the_plan_equals_the_size_of_the_arrays():
    shape = DecoderConfig(
        vocabulary_size=64, width=48, layers=2, query_heads=4, key_value_heads=2, head_size=12, mlp_width=96
    )
    algorithm, start = assembled(shape, jnp.bfloat16, 4)
    base, upper, adapter = jax.jit(start)(jax.random.key(0))
    frozen = LanguageFrozen(base)
    plan = plan_bilevel(algorithm.init, jax.random.key(0), upper, adapter, frozen)
    # Kept alive, so that no array of the state gets the id of one that is collected meanwhile.
    before = jax.live_arrays()
    known = {id(array) for array in before}
    state = algorithm.init(jax.random.key(0), upper, adapter)
    measured = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
    assert measured == plan.total - plan.sizes["reference"]
    assert plan == plan_of(state, frozen)
    assert plan.sizes["reference"] == sum(leaf.nbytes for leaf in jax.tree.leaves(base)) == tree_bytes(base)


@pytest.mark.slow
def test_the_plan_equals_the_size_of_a_1b_llama():
    algorithm, start = assembled(LLAMA_1B, jnp.bfloat16, 16)
    shapes = jax.eval_shape(start, jax.random.key(0))
    base, upper, adapter = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = algorithm.init(jax.random.key(0), upper, adapter)
    measured = sum(leaf.nbytes for leaf in jax.tree.leaves((state, base)))
    plan = plan_bilevel(algorithm.init, jax.random.key(0), upper, adapter, LanguageFrozen(base))
    assert measured == plan.total <= 1.25 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


@pytest.mark.slow
def test_bilevel_descent_on_adapters_improves_the_exact_value():
    language = alphabet_language(letters=4, length=3, prompts=2, prompt_length=2)
    shape = DecoderConfig(
        vocabulary_size=5,
        width=16,
        layers=1,
        query_heads=2,
        key_value_heads=1,
        head_size=8,
        mlp_width=32,
        context_length=8,
    )
    gold = gold_annotator(lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses, letters=4))
    algorithm, start = assembled(shape, jnp.float32, 4, annotate=gold)
    base, upper, adapter = start(jax.random.key(0))
    frozen, policy = LanguageFrozen(base), decoder(shape)
    state = algorithm.init(jax.random.key(0), upper, adapter)

    def train(key, state):
        def step(state, key):
            return algorithm.step(key, state, language.prompts, frozen)

        return jax.lax.scan(step, state, jax.random.split(key, 150))

    state, _ = jax.jit(train)(jax.random.key(1), state)
    truth = table_of(lambda prompts, responses: alphabet_gold(prompts, responses, letters=4), language)
    reference = policy_table(policy, base, language)
    tuned = policy_table(policy, lora.attach(base, state.policy), language)
    learned = reward_table(reward_model(policy), lora.reward_on_reference(state.upper, frozen), language)
    objective = add(likelihood(coupled=False), utility(kl_price=0.05))
    evaluation = evaluate_language(tuned, reference, learned, truth, objective, beta=0.3)
    start_value = evaluate_language(reference, reference, learned, truth, objective, beta=0.3)
    assert float(evaluation.policy.true_return) > float(start_value.policy.true_return) + 0.5
    np.testing.assert_allclose(policy_table(policy, lora.merge(base, state.policy), language), tuned, atol=1e-4)


def test_adapters_have_the_derivatives_of_plain_products():
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = [(2, 5, 6), (6, 3), (3, 4)]
    arguments, directions = ([jax.random.normal(key, shape) for key, shape in zip(some, shapes, strict=True)]
                             for some in (keys[:3], keys[3:6]))  # fmt: skip
    weights = jax.random.normal(keys[6], (2, 5, 4))

    def derivatives(function):
        def loss(*arguments):
            return jnp.sum(weights * jnp.sin(function(*arguments)))

        gradient = jax.grad(loss, argnums=(0, 1, 2))
        alone = [jax.grad(loss, argnums=number)(*arguments) for number in range(3)]
        # Forward over reverse, as the implicit rule has it.
        return gradient(*arguments), alone, jax.jvp(gradient, arguments, directions)

    plain = derivatives(lambda x, down, up: x @ down @ up)
    chex.assert_trees_all_close(derivatives(layers.low_rank), plain, rtol=1e-5, atol=1e-5)
