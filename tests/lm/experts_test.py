"""A mixture of experts against loops over tokens and against transformers; its load, its shards, and no adapters on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.data.batches import Demonstrations
from jaxrlhf.lm import lora
from jaxrlhf.lm.hugging_face.adapters import maps_of
from jaxrlhf.lm.hugging_face.families import config_from
from jaxrlhf.lm.hugging_face.files import WeightsError
from jaxrlhf.lm.learning import supervised_loss
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.lm.transformer.config import DecoderConfig, Experts
from jaxrlhf.lm.transformer.experts import Load, balance_loss, chosen_weights, load_of
from jaxrlhf.lm.transformer.model import decoder

SHAPE = DecoderConfig(
    vocabulary_size=23,
    width=16,
    layers=2,
    query_heads=4,
    key_value_heads=2,
    head_size=6,
    mlp_width=20,
    context_length=64,
    family="mixtral",
    experts=Experts(5, 2),
)


def test_each_token_has_the_sum_of_its_experts(lively):
    """A loop over tokens and their chosen experts, in numpy and double precision, gives the stream of the module."""
    from flax import nnx

    from jaxrlhf.lm.transformer.block import Block

    params = lively(decoder(SHAPE))
    of_layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    block, _ = nnx.split(nnx.eval_shape(lambda: Block(SHAPE, nnx.Rngs(0), frozenset())))
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    for normalised in (True, False):
        mixture = nnx.merge(block, of_layer).experts
        mixture.settings = Experts(5, 2, normalised)
        found, probabilities = mixture(jnp.asarray(x))
        router, gate_up, output = (
            np.asarray(of_layer["experts"][name], float) for name in ("router", "gate_up", "output")
        )
        for row, column in np.ndindex(2, 3):
            token = x[row, column].astype(float)
            logits = token @ router
            chances = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(chances)[-2:]
            total = chances[chosen].sum() if normalised else 1.0
            expected = np.zeros(16)
            for expert in chosen:
                gate, up = token @ gate_up[:, expert, 0], token @ gate_up[:, expert, 1]
                expected += chances[expert] / total * ((gate / (1 + np.exp(-gate)) * up) @ output[expert])
            np.testing.assert_allclose(found[row, column], expected, atol=1e-4)
            np.testing.assert_allclose(probabilities[row, column], chances, atol=1e-5)


def test_the_balance_loss_and_the_load_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    settings = Experts(5, 2)
    load = load_of(jax.nn.softmax(jnp.asarray(logits), axis=-1), jnp.asarray(mask * 3), settings)
    expected = load_balancing_loss_func(
        tuple(torch.tensor(layer.reshape(-1, 5)) for layer in logits), 5, 2, torch.tensor(mask)
    )
    np.testing.assert_allclose(balance_loss(load), float(expected), rtol=1e-5)
    chosen = np.argsort(logits, axis=-1)[..., -2:]
    for layer in range(3):
        assert load.chosen[layer].tolist() == np.bincount(chosen[layer][mask > 0].ravel(), minlength=5).tolist()
    assert float(load.tokens) == 6
    # Even use costs k, the least; all tokens to the same experts cost more.
    even = Load(jnp.full((1, 5), 4.0), jnp.full((1, 5), 2.0), jnp.asarray(10.0))
    assert abs(float(balance_loss(even)) - 2) < 1e-6 < float(balance_loss(load)) - 2


def test_ties_choose_no_more_experts_than_asked_for():
    weights = chosen_weights(jnp.full((4, 5), 0.2), Experts(5, 2))
    assert (weights > 0).sum(-1).tolist() == [2] * 4 and float(jnp.max(jnp.abs(weights.sum(-1) - 1))) < 1e-6


def test_the_gradient_of_the_balance_spreads_the_tokens():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 40, 5)) + np.arange(5), jnp.float32)

    @jax.jit
    def spread(logits):
        return balance_loss(load_of(jax.nn.softmax(logits, axis=-1), jnp.ones((1, 40)), Experts(5, 2)))

    descend, now = jax.jit(jax.grad(spread)), logits
    for _ in range(60):
        now = now - 10 * descend(now)
    assert float(spread(now)) < 2.2 < float(spread(logits)) - 0.5


def test_the_balance_counts_in_the_loss(lively):
    model = decoder(dataclasses.replace(SHAPE, layers=1))
    params = lively(model)
    tokens = np.random.default_rng(0).integers(1, 23, (4, 12)).astype(np.int32)
    segments = np.where(np.arange(12) < 9, 1, 0)[None].repeat(4, axis=0).astype(np.int32)
    batch = Demonstrations(tokens, segments, segments > 0)

    @jax.jit
    def measured(params):
        load = load_of(model.routing(params, tokens, segments)[1], segments, SHAPE.experts)
        plain, weighted = (supervised_loss(model, balance=balance)(params, batch, ()) for balance in (0.0, 2.0))
        return plain, weighted, balance_loss(load)

    plain, weighted, spread = measured(params)
    np.testing.assert_allclose(weighted.loss, plain.loss + 2 * plain.weight * spread, rtol=1e-5)
    assert float(plain.weight) == 4 * 8 and float(spread) > 2.001
    with pytest.raises(ValueError, match="is for a mixture of experts, which this model is not"):
        supervised_loss(decoder(DecoderConfig(23, 16, 1, 2, 2, 8, 16)), balance=1.0)


def test_experts_have_no_adapters(lively):
    params = lively(decoder(SHAPE))
    adapter = lora.init_adapter(jax.random.key(0), params, rank=2)
    assert sorted(adapter["layers"]) == ["attention_output", "query_key_value"]
    assert maps_of(SHAPE, "policy", ("o_proj",)) == {("attention_output",)}
    with pytest.raises(WeightsError, match="no module 'w1' for an adapter; it has k_proj, o_proj, q_proj, v_proj"):
        maps_of(SHAPE, "policy", ("w1",))


def test_a_mesh_splits_experts_or_their_features():
    from jaxrlhf.training.sharding import specification

    class Mesh:
        shape = {"data": 1, "fsdp": 2, "tensor": 2, "stencil": 1}  # noqa: RUF012

    def split(name, *shape):
        return tuple(specification(decoder_names(("layers", "experts", name), shape), shape, Mesh))  # pyright: ignore

    assert split("router", 3, 8, 4) == (None, "fsdp", None)
    assert split("gate_up", 3, 8, 4, 2, 6) == (None, "fsdp", "tensor", None, None)
    assert split("output", 3, 4, 6, 8) == (None, "tensor", None, "fsdp")
    assert split("gate_up", 3, 8, 5, 2, 6) == (None, "fsdp", None, None, "tensor")


QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
REFUSED = {
    "mlp_only_layers": ([1], "sets mlp_only_layers to .* use a model with experts in every layer"),
    "decoder_sparse_step": (2, "sets decoder_sparse_step to 2"),
    "num_experts_per_tok": (5, "needs 1 to 4 chosen experts a token, got 5"),
    "num_experts": ("four", "sets num_experts to 'four': make it a positive whole number"),
    "norm_topk_prob": (1, "sets norm_topk_prob to 1: make it true or false"),
    "architectures": (["OlmoeForCausalLM"], "describes OlmoeForCausalLM: only .*MixtralForCausalLM.* can be read here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_mixture_cannot_be_is_refused_by_name(name):
    assert config_from(QWEN, "policy", "config.json").experts == Experts(4, 2, normalised=False)
    value, message = REFUSED[name]
    with pytest.raises(WeightsError, match=message):
        config_from(QWEN | {name: value}, "policy", "config.json")
