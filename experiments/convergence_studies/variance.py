"""Study 2, variance and inner error: ways of sampling a stencil, and what lower policies that are not solved cost."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import reports
from jax.flatten_util import ravel_pytree

from jaxrlhf import bilevel, known, objectives

WAYS = dict.fromkeys(("forward", "central"), ("shared", "common", "independent"))
QUICK_WAYS = {"forward": (), "central": ("shared",)}
STRIDE = 1 << 10
"""Number k * STRIDE of a step reads the k-th sigma."""


def make_problem():
    """The bandit of this study: two contexts, five arms, any reward, pairs against the reference."""
    return known.random_bandit(objective=objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1)))


def estimates(given, rule, solver, upper, lower, *, pairs, num_draws):
    """Returns `(index) -> [draws, P]`, independent estimates; the rule reads the index as the step's number."""
    algorithm = given.algorithm(rule, solver, optax.sgd(1.0), pairs=pairs)
    state = algorithm.init(jax.random.key(0), upper, lower)

    def one(key, index):
        first, second = jax.random.split(key)
        at = state._replace(step=index)
        solved = algorithm.step(first, at, None, given.frozen)[0].lowers
        after, _ = algorithm.step(second, at._replace(lowers=solved), None, given.frozen)
        return ravel_pytree(jax.tree.map(jnp.subtract, upper, after.upper))[0]

    return jax.jit(lambda index: jax.vmap(lambda key: one(key, index))(jax.random.split(jax.random.key(7), num_draws)))


def variance_by_sampling(given, upper, lower, sigmas, ways, *, pairs, num_draws, progress):
    """Returns way -> trace of the covariance of one estimate over |grad Phi|^2, at every sigma."""
    truth = ravel_pytree(jax.grad(given.phi)(upper))[0]
    found = {}
    for name, make, policies in (("forward", bilevel.forward, 2), ("central", bilevel.central, 2)):
        for way in ways[name]:
            # Equal samples: a shared one serves both tilted policies, else each that carries weight draws its half.
            each = pairs if way == "shared" else pairs // policies
            rule = make(lambda step: jnp.asarray(sigmas)[step], sampling=way)
            draw = estimates(given, rule, given.solver, upper, lower, pairs=each, num_draws=num_draws)
            traces = [float(jnp.sum(jnp.var(draw(index), axis=0)) / (truth @ truth)) for index in range(len(sigmas))]
            found[f"{name}, {way}"] = traces
            progress(f"{name}, {way}")
    # The same with tilted policies that know only the step's own labels, as a learner's must.
    rule = bilevel.central(lambda step: jnp.asarray(sigmas)[step])
    draw = estimates(given, rule, given.solver_from_labels, upper, lower, pairs=pairs, num_draws=num_draws)
    name = "central, shared, tilts from the labels"
    found[name] = [float(jnp.sum(jnp.var(draw(index), axis=0)) / (truth @ truth)) for index in range(len(sigmas))]
    progress(name)
    return found


def perturbed(given, size, *, together: bool) -> bilevel.LowerSolver:
    """Returns a solver that misses the exact answer by normal errors of the logits, the same in every tilt or not."""

    def step(key, lowers, state, task):
        solved, state, _ = given.solver.step(key, lowers, state, task)
        count = solved.shape[0]
        noise = jax.random.normal(key, (1 if together else count, *solved.shape[1:]))
        missed = solved + size * noise
        residuals = jax.vmap(optax.tree.norm)(task.gradients(missed))
        return missed, state, residuals

    return bilevel.LowerSolver(given.solver.init, step)


KINDS = {
    "forward, free": (bilevel.forward, bilevel.Balanced(order=1, bias=0.1), False),
    "central, free": (bilevel.central, bilevel.Balanced(order=2, bias=0.03), False),
    "central, shared by the tilts": (bilevel.central, bilevel.Balanced(order=2, bias=0.03), True),
}


def error_by_inner_error(given, upper, lower, sigmas, sizes, kinds, *, pairs, num_draws, progress):
    """Returns (kind, size) -> root mean square error over |grad Phi| at every sigma; and what `Balanced` would choose."""
    truth = ravel_pytree(jax.grad(given.phi)(upper))[0]
    found, chosen = {}, {}
    for kind, (make, balanced, together) in kinds.items():
        for size in sizes:
            solver = perturbed(given, size, together=together)
            rule = make(lambda step: jnp.asarray(sigmas)[step])
            draw = estimates(given, rule, solver, upper, lower, pairs=pairs, num_draws=num_draws)

            def error(values):
                return float(jnp.sqrt(jnp.mean(jnp.sum((values - truth) ** 2, axis=-1)) / (truth @ truth)))

            found[kind, size] = [error(draw(index)) for index in range(len(sigmas))]
            automatic = make(balanced._replace(smallest=float(sigmas[0]), largest=float(sigmas[-1])))
            algorithm = given.algorithm(automatic, solver, optax.sgd(0.0), pairs=pairs)
            state = algorithm.init(jax.random.key(0), upper, lower)
            step = jax.jit(algorithm.step)
            tried = []
            for index in range(8):
                state, _ = step(jax.random.key(index), state, None, given.frozen)
                tried.append(float(automatic.relative_sigma.best(state.inner_error)))
            sigma = float(np.exp(np.mean(np.log(tried[1:]))))
            at_choice = float(np.exp(np.interp(np.log(sigma), np.log(sigmas), np.log(found[kind, size]))))
            chosen[kind, size] = (sigma, at_choice)
            progress(f"inner error {size:g}, {kind}")
    return found, chosen


