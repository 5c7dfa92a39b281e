"""Gold reward against KL: bilevel alignment and every baseline, in one harness, at equal labels and equal responses.

    python experiments/frontier.py --policy DIR
    python experiments/frontier.py --policy DIR --quick      # a few minutes

DIR is a Hugging Face directory of a small model of stories. A controller steers a run of every method to each of a few
KLs. All runs spend the same labels and end at the same KLs; they are compared by the gold reward reached there. There are
two gold rewards (a function of the text, a reward model), each with a learner's reward that is large enough to represent
it and one that is too small.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from frontier_harness import Budget, Spent, compile_method, make_baseline, run
from frontier_methods import RATES, WITH_REWARD, Setup, build
from frontier_tables import Runs, Setting, joined, report
from frontier_tasks import (
    REWARD_LEARNING_RATES,
    Gold,
    GoldModel,
    fit_gold_model,
    learners_reward,
    model_gold,
    proposed_shapes,
    proxy_scores,
    reference_pool,
)
from rich.console import Console
from stories import StoryModel, load_stories

from jaxrlhf.lm.pairing import Responses
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.training.progress import progress
from jaxrlhf.training.run_folder import RunFolder, plain


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path
    """Hugging Face directory of the reference."""
    methods: tuple[str, ...] = tuple(name for name in RATES if name != "boltzmann")
    """Names in `frontier_methods.RATES`."""
    golds: tuple[str, ...] = ("words", "model")
    """Gold rewards."""
    rewards: tuple[str, ...] = ("whole", "small")
    """Learner's reward models: the policy's pretrained trunk, or one that is too small."""
    seeds: int = 3
    first_seed: int = 0
    """The learning rates were tuned on seeds from 100 on."""
    kls: tuple[float, ...] = (2.2, 8.0)
    """Target KLs of the controller, in nats; one run per seed and KL."""
    at: tuple[float, ...] = (2.0, 5.0)
    """KLs at which the tables compare, interpolated between the runs' ends."""
    steps: int = 32
    batch: int = 8
    """Prompts per step."""
    pairs: int = 4
    """Pairs per prompt and step; each costs one label."""
    max_new_tokens: int = 24
    evaluations: int = 3
    evaluation_responses: int = 128
    """Responses generated in each evaluation of a policy."""
    pool: int = 512
    """Responses of the reference to each opening, for best-of-n."""
    utility_weight: float = 0.3
    """Weight of the coupled win rate beside the likelihood, in the bilevel methods."""
    workers: int = 2
    """Number of worker processes; use 1 when a single device does all the work."""
    quick: bool = False
    """A short run: two seeds, four methods, one gold reward, one KL, 20 steps."""
    extends: pathlib.Path | None = None
    """Folder of an earlier study with the same settings except --kls; its runs are included. --methods then selects which
    of its methods are also run at the new KLs."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


QUICK: dict[str, Any] = {
    "methods": ("offline DPO", "online DPO", "RLOO", "bilevel"),
    "golds": ("words",),
    "rewards": ("whole",),
    "seeds": 2,
    "steps": 20,
    "kls": (3.0,),
    "at": (2.0,),
    "pool": 64,
}


def check(config: Config) -> None:
    """Raises ValueError for settings that cannot be run."""
    for name in config.methods:
        if name not in RATES:
            raise ValueError(f"There is no method {name!r}; choose from {', '.join(RATES)}.")
    for field, known in (("golds", ("words", "model")), ("rewards", ("whole", "small"))):
        for name in getattr(config, field):
            if name not in known:
                raise ValueError(f"--{field} knows {' and '.join(known)}, got {name!r}.")
    for name in ("seeds", "steps", "batch", "evaluations", "max_new_tokens", "evaluation_responses", "pool", "workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.pairs < 2:
        raise ValueError(f"--pairs {config.pairs}: a prompt needs at least 2 pairs, to compare one with the other.")
    if not config.kls or not min(config.kls) > 0 or list(config.kls) != sorted(config.kls):
        raise ValueError(f"--kls are positive and rise, got {config.kls}.")
    if not all(0 < at <= max(config.kls) for at in config.at):
        raise ValueError(f"--at lies within --kls, got {config.at} and {config.kls}.")
    earlier_of(config)
    if config.evaluations > config.steps:
        raise ValueError(f"--evaluations {config.evaluations} are more than the {config.steps} steps.")


def earlier_of(config: Config) -> dict[Any, dict[str, Runs]]:
    """Returns the runs of the study that is extended, by method and size of the reward, then by gold reward.

    Raises:
        ValueError: there is no such study, or its settings differ.
    """
    if config.extends is None:
        return {}
    try:
        stored = json.loads((config.extends / "config.json").read_text())
        rows = [json.loads(line) for line in (config.extends / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--extends {config.extends} is no study's folder ({error}).") from None
    settings = plain(dataclasses.replace(config, extends=None))
    free = {"methods", "kls", "at", "output", "extends", "workers", "policy"}
    different = [name for name in settings if name not in free and stored.get(name) != settings[name]]
    if different:
        raise ValueError(f"--extends {config.extends} is another study: its {', '.join(different)} differ.")
    if unknown := [name for name in config.methods if name not in stored["methods"]]:
        raise ValueError(f"--extends {config.extends} did not run {', '.join(unknown)}.")
    earlier: dict[Any, dict[str, Runs]] = {}
    for row in rows:
        history = [{name: np.array(values, float) for name, values in each.items()} for each in row["history"]]
        runs = Runs(history, tuple(row["kls"]), Spent(**row["spent"]), row["seconds"])
        earlier.setdefault((row["method"], row["reward"]), {})[row["gold"]] = runs
    return earlier


def setup_of(config: Config, stories: StoryModel, size: str) -> tuple[Setup, Any]:
    """Returns the setup of all methods, and `key -> ` initial parameters of the learner's reward."""
    reward, first = learners_reward(stories, size)
    setup = Setup(
        policy=stories.policy,
        reward=reward,
        reward_learning_rate=REWARD_LEARNING_RATES[size],
        critic=reward_model(stories.policy).from_trunk(stories.start),
        pairs=config.pairs,
        max_new_tokens=stories.max_new_tokens,
        stop_ids=stories.stop_ids,
        steps=config.steps,
        shapes=lambda problem: proposed_shapes(stories, problem, config.batch),
        buffer=config.steps * config.batch,
        batch=config.batch,
        utility_weight=config.utility_weight,
    )
    return setup, first


