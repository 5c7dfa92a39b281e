"""The files of `jaxrlhf label`: pairs to label, pairs sampled from a policy, and the labels in TRL's format."""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.annotation.functions import completions_of, unpadded
from jaxrlhf.annotation.journal_file import Label
from jaxrlhf.commands.models import Model
from jaxrlhf.commands.page_annotator import NAME
from jaxrlhf.commands.sample import complete
from jaxrlhf.data.batches import padded_prompts
from jaxrlhf.data.encode import encode_prompt
from jaxrlhf.data.formats import VARIABLES
from jaxrlhf.data.records import DataError, Message, Preference, Ranking, Record, Text
from jaxrlhf.labelling.pairs import Pair, make_pair
from jaxrlhf.labelling.people import majority
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.training.progress import progress

BATCH_SIZE = 16
"""Prompts completed together."""


class LabelledPair(NamedTuple):
    """A pair as it is shown, and the texts that it was made from."""

    pair: Pair
    prompt: Text
    first: Text
    second: Text


class Pairs(NamedTuple):
    """Pairs to label, each once, and how many were left out because both completions are the same."""

    pairs: list[LabelledPair]
    equal: int


def pairs_of(records: Iterable[Record]) -> Pairs:
    """Returns the pairs of preferences, whose own labels are not shown, and of rankings.

    Raises:
        DataError: a record has no two completions, or no pair is left.
    """
    found, equal = {}, 0
    for number, record in enumerate(records, 1):
        if isinstance(record, Preference):
            texts = [record.chosen, record.rejected]
        elif isinstance(record, Ranking):
            texts = record.completions
        else:
            raise DataError(
                f"Record {number} has no two completions to compare; give prompt and completions, or prompt, chosen and "
                "rejected, or sample the completions with --policy."
            )
        for first, second in itertools.combinations(texts, 2):
            if first == second:
                equal += 1
                continue
            pair = make_pair(NAME, record.prompt, first, second)
            found[pair.key] = LabelledPair(pair, record.prompt, first, second)
    if not found:
        raise DataError("There is no pair of different completions to label.")
    return Pairs(list(found.values()), equal)


class Sampling(NamedTuple):
    """How completions are sampled from a policy."""

    pairs_per_prompt: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def sample_pairs(path: pathlib.Path, model: Model, records: Sequence[Record], sampling: Sampling) -> list[str]:
    """Writes pairs of a policy's completions, whole or not at all; returns sentences on what was left out.

    Raises:
        DataError: no prompt leaves room for a completion.
        ValueError: the model's template refuses a prompt.
    """
    room = model.config.context_length - sampling.max_new_tokens
    tokenizer, prompts, long = model.bundle.chat_tokenizer(), [], 0
    for record in records:
        if isinstance(record.prompt, tuple) and record.prompt and record.prompt[-1].role == "assistant":
            raise DataError("A prompt ends with a turn of the assistant; end prompts with the user's turn.")
        tokens = encode_prompt(tokenizer, record.prompt)
        if not len(tokens) and model.bundle.special.bos is not None:
            tokens = np.array([model.bundle.special.bos], np.int32)
        if 0 < len(tokens) <= room:
            prompts += [(record.prompt, tokens)] * sampling.pairs_per_prompt
        else:
            long += 1
    if not prompts:
        raise DataError(
            f"No prompt leaves room for --max-new-tokens {sampling.max_new_tokens} in the model's context of "
            f"{model.config.context_length}."
        )
    texts = _complete(model, [tokens for _, tokens in prompts], sampling)
    rows, equal = [], 0
    for (prompt, _), pair in zip(prompts, texts, strict=True):
        if pair[0] == pair[1]:
            equal += 1
            continue
        completions = [text if isinstance(prompt, str) else (Message("assistant", text),) for text in pair]
        # Equal ranks: until people have labelled them, neither is the better one.
        rows.append(_row(prompt, completions=completions) | {"ranks": [1, 1]})
    if not rows:
        raise DataError("Both completions of every prompt are the same; raise --temperature.")
    write_lines(path, rows)
    return [
        *([f"{long} prompts left no room for --max-new-tokens and were left out."] if long else []),
        *([f"{equal} pairs had twice the same completion and were left out."] if equal else []),
    ]


