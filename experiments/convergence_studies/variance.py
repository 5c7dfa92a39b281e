"""Study 2, variance and inner error: the sampling modes of a stencil, and the effect of inexact lower policies."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import reports
from jax.flatten_util import ravel_pytree

from jaxrlhf import bilevel, known, objectives

SAMPLINGS = dict.fromkeys(("forward", "central"), ("shared", "common", "independent"))
QUICK_SAMPLINGS = {"forward": (), "central": ("shared",)}
STRIDE = 1 << 10
"""Step number k * STRIDE selects the k-th sigma."""


class Setup(NamedTuple):
    """The problem, the point at which the gradient is estimated, and the sigmas of the study.

    Attributes:
        problem: two contexts, five arms, any reward, pairs against the reference.
        upper, lower: reward and policy there.
        truth: exact hypergradient there, `[P]`.
        sigmas: relative sigmas, `[S]`.
        progress: called after each task.
    """

    problem: known.KnownProblem
    upper: jax.Array
    lower: jax.Array
    truth: jax.Array
    sigmas: np.ndarray
    progress: Callable[[str], None]

    def schedule(self, step):
        """Relative sigma by step number: step k has the k-th sigma."""
        return jnp.asarray(self.sigmas)[step]


def estimates(setup: Setup, rule, solver, *, pairs, num_draws):
    """Returns `index -> [draws, P]`, independent estimates of the hypergradient at the index-th sigma."""
    problem = setup.problem
    algorithm = problem.algorithm(rule, solver, optax.sgd(1.0), pairs=pairs)
    state = algorithm.init(jax.random.key(0), setup.upper, setup.lower)

    def estimate(key, index):
        first, second = jax.random.split(key)
        start = state._replace(step=index)
        solved = algorithm.step(first, start, None, problem.frozen)[0].lowers
        after, _ = algorithm.step(second, start._replace(lowers=solved), None, problem.frozen)
        return ravel_pytree(jax.tree.map(jnp.subtract, setup.upper, after.upper))[0]

    def draw(index):
        return jax.vmap(lambda key: estimate(key, index))(jax.random.split(jax.random.key(7), num_draws))

    return jax.jit(draw)


def relative_variances(setup: Setup, rule, solver, *, pairs, num_draws) -> list[float]:
    """Returns the trace of one estimate's covariance over |grad Phi|^2, at every sigma."""
    draw = estimates(setup, rule, solver, pairs=pairs, num_draws=num_draws)
    squared_norm = setup.truth @ setup.truth
    return [float(jnp.sum(jnp.var(draw(index), axis=0)) / squared_norm) for index in range(len(setup.sigmas))]


def variance_by_sampling(setup: Setup, samplings, *, pairs, num_draws) -> dict[str, list[float]]:
    """Returns the relative variances of each stencil and sampling mode, at every sigma."""
    found, problem = {}, setup.problem
    for name, make in (("forward", bilevel.forward), ("central", bilevel.central)):
        for sampling in samplings[name]:
            # Equal samples: a shared one serves both tilted policies, otherwise each of the two draws half of the pairs.
            each = pairs if sampling == "shared" else pairs // 2
            rule = make(setup.schedule, sampling=sampling)
            found[f"{name}, {sampling}"] = relative_variances(
                setup, rule, problem.solver, pairs=each, num_draws=num_draws
            )
            setup.progress(f"{name}, {sampling}")
    # The same with tilted policies solved from the step's own labels, as a learner has to.
    name, rule = "central, shared, tilts from the labels", bilevel.central(setup.schedule)
    found[name] = relative_variances(setup, rule, problem.solver_from_labels, pairs=pairs, num_draws=num_draws)
    setup.progress(name)
    return found


def perturbed(problem, size, *, common: bool) -> bilevel.LowerSolver:
    """Returns a solver whose logits have normal errors, the same for every tilt or independent."""

    def step(key, lowers, state, task):
        solved, state, _ = problem.solver.step(key, lowers, state, task)
        count = solved.shape[0]
        noise = jax.random.normal(key, (1 if common else count, *solved.shape[1:]))
        inexact = solved + size * noise
        residuals = jax.vmap(optax.tree.norm)(task.gradients(inexact))
        return inexact, state, residuals

    return bilevel.LowerSolver(problem.solver.init, step)


class Kind(NamedTuple):
    """A stencil, its automatic sigma, and whether all tilts have the same inner error."""

    make: Callable
    balanced: bilevel.Balanced
    common: bool


KINDS = {
    "forward, independent": Kind(bilevel.forward, bilevel.Balanced(order=1, bias=0.1), False),
    "central, independent": Kind(bilevel.central, bilevel.Balanced(order=2, bias=0.03), False),
    "central, common to all tilts": Kind(bilevel.central, bilevel.Balanced(order=2, bias=0.03), True),
}


