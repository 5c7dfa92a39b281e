"""The output of `frontier.py`: tables, figures, and all numbers in results.json."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from frontier_harness import Spent
from matplotlib.figure import Figure
from rich.console import Console

from jaxrlhf.evaluation.frontier import at_kl, best_of_n, ideal_gain, over_optimisation
from jaxrlhf.evaluation.statistics import paired_gain, student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table, as_markdown, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

OURS = "bilevel"


class Runs(NamedTuple):
    """All runs of one method under one gold reward.

    Attributes:
        history: evaluations, fields `[R]`; the KL varies fastest over the runs.
        kls: target KLs of the runs.
        spent: by one run.
        seconds: for all runs.
    """

    history: list[dict[str, np.ndarray]]
    kls: tuple[float, ...]
    spent: Spent
    seconds: float

    def field(self, name: str) -> np.ndarray:
        """Returns a field of the history as `[E, S, K]`: evaluations, seeds, KLs."""
        rows = np.array([row[name] for row in self.history])
        return rows.reshape(len(rows), -1, len(self.kls))


def joined(earlier: Runs, later: Runs) -> Runs:
    """Returns both sets of runs as one, the later KLs after the earlier ones; the times are added."""

    def both(first, second):
        columns = [np.reshape(each, (-1, len(runs.kls))) for each, runs in ((first, earlier), (second, later))]
        return np.concatenate(columns, axis=1).ravel()

    history = [
        {name: both(first[name], second[name]) for name in first}
        for first, second in zip(earlier.history, later.history, strict=True)
    ]
    return Runs(history, earlier.kls + later.kls, later.spent, earlier.seconds + later.seconds)


class Setting(NamedTuple):
    """The results under one gold reward and one size of the learner's reward.

    Attributes:
        gold, reward: their names.
        runs: by method.
        pool_scores: gold rewards of the reference's pool `[openings, pool]`.
        proxies: a learned reward's scores of the pool, `[seeds, openings, pool]`.
    """

    gold: str
    reward: str
    runs: dict[str, Runs]
    pool_scores: np.ndarray
    proxies: np.ndarray

    @property
    def name(self) -> str:
        """The setting's name in tables."""
        return f"{self.gold} / {self.reward}"


def gains_at(runs: Runs, target: float) -> np.ndarray:
    """Returns each seed's gain at a KL `[seeds]`, interpolated between its runs' ends; NaN beyond them.

    Only the ends are used, so that all compared gains have cost the same labels.
    """
    kl, gain = np.maximum(runs.field("kl")[-1], 0.0), runs.field("gain")[-1]
    return np.array([float(at_kl(*ends, target)) for ends in zip(kl, gain, strict=True)])


def yardsticks(setting: Setting, target: float) -> dict[str, np.ndarray]:
    """Returns gains at a KL to compare with: best-of-n by the gold reward, by a learned one (per seed), and the ideal."""
    base = setting.pool_scores.mean()
    by_gold = best_of_n(setting.pool_scores)
    gains = {"best of n, by gold": np.array([float(at_kl(by_gold.kl[1:], by_gold.gold[1:] - base, target))])}
    curves = [best_of_n(setting.pool_scores, proxy) for proxy in setting.proxies]
    gains["best of n, by reward"] = np.array([float(at_kl(c.kl[1:], c.gold[1:] - base, target)) for c in curves])
    gains["ideal, sqrt(2 KL)"] = np.array([float(ideal_gain(target, spread_of(setting)))])
    return gains


def spread_of(setting: Setting) -> float:
    """Returns the root mean square over prompts of the gold reward's standard deviation."""
    return float(np.sqrt(np.mean(np.var(setting.pool_scores, axis=1))))


def interval(values: np.ndarray) -> str:
    """Returns mean and half interval over the seeds that reached the KL, and their number if it is not all."""
    reached = values[np.isfinite(values)]
    if not len(reached):
        return "not reached"
    mean, half = student_interval(reached)
    text = f"{mean:.2f}" if not np.isfinite(half) else f"{mean:.2f} ± {half:.2f}"
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)})"


def frontier_table(settings: list[Setting], target: float) -> Table:
    """Returns gold gains at a KL, one row per method and one column per setting."""
    rows = [
        (name, *(interval(gains_at(setting.runs[name], target)) for setting in settings)) for name in settings[0].runs
    ]
    comparisons = [yardsticks(setting, target) for setting in settings]
    rows += [(name, *(interval(gains[name]) for gains in comparisons)) for name in comparisons[0]]
    columns = ("method", *(setting.name for setting in settings))
    return Table(f"Gold gain at {target:g} nats, mean and 95% interval over seeds", columns, rows)


