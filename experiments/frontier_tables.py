"""What `frontier.py` leaves behind: tables, pictures, and all numbers in results.json."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from frontier_harness import Spent
from matplotlib.figure import Figure
from rich.console import Console

from jaxrlhf.evaluation.frontier import at_kl, best_of_n, ideal_gain, over_optimisation, paired_gain, student_interval
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Table, as_markdown, rich_table, write_report
from jaxrlhf.training.run_folder import RunFolder

OURS = "bilevel"


class Found(NamedTuple):
    """One method under one gold reward.

    Attributes:
        history: its evaluations, fields `[R]`, runs with the KL running fastest.
        kls: that the runs were led to.
        spent: by a run.
        seconds: for all runs.
    """

    history: list[dict[str, np.ndarray]]
    kls: tuple[float, ...]
    spent: Spent
    seconds: float

    def field(self, name: str) -> np.ndarray:
        """Returns a field by evaluation, seed and KL, `[E, S, K]`."""
        rows = np.array([row[name] for row in self.history])
        return rows.reshape(len(rows), -1, len(self.kls))


def joined(one: Found, other: Found) -> Found:
    """Returns the runs of both, the KLs of the second behind those of the first; the times are added."""

    def both(first, second):
        parts = [np.reshape(each, (-1, len(found.kls))) for each, found in ((first, one), (second, other))]
        return np.concatenate(parts, axis=1).ravel()

    history = [
        {name: both(first[name], second[name]) for name in first}
        for first, second in zip(one.history, other.history, strict=True)
    ]
    return Found(history, one.kls + other.kls, other.spent, one.seconds + other.seconds)


class Setting(NamedTuple):
    """A gold reward and a size of the learner's.

    Attributes:
        gold, reward: their names.
        found: by method.
        pool_scores: gold rewards of the reference's pool `[openings, pool]`.
        proxies: what a learner's reward says of the pool, `[seeds, openings, pool]`.
    """

    gold: str
    reward: str
    found: dict[str, Found]
    pool_scores: np.ndarray
    proxies: np.ndarray

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.gold} / {self.reward}"


def gains_at(found: Found, target: float) -> np.ndarray:
    """Returns each seed's gain at a KL `[seeds]`, between its runs' ends; NaN where they do not reach as far.

    At the ends alone, so that every gain that is compared has cost the same labels.
    """
    kl, gain = np.maximum(found.field("kl")[-1], 0.0), found.field("gain")[-1]
    return np.array([float(at_kl(*ends, target)) for ends in zip(kl, gain, strict=True)])


def yardsticks(setting: Setting, target: float) -> dict[str, np.ndarray]:
    """Returns gains at a KL of the best of n: by the gold reward, by a learner's (a seed each), and the ideal."""
    base = setting.pool_scores.mean()
    by_gold = best_of_n(setting.pool_scores)
    found = {"best of n, by gold": np.array([float(at_kl(by_gold.kl[1:], by_gold.gold[1:] - base, target))])}
    curves = [best_of_n(setting.pool_scores, proxy) for proxy in setting.proxies]
    found["best of n, by reward"] = np.array([float(at_kl(c.kl[1:], c.gold[1:] - base, target)) for c in curves])
    found["ideal, sqrt(2 KL)"] = np.array([float(ideal_gain(target, spread_of(setting)))])
    return found


def spread_of(setting: Setting) -> float:
    """Returns the root mean square over prompts of the gold reward's standard deviation."""
    return float(np.sqrt(np.mean(np.var(setting.pool_scores, axis=1))))


def interval(values: np.ndarray) -> str:
    """Returns mean and half interval of what was reached, and by how many if not by all."""
    reached = values[np.isfinite(values)]
    if not len(reached):
        return "not reached"
    mean, half = student_interval(reached)
    text = f"{mean:.2f}" if not np.isfinite(half) else f"{mean:.2f} ± {half:.2f}"
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)})"


def frontier_table(settings: list[Setting], target: float) -> Table:
    """Returns gold gains at a KL, a row a method and a column a setting."""
    rows = [
        (name, *(interval(gains_at(setting.found[name], target)) for setting in settings)) for name in settings[0].found
    ]
    sticks = [yardsticks(setting, target) for setting in settings]
    rows += [(name, *(interval(stick[name]) for stick in sticks)) for name in sticks[0]]
    columns = ("method", *(setting.name for setting in settings))
    return Table(f"Gold gain at {target:g} nats, mean and 95% interval over seeds", columns, rows)


