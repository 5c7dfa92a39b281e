"""Direct preference learning on pairs at hand: a pair loss of `algorithms.direct_preference` as a loss of `learning`.

loss = direct_loss(model, dpo(beta=0.1), reference_of=lambda frozen: frozen)
algorithm = learning(loss, optimizer)
state, info = jax.jit(algorithm.update)(algorithm.init(params), batch, params)      # the reference is the start
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.direct_preference import PairLoss
from jaxrlhf.base.problem import Labelled, Sample, uniform_measure
from jaxrlhf.base.types import Batch, Params
from jaxrlhf.lm.learning import Loss, ParamsOf, full_params, pair_totals
from jaxrlhf.lm.log_probs import default_chunk_size, token_log_probs
from jaxrlhf.lm.transformer.model import LanguageModel


class PairScores(NamedTuple):
    """What a pair loss says of pairs, before their weights.

    Attributes:
        cost: `[N]`.
        log_ratio: `[N, 2]`, nats, `log policy / reference` of both completions; without a reference, `log policy`.
        score: `[N, 2]`, by which the loss orders them: the log-ratio, or the log-probability a token without a reference.
    """

    cost: jax.Array
    log_ratio: jax.Array
    score: jax.Array


Scorer = Callable[[Params, Batch, Params], PairScores]
"""`(params, batch, frozen) -> PairScores`; the batch is `data.batches.Pairs`."""


def pair_scorer(
    model: LanguageModel,
    loss: PairLoss,
    *,
    params_of: ParamsOf = full_params,
    reference_of: Callable[[Params], Params] | None = None,
    average: bool = False,
) -> Scorer:
    """Returns the pair loss and what it is computed from, for pairs of texts.

    A completion's log-probability counts all of its tokens, the end-of-text token included; a text's first token, which
    nothing predicts, never counts.

    Args:
        model: the language model.
        loss: `dpo`, `ipo`, `simpo`, or your own.
        params_of: `(params, frozen) -> the policy's parameters`.
        reference_of: `(frozen) -> the reference's parameters`; None counts its log-probabilities as 0, a uniform
            reference.
        average: whether `score` is divided by a completion's number of tokens.
    """

    def log_probs(params, batch):
        tokens, mask, counted = (part.reshape(-1, part.shape[-1]) for part in batch[:3])
        hidden = model.hidden(params, tokens, mask)[:, :-1]
        chunk_size = default_chunk_size(len(tokens), model.vocabulary_size)
        log_prob = token_log_probs(model, params, hidden, tokens[:, 1:], 1.0, chunk_size).log_prob
        counted = counted[:, 1:]
        parts = jnp.where(counted, log_prob, 0.0), counted.astype(log_prob.dtype)
        return tuple(part.reshape(-1, 1, 2, part.shape[-1]) for part in parts)

    def score(params, batch, frozen):
        own, taken = log_probs(params_of(params, frozen), batch)
        reference = jnp.zeros_like(own)
        if reference_of is not None:
            reference = jax.lax.stop_gradient(log_probs(reference_of(frozen), batch)[0])
        measure, num_draws = uniform_measure(len(own), 1)
        sample = Sample((), (), reference, reference, taken, measure, jnp.ones(2), num_draws)
        cost = loss(own, Labelled(sample, batch.labels[:, None, None]))[:, 0]
        log_ratio = jnp.sum(own - reference, axis=-1)[:, 0]
        steps = jnp.maximum(jnp.sum(taken, axis=-1)[:, 0], 1)
        return PairScores(cost, log_ratio, log_ratio / steps if average else log_ratio)

    return score


def direct_loss(scorer: Scorer) -> Loss:
    """Returns the loss of `learning`: the mean cost of the pairs; its weight is their number.

    The accuracy is the fraction of pairs whose preferred completion has the larger score; ties count half.
    """

    def loss(params, batch, frozen):
        cost, _, score = scorer(params, batch, frozen)
        return pair_totals(cost, score, batch)

    return loss
