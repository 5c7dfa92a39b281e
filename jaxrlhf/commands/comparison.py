"""Who labels, and how a policy fares against its reference by those labels."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import preferences
from jaxrlhf.annotation.functions import bounded, host_annotator, host_scorer, load_function, texts_of
from jaxrlhf.annotation.judge import is_judge, load_judge
from jaxrlhf.base.problem import Sample, uniform_measure
from jaxrlhf.base.types import Params
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.lm.annotators import reward_model_annotator
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, Responses
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.processes import gathered, shared
from jaxrlhf.training.report import Table
from jaxrlhf.training.step import place

LABELS = "labels.sqlite"
"""The journal of paid verdicts, in the folder of prepared data: what one run has paid for, the next one finds."""
SEEN_AT_ONCE = 64
"""Prompts that are answered together."""


class Judge(NamedTuple):
    """An annotator, for the step that JAX traces or beside it; one of the two.

    Attributes:
        traced: `(key, sample, frozen) -> labels [B, M, 1]`, or None.
        host: `(key, sample) -> labels`, plain Python, or None.
        params: what the traced one finds in `frozen.annotator`.
    """

    traced: preferences.Annotator | None
    host: Callable[[jax.Array, Sample], jax.Array] | None
    params: Params = ()


class Comparison(NamedTuple):
    """A policy beside its reference, on the same prompts.

    Attributes:
        wins: `[N]` labels: 1 where the policy's answer was preferred, NaN where there was no answer.
        log_ratio: `[N]` nats, log pi / pi_ref of the policy's answers; their mean estimates the KL.
        lengths: `[N, 2]` tokens of the policy's and the reference's answers.
        samples: (prompt, (reference's answer, policy's answer)).
    """

    wins: np.ndarray
    log_ratio: np.ndarray
    lengths: np.ndarray
    samples: list[tuple[str, tuple[str, str]]]

    def numbers(self) -> dict[str, float]:
        """Returns means, and the half of their 95% intervals."""
        found = {"win_rate": self.wins[np.isfinite(self.wins)], "kl": self.log_ratio, "length": self.lengths[:, 0]}
        told = {}
        for name, values in found.items():
            told[name] = float(values.mean()) if len(values) else float("nan")
            told[f"{name}_half_interval"] = 1.96 * float(values.std()) / max(1, len(values)) ** 0.5
        return told


def open_judge(
    annotator: str | None,
    score: str | None,
    model: Model,
    *,
    journal: pathlib.Path | None = None,
    seconds: float | None = None,
) -> Judge:
    """Returns who compares answers.

    Args:
        annotator: `module:function`, a reward model's directory, or a judge behind HTTP, `URL#MODEL`.
        score: `module:function`; exactly one of the two is given.
        model: whose tokens are judged.
        journal: file that keeps the verdicts of a judge behind HTTP; functions may be random or cheap and have none.
        seconds: that a function may take for the questions of a step; None is no limit. A judge has limits of its own.

    Raises:
        ValueError: both or none is given, what is named cannot be found, or the journal cannot be used.
    """
    if (annotator is None) == (score is None):
        raise ValueError("Give --annotator or --score, one of the two: they say which answers are better.")
    tokenizer = model.words.tokenizer
    if score is not None:
        return Judge(None, host_scorer(tokenizer, shared(bounded(load_function(score), seconds, score)), score))
    assert annotator is not None
    if is_judge(annotator):
        return Judge(None, host_annotator(tokenizer, shared(load_judge(annotator, journal=journal)), annotator))
    if pathlib.Path(annotator).is_dir():
        directory = open_model(pathlib.Path(annotator), "reward").words.directory
        annotate, params = reward_model_annotator(directory, vocabulary_size=model.config.vocabulary_size)
        return Judge(annotate, None, params)
    return Judge(
        None, host_annotator(tokenizer, shared(bounded(load_function(annotator), seconds, annotator)), annotator)
    )


def policy_comparer(
    reference: Model,
    prompts: Sequence[np.ndarray],
    judge: Judge,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    everywhere: Any = None,
) -> Callable[[Params], Comparison]:
    """Returns `(params) -> Comparison`: how a policy's answers fare against its reference's, one of each a prompt.

    Args:
        reference: the model, with the reference's parameters.
        prompts: token rows `[P]`.
        judge: who compares; the order in which it sees the two is random.
        max_new_tokens: of an answer.
        seed: of answers and order; the same at every call.
        temperature: of both.
        everywhere: sharding of copies on all devices, where parameters are spread over several.
    """
    # Log-ratios of half precision would be rounding, of about 0.2 nats over a hundred tokens.
    model, words = decoder(reference.config, dtype=jnp.float32), reference.words
    length = max(len(prompt) for prompt in prompts)
    traced = None if judge.traced is None else jax.jit(judge.traced)

    @jax.jit
    def answer(params, other, key, rows: Prompts):
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": words.stop_ids,
            "pad_id": words.pad_id,
        }
        written = generate(model, params, key, *rows, temperature=temperature, **settings)
        theirs = completion_log_probs(model, other, *rows, written.tokens, written.mask, temperature=temperature)
        return written, jnp.sum(written.log_prob, axis=-1) - jnp.sum(theirs, axis=-1)

    def ask(key: jax.Array, sample: Sample) -> np.ndarray:
        if traced is None:
            assert judge.host is not None
            return np.asarray(judge.host(key, sample))[:, 0, 0]
        return np.asarray(traced(key, sample, LanguageFrozen((), judge.params)))[:, 0, 0]

    def compare(params: Params) -> Comparison:
        wins, ratios, lengths, samples = [], [], [], []
        for first in range(0, len(prompts), SEEN_AT_ONCE):
            part = list(prompts[first : first + SEEN_AT_ONCE])
            # One shape for all parts: the last is filled with its first prompt.
            filled = padded_prompts(part + part[:1] * (SEEN_AT_ONCE - len(part)), length)
            rows = Prompts(*(jnp.asarray(each) for each in filled))
            own_key, other_key, order_key, label_key = jax.random.split(jax.random.key(seed + first), 4)
            if everywhere is not None:
                rows, own_key, other_key = place((rows, own_key, other_key), everywhere)
            own, ratio = gathered(answer(params, reference.params, own_key, rows))
            other, _ = gathered(answer(reference.params, reference.params, other_key, rows))
            # What only fills is shown to no annotator: answers may cost.
            rows, own, other, ratio = _first(len(part), (gathered(rows), own, other, ratio))
            swapped = jax.random.bernoulli(order_key, 0.5, (len(part), 1))
            labels = ask(label_key, _sample(rows, *_shown(own, other, swapped)))
            labels = np.where(np.asarray(swapped)[:, 0], 1 - labels, labels)
            wins.append(np.where((labels < 0) | (labels > 1), np.nan, labels))
            ratios.append(np.asarray(ratio))
            lengths.append(np.stack([np.asarray(each.mask).sum(axis=1) for each in (own, other)], axis=1))
            texts = zip(*texts_of(words.tokenizer, _sample(rows, own, other)), strict=True)
            samples += [(prompt, (theirs, ours)) for prompt, ours, theirs in texts]
        return Comparison(np.concatenate(wins), np.concatenate(ratios), np.concatenate(lengths), samples)

    return compare


def _first(count: int, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def _sample(rows: Prompts, first: Any, second: Any) -> Sample:
    """Returns pairs of answers as annotators take them."""
    tokens = jnp.stack([first[0], second[0]], axis=1)[:, None]
    mask = jnp.stack([first[1], second[1]], axis=1)[:, None]
    nothing = jnp.zeros((len(tokens), 1, 2, 1))
    measure, num_draws = uniform_measure(len(tokens), 1)
    return Sample(rows, Responses(tokens, mask), nothing, nothing, nothing + 1, measure, jnp.ones(2), num_draws)


def _shown(own: Any, other: Any, swapped: jax.Array) -> tuple[list, list]:
    """Returns the answers as they are shown, first and second: the other's first where `swapped`."""
    pairs = list(zip(own[:2], other[:2], strict=True))
    first = [jnp.where(swapped, theirs, ours) for ours, theirs in pairs]
    return first, [jnp.where(swapped, ours, theirs) for ours, theirs in pairs]


def comparison_table(compared: dict[str, Comparison], *, labels: dict[str, int]) -> Table:
    """Returns policies, row by row, with 95% intervals."""
    rows = []
    for name, verdict in compared.items():
        told = verdict.numbers()
        cells = [f"{told[field]:.3f} ± {told[field + '_half_interval']:.3f}" for field in ("win_rate", "kl")]
        rows.append((name, *cells, f"{told['length']:.1f}", labels.get(name)))
    columns = ("policy", "win rate against the reference", "KL (nats)", "tokens an answer", "labels used")
    count = len(next(iter(compared.values())).wins)
    return Table(f"On {count} answers to held-out prompts", columns, rows)
