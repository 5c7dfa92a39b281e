"""Where following the policy's response must pay on trajectories: rewards that cannot hold what the annotator wants.

    python experiments/coupling.py                  # 20 instances of each family, a few minutes on 2 cores
    python experiments/coupling.py --instances 5

Episodes of four steps with deterministic transitions; every trajectory is listed, so that best responses and results
are exact, and labels are drawn. The utility is the win rate against the reference less a price for each nat of KL. All
methods buy equally many labels. The families:

- `whole`: the reward sees everything and can equal the gold reward; coupling has nothing to win there.
- `part`: two states look alike to the reward, and are worth different things.
- `shared`: one reward for two tasks, each with its own gold reward.
- `shaping`: weights of four given shaping terms, where the annotator wants all of them at once.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from control_tables import publish_tables

from jaxrlhf import bilevel, mdp, objectives, preferences
from jaxrlhf.evaluation.statistics import paired_gain, student_interval
from jaxrlhf.preferences.scale import learn_scale, scale_optimizer, scaled, with_scale

FAMILIES = ("whole", "part", "shared", "shaping")
SCALED, COUPLED, ITERATED = "bilevel, learned scale", "bilevel", "iterated"
METHODS = (SCALED, COUPLED, ITERATED)
STATES, ACTIONS, HORIZON, FEATURES = 8, 3, 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    families: tuple[str, ...] = FAMILIES
    methods: tuple[str, ...] = METHODS
    instances: int = 20
    """Random problems of a family, each with its own labels."""
    first_instance: int = 0
    steps: int = 150
    """Outer steps of a run, each with `pairs` labelled pairs from each of 4 start states."""
    pairs: int = 8
    kl_price: float = 0.03
    betas: tuple[float, ...] = (0.1, 0.25, 0.6, 1.5, 4.0)
    """Where runs begin; without a learned scale, where they stay."""
    reward_learning_rate: float = 0.03
    scale_learning_rate: float = 0.05
    utility_weight: float = 10.0
    output: pathlib.Path = pathlib.Path("runs/coupling")


class Outcome(NamedTuple):
    """What runs reached, `[instances, betas]`, exact; all as shares where `share` is used.

    Attributes:
        utility: of the policy.
        optimum: of the best policy, `[instances]`.
        labels: bought in a run.
    """

    utility: np.ndarray
    optimum: np.ndarray
    labels: int

    @property
    def share(self) -> np.ndarray:
        """The utility as a share of what the best policy gains over the reference, `[instances, betas]`."""
        return (self.utility - 0.5) / (self.optimum - 0.5)[:, None]


def episodes_of(family: str, key: jax.Array) -> mdp.Episodes:
    """Returns a random instance. Consumes the key.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no family {family!r}; there are {', '.join(FAMILIES)}.")
    weight_key, key = jax.random.split(key)
    episodes = mdp.random_episodes(
        key, prompts=4, states=STATES, actions=ACTIONS, horizon=HORIZON, successors=1, features=FEATURES, gamma=1.0
    )
    weights = jnp.abs(jax.random.normal(weight_key, (2, FEATURES))) + 0.3
    weights = 1.5 * weights / jnp.linalg.norm(weights, axis=-1, keepdims=True)
    features, state = episodes.features, jnp.arange(STATES)
    if family == "shared":
        # A task keeps to its half of the states; even and odd starts are of different tasks.
        half = STATES // 2
        successors = episodes.successors % half + half * (state % 2)[:, None, None]
        rank = state // 2 + half * (state % 2)
        successors = jnp.zeros_like(successors).at[rank].set(successors)
        signs = jnp.array([1.0, 1.0, 1.0, -1.0])
        by_task = jnp.where((state < half)[:, None], weights[0], signs * weights[1])
        gold = jnp.sum(features * by_task[:, None, :], axis=-1)
        return episodes._replace(
            successors=successors, starts=jnp.array([0, 1, half, half + 1]), gold=gold, features=features
        )
    gold = {
        "whole": features @ weights[0],
        "part": features @ weights[0],
        "shaping": 1.5 * jnp.all(features > -0.5, axis=-1).astype(features.dtype),
    }[family]
    if family == "part":
        features = features.at[1::2].set(features[0::2])
    return episodes._replace(features=features, gold=gold)