Case = tuple[str, str | None]
"""A method and the size of the reward it learns (None for methods without a reward); or `BEST` and a size."""

BEST = "best of n"


def cases_of(config: Config) -> list[Case]:
    """Returns the cases to run, longest first: methods with a reward once per size, those without once."""
    cases: list[Case] = [(name, size) for name in config.methods if name in WITH_REWARD for size in config.rewards]
    cases += [(name, None) for name in config.methods if name not in WITH_REWARD]
    return cases + [(BEST, size) for size in config.rewards]


class Shared(NamedTuple):
    """What all cases share: the gold model (None if it is not among the gold rewards) and the reference's responses."""

    gold_model: GoldModel | None
    pool: Responses


def golds_of(config: Config, stories: StoryModel, shared: Shared) -> dict[str, Gold]:
    """Returns the gold rewards by name."""
    golds: dict[str, Gold] = {"words": stories.score}
    if shared.gold_model is not None:
        golds["model"] = model_gold(stories, shared.gold_model)
    return {name: golds[name] for name in config.golds}


def run_case(config: Config, case: Case, shared: Shared) -> dict[str, Any]:
    """Runs one case under every gold reward, compiled once; returns `Runs`, or the proxy's scores, by gold reward."""
    stories = load_stories(config.policy, max_new_tokens=config.max_new_tokens)
    golds, budget = golds_of(config, stories, shared), budget_of(config)
    name, size = case
    pool = Responses(*(jnp.asarray(leaf) for leaf in shared.pool))
    if name == BEST:
        sizes: dict[str, Any] = {"prompts": config.steps * config.batch, "pairs": config.pairs, "seeds": budget.seeds}
        return {label: proxy_scores(stories, gold, pool, size or "whole", **sizes) for label, gold in golds.items()}
    repeats = repeats_of(config, stories)
    setup, first = setup_of(config, stories, size or "whole")
    runner = compile_method(stories, setup, build(name, setup, RATES[name]), first, budget, repeats)
    found = {}
    for label, gold in golds.items():
        base, other = (Responses(*(leaf[:, begin : begin + repeats] for leaf in pool)) for begin in (0, repeats))
        baseline = make_baseline(stories, gold, base, other, seed=config.first_seed)
        began = time.monotonic()
        history, spent, _ = run(runner, stories, gold, baseline, budget)
        found[label] = Runs(history, budget.kls, spent, time.monotonic() - began)
    return found


