"""Which upper objective? Exact descent on random bandits, realisable and misspecified, from three starts.

    python experiments/objectives.py

Every objective is descended with the exact hypergradient (`boltzmann` on an enumerated bandit, the lower level solved
in closed form), so that what is seen is the objective and nothing else. The figure of merit is the share of the
achievable gain that is missed, gap / (J*_gold - J_gold(reference)), with J_gold = E gold - beta KL: 0 is the optimum,
1 is the reference, more than 1 is worse than doing nothing. A few minutes on 2 cores.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxrlhf import bandit, bilevel, exact, objectives, preferences

BETA = 0.3


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 32
    """Random bandits a setting."""
    steps: int = 2000
    """Outer steps."""
    contexts: int = 4
    arms: int = 8
    learning_rate: float = 0.03
    output: pathlib.Path = pathlib.Path("experiments/results/objectives")


def candidates():
    """Name, objective, rule, and whether the second response comes from the reference."""
    fit = objectives.likelihood(coupled=False)
    anywhere = objectives.brier()._replace(against_reference=False)
    rows = [
        ("likelihood, uncoupled (iterated RLHF)", objectives.likelihood(coupled=False), True),
        ("likelihood, policy-policy (the paper)", objectives.likelihood(), False),
        ("likelihood, policy-reference", objectives.likelihood(), True),
        ("brier, policy-policy", anywhere, False),
        ("brier, policy-reference", objectives.brier(), True),
        ("utility alone", objectives.utility(kl_price=BETA / 4), True),
    ]
    for weight in (0.3, 1.0, 3.0):
        utility = objectives.utility(kl_price=BETA / 4, weight=weight)
        rows.append((f"uncoupled likelihood + {weight:g} utility", objectives.add(fit, utility), True))
    return rows


def make(key, config, features):
    """A random bandit; with fewer features than arms and contexts, a linear reward cannot hold the gold one."""
    gold_key, feature_key, reference_key = jax.random.split(key, 3)
    shape = (config.contexts, config.arms)
    gold = jax.random.normal(gold_key, shape)
    seen = jax.random.normal(feature_key, (*shape, features))
    if features >= config.contexts * config.arms:
        seen = jnp.eye(config.contexts * config.arms).reshape(*shape, -1)
    reference = jax.nn.log_softmax(0.5 * jax.random.normal(reference_key, shape), axis=-1)
    return bandit.Bandit(seen, gold, reference)


def reward(upper, features):
    """Linear."""
    return features @ upper


def starts(frozen):
    """Flat, nearly collapsed on each context's worst arm, and the best fit of the gold reward."""
    flat = frozen.features.reshape(-1, frozen.features.shape[-1])
    true = jnp.linalg.lstsq(flat, frozen.gold.ravel())[0]
    worst = jax.nn.one_hot(jnp.argmin(frozen.gold, axis=-1), frozen.gold.shape[-1])
    collapsed = jnp.linalg.lstsq(flat, (3.0 * worst).ravel())[0]
    return {"flat": jnp.zeros_like(true), "collapsed": collapsed, "true": true}


def run(config, objective, against_reference, features):
    """Missed share of the gain, and win rate, `[seeds]` for each start."""
    problem = bandit.bandit_problem(reward, objective, against_reference=against_reference)
    solver = bandit.best_response(reward, objective, beta=BETA, against_reference=against_reference)
    algorithm = bilevel.bilevel_descent(
        problem,
        bilevel.boltzmann(),
        solver,
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        beta=BETA,
        annotate=preferences.expected_annotator(bandit.gold_score, labels=objective.labels),
    )

    def descend(frozen, start):
        policy = exact.soft_policy(reward(start, frozen.features), frozen.reference, BETA)
        state = algorithm.init(jax.random.key(0), start, policy)

        def step(state, _):
            # The solver is exact, so solving before sampling keeps the sample on the policy.
            rewards = reward(state.upper, frozen.features)
            policy = exact.soft_policy(rewards, frozen.reference, BETA)
            state = state._replace(lowers=policy[None])
            return algorithm.step(jax.random.key(0), state, None, frozen)[0], None

        state, _ = jax.lax.scan(step, state, None, length=config.steps)
        policy = exact.soft_policy(reward(state.upper, frozen.features), frozen.reference, BETA)
        verdict = exact.judge(policy, frozen.reference, frozen.gold, BETA)
        gain = exact.soft_value(frozen.gold, frozen.reference, BETA) - jnp.mean(
            exact.mean_under(frozen.reference, frozen.gold)
        )
        return verdict.gap / gain, verdict.win_rate

    keys = jax.random.split(jax.random.key(1), config.seeds)
    frozen = jax.vmap(lambda key: make(key, config, features))(keys)
    points = jax.vmap(starts)(frozen)
    whole = jax.jit(jax.vmap(jax.vmap(descend), in_axes=(None, 0)))
    missed, win_rate = whole(frozen, jnp.stack(list(points.values())))
    return {name: (np.asarray(missed[row]), np.asarray(win_rate[row])) for row, name in enumerate(points)}


SETTINGS = ("realisable", "8 features", "3 features")


def table(rows):
    """Returns the rows as Markdown: one line an objective, mean over starts, the worst start behind it."""
    lines = [f"| objective | {' | '.join(SETTINGS)} |", "|---" * (1 + len(SETTINGS)) + "|"]
    for name in dict.fromkeys(row["objective"] for row in rows):
        cells = []
        for setting in SETTINGS:
            of_start = [row["missed"] for row in rows if (row["objective"], row["reward"]) == (name, setting)]
            cells.append(f"{np.mean(of_start):.3f} ({max(of_start):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs every candidate in every setting and writes the table."""
    began = time.monotonic()
    rows = []
    for setting, features in zip(SETTINGS, (config.contexts * config.arms, 8, 3), strict=True):
        for name, objective, against_reference in candidates():
            for start, (missed, win_rate) in run(config, objective, against_reference, features).items():
                rows.append(
                    {
                        "reward": setting,
                        "objective": name,
                        "start": start,
                        "missed": float(missed.mean()),
                        "standard_error": float(missed.std() / np.sqrt(config.seeds)),
                        "worst": float(missed.max()),
                        "win_rate": float(win_rate.mean()),
                    }
                )
                print(f"{setting:11} {name:40} {start:10} missed {missed.mean():6.3f}  win rate {win_rate.mean():.3f}")
    seconds = time.monotonic() - began
    config.output.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config) | {"output": None}
    (config.output / "results.json").write_text(json.dumps({"rows": rows, "config": settings}, indent=1) + "\n")
    (config.output / "README.md").write_text(
        "# Upper objectives, exact descent on random bandits\n\n"
        "`python experiments/objectives.py`. Share of the achievable gain that is missed, mean over "
        f"{config.seeds} bandits and three starts (worst start in brackets); 0 is the optimum, 1 the reference.\n\n"
        f"{table(rows)}\n"
    )
    print(f"\n{table(rows)}\n\n{seconds:.0f} s. {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
