"""Singular values and vectors of a weight, in float64."""
from __future__ import annotations

import math
from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from sn_function._arithmetic import host, matrix
from sn_function._arithmetic.convolution import (
    Convolution,
    ConvolutionMatrix,
)
from sn_function._arithmetic.groups import Groups

# From so many rows and columns on, only the largest singular value is found.
LARGE = 4096
# Up to so many, by a decomposition of the matrix; else by so many steps, from
# a random vector and then from the best one.
SMALL = 256
MAX_STEPS = 512
MAX_STARTS = 20
# Residuals, relative to the largest singular value.  Its own error is far
# below that, as it is of second order; a map takes long.
RTOL = 1e-13
MAP_RTOL = 1e-4
# For the vectors of a map after the first.
MAP_ITERATIONS = 50


def as_matrix(W: Any, axis: int) -> Any:
    """Returns a weight as a matrix of float64."""
    return matrix.as_matrix(W, axis).astype(numpy.float64)


def norm(
        W: Any, axis: int, groups: Groups | None = None,
        convolution: Convolution | None = None) -> Any:
    """Returns the largest singular value of a weight, of NumPy or of CuPy.

    With groups it is the largest one of any group, and with a convolution
    that of its map, which is found on the host.

    It is that of the smaller one of the Gram matrices.  For the largest one
    this loses nothing, and it is several times as fast as a singular value
    decomposition.

    Returns:
        An array of shape ``()`` and dtype float64, on the device of ``W``;
        nothing waits for it.  NaN where ``W`` holds NaN or Inf.

    """
    xp = chainer.backend.get_array_module(W)
    if convolution is not None:
        return xp.asarray(_largest(ConvolutionMatrix(
            cuda.to_cpu(W).astype(numpy.float64), convolution), MAP_RTOL)[0])
    A = matrices(W, axis, groups)
    with numpy.errstate(all='ignore'):
        peak = abs(A).max()
        scale = xp.where((peak > 0) & xp.isfinite(peak), peak, 1.)
        # Of NaN there is no decomposition; it comes back at the end.
        A = A / scale
        A = xp.where(xp.isfinite(A), A, 0.)
        # One by one, as CuPy has no such decomposition of large batches.
        largest = xp.stack([
            xp.linalg.eigvalsh(
                x.dot(x.T) if len(x) <= x.shape[1] else x.T.dot(x))[-1]
            for x in A]).max()
        return xp.sqrt(xp.maximum(largest, 0.)) * scale + 0 * peak


def matrices(W: Any, axis: int, groups: Groups | None) -> Any:
    """Returns the groups of a weight as matrices, shape ``(G, m, n)``."""
    if groups is None:
        return as_matrix(W, axis)[None]
    A = groups.split(W, axis).transpose(0, 2, 1, 3)
    return A.reshape(*A.shape[:2], -1).astype(numpy.float64)


def singular_values(W: Any, axis: int) -> tuple[float, float | None]:
    """Returns the largest one, and the condition.

    That is ``inf`` where the smallest one is below what an SVD in float64
    leaves of a zero, whatever the dtype of the weight: it is a matrix of that
    dtype as it is, and not one that rounding has made regular.
    """
    A = as_matrix(W, axis)
    if min(A.shape) > LARGE:
        return largest(A)[0], None
    values = numpy.linalg.svd(A, compute_uv=False)
    zero = values[0] * (max(A.shape) * numpy.finfo(A.dtype).eps)
    condition = values[0] / values[-1] if values[-1] > zero else math.inf
    return float(values[0]), float(condition)


def largest(A: Any) -> tuple[float, Any, Any]:
    """Returns the largest singular value of a matrix and its vectors."""
    return _largest(matrix.Matrix(A, 0))


def _largest(
        A: matrix.Matrix, rtol: float = RTOL) -> tuple[float, Any, Any]:
    """As :func:`largest`; NaN where A holds NaN or Inf."""
    scale = float(abs(A.array).max())
    if not math.isfinite(scale):
        return math.nan, A.array[:, 0], A.array[0]
    A = A.divided_by(scale or 1.)  # so that squares are in the range
    found: Any = None
    if min(A.m, A.n) >= SMALL and scale:
        # Drawn, but always the same: so is the output.
        v = numpy.random.RandomState(0).normal(size=A.n)
        for _ in range(MAX_STARTS):
            value, u, v, residual = _bidiagonalized(A, v, rtol)
            found = value * scale, u, v
            if residual <= rtol * value or min(A.m, A.n) > LARGE:
                return found
    # A row or a column of A for each unit vector, of which there are few.
    dense = (A.tdot_all(numpy.eye(A.m)) if A.m <= A.n
             else A.dot_all(numpy.eye(A.n)).T)
    u, values, v = numpy.linalg.svd(dense, full_matrices=False)
    return float(values[0]) * scale, u[:, 0], v[0]


