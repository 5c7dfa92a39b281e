"""Preferences: how annotators choose, what the upper level minimises, and a buffer of labelled pairs.

By module: `choice` (label probabilities), `annotators` (traceable annotators), `objectives` (upper costs per pair) and
`buffer` (labelled pairs kept on the device). The names of the first two are importable from here.
"""

from jaxrlhf.preferences.annotators import (
    Annotator,
    Score,
    counted_annotator,
    expected_annotator,
    from_both_sides,
    gold_annotator,
    myopic,
)
from jaxrlhf.preferences.choice import BRADLEY_TERRY, Choice, draw_labels, log_outcomes, preference

__all__ = [
    "BRADLEY_TERRY",
    "Annotator",
    "Choice",
    "Score",
    "counted_annotator",
    "draw_labels",
    "expected_annotator",
    "from_both_sides",
    "gold_annotator",
    "log_outcomes",
    "myopic",
    "preference",
]
