"""K power iterations and their adjoint, on arrays.

Forward, from any non-zero ``u_0``, for ``k = 1..K``:

    s_k = W^T u_{k-1}    v_k = s_k / |s_k|
    t_k = W v_k          u_k = t_k / |t_k|        sigma = |t_K| = u_K^T W v_K

Adjoint, the derivative of sigma through every iteration (a bar marks the
derivative of sigma with respect to what is under it):

    tbar_K = u_K
    for k = K..1:
        G      += tbar_k v_k^T
        vbar    = W^T tbar_k
        sbar_k  = (vbar - v_k (v_k . vbar)) / |s_k|
        G      += u_{k-1} sbar_k^T
        ubar    = W sbar_k
        tbar_{k-1} = (ubar - u_{k-1} (u_{k-1} . ubar)) / |t_{k-1}|      (k > 1)

so ``d sigma / d W = G`` has rank 2K, and ``d sigma / d u_0 = ubar`` after
k = 1.  With u and v held constant it is ``u_K v_K^T``, of rank 1.

On NumPy the norms are Python floats and decisions are taken on them; on a
device they are arrays of shape ``()`` and nothing here waits for them.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import numpy
from chainer import backend

from sn_function import _matrix, errors


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype in which sums over entries of ``dtype`` are made."""
    return numpy.dtype(numpy.float32) if dtype.char == 'e' else dtype


class Settings(NamedTuple):
    """What the caller chose."""

    n_power_iteration: int
    axis: int
    detach_uv: bool
    factor: float = 1.0
    eps: float = 0.0


class PowerIteration(NamedTuple):
    """What K iterations computed; all that the adjoint needs beside W.

    ``us`` holds ``u_0 .. u_K``, ``vs`` holds ``v_1 .. v_K``.  A norm that is
    zero is stored as 1, so that the vector divided by it is zero, too.
    Everything is in units of ``W / scale``; ``scale`` is 1 unless W is out of
    the range in which squares are safe.  ``restarted`` tells that ``u_0`` is
    not the one that was given.
    """

    us: list[Any]
    vs: list[Any]
    s_norms: list[Any]
    t_norms: list[Any]
    sigma: Any
    scale: float = 1.0
    u_scale: float = 1.0
    restarted: bool = False

    @property
    def u(self) -> Any:
        return self.us[-1]

    @property
    def v(self) -> Any:
        return self.vs[-1]


def unfold(W: Any, axis: int) -> _matrix.Matrix:
    """Returns ``W`` as a matrix in the accumulator's dtype."""
    return _matrix.Matrix(
        W.astype(accumulator_dtype(W.dtype), copy=False), axis)


class _ExtremeNorm(ArithmeticError):
    pass


def _ordinary_norm(
        low: float, high: float) -> Callable[[Any], tuple[Any, Any]]:
    def norm(x: Any) -> tuple[Any, Any]:
        norm = math.sqrt(x.dot(x))
        if not low < norm < high:
            raise _ExtremeNorm
        return norm, norm

    return norm


# Norms, by dtype.  Outside of the range the squares in them may have lost
# digits to overflow or underflow: see _rescaled.
_ORDINARY_NORM = {
    'f': _ordinary_norm(1e-15, 1e15),
    'd': _ordinary_norm(1e-140, 1e140),
}


def _host_norm(x: Any) -> tuple[Any, Any]:
    norm = math.sqrt(x.dot(x))
    return norm, norm or 1.0


def _device_norm(x: Any) -> tuple[Any, Any]:
    xp = backend.get_array_module(x)
    largest = abs(x).max()
    y = x / xp.where(largest == 0, 1, largest)
    norm = (largest * xp.sqrt(y.dot(y))).astype(x.dtype, copy=False)
    return norm, xp.where(norm == 0, 1, norm).astype(x.dtype, copy=False)


def _iterate(
        A: _matrix.Matrix, u: Any, n: int,
        norm: Callable[[Any], tuple[Any, Any]]) -> PowerIteration:
    us, vs, s_norms, t_norms = [u], [], [], []
    sigma = None
    for _ in range(n):
        s = A.tdot(u)
        _, divisor = norm(s)
        v = s / divisor
        s_norms.append(divisor)
        t = A.dot(v)
        sigma, divisor = norm(t)
        u = t / divisor
        t_norms.append(divisor)
        us.append(u)
        vs.append(v)
    return PowerIteration(us, vs, s_norms, t_norms, sigma)


