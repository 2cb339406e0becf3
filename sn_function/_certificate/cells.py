"""Cells of frequencies, which are split into halves along all axes.

Of a cell with the center c the largest ``sum_a D_a |w_a - c_a|`` counts, for
degrees D.  In two dimensions with equal degrees that of a diamond is as large
as that of a square of half its area, so cells are diamonds there, else boxes.
Both are the ``c + 2^-level B s`` of all ``|s_a| <= 1``.  Those of level 0 have
a sum of ``pi / 2``, and cover one half of the frequencies: the norm of a
symbol is the same at -w.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

from sn_function._certificate.proofs import EPS

# What rounding may add to coordinates, which are below 10.
ROUNDING = 128 * EPS


class Cells:
    """The cells for a symbol.

    Args:
        degrees: Degrees of the symbol along each axis, 1 or more.

    """

    def __init__(self, degrees: Any) -> None:
        d = len(degrees)
        self._degrees = degrees
        if d == 2 and degrees[0] == degrees[1]:
            # w_1 + w_2 from 0 to 4 pi, and w_1 - w_2 from 0 to pi.
            D = int(degrees[0])
            self._basis = numpy.array([[1, 1], [1, -1]]) * (math.pi / 4 / D)
            self._axes = [range(1, 8 * D, 2), range(1, 2 * D, 2)]
        else:
            counts = [2 * d * int(D) for D in degrees]
            self._basis = numpy.diag([math.pi / N for N in counts])
            self._axes = [range(1 - N, N, 2) for N in counts]
            self._axes[0] = range(1, counts[0], 2)
        self._corners = 2 * numpy.indices((2,) * d).reshape(d, -1).T - 1

    def first(self) -> Any:
        """Returns the centers of level 0, shape ``(N, d)``."""
        s = numpy.stack(numpy.meshgrid(*self._axes, indexing='ij'), axis=-1)
        return s.reshape(-1, len(self._axes)) @ self._basis.T

    def split(self, level: int, w: Any) -> Any:
        """Returns the centers of the parts of cells with the centers w."""
        steps = self._corners @ self._basis.T / 2 ** (level + 1)
        return (w[:, None] + steps).reshape(-1, w.shape[1])

    def radius(self, level: int) -> float:
        """Returns the largest ``sum_a D_a |w_a - c_a|``."""
        steps = abs(self._corners @ self._basis.T) / 2 ** level
        return float(((steps + ROUNDING) @ self._degrees).max())

    def reach(self, level: int, t: Any) -> Any:
        """Returns the largest ``|<t, w - c>|`` for each row of ``t``."""
        return (abs(t @ self._basis).sum(axis=1) / 2 ** level
                + ROUNDING * abs(t).sum(axis=1))
