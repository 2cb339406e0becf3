"""Subspace iteration on the groups of a weight, all at once.

Each group has several vectors, the rows of its ``U``.  The formulas are those
of :mod:`.subspace`, and the shapes those of :mod:`.group_iterations`: ``U`` is
``(G, 1, b, m)``, and ``S`` is ``(G, l, b, r)``.  A basis is made orthonormal
by an eigenvalue decomposition,

    U U^T = Q diag(g) Q^T        U <- diag(g)^(-1/2) Q^T U

which shows by ``g`` whether the vectors are independent, and fails for none:
so a device is not waited for.  Where much cancels it is done twice.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import chainer
import numpy

from sn_function import errors
from sn_function._arithmetic.group_iterations import (
    Iterations,
    Vectors,
    as_groups,
    as_rows,
    divided,
    finished,
    iterate_anew,
    length,
    or_one,
    peak,
    row_sizes,
    tdot,
    transposed,
    xp_of,
)
from sn_function._arithmetic.group_maps import GroupMaps
from sn_function._arithmetic.interface import NEVER, Renewal
from sn_function._arithmetic.matrix import ORDINARY
from sn_function._arithmetic.subspace import (
    DEPENDENT,
    INDEPENDENT,
    MOST,
    REGULAR,
    SHIFT,
)


class Subspaces(NamedTuple):
    """What passes on all groups computed.

    Attributes:
        vectors: The leading Ritz vectors, and ``|W v|`` if it is measured.
        basis: Orthonormal bases of the spans, shape ``(G, 1, b, m)``.
        start: The vectors that they began with, likewise.
        are_independent: Whether these were, shape ``(G, 1, 1, 1)``.
        singular_values: Estimates, in order, shape ``(G, 1, b, 1)``.
        following: The vectors moved on, if they are asked for.
        t: ``W v / sigma``, shape ``(G, 1, 1, m)``, likewise.

    """

    vectors: Vectors
    basis: Any
    start: Any
    are_independent: Any
    singular_values: Any
    following: Any = None
    t: Any = None

    def turns(self) -> Any:
        return self.vectors.turns()

    def residuals(self, A: Any) -> Any:
        """Returns ``|W v - sigma u| / sigma``; 0 for a zero or a NaN."""
        return self.vectors.or_zero(length(self.t - self.vectors.us[0]))


def subspace_iteration(
        A: Any, u: Any, n: int, moves: bool, renewal: Renewal = NEVER,
) -> Iterations:
    """Runs ``n`` passes on each group.

    Where a group takes its vectors to zero and is not zero, they are replaced
    by the unit vectors of its largest rows.

    Args:
        A: Array of shape ``(G, l, m, r)``.
        u: Array of shape ``(b, G m)``, which is copied.
        n: Number of passes.
        moves: Whether the vectors are moved on after the last one.
        renewal: When they start from others, as in
            :func:`.group_iterations.power_iteration`.

    Raises:
        VectorValueError: On the host, vectors of a group are not finite, or
            not independent.  On a device they are replaced, too.

    """
    given = as_groups(u.astype(A.dtype), len(A))
    A, scale = _in_range(A)
    moves = moves or renewal != NEVER

    is_host = xp_of(A) is numpy

    def run(U: Any) -> Subspaces:
        found = _iterate(A, U, n, moves)
        if is_host and not found.are_independent.all():
            raise errors.VectorValueError(u)
        return found

    start = given if is_host else _usable(A, given)
    found = iterate_anew(A, run, start, n, renewal)
    if is_host and not found.vectors.s_norms[0].all():
        found = iterate_anew(A, run, _usable(A, given), n, renewal)
    iterations = finished(
        found.vectors, found.vectors.s_norms[0] * scale, as_rows(found.start))
    if renewal.rtol is not None:
        iterations = iterations._replace(residuals=found.residuals(A))
    return iterations._replace(
        basis=found.basis, moved=found.following,
        singular_values=found.singular_values * scale)


def _dot(A: Any, S: Any) -> Any:
    """``W s`` of each group and vector, shape ``(G, 1, b, m)``."""
    if isinstance(A, GroupMaps):
        return A.dot(S)
    return transposed((A @ transposed(S)).sum(axis=1, keepdims=True))


def _in_range(A: Any) -> tuple[Any, Any]:
    """Returns the groups divided by a scale of each, if that is needed."""
    scale = peak(A)
    if xp_of(A) is numpy:
        low, high = ORDINARY[A.dtype.char]
        if low < scale.min() and scale.max() < high:
            return A, 1.0
    return divided(A, scale), scale


def _usable(A: Any, given: Any) -> Any:
    """Returns start vectors that no group but a zero one takes to zero."""
    xp = xp_of(A)
    b, m = given.shape[2:]
    U, is_usable = _orthonormal(given)
    axes: dict[str, Any] = {'axis': (1, 2, 3), 'keepdims': True}
    rows = row_sizes(A)
    is_usable &= (tdot(A, U) != 0).any(**axes) | (
        rows == 0).all(axis=1).reshape(-1, 1, 1, 1)
    largest = xp.argsort(-rows, axis=1)[:, None, :b, None] == xp.arange(m)
    return xp.where(is_usable, given, largest.astype(given.dtype))


def _orthonormal(U: Any) -> tuple[Any, Any]:
    """Returns orthonormal bases, and whether the vectors are independent.

    The latter has shape ``(G, 1, 1, 1)``.  The basis is another where they are
    not.
    """
    xp = chainer.backend.get_array_module(U)
    dtype, (b, m) = U.dtype, U.shape[2:]
    peaks = abs(U).max(axis=3, keepdims=True).astype(numpy.float64)
    is_usable = (xp.isfinite(peaks) & (peaks > 0)).all(axis=2, keepdims=True)
    U = xp.where(is_usable, U / peaks, xp.eye(b, m))
    for _ in range(2):
        U = U / ((U * U).sum(axis=3, keepdims=True) ** 0.5)
        g, Q = xp.linalg.eigh(U @ transposed(U))
        g = xp.expand_dims(g, 3)
        is_usable &= g[:, :, :1] > DEPENDENT ** 2
        U = xp.where(is_usable, transposed(Q) / g ** 0.5 @ U, xp.eye(b, m))
        if xp is numpy and g.min() > INDEPENDENT ** 2:
            break
    return U.astype(dtype), is_usable


def _iterate(
        A: Any, start: Any, n: int, moves: bool) -> Subspaces:
    found = first = _step(A, start, moves or n > 1)
    for k in range(2, n + 1):
        found = _step(A, found.following, moves or k < n)
    return found._replace(
        start=start, are_independent=first.are_independent)


def _step(A: Any, start: Any, moves: bool) -> Subspaces:
    """One pass over all groups, or two to move the vectors on."""
    xp, dtype = xp_of(A), A.dtype
    U, are_independent = _orthonormal(start)
    S = tdot(A, U)
    unit = peak(S)  # where U hardly has what A is large on, it is tiny
    S = (S / unit).astype(dtype, copy=False)
    H = (S @ transposed(S)).sum(axis=1, keepdims=True).astype(numpy.float64)
    is_finite = xp.isfinite(H).all(axis=(2, 3), keepdims=True)
    squares, C = xp.linalg.eigh(xp.where(is_finite, H, 0.0))
    squares = xp.expand_dims(squares, 3)[:, :, ::-1]
    squares = xp.where(is_finite, xp.maximum(squares, 0.0), numpy.nan)
    C = transposed(C)[:, :, ::-1].astype(dtype)
    basis, S = C @ U, C @ S
    square = squares[:, :, :1]
    singular_values = squares ** 0.5 * unit
    sigma = singular_values[:, :, :1]
    v = (S[:, :, :1] / or_one(square ** 0.5)).astype(dtype, copy=False)
    vectors = Vectors([basis[:, :, :1]], [v], [sigma], [sigma])
    if not moves:
        return Subspaces(
            vectors, basis, start, are_independent, singular_values)
    T = _dot(A, S) / unit
    t = T[:, :, :1] / or_one(square)
    vectors.t_norms[0] = length(t) * sigma
    c = -REGULAR * square
    if squares.shape[2] > 1:
        c = c + SHIFT * squares[:, :, -1:]
    c = xp.minimum(c, (squares - abs(T).max(axis=3, keepdims=True) / MOST).min(
        axis=2, keepdims=True))
    T = (T - c * basis) / or_one(squares - c)
    T[:, :, :1] /= or_one(length(T[:, :, :1]))
    return Subspaces(
        vectors, basis, start, are_independent, singular_values,
        T.astype(dtype, copy=False), t)
