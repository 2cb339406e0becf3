"""The leading eigenvector of a Gram matrix, by Lanczos' method."""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import numpy

STEPS = 16
MAX_STARTS = 20


class Gram(NamedTuple):
    """``A A^T``, by its factors: products with a vector."""

    dot: Callable[[Any], Any]
    tdot: Callable[[Any], Any]

    def __matmul__(self, u: Any) -> Any:
        return self.dot(self.tdot(u))


def start(length: int) -> Any:
    """Returns a vector to start from."""
    # Drawn, but always the same: so is the output.
    return numpy.random.RandomState(0).normal(size=length)


def leading(
        G: Any, x: Any, rtol: float, is_over: Callable[[], bool] = bool,
) -> Any:
    """Returns about the leading eigenvector of G, from x.

    Lanczos' method with full reorthogonalization, started again from what it
    found until the residual is small.
    """
    Q = numpy.empty((STEPS, len(x)), x.dtype)
    for _ in range(MAX_STARTS):
        Q[0] = x / numpy.linalg.norm(x)
        H = numpy.zeros((STEPS,) * 2, x.dtype)
        for k in range(STEPS):
            y = G @ Q[k]
            for _ in range(2):
                h = Q[:k + 1].conj() @ y
                y = y - h @ Q[:k + 1]
                H[:k + 1, k] += h
            beta = numpy.linalg.norm(y)
            if k + 1 == STEPS or beta <= 1e-12 * abs(H).max() or is_over():
                break
            H[k + 1, k] = beta
            Q[k + 1] = y / beta
        values, vectors = numpy.linalg.eigh(H[:k + 1, :k + 1])
        x = vectors[:, -1] @ Q[:k + 1]
        if (beta * abs(vectors[-1, -1]) <= rtol * values[-1]
                or values[-1] <= 0 or is_over()):
            break
    return x
