"""State a price, get the optimum: online RLHF as one bilevel problem, against iterated RLHF, at equal labels.

    python experiments/online_rlhf.py                    # replies that can be read; every figure exact
    python experiments/online_rlhf.py --task letters     # networks on a language of letters; every figure exact
    python experiments/online_rlhf.py --policy DIR       # a pretrained model in a Hugging Face directory

By default: 256 replies to each of four requests (`price_task.py`), labels drawn from a hidden gold reward, and a price,
the win rate that a nat of KL is worth (`--kl-price`). Bilevel descent learns the reward together with its scale and is
compared with iterated RLHF at betas over a factor of 40, and with the best that any policy and the reward's class can
reach. The lower level is solved in closed form: the figure shows the upper level's method and nothing else. The control is
a gold reward that the learner's reward can equal: there, iterated RLHF is as good at its best beta.

With networks, three methods differ in the hypergradient rule (`online_rlhf_networks.py`).
"""

import dataclasses
import math
import pathlib
import sys
from typing import Any, Literal

import online_rlhf_networks
import price_run
import tyro
from online_rlhf_networks import Settings
from price_methods import METHODS, RATES
from price_run import RepliesSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run. Values that are omitted take the task's default, recorded in `config.json` of the run's folder."""

    task: Literal["replies", "letters"] | None = None
    """Enumerable language: replies of a help desk, exact lower level; or words of letters, with networks."""
    policy: pathlib.Path | None = None
    """Hugging Face directory of a Llama-layout model, in place of a task."""
    methods: tuple[str, ...] | None = None
    """Methods to compare. replies: bilevel, decoupled, fixed_scale; otherwise bilevel, boltzmann, decoupled."""
    seed: int = 0
    """Seed, the first of them with the replies."""
    seeds: int | None = None
    """Replies: runs per method and beta."""
    kl_price: float | None = None
    """Replies: win rate that a nat of KL is worth. With networks it is beta / 4."""
    betas: tuple[float, ...] | None = None
    """Replies: weights of the KL to start from."""
    scale_learning_rate: float | None = None
    """Replies: rate of the reward's log-scale."""
    steps: int | None = None
    """Outer steps per method."""
    batch: int | None = None
    """Prompts per step (the letters have 4, all used)."""
    pairs: int | None = None
    """Pairs per prompt and step; each costs one label."""
    max_new_tokens: int | None = None
    beta: float | None = None
    """Networks: weight of the KL to the reference."""
    relative_sigma: float | None = None
    """Perturbation of the stencil, sigma / beta."""
    utility_weight: float | None = None
    """Weight of the coupled utility beside the uncoupled likelihood."""
    inner_steps: int | None = None
    """Lower-level steps per outer step; 1 is the single-loop algorithm."""
    policy_learning_rate: float | None = None
    tangent_learning_rate: float | None = None
    reward_learning_rate: float | None = None
    """With the replies, every method has a default of its own."""
    evaluations: int | None = None
    """Evaluations per method, evenly spaced."""
    output: pathlib.Path = pathlib.Path("runs")
    """Directory in which the run's folder is created."""


REPLIES = {
    "methods": ("bilevel", "decoupled"), "betas": (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 4.0), "seeds": 5, "kl_price": 0.03,
    "steps": 400, "pairs": 32, "utility_weight": 40.0, "scale_learning_rate": 0.05, "reward_learning_rate": RATES,
}  # fmt: skip
NETWORKS = {
    "methods": online_rlhf_networks.METHODS, "beta": 0.3, "relative_sigma": 0.2, "utility_weight": 1.0, "inner_steps": 1,
    "reward_learning_rate": 1e-3, "evaluations": 12,
}  # fmt: skip
LETTERS = NETWORKS | {
    "steps": 800, "batch": 4, "pairs": 16, "max_new_tokens": 4, "policy_learning_rate": 3e-3,
    "tangent_learning_rate": 1e-4,
}  # fmt: skip
PRETRAINED = NETWORKS | {
    "steps": 115, "batch": 16, "pairs": 4, "max_new_tokens": 48, "policy_learning_rate": 2e-4,
    "tangent_learning_rate": 1e-5,
}  # fmt: skip
COMMON = ("seed", "output")


def resolved(config: Config) -> RepliesSettings | Settings:
    """Returns the settings of the task, with its defaults for values that were omitted.

    Raises:
        ValueError: an option does not belong to the task, or a value is out of range.
    """
    if config.policy is not None and config.task is not None:
        raise ValueError(f"--policy and --task {config.task} exclude each other: leave one out.")
    task = config.task or "replies" if config.policy is None else "policy"
    defaults: dict[str, Any] = {"replies": REPLIES, "letters": LETTERS, "policy": PRETRAINED}[task]
    given = {
        name: value for name, value in vars(config).items() if value is not None and name not in ("task", "policy")
    }
    for name in given:
        if name not in defaults and name not in COMMON:
            here = "with --policy" if task == "policy" else f"in the task {task}"
            owners = "--task letters or --policy DIR" if task == "replies" else "the default task, replies"
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {here}: it needs {owners}, or leave it out.")
    values = defaults | given
    check(values, METHODS if task == "replies" else online_rlhf_networks.METHODS)
    if task == "replies":
        values.pop("output")
        values["betas"] = tuple(sorted(values["betas"]))
        rate = values["reward_learning_rate"]
        rates = rate if isinstance(rate, dict) else dict.fromkeys(METHODS, rate)
        values["reward_learning_rate"] = {method: rates[method] for method in values["methods"]}
        return RepliesSettings(**values)
    if task == "letters" and (values["batch"], values["max_new_tokens"]) != (4, 4):
        raise ValueError("The letters have 4 prompts and 4 tokens; leave out --batch and --max-new-tokens.")
    return Settings(policy=config.policy, **values)


def check(values: dict[str, Any], methods: tuple[str, ...]) -> None:
    """Raises ValueError for values that no task can use."""
    for method in values["methods"]:
        if method not in methods:
            raise ValueError(f"There is no method {method!r} in this task; choose from {', '.join(methods)}.")
    for name in ("methods", "betas"):
        chosen = values.get(name, (None,))
        if not chosen:
            raise ValueError(f"--{name} needs at least one; leave it out for the defaults.")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"--{name} names one of them twice.")
    for name in ("steps", "batch", "max_new_tokens", "inner_steps", "evaluations", "seeds"):
        if values.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {values[name]}.")
    if values["pairs"] < 2:
        raise ValueError(
            f"--pairs {values['pairs']}: every prompt needs at least 2 pairs, to compare one with the other."
        )
    rates = ("policy_learning_rate", "tangent_learning_rate", "reward_learning_rate", "scale_learning_rate")
    for name in (*rates, "utility_weight"):
        value = values.get(name, 0.0)
        if not isinstance(value, dict) and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a number of at least 0, got {value}.")
    for beta in values.get("betas", (values.get("beta"),)):
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive, got {beta:g}: it keeps the policy near the reference.")
    price = values.get("kl_price", 0.03)
    if not 0 < price < math.inf:
        raise ValueError(
            f"--kl-price must be positive, got {price:g}: at no price, every policy that always wins is best."
        )


def main(requested: Config) -> None:
    """Runs every method of the task and reports."""
    try:
        settings = resolved(requested)
    except ValueError as error:
        print(f"online_rlhf: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if isinstance(settings, RepliesSettings):
        price_run.main(settings, requested.output)
    else:
        online_rlhf_networks.main(settings)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
