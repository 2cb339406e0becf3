"""A weight seen as an ``m x n`` matrix, and its products.

The output axis (length ``m``) may be any axis; all the others, in their
order, make up ``n``.  With ``l`` the product of the axes before it and ``r``
of those after it, a C-contiguous weight is an ``(l, m, r)`` array, and the
matrix is never transposed in memory:

    (W v)[i]      = sum_a sum_b  W[a, i, b] v[a, b]
    (W^T u)[a, b] = sum_i        u[i] W[a, i, b]

Where ``l`` or ``r`` is 1 these are one matrix-vector product of BLAS, else a
batch of them over ``a``.

Several passes over a large weight are done block by block, so that each pass
finds in the cache what the one before has left there, and only the result has
the size of the weight.
"""
from __future__ import annotations

import contextlib
import math
from typing import Any, Callable, Iterator, Sequence

import numpy
from chainer import backend

from sn_function import errors

# Entries of a block.
BLOCK_SIZE = 1 << 17
# Up to so many entries, the number of calls decides, not that of passes.
SMALL_SIZE = 1 << 14
# From so many entries on, a weight does not stay in the cache between passes.
LARGE_SIZE = 1 << 22

# Rows of a medium weight that are multiplied at once by several vectors.
FEW_ROWS = 64

# Norms, by dtype, whose squares and cubes surely have all their digits.
ORDINARY = {'f': (1e-12, 1e12), 'd': (1e-100, 1e100)}


