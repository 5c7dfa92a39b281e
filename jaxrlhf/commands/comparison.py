"""Comparisons of a policy with its reference by an annotator's labels."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf.annotation.functions import texts_of
from jaxrlhf.base.problem import SKIPPED, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.commands.annotators import ComparisonAnnotator
from jaxrlhf.commands.models import Model
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.evaluation.statistics import clustered_interval
from jaxrlhf.lm.generate import Completions, Generation, generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.transformer.model import LanguageModel, decoder
from jaxrlhf.training.processes import gathered
from jaxrlhf.training.report import Table
from jaxrlhf.training.step import put_on_devices

BATCH_SIZE = 64
"""Prompts completed together."""

Complete = Callable[[Params, Params, Key, Prompts], tuple[Completions, jax.Array]]
"""`(params, reference params, key, prompts) -> ` completions and `log pi / pi_ref` `[N]` in nats."""
Respond = Callable[[int, Key, Prompts], tuple[Completions, np.ndarray]]
"""`(number of the first prompt, key, prompts) -> ` completions to compare with the reference's, and log-ratios `[N]`."""
LabelFunction = Callable[[Key, Sample], np.ndarray]
"""`(key, sample) -> labels [N]`, one pair per prompt."""


class Comparison(NamedTuple):
    """A policy compared with its reference on the same prompts.

    Attributes:
        wins: `[N]` labels, 1 where the policy's completion was preferred, NaN where there is no label.
        log_ratio: `[N]` nats, log pi / pi_ref of the policy's completions; their mean estimates the KL.
        lengths: `[N, 2]` tokens of the policy's and the reference's completions.
        samples: (prompt, (reference's completion, policy's completion)).
    """

    wins: np.ndarray
    log_ratio: np.ndarray
    lengths: np.ndarray
    samples: list[tuple[str, tuple[str, str]]]

    def summary(self) -> dict[str, float]:
        """Returns means, the half-widths of their 95% intervals, and the numbers of ties and of pairs without a label.

        Completions of one prompt depend on each other: intervals are over prompts (`clustered_interval`).
        """
        prompts, labelled = [prompt for prompt, _ in self.samples], np.isfinite(self.wins)
        columns = {"win_rate": self.wins, "kl": self.log_ratio, "length": self.lengths[:, 0]}
        summary = {}
        for name, values in columns.items():
            rows = np.flatnonzero(labelled) if name == "win_rate" else np.arange(len(values))
            mean, half = math.nan, math.nan
            if len(rows):
                mean, half = clustered_interval(values[rows], [prompts[row] for row in rows])
            summary[name], summary[f"{name}_half_interval"] = mean, half
        return summary | {"ties": float(np.sum(self.wins == 0.5)), "unlabelled": float(np.sum(np.isnan(self.wins)))}

    def labels_note(self) -> str:
        """Returns a sentence on its labels."""
        ties, missing = (int(self.summary()[name]) for name in ("ties", "unlabelled"))
        return f"{len(self.wins)} pairs were compared: {ties} ties, {missing} without a label."


class Comparer(NamedTuple):
    """Comparisons with a reference on the same prompts and with the same completions of the reference.

    Attributes:
        compare: `(respond) -> Comparison`.
        complete: samples completions, and computes their log-ratios; compiled once.
    """

    compare: Callable[[Respond], Comparison]
    complete: Complete


def policy_comparer(
    reference: Model,
    prompts: Sequence[np.ndarray],
    annotator: ComparisonAnnotator,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    everywhere: Any = None,
) -> Callable[[Params], Comparison]:
    """Returns `(params) -> Comparison`: a policy against its reference, with one completion of each per prompt.

    The arguments are those of `open_comparer`.
    """
    comparer = open_comparer(
        reference,
        prompts,
        annotator,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        everywhere=everywhere,
    )
    return lambda params: comparer.compare(policy_responder(comparer, params, reference.params))


def policy_responder(comparer: Comparer, params: Params, reference_params: Params) -> Respond:
    """Returns what samples a policy's completions."""
    return lambda start, key, rows: gathered(comparer.complete(params, reference_params, key, rows))


def open_comparer(
    reference: Model,
    prompts: Sequence[np.ndarray],
    annotator: ComparisonAnnotator,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    everywhere: Any = None,
) -> Comparer:
    """Returns what compares completions with the reference's.

    Args:
        reference: the model, with the reference's parameters.
        prompts: token rows `[P]`.
        annotator: labels the pairs; the order in which it sees the two completions is random.
        max_new_tokens: of a completion.
        seed: of completions and order; the same at every call.
        temperature: of both.
        everywhere: sharding of copies on all devices, where parameters are spread over several.
    """
    complete = _completer(reference, max_new_tokens=max_new_tokens, temperature=temperature)
    label, tokenizer = _label_function(annotator), reference.bundle.tokenizer
    length, rows_of_batch = max(len(prompt) for prompt in prompts), min(BATCH_SIZE, len(prompts))
    # The reference completes the same prompts with the same keys at every call.
    references: dict[int, Completions] = {}

    def compare(respond: Respond) -> Comparison:
        batches = []
        for start in range(0, len(prompts), BATCH_SIZE):
            policy_key, reference_key, order_key, label_key = jax.random.split(jax.random.key(seed + start), 4)
            batch = list(prompts[start : start + BATCH_SIZE])
            # All batches have one shape: the last is filled up with its first prompt.
            padded = padded_prompts(batch + batch[:1] * (rows_of_batch - len(batch)), length)
            rows = Prompts(*(jnp.asarray(part) for part in padded))
            if everywhere is not None:
                rows, policy_key, reference_key = put_on_devices((rows, policy_key, reference_key), everywhere)
            own, log_ratio = respond(start, policy_key, rows)
            if start not in references:
                references[start], _ = gathered(complete(reference.params, reference.params, reference_key, rows))
            completed = _Completed(gathered(rows), own, references[start], log_ratio)
            # Filler is not shown to the annotator: labels may cost money.
            completed = _first(len(batch), completed)
            batches.append(_compare(completed, label, order_key, label_key, tokenizer))
        arrays = [np.concatenate(column) for column in zip(*(batch[:3] for batch in batches), strict=True)]
        return Comparison(*arrays, samples=[sample for batch in batches for sample in batch.samples])

    return Comparer(compare, complete)