def _complete(model: Model, prompts: list[np.ndarray], sampling: Sampling) -> list[tuple[str, str]]:
    """Returns two completions of each prompt."""
    length = max(map(len, prompts))
    language, params = decoder(model.config), jax.tree.map(jnp.asarray, model.params)
    bundle = model.bundle
    generation = Generation(sampling.max_new_tokens, bundle.stop_ids, sampling.temperature, bundle.pad_id)
    texts = []
    starts = range(0, len(prompts), BATCH_SIZE)
    with progress("sampling", len(starts), "completions") as advance:
        for start in starts:
            batch = prompts[start : start + BATCH_SIZE]
            # All batches have one shape: the last is filled up with its first prompt.
            filled = Prompts(*map(jnp.asarray, padded_prompts(batch + batch[:1] * (BATCH_SIZE - len(batch)), length)))
            sides = []
            for key in jax.random.split(jax.random.fold_in(jax.random.key(sampling.seed), start)):
                completions = complete(language, params, key, filled, generation, sampling.top_p)
                rows = unpadded(completions.tokens, completions.mask)[: len(batch)]
                sides.append(completions_of(model.bundle.tokenizer, [row.tolist() for row in batch], rows))
            texts += zip(*sides, strict=True)
            advance(2 * len(batch))
    return texts


def write_labels(path: pathlib.Path, pairs: Sequence[LabelledPair], queue: Queue, keep: Literal["majority", "each"]):
    """Writes decided labels as TRL's preferences, and every vote with its note beside them; returns the number of each.

    Args:
        path: ending in `.jsonl`; the votes go to `.votes.jsonl`.
        pairs: that were shown.
        queue: has their labels.
        keep: one label a pair, or each person's; ties and skipped pairs are among the votes only.
    """
    rows = []
    for labelled in pairs:
        labels: list[Label] = queue.labels(labelled.pair.key)
        complete = len(labels) >= queue.people_per_pair
        for label in labels if keep == "each" else [majority(labels)] if complete else []:
            if label is not None and label != 0.5:
                best, worst = (labelled.first, labelled.second)[:: 1 if label > 0.5 else -1]
                rows.append(_row(labelled.prompt, chosen=best, rejected=worst))
    places = {labelled.pair.key: number for number, labelled in enumerate(pairs)}
    people: dict[str, str] = {}
    votes = []
    for vote in queue.votes():
        if vote.pair in places:
            person = people.setdefault(vote.person, f"person {len(people) + 1}")
            labelled = pairs[places[vote.pair]]
            texts = _row(labelled.prompt, completions=[labelled.first, labelled.second])
            answer = {"label": vote.label, "person": person, "note": vote.note, "left": int(vote.swapped)}
            answer |= {"asked_again": vote.repeat, "seconds": round(vote.seconds, 3), "time": round(vote.at, 3)}
            votes.append(texts | answer)
    write_lines(path, rows)
    write_lines(path.with_suffix(".votes.jsonl"), votes)
    return len(rows), len(votes)


def write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="ascii") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _row(prompt: Text, **texts: Any) -> dict[str, Any]:
    """Returns texts as TRL's JSON has them, with what a conversation gives its template beside the messages."""
    values: dict[str, Any] = {"prompt": prompt} | texts
    row = {
        name: [_json(text) for text in value] if name == "completions" else _json(value)
        for name, value in values.items()
    }
    several: list[Text] = [prompt, *texts.get("completions", texts.values())]
    carriers = (text[0].variables for text in several if isinstance(text, tuple) and text)
    variables = json.loads(next(filter(None, carriers), "{}"))
    row |= {name: variables.pop(name) for name in VARIABLES[:2] if name in variables}
    return row | ({VARIABLES[2]: variables} if variables else {})


def _json(text: Text) -> Any:
    return text if isinstance(text, str) else [message.as_dict() for message in text]
