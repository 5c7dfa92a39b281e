"""Study 6, objectives: the policies that each upper objective leads to, exact and from labels; where coupling pays.

True return and win rate of the policies reached with each upper objective and with decoupled (iterated) and offline RLHF,
on bandits whose reward is realisable, misspecified at random, or misspecified in a structured way; exact and sampled; at
equal labels, at equal beta and at equal KL. The figure of merit is the missed fraction of the achievable gain: 0 is the
optimum, 1 the reference; above 1 the policy is worse than the reference.
"""

import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from convergence_studies import objectives_exact as exactly
from convergence_studies import objectives_figures as figures
from convergence_studies import objectives_numbers as numbers
from convergence_studies import objectives_sampled as sampled
from convergence_studies import objectives_tables as tables
from convergence_studies import reports
from convergence_studies.objectives_exact import BRIER_POLICY, DEFAULT, ITERATED, PAPER, POLICY_GRADIENT, UTILITY
from convergence_studies.objectives_numbers import COUPLED, MEASURES
from convergence_studies.objectives_sampled import KEPT, KEPT_DEFAULT
from convergence_studies.objectives_structures import Case, draw_all, structures

BETA = 0.3
OTHER_BETAS = (0.1, 1.0)
SEEDS = {"study": 2024, "tuning": 4048}


class Size(NamedTuple):
    """The size of the study.

    Every sampled bandit is run `repeats` times with different labels, and averaged. Tuning makes as many runs as the
    study, so that one program serves both: `bandits * repeats` must be divisible by the size of a grid.
    """

    bandits: int
    repeats: int
    steps: int
    budgets: tuple[int, ...]
    exact: tuple[str, ...]
    learners: tuple[str, ...]
    traced: tuple[tuple[str, float], ...]
    betas: tuple[float, ...]


def _size(quick: bool) -> Size:
    if quick:
        few = (ITERATED, DEFAULT)
        return Size(4, 1, 100, (1000,), few, (KEPT, KEPT_DEFAULT), (), ())
    return Size(
        bandits=24,
        repeats=2,
        steps=600,
        budgets=(300, 1000, 10_000),
        exact=tuple(exactly.methods(BETA)),
        learners=tuple(sampled.learners(BETA)),
        traced=((PAPER, BETA), (BRIER_POLICY, BETA), (UTILITY, 0.1), (DEFAULT, 0.1)),
        betas=OTHER_BETAS,
    )


def run(quick: bool, output: pathlib.Path) -> dict:
    """Runs the study and writes `objectives.json`, `objectives.md` and `objectives*.png`; returns a summary."""
    output.mkdir(parents=True, exist_ok=True)
    size, began = _size(quick), time.monotonic()
    cases = {name: _flat(draw_all(seed, size.bandits)) for name, seed in SEEDS.items()}
    total = len(size.exact) + len(size.betas) * 3 + len(size.learners) * len(size.budgets) + len(size.traced)
    progress = reports.Progress("objectives", total)

    exact_results = _run_exact(cases["study"], size, progress)
    of_betas = _run_betas(cases["study"], size, progress)
    sampled_results = _run_sampled(cases, size, progress)
    traces = _trace(cases["study"], size, progress)
    ceilings = numbers.ceilings(exact_results)
    gains = numbers.gains(sampled_results)
    realised = numbers.realised(exact_results, sampled_results)

    sections = [
        tables.summary_table(ceilings, gains),
        tables.ceiling_table(ceilings, of_betas),
        *tables.realised_tables(realised),
        *([tables.loophole_table(traces)] if traces else []),
        *tables.exact_tables(exact_results),
        *tables.sampled_tables(sampled_results),
        *tables.detail_tables(exact_results),
    ]
    (output / "objectives.md").write_text(
        tables.page(sections, beta=BETA, bandits=size.bandits, repeats=size.repeats, quick=quick)
    )
    figures.draw_map(output / "objectives.png", ceilings, gains)
    if traces:
        figures.draw_loopholes(output / "objectives_loopholes.png", traces)
    results = {
        "ceilings": ceilings,
        "gains from labels": gains,
        "fractions realised": realised,
        "exact": numbers.means(exact_results),
        "sampled": numbers.sampled_means(sampled_results),
        "other betas": of_betas,
        "ends of descents": numbers.ends(traces),
        "seconds": round(time.monotonic() - began, 1),
    }
    (output / "objectives.json").write_text(json.dumps(results) + "\n")
    return _summary(ceilings, realised) | {"seconds": results["seconds"]}


def _summary(ceilings: dict, realised: dict) -> dict:
    """The ceiling of the default by structure, and the fraction of it realised with kept labels."""
    kept = {
        structure: {
            where: {budget: of[KEPT_DEFAULT]["same labels"] for budget, of in of_budgets.items() if KEPT_DEFAULT in of}
            for where, of_budgets in of_structure.items()
        }
        for structure, of_structure in realised.items()
    }
    exact = {structure: {where: of[DEFAULT] for where, of in rows.items()} for structure, rows in ceilings.items()}
    return {"ceilings": exact, "fractions realised": kept}


