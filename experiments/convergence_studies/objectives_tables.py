"""The study's tables, as Markdown."""

from convergence_studies import objectives_sampled as sampled
from convergence_studies.objectives_exact import DEFAULT, ITERATED
from convergence_studies.objectives_numbers import COUPLED, LARGE, MEASURES, WHERE, ends
from convergence_studies.objectives_sampled import KEPT_DEFAULT
from convergence_studies.objectives_structures import ARMS, CONTEXTS, structures

DETAILED = ("realisable", "random, 8 features", "length, padding", "gated")


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return f"### {title}\n\n" + "\n".join(lines)


def exact_tables(exact_results: dict) -> list[str]:
    """Returns one table per measure: mean over bandits and starts, with the worst start in brackets where it differs."""

    def cell(values):
        of_start = values.mean(axis=0)
        worst = f" ({of_start.max():.2f})" if of_start.max() > of_start.mean() + 0.02 else ""
        return f"{of_start.mean():.3f}{worst}"

    return [
        _table(
            f"Exact descent, missed fraction at {WHERE[measure]}",
            ["objective", *structures()],
            [
                [name, *(cell(of[structure][measure]) for structure in structures())]
                for name, of in exact_results.items()
            ],
        )
        for measure in MEASURES
    ]


def summary_table(ceilings: dict, gains: dict) -> str:
    """Returns the main result by structure: the gain of the default, exact and from labels."""
    budgets = list(next(iter(gains.values()))["equal beta"])[-2:]
    header = ["structure", *(f"exact, {where}" for where in WHERE.values()), "exact conclusion"]
    header += [f"{budget} labels kept, {where}" for budget in budgets for where in WHERE.values()]
    rows = []
    for structure, of in ceilings.items():
        exact = [of[where][DEFAULT] for where in WHERE.values()]
        row = [structure, *map(_bracketed, exact), _conclusion(exact)]
        row += [
            _bracketed(gains[structure][where][budget][KEPT_DEFAULT]) for budget in budgets for where in WHERE.values()
        ]
        rows.append(row)
    return _table(f"Where coupling pays: gain of '{DEFAULT}' over iterated RLHF at equal labels [95%]", header, rows)


def _conclusion(intervals: list[list[float]]) -> str:
    if all(low > 0 and mean > LARGE for mean, low, _ in intervals):
        return "pays"
    if all(high < 0 for _, _, high in intervals):
        return "loses a little" if all(mean > -LARGE for mean, _, _ in intervals) else "loses"
    return "little to gain"


def _bracketed(interval: list[float]) -> str:
    return "{:.3f} [{:.2f}, {:.2f}]".format(*interval)


def loophole_table(traces: dict) -> str:
    """Returns each objective's own value where its descent ends, beside the true return."""
    rows = [
        [name, start, f"{value:.4f}", f"{gain:.2f}"]
        for name, of in ends(traces).items()
        for start, (value, gain) in of.items()
    ]
    header = ["objective", "start", "own value minus the gold reward's", "return, fraction of the oracle's gain"]
    return _table("Loopholes: where exact descent ends on realisable bandits (1 is the oracle)", header, rows)


def ceiling_table(ceilings: dict, of_betas: dict) -> str:
    """Returns every coupled objective's exact gain, and how it changes with beta."""
    names = [name for name in COUPLED if name in ceilings["realisable"]["equal beta"]]
    header = ["structure", "at", "missed by iterated", *(f"{name} [95%]" for name in names)]
    header += [f"beta {beta}, flat start: {name}" for beta in of_betas for name in of_betas[beta] if name != ITERATED]
    rows = []
    for structure, of in ceilings.items():
        for measure, where in WHERE.items():
            row = [structure, where, f"{of[where]['iterated']:.3f}"]
            row += [_bracketed(of[where][name]) for name in names]
            for of_beta in of_betas.values():
                base = of_beta[ITERATED][structure][measure][0]
                row += [f"{base - of[structure][measure][0]:.3f}" for name, of in of_beta.items() if name != ITERATED]
            rows.append(row)
    return _table("Ceilings: gain of exact coupling over exact iterated RLHF", header, rows)


