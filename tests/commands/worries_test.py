"""Worrying diagnostics of a run become sentences, at the bounds that the page states."""

import pathlib
import re

import pytest

from jaxrlhf.commands.worries import WORRIES, worries

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
CALM = {"coupling_fraction": 0.5, "ess_fraction": 0.9, "collision_rate": 0.0, "value_gap": -0.01}


def rows(count=20, **later):
    """Steps whose first half is worrying in all, and whose last half is calm but for `later`."""
    first = {"coupling_fraction": 0.99, "ess_fraction": 0.1, "collision_rate": 1.0, "value_gap": -1.0}
    return [{"step": step, **(first if step < count // 2 else CALM | later)} for step in range(count)]


def test_a_calm_end_is_not_worrying():
    assert (
        worries(rows())
        == worries(rows(coupling_fraction=float("nan")))
        == worries([{"step": 1, "loss": 0.5}] * 20)
        == []
    )
    # A trial of a few steps says nothing, and of kept labels the effective sample size means something else.
    assert worries(rows(9, ess_fraction=0.1)) == worries([row | {"age": 3.0} for row in rows(ess_fraction=0.1)]) == []


@pytest.mark.parametrize("worry", WORRIES, ids=lambda worry: worry.field)
def test_a_worrying_end_is_said_with_its_bound_and_the_remedy(worry):
    beyond = worry.bound + (0.05 if worry.above else -0.05)
    (sentence,) = worries(rows(**{worry.field: beyond}))
    assert sentence.startswith(f"{worry.field} was {beyond:.3g} ") and f"{worry.bound:g}: " in sentence
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{worry.field}`"))
    assert f"{'bove' if worry.above else 'elow'} {worry.bound:g}" in row
    assert re.search(r"--[a-z-]+", sentence)
