"""The two tasks of `online_rlhf.py`: a language that can be enumerated, and a pretrained model from a directory.

A task brings what differs: models, prompts, annotator, evaluation. Everything else is shared.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import exact, preferences
from jaxrlhf.bilevel import BilevelProblem, BilevelState
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.weights import load_decoder, load_tokenizer, special_ids
from jaxrlhf.lm.language import (
    STOP,
    alphabet_gold,
    alphabet_language,
    evaluate_language,
    policy_table,
    reward_table,
    table_of,
)
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, Prompts, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder
from jaxrlhf.objectives import Objective


class Task(NamedTuple):
    """What a run needs to know.

    Attributes:
        problem: the bilevel problem of an objective.
        upper: the reward model's initial parameters.
        frozen: the reference policy, which is also where the policy starts.
        batches: `() -> ` endless batches of prompts, the same at every call.
        traced_annotator: for tasks whose gold reward JAX can trace, else None.
        host_annotator: `(key, sample) -> labels` in plain Python, else None.
        evaluate: `(state) -> measurements` at tilt 0: true_return, win_rate, kl, value and, where exact, more.
        optimum: best value E gold - beta KL; exact, or estimated from the reference's completions, too low in expectation
            (Jensen), so that a measured value may exceed it.
        spread: standard deviation of the reference's gold rewards.
        write: `(policy) -> [(prompt, completion)]`.
    """

    problem: Callable[[Objective], BilevelProblem]
    upper: Any
    frozen: LanguageFrozen
    batches: Callable[[], Iterator[Prompts]]
    traced_annotator: preferences.Annotator | None
    host_annotator: Callable | None
    evaluate: Callable[[BilevelState], dict[str, float]]
    optimum: float
    spread: float
    write: Callable[[Any], list[tuple[str, str]]]


def enumerable_task(seed: int, objective: Objective, *, beta: float, pairs: int) -> Task:
    """Returns words over seven letters, at most four long: 2,801 completions for each of four prompts.

    Policy and reward are two-layer decoders; the reference is the policy's random initialisation. Evaluation visits every
    completion, so it carries no sampling error.
    """
    language = alphabet_language()
    shape = DecoderConfig(
        vocabulary_size=8,
        width=32,
        layers=2,
        query_heads=2,
        key_value_heads=1,
        head_size=16,
        mlp_width=64,
        context_length=8,
    )
    policy, reward = decoder(shape), reward_model(decoder(shape))
    policy_key, reward_key = jax.random.split(jax.random.key(seed))
    start = policy.init(policy_key)
    gold = jax.jit(lambda: table_of(alphabet_gold, language))()
    table = jax.jit(lambda params: policy_table(policy, params, language))
    rewards = jax.jit(lambda params: reward_table(reward, params, language))
    reference = table(start)
    judge = jax.jit(lambda own, learned: evaluate_language(own, reference, learned, gold, objective, beta=beta))

    def evaluate(state):
        verdict = judge(table(state.policy), rewards(state.upper))
        measured = {name: float(value) for name, value in verdict.policy._asdict().items()}
        return measured | {
            "value": measured["true_return"] - beta * measured["kl"],
            "upper_loss": float(verdict.upper_loss),
            "phi": float(verdict.phi),
        }

    def write(params):
        rows = Prompts(*(jnp.repeat(part, 4, axis=0) for part in language.prompts))
        written = generate(policy, params, jax.random.key(0), *rows, max_new_tokens=4, stop_ids=(STOP,))
        return [
            (spell(prompt), spell(tokens))
            for prompt, tokens in zip(np.asarray(rows.tokens), np.asarray(written.tokens), strict=True)
        ]

    spread = jnp.mean(exact.mean_under(reference, gold**2) - exact.mean_under(reference, gold) ** 2) ** 0.5
    return Task(
        problem=lambda objective: language_problem(
            policy, reward, objective, pairs=pairs, max_new_tokens=4, stop_ids=(STOP,)
        ),
        upper=reward.init(reward_key),
        frozen=LanguageFrozen(start),
        batches=lambda: itertools.repeat(language.prompts),
        traced_annotator=preferences.gold_annotator(
            lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses), labels=objective.labels
        ),
        host_annotator=None,
        evaluate=evaluate,
        optimum=float(exact.soft_value(gold, reference, beta)),
        spread=float(spread),
        write=write,
    )


def spell(tokens: np.ndarray) -> str:
    """Returns letters for tokens, up to the stop."""
    return "".join(chr(ord("a") + token - 1) for token in itertools.takewhile(lambda token: token != STOP, tokens))


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
    """The hidden gold reward: two points for every different glad word of a text, less two for every sorry one."""
    text = text.lower()
    return 2.0 * (len(set(GLAD.findall(text))) - len(set(SORRY.findall(text))))


def pretrained_task(
    directory: pathlib.Path,
    seed: int,
    objective: Objective,
    *,
    beta: float,
    batch: int,
    pairs: int,
    max_new_tokens: int,
    judged: int = 512,
) -> Task:
    """Returns the task of a Hugging Face directory: continue short stories, judged by `story_score`.

    The gold reward is a Python function of the text: the learner meets it only through labels. Evaluation writes `judged`
    fresh completions and compares them with as many of the reference.
    """
    shape, start = load_decoder(directory)
    tokenizer, special = load_tokenizer(directory), special_ids(directory)
    policy = decoder(shape)
    reward = reward_model(policy)
    # A text that starts anew has ended: some models were trained with BOS alone between texts.
    ends: set[int] = {*special.eos} if special.bos is None else {*special.eos, special.bos}
    stop_ids = tuple(sorted(ends))
    opening = [encode(tokenizer, special.bos, text) for text in OPENINGS]
    problem_shape: dict[str, Any] = {"pairs": pairs, "max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    source = grain.MapDataset.source(range(len(opening))).shuffle(seed=seed).repeat()
    whole = left_padded(opening)

    def batches():
        for first in itertools.count(step=batch):
            chosen = np.array([source[first + offset] for offset in range(batch)])
            yield Prompts(*(part[chosen] for part in whole))

    def texts(prompts, tokens, mask):
        rows = np.concatenate([np.where(prompts.mask, prompts.tokens, -1), np.where(mask, tokens, -1)], axis=1)
        return tokenizer.decode_batch([[token for token in row if token >= 0] for row in rows.tolist()])

    def scores(prompts, tokens, mask):
        return np.array([story_score(text) for text in texts(prompts, tokens, mask)], np.float32)

    def annotate(key, sample):
        tokens, mask = (np.asarray(part) for part in sample.responses)
        count = tokens.shape[1] * tokens.shape[2]
        prompts = Prompts(*(jnp.repeat(part, count, axis=0) for part in sample.prompts))
        flat = scores(prompts, tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        return preferences.draw_labels(key, jnp.asarray(flat.reshape(tokens.shape[:3])), labels=objective.labels)

    repeats = -(-judged // len(opening))
    asked = Prompts(*(jnp.repeat(part, repeats, axis=0) for part in whole))

    @jax.jit
    def write_and_weigh(params, reference, asked: Prompts, key):
        written = generate(policy, params, key, *asked, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        theirs = completion_log_probs(policy, reference, *asked, written.tokens, written.mask)
        return written, jnp.sum(written.log_prob, axis=-1) - jnp.sum(theirs, axis=-1)

    def judged_completions(params, key):
        written, log_ratio = write_and_weigh(params, start, asked, jax.random.key(key))
        return scores(asked, np.asarray(written.tokens), np.asarray(written.mask)), np.asarray(log_ratio)

    base, _ = judged_completions(start, 1_000_001)
    by_prompt = base.reshape(len(opening), repeats)

    def evaluate(state):
        own, log_ratio = judged_completions(state.policy, 1_000_000)
        win_rate = np.mean(preferences.preference(jnp.stack([own, base], axis=-1)))
        kl = float(log_ratio.mean())
        return {
            "true_return": float(own.mean()),
            "true_return_error": float(own.std() / len(own) ** 0.5),
            "win_rate": float(win_rate),
            "kl": kl,
            "kl_error": float(log_ratio.std() / len(own) ** 0.5),
            "value": float(own.mean()) - beta * kl,
            "gain_in_spreads": float((own.mean() - base.mean()) / base.std()),
        }

    def write(params):
        few = Prompts(*(part[::repeats] for part in asked))
        written = generate(policy, params, jax.random.key(0), *few, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        tokens, mask = np.asarray(written.tokens), np.asarray(written.mask)
        whole_texts = texts(few, tokens, mask)
        return [(first, text.removeprefix(first)) for first, text in zip(OPENINGS, whole_texts, strict=False)]

    return Task(
        problem=lambda objective: language_problem(policy, reward, objective, **problem_shape),
        upper=reward.from_trunk(start),
        frozen=LanguageFrozen(start),
        batches=batches,
        traced_annotator=None,
        host_annotator=annotate,
        evaluate=evaluate,
        optimum=float(np.mean(beta * (np.asarray(jax.nn.logsumexp(by_prompt / beta, axis=1)) - np.log(repeats)))),
        spread=float(base.std()),
        write=write,
    )


def encode(tokenizer: Any, bos: int | None, text: str) -> list[int]:
    """Returns BOS, once, and the text's tokens, without an end."""
    tokens = [token for token in tokenizer.encode(text, add_special_tokens=False).ids if token != bos]
    return tokens if bos is None else [bos, *tokens]


def left_padded(rows: list[list[int]]) -> Prompts:
    """Returns the rows as one batch, padded on the left."""
    length = max(len(row) for row in rows)
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))