def paired_table(settings: list[Setting], target: float) -> Table | None:
    """Returns the paired gain of the bilevel method over each other method; None if bilevel was not run."""
    if OURS not in settings[0].runs:
        return None
    rows = []
    for name in settings[0].runs:
        if name == OURS:
            continue
        cells = []
        for setting in settings:
            ours, theirs = (gains_at(setting.runs[each], target) for each in (OURS, name))
            reached = np.isfinite(ours) & np.isfinite(theirs)
            if reached.sum() < 2:
                cells.append("not reached")
                continue
            mean, half = paired_gain(ours[reached], theirs[reached])
            sign = "+" if mean > half else "-" if mean < -half else "="
            cells.append(f"{sign} {mean:+.2f} ± {half:.2f}")
        rows.append((name, *cells))
    columns = (f"{OURS} minus", *(setting.name for setting in settings))
    return Table(
        f"Paired differences of gold gain at {target:g} nats (+, -: the 95% interval excludes 0)", columns, rows
    )


def onsets_of(runs: Runs) -> np.ndarray:
    """Returns the KL at which each seed's gold gain starts to fall while its proxy still rises; NaN where it never does.

    Taken along the runs with the largest target KL.
    """
    kl, proxy, gold = (runs.field(name)[..., -1] for name in ("kl", "proxy", "gain"))
    if len(kl) < 3:
        return np.full(kl.shape[1], np.nan)
    seeds = zip(np.maximum(kl, 0.0).T, proxy.T, gold.T, strict=True)
    return np.array([over_optimisation(*of_seed).onset for of_seed in seeds])


def last_table(setting: Setting) -> Table:
    """Returns the other measurements of the policies at the largest KL: length, win rates, preference predictor."""
    rows = []
    for name, runs in setting.runs.items():
        last = {field: runs.field(field)[-1, :, -1].mean() for field in runs.history[-1]}
        onsets = onsets_of(runs)
        found = np.isfinite(onsets)
        rows.append(
            (
                name,
                *(f"{last[field]:.2f}" for field in ("kl", "kl_k3", "gain", "win_rate", "controlled_win_rate")),
                f"{last['length']:.1f}",
                *(
                    f"{last[field]:.2f}"
                    for field in (
                        "proxy_length_correlation",
                        "proxy_gold_correlation",
                        "offline_calibration",
                        "fresh_calibration",
                        "fresh_accuracy",
                    )
                ),
                f"{np.mean(onsets[found]):.1f} ({found.sum()} of {len(found)})" if found.any() else "none",
            )
        )
    columns = (
        "method", "KL", "k3", "gain", "win rate", "at equal length", "characters", "predictor ~ length",
        "predictor ~ gold", "calibration error offline", "on its own responses", "accuracy there",
        "onset of over-optimisation (nats)",
    )  # fmt: skip
    return Table(f"{setting.name}: the policies at the largest KL", columns, rows)


def spent_table(settings: list[Setting]) -> Table:
    """Returns what each method consumed: labels and responses, which are equal for all, and time."""
    rows = []
    for name in settings[0].runs:
        runs = [setting.runs[name] for setting in settings]
        first = runs[0].spent
        seconds = " ".join(f"{run.seconds:.0f}" for run in runs)
        rows.append((name, first.labels, first.responses, first.tokens, first.control_tokens, seconds))
    columns = (
        "method",
        "labels per run",
        "responses",
        "their tokens",
        "tokens to measure KL",
        "seconds, all runs, by setting",
    )
    return Table("Spent", columns, rows)


# Ours are drawn solid, other online methods dashed, offline ones dotted.
STYLES: dict[str, dict[str, Any]] = {
    "bilevel": {"color": "#c0392b", "linewidth": 2.4},
    "implicit bilevel": {"color": "#0b6e99", "linewidth": 2.4},
    "online DPO": {"color": "#448361", "linestyle": "--"},
    "SAIL": {"color": "#9065b0", "linestyle": "--"},
    "label gradient": {"color": "#64473a", "linestyle": "--"},
    "RLOO": {"color": "#d9730d", "linestyle": "--"},
    "PPO": {"color": "#c14c8a", "linestyle": "--"},
    "GRPO": {"color": "#1f1f1f", "linestyle": "--"},
    "offline DPO": {"color": "#448361", "linestyle": ":"},
    "offline IPO": {"color": "#d9730d", "linestyle": ":"},
    "offline SimPO": {"color": "#9065b0", "linestyle": ":"},
}


