"""Study 3, global convergence with networks on both levels: how many random starts reach the best known Phi and return."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import optima, reports

from jaxrlhf import bilevel, exact, known, objectives

TOLERANCE = 1e-2
SCALES = (0.1, 0.5, 2.0)
BETA = 0.5


def candidates():
    """Returns `(objective, against_reference)` by name."""
    likelihood, utility = objectives.likelihood(coupled=False), objectives.utility(kl_price=BETA / 4)
    return {
        "likelihood, policy-policy (the paper)": (objectives.likelihood(), False),
        "Brier, policy-reference": (objectives.brier(), True),
        "utility": (utility, True),
        "uncoupled likelihood + utility (default)": (objectives.add(likelihood, utility), True),
    }


def solver(rate):
    """Returns the library's default solver for networks, whose iterates lie on a line through tilt 0."""
    return bilevel.tangent(optax.adam(rate), optax.adam(rate / 3), steps=4)


class Ends(NamedTuple):
    """Where runs end; leaves `[scales, count]`.

    Attributes:
        phi: of the reward.
        exploited: gold value of the reward's exact best response.
        gold_value: of the policy.
        entropy: of the policy, in nats.
        gradient_norm: |grad Phi|.
    """

    phi: np.ndarray
    exploited: np.ndarray
    gold_value: np.ndarray
    entropy: np.ndarray
    gradient_norm: np.ndarray


def descend(problem, *, pairs, count, steps, rate) -> Ends:
    """Runs bilevel descent from `count` random starts at each scale; `pairs` None is exact."""
    decayed = optax.cosine_decay_schedule(rate, steps)
    algorithm = problem.algorithm(bilevel.central(0.2), solver(0.01), optax.adam(decayed), pairs=pairs)

    def run(key, scale):
        start_key, run_key = jax.random.split(key)
        state = algorithm.init(start_key, *problem.start(start_key, scale))

        def step(state, key):
            return algorithm.step(key, state, None, problem.frozen)[0], None

        state, _ = jax.lax.scan(step, state, jax.random.split(run_key, steps))
        policy = jax.nn.log_softmax(known.network_policy(state.policy, problem.frozen), axis=-1)
        entropy = -jnp.mean(exact.mean_under(policy, policy))
        norm = optax.tree.norm(jax.grad(problem.phi)(state.upper))
        exploited, gold_value = problem.gold_value_of_best_response(state.upper), problem.gold_value(state.policy)
        return problem.phi(state.upper), exploited, gold_value, entropy, norm

    keys = jax.random.split(jax.random.key(31), count)
    over_scales = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0)))
    return Ends(*(np.asarray(leaf) for leaf in over_scales(keys, jnp.array(SCALES))))


class Landmarks(NamedTuple):
    """What runs are compared with.

    Attributes:
        phi: the least Phi known.
        gold_value: that of its policy.
        phi_of_gold: Phi of the gold reward itself.
        best_gold_value: over all policies.
    """

    phi: float
    gold_value: float
    phi_of_gold: float
    best_gold_value: float


def landmarks(problem, objective, against_reference, runs: list[Ends], *, count, steps) -> Landmarks:
    """Returns the landmarks of a problem, from exact descent of Phi, the runs themselves, and closed forms."""
    gold, reference = problem.frozen.gold, problem.frozen.reference
    truth = exact.upper_value(objective, gold, gold, reference, beta=BETA, against_reference=against_reference)
    phi, gold_value, _ = optima.descend(problem, count=count, steps=steps, rate=0.05)
    phi = np.concatenate([phi, *(ends.phi.ravel() for ends in runs)])
    exploited = np.concatenate([gold_value, *(ends.exploited.ravel() for ends in runs)])
    best = int(np.nanargmin(phi))
    return Landmarks(float(phi[best]), float(exploited[best]), float(truth), float(problem.best_gold_value))


