"""Supervised fine-tuning and reward learning: two losses and one training step.

    algorithm = learning(supervised_loss(model), optimizer)
    algorithm = learning(preference_loss(reward), optimizer)
    state = algorithm.init(params)
    state, info = jax.jit(algorithm.update)(state, batch, frozen)

A loss returns sums, and is averaged over the tokens or pairs that count: padding, the split into microbatches and the
number of devices do not change it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import preferences
from jaxrlhf.base.types import Batch, Params
from jaxrlhf.lm.log_probs import default_chunk_size, token_log_probs
from jaxrlhf.lm.microbatch import default_microbatches, split
from jaxrlhf.lm.reward import RewardModel
from jaxrlhf.lm.transformer.experts import balance_loss, load_of
from jaxrlhf.lm.transformer.model import LanguageModel


class Totals(NamedTuple):
    """Sums over a batch, all `[]`; `loss / weight` is the loss and `correct / weight` the accuracy."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


Loss = Callable[[Params, Batch, Params], Totals]
ParamsOf = Callable[[Params, Params], Params]


Noise = Callable[[Params, jax.Array], Params]
"""`(params, key) -> ` parameters for one evaluation of the loss, such as adapters with a dropout; the key is consumed."""


class LearningState(NamedTuple):
    """Number of updates `[]`, parameters, and the optimiser's state."""

    step: jax.Array
    params: Params
    optimizer: Any


class LearningInfo(NamedTuple):
    """Of the batch, before the update, all `[]`: mean loss in nats, accuracy, their weight, and the gradient's norm."""

    loss: jax.Array
    accuracy: jax.Array
    weight: jax.Array
    gradient_norm: jax.Array


class LearningAlgorithm(NamedTuple):
    """Pure functions.

    Attributes:
        init: `(params) -> LearningState`; copies the parameters.
        update: `(state, batch, frozen) -> (LearningState, LearningInfo)`.
    """

    init: Callable[[Params], LearningState]
    update: Callable[[LearningState, Batch, Params], tuple[LearningState, LearningInfo]]


def full_params(params: Params, frozen: Params) -> Params:
    """Returns `params`: in full fine-tuning the trained parameters are the model's own."""
    del frozen
    return params


def learning(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int | None = None,
    noise: Noise | None = None,
    seed: int = 0,
) -> LearningAlgorithm:
    """Returns the algorithm that minimises `sum of losses / sum of weights` of a batch, in one microbatch or several.

    Args:
        loss: `(params, batch, frozen) -> Totals`.
        optimizer: of the parameters.
        microbatches: into how many a batch is split, one after another, to save memory; by default
            `default_microbatches`.
        noise: of the parameters while they are trained, new for every step and microbatch.
        seed: of the noise.

    Raises:
        ValueError: microbatches < 1; or at trace time, rows that do not divide into the microbatches.
    """
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}.")

    def init(params):
        # Strip weak types, so that the step compiles once.
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), params)
        return LearningState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def totals_and_gradient(params, batch, frozen, step):
        def total_loss(params, rows, part=0):
            if noise is not None:
                params = noise(params, jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), part))
            totals = loss(params, rows, frozen)
            return totals.loss, totals

        gradient_of = jax.grad(total_loss, has_aux=True)
        largest, number = max(jax.tree.leaves(batch), key=jnp.size), microbatches
        if number is None:
            number = default_microbatches(len(largest), largest.size // len(largest))
        if number == 1:
            gradient, totals = gradient_of(params, batch)
            return totals, gradient
        rows = split(batch, number)

        def accumulate(sums, numbered):
            gradient, totals = gradient_of(params, *numbered)
            return jax.tree.map(jnp.add, sums, (totals, gradient)), None

        shapes = jax.eval_shape(lambda: gradient_of(params, jax.tree.map(lambda leaf: leaf[0], rows))[::-1])
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(accumulate, zero, (rows, jnp.arange(number)))[0]

    def update(state, batch, frozen=()):
        totals, gradient = totals_and_gradient(state.params, batch, frozen, state.step)
        # A batch of weight zero gives a zero gradient instead of NaN.
        weight = jnp.maximum(totals.weight, 1e-9)
        gradient = jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        info = LearningInfo(totals.loss / weight, totals.correct / weight, totals.weight, optax.tree.norm(gradient))
        return LearningState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), info

    return LearningAlgorithm(init, update)


