"""The annotator named on the command line: a function, a reward model or an LLM judge."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from jaxrlhf import preferences
from jaxrlhf.annotation.functions import (
    host_annotator,
    host_scorer,
    load_function,
    score_function,
    with_timeout,
)
from jaxrlhf.annotation.judge import HttpJudge, is_judge, load_judge
from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.commands.flags import refuse_unused
from jaxrlhf.commands.hub import hub_name
from jaxrlhf.commands.models import Model, check_tokens, open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.page_annotator import BROWSER, People
from jaxrlhf.commands.people import PAGE_SETTINGS, PageConfig, check_page
from jaxrlhf.lm.annotators import reward_model_annotator
from jaxrlhf.training.processes import split_over_processes

LABELS = "labels.sqlite"
"""Name of the journal of paid labels, which lies with the prepared data so that later runs find the labels too."""
SILENCE = 64
"""Pairs without any label after which an annotator is given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatorConfig(PageConfig):
    """Settings of the annotator, common to alignment and evaluation."""

    GROUPS: ClassVar[Groups] = {
        "main settings": ("annotator", "score"),
        "an LLM judge": ("judge_tokens", "judge_tokens_name", "judge_temperature", "judge_verdict"),
    }

    annotator: str | None = None
    """Compares completions: `module:function` of (prompts, firsts, seconds), a reward model's directory, an LLM judge, or
    browser: a page on which people label while the run waits. Judges are OpenAI-style addresses, `http://HOST:PORT/v1#MODEL`;
    key in OPENAI_API_KEY; no verdict is paid twice."""
    score: str | None = None
    """Instead of --annotator: `module:function` of (prompts, completions) that returns scores to draw labels from."""
    judge_tokens: int = 1024
    """Maximum length of an LLM judge's reply in tokens; a model that thinks first needs more."""
    judge_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the request's parameter with that limit."""
    judge_temperature: float | None = 0.0
    """Temperature of an LLM judge's replies; None leaves it to the server."""
    judge_verdict: str | None = None
    """Regular expression of a verdict, with a group around A, B or tie; by default `Verdict: A` and other common forms."""


JUDGE_SETTINGS = ("judge_tokens", "judge_tokens_name", "judge_temperature", "judge_verdict")
"""Settings of an LLM judge; a run may go on with others."""


class ComparisonAnnotator(NamedTuple):
    """An annotator inside the traced step or on the host; one of the two.

    Attributes:
        traced: `(key, sample, frozen) -> labels [B, M, 1]`, or None.
        host: `(key, sample) -> labels`, plain Python, or None.
        params: what `traced` reads from `frozen.annotator`.
        judge: the LLM judge that `host` asks, if it is one.
        people: whom `host` asks on the labelling page, if it does.
    """

    traced: preferences.Annotator | None
    host: Callable[[jax.Array, Sample], jax.Array] | None
    params: Params = ()
    judge: HttpJudge | None = None
    people: People | None = None

    def notes(self) -> list[str]:
        """Returns sentences for the report on what an LLM judge replied, or on each person who labelled."""
        if self.people is not None:
            return self.people.notes()
        if self.judge is None or not self.judge.replies.total:
            return []
        replies = self.judge.replies
        example = f"; one without a verdict ends: {replies.example!r}" if replies.example else ""
        return [f"Replies of the judge: {replies.describe()}{example}."]


