"""Study 5, sample complexity: pairs needed to reach a given accuracy, and the exponent with which they grow.

Tabular bandits. Every lower problem is solved exactly for the step's own labelled pairs: tilted policies solved with the
gold reward would contain information that no label paid for. The cost is the number of pairs drawn and labelled; an
iterate with a sample of its own pays for it. Counts of pairs are drawn, not single pairs, so a batch of a million
takes as long as a batch of ten. Methods with constants are tuned for every accuracy on separate seeds, over a grid of
batch, learning rate and sigma; the paper's schedule is tuned at the loosest accuracy and then follows its exponents.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_studies import optima, reports

from jaxrlhf import bilevel, known, objectives

MIN_STEPS = 9
"""An accuracy counts as reached only after more steps than this."""

STRIDE = 1 << 20
"""Sigma is selected by the number of a run's first step: k * STRIDE selects the k-th sigma."""


class Arm(NamedTuple):
    """A method: `(sigma schedule) -> rule`, its grid of sigmas, and its cost per step in units of the batch."""

    rule: Any
    sigmas: tuple[float, ...]
    cost: int = 1


PAPER = "forward, independent (the paper's)"

ARMS = {
    PAPER: Arm(functools.partial(bilevel.forward, sampling="independent"), (0.03, 0.2), 2),
    "forward, common random numbers": Arm(functools.partial(bilevel.forward, sampling="common"), (0.03, 0.2), 2),
    "forward, shared sample": Arm(bilevel.forward, (0.01, 0.1)),
    # In a central stencil the sample of tilt 0 has weight 0 and is not counted.
    "central, independent": Arm(functools.partial(bilevel.central, sampling="independent"), (0.2, 1.0), 2),
    "central, shared sample": Arm(bilevel.central, (0.03, 0.3)),
    "boltzmann": Arm(lambda sigma: bilevel.boltzmann(), (1.0,)),
    "implicit, 10 CG": Arm(lambda sigma: bilevel.implicit(iterations=10, damping=1e-4), (1.0,)),
    "zero-order": Arm(bilevel.zero_order, (0.01, 0.1)),
    "fixed penalty (sigma = 3 beta)": Arm(bilevel.forward, (3.0,)),
    "decoupled": Arm(lambda sigma: bilevel.decoupled(), (1.0,)),
}


class Setting(NamedTuple):
    """A problem with its start, its least Phi, the accuracies for each criterion, the tuning grid and the outer steps."""

    problem: known.KnownProblem
    start: jax.Array
    least: float
    accuracies: dict[str, np.ndarray]
    rates: tuple[float, ...]
    batches: tuple[int, ...]
    steps: int


CRITERIA = ("|grad Phi|^2", "Phi - Phi*")


