"""User-supplied rewards and annotators: plain Python functions named `module:function`.

    def score(prompts: list[str], completions: list[str]) -> list[float]: ...
    def annotate(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float | None]: ...

A label is 1 where the first completion is preferred, 0 where the second is, 1/2 for a tie and None where the annotator
gives no label.
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
from jaxrlhf.annotation.concurrency import call_with_timeout
from jaxrlhf.base.problem import SKIPPED, Sample

Score = Callable[[list[str], list[str]], Sequence[float]]
Annotate = Callable[[list[str], list[str], list[str]], Sequence[float | None]]


def load_function(name: str) -> Callable:
    """Returns the function `module:function`; modules are found as by `python -m`, in the working directory or installed.

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
    """Returns completions as text, as they continue their prompts; without special tokens.

    Each is decoded together with its prompt, as some tokenizers drop the space that a text begins with.
    """
    prompt_texts = tokenizer.decode_batch(prompts)
    full_texts = tokenizer.decode_batch([[*prompt, *rest] for prompt, rest in zip(prompts, completions, strict=True)])
    alone = tokenizer.decode_batch(completions)
    return [
        full.removeprefix(prompt) if full.startswith(prompt) else completion
        for prompt, full, completion in zip(prompt_texts, full_texts, alone, strict=True)
    ]


def unpadded(tokens: Any, mask: Any) -> list[list[int]]:
    """Returns the rows of arrays `[N, T]` as lists, without padding."""
    return [row[real].tolist() for row, real in zip(np.asarray(tokens), np.asarray(mask).astype(bool), strict=True)]


def texts_of(tokenizer: tokenizers.Tokenizer, sample: Sample) -> tuple[list[str], list[str], list[str]]:
    """Returns the prompts, first completions and second completions of a sample's pairs, `B * M` of each."""
    tokens, mask = (np.asarray(part) for part in sample.responses)
    pairs = tokens.shape[1]
    prompts = [row for row in unpadded(*sample.prompts) for _ in range(pairs)]
    firsts, seconds = (
        completions_of(
            tokenizer,
            prompts,
            unpadded(tokens[:, :, slot].reshape(len(prompts), -1), mask[:, :, slot].reshape(len(prompts), -1)),
        )
        for slot in (0, 1)
    )
    return tokenizer.decode_batch(prompts), firsts, seconds


def with_timeout(call: Callable[..., Any], seconds: float | None, name: str) -> Callable[..., Any]:
    """Returns the function of texts with a time limit and with errors that name it; None is no limit.

    Raises:
        ValueError: when called, where the time is up or the function raised. A call that took too long is abandoned and
            its result is lost.
    """

    def named(*texts):
        try:
            return call(*texts)
        except Exception as error:  # whatever user code raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{name} failed with {type(error).__name__}: {error} ({last.filename}, line {last.lineno}). "
                "JAXRLHF_TRACEBACK=1 in the environment shows the way there."
            ) from error

    if seconds is None:
        return named

    def limited(*texts):
        try:
            return call_with_timeout(seconds, lambda: named(*texts))
        except TimeoutError:
            raise ValueError(
                f"{name} has not answered {len(texts[0])} questions within {seconds:g} s; "
                "see why it hangs, or give it more time with --annotator-timeout."
            ) from None

    return limited


def host_annotator(
    tokenizer: tokenizers.Tokenizer, annotate: Annotate, name: str
) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]` from an annotator of texts.

    Raises:
        ValueError: when called, where there are too few labels, or values that are no labels.
    """

    def annotate_sample(key, sample):
        del key
        texts = texts_of(tokenizer, sample)
        labels = annotate(*texts)
        # NaN stands for None until the range check: no other value outside [0, 1] means "no label".
        if labels is not None:
            labels = [np.nan if label is None else label for label in labels]
        labels = _numbers(labels, len(texts[0]), name)
        wrong = labels[(labels < 0) | (labels > 1)]
        if wrong.size:
            raise ValueError(f"{name} answered {wrong[0]:g}; a label is 1, 0, 1/2 or None.")
        labels = np.where(np.isnan(labels), np.float32(SKIPPED), labels)
        return jnp.asarray(labels.reshape(*sample.measure.shape, 1))

    return annotate_sample


def host_scorer(tokenizer: tokenizers.Tokenizer, score: Score, name: str) -> Callable[[jax.Array, Sample], jax.Array]:
    """Returns `(key, sample) -> labels [B, M, 1]`: Bradley-Terry labels drawn from scores of texts.

    Raises:
        ValueError: when called, where there are too few scores, or scores that are not finite.
    """

    def annotate_sample(key, sample):
        prompts, firsts, seconds = texts_of(tokenizer, sample)
        scores = np.stack([_finite(score(prompts, texts), len(prompts), name) for texts in (firsts, seconds)], axis=-1)
        return preferences.draw_labels(key, jnp.asarray(scores.reshape(*sample.measure.shape, 2)))

    return annotate_sample


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