def linear(weights: jax.Array, features: jax.Array) -> jax.Array:
    """The learner's reward of a step, `[S, A]`."""
    return features @ weights


def whole_trajectories(problem: Any) -> Any:
    """Returns the problem with each trajectory as a response of one step, for transitions without chance or discount."""

    def total(steps):
        return jnp.sum(steps, axis=-1, keepdims=True)

    def sample(*arguments):
        drawn = problem.sample(*arguments)
        return drawn._replace(
            behaviour_log_prob=total(drawn.behaviour_log_prob),
            reference_log_prob=total(drawn.reference_log_prob),
            cumulative_discount=drawn.cumulative_discount[..., :1],
        )

    return problem._replace(
        sample=sample,
        log_prob=lambda *arguments: total(problem.log_prob(*arguments)),
        reward=lambda *arguments: total(problem.reward(*arguments)),
    )


def method_of(name: str, beta: Any, config: Config) -> tuple[Any, Any]:
    """Returns `(algorithm, first upper parameters)`.

    Transitions are deterministic and nothing is discounted, so that best responses are Boltzmann in the return and the
    rule `boltzmann` is exact.
    """
    fit, first = objectives.likelihood(coupled=False), jnp.full(FEATURES, 0.01)
    decay = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, config.steps))  # noqa: E731
    optimizer, reward = decay(config.reward_learning_rate), linear
    rule, objective = bilevel.decoupled(), fit
    if name != ITERATED:
        utility = objectives.utility(kl_price=config.kl_price, weight=config.utility_weight)
        rule, objective = bilevel.boltzmann(), objectives.add(fit, utility)
    problem = whole_trajectories(mdp.episode_problem(linear, objective, pairs=config.pairs))
    if name == SCALED:
        problem, reward, first = learn_scale(problem, beta=beta), scaled(linear), with_scale(first)
        optimizer = scale_optimizer(optimizer, decay(config.scale_learning_rate))

    def best_response(task, index):
        del index
        return mdp.soft_policy(reward(task.upper, task.frozen.features), task.frozen, beta)[0]

    algorithm = bilevel.bilevel_descent(
        problem, rule, bilevel.closed_form(best_response), optimizer, beta=beta,
        annotate=preferences.gold_annotator(mdp.gold_score),
    )  # fmt: skip
    return algorithm, first


def utility_of(log_policy: jax.Array, frozen: mdp.Episodes, kl_price: float) -> jax.Array:
    """Returns the exact utility of a policy `[B, N, A]`, `[]`."""
    result = mdp.evaluate_policy(log_policy, frozen, beta=1.0)
    return result.win_rate - kl_price * result.kl


def best_utility(frozen: mdp.Episodes, kl_price: float) -> jax.Array:
    """Returns the utility of the best policy: wins against a fixed reference are a return, so it is a soft optimum."""
    tree = mdp.history_tree(frozen)
    gold = tree.returns(frozen.gold, frozen.discount)
    reference = tree.log_prob(frozen.reference[tree.states])
    wins = jax.nn.sigmoid(gold[..., :, None] - gold[..., None, :])
    bonus = jnp.einsum("bpq,bq->bp", wins, jnp.exp(reference))
    _, value = mdp.soft_policy(jnp.zeros_like(frozen.gold), frozen, kl_price, bonus=bonus, tree=tree)
    return jnp.mean(value)