def outcomes(ends: Ends, marks: Landmarks, arms: int) -> np.ndarray:
    """Returns what became of each run, as text."""
    phi_reached = ends.phi <= marks.phi + TOLERANCE
    return_reached = ends.gold_value >= marks.gold_value - TOLERANCE
    return np.select(
        [
            phi_reached & return_reached,
            ends.entropy < 0.1 * np.log(arms),
            phi_reached,
            return_reached,
            ends.gradient_norm < 1e-2,
        ],
        ["arrived", "collapsed", "Phi reached, return not", "return reached, Phi not", "stalled at a small gradient"],
        "still moving",
    )


def row_of(ends: Ends, outcome: np.ndarray, marks: Landmarks) -> list[str]:
    """Returns a row of the table, after the objective's name and kind."""
    by_scale = [float((row == "arrived").mean()) for row in outcome]
    prefers_another = (ends.phi <= marks.phi_of_gold + TOLERANCE) & (ends.gold_value < marks.best_gold_value - 0.05)
    counts = zip(*np.unique(outcome, return_counts=True), strict=True)
    return [
        f"{(ends.phi <= marks.phi + TOLERANCE).mean():.2f}",
        f"{(ends.gold_value >= marks.gold_value - TOLERANCE).mean():.2f}",
        " / ".join(f"{fraction:.2f}" for fraction in by_scale),
        f"{marks.best_gold_value - marks.gold_value:.3f}",
        f"{np.median(marks.best_gold_value - ends.gold_value):.3f}",
        f"{prefers_another.mean():.2f}",
        ", ".join(f"{name} {count}" for name, count in counts if name != "arrived") or "-",
    ]


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study."""
    count, steps = (2, 100) if quick else (32, 1800)
    chosen = candidates()
    if quick:
        chosen = {name: chosen[name] for name in list(chosen)[-1:]}
    progress = reports.Progress("global_convergence", (1 if quick else 2) * len(chosen))
    rows, values = [], {}
    for name, (objective, against_reference) in chosen.items():
        problem = known.random_bandit(
            network="both", objective=objective, against_reference=against_reference, beta=BETA
        )
        runs = {}
        for kind, pairs in (("sampled", 64),) if quick else (("exact", None), ("sampled", 64)):
            runs[kind] = descend(problem, pairs=pairs, count=count, steps=steps, rate=0.01)
            progress(f"{name}, {kind}")
        marks = landmarks(
            problem, objective, against_reference, list(runs.values()), count=8 if quick else 32, steps=steps
        )
        for kind, ends in runs.items():
            outcome = outcomes(ends, marks, problem.frozen.gold.shape[1])
            rows.append([name, kind, *row_of(ends, outcome, marks)])
            values[f"{name}, {kind}"] = ends._asdict() | {"outcomes": outcome, "landmarks": marks}
    reports.write(output, "global_convergence", values, page(rows, count, steps))
    return {"rows": rows}


def page(rows: list, count: int, steps: int) -> str:
    """Returns the study's page."""
    return (
        "## 3. Global convergence\n\nBandit (2 contexts, 5 arms), reward and policy networks of one hidden layer, "
        f"realisable; central stencil, tangent solver, Adam, {steps} outer steps of 4 inner ones; {count} random starts "
        f"at each of the scales {', '.join(f'{scale:g}' for scale in SCALES)}; `sampled` draws 64 pairs per context, one "
        f"label per pair (two for Brier). Fractions of runs within {TOLERANCE:g} of the least Phi known; of the J_gold of "
        "that optimum, by the final policy; and of both, by scale. Then the gap of that optimum, and of the median run, "
        "to the best J_gold of all policies; the fraction of runs whose Phi is no worse than the gold reward's own while "
        "J_gold is more than 0.05 below the best (the objective prefers another reward to the gold reward); and how the "
        "other runs ended. The default's uncoupled part is fitted with the policy held fixed, so Phi is only a figure "
        "of merit there, not the function that is descended.\n\n"
        + reports.table(
            [
                "objective",
                "",
                "Phi",
                "return",
                "both, by scale",
                "optimum's gap",
                "median gap",
                "prefers another reward to gold",
                "the other runs",
            ],
            rows,
        )
    )
