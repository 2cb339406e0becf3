"""K power iterations on each group of a weight at once, and their adjoint.

The groups ``W_1 .. W_G`` of a weight are maps of their own, side by side, so
the norm of all of them is that of the largest:

    sigma = max_g sigma_g        Y = gamma f W / max(sigma, eps)

Each ``sigma_g`` is from iterations of its own, as in :mod:`.power_iteration`,
and the gradient of sigma is that of the largest one.  The weight is seen as an
array ``A`` of shape ``(G, l, m, r)``, see :class:`.groups.Groups`; the vectors
``u`` have the shape ``(G, 1, 1, m)`` and ``v`` ``(G, l, 1, r)``.

All here is for NumPy and for CuPy, where nothing waits for the device.  On the
host each group is divided by its largest entry only where a norm is so large
or small that its square has lost digits, and then in float64; on a device,
always.  What a scale does to the letters:

    A = W_g / scale        sigma_g = scale |t_K|        G is the same
"""
from __future__ import annotations

from typing import Any, NamedTuple

import chainer
import numpy

from sn_function import errors
from sn_function._arithmetic import buffers, power_iteration
from sn_function._arithmetic.interface import (
    Arrays,
    Backward,
    Forward,
    Settings,
)
from sn_function._arithmetic.matrix import ORDINARY, accumulator_dtype


class Vectors(NamedTuple):
    """What ``n`` iterations on all groups computed.

    Attributes:
        us, vs: ``u_0 .. u_n`` and ``v_1 .. v_n``.
        s_norms, t_norms: Norms of ``s_1 .. s_n`` and ``t_1 .. t_n``, each of
            shape ``(G, 1, 1, 1)`` and dtype float64.

    """

    us: list[Any]
    vs: list[Any]
    s_norms: list[Any]
    t_norms: list[Any]


class OfGroup(NamedTuple):
    """What :class:`.interface.Iterations` has, of one group."""

    u: Any
    v: Any
    start: Any
    restarted: Any


class Iterations(NamedTuple):
    """What a forward computed, for its backward.

    Attributes:
        vectors: Those of all groups.
        sigmas: Estimate of each group, shape ``(G,)`` and dtype float64.
        sigma: The largest: a float, or an array of shape ``()`` of a device.
        largest: Index of that group: a slice of length 1, or an array of
            shape ``(1,)`` of a device.
        given: The start vector that was given, shape ``(G m,)``.
        scale: What each group was divided by, shape ``(G, 1, 1, 1)``, or 1.
        u_norm: What each vector was divided by, likewise.
        restarts: Whether ``u_0`` of a group is not the one that was given,
            likewise, or ``False``.

    """

    vectors: Vectors
    sigmas: Any
    sigma: Any
    largest: Any
    given: Any
    scale: Any = 1.0
    u_norm: Any = 1.0
    restarts: Any = False

    @property
    def u(self) -> Any:
        return self.vectors.us[-1].reshape(-1)

    @property
    def v(self) -> Any:
        return self.vectors.vs[-1].reshape(-1)

    @property
    def start(self) -> Any:
        if self.restarts is False:
            return self.given
        first = self.vectors.us[0]
        given = self.given.reshape(first.shape)
        xp = chainer.backend.get_array_module(first)
        return xp.where(self.restarts, first, given).reshape(-1).astype(
            given.dtype, copy=False)

    @property
    def restarted(self) -> Any:
        """That of the largest group; of the others nothing depends on it."""
        if self.restarts is False:
            return False
        restarted = self.restarts[self.largest].reshape(())
        return (bool(restarted) if isinstance(self.largest, slice)
                else restarted)

    def floored(self, eps: float) -> tuple[Any, Any]:
        """Returns ``max(sigma, eps)``, and whether that is sigma."""
        return floored(self.sigma, eps)

    def of_largest(self) -> OfGroup:
        """Returns the vectors of the largest group."""
        us, vs, *_ = self.vectors
        start = self.start.reshape(us[0].shape)
        u, v, start = [
            x[self.largest].reshape(-1) for x in (us[-1], vs[-1], start)]
        return OfGroup(u, v, start, self.restarted)