def leading(A: Any, n: int) -> tuple[float, Any]:
    """Returns the largest singular value, and left vectors of the ``n`` first.

    Returns:
        The value; and for one vector shape ``(m,)``, else ``(n, m)``, the
        rows orthonormal whatever the rank of the matrix is.

    """
    if n == 1:
        value, u, _ = largest(A)
        return value, u
    scale = float(abs(A).max())
    A = A / (scale or 1.)  # so that squares are in the range
    is_wide = A.shape[0] <= A.shape[1]
    squares, vectors = numpy.linalg.eigh(A @ A.T if is_wide else A.T @ A)
    vectors = vectors[:, :-n - 1:-1]
    if not is_wide:
        # The columns of A V are orthogonal, but zero where singular values
        # are; those of Q never are.
        vectors, _ = numpy.linalg.qr(A @ vectors)
    return math.sqrt(max(squares[-1], 0.)) * scale, vectors.T


def leading_of_weight(
        W: Any, axis: int, groups: Groups | None, n: int,
) -> tuple[float, Any]:
    """As :func:`leading`, of a weight; of groups, of each one of them."""
    values, us = zip(*[leading(x, n) for x in matrices(W, axis, groups)])
    return max(values), numpy.concatenate(us, axis=-1)


def leading_of_map(
        W: Any, convolution: Convolution, n: int) -> tuple[float, Any]:
    """As :func:`leading`, of the map of a convolution, or of each group of it.

    Of several vectors those after the first are approximate.
    """
    W = W.astype(numpy.float64)
    if convolution.split is not None:
        shape = convolution.shape_of_group(W.shape)
        values, us = zip(*[
            leading_of_map(block.reshape(shape), convolution.of_group(), n)
            for block in convolution.split.split(W, 0)])
        return max(values), numpy.concatenate(us, axis=-1)
    value, u, _ = _largest(ConvolutionMatrix(W, convolution), MAP_RTOL)
    if n == 1:
        return value, u
    Q, _ = numpy.linalg.qr(
        numpy.random.RandomState(0).normal(size=(len(u), n)))
    U = Q.T.copy()
    if value:
        U[0] = u
        host.warm_up(W, U, 0, MAP_ITERATIONS, convolution=convolution)
    return value, U


def _bidiagonalized(
        A: matrix.Matrix, v: Any, rtol: float = RTOL,
) -> tuple[float, Any, Any, float]:
    """:func:`largest` in the span of few vectors, from v, and its residual.

    Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization: with
    the rows of U and V as vectors, after k steps

        A V^T = U^T B,    A^T U^T = V^T B^T + beta v_k e_k^T

    so the residual of a singular vector p of B is beta ``|p_k|``.  See G. H.
    Golub and C. F. Van Loan, Matrix Computations, 4th edition, section 10.4.
    """
    steps = min(A.m, A.n, MAX_STEPS)
    U, V = (numpy.empty((steps + i, size))
            for i, size in enumerate((A.m, A.n)))
    B = numpy.zeros((steps, steps))
    V[0] = v / numpy.linalg.norm(v)
    for k in range(steps):
        B[k, k] = alpha = _extend(U, k, A.dot(V[k]))
        beta = _extend(V, k + 1, A.tdot(U[k]))
        is_last = k == steps - 1 or 0 in (alpha, beta)
        if k % 8 == 7 or is_last:
            P, values, Q = numpy.linalg.svd(B[:k + 1, :k + 1])
            residual = beta * abs(P[k, 0])
            if is_last or residual <= rtol * values[0]:
                break
        B[k, k + 1] = beta
    return (float(values[0]), P[:, 0] @ U[:k + 1], Q[0] @ V[:k + 1],
            float(residual))


def _extend(basis: Any, k: int, x: Any) -> float:
    """Makes ``x`` the next vector of an orthonormal basis; returns its norm.

    The norm is that of the part orthogonal to the others, and zero where that
    part is rounding only.
    """
    size = numpy.linalg.norm(x)
    for _ in range(2):
        x = x - (basis[:k] @ x) @ basis[:k]
    norm = numpy.linalg.norm(x)
    if not norm > 1e-14 * size:
        basis[k] = 0
        return 0.0
    basis[k] = x / norm
    return float(norm)
