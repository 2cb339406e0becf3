"""Intervals that surely hold the norm of a map: branch and bound, and proofs.

**All image sizes.**  Let w0 be where the norm of the symbol F is largest, and
x the vector there.  Along a line through w0, ``p(t) = |F(w0 + t h)^* x|^2``
is of exponential type ``sum_a D_a h_a``, nonnegative and largest at 0.  By a
theorem of Duffin and Schaeffer (of Riesz, for a trigonometric polynomial)

    p(t) >= p(0) cos^2(t sum_a D_a h_a / 2)   where that angle is <= pi / 2,

and as its first derivative is zero at 0, also

    p(t) >= p(0) - t^2 sum_{t'} (sum_a |t'_a| h_a)^2 |G_t'|_2 / 2.

A cell of frequencies with the center c and the half-widths h is done when
``|F(c)|^2`` is below what either leaves of the square of a target: then the
largest norm is not in it, or not above the target.  Other cells are split.
The target is (1 + r) times the largest norm that was found.  When all cells
are done the target is a bound, and they are where the search for a smaller r
starts.

**Proofs.**  Cells are done by a Cholesky decomposition of ``theta I - G(c)``.
In floating point it succeeds for a computed matrix A only if A + c I is
positive semidefinite, ``c = k / (1 - k) tr(A)``, with k the bound of the error
of a sum of q + 1 products: S. M. Rump, Verification of positive definiteness,
BIT Numerical Mathematics 46 (2006).  theta is lowered by that, by the error of
G(c), which ``Symbol.gram_error`` bounds, and by that of the diagonal.  The
lower end is ``|F(w)^* x| / |x|`` of explicit w and x, less a bound of its own
error.  So neither end depends on how well anything has converged.

**Matrices**, and convolutions of one tap.  With the singular value
decomposition U S V^T, however it was computed,

    | |A|_2 - s_1 | <= s_1 max(|U^T U - I|, |V^T V - I|) + |A - U S V^T|.

The norms on the right are bounded by Frobenius norms, of products with a much
smaller error than those of BLAS have: each factor is split in two, so that
the product of the leading parts is exact (K. Ozaki et al., Error-free
transformations of matrix multiplication, Numerical Algorithms 59, 2012).
"""
from __future__ import annotations

import math
import time
from typing import Any, Callable, NamedTuple

import numpy

from sn_function._arithmetic import symbol as symbol_
from sn_function._arithmetic.convolution import (
    Convolution,
    ConvolutionMatrix,
)
from sn_function._arithmetic.symbol import (
    EPS,
    Symbol,
    frobenius,
    rounding,
)

# The matrices whose product of the sides and the smaller side is up to that
# are decomposed.
SMALL = 2 ** 30
# Matrices of up to so many rows are decomposed together, without LAPACK.
FEW_ROWS = 16
# Each stage of the search ends with a bound; their tolerances have this ratio.
RATIO = 4
LANCZOS_STEPS = 16
# Entries of the matrices that are decomposed in one batch.
BATCH = 2 ** 21
# Where that of the map at one size is no more than that, it is made a matrix.
LARGE = 2 ** 36


class Interval(NamedTuple):
    """What surely holds a norm: ``lo <= norm <= hi``.

    ``hi <= (1 + rtol) * lo`` tells whether the tolerance has been reached.
    """

    lo: float
    hi: float


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

    def is_up(self) -> bool:
        return time.monotonic() > self._end

    def tell(self, lo: float, hi: float) -> None:
        if self._progress is not None:
            self._progress(lo, hi)


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
        lambda lo, hi: progress(*_scaled(lo, hi, exponent))))
    blocks = symbol_.grouped(numpy.ldexp(W, -exponent), convolution)
    if convolution is not None and convolution.insize is not None:
        ends = _at_size(blocks, convolution, rtol, clock)
    else:
        ends = _at_all_sizes(symbol_.taps(blocks, convolution), rtol, clock)
    return _scaled(*ends, exponent)