def open_annotator(
    annotator: str | None,
    score: str | None,
    model: Model,
    *,
    journal: pathlib.Path | None = None,
    seconds: float | None = None,
    judge: dict[str, Any] | None = None,
    people: People | None = None,
) -> ComparisonAnnotator:
    """Returns the annotator named on the command line.

    Args:
        annotator: `module:function`, a reward model's directory, or an HTTP judge, `URL#MODEL`.
        score: `module:function`; exactly one of the two is given.
        model: whose tokenizer decodes completions.
        journal: file for an HTTP judge's verdicts; functions, which may be random or cheap, have none.
        seconds: time limit for a function to label the pairs of a step; None is no limit. A judge has limits of its own.
        judge: further settings of an HTTP judge, of `judge_settings`.
        people: who are asked instead, of `people_of`.

    Raises:
        ValueError: both or neither is given, what is named cannot be found, or the journal cannot be used.
    """
    if bool(annotator) == bool(score):
        raise ValueError("Give --annotator or --score, one of the two: they say which completions are better.")
    tokenizer = model.bundle.tokenizer
    if people is not None:
        return ComparisonAnnotator(None, host_annotator(tokenizer, people, BROWSER), people=people)
    if score:
        function = split_over_processes(with_timeout(score_function(score), seconds, score))
        return ComparisonAnnotator(None, host_scorer(tokenizer, function, score))
    assert annotator is not None
    if is_judge(annotator):
        asked = load_judge(annotator, journal=journal, **(judge or {}))
        host = host_annotator(tokenizer, split_over_processes(_understood(asked)), annotator)
        return ComparisonAnnotator(None, host, judge=asked)
    if pathlib.Path(annotator).is_dir() or hub_name(annotator):
        opened = open_model(pathlib.Path(annotator), "reward")
        check_tokens(model.bundle, opened.bundle, "--annotator")
        directory = opened.bundle.directory
        annotate, params = reward_model_annotator(directory, vocabulary_size=model.config.vocabulary_size)
        return ComparisonAnnotator(annotate, None, params)
    if ":" not in annotator or "://" in annotator:
        raise ValueError(
            f"There is no directory {annotator}; give a reward model's, a function as module:function, or an LLM judge as "
            "http://HOST:PORT/v1#MODEL."
        )
    function = split_over_processes(with_timeout(load_function(annotator), seconds, annotator))
    return ComparisonAnnotator(None, _not_silent(host_annotator(tokenizer, function, annotator), annotator))


def people_of(config: AnnotatorConfig, *, evaluates: bool) -> People | None:
    """Returns the people of --annotator browser, or None for another annotator.

    Raises:
        ValueError: a setting of the page is out of range or does not apply, or the packages of the page are missing.
    """
    check_people(config)
    return People(config, evaluates=evaluates) if config.annotator == BROWSER else None


def check_people(config: AnnotatorConfig) -> None:
    """Raises ValueError for settings of the page that are out of range, or that another annotator would ignore."""
    if config.annotator != BROWSER:
        refuse_unused(config, PAGE_SETTINGS, "without --annotator browser")
    check_page(config)


def judge_settings(config: AnnotatorConfig) -> dict[str, Any]:
    """Returns the settings of an LLM judge, as `open_annotator` takes them.

    Raises:
        ValueError: they are given, but the annotator is no judge.
    """
    if config.annotator is None or not is_judge(config.annotator):
        refuse_unused(config, JUDGE_SETTINGS, "to an annotator that is no LLM judge, http://HOST:PORT/v1#MODEL")
    return {
        "max_tokens": config.judge_tokens,
        "tokens_name": config.judge_tokens_name,
        "temperature": config.judge_temperature,
        "verdict": config.judge_verdict,
    }


def _understood(judge: HttpJudge) -> Callable[..., Sequence[float | None]]:
    """Returns the judge, which stops the run after a batch of pairs where none of its replies has been understood."""

    def annotate(*texts):
        labels = judge(*texts)
        judge.check()
        return labels

    return annotate


def _not_silent(host: Callable[..., jax.Array], name: str) -> Callable[..., jax.Array]:
    """Returns the annotator, which stops the run where its first `SILENCE` pairs or more have no label at all."""
    pairs = labels = 0

    def annotate(key, sample):
        nonlocal pairs, labels
        given = host(key, sample)
        pairs, labels = pairs + given.size, labels + int(np.sum(np.asarray(given) >= 0))
        if not labels and pairs >= SILENCE:
            raise ValueError(
                f"{name} gave no label for any of the first {pairs} pairs; nothing can be learned from None."
            )
        return given

    return annotate
