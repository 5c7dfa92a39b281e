"""Figures of a run, drawn without a display (matplotlib's object-oriented API, imported when the first one is drawn)."""

import pathlib

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#64473a")
STYLES = ("-", "--", ":", "-.")
"""Of lines, one for each round of the colours."""
MOST_LINES = len(COLOURS) * len(STYLES)
"""Lines of a panel that can be told apart."""


def draw_curves(
    path: pathlib.Path, panels: dict[str, tuple[str, str, dict[str, tuple[list, ...]]]], *, columns: int = 2
) -> None:
    """Draws one panel per entry into one file.

    Args:
        path: a .png or .svg file.
        panels: title -> (x label, y label, {line's name: (xs, ys)}), or (xs, ys, lower, upper) for a line with a band; a
            None or NaN in ys leaves a gap.
        columns: panels per row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * min(columns, len(panels)), 3.3 * rows), layout="constrained")
    for number, (title, (x_label, y_label, lines)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, min(columns, len(panels)), number + 1)
        for index, (name, (xs, ys, *band)) in enumerate(lines.items()):
            colour = COLOURS[index % len(COLOURS)]
            style = STYLES[index // len(COLOURS) % len(STYLES)]
            axes.plot(xs, ys, style, label=_literal(name), color=colour, marker="o", markersize=2.5, linewidth=1.5)
            if band:
                axes.fill_between(xs, band[0], band[1], color=colour, alpha=0.15, linewidth=0)
        axes.set(title=_literal(title), xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _literal(text: str) -> str:
    """Returns a text that matplotlib neither sets as a formula nor, where it begins with "_", leaves out of the legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