def _scaled(lo: float, hi: float, exponent: int) -> Interval:
    """Multiplies by a power of two, outwards where the range ends."""
    with numpy.errstate(over='ignore', under='ignore'):
        low, high = (float(numpy.ldexp(end, exponent)) for end in (lo, hi))
    tiny = numpy.finfo(float).tiny
    if low < tiny:
        low = max(0., low - 5e-324)
    if 0 < hi and high < tiny:
        high += 5e-324
    return Interval(min(low, float(numpy.finfo(float).max)), high)


def _at_all_sizes(
        taps: Any, rtol: float, clock: Clock) -> tuple[float, float]:
    if taps.ndim > 3:
        return _Search(Symbol(taps), rtol, clock).run()
    return _largest(frobenius(taps), taps.__getitem__, rtol, clock)


def _at_size(
        blocks: Any, convolution: Convolution, rtol: float, clock: Clock,
) -> tuple[float, float]:
    """Returns both ends for images of one size, from groups of the weight."""
    one = convolution._replace(groups=1, is_depthwise=False)
    maps = [ConvolutionMatrix(W, one) for W in blocks]
    # The matrix is a sum of one for each tap.
    bounds = numpy.array([sum([
        frobenius(W[(..., *tap)]) for tap in numpy.ndindex(W.shape[2:])
    ]) for W in blocks])
    m, n = maps[0].m, maps[0].n
    if m * n * min(m, n) <= LARGE:
        # Rows are images of one pixel, and no sum has two terms.
        return _largest(
            bounds, lambda i: maps[i].tdot_all(numpy.eye(m)), rtol, clock)
    lo = 0.
    for bound, A in zip(bounds, maps):
        if bound <= lo or clock.is_up():
            continue
        u = _leading(_Gram(A.dot, A.tdot), _start(m).real, .1 * rtol, clock)
        y = A.tdot(u)
        relative = rounding(m + n)
        lo = max(lo, float(
            (1 - relative) * numpy.linalg.norm(y) / numpy.linalg.norm(u)
            - rounding(blocks[0].size) * bound))
    _, hi = _at_all_sizes(symbol_.taps(blocks, one), rtol, clock)
    return lo, max(lo, hi)