def least_phi(problem, keys=64, steps=3000) -> float:
    """Returns the least Phi that exact descent finds from many starts of several scales."""
    optimizer = optax.adam(0.03)

    def descend(key, scale):
        return problem.phi(optima.minimise_phi(problem, key, scale, optimizer=optimizer, steps=steps))

    scales = jnp.tile(jnp.array([0.1, 0.5, 1.0, 2.0]), keys // 4)
    return float(jnp.min(jax.jit(jax.vmap(descend))(jax.random.split(jax.random.key(3), keys), scales)))


def settings(quick: bool) -> dict[str, Setting]:
    """Returns the settings by name: the benign problem with both criteria, the hard one with the gap only.

    The hard problem starts on a plateau, where a small gradient norm does not mean convergence.
    """
    beta = 0.5
    both = objectives.add(objectives.likelihood(), objectives.utility(kl_price=beta / 4))
    benign = known.random_bandit(contexts=1, arms=4, beta=beta, objective=both)
    hard = known.hard_bandit()
    assert hard.optimum is not None
    size = benign.frozen.gold.size
    second = jnp.argsort(hard.frozen.gold[0])[-2]
    near = 0.3 * jax.random.normal(jax.random.key(9), (size,))
    count, steps = (4, 150) if quick else (6, 500)
    batches = (16, 128, 1024, 8192, 65536)
    return {
        "benign": Setting(
            benign, near, least_phi(benign, 16 if quick else 64),
            {CRITERIA[0]: np.geomspace(3e-3, 1e-4, count), CRITERIA[1]: np.geomspace(1e-2, 3e-4, count)},
            (0.1, 0.4, 1.5), batches, steps,
        ),
        "hard": Setting(
            hard, 0.15 * jax.nn.one_hot(second, size), hard.optimum,
            {CRITERIA[1]: np.geomspace(3e-3, 1e-4, count)}, (0.03, 0.1, 0.3), batches, steps,
        ),
    }  # fmt: skip


def curves(setting: Setting, arm: Arm, steps: int):
    """Returns `(key, rate, batch, sigma index) -> [steps, 2]`, both criteria at every outer step, exact."""
    problem = setting.problem
    assert problem.solver_from_labels is not None and problem.best_response_at is not None
    start = problem.best_response_at(setting.start)

    def schedule(step):
        return jnp.asarray(arm.sigmas)[jnp.minimum(step // STRIDE, len(arm.sigmas) - 1)]

    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    algorithm = problem.algorithm(arm.rule(schedule), problem.solver_from_labels, optimizer, counts=True)

    def criteria(upper):
        value, gradient = jax.value_and_grad(problem.phi)(upper)
        return jnp.stack([jnp.sum(gradient**2), value - setting.least])

    def run(key, rate, batch, sigma):
        state = algorithm.init(key, setting.start, start)
        state = state._replace(step=sigma * STRIDE)
        hyper = state.upper_optimizer.hyperparams | {"learning_rate": jnp.asarray(rate, jnp.float32)}
        state = state._replace(upper_optimizer=state.upper_optimizer._replace(hyperparams=hyper))

        def step(carry, key):
            state, alive = carry
            after, _ = algorithm.step(key, state, batch, problem.frozen)
            # A run that diverges stays where it was and never reaches an accuracy.
            alive = jnp.all(jnp.isfinite(after.upper)) & jnp.all(jnp.abs(after.upper) < 1e3) & alive
            after = jax.tree.map(lambda new, old: jnp.where(alive, new, old), after, state)
            return (after, alive), jnp.where(alive, criteria(after.upper), jnp.inf)

        return jax.lax.scan(step, (state, jnp.asarray(True)), jax.random.split(key, steps))[1]

    return run


def trailing_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the last half of the steps so far, `[..., steps]`: the expectation at a late random step."""
    # Diverged runs are infinite; a large finite number serves as well, and can be subtracted.
    values = np.minimum(values, 1e30)
    total = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    after = np.arange(1, values.shape[-1] + 1)
    before = after // 2
    return (total[..., after] - total[..., before]) / (after - before)


def pairs_needed(values: np.ndarray, accuracy: float, cost: np.ndarray | float) -> np.ndarray:
    """Returns pairs until the trailing mean first reaches the accuracy, infinite where it never does; `[...]`."""
    reached = trailing_mean(values) <= accuracy
    # A mean over so few steps is too noisy.
    reached[..., :MIN_STEPS] = False
    first = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, np.inf)
    return first * cost


class Needed(NamedTuple):
    """Pairs needed to reach accuracies.

    Attributes:
        pairs: `[accuracies]`, infinite where the accuracy was not reached.
        bootstraps: the same for bootstraps of the seeds, `[bootstraps, accuracies]`.
        chosen: the tuned constants, for each accuracy.
        floor: the least final mean over the grid.
    """

    pairs: np.ndarray
    bootstraps: np.ndarray
    chosen: list[dict[str, float]]
    floor: float


def needed_by(runs: list[np.ndarray], accuracies: np.ndarray, costs: list[float], chosen: list, floor: float) -> Needed:
    """Returns the pairs needed, from one run `[seeds, steps]` for each accuracy."""
    generator = np.random.default_rng(0)
    seeds = len(runs[0])

    def of_seeds(rows):
        cases = zip(runs, accuracies, costs, strict=True)
        return np.array([pairs_needed(run[rows].mean(axis=0), accuracy, cost) for run, accuracy, cost in cases])

    bootstraps = np.stack([of_seeds(generator.integers(seeds, size=seeds)) for _ in range(200)])
    return Needed(of_seeds(np.arange(seeds)), bootstraps, chosen, floor)


def tuned(setting: Setting, arm: Arm, seeds: int, tuning: int) -> dict[str, Needed]:
    """Measures a method with constants tuned for each accuracy on the first `tuning` seeds; by criterion."""
    grid = [(r, b, s) for r in setting.rates for b in setting.batches for s in range(len(arm.sigmas))]
    rates, batches, sigmas = (jnp.asarray(column) for column in zip(*grid, strict=True))
    over_seeds = jax.vmap(curves(setting, arm, setting.steps), in_axes=(0, None, None, None))
    keys = jax.random.split(jax.random.key(11), tuning + seeds)
    over_grid = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0, 0)))
    values = np.asarray(over_grid(keys, rates.astype(jnp.float32), batches.astype(jnp.float32), sigmas))
    cost = np.asarray(batches, float) * arm.cost
    found = {}
    for criterion, accuracies in setting.accuracies.items():
        of_criterion = values[..., CRITERIA.index(criterion)]
        mean = of_criterion[:, :tuning].mean(axis=1)
        needed = np.stack([pairs_needed(mean, accuracy, cost) for accuracy in accuracies])
        best = needed.argmin(axis=1)
        # Nothing is reported where no constants reached the accuracy on the tuning seeds.
        reached = np.isfinite(needed.min(axis=1))[:, None, None]
        fresh = np.where(reached, of_criterion[best][:, tuning:], np.inf)
        chosen = [{"rate": grid[c][0], "batch": grid[c][1], "sigma": arm.sigmas[grid[c][2]]} for c in best]
        floor = float(of_criterion[:, tuning:].mean(axis=1)[:, -1].min())
        found[criterion] = needed_by(list(fresh), accuracies, [float(cost[c]) for c in best], chosen, floor)
    return found


def scheduled(setting: Setting, criterion: str, constants: Needed, seeds: int, most_steps: int) -> Needed | None:
    """Measures the paper's schedule: constants tuned at the loosest accuracy, exponents from the theorem."""
    arm = ARMS[PAPER]
    accuracies = setting.accuracies[criterion]
    if not np.isfinite(constants.pairs[0]):
        return None
    best, base = constants.chosen[0], bilevel.theorem(float(accuracies[0]))
    plans = [
        bilevel.theorem(
            float(accuracy),
            outer_steps=1.5 * constants.pairs[0] / (best["batch"] * arm.cost) / base.outer_steps,
            batch=best["batch"] / base.batch,
            relative_sigma=best["sigma"] / base.relative_sigma,
            learning_rate=best["rate"] / base.learning_rate,
        )
        for accuracy in accuracies
    ]
    steps = min(max(plan.outer_steps for plan in plans), most_steps)
    run = curves(setting, arm._replace(sigmas=tuple(plan.relative_sigma for plan in plans)), steps)
    over_plans = jax.vmap(jax.vmap(run, in_axes=(0, None, None, None)), in_axes=(None, 0, 0, 0))
    values = np.asarray(
        jax.jit(over_plans)(
            jax.random.split(jax.random.key(12), seeds),
            jnp.asarray([plan.learning_rate for plan in plans], jnp.float32),
            jnp.asarray([plan.batch for plan in plans], jnp.float32),
            jnp.arange(len(plans)),
        )
    )[..., CRITERIA.index(criterion)]
    # A plan is cut to its own number of steps; one with more than `most_steps` is not reported.
    runs = [
        row[:, : plan.outer_steps] if plan.outer_steps <= steps else np.full_like(row, np.inf)
        for row, plan in zip(values, plans, strict=True)
    ]
    floor = float(min(row.mean(axis=0)[-1] for row in runs))
    return needed_by(
        runs, accuracies, [float(plan.batch * arm.cost) for plan in plans], [p._asdict() for p in plans], floor
    )


def exponent(accuracies: np.ndarray, needed: np.ndarray) -> float:
    """Returns d log pairs / d log (1 / accuracy), fitted where reached; NaN with fewer than four points."""
    kept = np.isfinite(needed)
    if kept.sum() < 4:
        return float("nan")
    return float(np.polyfit(-np.log(accuracies[kept]), np.log(needed[kept]), 1)[0])


def describe(name: str, accuracies: np.ndarray, needed: Needed | None) -> tuple[list[str], dict[str, Any]]:
    """Returns the table's row and the values behind it."""
    if needed is None:
        return [name, "-", f"0/{len(accuracies)}", "-", "-", "-"], {}
    fitted = exponent(accuracies, needed.pairs)
    # Bootstraps are fitted at the same accuracies; one that misses an accuracy has no fit.
    kept = np.isfinite(needed.pairs)
    complete = [row[kept] for row in needed.bootstraps if np.isfinite(row[kept]).all()]
    fits = np.array([exponent(accuracies[kept], row) for row in complete])
    fits = fits[np.isfinite(fits)]
    low, high = np.percentile(fits, [2.5, 97.5]) if len(fits) else (float("nan"), float("nan"))
    reached = needed.pairs[kept]
    row = [
        name,
        f"{fitted:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(fitted) else "-",
        f"{len(reached)}/{len(accuracies)}",
        *([f"{reached[0]:.1e}", f"{reached[-1]:.1e}"] if len(reached) else ["-", "-"]),
        f"{needed.floor:.1e}",
    ]
    values = {
        "accuracies": accuracies, "pairs": needed.pairs, "exponent": fitted, "interval": (low, high),
        "chosen": needed.chosen, "lowest": needed.floor,
    }  # fmt: skip
    return row, values


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study."""
    seeds, tuning = (6, 3) if quick else (10, 4)
    arms = {name: ARMS[name] for name in ("central, shared sample",)} if quick else ARMS
    chosen = settings(quick)
    if quick:
        chosen.pop("benign")
    progress = reports.Progress("sample_complexity", len(chosen) * (len(arms) + 1))
    values, panels, texts = {}, [], []
    for title, setting in chosen.items():
        found = {}
        for name, arm in arms.items():
            found[name] = tuned(setting, arm, seeds, tuning)
            progress(f"{title}: {name}")
        for criterion, accuracies in setting.accuracies.items():
            methods = {}
            if not quick:
                methods["the paper's schedule"] = scheduled(setting, criterion, found[PAPER][criterion], seeds, 4000)
            methods |= {name: by_criterion[criterion] for name, by_criterion in found.items()}
            rows, lines = [], {}
            for name, needed in methods.items():
                row, values[f"{title}, {criterion}: {name}"] = describe(name, accuracies, needed)
                rows.append(row)
                if needed is not None and np.isfinite(needed.pairs).any():
                    lines[name] = (accuracies, np.where(np.isfinite(needed.pairs), needed.pairs, np.nan))
            header = ["method", "exponent [95%]", "reached", "pairs at the loosest", "at the tightest reached"]
            span = f"{accuracies[0]:.0e} to {accuracies[-1]:.0e}"
            table = reports.table([*header, "lowest end"], rows)
            texts.append(f"### {title}, {criterion} from {span}\n\n{table}")
            panels.append({"title": f"{title}, {criterion}", "x": "accuracy", "y": "pairs", "lines": lines})
        progress(f"{title}: the paper's schedule")
    reports.draw(output / "sample_complexity.png", panels, columns=3)
    text = "\n\n".join([INTRODUCTION.format(tuning=tuning, seeds=seeds), *texts])
    reports.write(output, "sample_complexity", values, text)
    return values


INTRODUCTION = """## 5. Sample complexity

Pairs drawn until the mean of the criterion over the last half of the steps so far, averaged over seeds, is below the \
accuracy. Lower problems are solved exactly on the step's own labels; plain SGD. Each accuracy has the best of a grid of \
batch, rate and sigma, chosen on {tuning} seeds and reported on {seeds} others; intervals bootstrap the seeds. A stencil \
whose tilts draw their own samples pays for two samples (for the forward stencil, only the tilt's sample needs labels, so \
the labels are half of the pairs); a shared sample is paid for once. The lowest end is the least final mean over the grid.

The paper's schedule has its constants tuned at the loosest accuracy and then follows the theorem (sigma, T, B, rate as \
functions of the accuracy; its bound is 3.5 for the squared norm), so its exponent is largely prescribed. Plans of more \
than 4,000 steps were not run.

`benign` has local strong convexity, which flatters every method. On `hard` beta is 0.05 and the KL price a hundredth of \
it, the best policy is deterministic, and the start is a plateau of the softmax on the second-best arm; the norm is small \
there from the start, so only the gap counts."""
