"""The run on the language of replies: trains the methods on both golds, writes results, samples, picture and report."""

import dataclasses
import pathlib
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from price_methods import Runs, Training, train
from price_task import GOLDS, REFERENCE_UTILITY, Replies, best_in_class, draw_replies, make_replies, optimum
from rich.console import Console

from jaxrlhf.evaluation.statistics import student_interval
from jaxrlhf.training.figures import COLOURS
from jaxrlhf.training.report import Samples, Table, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

TITLES = {
    "checklist": "Gold is a checklist: no reward of the class equals it",
    "weighted": "Control: the reward can equal the gold",
}
LABELS = {"bilevel": "bilevel, scale learned", "decoupled": "iterated RLHF", "fixed_scale": "bilevel, scale fixed"}


@dataclasses.dataclass(frozen=True)
class RepliesSettings:
    """What is run, every default filled in; the options are explained in `online_rlhf.py`."""

    methods: tuple[str, ...]
    betas: tuple[float, ...]
    seed: int
    seeds: int
    kl_price: float
    steps: int
    pairs: int
    utility_weight: float
    scale_learning_rate: float
    reward_learning_rate: dict[str, float]

    def training(self, method: str) -> Training:
        """Returns what all runs of a method share."""
        return Training(
            self.kl_price,
            self.steps,
            self.pairs,
            self.utility_weight,
            self.reward_learning_rate[method],
            self.scale_learning_rate,
        )


class Panel(NamedTuple):
    """One gold reward: the language, what is best, and each method's runs."""

    replies: Replies
    optimum: float
    best_in_class: float
    runs: dict[str, Runs]

    def gain(self, utility: np.ndarray) -> np.ndarray:
        """Returns utilities as a share of the way from the reference to the best in class."""
        return (utility - REFERENCE_UTILITY) / (self.best_in_class - REFERENCE_UTILITY)


def measure(settings: RepliesSettings, gold: str, console: Console) -> Panel:
    """Trains every method on one gold reward."""
    replies = make_replies(gold)
    best, _ = best_in_class(replies, settings.kl_price)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs = {}
    for method in settings.methods:
        console.print(f"{gold}: {LABELS[method]}, {len(settings.betas)} betas x {settings.seeds} seeds")
        runs[method] = train(method, replies, settings.betas, seeds, settings.training(method))
    return Panel(replies, optimum(replies, settings.kl_price), best, runs)


def results_of(settings: RepliesSettings, panel: Panel) -> dict[str, Any]:
    """Returns a panel as `results.json` holds it."""

    def of_beta(runs: Runs, row: int) -> dict[str, Any]:
        names = ("utility", "win_rate", "kl", "log_scale")
        return {name: getattr(runs, name)[row] for name in names} | {"labels": runs.labels}

    return {
        "kl_price": settings.kl_price,
        "seeds": settings.seeds,
        "reference": REFERENCE_UTILITY,
        "optimum": panel.optimum,
        "best_in_class": panel.best_in_class,
        "methods": {
            method: {f"{beta:g}": of_beta(runs, row) for row, beta in enumerate(settings.betas)}
            for method, runs in panel.runs.items()
        },
    }


def interval(values: np.ndarray) -> str:
    """Returns the mean over seeds and its 95% interval's half-width, in text."""
    mean, half_width = student_interval(values)
    return f"{mean:.3f}" if np.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"


def tabulate(settings: RepliesSettings, gold: str, panel: Panel) -> Table:
    """Returns one row per method and beta."""
    rows = [
        (
            LABELS[method],
            f"{beta:g}",
            interval(runs.utility[row]),
            f"{100 * panel.gain(runs.utility[row]).mean():.1f}%",
            f"{100 * panel.gain(runs.utility[row]).min():.1f}%",
            interval(runs.win_rate[row]),
            interval(runs.kl[row]),
        )
        for method, runs in panel.runs.items()
        for row, beta in enumerate(settings.betas)
    ]
    columns = ("method", "beta", "utility", "share of gain", "worst seed", "win rate", "KL")
    title = f"{TITLES[gold]} (optimum {panel.optimum:.3f}, best in class {panel.best_in_class:.3f}, reference 0.500)"
    return Table(title, columns, rows)