def floored(sigma: Any, eps: float) -> tuple[Any, Any]:
    """Returns ``max(sigma, eps)``, and whether that is sigma."""
    if isinstance(sigma, float):
        if sigma < eps or sigma == 0:
            return eps or 1.0, False
        return sigma, True
    xp = chainer.backend.get_array_module(sigma)
    is_below = (sigma < eps) | (sigma == 0)
    return xp.where(is_below, eps or 1.0, sigma), ~is_below


# Iterations

def iterate(A: Any, u: Any, n: int) -> Vectors:
    """Runs ``n`` power iterations on all groups.

    Args:
        A: Array of shape ``(G, l, m, r)``.
        u: Array of shape ``(G, 1, 1, m)``.
        n: Number of iterations.

    """
    vectors = Vectors([u], [], [], [])
    for _ in range(n):
        v, s_norm = _unit(_tdot(A, u))
        u, t_norm = _unit(_dot(A, v))
        for column, x in zip(vectors, (u, v, s_norm, t_norm)):
            column.append(x)
    return vectors


def _tdot(A: Any, u: Any) -> Any:
    """``W^T u`` of each group, shape ``(G, l, 1, r)``."""
    return u @ A


def _dot(A: Any, v: Any) -> Any:
    """``W v`` of each group, shape ``(G, 1, 1, m)``."""
    t = A @ v.transpose(0, 1, 3, 2)
    if A.shape[1] > 1:
        t = t.sum(axis=1)
    return t.reshape(len(A), 1, 1, -1)


def _unit(x: Any) -> tuple[Any, Any]:
    """Unit vectors, or zero where x is zero; and the norms, in float64."""
    norm = _norm(x)
    return (x / _or_one(norm)).astype(x.dtype, copy=False), norm


def _norm(x: Any) -> Any:
    x = x.astype(numpy.float64, copy=False).reshape(len(x), 1, 1, -1)
    return (x * x).sum(axis=3, keepdims=True) ** 0.5


def _or_one(x: Any) -> Any:
    """``x``, or 1 where that is zero."""
    return x + (x == 0)


def _peak(x: Any) -> Any:
    """The largest magnitude of each group, or 1 where it is 0 or not finite.
    """
    xp = chainer.backend.get_array_module(x)
    peak = abs(x).max(axis=(1, 2, 3), keepdims=True).astype(numpy.float64)
    return xp.where((peak > 0) & xp.isfinite(peak), peak, 1.0)


# Forward