def power_iteration(A: _matrix.Matrix, u: Any, n: int) -> PowerIteration:
    """Runs ``n`` power iterations on ``A`` from ``u``, shape ``(m,)``.

    A weight that holds NaN or Inf gives a sigma that is NaN.  Call it with
    NumPy's warnings off: what overflows is done again, and NaN shows.

    Raises:
        VectorValueError: ``u`` is zero or not finite.  On a device this is
            not looked at, as it would have to be waited for.

    """
    dtype = A.array.dtype
    u = u.astype(dtype, copy=False)
    if not isinstance(u, numpy.ndarray):
        return _iterate(A, u, n, _device_norm)
    try:
        return _iterate(A, u, n, _ORDINARY_NORM[dtype.char])
    except _ExtremeNorm:
        return _rescaled(A, u, n)


def _rescaled(A: _matrix.Matrix, u: Any, n: int) -> PowerIteration:
    """The same for a weight or a ``u`` of extreme size, or a zero product."""
    u_scale = float(abs(u).max())
    if not 0 < u_scale < math.inf:
        raise errors.VectorValueError(u)
    scale = float(abs(A.array).max())
    if not math.isfinite(scale):
        nan = numpy.full(A.m, numpy.nan, u.dtype)
        return _iterate(A, nan, n, _host_norm)._replace(sigma=math.nan)
    if scale == 0:
        return _iterate(A, u, n, _host_norm)
    # Powers of two: dividing by them loses no digit.
    scale = 2.0 ** (math.frexp(scale)[1] - 1)
    u_scale = 2.0 ** (math.frexp(u_scale)[1] - 1)
    A = A.scaled(scale)
    it = _iterate(A, u / u_scale, n, _host_norm)
    if not it.sigma:
        # W^T u_0 is zero and W is not: u_0 would be stuck, and sigma 0.  The
        # largest row of W is never orthogonal to itself.
        e = numpy.zeros_like(u)
        e[A.largest_row()] = 1
        it = _iterate(A, e, n, _host_norm)._replace(restarted=True)
    return it._replace(scale=scale, u_scale=u_scale)


def store(u: Any, it: PowerIteration) -> None:
    """Overwrites ``u`` with ``u_K``, unless that is zero or not finite."""
    if isinstance(u, numpy.ndarray):
        if 0 < it.sigma < math.inf:
            u[...] = it.u
    else:
        xp = backend.get_array_module(u)
        is_good = (it.sigma > 0) & xp.isfinite(it.sigma)
        u[...] = xp.where(is_good, it.u, u)


def adjoint(
        A: _matrix.Matrix, it: PowerIteration, detach_uv: bool, need_u: bool
) -> tuple[Any, Any, Any]:
    """Differentiates sigma with respect to ``A`` and ``u_0``.

    Args:
        A: The matrix that ``it`` was computed from.
        it: The iterations.
        detach_uv: Take u and v as constants.
        need_u: Whether the derivative with respect to ``u_0`` is wanted.

    Returns:
        ``P``, shape ``(r, m)``, and ``Q``, shape ``(r, n)``, such that
        ``d sigma / d A = P^T Q``; and ``ubar``, shape ``(m,)``, or ``None``.

    """
    if detach_uv:
        return it.u[None], it.v[None], None
    K = len(it.vs)
    empty = (numpy.empty if isinstance(it.u, numpy.ndarray)
             else backend.get_array_module(it.u).empty)
    P = empty((2 * K, A.m), it.u.dtype)
    Q = empty((2 * K, A.n), it.u.dtype)
    tbar = it.u
    for k in range(K - 1, -1, -1):
        u, v = it.us[k], it.vs[k]
        P[2 * k] = tbar
        Q[2 * k] = v
        P[2 * k + 1] = u
        sbar = A.tdot(tbar)
        sbar -= v * v.dot(sbar)
        sbar /= it.s_norms[k]
        Q[2 * k + 1] = sbar
        if k > 0 or need_u:
            ubar = A.dot(sbar)
        if k > 0:
            tbar = (ubar - u * u.dot(ubar)) / it.t_norms[k - 1]
    if not need_u:
        return P, Q, None
    if it.restarted:
        return P, Q, ubar * 0
    return P, Q, ubar * (it.scale / it.u_scale)


def number(x: Any) -> Any:
    """A scalar: a Python float, except that device values stay there."""
    if isinstance(x, float):
        return x
    return x.item() if isinstance(x, (numpy.ndarray, numpy.generic)) else x


def floored(it: PowerIteration, eps: float) -> tuple[Any, float, Any]:
    """``max(sigma, eps)``, the scale it is in units of, and if it is sigma."""
    sigma = it.sigma
    if isinstance(sigma, float):
        if sigma * it.scale < eps or sigma == 0:
            return eps or 1.0, 1.0, False  # with eps 0, W is 0
        return sigma, it.scale, True
    xp = backend.get_array_module(sigma)
    # With eps 0 the floor is the least number that can be divided by.
    eps = max(eps, float(numpy.finfo(sigma.dtype).tiny))
    return xp.maximum(sigma, sigma.dtype.type(eps)), 1.0, ~(sigma < eps)