def verdict_table(settings: list[Setting], target: float) -> Table | None:
    """Returns how much the bilevel method gains over each other, seed by seed; None where it was not run."""
    if OURS not in settings[0].found:
        return None
    rows = []
    for name in settings[0].found:
        if name == OURS:
            continue
        cells = []
        for setting in settings:
            both = [gains_at(setting.found[each], target) for each in (OURS, name)]
            kept = np.isfinite(both[0]) & np.isfinite(both[1])
            if kept.sum() < 2:
                cells.append("not reached")
                continue
            mean, half = paired_gain(both[0][kept], both[1][kept])
            sign = "+" if mean > half else "-" if mean < -half else "="
            cells.append(f"{sign} {mean:+.2f} ± {half:.2f}")
        rows.append((name, *cells))
    columns = (f"{OURS} less", *(setting.name for setting in settings))
    return Table(f"Paired differences of gold gain at {target:g} nats (+, -: 95% interval leaves out 0)", columns, rows)


def onsets_of(found: Found) -> np.ndarray:
    """Returns the KL at which each seed's gold gain began to fall while its predictor rose on; NaN where none was seen.

    Along the runs that go farthest.
    """
    kl, proxy, gold = (found.field(name)[..., -1] for name in ("kl", "proxy", "gain"))
    if len(kl) < 3:
        return np.full(kl.shape[1], np.nan)
    runs = zip(np.maximum(kl, 0.0).T, proxy.T, gold.T, strict=True)
    return np.array([over_optimisation(*run).onset for run in runs])


def last_table(setting: Setting) -> Table:
    """Returns what else is known of the policies that went farthest: length, win rates, what predicts preferences."""
    rows = []
    for name, found in setting.found.items():
        last = {field: found.field(field)[-1, :, -1].mean() for field in found.history[-1]}
        onsets = onsets_of(found)
        seen = np.isfinite(onsets)
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
                f"{np.mean(onsets[seen]):.1f} ({seen.sum()} of {len(seen)})" if seen.any() else "none seen",
            )
        )
    columns = (
        "method", "KL", "k3", "gain", "win rate", "at equal length", "characters", "predictor ~ length",
        "predictor ~ gold", "calibration error offline", "of its own answers", "accuracy there",
        "onset of over-optimisation (nats)",
    )  # fmt: skip
    return Table(f"{setting.name}: the policies that went farthest", columns, rows)


def spent_table(settings: list[Setting]) -> Table:
    """Returns what each method consumed: the same labels and responses, and its own time."""
    rows = []
    for name in settings[0].found:
        runs = [setting.found[name] for setting in settings]
        first = runs[0].spent
        seconds = " ".join(f"{run.seconds:.0f}" for run in runs)
        rows.append((name, first.labels, first.responses, first.tokens, first.control_tokens, seconds))
    columns = (
        "method",
        "labels a run",
        "responses",
        "their tokens",
        "tokens to measure KL",
        "seconds, all runs, by setting",
    )
    return Table("Spent", columns, rows)


# Ours in full lines, what learns online dashed, what learns offline dotted.
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
    """Draws gold gain against KL, a panel a setting; the bands are the 95% intervals of our methods."""
    columns = min(2, len(settings))
    figure = Figure(figsize=(4.2 * columns + 2.2, 3.3 * -(-len(settings) // columns)), layout="constrained")
    lines: dict[str, Any] = {}
    for number, setting in enumerate(settings):
        axes = figure.add_subplot(-(-len(settings) // columns), columns, number + 1)
        farthest, highest = 0.0, 0.0
        for name, found in setting.found.items():
            ends, gain = np.maximum(found.field("kl")[-1].mean(axis=0), 0.0), found.field("gain")[-1]
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
        axes.set(
            title=setting.name, xlabel="KL to the reference (nats)", ylabel="gold gain", ylim=(-0.1, 1.35 * highest)
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw(folder: pathlib.Path, settings: list[Setting]) -> list[str]:
    """Draws gain against KL, and calibration over labels; returns the files' names."""
    calibration = {}
    for setting in settings:
        calibration[setting.name] = (
            "labels",
            "calibration error on its own answers",
            {
                name: (
                    list(found.field("labels")[:, 0, -1]),
                    list(found.field("fresh_calibration")[..., -1].mean(axis=1)),
                )
                for name, found in setting.found.items()
            },
        )
    draw_frontier(folder / "frontier.png", settings)
    draw_curves(folder / "calibration.png", calibration)
    return ["frontier.png", "calibration.png"]


def report(folder: RunFolder, config: Any, settings: list[Setting], seconds: float, console: Console) -> None:
    """Writes tables, figures, numbers and report.html, and prints the tables that compare."""
    tables = []
    for target in config.at:
        tables += [table for table in (frontier_table(settings, target), verdict_table(settings, target)) if table]
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
                        name: {"history": found.history, "spent": found.spent, "seconds": found.seconds}
                        | {"gain_at": {f"{target:g}": gains_at(found, target) for target in config.at}}
                        for name, found in setting.found.items()
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
