"""Gold reward against KL: bilevel alignment and every baseline, in one harness, at equal labels and equal responses.

    python experiments/frontier.py --policy DIR              # an hour on 2 cores
    python experiments/frontier.py --policy DIR --quick      # five minutes

DIR is a Hugging Face directory of a small model of stories. A controller leads every method along one ramp of KL, so
that at any step all have spent the same labels and stand at about the same distance from the reference; what differs is
how much gold reward they have to show for it. Two gold rewards (a function of the text, a reward model), each with a
learner's reward that can hold it and one that is too small.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import tyro
from frontier_harness import Budget, Runner, Yard, compile_method, make_yard, run
from frontier_methods import RATES, WITH_REWARD, Parts, build
from frontier_tables import Found, Setting, report
from frontier_tasks import (
    LEARNERS_RATE,
    Gold,
    World,
    best_by_reward,
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
from jaxrlhf.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare."""

    policy: pathlib.Path
    """Hugging Face directory of the reference."""
    methods: tuple[str, ...] = tuple(RATES)
    """Which; see `frontier_methods.RATES`."""
    golds: tuple[str, ...] = ("words", "model")
    """Who judges."""
    rewards: tuple[str, ...] = ("whole", "small")
    """The learner's reward model: the policy's pretrained trunk, or one that is too small."""
    seeds: int = 6
    first_seed: int = 0
    """The rates were chosen on seeds from 100 on."""
    steps: int = 40
    batch: int = 8
    """Prompts a step."""
    pairs: int = 4
    """Pairs a prompt and step; each costs one label."""
    max_new_tokens: int = 32
    kl: float = 6.0
    """Where the ramp ends, in nats."""
    at: tuple[float, ...] = (2.0, 5.0)
    """KLs that the tables compare at."""
    evaluations: int = 5
    judged: int = 256
    """Responses that a policy is judged by, each time."""
    pool: int = 512
    """Responses of the reference to each opening, for best-of-n."""
    utility_weight: float = 1.0
    """Weight of the coupled win rate beside the likelihood, of the bilevel methods."""
    quick: bool = False
    """A look in five minutes: two seeds, four methods, one gold reward, 20 steps."""
    output: pathlib.Path = pathlib.Path("runs")
    """Where the run's own folder is made."""


QUICK: dict[str, Any] = {
    "methods": ("offline DPO", "online DPO", "RLOO", "bilevel"),
    "golds": ("words",),
    "rewards": ("whole",),
    "seeds": 2,
    "steps": 20,
    "kl": 3.0,
    "at": (2.0,),
    "evaluations": 3,
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
    for name in ("seeds", "steps", "batch", "evaluations", "max_new_tokens", "judged", "pool"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.pairs < 2:
        raise ValueError(f"--pairs {config.pairs}: a prompt needs at least 2 pairs, to compare one with the other.")
    if not config.kl > 0 or not all(0 < at <= config.kl for at in config.at):
        raise ValueError(f"--kl must be positive and --at within it, got {config.kl} and {config.at}.")
    if config.evaluations > config.steps:
        raise ValueError(f"--evaluations {config.evaluations} are more than the {config.steps} steps.")


def parts_of(config: Config, world: World, size: str) -> tuple[Parts, Any]:
    """Returns what all methods share, and the first parameters of the learner's reward."""
    reward, first = learners_reward(world, size)
    parts = Parts(
        policy=world.policy,
        reward=reward,
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


def cases_of(config: Config) -> list[tuple[str, str | None]]:
    """Returns what is trained under each gold reward: methods without a reward once, those with one a size each."""
    plain: list[tuple[str, str | None]] = [(name, None) for name in config.methods if name not in WITH_REWARD]
    return plain + [(name, size) for size in config.rewards for name in config.methods if name in WITH_REWARD]


def study(config: Config, world: World, budget: Budget, folder: RunFolder, console: Console) -> list[Setting]:
    """Runs everything; returns what was found in each setting."""
    cases = cases_of(config)
    repeats = max(1, config.judged // len(world.openings.tokens))
    runners: dict[tuple[str, str | None], Runner] = {}
    _, many = pool(world, max(config.pool, 2 * repeats), seed=config.first_seed + 1_000)
    settings = []
    total = len(config.golds) * len(cases) * config.steps
    with progress("frontier", total, "labels", console=console) as advance:
        for gold_name in config.golds:
            gold = words_gold(world) if gold_name == "words" else model_gold(world)
            yard = yard_of(world, gold, many, repeats, config)
            pool_scores = gold(world.openings, many)[..., 0]
            found: dict[tuple[str, str | None], Found] = {}
            for case in cases:
                if case not in runners:
                    parts, first = parts_of(config, world, case[1] or "whole")
                    rates = dataclasses.replace(RATES[case[0]], reward=LEARNERS_RATE[case[1] or "whole"])
                    runners[case] = compile_method(world, parts, build(case[0], parts, rates), first, budget, repeats)
                began = time.monotonic()
                labels = config.batch * config.pairs * config.seeds
                history, spent, _ = run(
                    runners[case], world, gold, yard, budget, advance=lambda labels=labels: advance(labels)
                )
                found[case] = Found(history, spent, time.monotonic() - began)
                folder.append_metrics(
                    gold=gold_name,
                    method=case[0],
                    reward=case[1],
                    spent=spent,
                    seconds=found[case].seconds,
                    history=history,
                )
            for size in config.rewards:
                proxies = best_by_reward(
                    world, gold, many, size, prompts=config.steps * config.batch, pairs=config.pairs, seeds=budget.seeds
                )
                settings.append(
                    Setting(
                        gold=gold_name,
                        reward=size,
                        found={name: found[name, size if name in WITH_REWARD else None] for name in config.methods},
                        pool_scores=pool_scores,
                        proxies=proxies,
                    )
                )
    return settings


def yard_of(world: World, gold: Gold, many: Responses, repeats: int, config: Config) -> Yard:
    """Returns the measures: the pool's first responses are what policies are compared with."""
    base, other = (Responses(*(part[:, first : first + repeats] for part in many)) for first in (0, repeats))
    return make_yard(world, gold, base, other, seed=config.first_seed)


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
    budget = Budget(
        seeds=tuple(range(config.first_seed, config.first_seed + config.seeds)),
        steps=config.steps,
        batch=config.batch,
        kl=config.kl,
        evaluations=config.evaluations,
        judged=config.judged,
    )
    folder.write_json("config.json", config)
    settings = study(config, world, budget, folder, console)
    report(folder, config, settings, time.monotonic() - began, console)
    return folder.path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
