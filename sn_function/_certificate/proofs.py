"""What is proved of norms in floating point arithmetic.

**Above.**  The norm of F is below t where ``t^2 I - F F^*`` is positive
definite, which a Cholesky decomposition decides.  In floating point it
succeeds for a computed matrix A only if A + c I is positive semidefinite,
``c = k / (1 - k) tr(A)``, with k the bound of the error of a sum of q + 1
products: S. M. Rump, Verification of positive definiteness, BIT Numerical
Mathematics 46 (2006).  So t^2 is lowered by that c, by the error of the
product, and by that of the diagonal.

**Below.**  ``|F x| / |x|`` of an explicit x, less a bound of its own error.

**Both.**  With the singular value decomposition U S V^T, however it was
computed,

    | |A|_2 - s_1 | <= s_1 max(|U^T U - I|, |V^T V - I|) + |A - U S V^T|.

The norms on the right are bounded by Frobenius norms, of products with a much
smaller error than those of BLAS have: each factor is split in two, so that
the product of the leading parts is exact (K. Ozaki et al., Error-free
transformations of matrix multiplication, Numerical Algorithms 59, 2012).

So no bound depends on how well an iteration has converged.  Where numbers are
so small that squares of them underflow, a caller has scaled them before.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

EPS = 2.0 ** -52
# The smallest number above 0.
LEAST = 2.0 ** -1074
# Matrices of up to so many rows are decomposed together, without LAPACK.
FEW_ROWS = 16


def rounding(n: int) -> float:
    """Returns what bounds the relative error of a sum of n products.

    With unit roundoff u = EPS / 2 it is 4 (n + 8) u, where n u / (1 - n u)
    is proved for any order of real additions, and less than 3 (n + 2) u for
    complex ones.  See N. J. Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd edition, sections 3.1 and 3.6.
    """
    return 2 * (n + 8) * EPS


def frobenius(A: Any) -> Any:
    """Returns the Frobenius norms of matrices, or a little more."""
    peaks = abs(A).max(axis=(-2, -1))[..., None, None]
    squares = (A / numpy.where(peaks > 0, peaks, 1)) ** 2
    norms = numpy.sqrt(squares.sum(axis=(-2, -1))) * peaks[..., 0, 0]
    return norms * (1 + rounding(A.shape[-1] * A.shape[-2]))


def are_positive(A: Any) -> Any:
    """Whether Cholesky decompositions of Hermitian matrices succeed.

    Overwrites them.
    """
    q = A.shape[-1]
    if q > FEW_ROWS:
        return numpy.array(list(map(_is_positive, A)))
    is_positive = numpy.ones(len(A), bool)
    for k in range(q):
        pivot = A[:, k, k].real
        is_positive &= pivot > 0
        column = A[:, k + 1:, k] / numpy.sqrt(
            numpy.where(is_positive, pivot, 1))[:, None]
        # Those that failed would overflow.
        column[~is_positive] = 0
        A[:, k + 1:, k + 1:] -= column[:, :, None] * column[:, None].conj()
    return is_positive


def _is_positive(A: Any) -> bool:
    try:
        L = numpy.linalg.cholesky(A)
    except numpy.linalg.LinAlgError:
        return False
    return bool(numpy.isfinite(L.diagonal()).all())  # LAPACK lets NaN pass


def shift(q: int) -> float:
    """Returns the c above for a diagonal of q ones, with room for it."""
    return 2 * q * rounding(q + 1)


def is_below(A: Any, bound: float) -> bool:
    """Whether the norm of a matrix surely is no more than that."""
    G = A @ -A.T
    q = len(G)
    square = bound ** 2 * (1 - 4 * EPS)
    if not 1e-290 <= square < math.inf:
        return False  # it would underflow, or is no number
    G[range(q), range(q)] += (
        square * (1 - shift(q))
        - rounding(A.shape[1]) * frobenius(A) ** 2)
    return _is_positive(G)


def lower_bound(y: Any, u: Any, error: float) -> float:
    """Returns a bound below ``|A u| / |u|`` for what was computed of A u.

    Args:
        y: The product.
        u: The vector.
        error: Bound of the error of the product, in units of ``|u|``.

    """
    relative = rounding(y.size + u.size)
    ratio = numpy.linalg.norm(y) / numpy.linalg.norm(u)
    return max(0., float((1 - relative) * ratio - (1 + relative) * error))


def decomposed(A: Any) -> tuple[float, float]:
    """Returns bounds of the norm below and above, by its decomposition."""
    exponent = math.frexp(abs(A).max())[1]
    A = numpy.ldexp(A, -exponent)
    U, s, V = numpy.linalg.svd(A, full_matrices=False)
    one = numpy.eye(len(s))
    defect = max(_distance(U, U, one), _distance(V.T, V.T, one))
    # The second factor is rounded: that is a part EPS of it.
    residual = _distance(U.T, s[:, None] * V, A) + EPS * (
        1 + defect) * frobenius(s[None])
    error = (s[0] * (defect + 4 * EPS) + residual) * (1 + 8 * EPS)
    return scaled(float(s[0] - error), float(s[0] + error), exponent)


def scaled(lo: float, hi: float, exponent: int) -> tuple[float, float]:
    """Multiplies by a power of two, outwards where the range ends."""
    with numpy.errstate(over='ignore', under='ignore'):
        low, high = (float(numpy.ldexp(end, exponent)) for end in (lo, hi))
    info = numpy.finfo(float)
    if low < info.tiny:
        low = max(0., low - LEAST)
    if hi > 0 and high < info.tiny:
        high += LEAST
    return min(low, float(info.max)), high


def _distance(X: Any, Y: Any, Z: Any) -> float:
    """Bounds the Frobenius norm of ``X^T Y - Z``."""
    X1, X2 = _split(X)
    Y1, Y2 = _split(Y)
    rest = X1.T @ Y2 + X2.T @ Y
    difference = X1.T @ Y1 - Z + rest
    return (frobenius(difference)
            + 2 * EPS * (
                frobenius(Z) + frobenius(difference) + frobenius(rest))
            + rounding(len(X)) * (
                frobenius(X1) * frobenius(Y2) + frobenius(X2) * frobenius(Y)))


def _split(X: Any) -> tuple[Any, Any]:
    """Returns two parts of X, the first of few bits in each column.

    The product of two such parts is exact, whatever the order of its sums.
    """
    bits = (53 - math.ceil(math.log2(max(len(X), 2)))) // 2
    exponents = numpy.frexp(abs(X).max(axis=0))[1]
    shift = numpy.ldexp(.75, exponents + (54 - bits))
    first = (X + shift) - shift
    return first, X - first
