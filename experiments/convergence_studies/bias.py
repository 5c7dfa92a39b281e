"""Study 1, bias: the error of the estimated grad Phi against sigma, with exact lower policies and no sampling."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import reports
from jax.flatten_util import ravel_pytree

from jaxrlhf import bilevel, known, objectives

STENCILS = {"forward": bilevel.forward, "central": bilevel.central, "five-point": bilevel.five_point}
ONE_POLICY = {
    "boltzmann": bilevel.boltzmann,
    "implicit, 10 CG": functools.partial(bilevel.implicit, iterations=10, damping=1e-9),
    "decoupled": bilevel.decoupled,
}


def problems():
    """Name -> problem; every objective is coupled, so that there is a gradient to get wrong."""
    both = objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1))
    return {
        "quadratic": known.quadratic(),
        "bandit": known.random_bandit(objective=both),
        "bandit, network reward": known.random_bandit(network="reward", objective=both),
        "bandit, policy-policy": known.random_bandit(objective=objectives.likelihood(), against_reference=False),
        "episodes": known.random_mdp(objective=both),
    }


def hypergradient(given, rule, upper, lower):
    """Returns `(key, index) -> ` the estimate as a vector; the rule reads the index as the step's number."""
    algorithm = given.algorithm(rule, given.solver, optax.sgd(1.0))
    state = algorithm.init(jax.random.key(0), upper, lower)

    @jax.jit
    def estimate(index):
        at = state._replace(step=index)
        # Solved once, so that the sample stands for the answer at this reward.
        solved = algorithm.step(jax.random.key(0), at, given.data, given.frozen)[0].lowers
        after, _ = algorithm.step(jax.random.key(0), at._replace(lowers=solved), given.data, given.frozen)
        return ravel_pytree(jax.tree.map(jnp.subtract, upper, after.upper))[0]

    return estimate


def slope(sigmas, errors, order):
    """Returns the fitted exponent, from the range where neither saturation nor rounding shows."""
    largest = {1: 0.1, 2: 0.3, 4: 0.5}[order]
    kept = [(s, e) for s, e in zip(sigmas, errors, strict=True) if s <= largest and e > 1e-10]
    logs = np.log(np.array(kept))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]) if len(kept) > 2 else float("nan")


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study in double precision."""
    sigmas = np.geomspace(1e-3, 1.0, 5 if quick else 16)
    stencils = {"forward": bilevel.forward} if quick else STENCILS
    one_policy = {"boltzmann": bilevel.boltzmann} if quick else ONE_POLICY
    rows, panels, values = [], [], {}
    with jax.enable_x64(True):
        chosen = {name: given for name, given in problems().items() if not quick or name == "bandit"}
        progress = reports.Progress("bias", len(chosen))
        for name, given in chosen.items():
            upper, lower = given.start(jax.random.key(1), 0.5)
            truth = ravel_pytree(jax.grad(given.phi)(upper))[0]
            lines, row = {}, [name]
            for stencil, make in stencils.items():
                rule = make(lambda step: jnp.asarray(sigmas)[step])
                estimate = hypergradient(given, rule, upper, lower)
                errors = [
                    float(jnp.linalg.norm(estimate(i) - truth) / jnp.linalg.norm(truth)) for i in range(len(sigmas))
                ]
                fitted = slope(sigmas, errors, rule.stencil.order)
                lines[stencil] = (sigmas, errors)
                row.append(f"{fitted:.2f}")
                values[f"{name}, {stencil}"] = {"sigma": sigmas, "error": errors, "slope": fitted}
            for rule_name, make in one_policy.items():
                if rule_name == "boltzmann" and name in ("quadratic", "episodes"):
                    row.append("-")
                    continue
                error = jnp.linalg.norm(hypergradient(given, make(), upper, lower)(0) - truth) / jnp.linalg.norm(truth)
                row.append(f"{float(error):.1e}")
                values[f"{name}, {rule_name}"] = {"error": float(error)}
            rows.append(row)
            panels.append({"title": name, "x": "sigma / beta", "y": "relative error of grad Phi", "lines": lines})
            progress(name)
    header = ["problem", *(f"{name}: slope" for name in stencils), *(f"{name}: error" for name in one_policy)]
    text = (
        "## 1. Bias\n\nRelative error of the estimated grad Phi, exact lower policies, no sampling, double precision. "
        "Slopes of log error against log sigma (theory: 1, 2, 4); rules without sigma by their error.\n\n"
        + reports.table(header, rows)
    )
    reports.draw(output / "bias.png", panels, columns=3)
    reports.write(output, "bias", values, text)
    return {"rows": rows}
