"""Intervals that surely hold the norm of a map."""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import numpy

from sn_function._arithmetic.convolution import (
    Convolution,
    ConvolutionMatrix,
)
from sn_function._certificate import lanczos, proofs
from sn_function._certificate import symbol as symbol_
from sn_function._certificate.branch_and_bound import (
    RATIO,
    Clock,
    Progress,
    Search,
)
from sn_function._certificate.proofs import frobenius, rounding
from sn_function._certificate.symbol import Symbol

# The matrices whose product of the sides and the smaller side is up to that
# are decomposed.
SMALL = 2 ** 30
# Where that of the map at one size, and its entries, are no more than that, it
# is made a matrix.
LARGE = 2 ** 34
MOST_ENTRIES = 2 ** 25
# Entries of what convolutions need to make it, in one step.
BATCH = 2 ** 24


class Interval(NamedTuple):
    """What surely holds a norm: ``lo <= norm <= hi``.

    ``hi <= (1 + rtol) * lo`` tells whether the tolerance has been reached.
    """

    lo: float
    hi: float


def norm_interval(
        W: Any, convolution: Convolution | None = None,
        rtol: float = 1e-3, time_limit: float | None = None,
        progress: Progress | None = None) -> Interval:
    """Returns an interval that holds the norm of a map.

    Args:
        W: Its weight, an array of NumPy.
        convolution: What it does beside its weight: with ``insize`` the norm
            is that for images of this size, else the least upper bound for
            images of all sizes.  With ``None`` the map is the matrix with
            rows along the first axis of W.
        rtol: The width that is wanted, in units of the norm.
        time_limit: Seconds after which the interval may be wider, or
            ``None``.
        progress: Called with both ends, meanwhile, again and again.

    Returns:
        The interval: (0, 0) for a weight of zeros, (nan, nan) for one with
        NaN or Inf.

    """
    W = W.astype(numpy.float64)
    peak = abs(W).max()
    if not 0 < peak < math.inf:
        return Interval(0 * float(peak), 0 * float(peak))
    exponent = math.frexp(peak)[1]
    clock = Clock(time_limit, progress and (
        lambda lo, hi: progress(*proofs.scaled(lo, hi, exponent))))
    scaled = numpy.ldexp(W, -exponent)
    blocks = symbol_.grouped(scaled, convolution)
    if convolution is not None and convolution.insize is not None:
        lo, hi = _at_size(blocks, convolution, rtol, clock)
    else:
        lo, hi = _at_all_sizes(
            symbol_.taps(blocks, convolution), rtol, clock)
    if (numpy.ldexp(scaled, exponent) != W).any():
        # Each of the smallest entries may have lost that.
        lost = W.size * proofs.LEAST
        lo, hi = lo - lost, hi + lost
    return Interval(*proofs.scaled(lo, hi, exponent))


def _at_all_sizes(
        taps: Any, rtol: float, clock: Clock) -> tuple[float, float]:
    if taps.ndim > 3:
        return Search(Symbol(taps), rtol, clock).run()
    return _largest(frobenius(taps), taps.__getitem__, rtol, clock)


def _at_size(
        blocks: Any, convolution: Convolution, rtol: float, clock: Clock,
) -> tuple[float, float]:
    """Returns both ends for images of one size, from groups of the weight."""
    one = convolution._replace(groups=1, is_depthwise=False)
    maps = [ConvolutionMatrix(W, one) for W in blocks]
    # The matrix is a sum of one for each tap.
    taps = [*numpy.ndindex(blocks.shape[3:])]
    bounds = (1 + rounding(len(taps))) * numpy.array([
        sum([frobenius(W[(..., *tap)]) for tap in taps]) for W in blocks])
    m, n = maps[0].m, maps[0].n
    if m * n <= min(LARGE // min(m, n), MOST_ENTRIES):
        return _largest(bounds, lambda i: _dense(maps[i]), rtol, clock)
    _, hi = _at_all_sizes(symbol_.taps(blocks, one), rtol, clock.half(
        lambda _, hi: clock.tell(0., hi)))
    lo = 0.
    for bound, A in zip(bounds, maps):
        if bound <= lo or clock.is_up():
            continue
        clock.tell(lo, hi)
        u = lanczos.leading(lanczos.Gram(A.dot, A.tdot), lanczos.start(m),
                            .1 * rtol, clock.is_up)
        lo = max(lo, proofs.lower_bound(
            A.tdot(u), u, rounding(blocks[0].size) * bound))
    return lo, max(lo, hi)


def _dense(A: ConvolutionMatrix) -> Any:
    """Returns the matrix of a map, or its transpose, if that has fewer rows.

    A row is what is made of an image of one pixel, in which no sum has two
    terms, so it is exact.
    """
    is_wide = A.m <= A.n
    shape = (A.m, A.n) if is_wide else (A.n, A.m)
    product = A.tdot_all if is_wide else A.dot_all
    n_taps = math.prod(A.array.shape[2:])
    step = max(1, BATCH // (n_taps * shape[1]))
    matrix = numpy.empty(shape)
    for start in range(0, shape[0], step):
        rows = matrix[start:start + step]
        images = numpy.zeros((len(rows), shape[0]))
        images[range(len(rows)), range(start, start + len(rows))] = 1
        rows[...] = product(images)
    return matrix


def _largest(
        bounds: Any, matrix: Callable[[int], Any], rtol: float, clock: Clock,
) -> tuple[float, float]:
    """Returns both ends for the largest norm of some matrices.

    Args:
        bounds: What is at least the norm of each.
        matrix: Makes one of them.
        rtol: The width that is wanted.
        clock: The time left.

    """
    lo = hi = 0.
    for i in numpy.argsort(-bounds):
        if bounds[i] <= hi:
            break
        if clock.is_up():
            return lo, max(hi, float(bounds[i]))
        clock.tell(lo, float(bounds[i]))
        A = matrix(i)
        if len(A) > A.shape[1]:
            A = A.T
        if A.any() and not proofs.is_below(A, hi):
            ends = _ends(A, rtol, clock)
            lo, hi = max(lo, ends[0]), max(hi, ends[1])
    return lo, hi


def _ends(A: Any, rtol: float, clock: Clock) -> tuple[float, float]:
    """Returns both ends for a matrix with no more rows than columns."""
    if A.size * len(A) <= SMALL:
        return proofs.decomposed(A)
    exponent = math.frexp(abs(A).max())[1]
    A = numpy.ldexp(A, -exponent)
    u = lanczos.leading(lanczos.Gram(A.dot, A.T.dot), lanczos.start(len(A)),
                        .1 * rtol, clock.is_up)
    size = frobenius(A)
    lo = proofs.lower_bound(u @ A, u, rounding(len(A)) * size)
    return proofs.scaled(lo, _proved(A, lo, size, rtol, clock), exponent)


def _proved(
        A: Any, lo: float, size: float, rtol: float, clock: Clock) -> float:
    """Returns a bound of the norm of A near lo, or else ``size``."""
    if lo == 0:
        return size
    # Below this, rounding would decide.
    r = max(rtol, 2 * proofs.shift(len(A)) + 2 * rounding(
        A.shape[1]) * (size / lo) ** 2)
    while not proofs.is_below(A, (1 + r) * lo):
        r *= RATIO
        if clock.is_up() or (1 + r) * lo > size:
            return size
    return (1 + r) * lo