def normalize(call: Forward) -> tuple[Arrays, Iterations]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Call it with NumPy's warnings off, as :func:`.power_iteration.normalize`.

    Raises:
        VectorValueError: On the host, ``u`` is zero or not finite.

    """
    settings, W = call.settings, call.W
    dtype = accumulator_dtype(W.dtype)
    array = W.astype(dtype, copy=False)
    iterations = _power_iteration(settings, array, call.u)
    outputs: Arrays = ()
    if 'Y' in call.output_names:
        divisor, _ = iterations.floored(settings.eps)
        Y = _times(array, _number(call.gamma) * settings.factor / divisor,
                   buffers.empty_of(W, call.reuse and W is array))
        outputs = Y.astype(W.dtype, copy=False),
    if 'sigma' in call.output_names:
        xp = chainer.backend.get_array_module(W)
        outputs += xp.asarray(iterations.sigma).astype(dtype),
    return outputs, iterations


def _power_iteration(settings: Settings, W: Any, u: Any) -> Iterations:
    A = _split(settings, W)
    # A copy: the owner of u is free to change it.
    given = u.astype(W.dtype)
    start = given.reshape(len(A), 1, 1, A.shape[2])
    if not isinstance(W, numpy.ndarray):
        return _carefully(A, start, settings.n_power_iteration)
    vectors = iterate(A, start, settings.n_power_iteration)
    low, high = ORDINARY[W.dtype.char]
    norms = numpy.array([vectors.s_norms, vectors.t_norms])
    if norms.min() > low and norms.max() < high:
        return _finished(vectors, vectors.t_norms[-1], given)
    if not (numpy.isfinite(given).all() and given.any()):
        raise errors.VectorValueError(u)
    return _carefully(
        A.astype(numpy.float64), start, settings.n_power_iteration)


def _split(settings: Settings, W: Any) -> Any:
    assert settings.groups is not None
    return settings.groups.split(W, settings.axis)


def _carefully(A: Any, given: Any, n: int) -> Iterations:
    """Iterations on groups and from vectors of any size.

    A vector that its group takes to zero is replaced, as is one that is not
    finite: by the unit vector of the row of the largest norm.
    """
    xp = chainer.backend.get_array_module(A)
    scale = _peak(A)
    A = (A / scale).astype(A.dtype, copy=False)
    u = given.astype(numpy.float64) / _peak(given)
    u_norm = _or_one(_norm(u))
    start = (u / u_norm).astype(A.dtype)
    is_usable = xp.isfinite(u_norm) & (
        _tdot(A, start) != 0).any(axis=(1, 3), keepdims=True)
    rows = (A * A).sum(axis=(1, 3))
    largest_row = xp.arange(A.shape[2]) == rows.argmax(axis=1)[:, None]
    start = xp.where(is_usable, start, largest_row[:, None, None].astype(
        A.dtype))
    vectors = iterate(A, start, n)
    iterations = _finished(
        vectors, vectors.t_norms[-1] * scale, given.reshape(-1))
    return iterations._replace(
        scale=scale, u_norm=u_norm * _peak(given), restarts=~is_usable)


def _finished(vectors: Vectors, sigmas: Any, given: Any) -> Iterations:
    sigmas = sigmas.reshape(-1)
    sigma, largest = sigmas.max(), sigmas.argmax()  # NaN is the largest
    if isinstance(sigmas, numpy.ndarray):
        sigma, largest = float(sigma), slice(largest, largest + 1)
    else:
        largest = largest.reshape(1)
    return Iterations(vectors, sigmas, sigma, largest, given)


def normalize_and_store(call: Forward) -> tuple[Arrays, Iterations]:
    """:func:`normalize`, which then overwrites ``u`` if that is asked for."""
    outputs, iterations = normalize(call)
    if call.update_u:
        store(call.u, iterations)
    return outputs, iterations


def store(u: Any, iterations: Iterations) -> None:
    """Overwrites ``u`` with ``u_K``, where no sigma is zero or not finite.

    Nothing is changed where one is not finite; the vector of a group whose
    sigma is zero stays as it is.
    """
    xp = chainer.backend.get_array_module(u)
    new = iterations.vectors.us[-1]
    is_good = (iterations.sigmas > 0) & xp.isfinite(iterations.sigma)
    old = u.reshape(new.shape)
    u[...] = xp.where(
        is_good.reshape(-1, 1, 1, 1), new, old).reshape(-1)


# Backward

def gradients(call: Backward) -> Arrays:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Call it with NumPy's warnings off, as :func:`.power_iteration.normalize`.

    """
    settings, iterations, wanted, W, u, gamma, gY, gsigma, reuse = call
    dtype = iterations.vectors.us[0].dtype
    array = W.astype(dtype, copy=False)
    a, c, dot = 0.0, 0.0, 0.0  # gW = a gY + c G
    if gY is not None:
        gY = gY.astype(dtype, copy=False)
        a, c, dot = _coefficients(
            settings, iterations, gamma, _inner(gY, array))
    if gsigma is not None:
        c = c + _number(gsigma)
    grads: dict[str, Any] = {}
    if 'gamma' in wanted:
        xp = chainer.backend.get_array_module(W)
        grads['gamma'] = xp.asarray(settings.factor * dot).astype(gamma.dtype)
    if 'W' in wanted or 'u' in wanted:
        G, ubar = _adjoint(
            settings, iterations, array, 'W' in wanted, 'u' in wanted)
        if 'W' in wanted:
            out = _times(gY, a, buffers.empty_of(
                W, reuse and W is array), array)
            blocks = _split(settings, out)
            blocks[iterations.largest] += (G * c).astype(dtype, copy=False)
            grads['W'] = out.astype(W.dtype, copy=False)
        if 'u' in wanted:
            gu = _zeros_like(iterations.vectors.us[0])
            gu[iterations.largest] = ubar * c
            grads['u'] = gu.reshape(-1).astype(u.dtype)
    return tuple([grads[name] for name in wanted])