def sampled_tables(sampled_results: dict) -> list[str]:
    """Returns one table per budget: every method by structure."""

    def cell(values):
        return " / ".join(f"{values[measure].mean():.2f}" for measure in MEASURES)

    return [
        _table(
            f"From {budget} labels, missed fraction at equal beta / at equal KL",
            ["method", *structures()],
            [
                [name, *(cell(of[structure]) for structure in structures())]
                for name, of in sampled_results[budget].items()
            ],
        )
        for budget in sampled_results
    ]


def realised_tables(realised: dict) -> list[str]:
    """Returns two tables: over iterated RLHF at equal labels, and over exact iterated RLHF."""
    budgets = list(next(iter(next(iter(realised.values())).values())))
    tables = []
    for against in ("same labels", "exact iterated"):
        rows = []
        for structure, of_structure in realised.items():
            for where, of_budgets in of_structure.items():
                for name in next(iter(of_budgets.values())):
                    intervals = [of_budgets[budget][name][against] for budget in budgets]
                    cells = ["{:.0%} [{:.0%}, {:.0%}]".format(*interval) for interval in intervals]
                    rows.append([structure, where, name, *cells])
        labels = [f"{budget} labels" for budget in budgets]
        base = "iterated RLHF at equal labels" if against == "same labels" else "exact iterated RLHF"
        title = f"Fraction of the ceiling realised, over {base} [95% over bandits]"
        tables.append(_table(title, ["structure", "at", "method", *labels], rows))
    return tables


def detail_tables(exact_results: dict) -> list[str]:
    """Returns return, win rate, KL, entropy and collision rate for a few structures; the JSON file has all of them."""
    quantities = ("return", "win rate", "kl", "entropy", "collision")
    names = [*quantities, *(f"{name} at equal KL" for name in ("return", "win rate"))]
    tables = []
    for structure in DETAILED:
        oracle = exact_results[ITERATED][structure]
        rows = [
            [name, *(f"{of[structure][quantity].mean():.3f}" for quantity in names)]
            for name, of in exact_results.items()
        ]
        best = [f"{oracle[f'oracle {name}'].mean():.3f}" for name in ("return", "win rate", "kl")]
        rows.append(["oracle", *best, "", "", *best[:2]])
        tables.append(_table(f"Exact descent in detail: {structure}", ["objective", *names], rows))
    return tables


def page(tables: list[str], *, beta: float, bandits: int, repeats: int, quick: bool) -> str:
    """Returns the study's page: what was run, how to read it, and the tables."""
    descriptions = "\n".join(f"- **{name}**: {structure.description}." for name, structure in structures().items())
    grids = f"{sampled.RATES} for Adam's learning rate, {sampled.RIDGES} labels for the ridge of refitting methods"
    return f"""## 6. Objectives: where coupling pays

{"A quick run, too small for its numbers to count." if quick else "Exact and sampled, at equal labels, beta and KL."}

Bandits of {CONTEXTS} contexts and {ARMS} arms, beta {beta:g}, {bandits} bandits per structure, three starts (flat,
collapsed on the worst arms, the gold reward's best fit). Missed fraction: at equal beta, gap / (J*_gold -
J_gold(reference)) with J_gold = E gold - beta KL; at equal KL, the fraction of the return's gain that is missed when the
trained reward is used at the temperature where its KL is the oracle's. 0 is the optimum, 1 the reference. The worst start
is in brackets where it is worse than the mean by more than 0.02.

Sampled methods start flat. Each label is used once, in batches of {sampled.PAIRS} pairs per context, and the last half of
the iterates is averaged; methods that keep their labels instead refit on all of them in {sampled.ROUNDS} rounds. One
hyperparameter per method, structure and budget is tuned on other bandits, by the sum of both missed fractions: {grids}.
Brier needs two labels per pair, so it has half the pairs. Sampled fractions are means of {repeats} runs per bandit;
intervals are over bandits.

Policy gradient on the label has one parameter per cell, so it is not limited by a misspecified reward; within the reward's
class it is 'utility alone'. The fraction realised is (base - m) / (base - exact m), with m the missed fraction of the
method and base that of iterated RLHF, once at equal labels (the better of its two forms) and once exact; it is given where
the exact gain is above {LARGE:g}. 'Tilts from the gold reward' solves the tilted policies from the hidden reward, which
labels alone cannot do: it is not a fair method but the limit of a noiseless inner problem.

{descriptions}

""" + "\n\n".join([*tables, ""])