def supervised_loss(model: LanguageModel, *, params_of: ParamsOf = full_params, balance: float = 0.0) -> Loss:
    """Returns the negative log-likelihood of the tokens in the loss mask, in nats; its weight is their number.

    With `balance` it adds that times `experts.balance_loss` of each microbatch, which is not a sum over tokens.

    The batch has `tokens`, `segments` and `loss_mask`, `[N, T]`, as `data.batches.Demonstrations`. The accuracy is the
    fraction of those tokens to which the model gives the highest probability.

    Args:
        model: the language model.
        params_of: `(params, frozen) -> the model's parameters`; such as `lambda adapter, base: attach(base, adapter)`.
        balance: weight of the load-balancing loss of a mixture of experts.

    Raises:
        ValueError: there is a balance and the model has no experts.
    """
    if balance and model.routing is None:
        raise ValueError(f"A balance of {balance:g} is for a mixture of experts, which this model is not.")

    def loss(params, batch, frozen):
        params = params_of(params, frozen)
        tokens, counted = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
        uneven = 0.0
        if balance and model.routing is not None and model.experts is not None:
            hidden, probabilities = model.routing(params, batch.tokens, batch.segments)
            uneven = balance_loss(load_of(probabilities, batch.segments, model.experts))
        else:
            hidden = model.hidden(params, batch.tokens, batch.segments)
        chunk_size = default_chunk_size(len(tokens), model.vocabulary_size)
        log_prob, best = token_log_probs(model, params, hidden[:, :-1], tokens, 1.0, chunk_size)
        weight = jnp.sum(counted, dtype=log_prob.dtype)
        cost = balance * weight * uneven - jnp.sum(jnp.where(counted, log_prob, 0.0))
        return Totals(cost, jnp.sum(best & counted, dtype=weight.dtype), weight)

    return loss


def preference_loss(
    reward: RewardModel,
    *,
    smoothing: float = 0.0,
    margins: bool = True,
    choice: preferences.Choice = preferences.BRADLEY_TERRY,
    centre: float = 0.0,
    params_of: ParamsOf = full_params,
) -> Loss:
    """Returns the negative log-likelihood of the labels of pairs, in nats; its weight is the number of pairs.

        d = r(first) - r(second) - margin
        Bradley-Terry:   -z log sigmoid(d) - (1 - z) log sigmoid(-d),    z = label (1 - smoothing) + (1 - label) smoothing

    A tie is the label 1/2: half of each outcome under Bradley-Terry; with `choice.tie` an outcome of its own (Rao and
    Kupper). `centre` adds `centre (r(first) + r(second))^2`, which fixes the level that differences leave free (arXiv
    2312.09244). The accuracy is the fraction of pairs whose preferred text has the higher reward; ties count half.

    Args:
        reward: the reward model.
        smoothing: label smoothing in [0, 1/2), the probability that a label is flipped; robust to what `choice.mistake`
            would model.
        margins: whether to use the batch's margins (arXiv 2307.09288, equation 2).
        choice: model of how the annotator chooses.
        centre: weight of the squared sum.
        params_of: `(params, frozen) -> the reward model's parameters`.

    Raises:
        ValueError: smoothing or centre is out of range.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"Label smoothing must lie in [0, 1/2), got {smoothing:g}.")
    if not centre >= 0:
        raise ValueError(f"centre must not be negative, got {centre:g}.")
    choice.check()

    def loss(params, batch, frozen):
        scores = pair_scores(reward, params_of(params, frozen), batch)
        labels, margin = batch.labels, batch.margins if margins else jnp.zeros_like(batch.margins)
        outcomes = preferences.log_outcomes(scores - jnp.stack([margin, jnp.zeros_like(margin)], axis=1), choice)
        wins = jnp.where(labels == 0.5, labels, labels * (1 - smoothing) + (1 - labels) * smoothing)
        tied = outcomes[:, 1] if choice.tie > 0 else 0.5 * (outcomes[:, 0] + outcomes[:, 2])
        decided = wins * outcomes[:, 2] + (1 - wins) * outcomes[:, 0]
        cost = -jnp.where(labels == 0.5, tied, decided) + centre * jnp.sum(scores, axis=1) ** 2
        return pair_totals(cost, scores, batch)

    return loss


def pair_totals(cost: jax.Array, scores: jax.Array, batch: Batch) -> Totals:
    """Returns the sums of pairs with costs `[N]` and scores `[N, 2]`; ties are half correct."""
    agreed = jnp.where(batch.labels == 0.5, 0.5, (scores[:, 0] > scores[:, 1]) == (batch.labels > 0.5))
    agreed = jnp.where(scores[:, 0] == scores[:, 1], 0.5, agreed)
    weight = batch.weight.astype(cost.dtype)
    return Totals(jnp.sum(weight * cost), jnp.sum(weight * agreed), jnp.sum(weight))


def pair_scores(reward: RewardModel, params: Params, batch: Batch) -> jax.Array:
    """Returns the rewards `[N, 2]` of pairs of texts; `batch` has `tokens` and `mask`, `[N, 2, T]`."""
    length = batch.tokens.shape[-1]
    return reward.score(params, batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)).reshape(-1, 2)
