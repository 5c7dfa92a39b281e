"""What the reward model is said to expect of a pair before people label it, and the mistakes that it allows for."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.base.problem import Labelled, Sample, uniform_measure
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
    [{}, {"method": "grpo"}, {"beta": 0.1}, {"lora_rank": 2}],
    ids=["bilevel", "grpo", "beta", "lora"],
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
    if not settings:
        # Those of a prompt's first pair, as if the reference had given them.
        sample = sample._replace(reference_responses=Responses(*(leaf[:, 0] for leaf in sample.responses)))
    assert setup.forecast is not None
    forecast, win_rate = jax.jit(
        lambda upper: setup.forecast(types.SimpleNamespace(upper=upper), sample, setup.frozen)
    )(setup.upper)

    shape, params = load_reward_model(reward_directory)
    score = jax.jit(reward_model(decoder(shape)).score)
    returns = []
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
            returns += [first, second]
            assert forecast[prompt, pair] == pytest.approx(1 / (1 + np.exp(second - first)), abs=1e-4)
    assert np.ptp(np.asarray(forecast)) > 0.05
    assert (win_rate is None) == bool(settings)
    if win_rate is not None:
        wins = [1 / (1 + np.exp(b - a)) for row in np.reshape(returns, (3, 4)) for a in row for b in row[:2]]
        assert abs(np.mean(wins) - 0.5) > 1e-3
        assert win_rate == pytest.approx(np.mean(wins), abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{"method": "online-dpo"}, {"rewards": ("annotators:score",)}], ids=["dpo", "mixture"]
)
def test_there_is_none_where_no_reward_model_alone_is_the_reward(here, settings):
    config = Align(policy=here / "base", data="pairs.jsonl", annotator="browser", pairs=2, **settings)
    policy = open_model(here / "base", "policy")
    setup = build_setup(config, policy, reward_of(config, policy), ComparisonAnnotator(None, lambda key, sample: None))
    assert setup.forecast is None


def rewards_after(here, rates, **settings):
    """The state after an update, with the optimisers' moments: a step of Adam alone forgets how large a gradient was."""
    config = Align(
        policy=here / "base", data="pairs.jsonl", annotator="browser", pairs=2, batch_size=3, max_new_tokens=5,
        method="iterated", warmup=0, reuse=1, kept_labels=6, max_prompt=4, reward_learning_rate=1e-2, **settings,
    )  # fmt: skip
    policy = open_model(here / "base", "policy")
    annotator = ComparisonAnnotator(None, lambda key, sample: None)
    setup = build_setup(config, policy, reward_of(config, policy), annotator)
    state = setup.algorithm.init(jax.random.key(0), setup.upper, setup.lower)
    labelled = Labelled(sample_of(per_token=False), jnp.array([[[1.0], [0.0]], [[1.0], [1.0]], [[0.0], [-1.0]]]))
    update = jax.jit(setup.algorithm.update)
    frozen = (setup.frozen._replace(annotator=jnp.float32(rate)) for rate in rates)
    return [update(jax.random.key(1), state, labelled, each)[0] for each in frozen]


def test_a_measured_rate_of_mistakes_acts_as_the_same_rate_that_is_set(here):
    measured, none = rewards_after(here, [0.2, 0.0], repeats=0.1)
    (given,) = rewards_after(here, [0.0], mistakes=0.2)
    chex.assert_trees_all_close(measured, given, atol=2e-5)
    moments, others = (jax.tree.leaves((state.inner, state.fitted)) for state in (measured, none))
    assert max(np.abs(np.asarray(a) - b).max() for a, b in zip(moments, others, strict=True)) > 1e-3
