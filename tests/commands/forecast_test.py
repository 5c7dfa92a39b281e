"""What the reward model is said to expect of a pair before people label it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.base.problem import Sample, uniform_measure
from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.align_inputs import reward_of
from jaxrlhf.commands.align_setup import build_setup
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.models import open_model, reward_on, save_model
from jaxrlhf.lm.hugging_face.weights import load_reward_model
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.steps import cumulative_discount
from jaxrlhf.lm.transformer.model import decoder


@pytest.fixture(scope="module")
def reward_directory(world):
    """A reward model whose head is not zero."""
    model = reward_on(open_model(world / "base", "policy"))
    head = 0.1 * jax.random.normal(jax.random.key(3), model.params["head"].shape)
    return save_model(world / "forecast-reward", model._replace(params=model.params | {"head": head}), "reward")


def sample_of(per_token):
    source = np.random.default_rng(0)
    lengths = source.integers(1, 6, (3, 2, 2))
    mask = np.arange(5) < lengths[..., None]
    prompts = Prompts(jnp.asarray(source.integers(2, 14, (3, 4))), jnp.ones((3, 4), bool))
    responses = Responses(jnp.asarray(source.integers(2, 14, mask.shape) * mask), jnp.asarray(mask))
    discount = cumulative_discount(responses.mask, jnp.float32, per_token=per_token)
    zeros, (measure, draws) = jnp.zeros_like(discount), uniform_measure(3, 2)
    return Sample(prompts, responses, zeros, zeros, discount, measure, jnp.ones(2), draws)


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "grpo"}, {"learn_scale": True}, {"lora_rank": 2}],
    ids=["bilevel", "grpo", "scale", "lora"],
)
def test_the_forecast_is_the_reward_models_probability_that_the_first_is_preferred(here, reward_directory, settings):
    config = Align(
        policy=here / "base", data="pairs.jsonl", annotator="browser", reward=reward_directory, pairs=2, max_new_tokens=5,
        **settings,
    )  # fmt: skip
    policy = open_model(here / "base", "policy")
    annotator = ComparisonAnnotator(None, lambda key, sample: None)
    setup = build_setup(config, policy, reward_of(config, policy), annotator)
    sample = sample_of(per_token=settings.get("method") == "grpo")
    assert setup.forecast is not None
    forecast = setup.forecast(types.SimpleNamespace(upper=setup.upper), sample, setup.frozen)

    shape, params = load_reward_model(reward_directory)
    score = reward_model(decoder(shape)).score
    for prompt in range(3):
        for pair in range(2):
            # Each response alone, without padding.
            tokens = [
                np.concatenate([sample.prompts.tokens[prompt], np.asarray(row)[np.asarray(real)]])[None]
                for row, real in zip(
                    sample.responses.tokens[prompt, pair], sample.responses.mask[prompt, pair], strict=True
                )
            ]
            first, second = (float(score(params, row, np.ones_like(row, bool))[0]) for row in tokens)
            assert forecast[prompt, pair] == pytest.approx(1 / (1 + np.exp(second - first)), abs=1e-4)
    assert np.ptp(np.asarray(forecast)) > 0.05


@pytest.mark.parametrize(
    "settings", [{"method": "online-dpo"}, {"rewards": ("annotators:score",)}], ids=["dpo", "mixture"]
)
def test_there_is_none_where_no_reward_model_alone_is_the_reward(here, settings):
    config = Align(policy=here / "base", data="pairs.jsonl", annotator="browser", pairs=2, **settings)
    policy = open_model(here / "base", "policy")
    setup = build_setup(config, policy, reward_of(config, policy), ComparisonAnnotator(None, lambda key, sample: None))
    assert setup.forecast is None
