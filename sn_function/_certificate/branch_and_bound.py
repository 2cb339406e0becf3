"""The largest norm of a symbol, by branch and bound on frequencies.

Let w0 be where the norm of the symbol F is largest, and x the vector there.
Along a line through w0, ``p(t) = |F(w0 + t h)^* x|^2`` is of exponential type
``sum_a D_a |h_a|``, nonnegative and largest at 0.  By a theorem of Duffin and
Schaeffer (of Riesz, for a trigonometric polynomial)

    p(1) >= p(0) cos^2(sum_a D_a |h_a| / 2)   where that angle is <= pi / 2,

and as its first derivative is zero at 0, also

    p(1) >= p(0) - sum_t <t, h>^2 |G_t|_2 / 2.

So in the center c of a cell that w0 is in ``|F(c)|^2`` is no less than what
these leave of ``|F(w0)|^2``.  A cell is done when it is below what they leave
of the square of a target: then the largest norm is not in this cell, or not
above the target.  Other cells are split.
The target is (1 + r) times the largest norm that was found.  When all cells
are done the target is a bound, and they are where the search for a smaller r
starts.

A Cholesky decomposition proves that ``|F(c)|^2`` is below, with what
:mod:`.proofs` and ``Symbol.gram_error`` add for rounding.  The largest norm
that was found is ``|F(w)^* x| / |x|`` of explicit w and x, less its error.
"""
from __future__ import annotations

import math
import time
from typing import Any, Callable

import numpy

from sn_function._certificate import lanczos, proofs
from sn_function._certificate.cells import Cells
from sn_function._certificate.proofs import EPS
from sn_function._certificate.symbol import Symbol

# Matrices of up to so many rows are decomposed.
FEW_ROWS = 32
# Steps that compare the norms of larger ones.
POWERS = 6
# Steps uphill.
MAX_STEPS = 30
# Each stage of the search ends with a bound; their tolerances have this ratio.
RATIO = 4
# Entries of the matrices that are decomposed in one batch, and of waves.
BATCH = 2 ** 21

Progress = Callable[[float, float], None]


class Clock:
    """Time that is left, and what is told of the search meanwhile.

    Args:
        limit: Seconds, or ``None``.
        progress: Called with the interval that is proved so far.

    """

    def __init__(
            self, limit: float | None, progress: Progress | None = None,
    ) -> None:
        self._end = math.inf if limit is None else time.monotonic() + limit
        self._progress = progress

    def half(self, progress: Progress | None = None) -> Clock:
        """Returns one with half of the time."""
        return Clock((self._end - time.monotonic()) / 2, progress)

    def is_up(self) -> bool:
        return time.monotonic() > self._end

    def tell(self, lo: float, hi: float) -> None:
        if self._progress is not None:
            self._progress(lo, hi)


