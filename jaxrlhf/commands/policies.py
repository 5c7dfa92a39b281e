"""Policies compared with a reference by an annotator: what `jaxrlhf evaluate --policy` does."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console

from jaxrlhf.commands.annotators import LABELS, judge_settings, open_annotator, people_of
from jaxrlhf.commands.best_of import best_of_responders, open_chooser, reward_scorer
from jaxrlhf.commands.comparison import Comparer, Comparison, open_comparer, policy_responder
from jaxrlhf.commands.models import Model, check_tokens, open_model
from jaxrlhf.commands.page_annotator import STORE
from jaxrlhf.commands.running import finish, open_folder
from jaxrlhf.data.tokenization import TokenizedRows, describe_rows, tokenize_prompts
from jaxrlhf.evaluation.win_rate import Interval, summarise
from jaxrlhf.training.report import Samples, Table

if TYPE_CHECKING:
    from jaxrlhf.commands.evaluate import Evaluate


class Rival(NamedTuple):
    """What was compared with the reference, and its summary; `bound` where the KL is that of best-of-n."""

    comparison: Comparison
    summary: dict[str, Interval]
    bound: bool


def evaluate_policies(
    config: "Evaluate",
    policies: tuple[pathlib.Path, ...],
    records: list,
    notes: list[str],
    print_plan: Callable[[Model, dict[str, str]], None],
) -> pathlib.Path:
    """Compares policies, and the best of n completions of the reference, with the reference; returns the run's folder.

    Raises:
        ValueError: a model cannot be used, the models differ in shape or tokenizer, or no pair has a label.
    """
    assert config.reference is not None
    settings = judge_settings(config)
    reference = open_model(config.reference, "policy")
    model = _open_policy(policies[0], reference)
    bundles = {str(config.reference): reference.bundle}
    for path in policies[1:]:
        # Read once now, so that one that cannot be used is known before labels are paid for, and again in its turn.
        bundles[str(path)] = _open_policy(path, reference).bundle
    others = [name for name, bundle in bundles.items() if bundle.template != model.bundle.template]
    if others:
        notes = [*notes, f"Prompts are written in the chat template of {policies[0]}; {', '.join(others)} has another."]
    chooser = None if config.reward is None else open_chooser(config.reward, reference.bundle)
    people = people_of(config, evaluates=True)
    annotator = open_annotator(
        config.annotator, config.score, model, journal=config.data_dir / LABELS, judge=settings, people=people
    )
    tokenized = _read_prompts(config, model, records)
    prompts = tokenized.rows[: config.prompts]
    remarks = {"reference": "\n".join(reference.remarks("Reference"))} if reference.remarks("Reference") else {}
    amount = _amount(config, len(prompts), len(policies))
    print_plan(model, {"prompts": describe_rows(tokenized), "completions": amount} | remarks)
    comparer = open_comparer(
        reference,
        [prompt for prompt in prompts for _ in range(config.completions)],
        annotator,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    # What cannot be written is better known before labels are paid for.
    folder = open_folder(config, "evaluate")
    with contextlib.nullcontext() if people is None else people.serve(config.data_dir / STORE):
        rivals = _rivals(config, policies, model, reference, comparer, chooser)
    labels = _label_notes(config, rivals, annotator.notes())
    folder.write_json("results.json", _results(rivals))
    return finish(
        folder,
        config,
        _table(config, rivals, len(prompts)),
        title="Evaluation",
        summary=", ".join(rivals),
        samples=[Samples("Completions", ("reference", *rivals), _side_by_side(rivals))],
        notes=[*notes, *labels, describe_rows(tokenized) + "."],
    )


def _rivals(
    config: "Evaluate",
    policies: tuple[pathlib.Path, ...],
    model: Model,
    reference: Model,
    comparer: Comparer,
    chooser: Model | None,
) -> dict[str, Rival]:
    """Returns what is compared with the reference, by name; `model` is the first policy."""
    rivals = {}
    for path in policies:
        params = model.params if path == policies[0] else _open_policy(path, reference).params
        rivals[str(path)] = _rival(config, comparer.compare(policy_responder(comparer, params, reference.params)))
    if chooser is not None:
        for number, respond in best_of_responders(
            comparer, reference.params, reward_scorer(chooser), config.best_of
        ).items():
            rivals[f"best of {number} by the reward"] = _rival(config, comparer.compare(respond), bound=True)
    return rivals


def _open_policy(path: pathlib.Path, reference: Model) -> Model:
    model = open_model(path, "policy")
    if model.config != reference.config:
        raise ValueError(
            f"The policy {path} and the reference are of different shapes; the KL between them needs one model."
        )
    check_tokens(model.bundle, reference.bundle, "--reference")
    return model


def _read_prompts(config: "Evaluate", model: Model, records: list) -> TokenizedRows[np.ndarray]:
    longest = min(config.max_length, model.config.context_length - config.max_new_tokens)
    if longest < 2:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model's context is "
            f"{model.config.context_length}."
        )
    return tokenize_prompts(model.bundle.chat_tokenizer(), records, max_length=longest, cut_prompts=config.cut_prompts)


def _amount(config: "Evaluate", prompts: int, policies: int) -> str:
    pairs, rivals = prompts * config.completions, policies + len(config.best_of)
    sampled = pairs * (1 + policies + max(config.best_of, default=0))
    return f"{sampled:,} of at most {config.max_new_tokens} tokens, {pairs * rivals:,} labels"


def _rival(config: "Evaluate", comparison: Comparison, *, bound: bool = False) -> Rival:
    shape = -1, config.completions
    summary = summarise(
        comparison.wins.reshape(shape),
        comparison.lengths.reshape(*shape, 2),
        comparison.log_ratio.reshape(shape),
        seed=config.seed,
    )
    return Rival(comparison, summary, bound)


def _label_notes(config: "Evaluate", rivals: dict[str, Rival], notes: list[str]) -> list[str]:
    labels = [
        f"{name}: {rival.comparison.labels_note()}" if len(rivals) > 1 else rival.comparison.labels_note()
        for name, rival in rivals.items()
    ]
    for note in (*labels, *notes):
        Console().print(note, markup=False, highlight=False)
    if not any(np.any(np.isfinite(rival.comparison.wins)) for rival in rivals.values()):
        pairs = len(next(iter(rivals.values())).comparison.wins)
        raise ValueError(
            f"None of the {pairs} pairs has a label, so that there is no win rate: "
            f"{config.annotator or config.score} gave none."
        )
    return [*labels, *notes]


def _results(rivals: dict[str, Rival]) -> dict:
    """Returns what results.json holds: the first policy's figures, and those of each under `policies`."""
    results = {}
    for name, rival in rivals.items():
        own: dict = rival.comparison.summary()
        for figure, interval in rival.summary.items():
            own |= {figure: interval.value, f"{figure}_low": interval.low, f"{figure}_high": interval.high}
        results[name] = own | {"kl_is_best_of_n": rival.bound}
    return next(iter(results.values())) | {"policies": results}


