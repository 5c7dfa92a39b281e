"""The best known optimum of every known problem: exact descent from many starts, and the closed form where one is."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import reports

from jaxrlhf import known, objectives


def catalogue():
    """Name -> how to make it. Objectives are coupled, so that Phi is a function and descends to an optimum."""
    made = {
        "quadratic": known.quadratic,
        "bandit, utility": known.random_bandit,
        "hard bandit, utility": known.hard_bandit,
        "episodes, utility": known.random_mdp,
        "language, utility": known.small_language,
    }
    for features, label in ((None, "realisable"), (6, "6 features"), (3, "3 features")):
        make = functools.partial(known.random_bandit, features=features)
        made[f"bandit, {label}, likelihood policy-policy"] = functools.partial(
            make, objective=objectives.likelihood(), against_reference=False
        )
        made[f"bandit, {label}, Brier"] = functools.partial(make, objective=objectives.brier())
    made["bandit, networks, likelihood policy-policy"] = functools.partial(
        known.random_bandit, network="both", objective=objectives.likelihood(), against_reference=False
    )
    made["bandit, networks, Brier"] = functools.partial(
        known.random_bandit, network="both", objective=objectives.brier()
    )
    made["bandit, networks, utility"] = functools.partial(known.random_bandit, network="both")
    return made


def descend(given, *, count: int, steps: int, rate: float, seed: int = 21):
    """Returns Phi, the exploited reward's worth and the gradient's norm after exact descent, `[count]` each."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def one(key, scale):
        upper, _ = given.start(key, scale)

        def step(carry, _):
            upper, state = carry
            move, state = optimizer.update(jax.grad(given.phi)(upper), state, upper)
            return (optax.apply_updates(upper, move), state), None

        (upper, _), _ = jax.lax.scan(step, (upper, optimizer.init(upper)), None, length=steps)
        return given.phi(upper), given.exploited(upper), optax.tree.norm(jax.grad(given.phi)(upper))

    scales = jnp.tile(jnp.array([0.1, 0.5, 1.0, 3.0]), -(-count // 4))[:count]
    return map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), count), scales))


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the descents and writes the table."""
    made = catalogue()
    if quick:
        made = {name: made[name] for name in ("quadratic", "bandit, utility")}
    progress = reports.Progress("optima", len(made))
    rows, values = [], {}
    for name, make in made.items():
        given = make()
        language = "language" in name
        count, steps, rate = (4, 300, 0.03) if language else (8, 500, 0.05) if quick else (32, 3000, 0.05)
        phi, worth, norm = descend(given, count=count, steps=steps, rate=rate)
        best = int(np.nanargmin(phi))
        # `share` reached the best value: a landscape with several basins shows here.
        share = float(np.mean(phi < phi[best] + 1e-2))
        closed = None if given.optimum is None else float(given.optimum)
        values[name] = {
            "phi": float(phi[best]), "worth": float(worth[best]), "best_worth": float(given.best_worth),
            "closed_form": closed, "share": share, "gradient_norm": float(norm[best]), "starts": count,
        }  # fmt: skip
        rows.append([
            name, float(phi[best]), "-" if closed is None else closed, float(worth[best]), float(given.best_worth),
            f"{100 * share:.0f}%", f"{norm[best]:.0e}",
        ])  # fmt: skip
        progress(name)
    text = (
        "## Best known optima\n\nExact descent of Phi by Adam from random starts of scales 0.1, 0.5, 1 and 3. Worth is "
        "J_gold = E gold - beta KL of the policy that is optimal for the reward found, beside the best of "
        "all policies: where "
        "they differ, the objective's own optimum is not what a user wants.\n\n"
        + reports.table(
            [
                "problem",
                "least Phi",
                "closed form",
                "worth there",
                "best worth",
                "starts within 0.01",
                "|grad Phi| there",
            ],
            rows,
        )
    )
    reports.write(output, "optima", values, text)
    return {"rows": rows}