def draw_frontier(path: pathlib.Path, settings: list[Setting]) -> None:
    """Draws gold gain against KL, one panel per setting; the bands are the 95% intervals of our methods."""
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(4.2 * columns + 2.2, 3.3 * rows), layout="constrained")
    lines: dict[str, Any] = {}
    for number, setting in enumerate(settings):
        lines |= draw_setting(figure.add_subplot(rows, columns, number + 1), setting)
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_setting(axes: Any, setting: Setting) -> dict[str, Any]:
    """Draws one panel of the frontier; returns its lines by name."""
    lines: dict[str, Any] = {}
    farthest, highest = 0.0, 0.0
    for name, runs in setting.runs.items():
        ends, gain = np.maximum(runs.field("kl")[-1].mean(axis=0), 0.0), runs.field("gain")[-1]
        order = np.argsort(ends)
        kl, mean = np.array([0, *ends[order]]), np.array([0, *gain.mean(axis=0)[order]])
        half = np.array([0, *np.nan_to_num([student_interval(each)[1] for each in gain.T])[order]])
        style: dict[str, Any] = {"linewidth": 1.2} | STYLES.get(name, {})
        lines[name] = axes.plot(kl, mean, marker="o", markersize=3, **style)[0]
        if name.endswith(OURS):
            axes.fill_between(kl, mean - half, mean + half, color=style.get("color"), alpha=0.12, linewidth=0)
        farthest, highest = max(farthest, kl.max()), max(highest, mean.max())
    best, grid = best_of_n(setting.pool_scores), np.linspace(0, farthest, 40)
    kept = best.kl <= farthest
    gold = best.gold[kept] - setting.pool_scores.mean()
    lines["best of n, by gold"] = axes.plot(best.kl[kept], gold, color="0.45", linewidth=1)[0]
    ideal = ideal_gain(grid, spread_of(setting))
    lines["sqrt(2 KL) x spread"] = axes.plot(grid, ideal, color="0.7", linewidth=1)[0]
    axes.set(title=setting.name, xlabel="KL to the reference (nats)", ylabel="gold gain", ylim=(-0.1, 1.35 * highest))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def draw(folder: pathlib.Path, settings: list[Setting]) -> list[str]:
    """Draws gain against KL, and calibration over labels; returns the files' names."""
    calibration = {}
    for setting in settings:
        lines = {
            name: (
                list(runs.field("labels")[:, 0, -1]),
                list(runs.field("fresh_calibration")[..., -1].mean(axis=1)),
            )
            for name, runs in setting.runs.items()
        }
        calibration[setting.name] = ("labels", "calibration error on its own responses", lines)
    draw_frontier(folder / "frontier.png", settings)
    draw_curves(folder / "calibration.png", calibration)
    return ["frontier.png", "calibration.png"]


def report(folder: RunFolder, config: Any, settings: list[Setting], seconds: float, console: Console) -> None:
    """Writes tables, figures, numbers and report.html, and prints the tables that compare the methods."""
    tables = []
    for target in config.at:
        tables += [table for table in (frontier_table(settings, target), paired_table(settings, target)) if table]
    tables += [spent_table(settings)] + [last_table(setting) for setting in settings]
    figures = draw(folder.path, settings)
    folder.write_json(
        "results.json",
        {
            "seconds": seconds,
            "config": config,
            "settings": {
                setting.name: {
                    "spread": spread_of(setting),
                    "yardsticks": {f"{target:g}": yardsticks(setting, target) for target in config.at},
                    "methods": {
                        name: {"history": runs.history, "spent": runs.spent, "seconds": runs.seconds}
                        | {"gain_at": {f"{target:g}": gains_at(runs, target) for target in config.at}}
                        for name, runs in setting.runs.items()
                    },
                }
                for setting in settings
            },
        },
    )
    folder.write_text("tables.md", "\n".join(map(as_markdown, tables)))
    write_report(
        folder.path,
        title="Gold reward against KL",
        summary=f"{config.seeds} seeds, {seconds / 60:.1f} minutes.",
        tables=tables,
        figures=figures,
        config=config,
    )
    for table in tables[: 2 * len(config.at) + 1]:
        console.print(rich_table(table))
    console.print(f"{seconds / 60:.1f} minutes. Report, tables, figures and all numbers are in:")
    console.print(str(folder.path), soft_wrap=True)
