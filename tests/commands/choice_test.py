"""`--choose disagreement`: the pairs that people are asked about, by the reward model's features and the kept labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.base.problem import SKIPPED, Labelled, Sample, uniform_measure
from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.align_inputs import reward_of
from jaxrlhf.commands.align_setup import build_setup
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.methods import ask_about_some, label_chosen
from jaxrlhf.commands.models import open_model
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.steps import cumulative_discount
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.preferences import buffer
from jaxrlhf.training.step import compile_annotator, data_mesh, make_outer_step


def sample_of(seed):
    source = np.random.default_rng(seed)
    mask = np.arange(5) < source.integers(1, 6, (3, 2, 2))[..., None]
    prompts = Prompts(jnp.asarray(source.integers(2, 14, (3, 4))), jnp.ones((3, 4), bool))
    responses = Responses(jnp.asarray(source.integers(2, 14, mask.shape) * mask), jnp.asarray(mask))
    discount = cumulative_discount(responses.mask, jnp.float32, per_token=False)
    measure, draws = uniform_measure(3, 2)
    zeros = jnp.zeros_like(discount)
    return Sample(prompts, responses, zeros, zeros, discount, measure, jnp.ones(2), draws)


def features_of(hidden, params, sample):
    """Differences of the last real token's states, `[6, D]`; `hidden` is a decoder's, compiled."""
    mask = np.asarray(sample.responses.mask).reshape(12, 5)
    prompts = np.repeat(np.asarray(sample.prompts.tokens), 4, axis=0)
    tokens = np.concatenate([prompts, np.asarray(sample.responses.tokens).reshape(12, 5)], axis=1)
    states = hidden(params, tokens, np.concatenate([np.ones_like(prompts, bool), mask], axis=1))
    last = np.asarray(states, np.float64)[np.arange(12), 3 + mask.sum(axis=1)].reshape(6, 2, -1)
    return last[:, 0] - last[:, 1]


def expected(candidates, known, count):
    """The pairs of largest variance under a head of 0, one after the other; inverted outright."""
    prior, chosen = np.mean(np.sum(candidates**2, axis=-1)) / 4, []
    for _ in range(count):
        inverse = np.linalg.inv(prior * np.eye(known.shape[1]) + known.T @ known / 4)
        gain = np.einsum("nd,de,ne->n", candidates, inverse, candidates)
        gain[chosen] = -1
        chosen.append(int(np.argmax(gain)))
        known = np.concatenate([known, candidates[chosen[-1:]]])
    return chosen


def test_pairs_are_chosen_by_the_features_and_the_labels_so_far(here):
    config = Align(
        policy=here / "base", data="pairs.jsonl", annotator="x:y", pairs=2, batch_size=3, max_new_tokens=5, max_prompt=4,
        method="iterated", reuse=1, kept_labels=12, labels_per_step=3, choose="disagreement", microbatches=3,
    )  # fmt: skip
    policy = open_model(here / "base", "policy")
    setup = build_setup(
        config, policy, reward_of(config, policy), ComparisonAnnotator(None, lambda key, sample: None), prompt_length=4
    )
    assert setup.choose is not None
    choose = jax.jit(setup.choose)
    state = setup.algorithm.init(jax.random.key(0), setup.upper, setup.lower)
    sample, first = sample_of(1), sample_of(0)
    hidden = jax.jit(decoder(policy.config).hidden)
    candidates, known = (features_of(hidden, policy.params, each) for each in (sample, first))
    assert choose(state, sample, setup.frozen).tolist() == expected(candidates, known[:0], 3)
    labels = jnp.array([[1.0, SKIPPED], [0.5, 0.0], [SKIPPED, 1.0]])[..., None]
    state = state._replace(buffer=buffer.add(state.buffer, Labelled(first, labels)))
    after = expected(candidates, known[[0, 2, 3, 5]], 3)
    assert choose(state, sample, setup.frozen).tolist() == after
    # Of pairs that were labelled already, none is worth as much as before.
    state = state._replace(buffer=buffer.add(state.buffer, Labelled(sample, jnp.ones((3, 2, 1)))))
    again = expected(candidates, np.concatenate([known[[0, 2, 3, 5]], candidates]), 3)
    assert choose(state, sample, setup.frozen).tolist() == again


def outer_step(annotate=None, traced=None):
    sample = sample_of(0)
    algorithm = Algorithm(
        init=lambda *arguments: None,
        step=lambda *arguments: None,
        propose=lambda key, state, data, frozen: sample,
        update=lambda key, state, labelled, frozen: (state, np.asarray(labelled.labels)),
    )
    choose = lambda state, sample, frozen: jnp.array([4, 1])  # noqa: E731
    step = make_outer_step(algorithm, annotate, traced=traced, choose=choose)
    return sample, step(jax.random.key(0), None, None, ())[1]


@pytest.mark.parametrize("kind", ["host", "traced"])
def test_chosen_pairs_alone_are_labelled(kind):
    asked = []

    def host(key, shown):
        asked.append(np.asarray(shown.responses.tokens[:, 0]))
        return jnp.array([1.0, 0.0])[:, None, None]

    def traced(key, sample, frozen):
        return jnp.arange(6.0).reshape(3, 2, 1) / 8

    if kind == "host":
        sample, labels = outer_step(annotate=ask_about_some(host, 2))
        wanted = {4: 1.0, 1: 0.0}
        tokens = np.asarray(sample.responses.tokens).reshape(6, 2, -1)
        np.testing.assert_array_equal(asked[0], tokens[[4, 1]])
    else:
        mesh = data_mesh(jax.devices()[:1])
        _, labels = outer_step(traced=compile_annotator(label_chosen(traced), mesh, further=1))
        wanted = {4: 0.5, 1: 0.125}
    np.testing.assert_array_equal(labels.ravel(), [wanted.get(place, SKIPPED) for place in range(6)])