def _flat(cases: Case) -> Case:
    """`[structures, bandits, ...]` -> `[structures bandits, ...]`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cases)


def _by_structure(results: dict, bandits: int) -> dict[str, dict[str, np.ndarray]]:
    """`{quantity: [structures bandits, ...]}` -> `{structure: {quantity: [bandits, ...]}}`."""
    arrays = {name: np.asarray(value).reshape(-1, bandits, *value.shape[1:]) for name, value in results.items()}
    return {
        structure: {name: value[row] for name, value in arrays.items()} for row, structure in enumerate(structures())
    }


def _run_exact(cases: Case, size: Size, progress: reports.Progress) -> dict:
    """Returns `{method: {structure: {quantity: [bandits, starts]}}}`."""
    results = {}
    for name in size.exact:
        results[name] = _descend(cases, name, BETA, size)
        progress(f"exact: {name}")
    scores = jax.vmap(exactly.label_scores)(cases)
    evaluations = exactly.evaluate_all(cases, scores, jnp.asarray(BETA / 4), jnp.asarray(BETA))
    results[POLICY_GRADIENT] = _by_structure(
        {name: value[:, None] for name, value in evaluations.items()}, size.bandits
    )
    return results


def _descend(cases: Case, name: str, beta: float, size: Size) -> dict:
    scores = exactly.descend_all(cases, jnp.asarray(beta), name=name, rate=0.05, steps=size.steps)
    of_start = [
        exactly.evaluate_all(cases, scores[:, start], jnp.asarray(beta), jnp.asarray(beta))
        for start in range(scores.shape[1])
    ]
    stacked = jax.tree.map(lambda *values: np.stack(values, axis=-1), *of_start)
    return _by_structure(stacked, size.bandits)


def _run_betas(cases: Case, size: Size, progress: reports.Progress) -> dict:
    """Returns the missed fractions at other betas, `{beta: {method: {structure: {measure: [of each start]}}}}`."""
    results = {}
    for beta in size.betas:
        results[str(beta)] = {}
        for name in (ITERATED, *COUPLED[-2:]):
            means = {
                structure: {measure: np.round(of[measure].mean(axis=0), 4).tolist() for measure in MEASURES}
                for structure, of in _descend(cases, name, beta, size).items()
            }
            results[str(beta)][name] = means
            progress(f"exact, beta {beta:g}: {name}")
    return results


def _run_sampled(cases: dict[str, Case], size: Size, progress: reports.Progress) -> dict:
    """Returns `{budget: {method: {structure: {quantity: [bandits]}}}}`, each method with its tuned value."""
    results: dict = {budget: {} for budget in size.budgets}
    for name in size.learners:
        grid = sampled.grid(sampled.learners(BETA)[name])
        for budget in size.budgets:
            chosen = _tune(cases["tuning"], name, grid, budget, size)
            values = jnp.repeat(jnp.asarray([grid[index] for index in chosen]), size.bandits)
            repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * size.repeats), cases["study"])
            evaluations = _learn(repeated, name, jnp.tile(values, size.repeats), budget, seed=1)
            means = {
                key: np.asarray(value).reshape(size.repeats, -1).mean(axis=0) for key, value in evaluations.items()
            }
            results[budget][name] = _by_structure(means, size.bandits)
            for index, of_structure in zip(chosen, results[budget][name].values(), strict=True):
                of_structure["chosen"] = np.asarray(grid[index])
            progress(f"{budget} labels: {name}")
    return results


def _tune(cases: Case, name: str, grid: tuple[float, ...], budget: int, size: Size) -> np.ndarray:
    """Returns, by structure, the index of the grid with the least sum of both missed fractions on the tuning bandits."""
    per_value = size.bandits * size.repeats // len(grid)
    values = jnp.tile(jnp.repeat(jnp.asarray(grid), per_value), len(structures()))
    # Every value of the grid is run on the same bandits: the first of each structure, repeated.
    index = np.arange(cases.gold.shape[0]).reshape(-1, size.bandits)
    index = np.tile(index[:, :per_value], (1, len(grid))).ravel()
    evaluations = _learn(jax.tree.map(lambda leaf: leaf[index], cases), name, values, budget, seed=0)
    both = np.asarray(evaluations[MEASURES[0]]) + np.asarray(evaluations[MEASURES[1]])
    return both.reshape(len(structures()), len(grid), per_value).mean(axis=-1).argmin(axis=-1)


def _learn(cases: Case, name: str, values: jax.Array, budget: int, *, seed: int) -> dict:
    scores = sampled.learn_all(jax.random.key(seed), cases, values, budget, name=name, beta=BETA)
    return exactly.evaluate_all(cases, scores, jnp.asarray(BETA), jnp.asarray(BETA))


def _trace(cases: Case, size: Size, progress: reports.Progress) -> dict:
    """Returns `{method: {start: (objective's value, return)}}` on realisable bandits, arrays `[bandits, steps]`."""
    realisable = jax.tree.map(lambda leaf: leaf[: size.bandits], cases)
    points = jax.vmap(exactly.starts)(realisable)
    traces = {}
    for name, beta in size.traced:
        title = name if beta == BETA else f"{name}, beta {beta:g}"
        traces[title] = {
            start: jax.tree.map(
                np.asarray,
                exactly.trace_descent(
                    realisable, points[:, row], jnp.asarray(beta), name=name, rate=0.05, steps=size.steps
                ),
            )
            for row, start in enumerate(exactly.STARTS)
        }
        progress(f"descent of {title}")
    return traces