class _Completed(NamedTuple):
    """Completions of `[N]` prompts by the policy and by the reference, and the policy's `log pi / pi_ref` `[N]`."""

    prompts: Prompts
    policy: Completions
    reference: Completions
    log_ratio: np.ndarray


def _first(count: int, completed: _Completed) -> _Completed:
    return jax.tree.map(lambda leaf: leaf[:count], completed)


def _completer(reference: Model, *, max_new_tokens: int, temperature: float) -> Complete:
    # Log-ratios in half precision would be rounding noise, of about 0.2 nats over a hundred tokens.
    model, bundle = decoder(reference.config, dtype=jnp.float32), reference.bundle
    generation = Generation(max_new_tokens, bundle.stop_ids, temperature, bundle.pad_id)
    # The first prompts are completed in the same way whether or not others follow.
    return functools.partial(_complete, model, generation, BATCH_SIZE)


# Compiled once for a decoder, its settings and the shapes of the prompts.
@functools.partial(jax.jit, static_argnames=("model", "generation", "drawn_rows"))
def _complete(
    model: LanguageModel,
    generation: Generation,
    drawn_rows: int,
    params: Params,
    reference_params: Params,
    key: Key,
    rows: Prompts,
) -> tuple[Completions, jax.Array]:
    completions = generate(model, params, key, *rows, **generation._asdict(), drawn_rows=drawn_rows)
    tokens, mask, log_prob = completions
    reference_log_prob = completion_log_probs(
        model, reference_params, *rows, tokens, mask, temperature=generation.temperature
    )
    return completions, jnp.sum(log_prob, axis=-1) - jnp.sum(reference_log_prob, axis=-1)


def _label_function(annotator: ComparisonAnnotator) -> LabelFunction:
    if annotator.people is not None and not annotator.people.evaluates:
        return lambda key, sample: np.full(len(sample.measure), SKIPPED, np.float32)
    if annotator.traced is None:
        host = annotator.host
        assert host is not None
        return lambda key, sample: np.asarray(host(key, sample))[:, 0, 0]
    traced, frozen = jax.jit(annotator.traced), LanguageFrozen((), annotator.params)
    return lambda key, sample: np.asarray(traced(key, sample, frozen))[:, 0, 0]


def _compare(
    completed: _Completed, label: LabelFunction, order_key: Key, label_key: Key, tokenizer: tokenizers.Tokenizer
) -> Comparison:
    rows, own, other, log_ratio = completed
    swapped = jax.random.bernoulli(order_key, 0.5, (len(log_ratio), 1))
    labels = label(label_key, _sample(rows, *_in_order(own, other, swapped)))
    labels = np.where(np.asarray(swapped)[:, 0], 1 - labels, labels)
    wins = np.where((labels < 0) | (labels > 1), np.nan, labels)
    lengths = np.stack([np.asarray(each.mask).sum(axis=1) for each in (own, other)], axis=1)
    texts = zip(*texts_of(tokenizer, _sample(rows, own, other)), strict=True)
    samples = [(prompt, (reference, policy)) for prompt, policy, reference in texts]
    return Comparison(wins, np.asarray(log_ratio), lengths, samples)


def _sample(rows: Prompts, first: Any, second: Any) -> Sample:
    tokens = jnp.stack([first[0], second[0]], axis=1)[:, None]
    mask = jnp.stack([first[1], second[1]], axis=1)[:, None]
    zeros = jnp.zeros((len(tokens), 1, 2, 1))
    measure, num_draws = uniform_measure(len(tokens), 1)
    return Sample(rows, Responses(tokens, mask), zeros, zeros, zeros + 1, measure, jnp.ones(2), num_draws)


def _in_order(own: Completions, other: Completions, swapped: jax.Array) -> tuple[list, list]:
    """Returns tokens and mask of the completions shown first and second: the policy's first unless `swapped`."""
    pairs = list(zip(own[:2], other[:2], strict=True))
    first = [jnp.where(swapped, theirs, ours) for ours, theirs in pairs]
    return first, [jnp.where(swapped, ours, theirs) for ours, theirs in pairs]


def comparison_table(comparisons: dict[str, Comparison], *, labels: dict[str, int]) -> Table:
    """Returns the policies as rows, with 95% intervals.

    Args:
        comparisons: by the policy's name.
        labels: labels that a policy was trained with, where known.
    """
    rows = []
    for name, comparison in comparisons.items():
        summary = comparison.summary()
        cells = [f"{summary[field]:.3f} ± {summary[field + '_half_interval']:.3f}" for field in ("win_rate", "kl")]
        if math.isnan(summary["win_rate"]):
            cells[0] = "no label"
        length = f"{summary['length']:.1f} ± {summary['length_half_interval']:.1f}"
        rows.append((name, *cells, length, labels.get(name)))
    columns = ("policy", "win rate against the reference", "KL (nats)", "tokens per completion", "labels used")
    samples = next(iter(comparisons.values())).samples
    count = len({prompt for prompt, _ in samples})
    prompts, over = ("one held-out prompt", "for it") if count == 1 else (f"{count} held-out prompts", "over prompts")
    return Table(f"On {len(samples)} completions of {prompts}; ± is half a 95% interval {over}", columns, rows)
