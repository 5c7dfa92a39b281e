"""`jaxrlhf align --from-preferences`: known preferences are kept labels, and are used before anyone is asked."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.algorithms.replay import ReplayedState
from jaxrlhf.base.problem import SKIPPED
from jaxrlhf.commands.align_config import Align
from jaxrlhf.commands.data import read_all
from jaxrlhf.commands.methods import method_of
from jaxrlhf.commands.models import Model
from jaxrlhf.data.batches import PromptRows, padded_prompts, rectangle
from jaxrlhf.data.records import DataError
from jaxrlhf.data.tokenization import PairRow, describe_rows, tokenize_pairs
from jaxrlhf.lm.offline import offline_pairs
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.lm.transformer.model import decoder
from jaxrlhf.preferences import buffer
from jaxrlhf.training.step import put_on_devices, within


class Existing(NamedTuple):
    """Pairs with known preferences, N of them.

    Attributes:
        prompts: `[N, P]`.
        responses: tokens and mask, `[N, 2, L]` each.
        labels: `[N]`, 1 where the first response is better, 1/2 for a tie.
        note: a sentence for the plan and the report.
    """

    prompts: PromptRows
    responses: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray
    note: str


def read_existing(config: Align, policy: Model) -> Existing | None:
    """Returns the pairs of --from-preferences, read as `jaxrlhf reward` reads them; None without the flag.

    A pair whose prompt does not fit into --max-prompt is dropped; completions are cut to --max-new-tokens.

    Raises:
        DataError: the file cannot be read, or no pair is left.
    """
    if config.from_preferences is None:
        return None
    records = read_all(config.from_preferences, form="auto", skip_bad=config.skip_bad, data_dir=config.data_dir)
    try:
        tokenized = tokenize_pairs(
            policy.bundle.chat_tokenizer(),
            records.records,
            max_length=config.max_prompt + config.max_new_tokens,
            cut_prompts=config.cut_prompts,
        )
    except DataError as error:
        raise DataError(f"--from-preferences {config.from_preferences}: {error}") from None
    room = min(config.max_prompt, policy.config.context_length - config.max_new_tokens)
    rows = [row for row in tokenized.rows if _fits(row, room, config.max_new_tokens)]
    if not rows:
        raise DataError(
            f"No pair of --from-preferences {config.from_preferences} has a prompt of at most {config.max_prompt} tokens "
            f"and two completions that differ in their first {config.max_new_tokens}; raise --max-prompt or "
            "--max-new-tokens."
        )
    others = len(tokenized.rows) - len(rows)
    note = f"Existing preferences: {describe_rows(tokenized._replace(rows=rows))}"
    note += f"; {others:,} dropped (too long for --max-prompt or --max-new-tokens)" if others else ""
    cut = sum(
        len(text.tokens) - _start(row) > config.max_new_tokens for row in rows for text in (row.first, row.second)
    )
    note += f"; {cut:,} completions cut to --max-new-tokens." if cut else "."
    prompts, completions = zip(*(_split(row, config.max_new_tokens) for row in rows), strict=True)
    tokens, mask = rectangle(list(itertools.chain.from_iterable(completions)), config.max_new_tokens)
    return Existing(
        padded_prompts(list(prompts), max(map(len, prompts))),
        (tokens.reshape(len(rows), 2, -1), mask.reshape(len(rows), 2, -1)),
        np.array([row.label for row in rows], np.float32),
        note,
    )


def chunks_of(existing: Existing | None, size: int) -> int:
    """Returns the number of chunks of `size` rows that the pairs fill."""
    return 0 if existing is None else -(-len(existing.labels) // size)


def begin_with(
    config: Align,
    policy: Model,
    existing: Existing,
    state: Any,
    frozen: Any,
    review: Callable[[jax.Array, ReplayedState, Any], ReplayedState],
    mesh: Mesh,
    *,
    state_where: Any,
) -> Any:
    """Returns the initial state with the pairs among its kept labels, after as many updates from them as pass over all.

    Args:
        config: of the run.
        policy: the reference, which stands in for whoever wrote the responses (`lm.offline`).
        existing: the pairs; their prompts are no wider than those of the kept labels.
        state: donated.
        frozen: on the mesh.
        review: of `methods.Reusing`.
        mesh, state_where: of the run.
    """
    method, size = method_of(config), config.batch_size
    model = decoder(policy.config, dtype=jnp.float32, remat=config.remat)
    count, columns = chunks_of(existing, size), kept_labels(state).buffer.pairs.sample.prompts.tokens.shape[1]

    def put(state, chunk, frozen):
        prompts, responses, labels = chunk
        against = "reference" if method.against == "reference" else "policy"
        labelled = offline_pairs(model, prompts, responses, labels, frozen, against=against, per_token=method.per_token)
        kept = kept_labels(state)
        return _with_kept(state, kept._replace(buffer=buffer.add(kept.buffer, labelled)))

    def look(key, state, frozen):
        return _with_kept(state, review(key, kept_labels(state), frozen))

    put, look = (
        jax.jit(within(mesh, function), donate_argnums=index, out_shardings=state_where)
        for function, index in ((put, 0), (look, 1))
    )
    for number in range(count):
        chunk = put_on_devices(_chunk(existing, number, size, config.pairs, columns), _replicated(mesh))
        state = put(state, chunk, frozen)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), count)
    for key in keys:
        state = look(put_on_devices(key, _replicated(mesh)), state, frozen)
    return state


def _replicated(mesh: Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def kept_labels(state: Any) -> ReplayedState:
    """Returns the state that holds the kept labels, which a controller's state has inside."""
    return state if isinstance(state, ReplayedState) else kept_labels(state.inner)


