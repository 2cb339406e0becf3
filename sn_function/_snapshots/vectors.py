"""The vectors of a weight: the sigma they stand for, and their conversion.

Chainer keeps ``u`` alone, and sigma is what K power iterations from it come
to; the hook of this package iterates before that where ``u`` is one of another
weight.  PyTorch keeps ``u`` and ``v``, and in test mode sigma is ``u^T W v``.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import numpy

from sn_function import functions
from sn_function._arithmetic import host, singular
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    SETTLED,
    Forward,
    Renewal,
    Settings,
)
from sn_function._arithmetic.matrix import Matrix
from sn_function._arithmetic.power_iteration import power_iteration
from sn_function._arithmetic.subspace import subspace_iteration
from sn_function.errors import VectorValueError


class WeightArrays(NamedTuple):
    """A weight and its vectors, and what is wrong with these, if so."""

    W: Any
    axis: int
    u: Any = None      # (m,)
    v: Any = None      # (n,), of PyTorch only
    gamma: Any = None  # ()
    fault: str | None = None
    axis_is_unclear: bool = False
    us: Any = None     # (b - 1, m), of this package only
    fault_of_us: str | None = None
    map_shape: tuple[int, ...] | None = None  # (c, *size) of u, if it is one
    convolution: Convolution | None = None    # of such a u, where it is known

    @property
    def start(self) -> Any:
        """What iterations begin with: ``(m,)``, or ``(b, m)``."""
        if self.us is None or len(self.us) == 0:
            return self.u
        return numpy.concatenate([self.u[None], self.us])

    @property
    def most_vectors(self) -> int:
        if self.convolution is not None:
            return self.convolution.most_vectors(self.W.shape, self.groups)
        if self.map_shape is not None:
            return math.prod(self.map_shape)
        m = self.W.shape[self.axis]
        return min(m, self.W.size // m)

    @property
    def groups(self) -> Groups | None:
        """Those of the map, each of which has a vector."""
        return None if self.convolution is None else self.convolution.split

    def by_group(self, us: Any) -> Any:
        """Returns vectors with a row for each group of the map."""
        n = 1 if self.groups is None else self.groups.count_in(self.W.shape)
        return us.reshape(-1, us.shape[-1] // n)

    @property
    def is_unknown_map(self) -> bool:
        """Whether nothing can be computed, for want of the convolution."""
        return self.map_shape is not None and self.convolution is None


# Sigma

def estimate(
        arrays: WeightArrays, n_power_iteration: int = 1, n_warmup: int = 0,
) -> float:
    """Returns what the vectors give for sigma in test mode.

    Args:
        arrays: A weight with its vectors.
        n_power_iteration: Number of iterations from ``u``.
        n_warmup: The most iterations before those, where ``u`` is one of
            another weight.

    """
    if arrays.v is not None:
        A = singular.as_matrix(arrays.W, arrays.axis)
        return float(arrays.u @ (A @ arrays.v))
    sigma, = _forward(
        arrays, _settings(arrays, n_power_iteration), n_warmup, 'sigma')
    return float(sigma)


def normalized(
        arrays: WeightArrays, n_power_iteration: int, n_warmup: int,
        factor: float, eps: float) -> tuple[Any, float]:
    """Returns the weight as test mode uses it, and the sigma in it."""
    if arrays.v is not None:
        sigma = estimate(arrays)
        scale = arrays.W.dtype.type(factor / max(sigma, eps))
        return arrays.W * scale, sigma
    Y, sigma = _forward(
        arrays, _settings(arrays, n_power_iteration)._replace(
            factor=factor, eps=eps), n_warmup, 'Y', 'sigma')
    return Y, float(sigma)


def _settings(arrays: WeightArrays, n_power_iteration: int) -> Settings:
    return Settings(
        n_power_iteration, arrays.axis, True, groups=arrays.groups,
        convolution=arrays.convolution)


def _forward(
        arrays: WeightArrays, settings: Settings, n_warmup: int, *names: str,
) -> Any:
    """Returns ``Y`` and sigma, as named: those of a hook in test mode."""
    u = arrays.start.astype(arrays.W.dtype)
    if u.ndim == 2:
        settings = settings._replace(n_vectors=len(u))
    (outputs, _), = host.normalize_all([Forward(
        settings, arrays.W, u,
        1.0 if arrays.gamma is None else arrays.gamma, names,
        renewal=Renewal(n_warmup, SETTLED))])
    return outputs


def partner(A: Any, u: Any) -> Any:
    """Returns ``v = A^T u / |A^T u|``, in the dtype of ``u``."""
    v = u.astype(A.dtype) @ A
    norm = numpy.linalg.norm(v)
    # Where u is orthogonal to A, any v gives a sigma of zero.
    v = v / norm if norm else numpy.full(v.shape, v.size ** -0.5)
    return v.astype(u.dtype)


def angle(A: Any, u: Any, v: Any) -> float:
    """Returns the cosine of the angle between ``u`` and ``A v``."""
    t = A @ v
    lengths = numpy.linalg.norm(t) * numpy.linalg.norm(u)
    return float(u @ t / lengths) if lengths else 0.0


def fit(A: Any, u: Any) -> float:
    """How near ``u`` is to a singular vector of ``A``: 1 where it is one.

    This is ``|A^T u|`` over the sigma of 10 iterations, for a unit vector.
    """
    u = u.astype(A.dtype)
    u /= numpy.linalg.norm(u)
    sigma = float(functions.spectral_norm(A, u, 10).array)
    return float(numpy.linalg.norm(u @ A)) / sigma if sigma else 0.0


# Conversion

def converged(
        arrays: WeightArrays, n_others: int = 0,
) -> tuple[float, Any, Any, Any]:
    """Returns the largest singular value, its vectors, and others, in float64.

    The others are left singular vectors of the next ones, shape
    ``(n_others, m)``.
    """
    A = singular.as_matrix(arrays.W, arrays.axis)
    if n_others == 0:
        sigma, u, v = singular.largest(A)
        return sigma, u, v, numpy.empty((0, len(u)))
    # In one go: where singular values are equal, vectors are any of a space.
    sigma, us = singular.leading(A, n_others + 1)
    return sigma, us[0], partner(A, us[0]), us[1:]


def are_independent(arrays: WeightArrays) -> bool:
    """Whether a hook can start from the vectors as they are."""
    if arrays.is_unknown_map:
        return True  # as far as can be told
    try:
        with numpy.errstate(all='ignore'):
            estimate(arrays)
    except VectorValueError:
        return False
    return True


def converted(
        arrays: WeightArrays, to_torch: bool, n_power_iteration: int,
        converge: bool = False) -> WeightArrays:
    """Returns the arrays with vectors that give the same sigma there.

    Args:
        arrays: A weight with its vectors, of either library.
        to_torch: With vectors for PyTorch, otherwise for Chainer.  There the
            leading one of several is the same.
        n_power_iteration: Number of iterations in Chainer, where the vectors
            come from there.
        converge: With converged vectors instead.

    """
    us = arrays.us
    if converge:
        _, u, v, others = converged(arrays, 0 if us is None else len(us))
        us = None if us is None else others.astype(us.dtype)
    elif to_torch == (arrays.v is not None):
        return arrays
    elif to_torch:
        u, v = _iterated(arrays, n_power_iteration)
    else:
        A = singular.as_matrix(arrays.W, arrays.axis)
        u = start_vector(A, arrays.u, arrays.v)
    dtype = arrays.u.dtype
    return arrays._replace(
        u=u.astype(dtype), v=v.astype(dtype) if to_torch else None, us=us)


def filled(arrays: WeightArrays, with_v: bool) -> WeightArrays:
    """Returns a weight that has no vectors with converged ones."""
    _, u, v, _ = converged(arrays)
    dtype = arrays.W.dtype
    return arrays._replace(
        u=u.astype(dtype), v=v.astype(dtype) if with_v else None)


def compare(
        arrays: WeightArrays, before: WeightArrays, n_power_iteration: int,
) -> tuple[float, float]:
    """Returns the sigma of converted vectors, and how far off it is.

    That is relative to what it was.  The vectors from PyTorch are for one
    iteration.
    """
    n = 1 if before.v is not None else n_power_iteration
    sigma, expected = estimate(arrays, n), estimate(before, n)
    return sigma, abs(sigma - expected) / (abs(expected) or 1.0)


def _iterated(arrays: WeightArrays, n: int) -> tuple[Any, Any]:
    """Returns the u and v that ``n`` iterations end with."""
    # As the hook makes them: also from a u that W takes to zero.
    A = Matrix(arrays.W.astype(numpy.float64), arrays.axis)
    with numpy.errstate(all='ignore'):
        u = arrays.start
        iterations: Any = power_iteration(A, u, n) if u.ndim == 1 else (
            subspace_iteration(A, u, n, False))
    if iterations.sigma:
        return iterations.u, iterations.v
    _, u, v, _ = converged(arrays)
    return u, v


def start_vector(A: Any, u: Any, v: Any) -> Any:
    """Returns a start of one iteration that ends with PyTorch's sigma.

    PyTorch has ``sigma = u^T W v`` of vectors that follow from one another:
    ``u = W v / |W v|`` with the older function, and ``v = W^T u / |W^T u|``
    with the newer one.  One iteration of Chainer's from ``x`` has
    ``|W y|, y = W^T x / |W^T x|``.  That is sigma at ``y = v`` for the older;
    for the newer somewhere between the ``y`` that W takes to u, and ``v``.
    The weight may have moved since, and digits were lost: if ``x = u`` comes
    nearer, that is taken.
    """
    dtype = u.dtype
    u, v = u.astype(A.dtype), v.astype(A.dtype)
    sigma = float(u @ (A @ v))
    if min(A.shape) > singular.LARGE or not A.any():
        return u
    solve, solve_transposed = _pseudo_inverses(A)
    y = _between(A, _unit(solve(u)), v, sigma)
    x = _unit(solve_transposed(y))

    def error(x: Any) -> float:
        s = A.T @ x.astype(dtype)
        return abs(float(numpy.linalg.norm(A @ s)) - sigma * float(
            numpy.linalg.norm(s))) / float(numpy.linalg.norm(s) or 1.0)

    return min((x, u) if x.any() else (u,), key=error)


def _unit(x: Any) -> Any:
    return x / (numpy.linalg.norm(x) or 1.0)


def _between(A: Any, low: Any, high: Any, sigma: float) -> Any:
    """Returns the y between two vectors where ``|A y| / |y|`` is sigma."""
    left, right = 0.0, 1.0
    for _ in range(50):
        t = (left + right) / 2
        y = (1 - t) * low + t * high
        if numpy.linalg.norm(A @ y) < sigma * numpy.linalg.norm(y):
            left = t
        else:
            right = t
    return y


def _pseudo_inverses(
        A: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns what solves ``A x = b`` and ``A^T x = b``, by the smaller of
    ``A A^T`` and ``A^T A``."""
    m, n = A.shape
    values, Q = numpy.linalg.eigh(A @ A.T if m <= n else A.T @ A)
    inverse = numpy.zeros_like(values)
    good = values > 1e-13 * values[-1]
    inverse[good] = 1 / values[good]

    def gram(b: Any) -> Any:
        return Q @ (inverse * (Q.T @ b))

    if m <= n:
        return lambda b: A.T @ gram(b), lambda b: gram(A @ b)
    return lambda b: gram(A.T @ b), lambda b: A @ gram(b)
