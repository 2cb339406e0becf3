"""A weight seen as an ``m x n`` matrix, and its products.

The output axis (length ``m``) may be any axis; all the others, in their
order, make up ``n``.  With ``l`` the product of the axes before it and ``r``
of those after it, a C-contiguous weight is an ``(l, m, r)`` array, and the
matrix is never transposed in memory:

    (W v)[i]      = sum_a sum_b  W[a, i, b] v[a, b]
    (W^T u)[a, b] = sum_i        u[i] W[a, i, b]

Where ``l`` or ``r`` is 1 these are one matrix-vector product of BLAS, else a
batch of them over ``a``.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

from sn_function import errors


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype in which sums over entries of ``dtype`` are made."""
    return numpy.dtype(numpy.float32) if dtype.char == 'e' else dtype


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

    def scaled(self, scale: float) -> Matrix:
        """Returns ``W / scale``."""
        return Matrix(self.array / scale, self._axis)

    def largest_row(self) -> int:
        """Returns the index of the row with the largest norm."""
        x = abs(self._blocks).reshape(self._l, self.m, self._r)
        return int((x * x).sum(axis=(0, 2)).argmax())

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

    def outer(self, P: Any, Q: Any) -> Any:
        """Returns ``sum_k p_k q_k^T`` in the shape of the weight.

        Args:
            P: Array of shape ``(k, m)``.
            Q: Array of shape ``(k, n)``.

        """
        if self._l == 1:
            out = P.T.dot(Q)
        elif self._r == 1:
            out = Q.T.dot(P)
        else:
            out = P.T @ Q.reshape(-1, self._l, self._r).transpose(1, 0, 2)
        return out.reshape(self.array.shape)