def summarise(settings: RepliesSettings, gold: str, panel: Panel) -> str:
    """Returns one sentence per method: its best and its worst beta."""
    sentences = []
    for method, runs in panel.runs.items():
        share = 100 * panel.gain(runs.utility)
        best, worst = share.mean(axis=1).argmax(), share.mean(axis=1).argmin()
        sentences.append(
            f"{LABELS[method]}: {share[best].mean():.1f}% at its best beta ({settings.betas[best]:g}), "
            f"{share[worst].mean():.1f}% at its worst ({settings.betas[worst]:g}), {share.min():.1f}% in its worst run."
        )
    return f"{TITLES[gold]}. Of the gain from the reference to the best in class: " + " ".join(sentences)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean, the least and the largest over the seeds, the second axis of `[points, seeds]`."""
    return values.mean(axis=1), values.min(axis=1), values.max(axis=1)


def draw(path: pathlib.Path, settings: RepliesSettings, panels: dict[str, Panel]) -> None:
    """Draws utility against the beta that was set, for both golds, and against labels for the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 4.0), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (gold, panel) in zip(axes, panels.items(), strict=False):
        draw_sweep(axis, settings, panel)
        axis.set(title=TITLES[gold], xlabel="beta that was set")
    draw_labels(axes[2], settings, panels[GOLDS[0]])
    axes[2].set(title="Checklist: utility over labels", xlabel="labels")
    for axis, gold in zip(axes, (*GOLDS, GOLDS[0]), strict=True):
        lines = (
            ("optimum of any policy", panels[gold].optimum, "-"),
            ("best in class", panels[gold].best_in_class, "--"),
        )
        for name, height, style in (*lines, ("reference", REFERENCE_UTILITY, ":")):
            axis.axhline(height, color="#555555", linewidth=0.9, linestyle=style, label=name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    axes[0].set(ylabel=f"utility: win rate - {settings.kl_price:g} KL", ylim=(0.45, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_sweep(axis: Any, settings: RepliesSettings, panel: Panel) -> None:
    """Draws each method's utility against beta: the mean, and a band over all seeds."""
    for colour, (method, runs) in zip(COLOURS, panel.runs.items(), strict=False):
        mean, low, high = band(runs.utility)
        axis.plot(settings.betas, mean, color=colour, marker="o", markersize=3, label=LABELS[method])
        axis.fill_between(settings.betas, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log")
    named = [beta for last, beta in zip((0.0, *settings.betas), settings.betas, strict=False) if beta > 1.4 * last]
    axis.set_xticks(named, [f"{beta:g}" for beta in named])  # close neighbours would overlap
    axis.minorticks_off()


def draw_labels(axis: Any, settings: RepliesSettings, panel: Panel) -> None:
    """Draws each method's utility against labels, at the first, the middle and the last beta."""
    chosen = list(dict.fromkeys((0, len(settings.betas) // 2, len(settings.betas) - 1)))
    for colour, runs in zip(COLOURS, panel.runs.values(), strict=False):
        labels = np.linspace(0, runs.labels, settings.steps + 1)
        for style, row in zip(("-", "--", ":"), chosen, strict=False):
            mean, low, high = band(runs.curve[row].T)
            axis.plot(labels, mean, style, color=colour, label=f"beta {settings.betas[row]:g}")
            axis.fill_between(labels, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.legend(handles=axis.get_lines()[: len(chosen)], frameon=False, fontsize=9, loc="center right")


def samples_of(settings: RepliesSettings, panel: Panel) -> dict[str, list[tuple[str, str]]]:
    """Returns (request, reply) drawn before and after: the first seed, at the smallest and at the largest beta."""
    samples = {"before": draw_replies(panel.replies.frozen.reference, panel.replies)}
    betas = np.array(settings.betas)
    for method, runs in panel.runs.items():
        for row in dict.fromkeys((int(betas.argmin()), int(betas.argmax()))):
            name = f"{LABELS[method]}, beta {betas[row]:g}"
            samples[name] = draw_replies(runs.log_policy[row, 0], panel.replies)
    return samples


def write(folder: RunFolder, settings: RepliesSettings, panels: dict[str, Panel], seconds: float, console: Console):
    """Writes the run's folder and prints its tables."""
    main, control = (panels[gold] for gold in GOLDS)
    results = results_of(settings, main) | {"control": results_of(settings, control)}
    folder.write_json("results.json", results | {"seconds": seconds, "seed": settings.seed, "config": settings})
    for gold, panel in panels.items():
        for method, runs in panel.runs.items():
            for row, beta in enumerate(settings.betas):
                for step in dict.fromkeys(np.linspace(0, settings.steps, 21).astype(int).tolist()):
                    utility = runs.curve[row, :, step]
                    labels = step * runs.labels // settings.steps
                    folder.append_metrics(
                        gold=gold, method=method, beta=beta, step=step, labels=labels, utility=utility
                    )
    samples = samples_of(settings, main)
    lines = [line for name, rows in samples.items() for line in (f"## {name}", *(f"[{a}] {b}" for a, b in rows), "")]
    folder.write_text("samples.txt", "\n".join(lines))
    draw(folder.path / "curves.png", settings, panels)
    tables = [tabulate(settings, gold, panel) for gold, panel in panels.items()]
    summaries = [summarise(settings, gold, panel) for gold, panel in panels.items()]
    requests = [request for request, _ in samples["before"]]
    texts = zip(*([text for _, text in rows] for rows in samples.values()), strict=True)
    write_report(
        folder.path,
        title="State a price: online RLHF as one bilevel problem",
        summary="\n\n".join([*summaries, f"{main.runs[settings.methods[0]].labels} labels a run; {seconds:.0f} s."]),
        tables=tables,
        figures=["curves.png"],
        config=settings,
        samples=[Samples("Replies", tuple(samples), list(zip(requests, texts, strict=True)))],
        notes=[
            "Utility is the win rate against the reference less kl_price times the KL: what was asked for.",
            "The lower level is solved in closed form and every figure is exact; labels are drawn.",
            "Intervals of the tables are 95% over seeds; bands of the figure span all seeds.",
        ],
    )
    for table, summary in zip(tables, summaries, strict=True):
        console.print(rich_table(table))
        console.print(summary)
    console.print(f"{seconds:.0f} s. Report, config, metrics, results, samples and the figure are in:")
    console.print(str(folder.path), soft_wrap=True)


def main(settings: RepliesSettings, output: pathlib.Path) -> None:
    """Runs every method on both golds and reports."""
    console, began = Console(), time.monotonic()
    try:
        folder = RunFolder(output, "online_rlhf")
    except ValueError as error:
        print(f"online_rlhf: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    folder.write_json("config.json", settings)
    panels = {gold: measure(settings, gold, console) for gold in GOLDS}
    write(folder, settings, panels, time.monotonic() - began, console)