def relative_rms_errors(setup: Setup, rule, solver, *, pairs, num_draws) -> list[float]:
    """Returns an estimate's root mean square error over |grad Phi|, at every sigma."""
    draw, truth = estimates(setup, rule, solver, pairs=pairs, num_draws=num_draws), setup.truth

    def error(values):
        return float(jnp.sqrt(jnp.mean(jnp.sum((values - truth) ** 2, axis=-1)) / (truth @ truth)))

    return [error(draw(index)) for index in range(len(setup.sigmas))]


def automatic_sigma(setup: Setup, kind: Kind, solver, *, pairs) -> float:
    """Returns the sigma that `Balanced` chooses from measured residuals: geometric mean over steps after the first."""
    problem, sigmas = setup.problem, setup.sigmas
    rule = kind.make(kind.balanced._replace(smallest=float(sigmas[0]), largest=float(sigmas[-1])))
    algorithm = problem.algorithm(rule, solver, optax.sgd(0.0), pairs=pairs)
    state = algorithm.init(jax.random.key(0), setup.upper, setup.lower)
    step = jax.jit(algorithm.step)
    chosen = []
    for index in range(8):
        state, _ = step(jax.random.key(index), state, None, problem.frozen)
        chosen.append(float(rule.relative_sigma.best(state.inner_error)))
    return float(np.exp(np.mean(np.log(chosen[1:]))))


def error_by_inner_error(setup: Setup, sizes, kinds: dict[str, Kind], *, pairs, num_draws):
    """Returns, by kind and size of the inner error, the RMS error at every sigma; and the automatic sigma's choice.

    The second value is `(automatic sigma, error there)`, interpolated between the study's sigmas.
    """
    found, chosen = {}, {}
    for name, kind in kinds.items():
        for size in sizes:
            solver = perturbed(setup.problem, size, common=kind.common)
            errors = relative_rms_errors(setup, kind.make(setup.schedule), solver, pairs=pairs, num_draws=num_draws)
            sigma = automatic_sigma(setup, kind, solver, pairs=pairs)
            there = float(np.exp(np.interp(np.log(sigma), np.log(setup.sigmas), np.log(errors))))
            found[name, size], chosen[name, size] = errors, (sigma, there)
            setup.progress(f"inner error {size:g}, {name}")
    return found, chosen


SOLVERS = {
    "separate tilts, SGD": bilevel.gradient(optax.sgd(2.0), steps=10),
    "separate tilts, Adam per tilt": bilevel.gradient(optax.adam(0.03), steps=10),
    "separate tilts, shared Adam": bilevel.gradient(bilevel.shared_adam(0.03), steps=10),
    "tangent, SGD": bilevel.tangent(optax.sgd(2.0), optax.sgd(2.0), steps=10),
    "tangent, Adam": bilevel.tangent(optax.adam(0.03), optax.adam(0.03), steps=10),
}


