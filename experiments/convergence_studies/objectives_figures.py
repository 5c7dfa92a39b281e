"""The study's figures."""

import pathlib

import numpy as np
from convergence_studies.objectives_exact import DEFAULT
from convergence_studies.objectives_numbers import WHERE
from convergence_studies.objectives_sampled import KEPT_DEFAULT
from matplotlib.figure import Figure

from jaxrlhf.training.figures import COLOURS, draw_curves


def draw_map(path: pathlib.Path, ceilings: dict, gains: dict) -> None:
    """Draws the gain over iterated RLHF by structure: exact, and from labels at equal labels."""
    budgets = list(next(iter(gains.values()))["equal beta"])
    last = gains["realisable"]["equal beta"][budgets[-1]]
    drawn = [(budgets[-1], name) for name in last] + [(budgets[len(budgets) // 2], KEPT_DEFAULT)]
    figure = Figure(figsize=(12.5, 7.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    positions = np.arange(len(ceilings))[::-1]
    for axes, where in zip(panels, WHERE.values(), strict=True):
        bars = {"exact (the ceiling)": [of[where][DEFAULT] for of in ceilings.values()]}
        for budget, name in drawn:
            kept = "labels kept" if name == KEPT_DEFAULT else "each label used once"
            bars[f"{budget} labels, {kept}"] = [of[where][budget][name] for of in gains.values()]
        for number, (label, intervals) in enumerate(bars.items()):
            middle, low, high = np.asarray(intervals).T
            # Rounding may put the mean outside its bootstrap interval.
            spread = np.maximum([middle - low, high - middle], 0.0)
            shift = 0.3 - 0.2 * number
            colour = COLOURS[number]
            axes.barh(
                positions + shift, middle, 0.19, label=label, color=colour, xerr=spread, error_kw={"elinewidth": 0.8}
            )
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set(title=where, xlabel="gain over iterated RLHF at equal labels, as a fraction of the achievable gain")
        axes.set_yticks(positions, list(ceilings))
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Gain from coupling: {DEFAULT}")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=130)


def draw_loopholes(path: pathlib.Path, traces: dict) -> None:
    """Draws true return against the objective's own value along the descent, mean over realisable bandits."""
    steps = next(iter(next(iter(traces.values())).values()))[0].shape[-1]
    shown = np.unique(np.geomspace(1, steps, 40).astype(int)) - 1
    panels = {}
    for name, of in traces.items():
        lines = {
            f"from {start}": tuple(part.mean(axis=0)[shown].tolist() for part in parts) for start, parts in of.items()
        }
        panels[name] = ("objective's own value minus the gold reward's", "return, fraction of the oracle's gain", lines)
    draw_curves(path, panels, columns=2)
