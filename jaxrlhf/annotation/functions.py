"""User-supplied rewards and annotators: plain Python functions named `module:function`.

    def score(prompts: list[str], completions: list[str]) -> list[float | None]: ...
    def annotate(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float | None]: ...

A label is 1 where the first completion is preferred, 0 where the second is, 1/2 for a tie and None where the annotator
gives no label. A score is None where it does not apply, in mixtures of several (`host_scores`). Functions written for
TRL's trainers, which take `completions` by name and ignore further arguments, are called so (`score_function`).
"""

import difflib
import importlib
import inspect
import os
import pathlib
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

Score = Callable[[list[str], list[str]], Sequence[float | None]]
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
        here = [path.stem for path in pathlib.Path().glob("*.py")]
        near = difflib.get_close_matches(module_name, here, 1)
        meant = f"; the nearest here is {near[0]}." if near else "."
        raise ValueError(
            f"There is no module {module_name} in {os.getcwd()} or among the installed ones{meant}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each in dir(module) if callable(getattr(module, each))]
        near = difflib.get_close_matches(function_name, known, 1)
        meant = f"; the nearest that it has is {near[0]}." if near else "."
        raise ValueError(f"The module {module_name} has no function {function_name}{meant}")
    return function


def score_function(name: str) -> Score:
    """Returns the function `module:function` of (prompts, completions), called by name where it names its `completions`.

    Raises:
        ValueError: as `load_function`; or the function needs an argument beside the two.
    """
    function = load_function(name)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return function
    if "completions" not in parameters or parameters["completions"].kind is inspect.Parameter.POSITIONAL_ONLY:
        return function
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    needed = [
        other
        for other, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and other not in ("prompts", "completions")
    ]
    if needed:
        raise ValueError(
            f"{name} needs {' and '.join(needed)}; a score is a function of prompts and completions, so give "
            f"{'it a default' if len(needed) == 1 else 'them defaults'}."
        )

    def by_name(prompts: list[str], completions: list[str]) -> Sequence[float | None]:
        with_prompts = {"prompts": prompts} if others or "prompts" in parameters else {}
        return function(completions=completions, **with_prompts)

    return by_name


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


def host_scores(
    tokenizer: tokenizers.Tokenizer, scores: Sequence[Score], names: Sequence[str]
) -> Callable[[jax.Array, Sample], np.ndarray]:
    """Returns `(key, sample) -> scores [B, M, 2, K]` from K functions of texts; NaN where one gave None.

    Raises:
        ValueError: when called, where a function gives too few scores, or an infinite one.
    """

    def score_sample(key, sample):
        del key
        prompts, *texts = texts_of(tokenizer, sample)
        columns = [
            np.stack([optional_scores(score(prompts, side), len(prompts), name) for side in texts], axis=-1)
            for score, name in zip(scores, names, strict=True)
        ]
        return np.stack(columns, axis=-1).reshape(*sample.measure.shape, 2, len(columns))

    return score_sample


def optional_scores(values: Any, count: int, name: str) -> np.ndarray:
    """Returns a function's scores `[N]`, NaN for None.

    Raises:
        ValueError: they are not `count` numbers, or one is infinite.
    """
    if values is not None:
        values = [np.nan if value is None else value for value in values]
    scores = _numbers(values, count, name)
    if np.any(np.isinf(scores)):
        raise ValueError(f"{name} gave {int(np.sum(np.isinf(scores)))} scores that are infinite; give numbers or None.")
    return scores


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
        given = f"{len(numbers)} numbers" if numbers.ndim == 1 else f"an array of the shape {numbers.shape}"
        raise ValueError(f"{name} gave {given} for {count} texts; give one number for each.")
    return numbers
