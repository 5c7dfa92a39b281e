"""People as the annotator of a run, which serves them the labelling page: `--annotator browser`."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console

from jaxrlhf.annotation.functions import texts_of
from jaxrlhf.annotation.journal_file import Label
from jaxrlhf.base.algorithm import Algorithm
from jaxrlhf.commands.people import PageConfig
from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.page import Page
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.people import agreement, describe, majority, mistake_rate
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.store import LabelStore
from jaxrlhf.training.preemption import AskedToStopError, Stop
from jaxrlhf.training.processes import broadcast_array, broadcast_text, gathered, is_first_process
from jaxrlhf.training.tracking import Tracker

BROWSER = "browser"
"""The value of --annotator."""
NAME = "people"
"""Of the annotator, in the keys of pairs."""
STORE = "people.sqlite"
"""Name of the journal of what people said."""
WAITING, LABELLED, STOPPED = 0.0, 1.0, 2.0
"""What the first process tells the others while people label."""
Texts = tuple[str, str, str]
"""Prompt, first completion and second completion of a pair."""
TICK = 0.5
"""Seconds between two looks at whether the run was asked to stop."""


class People:
    """An annotator of texts that puts pairs on the page, and waits for their labels however long they take.

    The page is served by the first of several processes. Equal completions are a tie without anyone being asked; a pair
    that was labelled before has its label.

    Attributes:
        board: what the page shows beside the pairs.
        evaluates: whether comparisons of policies are labelled too.
        stop: whether the run was asked to stop while it waits.
    """

    def __init__(self, config: PageConfig, *, evaluates: bool):
        """Nothing is served before `serve`.

        Args:
            config: of the page.
            evaluates: see `People`.

        Raises:
            ValueError: the packages of the page are missing.
        """
        Page.check()
        self.board, self.evaluates, self.stop = Board("Which answer is better?"), evaluates, Stop()
        self._config, self._page = config, None
        self._step = 0
        self._forecasts: dict[Texts, float] = {}
        self._expected: float | None = None
        self._rate: float | None = None

    @contextmanager
    def serve(self, journal: pathlib.Path, *, stop: Stop | None = None, step: int = 0) -> Iterator[None]:
        """Serves the page within the block, in the first process.

        Args:
            journal: of what people say; a run that goes on finds in it what they said before.
            stop: whether the run was asked to stop.
            step: of the run, from which the board counts on.

        Raises:
            ValueError: the journal cannot be used, or the address is taken.
        """
        self.stop, self._step = self.stop if stop is None else stop, step
        broadcast_text(lambda: self._start(journal))
        try:
            yield
        finally:
            if self._page is not None:
                self._page.stop()

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[Label]:
        """Returns the majority's label of each pair, None where all who saw it skipped it; waits until all are there.

        Raises:
            AskedToStopError: the run was asked to stop.
            ValueError: the labels cannot be stored.
        """
        keys: list[bytes | None] = []
        broadcast_text(lambda: self._add(keys, prompts, firsts, seconds))
        while True:
            row = np.full(1 + len(prompts), np.nan)
            if is_first_process():
                row[0] = self._state(keys)
                if row[0] == LABELLED:
                    row[1:] = [np.nan if label is None else label for label in map(self._label, keys)]
            row = broadcast_array(row)
            if row[0] == STOPPED:
                raise AskedToStopError
            if row[0] == LABELLED:
                break
        self._done(keys)
        return [None if np.isnan(label) else float(label) for label in row[1:]]

    def expect(self, forecasts: Mapping[Texts, float], win_rate: float | None = None) -> None:
        """Says how likely the reward model thinks it that the first completion of a pair is preferred.

        The page tells it after the label alone. Forecasts of earlier steps are forgotten.

        Args:
            forecasts: by pair.
            win_rate: of the policy against the reference, by the reward model; shown once the step is labelled.
        """
        self._forecasts, self._expected = dict(forecasts), win_rate

    def mistake_rate(self) -> np.float32:
        """Returns people's rate of mistakes by the labels before this step; a step that is repeated has the same."""

        def measured() -> str:
            queue = self._served.queue
            return queue.store.fact(f"mistakes before step {self._step + 1}", f"{mistake_rate(queue.votes()):g}")

        self._rate = rate = float(broadcast_text(measured))
        self.board.set_facts(**{"Mistakes allowed for": f"{rate:.0%}"})
        return np.float32(rate)

    def labelled(self, labels: np.ndarray, *, against_reference: bool) -> None:
        """Counts a step whose labels are there, and shows the policy's win rate by them where it met the reference."""
        self._step += 1
        given = labels[labels >= 0]
        if against_reference and given.size:
            self.board.measured(self._step, win_rate=float(given.mean()))
        if self._expected is not None:
            self.board.measured(self._step, reward_win_rate=self._expected)
        if self._page is not None:
            counts = agreement(self._page.queue.votes())
            if counts["forecast"]:
                share = f"{counts['agreed']} of {counts['forecast']}"
                self.board.set_facts(**{"All people, as the reward model expected": share})

    def notes(self) -> list[str]:
        """Returns sentences on each person and on all, for the report; the first process knows them."""
        notes = [] if self._page is None else describe(self._page.queue.votes())
        if self._rate is not None:
            notes.append(
                f"By pairs that were labelled twice, {self._rate:.0%} of decided labels are mistakes; the reward's "
                "likelihood allows for them."
            )
        return notes

    def _start(self, journal: pathlib.Path) -> str:
        config = self._config
        queue = Queue(LabelStore(journal), people_per_pair=config.people_per_pair, repeats=config.repeats)
        self._page = Page(queue, self.board, host=config.host, port=config.port)
        try:
            self._page.start()
        except ValueError:
            self._page.stop()
            raise
        self._say(f"People label at {self._page.address}; who knows this address can label.")
        return ""

    def _add(
        self, keys: list[bytes | None], prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> str:
        texts = list(zip(prompts, firsts, seconds, strict=True))
        pairs = [make_pair(NAME, *each, forecast=self._forecasts.get(each)) for each in texts]
        keys += [pair.key if pair.first != pair.second else None for pair in pairs]
        queue = self._served.queue
        queue.add(pair for pair, key in zip(pairs, keys, strict=True) if key is not None)
        left = queue.counts()["left"]
        self.board.doing = ""
        if left:
            self._say(f"{left} labels to give at {self._served.address}")
        return ""

    def _state(self, keys: list[bytes | None]) -> float:
        asked = [key for key in keys if key is not None]
        if not self._served.queue.finished(asked) and not self.stop:
            self._served.queue.wait(TICK)
        if self._served.queue.finished(asked):
            return LABELLED
        return STOPPED if self.stop else WAITING

    def _label(self, key: bytes | None) -> Label:
        return 0.5 if key is None else majority(self._served.queue.labels(key))

    def _done(self, keys: list[bytes | None]) -> None:
        if is_first_process():
            self.board.doing = "The machine learns from the labels; the next pairs will come."
            self._served.queue.close(key for key in keys if key is not None)

    def _say(self, sentence: str) -> None:
        Console().print(sentence, markup=False, highlight=False, soft_wrap=True)

    @property
    def _served(self) -> Page:
        assert self._page is not None, "the page is not served"
        return self._page


def with_forecasts(
    algorithm: Algorithm, forecast: Callable[..., Any], people: People, tokenizer: tokenizers.Tokenizer
) -> Algorithm:
    """Returns the algorithm that tells people's page what the reward model expects of the pairs it proposes.

    Args:
        algorithm: compiled.
        forecast: of `AlignSetup`, compiled; called in every process.
        people: who label the pairs.
        tokenizer: of the pairs.
    """

    def propose(key, state, data, frozen):
        sample = algorithm.propose(key, state, data, frozen)
        expected, on_host = gathered((forecast(state, sample, frozen), (sample.prompts, sample.responses)))
        prompts, responses = on_host
        texts = texts_of(tokenizer, sample._replace(prompts=prompts, responses=responses))
        preferred, win_rate = expected.preferred.ravel().tolist(), expected.win_rate
        forecasts = dict(zip(zip(*texts, strict=True), preferred, strict=True))
        people.expect(forecasts, None if win_rate is None else float(win_rate))
        return sample

    return algorithm._replace(propose=propose)


def with_board(inner: Tracker, board: Board) -> Tracker:
    """Returns the tracker, which also shows steps on the page: the KL as a curve, beta as a fact."""

    def log(step: int, numbers: Mapping[str, Any]) -> None:
        inner.log(step, numbers)
        if "kl" in numbers and "win_rate" not in numbers:
            board.measured(step, kl=float(numbers["kl"]))
        for name, title in (("beta", "Beta"), ("effective_beta", "Effective beta"), ("ess_fraction", "ESS")):
            if name in numbers:
                board.set_facts(**{title: f"{numbers[name]:.3g}"})

    return Tracker(log, inner.close)