def run(family: str, method: str, config: Config) -> Outcome:
    """Runs a method on all instances of a family from all betas, in one program."""

    def of_instance(number):
        episode_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        frozen = episodes_of(family, episode_key)

        def of_beta(beta):
            algorithm, first = method_of(method, beta, config)

            def step(state, key):
                return algorithm.step(key, state, None, frozen)[0], None

            state = algorithm.init(key, first, mdp.reference_logits(frozen))
            state, _ = jax.lax.scan(step, state, jax.random.split(key, config.steps))
            return utility_of(state.policy, frozen, config.kl_price)

        return jax.vmap(of_beta)(jnp.asarray(config.betas)), best_utility(frozen, config.kl_price)

    numbers = config.first_instance + jnp.arange(config.instances)
    utility, optimum = jax.jit(jax.vmap(of_instance))(numbers)
    labels = config.steps * config.pairs * 4
    return Outcome(np.asarray(utility, float), np.asarray(optimum, float), labels)


def table(outcomes: dict[str, dict[str, Outcome]], config: Config) -> list[str]:
    """Returns the table as Markdown lines: shares, and what coupling gains over iterated, paired by instance.

    The last column compares each method at its own best beta of the mean, which only a sweep can find, with iterated at
    its own.
    """
    betas = [f"beta {beta:g}" for beta in config.betas]
    lines = [
        f"| family | method | {' | '.join(betas)} | minus iterated, same beta | best beta minus iterated's best |",
        "|---|---|" + "---|" * (len(betas) + 2),
    ]
    for family, results in outcomes.items():
        for method, outcome in results.items():
            cells = [_plus_minus(student_interval(column)) for column in outcome.share.T]
            gains = ["", ""]
            if method != ITERATED and ITERATED in results:
                other = results[ITERATED].share
                each = [paired_gain(*columns) for columns in zip(outcome.share.T, other.T, strict=True)]
                best = paired_gain(*(share[:, np.argmax(share.mean(axis=0))] for share in (outcome.share, other)))
                gains = [", ".join(map(_plus_minus, each)), _plus_minus(best)]
            lines.append(f"| {family} | {method} | {' | '.join([*cells, *gains])} |")
    return lines


def _plus_minus(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}" + ("" if np.isnan(interval[1]) else f" ± {interval[1]:.3f}")


def main(config: Config) -> None:
    """Runs everything, prints the table, and writes it with all numbers."""
    for what, chosen, known in (("family", config.families, FAMILIES), ("method", config.methods, METHODS)):
        if unknown := set(chosen) - set(known):
            sys.exit(f"There is no {what} {', '.join(sorted(unknown))}; there are {'; '.join(known)}.")
    if config.instances < 2 or config.steps < 1 or config.pairs < 1 or min(config.betas, default=0) <= 0:
        sys.exit("A study needs 2 instances, 1 step and 1 pair at least, and betas above 0.")
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "tables.md").touch()
    except OSError as error:
        sys.exit(f"The output folder {config.output} cannot be written ({error.strerror}); give --output another.")
    outcomes: dict[str, dict[str, Outcome]] = {}
    for family in config.families:
        for method in config.methods:
            outcomes.setdefault(family, {})[method] = run(family, method, config)
            print(f"{family}, {method}: {outcomes[family][method].share.mean(axis=0).round(3)}", flush=True)
        labels = {outcome.labels for outcome in outcomes[family].values()}
        assert len(labels) == 1, f"methods bought {labels} labels"
    numbers = {
        family: {method: outcome.share.tolist() for method, outcome in results.items()}
        for family, results in outcomes.items()
    }
    settings = dataclasses.asdict(config) | {"output": str(config.output)}
    (config.output / "shares.json").write_text(json.dumps({"settings": settings, "shares": numbers}))
    publish_tables(
        config.output,
        "\n".join(table(outcomes, config)),
        title="Where coupling pays on trajectories",
        summary=f"Shares of what the best policy gains over the reference, {config.instances} instances, exact.",
        config=config,
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
