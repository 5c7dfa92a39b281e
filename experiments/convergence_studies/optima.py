"""Best known optima of all known problems: by exact descent from many starts, and in closed form where there is one."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import reports

from jaxrlhf import known, objectives


def catalogue():
    """Returns constructors of the problems by name.

    Objectives are coupled: with an uncoupled part, the descended gradient would not be that of a function Phi.
    """
    problems = {
        "quadratic": known.quadratic,
        "bandit, utility": known.random_bandit,
        "hard bandit, utility": known.hard_bandit,
        "episodes, utility": known.random_mdp,
        "language, utility": known.small_language,
    }
    for features, label in ((None, "realisable"), (6, "6 features"), (3, "3 features")):
        make = functools.partial(known.random_bandit, features=features)
        problems[f"bandit, {label}, likelihood policy-policy"] = functools.partial(
            make, objective=objectives.likelihood(), against_reference=False
        )
        problems[f"bandit, {label}, Brier"] = functools.partial(make, objective=objectives.brier())
    problems["bandit, networks, likelihood policy-policy"] = functools.partial(
        known.random_bandit, network="both", objective=objectives.likelihood(), against_reference=False
    )
    problems["bandit, networks, Brier"] = functools.partial(
        known.random_bandit, network="both", objective=objectives.brier()
    )
    problems["bandit, networks, utility"] = functools.partial(known.random_bandit, network="both")
    return problems


def minimise_phi(problem, key, scale, *, optimizer: optax.GradientTransformation, steps: int):
    """Returns the reward after exact descent of Phi from a random reward of the given scale."""
    upper, _ = problem.start(key, scale)

    def step(carry, _):
        upper, state = carry
        updates, state = optimizer.update(jax.grad(problem.phi)(upper), state, upper)
        return (optax.apply_updates(upper, updates), state), None

    (upper, _), _ = jax.lax.scan(step, (upper, optimizer.init(upper)), None, length=steps)
    return upper


def descend(problem, *, count: int, steps: int, rate: float, seed: int = 21):
    """Returns Phi, the gold value of the best response and the gradient's norm after exact descent, `[count]` each."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def descend_one(key, scale):
        upper = minimise_phi(problem, key, scale, optimizer=optimizer, steps=steps)
        return (
            problem.phi(upper),
            problem.gold_value_of_best_response(upper),
            optax.tree.norm(jax.grad(problem.phi)(upper)),
        )

    scales = jnp.tile(jnp.array([0.1, 0.5, 1.0, 3.0]), -(-count // 4))[:count]
    return map(np.asarray, jax.jit(jax.vmap(descend_one))(jax.random.split(jax.random.key(seed), count), scales))


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the descents and writes the table."""
    problems = catalogue()
    if quick:
        problems = {name: problems[name] for name in ("quadratic", "bandit, utility")}
    progress = reports.Progress("optima", len(problems))
    rows, values = [], {}
    for name, make in problems.items():
        problem = make()
        language = "language" in name
        count, steps, rate = (4, 300, 0.03) if language else (8, 500, 0.05) if quick else (32, 3000, 0.05)
        phi, gold_value, norm = descend(problem, count=count, steps=steps, rate=rate)
        best = int(np.nanargmin(phi))
        # The fraction of starts that reached the best value; below 1 there are several basins.
        reached = float(np.mean(phi < phi[best] + 1e-2))
        closed = None if problem.optimum is None else float(problem.optimum)
        values[name] = {
            "phi": float(phi[best]), "worth": float(gold_value[best]), "best_worth": float(problem.best_gold_value),
            "closed_form": closed, "share": reached, "gradient_norm": float(norm[best]), "starts": count,
        }  # fmt: skip
        rows.append([
            name, float(phi[best]), "-" if closed is None else closed, float(gold_value[best]),
            float(problem.best_gold_value), f"{100 * reached:.0f}%", f"{norm[best]:.0e}",
        ])  # fmt: skip
        progress(name)
    text = (
        "## Best known optima\n\nExact descent of Phi by Adam from random starts of scales 0.1, 0.5, 1 and 3. Gold value: "
        "J_gold = E gold - beta KL of the policy that is optimal for the reward found, and its maximum over all policies. "
        "Where they differ, the objective's own optimum is not what a user wants.\n\n"
        + reports.table(
            [
                "problem",
                "least Phi",
                "closed form",
                "gold value there",
                "best gold value",
                "starts within 0.01",
                "|grad Phi| there",
            ],
            rows,
        )
    )
    reports.write(output, "optima", values, text)
    return {"rows": rows}