class ExtremeNormError(ArithmeticError):
    """A norm is out of the range of :data:`ORDINARY`, or not a number."""


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype in which sums over entries of ``dtype`` are made."""
    return numpy.dtype(numpy.float32) if dtype.char == 'e' else dtype


def as_matrix(W: Any, axis: int) -> Any:
    """Returns a weight in the shape ``(m, n)``.

    Args:
        W: An array of NumPy or CuPy, or a Variable.
        axis: Its output axis, from 0 to ``W.ndim - 1``.

    """
    if axis != 0:
        W = W.transpose([axis, *(k for k in range(W.ndim) if k != axis)])
    return W if W.ndim == 2 else W.reshape(W.shape[0], -1)


def is_ordinary(norm: float, dtype: Any) -> bool:
    """Whether a norm is in the range of :data:`ORDINARY`."""
    low, high = ORDINARY[dtype.char]
    return low < norm < high


def ordinary_norm(x: Any) -> float:
    """Returns the norm of a vector.

    Raises:
        ExtremeNormError: Its square may have lost digits.

    """
    norm = math.sqrt(x.dot(x))
    if not is_ordinary(norm, x.dtype):
        raise ExtremeNormError
    return norm


def norm(x: Any) -> float:
    """Returns the norm of any vector; NaN if an entry is not finite."""
    try:
        return ordinary_norm(x)
    except ExtremeNormError:
        return careful_norm(x)


def careful_norm(x: Any) -> float:
    """As :func:`norm`, which is faster for most."""
    largest = float(abs(x).max())
    if largest == 0 or not math.isfinite(largest):
        return 0 * largest
    x = x / largest
    return largest * math.sqrt(x.dot(x))


def normalize_axis(axis: int, ndim: int) -> int:
    """Returns ``axis`` counted from the front.

    Raises:
        AxisError: It is not an integer in ``[-ndim, ndim)``.

    """
    if type(axis) is int and 0 <= axis < ndim:
        return axis
    try:
        in_range = -ndim <= axis < ndim and axis == int(axis)
    except (TypeError, ValueError):
        in_range = False
    if not in_range or isinstance(axis, bool):
        raise errors.AxisError(axis, ndim)
    return int(axis) % ndim


class Matrix:
    """The ``(m, n)`` view of a weight.

    Args:
        W: Array with 2 or more dimensions.
        axis: Its output axis, from 0 to ``W.ndim - 1``.

    Attributes:
        array: ``W`` itself.
        m (int): Length of the output axis.
        n (int): Product of all the other axes.

    """

    __slots__ = ('_axis', '_blocks', '_l', '_r', 'array', 'm', 'n')

    def __init__(self, W: Any, axis: int) -> None:
        m = W.shape[axis]
        n = W.size // m
        l = math.prod(W.shape[:axis]) if axis else 1  # NOQA: E741
        r = n // l
        self.array, self.m, self.n = W, m, n
        self._axis, self._l, self._r = axis, l, r
        if l == 1:
            self._blocks = W.reshape(m, r)
        elif r == 1:
            self._blocks = W.reshape(l, m)
        else:
            self._blocks = W.reshape(l, m, r)

    @property
    def xp(self) -> Any:
        """The module of the array: NumPy or CuPy."""
        return backend.get_array_module(self.array)

    def astype(self, dtype: Any) -> Matrix:
        """Returns the matrix with entries of another dtype."""
        return Matrix(self.array.astype(dtype, copy=False), self._axis)

    def divided_by(self, number: float) -> Matrix:
        """Returns the matrix divided by a number."""
        return Matrix(self.array / number, self._axis)

    def is_zero(self) -> bool:
        """Whether all entries are zero."""
        return not self.array.any()

    def start_at_largest_row(self, dtype: Any) -> Any:
        """Returns the unit vector of the row with the largest norm.

        If the matrix is not zero, that row is not orthogonal to itself, so
        the transpose does not take the vector to zero.
        """
        u = numpy.zeros(self.m, dtype)
        u[self.row_norms().argmax()] = 1
        return u

    def row_norms(self) -> Any:
        """Returns the norms of the rows, shape ``(m,)``, of any size."""
        x = abs(self._blocks).reshape(self._l, self.m, self._r)
        largest = x.max() or 1.0
        x = x / largest
        return largest * numpy.sqrt((x * x).sum(axis=(0, 2)))

    # For a matrix that is spread over processes these are not the same.

    def norm_of_s(self, s: Any, careful: bool) -> float:
        """Returns the norm of ``s = W^T u``, shape ``(n,)``."""
        return careful_norm(s) if careful else ordinary_norm(s)

    def norm_of_t(self, t: Any, careful: bool) -> float:
        """Returns the norm of ``t = W v``, shape ``(m,)``."""
        return careful_norm(t) if careful else ordinary_norm(t)

    def gram(self, U: Any) -> Any:
        """Returns ``U U^T`` of ``U``, shape ``(b, m)``, in float64."""
        U = U.astype(numpy.float64, copy=False)
        return U.dot(U.T)

    def peaks(self, U: Any) -> Any:
        """Returns the largest magnitude in each row of ``U``, in float64."""
        return abs(U).max(axis=1).astype(numpy.float64)

    def agreed(self, *arrays: Any) -> Sequence[Any]:
        """Returns arrays of float64 as one of the processes has them."""
        return arrays

    def to_device(self, x: Any) -> Any:
        """Returns what is computed on the host where the weight is."""
        return x

    def dot(self, v: Any) -> Any:
        """Returns ``W v``, shape ``(m,)``, of ``v``, shape ``(n,)``."""
        if self._l == 1:
            return self._blocks.dot(v)
        if self._r == 1:
            return v.dot(self._blocks)
        blocks = self._blocks @ v.reshape(self._l, self._r, 1)
        return blocks.sum(axis=0).reshape(self.m)

    def tdot(self, u: Any) -> Any:
        """Returns ``W^T u``, shape ``(n,)``, of ``u``, shape ``(m,)``."""
        if self._l == 1:
            return u.dot(self._blocks)
        if self._r == 1:
            return self._blocks.dot(u)
        return (u @ self._blocks).reshape(self.n)

    def dot_all(self, V: Any) -> Any:
        """Returns ``W v`` of each row of ``V``: shape ``(b, m)``."""
        if self._l == 1:
            return self._blocks.dot(V.T).T
        if self._r == 1:
            return V.dot(self._blocks)
        V = V.reshape(-1, self._l, self._r).transpose(1, 2, 0)
        return (self._blocks @ V).sum(axis=0).T

    def tdot_all(self, U: Any) -> Any:
        """Returns ``W^T u`` of each row of ``U``: shape ``(b, n)``."""
        if self._l == 1:
            if not BLOCK_SIZE <= self.array.size < LARGE_SIZE:
                return U.dot(self._blocks)
            # OpenBLAS takes a tenth less time for few rows at once.
            S = U[:, :FEW_ROWS].dot(self._blocks[:FEW_ROWS])
            for i in range(FEW_ROWS, self.m, FEW_ROWS):
                part = slice(i, i + FEW_ROWS)
                S += U[:, part].dot(self._blocks[part])
            return S
        if self._r == 1:
            return self._blocks.dot(U.T).T
        return (U @ self._blocks).transpose(1, 0, 2).reshape(-1, self.n)

    def inner_and_tdot(self, X: Any, u: Any) -> tuple[float, Any]:
        """Returns ``<X, W>`` and ``W^T u``, in one pass if it is large."""
        X = X.reshape(self._blocks.shape)
        if self.array.size < LARGE_SIZE or self._l != 1:
            return self.inner(X), self.tdot(u)
        inner, y = 0.0, numpy.zeros(self.n, u.dtype)
        for part in _parts(X):
            block = self._blocks[part]
            inner += float(X[part].ravel().dot(block.ravel()))
            y += u[part].dot(block)
        return inner, y

    def inner(self, X: Any) -> float:
        """Returns ``<X, W>`` of ``X``, in the shape of the weight."""
        return float(X.ravel().dot(self.array.ravel()))

    def combination(
            self, a: float, X: Any, c: float, P: Any, Q: Any,
            empty: Callable[..., Any] = numpy.empty) -> Any:
        """Returns ``a X + c sum_k p_k q_k^T`` in the shape of the weight.

        Args:
            a: A number.
            X: Array in the shape of the weight, or ``None`` for zero.
            c: A number.
            P: Array of shape ``(k, m)``.
            Q: Array of shape ``(k, n)``.
            empty: Makes the array that is returned.

        """
        if X is not None:
            X = X.reshape(self._blocks.shape)
        if self._l == 1:
            out = _combination(a, X, c, P.T, Q, empty)
        elif self._r == 1:
            out = _combination(a, X, c, Q.T, P, empty)
        else:
            Q = Q.reshape(-1, self._l, self._r).transpose(1, 0, 2)
            out = _combination(a, X, c, P.T, Q, empty)
        return out.reshape(self.array.shape)


def _parts(X: Any) -> Iterator[slice]:
    """Yields slices of the first axis of about ``BLOCK_SIZE`` entries."""
    step = max(1, BLOCK_SIZE * len(X) // X.size)
    for start in range(0, len(X), step):
        yield slice(start, start + step)


def _combination(
        a: float, X: Any, c: float, rows: Any, columns: Any,
        empty: Callable[..., Any]) -> Any:
    """``a X + c rows columns``: a matrix, or one for each of the columns'.

    As ``(c/a rows columns + X) a``, block by block, it needs no memory beside
    that of the result; where that could leave the range it takes more.

    Args:
        a: A number.
        X: An array of the shape of the result, or ``None`` for zero.
        c: A number.
        rows: Array of shape ``(m, k)``.
        columns: Array of shape ``(k, n)`` or ``(l, k, n)``.
        empty: Makes the array that is returned.

    """
    shape = *columns.shape[:-2], len(rows), columns.shape[-1]
    if math.prod(shape) <= SMALL_SIZE:
        product = numpy.dot if columns.ndim == 2 else numpy.matmul
        out = product(rows * c, columns)
        if X is not None:
            out += X * a
        return out
    out = empty(shape, rows.dtype)
    if X is not None and c == 0:
        return numpy.multiply(X, a, out=out)
    with _short_buffer():
        if X is None or not _is_in_range(c, a, rows, columns):
            _product(rows * c, columns, out)
            if X is not None:
                out += X * a
            return out
        rows = rows * (c / a)
        for part in _parts(out):
            block = out[part]
            if columns.ndim == 2:
                _product(rows[part], columns, block)
            else:
                _product(rows, columns[part], block)
            block += X[part]
            block *= a
    return out


def _is_in_range(c: float, a: float, rows: Any, columns: Any) -> bool:
    """Whether ``c / a rows columns`` is, of float32."""
    ratio = abs(c / a) if a else math.inf
    return ratio > 1e-15 and bool(
        ratio * float(abs(rows).max()) * float(abs(columns).max()) < 1e30)


def _product(rows: Any, columns: Any, out: Any) -> None:
    """``out = rows columns``"""
    # BLAS is not called by matmul for one column and one row.
    product = numpy.multiply if rows.shape[1] == 1 else numpy.matmul
    product(rows, columns, out=out)


@contextlib.contextmanager
def _short_buffer() -> Iterator[None]:
    """Keeps NumPy from copying short rows into a buffer to multiply them.

    It does where more of them fit in one; the product of a column and a row
    then takes three times as long.
    """
    before = numpy.setbufsize(16)  # of this thread
    try:
        yield
    finally:
        numpy.setbufsize(before)