def _table(config: "Evaluate", rivals: dict[str, Rival], prompts: int) -> Table:
    rows = []
    for name, rival in rivals.items():
        win_rate, controlled, kl, length = (
            "no label" if np.isnan(value) else f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"
            for digits, (value, low, high) in zip((3, 3, 3, 1), rival.summary.values(), strict=True)
        )
        if rival.bound:
            kl = f"{rival.summary['kl'].value:.3f} at most"
        rows.append((_short_name(name, rivals), win_rate, controlled, kl, length))
    each = f"{prompts:,} prompts" + (f", {config.completions} completions of each" if config.completions > 1 else "")
    columns = ("policy", "win rate against the reference", "at equal length", "KL (nats)", "tokens per completion")
    return Table(f"On {each}; ± is half a 95% interval of the bootstrap over prompts", columns, rows)


def _short_name(name: str, rivals: dict[str, Rival]) -> str:
    """Returns the last part of a path where no other rival has it too."""
    last = [pathlib.PurePath(each).name for each in rivals]
    own = pathlib.PurePath(name).name
    return own if own and last.count(own) == 1 else name


def _side_by_side(rivals: dict[str, Rival], number: int = 12) -> list[tuple[str, list[str]]]:
    samples = [rival.comparison.samples[:number] for rival in rivals.values()]
    return [
        (prompt, [reference, *(each[row][1][1] for each in samples)])
        for row, (prompt, (reference, _)) in enumerate(samples[0])
    ]
