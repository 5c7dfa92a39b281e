"""Gold reward against KL: bilevel alignment and every baseline, in one harness, at equal labels and equal responses.

    python experiments/frontier.py --policy DIR
    python experiments/frontier.py --policy DIR --quick      # some minutes

DIR is a Hugging Face directory of a small model of stories. A controller leads a run of every method to each of a few KLs,
where all end with the same labels spent; what differs is how much gold reward they have to show for that. Two gold
rewards (a function of the text, a reward model), each with a learner's reward that can hold it and one that is too small.
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
from frontier_harness import Budget, Spent, compile_method, make_yard, run
from frontier_methods import RATES, WITH_REWARD, Parts, build
from frontier_tables import Found, Setting, joined, report
from frontier_tasks import (
    LEARNERS_RATE,
    Gold,
    GoldModel,
    World,
    best_by_reward,
    fit_gold_model,
    learners_reward,
    model_gold,
    open_world,
    pool,
    proposed_shapes,
    words_gold,
)
from rich.console import Console

from jaxrlhf.lm.problem import Responses
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.training.progress import progress
from jaxrlhf.training.run_folder import RunFolder, plain


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path
    """Hugging Face directory of the reference."""
    methods: tuple[str, ...] = tuple(name for name in RATES if name != "boltzmann")
    """Which; see `frontier_methods.RATES`."""
    golds: tuple[str, ...] = ("words", "model")
    """Who judges."""
    rewards: tuple[str, ...] = ("whole", "small")
    """The learner's reward model: the policy's pretrained trunk, or one that is too small."""
    seeds: int = 3
    first_seed: int = 0
    """The rates were chosen on seeds from 100 on."""
    kls: tuple[float, ...] = (2.2, 8.0)
    """Where the controller leads a run of every seed, in nats."""
    at: tuple[float, ...] = (2.0, 5.0)
    """KLs that the tables compare at, between the runs' ends."""
    steps: int = 32
    batch: int = 8
    """Prompts a step."""
    pairs: int = 4
    """Pairs a prompt and step; each costs one label."""
    max_new_tokens: int = 24
    evaluations: int = 3
    judged: int = 128
    """Responses that a policy is judged by, each time."""
    pool: int = 512
    """Responses of the reference to each opening, for best-of-n."""
    utility_weight: float = 0.3
    """Weight of the coupled win rate beside the likelihood, of the bilevel methods."""
    workers: int = 2
    """Processes side by side; 1 where one device does everything."""
    quick: bool = False
    """A quick look: two seeds, four methods, one gold reward, one KL, 20 steps."""
    extends: pathlib.Path | None = None
    """Folder of an earlier study, the same but for its --kls, whose runs are taken too; --methods then says which of its
    methods are led to these KLs as well."""
    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""


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
    """Raises ValueError for what cannot be run."""
    for name in config.methods:
        if name not in RATES:
            raise ValueError(f"There is no method {name!r}; choose from {', '.join(RATES)}.")
    for field, known in (("golds", ("words", "model")), ("rewards", ("whole", "small"))):
        for name in getattr(config, field):
            if name not in known:
                raise ValueError(f"--{field} knows {' and '.join(known)}, got {name!r}.")
    for name in ("seeds", "steps", "batch", "evaluations", "max_new_tokens", "judged", "pool", "workers"):
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