class _Search:
    """Branch and bound on the symbols of groups.

    Attributes:
        lo: The largest norm that was found.

    """

    def __init__(self, symbol: Symbol, rtol: float, clock: Clock) -> None:
        self._symbol, self._clock = symbol, clock
        self.lo = 0.
        # Below this, rounding decides.
        largest = symbol.sizes.argmax()
        self._ascend(largest, numpy.zeros(len(symbol.degrees)), rtol)
        q = symbol.q
        self._chol = 2 * q * rounding(q + 1)
        noise = self._chol + 4 * symbol.gram_error.max() / self.lo ** 2
        self._rtol = max(rtol, 8 * noise)

    def run(self) -> tuple[float, float]:
        symbol = self._symbol
        his = symbol.sizes.copy()
        hi = his.max()
        order = numpy.argsort(-his)
        cells = {group: [(0, self._first_cells())] for group in order}
        r = self._rtol
        while r * RATIO <= .5:
            r *= RATIO
        while r >= self._rtol:
            for group in order:
                if his[group] <= (1 + r) * self.lo:
                    continue
                if not self._prove(group, cells, r, hi):
                    return self.lo, max(hi, self.lo)
                his[group] = (1 + r) * self.lo * (1 + 4 * EPS)
            hi = his.max()
            r = r / RATIO if r > self._rtol else 0.
            if 0 < r < self._rtol:
                r = self._rtol
        return self.lo, hi

    def _first_cells(self) -> Any:
        """Returns centers, shape ``(N, d)``, of one half of frequencies.

        The norm is the same at -w.
        """
        counts = self._counts()
        axes = [(2 * numpy.arange(N) + 1 - N) * (math.pi / N) for N in counts]
        axes[0] = axes[0][counts[0] // 2:]
        return numpy.stack(
            numpy.meshgrid(*axes, indexing='ij'), axis=-1
        ).reshape(-1, len(axes))

    def _counts(self) -> Any:
        return 2 * len(self._symbol.degrees) * self._symbol.degrees

    def _halves(self, level: int) -> Any:
        """Returns the half-widths of cells, with what rounding may add."""
        return math.pi / self._counts() / 2 ** level + 16 * EPS

    def _remaining(self, group: int, level: int, square: float) -> float:
        """Returns what a cell's center has at least of the largest square."""
        halves, symbol = self._halves(level), self._symbol
        riesz = math.cos(symbol.degrees @ halves / 2) ** 2 * square
        loss = ((abs(symbol.lags) @ halves) ** 2
                @ symbol.curvatures[group])
        return max(riesz, square - loss * (1 + 1e-6)
                   - 4 * symbol.gram_error[group])

    def _prove(
            self, group: int, cells: Any, r: float, hi: float) -> bool:
        """Proves ``(1 + r) lo`` for a group, and refines its cells.

        Returns:
            Whether it did: there was time, and rounding did not prevent it.

        """
        symbol = self._symbol
        size = max(1, BATCH // symbol.q ** 2)
        stack = [(level, part[i:i + size])
                 for level, part in cells[group]
                 for i in range(0, len(part), size)]
        done = []
        while stack:
            if self._clock.is_up():
                return False
            self._clock.tell(self.lo, hi)
            level, w = stack.pop()
            G = symbol.gram(group, w)
            square = ((1 + r) * self.lo) ** 2
            theta = self._remaining(group, level, square)
            below = self._are_below(
                G, theta * (1 - self._chol) - symbol.gram_error[group])
            if below.all():
                done.append((level, w))
                continue
            before = self.lo
            is_last = theta > (1 + r / 8) ** -2 * square
            self._improve(group, w[~below], G[~below], r, is_last)
            if self.lo > (1 + r / 8) * before:
                stack.append((level, w))
                continue
            if is_last:
                return False
            if below.any():
                done.append((level, w[below]))
            children = self._split(level, w[~below])
            stack += [(level + 1, children[i:i + size])
                      for i in range(0, len(children), size)]
        cells[group] = _merged(done)
        return True

    def _split(self, level: int, w: Any) -> Any:
        """Returns the centers of the halves of cells, along all axes."""
        d = w.shape[1]
        signs = 2 * (numpy.indices((2,) * d).reshape(d, -1).T) - 1
        steps = math.pi / self._counts() / 2 ** (level + 1)
        return (w[:, None] + signs * steps).reshape(-1, d)

    def _are_below(self, G: Any, theta: float) -> Any:
        """Whether ``theta I - G`` has a Cholesky decomposition."""
        q = G.shape[-1]
        A = -G
        A[:, range(q), range(q)] += theta
        return are_positive(A)

    def _improve(
            self, group: int, w: Any, G: Any, r: float, exactly: bool,
    ) -> None:
        """Looks for a larger norm, from the best of the frequencies."""
        if G.shape[-1] <= FEW_ROWS:
            squares = numpy.linalg.eigvalsh(G)[:, -1]
        else:
            x = _start(G.shape[-1])[:, None]
            for _ in range(6):
                x = G @ (x / numpy.linalg.norm(x, axis=-2, keepdims=True))
            squares = numpy.linalg.norm(x, axis=(-2, -1))
        self._ascend(group, w[squares.argmax()], r, exactly)

    def _ascend(
            self, group: int, w: Any, r: float, exactly: bool = False,
    ) -> None:
        """Follows the largest singular value upwards."""
        symbol = self._symbol
        x = _start(symbol.q)
        best = 0.
        for _ in range(30):
            G = symbol.gram(group, w[None])[0]
            if exactly or symbol.q <= 2 * FEW_ROWS:
                x = numpy.linalg.eigh(G)[1][:, -1]
            else:
                x = _leading(G, x, .1 * r)
            value = symbol.value(group, w, x)
            self.lo = max(self.lo, value)
            if value <= (1 + .01 * r) * best:
                break
            best = value
            w = _uphill(symbol, group, w, x)
            # Of that x, at the new frequency.
            self.lo = max(self.lo, symbol.value(group, w, x))


def _merged(cells: Any) -> Any:
    """Returns the cells, one array of centers for each level."""
    return [(level, numpy.concatenate([w for i, w in cells if i == level]))
            for level in sorted({level for level, _ in cells})]


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
        numpy.linalg.cholesky(A)
    except numpy.linalg.LinAlgError:
        return False
    return True


def _start(q: int) -> Any:
    # Drawn, but always the same: so is the output.
    return numpy.random.RandomState(0).normal(size=q) + 0j


class _Gram(NamedTuple):
    """``A A^T``, by its factors: products with a vector."""

    dot: Callable[[Any], Any]
    tdot: Callable[[Any], Any]

    def __matmul__(self, u: Any) -> Any:
        return self.dot(self.tdot(u))


def _leading(
        G: Any, x: Any, rtol: float, clock: Clock | None = None) -> Any:
    """Returns about the leading eigenvector of G, from x.

    Lanczos' method with full reorthogonalization, started again from what it
    found until the residual is small.
    """
    Q = numpy.empty((LANCZOS_STEPS, len(x)), x.dtype)
    for _ in range(20):
        Q[0] = x / numpy.linalg.norm(x)
        H = numpy.zeros((LANCZOS_STEPS,) * 2, x.dtype)
        for k in range(LANCZOS_STEPS):
            y = G @ Q[k]
            for _ in range(2):
                h = Q[:k + 1].conj() @ y
                y = y - h @ Q[:k + 1]
                H[:k + 1, k] += h
            beta = numpy.linalg.norm(y)
            if k + 1 == LANCZOS_STEPS or beta <= 1e-12 * abs(H).max():
                break
            H[k + 1, k] = beta
            Q[k + 1] = y / beta
        values, vectors = numpy.linalg.eigh(H[:k + 1, :k + 1])
        x = vectors[:, -1] @ Q[:k + 1]
        if (beta * abs(vectors[-1, -1]) <= rtol * values[-1]
                or values[-1] <= 0 or (clock is not None and clock.is_up())):
            break
    return x


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


# Matrices

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
        if not is_below(A, hi):
            ends = _ends(A, rtol)
            lo, hi = max(lo, ends[0]), max(hi, ends[1])
    return lo, hi


def _ends(A: Any, rtol: float) -> tuple[float, float]:
    """Returns both ends for a matrix with no more rows than columns."""
    if A.size * len(A) <= SMALL:
        return _decomposed(A)
    u = _leading(_Gram(A.dot, A.T.dot), _start(len(A)).real, .1 * rtol)
    y = u @ A
    relative = rounding(y.size + u.size)
    size = frobenius(A)
    lo = max(0., float(
        (1 - relative) * numpy.linalg.norm(y) / numpy.linalg.norm(u)
        - rounding(len(A)) * size))
    while rtol < 1:
        if is_below(A, (1 + rtol) * lo):
            return lo, (1 + rtol) * lo
        rtol *= RATIO
    return lo, size


def is_below(A: Any, bound: float) -> bool:
    """Whether the norm of a matrix surely is no more than that."""
    G = A @ -A.T
    q = len(G)
    square = bound ** 2 * (1 - 4 * EPS)
    if square < 1e-290:
        return False  # it would underflow
    G[range(q), range(q)] += (
        square * (1 - 2 * q * rounding(q + 1))
        - rounding(A.shape[1]) * frobenius(A) ** 2)
    return _is_positive(G)


def _decomposed(A: Any) -> tuple[float, float]:
    exponent = math.frexp(abs(A).max())[1]
    A = numpy.ldexp(A, -exponent)
    U, s, V = numpy.linalg.svd(A, full_matrices=False)
    one = numpy.eye(len(s))
    defect = max(_distance(U, U, one), _distance(V.T, V.T, one))
    # The second factor is rounded: that is a part EPS of it.
    residual = _distance(U.T, s[:, None] * V, A) + EPS * (
        1 + defect) * frobenius(s[None])
    error = (s[0] * (defect + 4 * EPS) + residual) * (1 + 8 * EPS)
    return (math.ldexp(max(0., s[0] - error), exponent),
            math.ldexp(s[0] + error, exponent))


def _distance(X: Any, Y: Any, Z: Any) -> float:
    """Bounds the Frobenius norm of ``X^T Y - Z``."""
    X1, X2 = _split(X)
    Y1, Y2 = _split(Y)
    rest = X1.T @ Y2 + X2.T @ Y
    difference = X1.T @ Y1 - Z + rest
    return (frobenius(difference)
            + EPS * 2 * (frobenius(Z) + frobenius(difference) + frobenius(rest))
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