SOLVERS = {
    "free tilts, SGD": bilevel.gradient(optax.sgd(2.0), steps=10),
    "free tilts, Adam a tilt": bilevel.gradient(optax.adam(0.03), steps=10),
    "free tilts, shared Adam": bilevel.gradient(bilevel.shared_adam(0.03), steps=10),
    "tangent, SGD": bilevel.tangent(optax.sgd(2.0), optax.sgd(2.0), steps=10),
    "tangent, Adam": bilevel.tangent(optax.adam(0.03), optax.adam(0.03), steps=10),
}


def solved_in_part(given, upper, lower, sigmas, solvers, progress):
    """Relative error after 10 outer steps of 10 inner ones at a fixed reward, exact: free tilts against a tangent."""
    truth = ravel_pytree(jax.grad(given.phi)(upper))[0]
    found = {}
    for name, solver in solvers.items():
        rule = bilevel.central(lambda step: jnp.asarray(sigmas)[step // STRIDE])
        algorithm = given.algorithm(rule, solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), upper, lower)

        @jax.jit
        def error(index, algorithm=algorithm, state=state):
            def step(state, _):
                after, _ = algorithm.step(jax.random.key(0), state, None, given.frozen)
                return after._replace(upper=upper), ravel_pytree(jax.tree.map(jnp.subtract, upper, after.upper))[0]

            _, moves = jax.lax.scan(step, state._replace(step=index * STRIDE), None, length=10)
            return jnp.linalg.norm(moves[-1] - truth) / jnp.linalg.norm(truth)

        found[name] = [float(error(index)) for index in range(len(sigmas))]
        progress(f"inner steps, {name}")
    return found


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study in float32: that it can is part of the result."""
    given = make_problem()
    upper, lower = given.start(jax.random.key(1), 0.5)
    sigmas = np.logspace(-4, 0.5, 3 if quick else 10)
    pairs, num_draws = 64, 100 if quick else 1000
    sizes = (0.01,) if quick else (0.003, 0.01, 0.1)
    ways = QUICK_WAYS if quick else WAYS
    kinds = {name: kind for name, kind in KINDS.items() if not quick or name == "central, free"}
    solvers = {name: solver for name, solver in SOLVERS.items() if not quick or name == "tangent, SGD"}
    parts = sum(map(len, ways.values())) + 1 + len(kinds) * len(sizes) + len(solvers)
    progress = reports.Progress("variance", parts)
    traces = variance_by_sampling(
        given, upper, lower, sigmas, ways, pairs=pairs, num_draws=num_draws, progress=progress
    )
    errors, chosen = error_by_inner_error(
        given,
        upper,
        lower,
        sigmas,
        sizes,
        kinds,
        pairs=1024 if quick else 8192,
        num_draws=10 if quick else 60,
        progress=progress,
    )
    partly = solved_in_part(given, upper, lower, sigmas, solvers, progress)

    wanted = (sigmas >= 0.99e-3) & (sigmas <= 1.01)
    rows = []
    for name, values in traces.items():
        kept = np.array(values)[wanted]
        small = np.polyfit(np.log(sigmas[sigmas <= 0.1]), np.log(np.array(values)[sigmas <= 0.1]), 1)[0]
        at_one = float(np.interp(0.0, np.log(sigmas), values))
        rows.append([name, values[0], at_one, float(kept.max() / kept.min()), f"{small:.2f}"])
    inner = []
    for (kind, size), values in errors.items():
        best = int(np.argmin(values))
        sigma, at_choice = chosen[kind, size]
        inner.append(
            [kind, size, float(sigmas[best]), values[best], values[0], sigma, at_choice, at_choice / values[best]]
        )
    text = (
        f"## 2. Variance and inner error\n\nBandit, float32. Trace of the covariance of one estimate over |grad Phi|^2, "
        f"{pairs} pairs a context whatever the way of sampling, {num_draws} draws; lower policies exact. The spread is "
        "largest over smallest for sigma / beta in [1e-3, 1]; the exponent is fitted for sigma / beta <= 0.1.\n\n"
        + reports.table(["stencil, sampling", f"at {sigmas[0]:.0e}", "at 1", "spread", "exponent"], rows)
        + "\n\nRoot mean square error over |grad Phi|, shared sample of many pairs, when the lower "
        "logits miss the answer by normal errors; and sigma / beta as `Balanced` chooses it by the measured residual."
        "\n\n"
        + reports.table(
            [
                "stencil, errors",
                "size",
                "best sigma",
                "error there",
                f"at {sigmas[0]:.0e}",
                "automatic",
                "error there",
                "over best",
            ],
            inner,
        )
        + "\n\nRelative error after 10 outer steps of 10 inner ones at a fixed reward, from the reference, "
        "no sampling.\n\n"
        + reports.table(
            ["lower iterates", *(f"{sigma:.0e}" for sigma in sigmas[::2])],
            [[name, *values[::2]] for name, values in partly.items()],
        )
    )
    x = "sigma / beta"
    panels = [
        {"title": "exact lower policies", "x": x, "y": "tr Cov / |grad Phi|^2",
         "lines": {name: (sigmas, values) for name, values in traces.items()}},
        {"title": "inner error", "x": x, "y": "RMS error / |grad Phi|",
         "lines": {f"{kind}, {size:g}": (sigmas, values) for (kind, size), values in errors.items()}},
        {"title": "100 inner steps, central", "x": x, "y": "error / |grad Phi|",
         "lines": {name: (sigmas, values) for name, values in partly.items()}},
    ]  # fmt: skip
    reports.draw(output / "variance.png", panels, columns=3)
    values = {
        "sigma": sigmas,
        "trace": traces,
        "error": {f"{kind}, {size:g}": value for (kind, size), value in errors.items()},
        "automatic": {f"{kind}, {size:g}": value for (kind, size), value in chosen.items()},
        "partly_solved": partly,
    }
    reports.write(output, "variance", values, text)
    return {"sampling": rows, "inner": inner}
