"""Statistics of the study: ceilings, gains, the fraction of a ceiling that is realised, and intervals over bandits."""

import numpy as np
from convergence_studies.objectives_exact import DEFAULT, ITERATED, UTILITY
from convergence_studies.objectives_sampled import KEPT, KEPT_DEFAULT, STENCIL
from convergence_studies.objectives_structures import structures

MEASURES = ("missed", "missed at equal KL")
WHERE = {"missed": "equal beta", "missed at equal KL": "equal KL"}
COUPLED = (
    "likelihood, policy-reference",
    "brier, policy-reference",
    "excess likelihood, policy-reference",
    UTILITY,
    DEFAULT,
)
LEARNERS_OF_A_CEILING = {DEFAULT: (DEFAULT, STENCIL, KEPT_DEFAULT), UTILITY: (UTILITY,)}
LARGE = 0.05
"""Below this a ceiling is negligible, and the fraction realised of it meaningless."""


def _missed(exact_results: dict, name: str, structure: str, measure: str) -> np.ndarray:
    """`[bandits]`, mean over starts."""
    return exact_results[name][structure][measure].mean(axis=-1)


def ceilings(exact_results: dict) -> dict:
    """Returns the gain of each coupled objective over exact iterated RLHF, mean and 95% interval over bandits."""
    result: dict = {}
    for structure in structures():
        result[structure] = {}
        for measure in MEASURES:
            iterated = _missed(exact_results, ITERATED, structure, measure)
            result[structure][WHERE[measure]] = {"iterated": round(float(iterated.mean()), 4)} | {
                name: _interval(lambda gain: gain, iterated - _missed(exact_results, name, structure, measure))
                for name in COUPLED
                if name in exact_results
            }
    return result


def gains(sampled_results: dict) -> dict:
    """Returns the gain of the default over iterated RLHF at the same labels, as `ceilings`, by budget and learner."""
    result: dict = {}
    for structure in structures():
        result[structure] = {}
        for measure in MEASURES:
            by_budget = result[structure].setdefault(WHERE[measure], {})
            for budget in sampled_results:
                base = _iterated_from_labels(sampled_results[budget], structure, measure)
                by_budget[str(budget)] = {
                    name: _interval(lambda gain: gain, base - sampled_results[budget][name][structure][measure])
                    for name in (KEPT_DEFAULT, DEFAULT)
                    if name in sampled_results[budget]
                }
    return result


def realised(exact_results: dict, sampled_results: dict) -> dict:
    """Returns the fractions of large ceilings that are realised: `{structure: {where: {budget: {learner: fractions}}}}`.

    Against iterated RLHF at the same labels: (I_s - m_s) / (I_s - m_e), and against exact iterated RLHF:
    (I_e - m_s) / (I_e - m_e), with m the method's missed fraction of the gain, I that of iterated RLHF, s from labels (the
    better of its two forms) and e exact.
    """
    result: dict = {}
    for structure in structures():
        for measure in MEASURES:
            of_budgets = _realised(exact_results, sampled_results, structure, measure)
            if any(of_budgets.values()):
                result.setdefault(structure, {})[WHERE[measure]] = of_budgets
    return result


def _realised(exact_results: dict, sampled_results: dict, structure: str, measure: str) -> dict:
    exact_iterated = _missed(exact_results, ITERATED, structure, measure)
    of_budgets: dict = {}
    for budget, of_budget in sampled_results.items():
        of_budgets[str(budget)] = {}
        same = _iterated_from_labels(of_budget, structure, measure)
        for exact_name, learners in LEARNERS_OF_A_CEILING.items():
            limit = (
                _missed(exact_results, exact_name, structure, measure)
                if exact_name in exact_results
                else exact_iterated
            )
            if exact_iterated.mean() - limit.mean() < LARGE:
                continue
            for name in (learner for learner in learners if learner in of_budget):
                reached = of_budget[name][structure][measure]
                of_budgets[str(budget)][name] = {
                    "same labels": _interval(_fraction, same, reached, limit),
                    "exact iterated": _interval(_fraction, exact_iterated, reached, limit),
                }
    return of_budgets


def _fraction(base, reached, limit):
    # A resample in which iterated RLHF is as good as the limit has no ceiling.
    return (base - reached) / np.maximum(base - limit, 1e-3)


def _iterated_from_labels(of_budget: dict, structure: str, measure: str) -> np.ndarray:
    """The better, on average, of iterated RLHF with each label used once and with labels kept, `[bandits]`."""
    forms = [of_budget[name][structure][measure] for name in (ITERATED, KEPT) if name in of_budget]
    return min(forms, key=np.mean)


def _interval(statistic, *arrays: np.ndarray, resamples: int = 1000) -> list[float]:
    """Returns the statistic of the means, and its 95% bootstrap interval over bandits."""
    count = len(arrays[0])
    index = np.random.default_rng(0).integers(count, size=(resamples, count))
    bootstraps = statistic(*(array[index].mean(axis=-1) for array in arrays))
    low, high = np.quantile(bootstraps, (0.025, 0.975))
    return [round(float(value), 3) for value in (statistic(*(array.mean() for array in arrays)), low, high)]


def means(exact_results: dict) -> dict:
    """Returns means over bandits and starts, and of the worst start."""

    def summary(values):
        own = {name: value for name, value in values.items() if not name.startswith("oracle")}
        means = {name: round(float(value.mean()), 4) for name, value in own.items()}
        worst = {f"{name}, worst start": round(float(values[name].mean(axis=0).max()), 4) for name in MEASURES}
        return means | worst

    return {
        name: {structure: summary(values) for structure, values in of.items()} for name, of in exact_results.items()
    }


def sampled_means(sampled_results: dict) -> dict:
    """Returns means over bandits by budget, with the standard errors of the missed fractions."""

    def summary(values):
        means = {
            name: round(float(values[name].mean()), 4) for name in (*MEASURES, "return", "win rate", "kl", "chosen")
        }
        errors = {
            f"{name}, standard error": round(float(values[name].std() / np.sqrt(values[name].size)), 4)
            for name in MEASURES
        }
        return means | errors

    return {
        str(budget): {
            name: {structure: summary(values) for structure, values in of.items()} for name, of in of_budget.items()
        }
        for budget, of_budget in sampled_results.items()
    }


def ends(traces: dict) -> dict:
    """Returns means over bandits at a descent's end: [own value minus the gold reward's, fraction of the gain]."""
    return {
        name: {start: [round(float(part[:, -1].mean()), 4) for part in parts] for start, parts in of.items()}
        for name, of in traces.items()
    }
