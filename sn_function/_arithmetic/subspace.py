"""Subspace iteration with Rayleigh-Ritz in NumPy: several vectors at once.

One vector cannot follow where leading singular values are close, which is what
spectral normalization makes of them.  With the rows of ``U (b, m)`` as vectors
and ``Q`` an orthonormal basis of their span, sigma is the largest that any
vector of the span gives:

    sigma = max |W^T u|  over unit vectors u of the span  = |Q W|_2

It takes one pass over W, with b right-hand sides, and matrices of b by b:

    S = U W     G = U U^T = L L^T     L^-1 S S^T L^-T = C^T diag(l) C
    B = C L^-1  (then the rows of B U are orthonormal, and those of B S
                 orthogonal, with the squared lengths l_1 >= l_2 >= ...)
    u = (B U)_1     sigma = |(B S)_1|     v = (B S)_1 / sigma

and a second pass moves the vectors on, leading one first:

    U_j <- (W (B S)_j - c (B U)_j) / (l_j - c)    c = 0.45 l_b - 0.0001 l_1

The span is a constant of the gradient, and u is the best vector in it, so to
first order no change of u changes sigma: ``d sigma / d W = u v^T``, of rank 1,
is exact.  With K > 1, the vectors are moved on K - 1 times first.

The shift c makes that an iteration with ``W W^T - c``, whose eigenvalues below
the b-th largest lie around zero, so that the vectors converge nearly twice as
fast.  With half of ``l_b``, where the b largest are equal, what W takes to
zero would stay for ever.

The small part of ``l_1`` keeps the vectors independent.  With E the part of
the new U outside of the old span, the new ``U U^T`` is ``I + E E^T``, and no
row of E is longer than 70 where sigma is the norm of W.  Where it is far below
that, c is less, such that no entry of E is above 100.

See G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, section
8.2.  Extreme sizes are treated as in :mod:`.power_iteration`.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
from chainer.backends import cuda

from sn_function import errors
from sn_function._arithmetic import matrix, power_iteration
from sn_function._arithmetic.interface import (
    NEVER,
    SETTLED,
    Arrays,
    Backward,
    Forward,
    Renewal,
    Settings,
)
from sn_function._arithmetic.matrix import (
    ExtremeNormError,
    Matrix,
    is_ordinary,
)

# The parts of l_b and of l_1 in the shift.
SHIFT = 0.45
REGULAR = 1e-4
# The largest entry of W S_j / (l_j - c), where U_j has length 1.
MOST = 100.0
# Vectors of length 1 are made orthonormal before they are used where L^-1 has
# an entry above the inverse of the first, and are not independent where one on
# the diagonal of L is below the second.
INDEPENDENT = 0.1
DEPENDENT = 1e-6


class SubspaceIteration(NamedTuple):
    """What a forward computed, for its backward.

    Attributes:
        u, v: The leading Ritz vectors, ``W^T u = sigma v``.
        sigma: The estimate.
        squares: ``l_1, l_2, ...`` in the square of a unit, shape ``(b,)``.
        unit: That unit of sigma.
        basis: An orthonormal basis of the span, shape ``(b, m)``.
        start: The vectors that it began with, likewise.
        matrix: The matrix, if it is kept.
        t: ``W v / sigma``, or ``None`` for a sigma of zero or NaN, or if that
            is not asked for.
        following: The vectors moved on, shape ``(b, m)``, if that is asked
            for.
        restarted: Whether it began with others than those given.

    """

    u: Any
    v: Any
    sigma: float
    squares: Any
    unit: float
    basis: Any
    start: Any
    matrix: Any
    t: Any = None
    following: Any = None
    restarted: bool = False
    stack: None = None  # each weight is computed by itself

    @property
    def singular_values(self) -> Any:
        """Estimates of the largest ones, shape ``(b,)``, in order."""
        return numpy.sqrt(self.squares) * self.unit

    def floored(self, settings: Settings) -> tuple[float, bool]:
        """Returns what ``W`` is divided by, and whether that is sigma."""
        return power_iteration.floored(self.sigma, settings)

    def turn(self) -> float:
        """Returns how much the next pass turns u; 0 for a zero or a NaN."""
        # u . W v = sigma
        return 0.0 if self.t is None else 1 - 1 / matrix.norm(self.t)

    def residual(self) -> float:
        """Returns ``|W v - sigma u| / sigma``; 0 for a zero or a NaN."""
        return 0.0 if self.t is None else matrix.norm(self.t - self.u)


def normalize(call: Forward) -> tuple[Arrays, SubspaceIteration]:
    """As :func:`.power_iteration.normalize`, for ``u`` of shape ``(b, m)``.

    Raises:
        VectorValueError: The vectors are not finite, or not independent.

    """
    settings = call.settings
    iterations = subspace_iteration(
        power_iteration.unfold(call.W, settings), call.u.copy(),
        settings.n_power_iteration, call.update_u, call.renewal)
    return power_iteration.finish(call, iterations)


store = power_iteration.store


def gradients(call: Backward) -> Arrays:
    """As :func:`.power_iteration.gradients`; the gradient has rank 1."""
    return power_iteration.gradients(call._replace(
        settings=call.settings._replace(detach_uv=True)))


def subspace_iteration(
        A: Matrix, U: Any, n: int, moves: bool, renewal: Renewal = NEVER,
) -> SubspaceIteration:
    """Runs ``n`` passes on ``A`` from ``U``, shape ``(b, m)``.

    They start from other vectors where the renewal says so.  A weight that
    holds NaN or Inf gives a sigma that is NaN.  Call it with NumPy's warnings
    off, as :func:`.power_iteration.power_iteration`.

    Args:
        A: The matrix.
        U: Start vectors.
        n: Number of passes.
        moves: Whether the vectors are moved on after the last one.
        renewal: When other vectors are looked for first.

    Raises:
        VectorValueError: ``U`` is not finite, or its rows not independent.

    """
    U = U.astype(A.array.dtype, copy=False)
    try:
        return _iterate_anew(A, U, n, moves, False, renewal)
    except ExtremeNormError:
        pass
    A = A.astype(numpy.float64)
    start = _unit_rows(A, U)
    try:
        iterations = _iterate_anew(A, start, n, moves, True, renewal)
    except ExtremeNormError:
        raise errors.VectorValueError(U) from None
    is_restarted = iterations.sigma == 0 and not A.is_zero()
    if is_restarted:  # the span is orthogonal to all columns of W
        start[0] = A.start_at_largest_row(start.dtype)
        iterations = _iterate_anew(A, start, n, moves, True, renewal)
    return iterations._replace(
        start=iterations.start.astype(U.dtype), restarted=is_restarted)


def _unit_rows(A: Matrix, U: Any) -> Any:
    """Returns rows of length 1, in float64.

    Raises:
        VectorValueError: One is zero or not finite.

    """
    peaks = A.peaks(U)
    if not (numpy.isfinite(peaks).all() and peaks.all()):
        raise errors.VectorValueError(U)
    U = U / A.to_device(peaks)[:, None]
    return U / A.to_device(numpy.sqrt(A.gram(U).diagonal()))[:, None]


def _iterate_anew(
        A: Matrix, U: Any, n: int, moves: bool, careful: bool,
        renewal: Renewal) -> SubspaceIteration:
    """As in :mod:`.power_iteration`, outside of the graph."""
    iterations = _iterate(A, U, n, moves, careful)
    if renewal != NEVER and 0 < iterations.sigma < math.inf and not moves:
        iterations = iterations._replace(
            t=A.dot(iterations.v) / iterations.sigma)
    limit = renewal.limit
    for _ in range(0, renewal.n_warmup, n):
        if renewal.accepts(iterations, limit):
            break
        limit = SETTLED
        if iterations.following is None:
            iterations = _iterate(A, U, n, True, careful)
        iterations = _iterate(A, iterations.following, n, True, careful)
    return iterations


def _iterate(
        A: Matrix, U: Any, n: int, moves: bool, careful: bool,
) -> SubspaceIteration:
    start = U
    for k in range(1, n + 1):
        iterations = _step(A, U, start, moves or k < n, careful)
        if not 0 < iterations.sigma < math.inf:
            break
        U = iterations.following
    return iterations


def _step(
        A: Matrix, U: Any, start: Any, moves: bool, careful: bool,
) -> SubspaceIteration:
    """One pass over ``A``, or two to move the vectors on."""
    U, E = _orthonormal(A, U)
    S = A.tdot_all(U)
    unit = 1.0
    if careful:
        unit = float(abs(S).max())
        if not 0 < unit < math.inf:  # zero, or NaN in all that follows
            sigma = 0.0 * unit
            return SubspaceIteration(
                U[0] + U.dtype.type(sigma), S[0] * 0, sigma,
                numpy.full(len(U), sigma), unit, U, start, A)
        S = S / unit
    squares, B = A.agreed(*_ritz(S, E))
    sigma = math.sqrt(squares[0])
    if not careful and not is_ordinary(sigma, S.dtype):
        raise ExtremeNormError
    B = A.to_device(B.astype(S.dtype, copy=False))
    basis = B.dot(U)
    v = B[0].dot(S) / sigma
    t = following = None
    if moves:
        following = B.dot(A.dot_all(S))
        if careful:
            following /= unit
        t = following[0] * (1 / sigma ** 2)
        # One vector alone would not leave what W takes to zero.
        c = SHIFT * squares[-1] if len(U) > 1 else 0.0
        c -= REGULAR * squares[0]
        # What the span hardly has, and W is large on, must not be all that is
        # left of each.
        c = min(c, (squares - A.peaks(following) / MOST).min())
        following -= basis * c
        following /= A.to_device(squares - c)[:, None]
        following[0] /= A.norm_of_t(following[0], careful)
    return SubspaceIteration(
        basis[0], v, sigma * unit, squares, unit, basis, start, A, t,
        following)


def _orthonormal(A: Matrix, U: Any) -> tuple[Any, Any]:
    """Returns ``U`` and ``E`` such that the rows of ``E U`` are orthonormal.

    It is another U, of the same span, where much would cancel in that.

    Raises:
        ExtremeNormError: A norm is extreme, or the rows are not independent.

    """
    for _ in range(3):
        G = A.gram(U)
        norms = numpy.sqrt(G.diagonal())
        if not all([is_ordinary(x, U.dtype) for x in norms.tolist()]):
            raise ExtremeNormError
        L, = A.agreed(_cholesky(G / norms / norms[:, None]))
        if L.diagonal().min() < DEPENDENT:
            raise ExtremeNormError
        # Its entries grow from row to row, even where no pivot is small.
        inverse = numpy.linalg.inv(L)
        E = inverse / norms
        if abs(inverse).max() < 1 / INDEPENDENT:
            return U, E
        U = A.to_device(E).dot(U).astype(U.dtype)
    raise ExtremeNormError


def _ritz(S: Any, E: Any) -> tuple[Any, Any]:
    """Returns ``l_1, l_2, ...`` and B; zeros where a square overflows."""
    H = cuda.to_cpu(S.dot(S.T)).astype(numpy.float64, copy=False)
    if not math.isfinite(H.trace()):
        return numpy.zeros(len(H)), numpy.zeros_like(H)
    squares, C = numpy.linalg.eigh(E.dot(H).dot(E.T))
    return squares[::-1].clip(0), C.T[::-1].dot(E)


def _cholesky(G: Any) -> Any:
    """Returns ``L`` with ``L L^T = G``, or zeros where there is none."""
    try:
        return numpy.linalg.cholesky(G)
    except numpy.linalg.LinAlgError:
        return numpy.zeros_like(G)
