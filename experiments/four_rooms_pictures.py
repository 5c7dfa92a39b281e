"""Figures of the Four-Rooms study."""

import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import tabular
from jaxrlhf.training.figures import COLOURS


def visits(charges: jax.Array, coefficients: rooms.Coefficients, environment: rooms.FourRooms) -> np.ndarray:
    """Returns the follower's discounted state visits under the charges `[S]`, mean over goals, `[S]`."""

    def of_goal(data, frozen):
        reward = frozen.goal - (1.0 - frozen.goal) * charges
        reward = jax.numpy.broadcast_to(reward[:, None], (len(rooms.CELLS), len(rooms.MOVES)))
        policy = tabular.soft_policy_iteration(reward, frozen.mdp, data.entropy_weight).log_policy
        return data.weight * tabular.occupancy(policy, frozen.mdp)

    return np.asarray(jax.vmap(of_goal)(coefficients, environment).sum(axis=0))


def draw_rooms(
    path: pathlib.Path, upper: jax.Array, coefficients: rooms.Coefficients, environment: rooms.FourRooms
) -> None:
    """Draws the charges, and the follower's visits without and with them."""
    charges = rooms.charges(upper)
    before, after = (visits(table, coefficients, environment) for table in (0.0 * charges, charges))
    panels = {
        "charges of the leader": (np.asarray(charges), "Oranges"),
        "visits without charges": (before, "Blues"),
        "visits with charges": (after, "Blues"),
    }
    largest = max(before.max(), after.max())
    figure = Figure(figsize=(12.0, 4.1), layout="constrained")
    for axes, (title, (table, colours)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        top = largest if colours == "Blues" else None
        picture = axes.imshow(rooms.on_grid(table), cmap=colours, vmin=0.0, vmax=top)
        axes.set_facecolor("#444444")
        for (row, column), letter in {rooms.START: "S", rooms.TARGET: "T", **dict.fromkeys(rooms.GOALS, "G")}.items():
            axes.text(column, row, letter, ha="center", va="center", fontsize=9, fontweight="bold")
        axes.set(title=title, xticks=[], yticks=[])
        figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


def draw_curves_of(path: pathlib.Path, curves: dict[str, np.ndarray]) -> None:
    """Draws the leader's return along each run's best descent, `[seeds, steps]`: mean and standard error."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        fraction = np.linspace(0.0, 1.0, curve.shape[1])
        mean, error = curve.mean(axis=0), curve.std(axis=0) / np.sqrt(len(curve))
        axes.plot(fraction, mean, color=colour, label=name, linewidth=1.4)
        axes.fill_between(fraction, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="fraction of the descent", ylabel="leader's return at the step's entropy and regulariser")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