class Search:
    """Branch and bound on the symbols of groups.

    Args:
        symbol: The symbols.
        rtol: The width that is wanted, in units of the norm.
        clock: The time that is left.

    """

    def __init__(self, symbol: Symbol, rtol: float, clock: Clock) -> None:
        self._symbol, self._clock = symbol, clock
        self._cells = Cells(symbol.degrees)
        self._shift = proofs.shift(symbol.q)
        # Less what rounding may add to the last target.
        self._rtol = max(rtol, 1e-14) - 8 * EPS
        self._lo = symbol.lower_bound()

    def run(self) -> tuple[float, float]:
        """Returns bounds of the largest norm, below and above."""
        his = self._symbol.bounds.copy()
        cells = [[(0, self._cells.first())] for _ in his]
        for r in self._stages():
            r = max(r, self._least_rtol())
            for group in numpy.argsort(-his):
                if his[group] <= (1 + r) * self._lo:
                    break
                refined = self._refined(group, cells[group], r, his)
                if refined is None:
                    return self._lo, float(his.max())
                cells[group] = refined
                his[group] = min(
                    his[group], (1 + r) * self._lo * (1 + 4 * EPS))
        return self._lo, float(his.max())

    def _stages(self) -> list[float]:
        """Returns the tolerances of stages, the largest one first."""
        found = [self._rtol]
        while found[-1] * RATIO <= .5:
            found.append(found[-1] * RATIO)
        return found[::-1]

    def _least_rtol(self) -> float:
        """Below this, rounding would decide."""
        error = self._symbol.gram_error.max() / self._lo ** 2
        return float(4 * self._shift + 8 * error)

    def _remaining(self, group: int, level: int, r: float) -> float:
        """Returns what ``|F(c)|^2`` is at least in the center of a cell with
        a norm of ``(1 + r) lo``, if that is the largest one."""
        symbol = self._symbol
        square = ((1 + r) * self._lo) ** 2
        riesz = math.cos(self._cells.radius(level) / 2) ** 2 * square
        loss = (self._cells.reach(level, symbol.lags) ** 2
                @ symbol.curvatures[group])
        return max(riesz, square - loss * (1 + 1e-6)
                   - 4 * symbol.gram_error[group])

    def _refined(
            self, group: int, cells: Any, r: float, his: Any) -> Any:
        """Proves that a group's norm is no more than ``(1 + r) lo``.

        Args:
            group: The group.
            cells: Those that the proof for a larger r needed.
            r: The width that is wanted.
            his: Bounds of the groups' norms, until then.

        Returns:
            The cells that this needed, or ``None`` without a proof, as there
            was no time, or rounding prevented it.  The given ones, where lo
            came up to the group's bound: that is the proof then.

        """
        size = max(1, BATCH // max(
            self._symbol.q ** 2, len(self._symbol.lags)))

        def batches(level: int, w: Any) -> list[tuple[int, Any]]:
            return [(level, w[i:i + size]) for i in range(0, len(w), size)]

        stack = [batch for each in cells for batch in batches(*each)]
        done = []
        while stack:
            if self._clock.is_up():
                return None
            self._clock.tell(self._lo, his.max())
            level, w = stack.pop()
            G = self._symbol.gram(group, w)
            theta = self._remaining(group, level, r)
            below = self._are_below(group, G, theta)
            done.append((level, w[below]))
            w, G = w[~below], G[~below]
            if not len(w):
                continue
            lo = self._lo
            is_last = theta > ((1 + r / 2) * lo) ** 2
            self._ascend(group, w, G, r, is_last)
            if his[group] <= (1 + r) * self._lo:
                return cells
            if self._lo > (1 + r / 8) * lo:
                stack.append((level, w))
            elif is_last:
                return None
            else:
                stack += batches(level + 1, self._cells.split(level, w))
        return _merged(done)

    def _are_below(self, group: int, G: Any, theta: float) -> Any:
        """Whether the norms of Gram matrices surely are below ``theta``."""
        A, diagonal = -G, range(self._symbol.q)
        A[:, diagonal, diagonal] += (
            theta * (1 - self._shift) - self._symbol.gram_error[group])
        return proofs.are_positive(A)

    def _ascend(
            self, group: int, w: Any, G: Any, r: float, exactly: bool,
    ) -> None:
        """Follows the largest one of norms upwards, if that may be of use.

        Args:
            group: The group.
            w: Frequencies, shape ``(B, d)``.
            G: The Gram matrices there.
            r: The width that is wanted.
            exactly: Whether the vectors have to be.

        """
        symbol = self._symbol
        best, square = _largest(G)
        if square < .8 * self._lo ** 2 and not exactly:
            return
        w = w[best]
        x = lanczos.start(symbol.q) + 0j
        value = 0.
        for _ in range(MAX_STEPS):
            G = symbol.gram(group, w[None])[0]
            if exactly or symbol.q <= FEW_ROWS:
                x = numpy.linalg.eigh(G)[1][:, -1]
            else:
                x = lanczos.leading(G, x, .1 * r)
            before, value = value, symbol.value(group, w, x)
            self._lo = max(self._lo, value)
            if value <= (1 + .01 * r) * before:
                break
            w = _uphill(symbol, group, w, x)


def _largest(G: Any) -> tuple[int, float]:
    """Returns which of some Gram matrices has the largest norm, and that.

    Of large ones it is one in the largest direction that was found.
    """
    if G.shape[-1] <= FEW_ROWS:
        norms = numpy.linalg.eigvalsh(G)[:, -1]
        return int(norms.argmax()), float(norms.max())
    x = lanczos.start(G.shape[-1])[:, None]
    for _ in range(POWERS):
        x = G @ (x / numpy.linalg.norm(x, axis=-2, keepdims=True))
    norms = numpy.linalg.norm(x, axis=(-2, -1))
    return int(norms.argmax()), float(norms.max())


def _merged(cells: Any) -> Any:
    """Returns the cells, one array of centers for each level."""
    return [(level, numpy.concatenate([w for i, w in cells if i == level]))
            for level in sorted({level for level, _ in cells})]


def _uphill(symbol: Symbol, group: int, w: Any, x: Any) -> Any:
    """Returns where ``|F(w)^* x|`` is larger, by a step of Newton's method.

    Where the Hessian is not negative definite, its eigenvalues are negated.
    """
    y, shifts = symbol.responses(group, x), symbol.shifts

    def waves(w: Any) -> Any:
        return numpy.exp(-1j * (shifts @ w))[:, None] * y

    terms = waves(w)
    f = terms.sum(axis=0)
    first = -1j * (shifts.T @ terms)
    second = -numpy.einsum('ja,jb,jn->abn', shifts, shifts, terms)
    gradient = (first @ f.conj()).real
    hessian = (first.conj() @ first.T + second @ f.conj()).real
    values, vectors = numpy.linalg.eigh(hessian)
    values = numpy.maximum(abs(values), 1e-12 * abs(values).max() + 1e-300)
    step = vectors @ (vectors.T @ gradient / values)
    step /= max(1, symbol.degrees @ abs(step))
    square = numpy.linalg.norm(f)
    for _ in range(8):
        new = (w + step + math.pi) % (2 * math.pi) - math.pi
        if numpy.linalg.norm(waves(new).sum(axis=0)) > square:
            return new
        step = step / 4
    return w