def _with_kept(state: Any, kept: ReplayedState) -> Any:
    return kept if isinstance(state, ReplayedState) else state._replace(inner=_with_kept(state.inner, kept))


def _chunk(existing: Existing, number: int, size: int, pairs: int, columns: int) -> tuple:
    """Returns prompts, responses and labels of `size` rows of M pairs: one of a row is labelled, the others cost nothing.

    Rows that only fill the last chunk have no label at all.
    """
    rows = np.arange(number * size, (number + 1) * size)
    real, rows = rows < len(existing.labels), np.minimum(rows, len(existing.labels) - 1)
    missing = columns - existing.prompts.tokens.shape[1]
    prompts = Prompts(*(jnp.asarray(np.pad(leaf[rows], ((0, 0), (missing, 0)))) for leaf in existing.prompts))
    responses = Responses(*(jnp.asarray(np.repeat(leaf[rows][:, None], pairs, axis=1)) for leaf in existing.responses))
    labels = np.full((size, pairs, 1), SKIPPED, np.float32)
    labels[:, 0, 0] = np.where(real, existing.labels[rows], SKIPPED)
    return prompts, responses, jnp.asarray(labels)


def _start(row: PairRow) -> int:
    """Returns where both completions begin."""
    return min(int(text.completion_mask.argmax()) for text in (row.first, row.second))


def _split(row: PairRow, longest: int) -> tuple[np.ndarray, list[np.ndarray]]:
    start = _start(row)
    return row.first.tokens[:start], [text.tokens[start : start + longest] for text in (row.first, row.second)]


def _fits(row: PairRow, max_prompt: int, longest: int) -> bool:
    """Returns whether the prompt has room and the completions are single turns that differ where they are not cut."""
    start, texts = _start(row), (row.first, row.second)
    shared = np.array_equal(row.first.tokens[:start], row.second.tokens[:start])
    single = all(text.completion_mask[start:].all() for text in texts)
    _, (first, second) = _split(row, longest)
    return 0 < start <= max_prompt and shared and single and not np.array_equal(first, second)