def repeats_of(config: Config, stories: StoryModel) -> int:
    """Returns the number of responses to each opening in an evaluation."""
    return max(1, config.evaluation_responses // len(stories.openings.tokens))


def budget_of(config: Config) -> Budget:
    """Returns what every method may use."""
    seeds = tuple(range(config.first_seed, config.first_seed + config.seeds))
    return Budget(seeds, config.kls, config.steps, config.batch, config.evaluations)


def run_cases(config: Config, cases: list[Case], shared: Shared) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields the results of each case as it finishes: in this process, or in workers that each use some of the cores.

    One small model does not use several cores well; several side by side do.
    """
    if config.workers == 1:
        for case in cases:
            yield case, run_case(config, case, shared)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(config.workers):
        numbers.put(number)
    executor = concurrent.futures.ProcessPoolExecutor(config.workers, context, begin_worker, (numbers, config.workers))
    with executor:
        futures = {executor.submit(run_case, config, case, shared): case for case in cases}
        for done in concurrent.futures.as_completed(futures):
            yield futures[done], done.result()


def begin_worker(numbers: Any, workers: int) -> None:
    """Pins a worker to its share of the cores, and makes it exit when its parent process does."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[numbers.get() :: workers] or cores)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def study(config: Config, stories: StoryModel, folder: RunFolder, console: Console) -> list[Setting]:
    """Runs every case; returns the results of each setting."""
    repeats = repeats_of(config, stories)
    pool = reference_pool(stories, max(config.pool, 2 * repeats), seed=config.first_seed + 1_000)
    gold_model = fit_gold_model(stories) if "model" in config.golds else None
    shared = Shared(gold_model, jax.device_get(pool))
    cases, found, earlier = cases_of(config), {}, earlier_of(config)

    def keep(case: Case, results: dict[str, Any]) -> None:
        found[case] = results
        for label, result in results.items():
            if case[0] != BEST:
                folder.append_metrics(gold=label, method=case[0], reward=case[1], **result._asdict())

    for case in earlier:
        if case not in cases:
            keep(case, earlier[case])
    with progress("frontier", len(cases), "methods", console=console) as advance:
        for case, results in run_cases(config, cases, shared):
            before = earlier.get(case, {})
            keep(case, {label: joined(before[label], new) if before else new for label, new in results.items()})
            advance()
    names = [name for name in RATES if any(name == case[0] for case in found)]
    settings = []
    for label, gold in golds_of(config, stories, shared).items():
        scores = gold(stories.openings, pool)[..., 0]
        for size in config.rewards:
            runs = {name: found[name, size if name in WITH_REWARD else None][label] for name in names}
            settings.append(Setting(label, size, runs, scores, found[BEST, size][label]))
    return settings


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    try:
        check(config)
        stories = load_stories(config.policy, max_new_tokens=config.max_new_tokens)
        folder = RunFolder(config.output, "frontier")
    except ValueError as error:
        print(f"frontier: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    settings = study(config, stories, folder, console)
    report(folder, config, settings, time.monotonic() - began, console)
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