def _coefficients(
        settings: Settings, iterations: Any, gamma: Any, dot: Any,
) -> tuple[Any, Any, Any]:
    """As :func:`.power_iteration.coefficients`, on a device, too."""
    if isinstance(dot, float):
        return power_iteration.coefficients(
            settings, iterations, gamma, dot)
    xp = chainer.backend.get_array_module(dot)
    divisor, is_above = iterations.floored(settings.eps)
    dot = dot / divisor
    a = _number(gamma) * settings.factor / divisor
    return a, xp.where(is_above, -a * dot, 0.0), dot


def _adjoint(
        settings: Settings, iterations: Iterations, W: Any, need_W: bool,
        need_u: bool) -> tuple[Any, Any]:
    """Differentiates the sigma of the largest group, see the adjoint there.

    Returns:
        ``G``, shape ``(1, l, m, r)``, and ``ubar``, shape ``(1, 1, 1, m)``;
        or ``None`` for what is not needed.

    """
    largest = iterations.largest
    us, vs, s_norms, t_norms = [
        [x[largest] for x in column] for column in iterations.vectors]
    if settings.detach_uv:
        return us[-1].transpose(0, 1, 3, 2) * vs[-1], None
    scale, u_norm, restarts = [
        x[largest] if hasattr(x, 'shape') else x for x in (
            iterations.scale, iterations.u_norm, iterations.restarts)]
    dtype = us[0].dtype
    A = (_split(settings, W)[largest] / scale).astype(dtype, copy=False)
    P: Any = []
    Q: Any = []
    tbar, ubar = us[-1], None
    for k in range(len(vs) - 1, -1, -1):
        sbar = _tdot(A, tbar)
        sbar = sbar - vs[k] * (vs[k] * sbar).sum()
        sbar = (sbar / _or_one(s_norms[k])).astype(dtype, copy=False)
        P += [tbar, us[k]]
        Q += [vs[k], sbar]
        if k > 0:
            tbar = (_dot(A, sbar) / _or_one(t_norms[k - 1])).astype(
                dtype, copy=False)
        elif need_u:
            ubar = _dot(A, sbar) * (scale / u_norm)
            ubar = ubar * (1 - restarts)
    if not need_W:
        return None, ubar
    xp = chainer.backend.get_array_module(A)
    P, Q = (xp.concatenate(x, axis=2) for x in (P, Q))
    return P.transpose(0, 1, 3, 2) @ Q, ubar


def _inner(x: Any, y: Any) -> Any:
    """``<x, y>``: a float, or an array of a device."""
    if isinstance(x, numpy.ndarray):
        return float(x.ravel().dot(y.ravel()))
    return (x.astype(numpy.float64) * y).sum()


def _number(x: Any) -> Any:
    """A number, or an array of shape ``()``: as a float, on the host."""
    return (x.item() if isinstance(x, numpy.ndarray)
            else x if isinstance(x, float) else x.astype(numpy.float64))


def _times(x: Any, number: Any, empty: Any, like: Any = None) -> Any:
    """``x`` times a number, in its dtype; zeros if x is ``None``.

    Args:
        x: An array, or ``None``.
        number: A number, or an array of shape ``()`` and dtype float64.
        empty: Makes the array that is returned, on the host.
        like: An array of the shape and dtype of the result.

    """
    like = x if like is None else like
    xp = chainer.backend.get_array_module(like)
    out = (xp.empty if xp is not numpy else empty)(like.shape, like.dtype)
    if x is None:
        out[...] = 0
        return out
    if xp is numpy:
        return numpy.multiply(x, float(number), out=out)
    # Of one dimension more, it is not taken for a number of the dtype of x.
    out[...] = x * number.reshape((1,) * x.ndim)
    return out


def _zeros_like(x: Any) -> Any:
    return chainer.backend.get_array_module(x).zeros_like(x)
