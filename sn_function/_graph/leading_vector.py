"""The eigenvector of the largest eigenvalue, differentiable to any order.

With unit vector c, ``H c = l c``, and ``R`` the inverse of ``l I - H`` on what
is orthogonal to c, and zero on c itself,

    d c = R dH c        so        gH = (R gc) c^T

Where other eigenvalues are as large as l, up to rounding, c is any vector of a
space, and has no derivative in it: there ``R`` is taken as zero.
"""
from __future__ import annotations

from typing import Any

import chainer
from chainer import backend
from chainer import functions as F

# Two eigenvalues, relative to the largest one, that are told apart.
GAP = {'f': 1e-5, 'd': 1e-12}


def leading_vector(H: chainer.Variable, dtype: Any) -> chainer.Variable:
    """Returns the unit vector c of a symmetric matrix, shape ``(b,)``.

    Args:
        H: Matrix, shape ``(b, b)``, in float64.
        dtype: What its entries were computed in.

    """
    c, = _LeadingVector(GAP[dtype.char]).apply((H,))
    return c


class _LeadingVector(chainer.FunctionNode):
    """``H -> c``"""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.gap = gap
        self.as_large: Any = None  # a projection to eigenvectors beside c

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        H, = inputs
        self.retain_inputs((0,))
        self.retain_outputs((0,))
        xp = backend.get_array_module(H)
        # Of NaN there is no decomposition; it comes back at the end.
        values, vectors = xp.linalg.eigh(xp.where(xp.isfinite(H), H, 0.))
        others = vectors[:, :-1] * (
            values[:-1] >= values[-1] * (1 - self.gap))
        self.as_large = others.dot(others.T)
        return vectors[:, -1] + 0 * H.sum(),

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...],
    ) -> tuple[chainer.Variable, ...]:
        gc, = grad_outputs
        H, = self.get_retained_inputs()
        c, = self.get_retained_outputs()
        xp = backend.get_array_module(H)
        column, row = F.reshape(c, (-1, 1)), F.reshape(c, (1, -1))
        # What R is zero on is given an eigenvalue of l, and then left out.
        left_out = F.matmul(column, row) + self.as_large
        largest = F.matmul(F.matmul(row, H), column)
        largest += (largest.array == 0).astype(H.dtype)  # H is zero
        largest = F.broadcast_to(largest, H.shape)
        identity = xp.eye(len(H), dtype=H.dtype)
        inverse, = _Inverse().apply((
            largest * (left_out + identity) - H,))
        x = F.reshape(gc, (-1, 1))
        x = F.matmul(inverse, x - F.matmul(left_out, x))
        gH = F.matmul(x, row)
        return (gH + F.transpose(gH)) / 2,


class _Inverse(chainer.FunctionNode):
    """``A -> A^-1``, which Chainer computes on the host and by cuBLAS only."""

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        A, = inputs
        self.retain_outputs((0,))
        return backend.get_array_module(A).linalg.inv(A),

    def backward(
            self, indexes: tuple[int, ...], grad_outputs: tuple[Any, ...],
    ) -> tuple[chainer.Variable, ...]:
        g, = grad_outputs
        inverse, = self.get_retained_outputs()
        return -F.matmul(
            F.matmul(inverse, g, transa=True), inverse, transb=True),
