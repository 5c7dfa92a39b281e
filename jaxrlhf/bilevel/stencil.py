"""Finite-difference stencils for a derivative at zero.

The upper objective is a derivative, Phi(phi) = dv/ds at s = 0, of the perturbed value
v(phi, s) = min_lambda [s G(phi, lambda) - J(phi, lambda)] (Danskin; arXiv 2309.01753). A stencil estimates it
by `sum_i c_i v(phi, s_i)` with `s_i = offsets[i] sigma` and `c_i = coefficients[i] / sigma`. The tilt 0 is always the
first: it is the policy that samples, is reported and is deployed, even where its coefficient is 0.
"""

from typing import NamedTuple

import jax

Index = int | jax.Array
"""An iterate's place in its stencil."""


class Stencil(NamedTuple):
    """The tilts at which the perturbed value is evaluated, and the coefficients that combine the values.

    Attributes:
        offsets: tilts in units of sigma; the first is 0.
        coefficients: in units of 1 / sigma; they sum to 0, and `sum_i coefficients[i] offsets[i] = 1` (but for `ALONE`).
        order: the error in Phi and in its gradient is O(sigma^order).
    """

    offsets: tuple[float, ...]
    coefficients: tuple[float, ...]
    order: int


FORWARD = Stencil((0.0, 1.0), (-1.0, 1.0), order=1)
"""One-sided difference, the estimator of arXiv 2410.15610 and arXiv 2309.01753."""

CENTRAL = Stencil((0.0, 1.0, -1.0), (0.0, 1 / 2, -1 / 2), order=2)
"""Two-sided difference."""

FIVE_POINT = Stencil((0.0, 1.0, -1.0, 2.0, -2.0), (0.0, 2 / 3, -2 / 3, -1 / 12, 1 / 12), order=4)
"""Two-sided difference with the cubic error removed."""

ALONE = Stencil((0.0,), (0.0,), order=0)
"""The tilt 0 by itself, for rules that need no second policy."""