def partly_solved(setup: Setup, solvers) -> dict[str, list[float]]:
    """Returns each solver's relative error after 10 outer steps of 10 inner ones at a fixed reward; exact expectations."""
    problem, upper, truth = setup.problem, setup.upper, setup.truth
    rule = bilevel.central(lambda step: setup.schedule(step // STRIDE))
    found = {}
    for name, solver in solvers.items():
        algorithm = problem.algorithm(rule, solver, optax.sgd(1.0))
        state = algorithm.init(jax.random.key(0), upper, setup.lower)

        @jax.jit
        def error(index, algorithm=algorithm, state=state):
            def step(state, _):
                after, _ = algorithm.step(jax.random.key(0), state, None, problem.frozen)
                return after._replace(upper=upper), ravel_pytree(jax.tree.map(jnp.subtract, upper, after.upper))[0]

            _, moves = jax.lax.scan(step, state._replace(step=index * STRIDE), None, length=10)
            return jnp.linalg.norm(moves[-1] - truth) / jnp.linalg.norm(truth)

        found[name] = [float(error(index)) for index in range(len(setup.sigmas))]
        setup.progress(f"inner steps, {name}")
    return found


class Results(NamedTuple):
    """What was measured at every sigma, see the functions of this file."""

    sigmas: np.ndarray
    traces: dict[str, list[float]]
    errors: dict[tuple[str, float], list[float]]
    chosen: dict[tuple[str, float], tuple[float, float]]
    partly: dict[str, list[float]]


def sampling_rows(results: Results) -> list[list]:
    """Returns the rows of the table of sampling modes."""
    sigmas, rows = results.sigmas, []
    window = (sigmas >= 0.99e-3) & (sigmas <= 1.01)
    for name, values in results.traces.items():
        inside = np.array(values)[window]
        exponent = np.polyfit(np.log(sigmas[sigmas <= 0.1]), np.log(np.array(values)[sigmas <= 0.1]), 1)[0]
        at_one = float(np.interp(0.0, np.log(sigmas), values))
        rows.append([name, values[0], at_one, float(inside.max() / inside.min()), f"{exponent:.2f}"])
    return rows


def inner_rows(results: Results) -> list[list]:
    """Returns the rows of the table of inner errors."""
    rows = []
    for (name, size), values in results.errors.items():
        best = int(np.argmin(values))
        sigma, there = results.chosen[name, size]
        rows.append(
            [name, size, float(results.sigmas[best]), values[best], values[0], sigma, there, there / values[best]]
        )
    return rows


def page(results: Results, sampling: list, inner: list, *, pairs: int, num_draws: int) -> str:
    """Returns the study's page."""
    sigmas = results.sigmas
    smallest = f"at {sigmas[0]:.0e}"
    parts = [
        f"## 2. Variance and inner error\n\nBandit, float32. Trace of the covariance of one estimate over |grad Phi|^2, "
        f"{pairs} pairs per context in every sampling mode, {num_draws} draws; lower policies exact. The spread is the "
        "largest over the smallest value for sigma / beta in [1e-3, 1]; the exponent is fitted for sigma / beta <= 0.1.",
        reports.table(["stencil, sampling", smallest, "at 1", "spread", "exponent"], sampling),
        "Root mean square error over |grad Phi| with a shared sample of many pairs, when the lower logits have normal "
        "errors; and the sigma / beta that `Balanced` chooses from the measured residual.",
        reports.table(
            [
                "stencil, errors",
                "size",
                "best sigma",
                "error there",
                smallest,
                "automatic sigma",
                "error there",
                "over best",
            ],
            inner,
        ),
        "Relative error after 10 outer steps of 10 inner ones at a fixed reward, starting at the reference, without "
        "sampling.",
        reports.table(
            ["lower iterates", *(f"{sigma:.0e}" for sigma in sigmas[::2])],
            [[name, *values[::2]] for name, values in results.partly.items()],
        ),
    ]
    return "\n\n".join(parts)


def draw(path: pathlib.Path, results: Results) -> None:
    """Draws the three measurements against sigma."""
    x, sigmas = "sigma / beta", results.sigmas
    panels = [
        {"title": "exact lower policies", "x": x, "y": "tr Cov / |grad Phi|^2",
         "lines": {name: (sigmas, values) for name, values in results.traces.items()}},
        {"title": "inner error", "x": x, "y": "RMS error / |grad Phi|",
         "lines": {f"{name}, {size:g}": (sigmas, values) for (name, size), values in results.errors.items()}},
        {"title": "100 inner steps, central", "x": x, "y": "error / |grad Phi|",
         "lines": {name: (sigmas, values) for name, values in results.partly.items()}},
    ]  # fmt: skip
    reports.draw(path, panels, columns=3)


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study in float32, which is part of the result."""
    objective = objectives.add(objectives.likelihood(), objectives.utility(kl_price=0.1))
    problem = known.random_bandit(objective=objective)
    upper, lower = problem.start(jax.random.key(1), 0.5)
    pairs, num_draws = 64, 100 if quick else 1000
    sizes = (0.01,) if quick else (0.003, 0.01, 0.1)
    samplings = QUICK_SAMPLINGS if quick else SAMPLINGS
    kinds = {name: kind for name, kind in KINDS.items() if not quick or name == "central, independent"}
    solvers = {name: solver for name, solver in SOLVERS.items() if not quick or name == "tangent, SGD"}
    total = sum(map(len, samplings.values())) + 1 + len(kinds) * len(sizes) + len(solvers)
    sigmas = np.logspace(-4, 0.5, 3 if quick else 10)
    truth = ravel_pytree(jax.grad(problem.phi)(upper))[0]
    setup = Setup(problem, upper, lower, truth, sigmas, reports.Progress("variance", total))

    traces = variance_by_sampling(setup, samplings, pairs=pairs, num_draws=num_draws)
    errors, chosen = error_by_inner_error(
        setup, sizes, kinds, pairs=1024 if quick else 8192, num_draws=10 if quick else 60
    )
    results = Results(sigmas, traces, errors, chosen, partly_solved(setup, solvers))
    sampling, inner = sampling_rows(results), inner_rows(results)
    draw(output / "variance.png", results)
    values = {
        "sigma": sigmas,
        "trace": traces,
        "error": {f"{name}, {size:g}": value for (name, size), value in errors.items()},
        "automatic": {f"{name}, {size:g}": value for (name, size), value in chosen.items()},
        "partly_solved": results.partly,
    }
    reports.write(output, "variance", values, page(results, sampling, inner, pairs=pairs, num_draws=num_draws))
    return {"sampling": sampling, "inner": inner}
