"""Study 3, global convergence with networks on both levels: from random starts to the best known Phi and true return."""

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
    """Name -> (objective, whether against the reference)."""
    fit, win = objectives.likelihood(coupled=False), objectives.utility(kl_price=BETA / 4)
    return {
        "likelihood, policy-policy (the paper)": (objectives.likelihood(), False),
        "Brier, policy-reference": (objectives.brier(), True),
        "utility": (win, True),
        "uncoupled likelihood + utility (default)": (objectives.add(fit, win), True),
    }


def solver(rate):
    """The library's default for networks: the iterates on a line through tilt 0."""
    return bilevel.tangent(optax.adam(rate), optax.adam(rate / 3), steps=4)


def descend(given, *, pairs, count, steps, rate):
    """Runs from random starts, `[scales, count]` each; returns the final states and what they are worth."""
    decayed = optax.cosine_decay_schedule(rate, steps)
    algorithm = given.algorithm(bilevel.central(0.2), solver(0.01), optax.adam(decayed), pairs=pairs)

    def run(key, scale):
        start_key, run_key = jax.random.split(key)
        state = algorithm.init(start_key, *given.start(start_key, scale))

        def step(state, key):
            return algorithm.step(key, state, None, given.frozen)[0], None

        state, _ = jax.lax.scan(step, state, jax.random.split(run_key, steps))
        policy = jax.nn.log_softmax(known.network_policy(state.policy, given.frozen), axis=-1)
        entropy = -jnp.mean(exact.mean_under(policy, policy))
        norm = optax.tree.norm(jax.grad(given.phi)(state.upper))
        return given.phi(state.upper), given.exploited(state.upper), given.worth(state.policy), entropy, norm

    keys = jax.random.split(jax.random.key(31), count)
    whole = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0)))
    return [np.asarray(part) for part in whole(keys, jnp.array(SCALES))]


class Landmarks(NamedTuple):
    """What runs are compared with: the least Phi known, its policy's J_gold, the truth's Phi, the best J_gold."""

    phi: float
    worth: float
    truth: float
    best_worth: float


def fates(phi, worth, entropy, norm, marks: Landmarks, arms: int) -> np.ndarray:
    """Names what became of each run."""
    there, good = phi <= marks.phi + TOLERANCE, worth >= marks.worth - TOLERANCE
    return np.select(
        [
            there & good,
            entropy < 0.1 * np.log(arms),
            there,
            good,
            norm < 1e-2,
        ],
        ["arrived", "collapsed", "Phi reached, return not", "return reached, Phi not", "stalled at a small gradient"],
        "still moving",
    )


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study."""
    count, steps = (2, 100) if quick else (32, 1800)
    chosen = candidates()
    if quick:
        chosen = {name: chosen[name] for name in list(chosen)[-1:]}
    progress = reports.Progress("global_convergence", (1 if quick else 2) * len(chosen))
    rows, values = [], {}
    for name, (objective, against_reference) in chosen.items():
        given = known.random_bandit(network="both", objective=objective, against_reference=against_reference, beta=BETA)
        gold, reference = given.frozen.gold, given.frozen.reference
        truth = exact.upper_value(objective, gold, gold, reference, beta=BETA, against_reference=against_reference)
        phi_start, worth_start, _ = optima.descend(given, count=8 if quick else 32, steps=steps, rate=0.05)
        runs = {}
        for kind, pairs in (("sampled", 64),) if quick else (("exact", None), ("sampled", 64)):
            runs[kind] = descend(given, pairs=pairs, count=count, steps=steps, rate=0.01)
            progress(f"{name}, {kind}")
        all_phi = np.concatenate([phi_start, *(found[0].ravel() for found in runs.values())])
        all_worth = np.concatenate([worth_start, *(found[1].ravel() for found in runs.values())])
        best = int(np.nanargmin(all_phi))
        marks = Landmarks(float(all_phi[best]), float(all_worth[best]), float(truth), float(given.best_worth))
        for kind, (phi, exploited, worth, entropy, norm) in runs.items():
            named = fates(phi, worth, entropy, norm, marks, gold.shape[1])
            shares = [float((row == "arrived").mean()) for row in named]
            lost = (phi <= marks.truth + TOLERANCE) & (worth < marks.best_worth - 0.05)
            others = ", ".join(
                f"{fate} {count}"
                for fate, count in zip(*np.unique(named, return_counts=True), strict=True)
                if fate != "arrived"
            )
            rows.append([
                name, kind, f"{(phi <= marks.phi + TOLERANCE).mean():.2f}",
                f"{(worth >= marks.worth - TOLERANCE).mean():.2f}", " / ".join(f"{share:.2f}" for share in shares),
                f"{marks.best_worth - marks.worth:.3f}", f"{np.median(marks.best_worth - worth):.3f}",
                f"{lost.mean():.2f}", others or "-",
            ])  # fmt: skip
            values[f"{name}, {kind}"] = {
                "phi": phi, "exploited": exploited, "worth": worth, "entropy": entropy, "gradient_norm": norm,
                "fates": named, "marks": marks,
            }  # fmt: skip
    text = (
        "## 3. Global convergence\n\nBandit (2 contexts, 5 arms), reward and policy networks of one hidden layer, "
        f"realisable; central stencil, tangent solver, Adam, {steps} outer steps of 4 inner ones; {count} "
        f"random starts at "
        f"each of the scales {', '.join(f'{scale:g}' for scale in SCALES)}; `sampled` draws 64 pairs a context, one label "
        f"a pair (two for Brier). Shares of runs within {TOLERANCE:g} of the least Phi known; of the J_gold of that "
        "optimum, by the deployed policy; of both, by scale. Then what that optimum itself, and the median "
        "run, miss of the "
        "best J_gold of all policies; the share of runs whose Phi is no worse than the gold reward's own while J_gold is "
        "lost by more than 0.05 (the objective prefers another reward to the truth); and where those that did not arrive "
        "ended. The default's uncoupled part is fitted with the policy held fixed, so its Phi is a figure of merit there, "
        "not what is descended.\n\n"
        + reports.table(
            [
                "objective", "", "Phi", "return", "both, by scale", "optimum misses", "median misses",
                "prefers another to the truth", "the others",
            ],
            rows,
        )
    )  # fmt: skip
    reports.write(output, "global_convergence", values, text)
    return {"rows": rows}
