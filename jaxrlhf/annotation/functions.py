"""Plain Python functions named `module:function`: rewards and annotators that people bring.

    def score(prompts: list[str], completions: list[str]) -> list[float]: ...
    def annotate(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float | None]: ...

An annotator's answer is 1 where the first completion is preferred, 0 where the second, 1/2 for a tie, None for no answer.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxrlhf import preferences
from jaxrlhf.annotation.waiting import within
from jaxrlhf.base.problem import SKIPPED, Sample

Score = Callable[[list[str], list[str]], Sequence[float]]
Annotate = Callable[[list[str], list[str], list[str]], Sequence[float | None]]


def load_function(name: str) -> Callable:
    """Returns the function of a module, which is found as `python -m` would: in the working directory, or installed.

    Raises:
        ValueError: the name has no colon, or there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"{name!r} names no function; write module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"There is no module {module_name} here or among the installed ones.") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module {module_name} has no function {function_name}.")
    return function


def completions_of(
    tokenizer: tokenizers.Tokenizer, prompts: list[list[int]], completions: list[list[int]]
) -> list[str]:
    """Returns the texts of completions, as they go on from their prompts; without special tokens.

    Decoded with the prompt: some tokenizers drop the space that a text begins with.
    """
    before = tokenizer.decode_batch(prompts)
    whole = tokenizer.decode_batch([[*first, *second] for first, second in zip(prompts, completions, strict=True)])
    alone = tokenizer.decode_batch(completions)
    return [
        text.removeprefix(start) if text.startswith(start) else other
        for start, text, other in zip(before, whole, alone, strict=True)
    ]


def real(tokens: Any, mask: Any) -> list[list[int]]:
    """Returns rows of real tokens from arrays `[N, T]`."""
    return [row[kept].tolist() for row, kept in zip(np.asarray(tokens), np.asarray(mask).astype(bool), strict=True)]


def texts_of(tokenizer: tokenizers.Tokenizer, sample: Sample) -> tuple[list[str], list[str], list[str]]:
    """Returns prompts, first and second completions of a sample's pairs, `B * M` of each."""
    tokens, mask = (np.asarray(part) for part in sample.responses)
    pairs = tokens.shape[1]
    prompts = [row for row in real(*sample.prompts) for _ in range(pairs)]
    slots = [
        completions_of(
            tokenizer,
            prompts,
            real(tokens[:, :, slot].reshape(len(prompts), -1), mask[:, :, slot].reshape(len(prompts), -1)),
        )
        for slot in (0, 1)
    ]
    return tokenizer.decode_batch(prompts), slots[0], slots[1]


def bounded(call: Callable[..., Any], seconds: float | None, name: str) -> Callable[..., Any]:
    """Returns the function of texts with a limit to how long it may take; None is no limit.

    Raises:
        ValueError: when called, where the time is over, or the function raised: its name is told. A call that took too
            long is left to itself and its answers are lost.
    """

    def named(*texts):
        try:
            return call(*texts)
        except Exception as error:  # whatever people's own code raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{name} failed with {type(error).__name__}: {error} ({last.filename}, line {last.lineno}). "
                "JAXRLHF_TRACEBACK=1 in the environment shows the way there."
            ) from error

    if seconds is None:
        return named

    def answer(*texts):
        try:
            return within(seconds, lambda: named(*texts))
        except TimeoutError:
            raise ValueError(
                f"{name} has not answered {len(texts[0])} questions within {seconds:g} s; "
                "see why it hangs, or give it more time with --annotator-timeout."
            ) from None

    return answer


def host_annotator(
    tokenizer: tokenizers.Tokenizer, judge: Annotate, name: str
) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]` from an annotator of texts.

    Raises:
        ValueError: when called, where the annotator's answers are too few or no labels.
    """

    def annotate(key, sample):
        del key
        prompts, firsts, seconds = texts_of(tokenizer, sample)
        # None is NaN for a moment: no other answer out of range is an omission.
        given = judge(prompts, firsts, seconds)
        answers = given if given is None else [np.nan if answer is None else answer for answer in given]
        labels = _numbers(answers, len(prompts), name)
        wrong = labels[(labels < 0) | (labels > 1)]
        if wrong.size:
            raise ValueError(f"{name} answered {wrong[0]:g}; a label is 1, 0, 1/2 or None.")
        labels = np.where(np.isnan(labels), np.float32(SKIPPED), labels)
        return jnp.asarray(labels.reshape(*sample.measure.shape, 1))

    return annotate


def host_scorer(tokenizer: tokenizers.Tokenizer, score: Score, name: str) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]`, Bradley-Terry labels drawn by a score of texts.

    Raises:
        ValueError: when called, where the scores are too few or not finite.
    """

    def annotate(key, sample):
        prompts, firsts, seconds = texts_of(tokenizer, sample)
        scores = np.stack([_finite(score(prompts, texts), len(prompts), name) for texts in (firsts, seconds)], axis=-1)
        return preferences.draw_labels(key, jnp.asarray(scores.reshape(*sample.measure.shape, 2)))

    return annotate


def _finite(values: Any, count: int, name: str) -> np.ndarray:
    scores = _numbers(values, count, name)
    if not np.all(np.isfinite(scores)):
        raise ValueError(f"{name} gave {int(np.sum(~np.isfinite(scores)))} scores that are not finite.")
    return scores


def _numbers(values: Any, count: int, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(list(values), np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} did not give a list of numbers ({error}).") from None
    if numbers.shape != (count,):
        raise ValueError(f"{name} gave {numbers.shape} numbers for {count} texts; give one for each.")
    return numbers
