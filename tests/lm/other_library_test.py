"""A Flax NNX decoder of another library as a `LanguageModel`: Tunix's Llama 3, sampled, scored and aligned unchanged.

Tunix is not a dependency: the test is skipped unless `google-tunix` is installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrlhf.bilevel import bilevel_descent, central, tangent
from jaxrlhf.lm.generate import Generation, generate
from jaxrlhf.lm.language import alphabet_gold, alphabet_language
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import LanguageModel, without_cache
from jaxrlhf.lm.transformer.positions import positions_of
from jaxrlhf.objectives import add, likelihood, utility
from jaxrlhf.preferences import gold_annotator

llama3 = pytest.importorskip("tunix.models.llama3.model", reason="google-tunix is not installed", exc_type=ImportError)


def tunix_llama(config) -> LanguageModel:
    """All the code that this model needs: its forward pass up to the final norm, and its logits."""
    structure, _ = nnx.split(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))

    def init(key):
        return nnx.to_pure_dict(nnx.state(llama3.Llama3(config, rngs=nnx.Rngs(key))))

    def hidden(params, tokens, mask):
        module, columns = nnx.merge(structure, params), jnp.arange(tokens.shape[1])
        allowed = mask[:, None, :] & (columns[None, :, None] >= columns[None, None, :])
        x, positions = module.embedder.encode(tokens), positions_of(mask)
        for layer in module.layers:
            _, x = layer(x, positions, None, allowed)
        return module.final_norm(x)

    def logits(params, hidden):
        module = nnx.merge(structure, params)
        head = module.embedder.decode if config.weight_tying else module.lm_head
        return head(hidden).astype(jnp.float32)

    return without_cache(init, hidden, logits, vocabulary_size=config.vocab_size, context_length=64)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Tunix adds arrays of different ranks, which is an error in our tests otherwise."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def config():
    return llama3.ModelConfig(
        num_layers=2,
        vocab_size=5,
        embed_dim=16,
        hidden_dim=32,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )


def test_logits_are_unchanged_and_the_sampler_agrees(config):
    model = tunix_llama(config)
    params = model.init(jax.random.key(0))
    module = llama3.Llama3(config, rngs=nnx.Rngs(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 5)
    allowed = jnp.tril(jnp.ones((7, 7), bool))[None].repeat(2, axis=0)
    theirs, _ = module(tokens, jnp.arange(7)[None].repeat(2, axis=0), None, allowed)
    ours = model.logits(params, model.hidden(params, tokens, jnp.ones((2, 7), bool)))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    mask = jnp.arange(7)[None, :] >= jnp.array([[0], [3]])
    completions = generate(model, params, jax.random.key(2), tokens, mask, max_new_tokens=6, stop_ids=(0,))
    log_prob = completion_log_probs(model, params, tokens, mask, completions.tokens, completions.mask)
    np.testing.assert_allclose(completions.log_prob, log_prob, atol=1e-4)


def test_it_can_be_aligned(config):
    model = tunix_llama(config)
    language = alphabet_language(letters=4, length=3, prompts=2)
    base = model.init(jax.random.key(0))
    reward = reward_model(model, unused=())
    problem = language_problem(
        model,
        reward,
        add(likelihood(coupled=False), utility(kl_price=0.05)),
        pairs=4,
        generation=Generation(3, stop_ids=(0,)),
    )
    gold = gold_annotator(lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses, letters=4))
    algorithm = bilevel_descent(
        problem,
        central(relative_sigma=0.2),
        tangent(optax.adam(3e-3), optax.adam(1e-4)),
        optax.adam(1e-3),
        beta=0.3,
        annotate=gold,
    )
    state = algorithm.init(jax.random.key(0), reward.from_trunk(base), base)
    step = jax.jit(algorithm.step)
    for number in range(3):
        state, info = step(jax.random.key(number), state, language.prompts, LanguageFrozen(base))
    assert float(info.labels) == 8
    assert float(info.coupling_fraction) > 0
    moved = jax.tree.map(lambda one, other: jnp.max(jnp.abs(one - other)), state.policy, base)
    assert max(float(leaf) for leaf in jax.tree.leaves(moved)) > 1e-3