def earlier_of(config: Config) -> dict[Any, dict[str, Found]]:
    """Returns what the study that is extended has found, by method and size of the reward, and by gold reward.

    Raises:
        ValueError: there is no such study, or it was another one.
    """
    if config.extends is None:
        return {}
    try:
        told = json.loads((config.extends / "config.json").read_text())
        rows = [json.loads(line) for line in (config.extends / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--extends {config.extends} is no study's folder ({error}).") from None
    ours = plain(dataclasses.replace(config, extends=None))
    free = {"methods", "kls", "at", "output", "extends", "workers", "policy"}
    other = [name for name in ours if name not in free and told.get(name) != ours[name]]
    if other:
        raise ValueError(f"--extends {config.extends} is another study: its {', '.join(other)} differ.")
    if unknown := [name for name in config.methods if name not in told["methods"]]:
        raise ValueError(f"--extends {config.extends} did not run {', '.join(unknown)}.")
    found: dict[Any, dict[str, Found]] = {}
    for row in rows:
        history = [{name: np.array(values, float) for name, values in each.items()} for each in row["history"]]
        one = Found(history, tuple(row["kls"]), Spent(**row["spent"]), row["seconds"])
        found.setdefault((row["method"], row["reward"]), {})[row["gold"]] = one
    return found


def parts_of(config: Config, world: World, size: str) -> tuple[Parts, Any]:
    """Returns what all methods share, and the first parameters of the learner's reward."""
    reward, first = learners_reward(world, size)
    parts = Parts(
        policy=world.policy,
        reward=reward,
        reward_learning_rate=LEARNERS_RATE[size],
        critic=reward_model(world.policy).from_trunk(world.start),
        pairs=config.pairs,
        max_new_tokens=world.max_new_tokens,
        stop_ids=world.stop_ids,
        steps=config.steps,
        shapes=lambda problem: proposed_shapes(world, problem, config.batch),
        buffer=config.steps * config.batch,
        batch=config.batch,
        utility_weight=config.utility_weight,
    )
    return parts, first


Case = tuple[str, str | None]
"""A method and the size of the reward it learns, None for those that learn none; or `BEST` and a size."""

BEST = "best of n"


def cases_of(config: Config) -> list[Case]:
    """Returns what is run: methods without a reward once, those with one a size each, which take longest, first."""
    cases: list[Case] = [(name, size) for name in config.methods if name in WITH_REWARD for size in config.rewards]
    cases += [(name, None) for name in config.methods if name not in WITH_REWARD]
    return cases + [(BEST, size) for size in config.rewards]


class Given(NamedTuple):
    """What all cases share: the gold model's parameters, None where it does not judge, and the reference's responses."""

    gold_model: GoldModel | None
    pool: Responses


def golds_of(config: Config, world: World, given: Given) -> dict[str, Gold]:
    """Returns the gold rewards by name."""
    made = {"words": words_gold(world)}
    if given.gold_model is not None:
        made["model"] = model_gold(world, given.gold_model)
    return {name: made[name] for name in config.golds}


def run_case(config: Config, case: Case, given: Given) -> dict[str, Any]:
    """Runs one case under every gold reward, compiled once; returns by gold reward what was `Found`, or the proxies."""
    world = open_world(config.policy, max_new_tokens=config.max_new_tokens)
    golds, budget = golds_of(config, world, given), budget_of(config)
    name, size = case
    many = Responses(*(jnp.asarray(part) for part in given.pool))
    if name == BEST:
        sizes: dict[str, Any] = {"prompts": config.steps * config.batch, "pairs": config.pairs, "seeds": budget.seeds}
        return {label: best_by_reward(world, gold, many, size or "whole", **sizes) for label, gold in golds.items()}
    repeats = repeats_of(config, world)
    parts, first = parts_of(config, world, size or "whole")
    runner = compile_method(world, parts, build(name, parts, RATES[name]), first, budget, repeats)
    found = {}
    for label, gold in golds.items():
        base, other = (Responses(*(part[:, begin : begin + repeats] for part in many)) for begin in (0, repeats))
        yard = make_yard(world, gold, base, other, seed=config.first_seed)
        began = time.monotonic()
        history, spent, _ = run(runner, world, gold, yard, budget)
        found[label] = Found(history, budget.kls, spent, time.monotonic() - began)
    return found


def repeats_of(config: Config, world: World) -> int:
    """Returns the responses to an opening by which a policy is judged."""
    return max(1, config.judged // len(world.openings.tokens))


def budget_of(config: Config) -> Budget:
    """Returns what every method may use."""
    seeds = tuple(range(config.first_seed, config.first_seed + config.seeds))
    return Budget(seeds, config.kls, config.steps, config.batch, config.evaluations)


def everything(config: Config, cases: list[Case], given: Given) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields what each case found, as they are done: here, or in processes of their own with a part of the cores each.

    One small model does not fill several cores; several side by side do.
    """
    if config.workers == 1:
        for case in cases:
            yield case, run_case(config, case, given)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(config.workers):
        numbers.put(number)
    pool = concurrent.futures.ProcessPoolExecutor(config.workers, context, begin_worker, (numbers, config.workers))
    with pool:
        waiting = {pool.submit(run_case, config, case, given): case for case in cases}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


def begin_worker(numbers: Any, workers: int) -> None:
    """Keeps a worker to its share of the cores, and ends it with the process that it works for."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[numbers.get() :: workers] or cores)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def study(config: Config, world: World, folder: RunFolder, console: Console) -> list[Setting]:
    """Runs everything; returns what was found in each setting."""
    repeats = repeats_of(config, world)
    _, many = pool(world, max(config.pool, 2 * repeats), seed=config.first_seed + 1_000)
    fitted = fit_gold_model(world) if "model" in config.golds else None
    given = Given(fitted, jax.device_get(many))
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
        for case, results in everything(config, cases, given):
            before = earlier.get(case, {})
            keep(case, {label: joined(before[label], new) if before else new for label, new in results.items()})
            advance()
    names = [name for name in RATES if any(name == case[0] for case in found)]
    settings = []
    for label, gold in golds_of(config, world, given).items():
        scores = gold(world.openings, many)[..., 0]
        for size in config.rewards:
            methods = {name: found[name, size if name in WITH_REWARD else None][label] for name in names}
            settings.append(Setting(label, size, methods, scores, found[BEST, size][label]))
    return settings


def main(config: Config) -> pathlib.Path:
    """Runs the study; returns its folder."""
    console, began = Console(), time.monotonic()
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    try:
        check(config)
        world = open_world(config.policy, max_new_tokens=config.max_new_tokens)
        folder = RunFolder(config.output, "frontier")
    except ValueError as error:
        print(f"frontier: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", config)
    settings = study(config, world, folder, console)
    report(folder, config, settings, time.monotonic() - began, console)
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
