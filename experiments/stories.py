"""A pretrained model of short stories with its tokenizer and prompts, and a gold reward on the text."""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.lm.generate import Completions, generate
from jaxrlhf.lm.hugging_face.weights import load_decoder, load_tokenizer, special_ids
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.transformer.model import LanguageModel, decoder

OPENINGS = (
    "Once upon a time, there was a little",
    "One day, a boy named Tim",
    "Lily and her mom went to",
    "The big dog saw a",
    "Tom had a red ball. He",
    "In the forest, there lived a",
    "Sam and Mia were playing in the",
    "The sun was shining and the",
    "Ben wanted to go to the park, but",
    "A small bird sat on a",
    "Anna found a box. She",
    "It was a cold day. The",
    "Max was a cat who",
    "Sue asked her dad if",
    "The old man gave the girl a",
    "There was a fish who",
)

GLAD = re.compile(
    r"\b(happy|happily|smil\w*|laugh\w*|fun|love\w*|friends?|hug\w*|play\w*|nice|thank\w*|best|glad|kind)\b"
)
SORRY = re.compile(r"\b(sad\w*|cr(?:y|ied|ying)|scared|angry|hurt\w*|mad|bad|sorry|afraid|lost|broke\w*|mean)\b")


def story_score(text: str) -> float:
    """The hidden gold reward: two points per distinct glad word of the text, less two per distinct sorry one."""
    text = text.lower()
    return 2.0 * (len(set(GLAD.findall(text))) - len(set(SORRY.findall(text))))


class StoryModel(NamedTuple):
    """A pretrained policy with its tokenizer and prompts.

    Attributes:
        policy, start: the decoder and its pretrained parameters.
        tokenizer: of the same directory.
        stop_ids: tokens that end a completion.
        openings: all prompts: `OPENINGS`, encoded, `[O, P]`.
        max_new_tokens: of a completion.
    """

    policy: LanguageModel
    start: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    openings: Prompts
    max_new_tokens: int

    def generate(self, params: Any, key: jax.Array, prompts: Prompts) -> Completions:
        """Returns one completion of each prompt."""
        sizes: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop_ids": self.stop_ids}
        return generate(self.policy, params, key, *prompts, **sizes)

    def texts(self, prompts: Prompts, responses: Responses) -> list[str]:
        """Returns prompt and response as text, for every response in `[B, ..., L]`, row by row."""
        tokens, mask = (np.asarray(leaf) for leaf in responses)
        rows = np.where(mask, tokens, -1).reshape(int(np.prod(tokens.shape[:-1])), tokens.shape[-1])
        before = np.where(prompts.mask, prompts.tokens, -1)
        rows = np.concatenate([np.repeat(before, len(rows) // len(before), axis=0), rows], axis=1)
        return self.tokenizer.decode_batch([row[row >= 0].tolist() for row in rows])

    def score(self, prompts: Prompts, responses: Responses) -> np.ndarray:
        """Returns the gold reward `story_score` of responses `[B, ..., L]`, `[B, ...]`."""
        scores = np.array([story_score(text) for text in self.texts(prompts, responses)], np.float32)
        return scores.reshape(responses.tokens.shape[:-1])


def load_stories(directory: pathlib.Path, *, max_new_tokens: int) -> StoryModel:
    """Returns the model of a Hugging Face directory.

    Raises:
        ValueError: the directory cannot be read as a decoder with a tokenizer.
    """
    shape, start = load_decoder(directory)
    tokenizer, special = load_tokenizer(directory), special_ids(directory)
    # BOS ends a text too: some models were trained with BOS alone between texts.
    ends: set[int] = {*special.eos} if special.bos is None else {*special.eos, special.bos}
    openings = left_padded([encode(tokenizer, special.bos, text) for text in OPENINGS])
    return StoryModel(decoder(shape), start, tokenizer, tuple(sorted(ends)), openings, max_new_tokens)


def encode(tokenizer: Any, bos: int | None, text: str) -> list[int]:
    """Returns BOS (once) and the text's tokens, without an end token."""
    tokens = [token for token in tokenizer.encode(text, add_special_tokens=False).ids if token != bos]
    return tokens if bos is None else [bos, *tokens]


def left_padded(rows: list[list[int]]) -> Prompts:
    """Returns the rows as one batch, padded on the left."""
    length = max(len(row) for row in rows)
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))
