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
    """Returns the problems by name; every objective is coupled, so that the response term of the gradient matters."""
    both = objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1))
    return {
        "quadratic": known.quadratic(),
        "bandit": known.random_bandit(objective=both),
        "bandit, network reward": known.random_bandit(network="reward", objective=both),
        "bandit, policy-policy": known.random_bandit(objective=objectives.likelihood(), against_reference=False),
        "episodes": known.random_mdp(objective=both),
    }


def hypergradient(problem, rule, upper, lower):
    """Returns `index -> ` the estimate as a vector; the rule's sigma schedule reads the index as the step number."""
    algorithm = problem.algorithm(rule, problem.solver, optax.sgd(1.0))
    state = algorithm.init(jax.random.key(0), upper, lower)

    @jax.jit
    def estimate(index):
        start = state._replace(step=index)
        # The first step solves the lower problem, so that the second one samples from the best response to this reward.
        solved = algorithm.step(jax.random.key(0), start, problem.data, problem.frozen)[0].lowers
        after, _ = algorithm.step(jax.random.key(0), start._replace(lowers=solved), problem.data, problem.frozen)
        return ravel_pytree(jax.tree.map(jnp.subtract, upper, after.upper))[0]

    return estimate


def fitted_exponent(sigmas, errors, order):
    """Returns the exponent of error against sigma, fitted where neither saturation nor rounding matters."""
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
        chosen = {name: problem for name, problem in problems().items() if not quick or name == "bandit"}
        progress = reports.Progress("bias", len(chosen))
        for name, problem in chosen.items():
            upper, lower = problem.start(jax.random.key(1), 0.5)
            truth = ravel_pytree(jax.grad(problem.phi)(upper))[0]
            lines, row = {}, [name]
            for stencil, make in stencils.items():
                rule = make(lambda step: jnp.asarray(sigmas)[step])
                estimate = hypergradient(problem, rule, upper, lower)
                errors = [
                    float(jnp.linalg.norm(estimate(i) - truth) / jnp.linalg.norm(truth)) for i in range(len(sigmas))
                ]
                fitted = fitted_exponent(sigmas, errors, rule.stencil.order)
                lines[stencil] = (sigmas, errors)
                row.append(f"{fitted:.2f}")
                values[f"{name}, {stencil}"] = {"sigma": sigmas, "error": errors, "exponent": fitted}
            for rule_name, make in one_policy.items():
                if rule_name == "boltzmann" and name in ("quadratic", "episodes"):
                    row.append("-")
                    continue
                estimate = hypergradient(problem, make(), upper, lower)
                error = jnp.linalg.norm(estimate(0) - truth) / jnp.linalg.norm(truth)
                row.append(f"{float(error):.1e}")
                values[f"{name}, {rule_name}"] = {"error": float(error)}
            rows.append(row)
            panels.append({"title": name, "x": "sigma / beta", "y": "relative error of grad Phi", "lines": lines})
            progress(name)
    header = ["problem", *(f"{name}: exponent" for name in stencils), *(f"{name}: error" for name in one_policy)]
    text = (
        "## 1. Bias\n\nRelative error of the estimated grad Phi, exact lower policies, no sampling, double precision. "
        "Exponents: slopes of log error against log sigma (theory: 1, 2, 4); for rules without sigma, the error.\n\n"
        + reports.table(header, rows)
    )
    reports.draw(output / "bias.png", panels, columns=3)
    reports.write(output, "bias", values, text)
    return {"rows": rows}
